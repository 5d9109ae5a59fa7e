"""From a config to what the library takes: the only place where strings become functions.

An error is one line that names the key, its value and what is allowed, and it comes before anything compiles.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tokenizers

from fedkd_jax import data as fd
from fedkd_jax import tasks
from fedkd_jax.aggregate import (
    clip_update,
    coordinate_median,
    example_weight,
    fixed_weight,
    trimmed_mean,
    uniform_weight,
)
from fedkd_jax.algorithms import (
    centralised,
    fedavg,
    feddropout,
    fedkd,
    fedpaq,
    fedprox,
    fetchsgd,
    fml,
    keep_units,
    local_only,
    scaffold,
)
from fedkd_jax.attacks import HostileFn, attacked, hostile_share, label_flip, scaled, sign_flip
from fedkd_jax.codecs import chain, error_feedback, identity_codec, power_codec, quantise, svd_codec, top_k
from fedkd_jax.config import ConfigError, DataConfig, Experiment, MethodConfig, ModelConfig, OptimizerConfig
from fedkd_jax.local import count_steps
from fedkd_jax.losses import mutual_distillation, per_example
from fedkd_jax.models import (
    TransformerConfig,
    cnn,
    compute_in,
    freeze,
    is_fixed,
    is_table,
    layer_compressible,
    layer_view,
    load_bert,
    minilm_folder,
    mlp,
    rematerialise,
    split_params,
    with_pretrained,
)
from fedkd_jax.parallel import Layout
from fedkd_jax.participation import Participation, available_by, available_with, unreliable
from fedkd_jax.privacy import fixed_mean, privacy_spent, private_mean, private_send
from fedkd_jax.svd import energy_threshold
from fedkd_jax.tasks import Clients
from fedkd_jax.types import Aggregator, Algorithm, Codec, Model, SendFn, Wire

SKETCH_ROWS = 5
SYNTHETIC_EVALUATED = 1000  # clients

# ---- data ------------------------------------------------------------------------------------------------------------


def build_data(config: Experiment) -> Clients:
    """Loads and deals the examples.

    Raises:
        ConfigError, ValueError, FileNotFoundError: data that is not there, a partition that cannot be.

    >>> clients = build_data(Experiment(data=DataConfig(clients=5)))
    >>> clients.train.start.shape, int(clients.train.count.sum() + clients.test.count.sum())
    ((5,), 1797)
    """
    c = config.data
    build = {
        "classification": _classification,
        "tagging": _tagging,
        "recommendation": _recommendation,
        "characters": _characters,
    }[c.task]
    clients = build(config)
    attacks = any(method.attack for method in config.methods.values())
    if attacks and round(config.hostile * clients.size, 6) < 1:
        raise ConfigError("hostile", config.hostile, f"a share that is one of {clients.size} clients at least")
    if config.cohort is not None and config.cohort > clients.size:
        raise ConfigError("cohort", config.cohort, f"1 to the number of clients in {c.name}, {clients.size}")
    ids = np.arange(clients.size) if clients.eval_ids is None else clients.eval_ids
    some = tasks.subset(len(ids), None if c.synthetic else c.eval_clients, c.seed)
    if config.hostile:
        some = some[~np.asarray(jax.vmap(build_hostile(config, clients.size))(ids[some]))]
    if len(some) == len(ids):
        return clients
    if not clients.test.count[some].any():
        who = f"is honest (hostile is {config.hostile}) and" if config.hostile else "drawn"
        raise ConfigError("data.eval_clients", c.eval_clients, f"more: none {who} has a test example")
    return dataclasses.replace(clients, test=fd.from_arrays(clients.test).take(some), eval_ids=ids[some])


def build_hostile(config: Experiment, clients: int) -> HostileFn:
    """Which of so many clients are hostile.

    >>> hostile = build_hostile(Experiment(hostile=0.2), 20)
    >>> sum(bool(hostile(i)) for i in range(20))
    4
    """
    return hostile_share(config.hostile, clients, seed=config.data.seed)


def poison(config: Experiment, method: MethodConfig, clients: Clients) -> Clients:
    """The clients as a method finds them: with the labels that hostile ones give their examples.

    >>> config = Experiment(hostile=0.5, methods={"it": MethodConfig(attack="label_flip")}, data=DataConfig(clients=2))
    >>> clients = build_data(config)
    >>> flipped = poison(config, config.methods["it"], clients).train.labels != clients.train.labels
    >>> bool(flipped.any()), bool(flipped.all())
    (True, False)
    """
    if method.attack != "label_flip":
        return clients
    where = "train" if clients.source is None else "source"
    hostile, classes = build_hostile(config, clients.size), len(clients.classes)
    flipped: dict[str, Any] = {where: label_flip(getattr(clients, where), hostile, classes)}
    return dataclasses.replace(clients, **flipped)


def _synthetic(config: Experiment) -> Clients:
    c = config.data
    make = functools.partial(fd.synthetic, c.clients, alpha=c.alpha, beta=c.beta, counts=c.counts, seed=c.seed)
    evaluated = min(c.clients, c.eval_clients or SYNTHETIC_EVALUATED)
    ids = np.sort(np.random.default_rng(c.seed).choice(c.clients, evaluated, replace=False))
    train, test = (jax.device_get(make(part=part).take(ids)) for part in (0, 1))
    return Clients(
        train=train,
        test=test,
        labels=train.labels,
        parts=[np.arange(start, start + count) for start, count in zip(train.start, train.count, strict=True)],
        classes=tuple(map(str, range(10))),
        source=make(part=0),
        eval_ids=ids,
        remarks=(f"{len(ids):,} of {c.clients:,} clients are evaluated, and counted in the pictures",),
    )


def _classification(config: Experiment) -> Clients:
    c = config.data
    if c.synthetic:
        return _synthetic(config)
    examples, _ = fd.load(
        c.name, data_dir=c.dir, split=c.split, test_split=None, download=c.download, natural=c.natural
    )
    text = config.teacher.kind == "transformer"
    if (examples.inputs.dtype == object) != text:
        allowed = (
            "a set of texts, which a transformer reads" if text else "images or numbers, which an mlp or a cnn reads"
        )
        raise ConfigError("data.name", c.name, allowed)
    if c.examples is not None:
        rows = tasks.subset(len(examples), c.examples, c.seed)
        natural = None if examples.natural is None else examples.natural[rows]
        examples = dataclasses.replace(
            examples, inputs=examples.inputs[rows], labels=examples.labels[rows], natural=natural
        )
    groups, labels = None, examples.labels
    if examples.natural is not None and c.partition == "iid":  # deal and split what belongs together as one
        groups, labels = fd.by_key(examples.natural), None
        parts = fd.iid(np.zeros(len(groups), np.int32), c.clients, c.seed)
    else:
        parts = _partition(c, examples.labels, examples.natural)
    train, test = fd.train_test_split(parts, c.test_fraction, c.seed, labels)
    if c.validation:
        train, test = fd.train_test_split(train, c.test_fraction, c.seed + 1, labels)
    if groups is not None:
        empty = np.zeros(0, np.int64)
        whole = lambda ids: np.sort(np.concatenate([empty, *(groups[i] for i in ids)]))  # noqa: E731
        train, test = ([whole(ids) for ids in part] for part in (train, test))
    return tasks.classification(examples, (train, test), load_tokenizer(config) if text else None, c.length)


def _partition(c: DataConfig, labels: np.ndarray, natural: np.ndarray | None) -> list[np.ndarray]:
    if c.partition == "natural":
        assert natural is not None, "validate() and load() ask for it"
        return fd.by_key(natural)
    if c.partition == "iid":
        return fd.iid(labels, c.clients, c.seed)
    if c.partition == "shards":
        return fd.shards(labels, c.clients, c.shards_per_client, c.seed)
    least = 8 if c.min_examples is None else c.min_examples
    return fd.dirichlet(labels, c.clients, c.alpha, c.seed, min_examples=least)


def _tagging(config: Experiment) -> Clients:
    """Each corpus with its own split; one that has none is split by document."""
    c = config.data
    corpora = {}
    for name in c.name.split("+"):
        whole = fd.load_tagged(name, data_dir=c.dir)
        if whole.natural is not None:
            documents = fd.by_key(whole.natural)
            (train,), (test,) = fd.train_test_split([np.arange(len(documents))], c.test_fraction, c.seed)
            if c.validation:
                (train,), (test,) = fd.train_test_split([train], c.test_fraction, c.seed + 1)
            pair = [whole.take(np.sort(np.concatenate([documents[i] for i in ids]))) for ids in (train, test)]
        else:
            pair = [whole, fd.load_tagged(name, data_dir=c.dir, split="validation" if c.validation else "test")]
        learn, held_out = (t.take(tasks.subset(len(t), c.examples, c.seed)) for t in pair)
        corpora[name] = (learn, held_out)
    return tasks.tagging(corpora, load_tokenizer(config), c.length, c.test_length)


def _recommendation(config: Experiment) -> Clients:
    """The rows of both splits at random to `clients`, or every reader a client."""
    c = config.data
    news, remarks = fd.load_news(c.name, data_dir=c.dir), []

    def deal(users: np.ndarray, readers: np.ndarray) -> tasks.Split:
        train, test = (tasks.subset(len(x), c.examples, c.seed) for x in (users, readers))
        if c.natural is None:
            own, shown = (fd.iid(rows, c.clients, c.seed + i) for i, rows in enumerate((train, test)))
        else:  # a reader who clicks nothing in training is no client
            known = np.unique(users[train])
            own, shown = (_rows_of(known, users[train]), _rows_of(known, readers[test]))
            strange = len(test) - sum(map(len, shown))
            if strange:
                remarks.append(
                    f"{strange:,} of {len(test):,} impressions are of readers without training rows and are not evaluated"
                )
        return [train[ids] for ids in own], [test[ids] for ids in shown]

    clients = tasks.recommendation(
        news,
        deal,
        load_tokenizer(config),
        c.length,
        history=c.history,
        negatives=c.negatives,
        candidates=c.candidates,
        seed=c.seed,
        abstracts=c.abstracts,
        validation=c.test_fraction if c.validation else 0,
    )
    return dataclasses.replace(clients, remarks=(*clients.remarks, *remarks))


def _rows_of(names: np.ndarray, who: np.ndarray) -> list[np.ndarray]:
    """Where each of these names stands in `who`, ascending."""
    order = np.argsort(who, kind="stable")
    first, end = (np.searchsorted(who[order], names, side) for side in ("left", "right"))
    return [order[i:j] for i, j in zip(first, end, strict=True)]


def _characters(config: Experiment) -> Clients:
    c = config.data
    speeches = fd.load_speeches(data_dir=c.dir)
    least = 2 if c.min_examples is None else c.min_examples
    return tasks.next_character(
        speeches, c.test_fraction, c.seed, c.length, min_examples=least, validation=c.validation
    )


# ---- models ----------------------------------------------------------------------------------------------------------


def checkpoint_folder(config: Experiment) -> pathlib.Path:
    """Where the checkpoint lies.

    >>> checkpoint_folder(Experiment(checkpoint="some/folder")).name
    'folder'
    """
    assert config.checkpoint is not None, "validate() asks for one"
    return minilm_folder() if config.checkpoint == "minilm" else pathlib.Path(os.path.expanduser(config.checkpoint))


def load_tokenizer(config: Experiment) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer.

    >>> try: load_tokenizer(Experiment(checkpoint="nowhere"))
    ... except FileNotFoundError as error: print(str(error).split(";")[0])
    there is no nowhere/tokenizer.json
    """
    return fd.load_tokenizer(checkpoint_folder(config))


