"""Centralised training: one model on the pooled examples of the cohort, the upper reference of the paper's Table 1."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from fedkd_jax.aggregate import all_finite
from fedkd_jax.algorithms.fedavg import init_shared, task_step
from fedkd_jax.check import check_type
from fedkd_jax.cohort import client_key
from fedkd_jax.local import check_local, local_steps
from fedkd_jax.losses import cross_entropy, task_terms
from fedkd_jax.models import Predictor, merge_params
from fedkd_jax.parallel import Layout
from fedkd_jax.types import Algorithm, Array, ClientState, FederatedData, Key, Model, RoundInfo, ServerState, Turn


def pool(data: FederatedData) -> FederatedData:
    """The cohort's examples as those of one client.

    >>> data = FederatedData(inputs=jnp.zeros((9, 1)), labels=jnp.arange(9), start=jnp.array([6, 0]),
    ...                      count=jnp.array([2, 3]), max_count=3)
    >>> pooled = pool(data)
    >>> pooled.labels[:int(pooled.count)].tolist()
    [6, 7, 0, 1, 2]
    """
    if data.stacked:
        clients, most = data.labels.shape[:2]
        flat = lambda x: x.reshape(clients * most, *x.shape[2:])  # noqa: E731
        data = FederatedData(
            inputs=jax.tree.map(flat, data.inputs),
            labels=flat(data.labels),
            start=jnp.arange(clients) * most,
            count=data.count,
            max_count=most,
        )
    size = min(data.max_count * data.start.shape[0], data.labels.shape[0])
    ends = jnp.cumsum(data.count)
    positions = jnp.arange(size)
    owner = jnp.minimum(jnp.searchsorted(ends, positions, side="right"), data.start.shape[0] - 1)
    rows = data.start[owner] + positions - (ends - data.count)[owner]
    read = lambda x: jnp.asarray(x).at[rows].get(mode="clip")  # noqa: E731
    return FederatedData(
        inputs=jax.tree.map(read, data.inputs),
        labels=read(data.labels),
        start=jnp.int32(0),
        count=ends[-1].astype(jnp.int32),
        max_count=size,
    )


def centralised(
    model: Model,
    *,
    optimizer: optax.GradientTransformation,
    batch: int,
    epochs: int = 1,
    steps: int | None = None,
    loss_fn: Callable[..., Array] = cross_entropy,
    layout: Layout | None = None,
) -> Algorithm:
    """One model trained on what the cohort's clients hold together, `epochs` passes a round; no traffic is counted.

    Each device trains the same model: there is one trainer, so there is no client axis to split.

    Args:
        model: the model.
        optimizer: optax; its state stays with the server.
        batch: rows of a mini-batch of the pooled examples.
        epochs, steps: work a round.
        loss_fn: `(logits, labels, mask) -> []`.
        layout: where evaluation runs.

    Returns:
        An `Algorithm` that predicts with "model". A round whose result is not finite changes nothing.

    Raises:
        TypeError, ValueError: as `fedavg`.

    >>> from fedkd_jax import mlp
    >>> sorted(centralised(mlp((64, 32, 10)), optimizer=optax.sgd(0.1), batch=10).predict)
    ['model']
    """

    check_local(batch=batch, epochs=epochs, steps=steps, loss_fn=loss_fn, optimizer=optimizer)
    check_type("layout", layout, (Layout, type(None)))

    def round(
        server: ServerState,
        clients: ClientState,
        data: FederatedData,
        ids: Int[Array, "k"],
        key: Key,
        turn: Turn | None = None,
    ) -> tuple[ServerState, ClientState, RoundInfo]:
        if turn is not None:  # of who is lost to the others nothing is known here, either
            data = dataclasses.replace(data, count=data.count * (turn.sends & turn.counted))
        (params, state), loss = local_steps(
            lambda carry, mini, key: task_step(model, optimizer, loss_fn, server.frozen["model"], carry, mini, key),
            (server.params, server.opt_state),
            pool(data),
            client_key(key, server.round, 0),
            batch=batch,
            epochs=epochs,
            steps=steps,
        )
        finite = all_finite((params, state))
        params, state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, state), (server.params, server.opt_state)
        )
        server = dataclasses.replace(server, params=params, opt_state=state, round=server.round + 1)
        nothing = jnp.zeros(ids.shape, jnp.int32)
        info = RoundInfo(
            ids=ids,
            terms=jax.tree.map(lambda x: jnp.broadcast_to(x, ids.shape), task_terms(teacher=loss)),
            uplink_bytes=nothing,
            downlink_bytes=nothing,
            uplink_floats=nothing,
            downlink_floats=nothing,
            finite=jnp.broadcast_to(finite, ids.shape),
            weight=data.count.astype(jnp.float32),
            ranks={},
            turn=() if turn is None else turn,
        )
        return server, clients, info

    return Algorithm(
        init_server=init_shared(model, optimizer),
        init_clients=lambda key, ids: ClientState(),
        round=round,
        predict={"model": Predictor(model, lambda server, client: merge_params(server.params, server.frozen["model"]))},
        layout=layout,
    )
