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
from fedkd_jax.codecs import encode, identity_codec
from fedkd_jax.cohort import client_key
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.types import Array, ClientState, Codec, FederatedData, Key, LocalResult, RoundInfo, ServerState

LocalFn = Callable[[ServerState, ClientState, FederatedData, Key], LocalResult]


def federated_round(
    local_fn: LocalFn,
    *,
    uplink: Codec | None = None,
    downlink: Codec | None = None,
    weight_fn: Callable[[Array], Array] = example_weight,
    server_optimizer: optax.GradientTransformation | None = None,
    message: str = "update",
    layout: Layout | None = None,
) -> Callable[..., tuple[ServerState, ClientState, RoundInfo]]:
    """Builds `round(server, clients [K], data [K], ids [K], key) -> (server, clients [K], info)`.

    1. `local_fn(server, client, data, key) -> LocalResult` for every client, with the key of that client and round.
    2. The client's message is encoded; its cost is counted.
    3. The server averages what the messages decode to. A client whose message or new state is not finite has weight zero.
    4. The average is encoded again, every client of the cohort is charged for it, and everyone applies what it decodes to.

    `key` is the run's key, the same in every round: `server.round` and the ids are folded in here. Clients outside the
    cohort are taken to hold the newest shared model when their turn comes; only the cohort is charged for downlink.

    Args:
        local_fn: what one client does.
        uplink, downlink: codecs, `identity_codec()` by default.
        weight_fn: number of examples -> weight, `[] -> []`.
        server_optimizer: optax; it is fed the averaged gradient, or minus the averaged update. By default the update is
            applied as it is (`optax.sgd(1.0)`).
        message: "update" where messages are new - old, "gradient" where they are gradients.
        layout: how clients are mapped over the hardware.

    Raises:
        ValueError: an unknown `message`.

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
    server_optimizer = server_optimizer or optax.sgd(1.0)

    def one_client(client, start, count, client_id, server, data, key):
        local_key, codec_key = jax.random.split(client_key(key, server.round, client_id))
        result = local_fn(server, client, dataclasses.replace(data, start=start, count=count), local_key)
        payload, codec_state = encode(uplink, result.message, server.round, codec_key, client.codec)
        new = dataclasses.replace(result.client, codec=codec_state)
        # what the server adds up: messages, or what they decode to
        sent = uplink.decode(payload) if uplink.decode_sum is None else payload
        finite = all_finite((result.message, sent, new))
        weight = jnp.where(finite, weight_fn(count), 0.0)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, client)
        report = (result.terms, payload.nbytes, payload.floats, payload.ranks, finite, weight)
        return (kept, report), (sent, weight)

    def add_up(sent, weights):
        return (uplink.decode_sum or weighted_sum)(sent, weights), weights.sum()

    def round(
        server: ServerState, clients: ClientState, data: FederatedData, ids: Int[Array, "k"], key: Key
    ) -> tuple[ServerState, ClientState, RoundInfo]:
        (clients, report), summed = map_clients(
            one_client,
            (clients, data.start, data.count, ids),
            (server, data, key),
            layout=layout,
            sum_fn=lambda summands: add_up(*summands),
        )
        terms, uplink_bytes, uplink_floats, ranks, finite, weight = report

        # the server's own stream: no client has this id
        server_key = client_key(key, server.round, 2**31 - 2)
        payload, codec_state = encode(downlink, weighted_mean(summed), server.round, server_key, server.codec)
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
        info = RoundInfo(
            ids=ids,
            terms=terms,
            uplink_bytes=uplink_bytes,
            downlink_bytes=jnp.broadcast_to(payload.nbytes, ids.shape),
            uplink_floats=uplink_floats,
            downlink_floats=jnp.broadcast_to(payload.floats, ids.shape),
            finite=finite,
            weight=weight,
            ranks=ranks,
        )
        return server, clients, info

    return round