def build_models(config: Experiment, clients: Clients) -> dict[str, Model]:
    """Teacher and student for these clients, pretrained where the config says so.

    >>> import jax
    >>> config = Experiment(student=ModelConfig(hidden=(32,)), data=DataConfig(clients=3))
    >>> model = build_models(config, build_data(config))["student"]
    >>> sum(leaf.size for leaf in jax.tree.leaves(model.init(jax.random.key(0))))
    2410
    """
    if config.teacher.kind != "transformer":
        example, classes = clients.train.inputs[0], len(clients.classes)
        return {name: _image_model(getattr(config, name), example, classes) for name in ("teacher", "student")}
    assert clients.model is not None
    weights = None
    if config.checkpoint is not None and (config.teacher.pretrained or config.student.pretrained):
        weights = _load_bert(checkpoint_folder(config))
    models, heads = {}, {}
    for name in ("teacher", "student"):
        own: ModelConfig = getattr(config, name)
        if weights is not None and own.pretrained:
            sizes, params = weights
            if own.depth > sizes.layers:
                raise ConfigError(f"{name}.depth", own.depth, f"1 to the checkpoint's {sizes.layers} layers")
            _check_tokens(config, sizes)
            model = clients.model(dataclasses.replace(sizes, layers=own.depth, dtype=own.dtype, remat=own.remat))
            models[name] = freeze(with_pretrained(model, params), is_fixed)
        else:
            sizes = {key: getattr(own, key) for key in ("width", "heads", "inner", "positions", "dtype", "remat")}
            if config.checkpoint is not None:
                tokenizer = load_tokenizer(config)
                sizes |= {"vocab": _vocabulary(tokenizer), "pad": tokenizer.token_to_id("[PAD]")}
            sizes = TransformerConfig(layers=own.depth, **sizes)
            models[name] = freeze(clients.model(sizes), is_table)
        heads[name] = sizes.heads
    if heads["student"] != heads["teacher"] and any(
        m.algorithm == "fedkd" and m.hidden and m.attention for m in config.methods.values()
    ):
        allowed = (
            f"the teacher's {heads['teacher']}, as fedkd compares attention maps unless hidden or attention is false"
        )
        raise ConfigError("student.heads", heads["student"], allowed)
    return models


