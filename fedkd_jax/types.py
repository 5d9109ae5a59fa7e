"""Every record of the library, and nothing else.

A record is a frozen dataclass registered as a PyTree, so it goes through `jit`, `vmap`, `scan` and Orbax as it is; a tuple
of functions is a `NamedTuple`. Comments give the shape for **one** client; where records of many clients are stacked, every
array has a leading axis `[K]` (a cohort) or `[N]` (the population). Arrays are float32 unless said.

State is what is carried from round to round; Info is what is reported about a round. They are different types.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, dataclass_transform

import jax
import numpy as np

Array = jax.Array | np.ndarray
Leaf = Any  # an array; within transformations also what stands in its place
Params = Any  # nested dict of arrays
PyTree = Any
Number = float | int | np.floating
Key = jax.Array  # a typed PRNG key, `jax.random.key(seed)`
Schedule = Callable[[Any], Any]  # round -> value, as in optax
Predict = Callable[["ServerState", "ClientState", PyTree], "Outputs"]
SendFn = Callable[[PyTree, Leaf, Key], PyTree]  # (message, client id, key) -> what the client sends in its place
# wire(payload, direction="up" or "down", round=[], client=[] or [K], sends=..., heard=...) -> the payload that arrives
Wire = Callable[..., "Payload"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls=None, /, *, kw_only=True):
    """A frozen dataclass that is a PyTree; fields marked `static_field()` belong to the tree's structure."""
    if cls is None:
        return lambda c: record(c, kw_only=kw_only)
    cls = dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)
    return jax.tree_util.register_dataclass(cls)


