"""One round of any method that sends updates: local work, compression, aggregation, compression, write-back.

What a method does on one client is its `local_fn`; this file is what all such methods share, lines 2 to 4 of Algorithm 1.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from fedkd_jax.aggregate import all_finite, example_weight, weighted_mean, weighted_sum
from fedkd_jax.check import check_fn, check_type
from fedkd_jax.codecs import encode, identity_codec
from fedkd_jax.cohort import client_key
from fedkd_jax.data import client_parts, join_parts
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.types import (
    Aggregator,
    Array,
    ClientState,
    Codec,
    FederatedData,
    Key,
    Leaf,
    LocalResult,
    LossTerms,
    Payload,
    PyTree,
    RoundInfo,
    SendFn,
    ServerState,
    Turn,
    Wire,
    record,
)

LocalFn = Callable[[ServerState, ClientState, FederatedData, Key], LocalResult]
SEND_STREAM = 2**31 - 3  # folded into a client's key of the round for its `send_fn`; participation has the two after it
NOISE_ID = 2**31 - 3  # of no client, nor the server's: for the key of the aggregator's noise


@record
class Report:
    """What the server learns of a client beside its message.

    >>> [field.name for field in dataclasses.fields(Report)]
    ['terms', 'nbytes', 'floats', 'ranks', 'finite', 'weight', 'update']
    """

    terms: LossTerms
    nbytes: Leaf  # [] int32, of the message, whether it gets there or not
    floats: Leaf  # [] int32
    ranks: dict[str, Leaf]
    finite: Leaf  # [] bool
    weight: Leaf  # [], 0 where the message is not counted
    update: PyTree  # what the message decodes to where the server needs all of a cohort at once, else ()


@dataclasses.dataclass(frozen=True)
class Round:
    """`round(server, clients [K], data [K], ids [K], key, turn [K]) -> (server, clients [K], info)`, in two parts, so that the
    clients of a cohort may be trained in groups, one after the other.

    `train(server, clients [k], data [k], ids [k], key, turn [k]) -> (clients [k], reports [k], summed)` is what clients do, and
    the sum of what they send; sums of groups are added up leaf by leaf. `finish(server, reports [K], summed, ids [K], key,
    turn [K]) -> (server, info)` is what the server does then.

    >>> halves = Round(train=lambda server, clients, data, ids, key, turn: (clients, (), ids.sum()),
    ...                finish=lambda server, reports, summed, ids, key, turn: (server + summed, ids))
    >>> [int(x) for x in halves(1, 0, None, jnp.array([2, 3]), None)[:2]]
    [6, 0]
    """

    train: Callable[..., tuple[ClientState, Report, PyTree]]
    finish: Callable[..., tuple[ServerState, RoundInfo]]

    def __call__(self, server, clients, data, ids, key, turn: Turn | None = None):
        clients, reports, summed = self.train(server, clients, data, ids, key, turn)
        server, info = self.finish(server, reports, summed, ids, key, turn)
        return server, clients, info


def federated_round(
    local_fn: LocalFn,
    *,
    uplink: Codec | None = None,
    downlink: Codec | None = None,
    send_fn: SendFn | None = None,
    aggregator: Aggregator | None = None,
    weight_fn: Callable[[Array], Array] = example_weight,
    server_optimizer: optax.GradientTransformation | None = None,
    message: str = "update",
    layout: Layout | None = None,
    wire: Wire | None = None,
    download: Callable[[ServerState, Key], Payload] | None = None,
) -> Round:
    """Builds `round(server, clients [K], data [K], ids [K], key, turn [K] | None) -> (server, clients [K], info)`.

    1. `local_fn(server, client, data, key) -> LocalResult` for every client, with the key of that client and round.
    2. The client's message, or what `send_fn` makes of it, is encoded; its cost is counted.
    3. The server averages what the messages decode to, or does with it what `aggregator` says. A client whose message or new
       state is not finite has weight zero.
    4. The average is encoded again, every client of the cohort is charged for it, and everyone applies what it decodes to.

    `key` is the run's key, the same in every round: `server.round` and the ids are folded in here. Clients outside the
    cohort are taken to hold the newest shared model when their turn comes; only the cohort is charged for downlink.

    Where a `turn` says that a client's message does not count, it has weight zero. What the client has learned stays with it;
    what belongs to the message, its codec's state and SCAFFOLD's control variate, is as if it had not been sent. It is charged
    for uplink if it sends, be it too late, and for downlink. Who is not present costs nothing and stays as he is.

    Args:
        local_fn: what one client does.
        uplink, downlink: codecs, `identity_codec()` by default.
        send_fn: `(message, client id, key) -> message` before it is encoded, with a key of the client and round of its own:
            `attacked`, `private_send`. By default the message is sent as it is.
        aggregator: see `Aggregator`. With `combine` the K decoded updates are held at once, on the devices, and put together
            where the cohort was trained in groups; by default, and with the other functions, one sum of them is.
        weight_fn: number of examples -> weight, `[] -> []`.
        server_optimizer: optax; it is fed the averaged gradient, or minus the averaged update. By default the update is
            applied as it is (`optax.sgd(1.0)`).
        message: "update" where messages are new - old, "gradient" where they are gradients.
        layout: how clients are mapped over the hardware.
        wire: `wire(payload, direction=, round=, client=, sends=, heard=) -> payload`, what every message goes through on its
            way, such as a `Transport`; "up" with one client [], "down" with the cohort [K]. `sends` is False where no message
            leaves, and `heard` where it comes too late to be read; then what is returned counts for nothing.
        download: `(server, key of the client's local work) -> payload` of what a client gets before it works, where that is
            of its own; `local_fn` sees what arrives of its content as `server.params`. Nothing else goes down then.

    Raises:
        TypeError: no codec, function, optimiser, aggregator or layout where there should be one.
        ValueError: an unknown `message`; an `aggregator` with noise and `combine`, or with noise where `weight_fn` is not 1 for
            whoever has examples.

    >>> from fedkd_jax.losses import task_terms
    >>> from fedkd_jax.types import ClientState, FederatedData, ServerState
    >>> mean_of_labels = federated_round(lambda server, client, data, key: LocalResult(
    ...     client=client, message=data.labels[data.start].astype(jnp.float32), terms=task_terms()))
    >>> server = ServerState(params=jnp.float32(0), opt_state=optax.sgd(1.0).init(0.0), frozen={}, round=jnp.int32(0))
    >>> data = FederatedData(inputs=jnp.zeros((2, 1)), labels=jnp.array([4, 8]), start=jnp.array([0, 1]),
    ...                      count=jnp.array([1, 1]), max_count=1)
    >>> server, _, info = mean_of_labels(server, ClientState(), data, jnp.array([0, 1]), jax.random.key(0))
    >>> float(server.params), info.uplink_bytes.tolist()
    (6.0, [4, 4])
    """
    if message not in ("update", "gradient"):
        raise ValueError(f"message is {message!r}; allowed: 'update', 'gradient'")
    uplink, downlink = uplink or identity_codec(), downlink or identity_codec()
    for name, codec in (("uplink", uplink), ("downlink", downlink)):
        check_type(name, codec, Codec, "a Codec, svd_codec(0.95) say")
    check_fn("local_fn", local_fn, "(server, client, data, key) -> LocalResult")
    check_fn("weight_fn", weight_fn, "count -> weight, example_weight say")
    check_type("server_optimizer", server_optimizer, (optax.GradientTransformation, type(None)))
    check_type("aggregator", aggregator, (Aggregator, type(None)))
    check_type("layout", layout, (Layout, type(None)))
    for name, value, like in (
        ("send_fn", send_fn, "(message, client id, key) -> message"),
        ("wire", wire, "payload -> payload, Transport() say"),
        ("download", download, "(server, key) -> payload"),
    ):
        if value is not None:
            check_fn(name, value, like)
    server_optimizer = server_optimizer or optax.sgd(1.0)
    bound, combine, noise = aggregator or Aggregator()
    _check_noise(combine, noise, weight_fn)
    # messages are added up as they are where their codec can, and nobody has to look at single updates
    decode_sum = uplink.decode_sum if bound is None and combine is None else None

    def one_client(
        client: ClientState, own, client_id, turn: Turn | None, server: ServerState, shared, key, there=True
    ):
        own_key = client_key(key, server.round, client_id)
        local_key, codec_key = jax.random.split(own_key)
        data, known, of = join_parts(own, shared), server, dict(round=server.round, client=client_id)
        if download is not None:
            present = there if turn is None else there & turn.present
            got = _carried(download(server, local_key), wire, direction="down", sends=present, **of)
            known = dataclasses.replace(server, params=got.content)
        result = local_fn(known, client, data, local_key)
        message = result.message
        if send_fn is not None:
            message = send_fn(message, client_id, jax.random.fold_in(own_key, SEND_STREAM))
        payload, codec_state = encode(uplink, message, server.round, codec_key, client.codec)
        sends, heard = (there, there) if turn is None else (there & turn.sends, turn.counted)
        payload = _carried(payload, wire, direction="up", sends=sends, heard=heard, **of)
        new = dataclasses.replace(result.client, codec=codec_state)
        # what the server adds up: messages, or what they decode to
        sent = uplink.decode(payload) if decode_sum is None else payload
        finite = all_finite((message, sent, new))
        sent = sent if bound is None else bound(sent)
        counted = finite if turn is None else finite & turn.sends & turn.counted
        weight = jnp.where(counted, weight_fn(data.count), 0.0)
        kept = _where(finite if turn is None else finite & turn.present, new, client)
        if turn is not None:
            kept = dataclasses.replace(
                kept,
                codec=_where(counted, kept.codec, client.codec),
                control=_where(counted, kept.control, client.control),
            )
        report = Report(
            terms=result.terms,
            nbytes=payload.nbytes,
            floats=payload.floats,
            ranks=payload.ranks,
            finite=finite,
            weight=weight,
            update=() if combine is None else sent,
        )
        return (kept, report), (sent if combine is None else (), weight)

    def add_up(sent, weights):
        return (decode_sum or weighted_sum)(sent, weights), weights.sum()

    def put_together(reports: Report, summed: PyTree, key: Key) -> PyTree:
        if combine is not None:
            return combine(reports.update, reports.weight)
        if noise is not None:
            return weighted_mean((noise(summed[0], key), jnp.float32(reports.weight.shape[0])))
        return weighted_mean(summed)

    def train(
        server: ServerState,
        clients: ClientState,
        data: FederatedData,
        ids: Int[Array, "k"],
        key: Key,
        turn: Turn | None = None,
    ) -> tuple[ClientState, Report, PyTree]:
        own, shared = client_parts(data if turn is None else dataclasses.replace(data, work=turn.work))
        (clients, reports), summed = map_clients(
            one_client,
            (clients, own, ids, turn),
            (server, shared, key),
            layout=layout,
            sum_fn=lambda summands: add_up(*summands),
            tell=wire is not None,
        )
        return clients, reports, summed

    def finish(
        server: ServerState, reports: Report, summed: PyTree, ids: Int[Array, "k"], key: Key, turn: Turn | None = None
    ) -> tuple[ServerState, RoundInfo]:
        # the server's own stream: no client has this id
        server_key = client_key(key, server.round, 2**31 - 2)
        update = put_together(reports, summed, client_key(key, server.round, NOISE_ID))
        payload, codec_state = encode(downlink, update, server.round, server_key, server.codec)
        if download is None:
            present = True if turn is None else turn.present
            payload = _carried(payload, wire, direction="down", round=server.round, client=ids, sends=present)
        sent = downlink.decode(payload)
        gradient = sent if message == "gradient" else optax.tree.scale(-1.0, sent)
        step, opt_state = server_optimizer.update(gradient, server.opt_state, server.params)
        server = dataclasses.replace(
            server,
            params=optax.apply_updates(server.params, step),
            opt_state=opt_state,
            round=server.round + 1,
            codec=codec_state,
        )
        up, down = (jnp.ones(ids.shape, jnp.int32),) * 2 if turn is None else (turn.sends, turn.present)
        info = RoundInfo(
            ids=ids,
            terms=reports.terms,
            uplink_bytes=reports.nbytes * up,
            downlink_bytes=payload.nbytes * down,
            uplink_floats=reports.floats * up,
            downlink_floats=payload.floats * down,
            finite=reports.finite,
            weight=reports.weight,
            ranks=reports.ranks,
            turn=() if turn is None else turn,
        )
        return server, info

    return Round(train, finish)


def _check_noise(combine, noise, weight_fn) -> None:
    """What a client can change of a sum is bounded only if all weights are."""
    if noise is None:
        return
    if combine is not None:
        raise ValueError(
            f"combine is {combine} with noise; allowed: None, as what noise hides is bounded for a sum only"
        )
    for count in (1, 1000):
        if (weight := float(weight_fn(jnp.int32(count)))) != 1:
            raise ValueError(f"weight_fn({count}) is {weight} with noise; allowed: 1, see uniform_weight")


def _carried(payload: Payload, wire: Wire | None, *, round, **of) -> Payload:
    """What arrives, with a wire or without: numbers as a message holds them.

    Left to itself XLA adds an unrounded product, such as the mean, which is the sum times 1 / weight, to the parameters in one
    fused operation, and the clients' model would not be what the message says.
    """
    payload = dataclasses.replace(payload, content=kept_apart(payload.content, round))
    return payload if wire is None else wire(payload, round=round, **of)


def kept_apart(tree: PyTree, round: Leaf) -> PyTree:
    """The same bits, across which XLA fuses nothing: they go through an operation on integers that it cannot foresee to change
    none. A barrier would not do, as it is gone before operations are fused.

    Args:
        tree: of arrays; random keys and complex numbers are left as they are.
        round: `[]` int32, 0 or more.

    >>> x = {"w": jnp.array([1.5, -0.0, jnp.nan]), "there": jnp.array(True)}
    >>> jax.tree.map(lambda y: y.tolist(), jax.jit(kept_apart)(x, 3))
    {'there': True, 'w': [1.5, -0.0, nan]}
    """
    nothing = jnp.asarray(round) >> 31  # 0, which XLA does not know

    def same(x):
        x = jnp.asarray(x)
        if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer):
            return x ^ nothing.astype(x.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        kind = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind)
        return jax.lax.bitcast_convert_type(bits ^ nothing.astype(bits.dtype), x.dtype)

    return jax.tree.map(same, tree)


def _where(which, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(which, x, y), one, other)