_load_bert = functools.lru_cache(maxsize=1)(load_bert)  # all methods start from the same arrays


def _vocabulary(tokenizer: tokenizers.Tokenizer) -> int:
    return 1 + max(tokenizer.get_vocab().values(), default=-1)  # and not how many: numbers may be left out


def _check_tokens(config: Experiment, sizes: TransformerConfig) -> None:
    """Texts are padded by the tokenizer and read by the model: they must speak of the same tokens."""
    tokenizer = load_tokenizer(config)
    for name, own, theirs in (
        ("padding token", sizes.pad, tokenizer.token_to_id("[PAD]")),
        ("number of tokens", max(sizes.vocab, _vocabulary(tokenizer)), sizes.vocab),
    ):
        if own != theirs:
            allowed = f"a model and a tokenizer that agree; the {name} is {own} and {theirs}"
            raise ConfigError("checkpoint", config.checkpoint, allowed)
    for key in ("length", "test_length"):
        if (getattr(config.data, key) or 0) > sizes.positions:
            allowed = f"at most the model's positions, {sizes.positions}"
            raise ConfigError(f"data.{key}", getattr(config.data, key), allowed)


def _image_model(config: ModelConfig, example: np.ndarray, classes: int) -> Model:
    if config.kind == "cnn":
        model = cnn(example.shape, config.channels, config.hidden, classes, config.kernel)
    else:
        model = mlp((example.size, *config.hidden, classes))
    model = model if config.dtype == "float32" else compute_in(model, config.dtype)
    return rematerialise(model) if config.remat else model