def static_field(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


# ---- models ----------------------------------------------------------------------------------------------------------


@record(kw_only=False)
class Outputs:
    """What a model returns for a batch.

    >>> import jax.numpy as jnp
    >>> Outputs(jnp.zeros((8, 10))).hidden
    ()
    """

    logits: Leaf  # [B, ..., C]
    hidden: tuple[Leaf, ...] = ()  # one entry per layer, lowest first, each [B, ..., d]
    attention: tuple[Leaf, ...] = ()  # one entry per layer, lowest first, each [B, ..., heads, L, L]
    mask: Leaf = ()  # [B, ...] bool over the positions of hidden states, where some are padding


class Model(NamedTuple):
    """A model as two pure functions over a plain nested dict of parameters.

    `frozen(path, leaf)` says which parameters are never trained: they are kept once for the whole population, in
    `ServerState.frozen`, and never sent. `path` is the tuple of dict keys.

    >>> import jax, jax.numpy as jnp
    >>> linear = Model(init=lambda key: {"w": jax.random.normal(key, (64, 10))},
    ...                apply=lambda params, x, *, key=None: Outputs(x @ params["w"]))
    >>> linear.apply(linear.init(jax.random.key(0)), jnp.ones((3, 64))).logits.shape
    (3, 10)
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Outputs]  # apply(params, inputs, *, key=None)
    frozen: Callable[[tuple[str, ...], Any], bool] | None = None
    # scorer(params, inputs)(rows) -> what apply(params, rows).logits would be for any rows of these inputs: for evaluation,
    # where rows share work that is then done once
    scorer: Callable[[Params, PyTree], Callable[[PyTree], Leaf]] | None = None


# ---- losses ----------------------------------------------------------------------------------------------------------


@record
class LossTerms:
    """The paper's losses of one client, eqs. 1-7, already divided by the adaptive denominator; scalars `[]`.

    >>> [field.name for field in dataclasses.fields(LossTerms)][:3]
    ['teacher_task', 'student_task', 'teacher_distill']
    """

    teacher_task: Leaf  # L_t
    student_task: Leaf  # L_s
    teacher_distill: Leaf  # D_t = KL(p_s || p_t) / (L_t + L_s)
    student_distill: Leaf  # D_s = KL(p_t || p_s) / (L_t + L_s)
    hidden: Leaf  # Hid
    teacher_total: Leaf  # D_t + Hid + L_t
    student_total: Leaf  # D_s + Hid + L_s


# ---- messages --------------------------------------------------------------------------------------------------------


@record(kw_only=False)
class LowRank:
    """A truncated SVD with a static number r of columns, of which the first `rank` are in use and the rest are zero.

    >>> import jax.numpy as jnp
    >>> LowRank(jnp.zeros((5, 3)), jnp.zeros(3), jnp.zeros((3, 4)), jnp.int32(0)).u.shape
    (5, 3)
    """

    u: Leaf  # [m, r], orthonormal columns
    s: Leaf  # [r], not increasing
    vt: Leaf  # [r, n], orthonormal rows
    rank: Leaf  # [] int32


@record(kw_only=False)
class Factors:
    """A matrix as a product left right of static inner size r, of which the first `rank` are in use and the rest are zero.

    >>> import jax.numpy as jnp
    >>> Factors(jnp.zeros((5, 3)), jnp.zeros((3, 4)), jnp.int32(0)).right.shape
    (3, 4)
    """

    left: Leaf  # [m, r]
    right: Leaf  # [r, n]; of both, the one of the matrix's shorter side is orthonormal
    rank: Leaf  # [] int32; r + 1 where r are too few, and then the factors are zero


@record
class Payload:
    """A message as it travels, and what it costs, counted where it was encoded.

    >>> import jax.numpy as jnp
    >>> Payload(content={"w": jnp.zeros(7)}, floats=jnp.int32(7), nbytes=jnp.int32(28), ranks={}).ranks
    {}
    """

    content: PyTree  # what `decode` needs
    floats: Leaf  # [] int32, numbers in the paper's count
    nbytes: Leaf  # [] int32, bytes of a real message
    ranks: dict[
        str, Leaf
    ]  # {leaf path: [] int32, [b] for a stack}, min(m, n) where a matrix went raw; empty without an SVD
    sent: PyTree = ()  # of each leaf of `content`, how many entries travel, [] int32: the rest is padding; for `recode`


class Codec(NamedTuple):
    """Compression of an update: `encode(update, round, key) -> Payload` and `decode(payload) -> update`.

    `decode_sum(payloads [K], weights [K]) -> sum_k weights[k] decode(payloads[k])` is for codecs that can add messages up
    without decoding each; what it gives must be finite where the messages are. A round calls it once for each chunk of its
    `Layout`: on an accelerator once, on a CPU for a few clients or one, as larger groups were no faster there.

    `recode(payload, round, key) -> Payload` is for codecs that can shorten another's message, see `chain`.

    `init(update) -> state` is for codecs that remember something from message to message. Then
    `encode(update, round, key, state) -> (Payload, state)`; each client and the server keep a state of their own.

    >>> import jax, jax.numpy as jnp
    >>> sign = Codec(encode=lambda update, round, key: Payload(
    ...                  content=jax.tree.map(jnp.sign, update), floats=jnp.int32(4), nbytes=jnp.int32(1), ranks={}),
    ...              decode=lambda payload: payload.content)
    >>> sign.decode(sign.encode(jnp.array([3.0, -2.0, 0.5, -9.0]), 0, jax.random.key(0))).tolist()
    [1.0, -1.0, 1.0, -1.0]
    """

    encode: Callable[..., Any]
    decode: Callable[[Payload], PyTree]
    decode_sum: Callable[[Payload, Leaf], PyTree] | None = None
    init: Callable[[PyTree], PyTree] | None = None
    recode: Callable[[Payload, Any, Key], Payload] | None = None


class Aggregator(NamedTuple):
    """How the server makes one update of a cohort's, in the order of the fields; with none of them their weighted mean.

    The functions see what messages decode to: of FetchSGD sketches, of SCAFFOLD model and control variate together.

    >>> from fedkd_jax import clip_update, coordinate_median
    >>> Aggregator(bound=clip_update(1.0), combine=coordinate_median).noise is None
    True
    """

    bound: Callable[[PyTree], PyTree] | None = None  # (update) -> update, of each client by itself
    # (updates [K], weights [K]) -> update, instead of the mean, which is added up as updates come: all K are held at once, and
    # several copies of them. Updates of weight zero may hold anything. In federated dropout every number has weights of its own
    combine: Callable[[PyTree, Leaf], PyTree] | None = None
    # (sum of the updates, key) -> sum; the sum is then divided by K, however many of the cohort are counted, so that no
    # client's weight depends on another's
    noise: Callable[[PyTree, Key], PyTree] | None = None


# ---- data ------------------------------------------------------------------------------------------------------------


@record
class FederatedData:
    """Ragged clients: all examples in flat arrays, client i owning `inputs[start[i] : start[i] + count[i]]`.

    The flat arrays are shared, only `start` and `count` have a client axis; a cohort is `take_clients(data, ids)`.

    >>> import numpy as np
    >>> data = FederatedData(inputs=np.zeros((5, 2)), labels=np.zeros(5, int), start=np.array([0, 3]),
    ...                      count=np.array([3, 2]), max_count=3)
    >>> data.count.shape
    (2,)
    """

    inputs: PyTree  # arrays [n, ...]
    labels: Leaf  # [n, ...] int
    start: Leaf  # [] int32 of one client, [K] of a cohort
    count: Leaf  # [] int32 of one client, [K] of a cohort
    work: Leaf = ()  # [] of one client, [K] of a cohort: the share of its local steps that it makes; () for all of them
    max_count: int = static_field()  # the largest count in the population
    # the arrays have a client axis, [K, max_count, ...], and `start` is 0: `stack_clients`, for cohorts split over devices
    stacked: bool = static_field(default=False)


class ClientSource(NamedTuple):
    """The examples of a population that are not in memory: those of a cohort are read or made when its turn comes.

    `take(ids [k])`, ids in NumPy, gives the data of these k clients in this order; for the same k all arrays must have the
    same shapes and `max_count` be the same.

    >>> import numpy as np
    >>> own_number = ClientSource(clients=10**9, take=lambda ids: FederatedData(
    ...     inputs=ids[:, None], labels=ids % 2, start=np.arange(len(ids)), count=np.ones(len(ids), int), max_count=1))
    >>> own_number.take(np.array([7, 123_456_789])).inputs.tolist()
    [[7], [123456789]]
    """

    clients: int  # N
    take: Callable[[np.ndarray], FederatedData]


@record
class Batch:
    """A mini-batch; where `mask` is False the row is padding and must contribute exactly zero.

    >>> import numpy as np
    >>> Batch(inputs=np.zeros((4, 2)), labels=np.zeros(4, int), mask=np.array([True, True, True, False])).mask.sum()
    np.int64(3)
    """

    inputs: PyTree  # [B, ...]
    labels: Leaf  # [B, ...] int
    mask: Leaf  # [B] bool


@record
class Turn:
    """What becomes of a client that is asked to take part in a round; whoever says it gives `work`, `sends` and `seconds`.

    >>> Turn(work=0.5, sends=True, seconds=3.0).present
    True
    """

    work: Leaf  # [], in (0, 1], the share of its local steps that the client makes; 0 of who is not present
    sends: Leaf  # [] bool; False: it trains, but its message gets lost
    seconds: Leaf  # [], until its message is there
    present: Leaf = True  # [] bool; False: nobody is in this place of the cohort, as too few were available
    counted: Leaf = True  # [] bool; False where it sends: it comes after the server has gone on


# ---- what is carried -------------------------------------------------------------------------------------------------


@record
class ServerState:
    """What the server knows; all clients hold the same copy of `params` at the start of a round.

    >>> import jax.numpy as jnp
    >>> int(ServerState(params={}, opt_state=(), frozen={}, round=jnp.int32(3)).round)
    3
    """

    params: Params  # the shared model: FedKD's student
    opt_state: PyTree  # of the server's optimiser
    frozen: Mapping[str, Params]  # {model name: parameters that never change}, one copy for everybody
    round: Leaf  # [] int32, rounds done
    codec: PyTree = ()  # of the downlink, where it has a state


@record
class ClientState:
    """What a client keeps between rounds and never sends. An algorithm that does not need a field leaves it `()`.

    >>> ClientState().teacher
    ()
    """

    teacher: Params = ()
    projection: PyTree = ()  # W_h, a tuple with one [d_student, d_teacher] per matched layer
    teacher_opt: PyTree = ()
    projection_opt: PyTree = ()
    student_opt: PyTree = ()  # only where it persists from round to round
    codec: PyTree = ()  # of the uplink, where it has a state
    control: Params = ()  # SCAFFOLD's c_i


@record
class LocalResult:
    """What one client's local training gives: its new private state, its message, the mean losses over its steps.

    >>> LocalResult(client=ClientState(), message={}, terms=None).message
    {}
    """

    client: Any  # ClientState
    message: PyTree  # the update new - old of the shared parameters, or their gradient
    terms: Any  # LossTerms


# ---- what is reported ------------------------------------------------------------------------------------------------


@record
class RoundInfo:
    """What happened in a round, for each client of the cohort.

    >>> [field.name for field in dataclasses.fields(RoundInfo)][:2]
    ['ids', 'terms']
    """

    ids: Leaf  # [K] int32
    terms: Any  # LossTerms [K], means over local steps
    uplink_bytes: Leaf  # [K] int32
    downlink_bytes: Leaf  # [K] int32
    uplink_floats: Leaf  # [K] int32, the paper's count
    downlink_floats: Leaf  # [K] int32, the paper's count
    finite: Leaf  # [K] bool; False: weight zero, state not written back
    weight: Leaf  # [K], before normalisation
    ranks: dict[str, Leaf]  # uplink, {leaf path: [K] int32, or [K, b] where a leaf is b matrices}
    turn: Any = ()  # Turn [K], () where everybody takes part with all of it


class Algorithm(NamedTuple):
    """A federated method as three pure functions over a cohort, and what it can predict with.

    >>> from fedkd_jax import fedavg, mlp
    >>> import optax
    >>> sorted(fedavg(mlp((64, 32, 10)), optimizer=optax.sgd(0.1), batch=10).predict)
    ['model']
    """

    init_server: Callable[[Key], ServerState]
    init_clients: Callable[[Key, Leaf], ClientState]  # init_clients(key, ids [K]) -> ClientState [K]
    # round(server, clients, data, ids, key), and with clients that may fail round(server, clients, data, ids, key, turn [K])
    round: Callable[..., tuple[ServerState, ClientState, RoundInfo]]
    predict: Mapping[str, Predict] = {}  # {"teacher": f, ...}, f(server, client, inputs) -> Outputs, one client
    layout: Any = None  # the `Layout` its round was built with, so that simulate and evaluate use the same


@record
class State:
    """Everything a run carries: the server and the population's client states `[N]`.

    >>> State(server=None, clients=ClientState()).clients.teacher
    ()
    """

    server: Any  # ServerState
    clients: Any  # ClientState [N], or the `Store` that they are in


@record
class History:
    """What a run reports: one row per round, one entry per evaluation.

    >>> History(rounds=None, evaluations=()).evaluations
    ()
    """

    rounds: Any  # RoundInfo [R, K], NumPy
    evaluations: tuple[
        dict, ...
    ]  # each {"round": r, model name: {metric: [N]}, "pooled": {model name: {metric: float}}}