# ---- optimisers, codecs, algorithms ----------------------------------------------------------------------------------


def local_steps_of(config: Experiment, method: MethodConfig, clients: Clients) -> tuple[int, int]:
    """The steps of the largest client in a round, and in the run.

    A client whose cohorts are drawn takes part more or less often than it is expected to: its run is three standard
    deviations longer, so that no more than one in 700 comes to the end of it. `message="gradient"` steps once a round, on
    the server.

    >>> config = Experiment(rounds=3, data=DataConfig(clients=2, partition="iid"))
    >>> local_steps_of(config, MethodConfig(), build_data(config))
    (43, 129)
    """
    counts, rounds = np.asarray(clients.train.count), config.rounds
    share = 1.0 if config.cohort is None else config.cohort / clients.size
    alone = method.algorithm == "centralised"  # one model, trained on all that the cohort holds
    largest = math.ceil(counts.mean() * clients.size * share) if alone else clients.train.max_count
    each = int(count_steps(largest, batch=config.batch, epochs=config.epochs, steps=config.steps))
    turns = rounds * share + 3 * math.sqrt(rounds * share * (1 - share))
    return each, each * (rounds if alone else min(rounds, math.ceil(turns)))


def build_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule | float:
    """The learning rate of each of `steps` steps.

    >>> rate = build_schedule(OptimizerConfig(learning_rate=1.0, schedule="linear", warmup=0.5), 8)
    >>> [float(rate(step)) for step in (0, 2, 4, 6, 8)]
    [0.25, 0.75, 1.0, 0.5, 0.0]
    """
    peak, rise = config.learning_rate, round(config.warmup * steps)
    rest = max(steps - rise, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if rise:
        return optax.join_schedules([lambda step: peak * (step + 1) / rise, after], [rise])
    return peak if config.schedule == "constant" else after


def build_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """An optax optimiser for so many steps, see `build_schedule`.

    >>> build_optimizer(OptimizerConfig(name="sgd", learning_rate=0.1), 100).init(0.0)
    (EmptyState(), EmptyState())
    """
    rate = build_schedule(config, steps)
    if config.name == "sgd":
        optimizer = optax.sgd(rate, config.momentum or None)
    elif config.name == "adam":
        optimizer = optax.adam(rate)
    else:
        optimizer = optax.adamw(rate, weight_decay=config.weight_decay)
    return (
        optimizer if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    )


def build_codecs(method: MethodConfig, rounds: int) -> dict[str, Codec | None]:
    """The codecs of both directions, None where a message is raw.

    >>> import jax
    >>> codecs = build_codecs(MethodConfig(codec="svd", t_start=0.9, directions="uplink"), rounds=10)
    >>> codecs["downlink"] is None
    True
    >>> int(codecs["uplink"].encode({"w": np.ones((30, 20), np.float32)}, 0, jax.random.key(0)).ranks["w"])
    1
    """
    matrices: dict[str, Any] = dict(view=layer_view, compressible=layer_compressible)
    codec = {
        "identity": identity_codec,
        "svd": lambda: svd_codec(
            energy_threshold(method.t_start, method.t_end, rounds), warm_start=method.warm_start, **matrices
        ),
        "power": lambda: power_codec(method.rank, **matrices),
        "top_k": lambda: top_k(method.share),
    }[method.codec]()
    if method.bits is not None:
        codec = quantise(method.bits) if method.codec == "identity" else chain(codec, quantise(method.bits))
    if method.feedback:
        codec = error_feedback(codec)
    return {way: codec if method.directions in ("both", way) else None for way in ("uplink", "downlink")}


def build_trust(config: Experiment, method: MethodConfig, clients: int) -> dict[str, Any]:
    """What becomes of updates on their way, `send_fn` and `aggregator` of a round, None where they are sent and averaged.

    >>> trust = build_trust(Experiment(hostile=0.2), MethodConfig(aggregation="median", attack="sign_flip"), 20)
    >>> trust["aggregator"].combine.__name__, trust["send_fn"] is None
    ('coordinate_median', False)
    """
    private = method.noise_at if method.noise else None
    bound = None if method.clip is None else clip_update(method.clip)
    combine = {"mean": None, "median": coordinate_median, "trimmed_mean": trimmed_mean(method.trim)}[method.aggregation]
    if private is None:
        aggregator = Aggregator(bound=bound, combine=combine)
    else:
        aggregator = fixed_mean() if private == "client" else private_mean(method.clip or 0, method.noise)
    sends: list[SendFn] = []
    if private == "client":
        sends.append(private_send(method.clip or 0, method.noise, config.cohort or clients))
    if method.attack in ("sign_flip", "scale"):
        attack = (sign_flip if method.attack == "sign_flip" else scaled)(method.attack_scale)
        sends.append(attacked(attack, build_hostile(config, clients)))

    def send_fn(message, client_id, key):
        for send in sends:
            message = send(message, client_id, key)
        return message

    return {"send_fn": send_fn if sends else None, "aggregator": aggregator if any(aggregator) else None}


def build_epsilon(
    config: Experiment, method: MethodConfig, algorithm: Algorithm, clients: int
) -> Callable[[int, int], float] | None:
    """`(rounds done, the most of them that a client took part in) -> epsilon`, None without noise.

    >>> method = MethodConfig(algorithm="fedavg", clip=1.0, noise=2.0, weighting="uniform")
    >>> config = Experiment(methods={"it": method}, data=DataConfig(clients=3))
    >>> algorithm = build_algorithm(config, method, build_data(config))
    >>> round(build_epsilon(config, method, algorithm, 3)(1, 1), 2)
    4.38
    """
    if not method.noise:
        return None
    cohort = config.cohort or clients
    spent = functools.partial(privacy_spent, method.noise, delta=method.delta)
    spent(cohort=cohort, population=cohort, rounds=1)  # without the accountant nothing begins
    keeps = jax.tree.leaves(jax.eval_shape(algorithm.init_clients, jax.random.key(0), np.arange(1)))
    if keeps:  # no cohort is then a sample of its own, see `privacy_spent`
        return lambda rounds, turns: spent(cohort=cohort, population=cohort, rounds=turns)
    return lambda rounds, turns: spent(cohort=cohort, population=clients, rounds=rounds)


def build_participation(config: Experiment) -> Participation:
    """Who takes part, and how.

    Raises:
        ConfigError: the trace is no [T, G] bool of NumPy's, as `numpy.save` writes it.
        FileNotFoundError: there is no such file.

    >>> from fedkd_jax.config import ParticipationConfig
    >>> build_participation(Experiment()) == Participation()
    True
    >>> build_participation(Experiment(participation=ParticipationConfig(dropout=0.1, first=3))).first
    3
    """
    own, available, turn = config.participation, None, None
    if own.trace is not None:
        available = available_by(_load_trace(own.trace))
    elif own.available < 1:
        available = available_with(own.available)
    if own.dropout or own.stragglers or own.spread:
        options = dict(dropout=own.dropout, stragglers=own.stragglers, least=own.least_work, spread=own.spread)
        turn = unreliable(**options)
    return Participation(available=available, turn=turn, first=own.first, strata=own.strata)


def _load_trace(path: str) -> np.ndarray:
    wanted = "an .npy file, [T, G] bool with some true"
    try:  # a map, as a header may promise more than the file holds
        trace = np.load(os.path.expanduser(path), mmap_mode="r")
    except OSError:
        raise
    except Exception as error:  # whatever a strange file does to NumPy
        raise ConfigError("participation.trace", path, f"{wanted}; {type(error).__name__}: {error}") from None
    if not isinstance(trace, np.ndarray) or trace.ndim != 2 or trace.dtype != bool or not trace.any():
        found = f"{trace.dtype}{list(trace.shape)}" if isinstance(trace, np.ndarray) else "an archive"
        raise ConfigError("participation.trace", path, f"{wanted}, not {found}")
    return np.array(trace)


def build_algorithm(
    config: Experiment,
    method: MethodConfig,
    clients: Clients,
    layout: Layout | None = None,
    wrap: Callable[[Codec], Codec] | None = None,
    wire: Wire | None = None,
) -> Algorithm:
    """A method as an `Algorithm` for these clients.

    Args:
        config, method, clients: what is run.
        layout: how clients are mapped over the hardware.
        wrap: what the uplink's codec is replaced by, of methods that send an update, such as one that looks at messages.
        wire: what messages go through, see `federated_round`.

    >>> config = Experiment(data=DataConfig(clients=3))
    >>> sorted(build_algorithm(config, config.methods["FedKD"], build_data(config)).predict)
    ['student', 'teacher']
    """
    if method.depth is not None:
        config = dataclasses.replace(config, student=dataclasses.replace(config.student, depth=method.depth))
    models = build_models(config, clients)
    in_round, in_run = local_steps_of(config, method, clients)
    shared_steps = in_round if method.reset_optimizer else in_run
    if method.message == "gradient":  # the server's steps
        shared_steps = config.rounds
    codecs: dict[str, Any] = build_codecs(method, config.rounds)
    if wrap is not None:
        codecs["uplink"] = wrap(codecs["uplink"] or identity_codec())
    own = method.server_optimizer
    server: dict[str, Any] = {} if own is None else {"server_optimizer": build_optimizer(own, config.rounds)}
    weight_fn = {"examples": example_weight, "uniform": uniform_weight}[method.weighting]
    if method.noise and method.noise_at == "client":  # who has no example has noise to send
        weight_fn = fixed_weight
    weights: dict[str, Any] = {"weight_fn": weight_fn}
    if method.algorithm == "centralised" and layout is not None:  # several devices would all train the same model
        layout = Layout(chunk=layout.chunk)
    trust = build_trust(config, method, clients.size)
    rest: dict[str, Any] = dict(teacher_dtype=method.teacher_dtype, moments_dtype=method.moments_dtype)
    local: dict[str, Any] = dict(batch=config.batch, epochs=config.epochs, steps=config.steps, layout=layout)
    if method.algorithm not in ("local_only", "centralised"):  # these send nothing
        local["wire"] = wire
    if method.algorithm in ("fedkd", "fml"):
        options: dict[str, Any] = dict(
            teacher_optimizer=build_optimizer(config.teacher_optimizer, in_run),
            student_optimizer=build_optimizer(config.student_optimizer, shared_steps),
            share_frozen=config.teacher.kind == "transformer"
            and config.teacher.pretrained == config.student.pretrained,
            reset_student_optimizer=method.reset_optimizer,
            **codecs,
            **server,
            **weights,
            **trust,
            **rest,
            **local,
        )
        if method.algorithm == "fml":
            return fml(models["teacher"], models["student"], alpha=method.alpha, beta=method.beta, **options)
        own = config.projection_optimizer
        flags = ("adaptive", "distill", "hidden", "attention", "mutual", "stop_weight_gradient")
        loss_fn = functools.partial(mutual_distillation, **{key: getattr(method, key) for key in flags})
        return fedkd(
            models["teacher"],
            models["student"],
            example=jax.tree.map(lambda x: x[:1], clients.train.inputs),
            projection_optimizer=None if own is None else build_optimizer(own, in_run),
            loss_fn=per_example(loss_fn) if method.per_example else loss_fn,
            project=method.project and method.hidden,
            message=method.message,
            **options,
        )
    model = models[method.model]
    settings = method.optimizer or getattr(config, f"{method.model}_optimizer")
    if method.algorithm == "local_only":
        return local_only(model, optimizer=build_optimizer(settings, in_run), **rest, **local)
    if method.algorithm == "centralised":
        return centralised(model, optimizer=build_optimizer(settings, in_run), **local)
    if method.algorithm == "scaffold":
        share = 1.0 if config.cohort is None else config.cohort / clients.size
        return scaffold(
            model, learning_rate=settings.learning_rate, participation=share, **codecs, **server, **trust, **local
        )
    shared = local | server | weights | trust
    shared["optimizer"] = build_optimizer(settings, shared_steps)
    if method.algorithm == "fedprox":
        return fedprox(model, mu=method.mu, **codecs, **shared)
    if method.algorithm == "feddropout":
        return feddropout(model, sub_model=keep_units(method.share), **shared)
    shared["reset_optimizer"] = method.reset_optimizer
    if method.algorithm == "fedpaq":
        assert method.bits is not None, "validate() asks for them"
        downlink_bits = 32 if method.directions == "uplink" else method.bits
        return fedpaq(model, bits=method.bits, downlink_bits=downlink_bits, **shared)
    if method.algorithm == "fetchsgd":
        params, _ = jax.eval_shape(lambda: split_params(model, model.init(jax.random.key(0))))
        size = sum(x.size for x in jax.tree.leaves(params))
        columns = max(1, round(method.sketch * size / SKETCH_ROWS))
        sizes = dict(rows=SKETCH_ROWS, columns=columns, share=method.share, momentum=method.momentum)
        return fetchsgd(model, **sizes, **shared)
    return fedavg(model, **codecs, **shared)
