"""Local training only: every client its own model on its own data, nothing sent. The paper's "mentor, local only"."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedkd_jax.algorithms.fedavg import task_step
from fedkd_jax.cohort import client_key
from fedkd_jax.local import local_steps
from fedkd_jax.losses import cross_entropy, task_terms
from fedkd_jax.models import Predictor, merge_params, split_params
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.rounds import federated_round
from fedkd_jax.types import Algorithm, Array, ClientState, Key, LocalResult, Model, ServerState


def local_only(
    model: Model,
    *,
    optimizer: optax.GradientTransformation,
    batch: int,
    epochs: int = 1,
    steps: int | None = None,
    loss_fn: Callable[..., Array] = cross_entropy,
    layout: Layout | None = None,
) -> Algorithm:
    """Every client trains `model` alone; its optimiser state stays with it. The message is empty and costs nothing.

    A client draws the same initial model as its teacher in `fedkd` from the same key, so the two differ by the method only.

    Args:
        model: the clients' model.
        optimizer: optax.
        batch: rows of a mini-batch.
        epochs, steps: local work a round.
        loss_fn: `(logits, labels, mask) -> []`.
        layout: how clients are mapped over the hardware.

    Returns:
        An `Algorithm` that predicts with "model", the client's own.

    >>> from fedkd_jax import mlp
    >>> algorithm = local_only(mlp((64, 32, 10)), optimizer=optax.sgd(0.1), batch=10)
    >>> algorithm.init_clients(jax.random.key(0), jnp.arange(3)).teacher["dense_1"]["bias"].shape
    (3, 10)
    """

    def init_server(key: Key) -> ServerState:
        _, frozen = split_params(model, model.init(key))
        return ServerState(params=(), opt_state=optax.sgd(1.0).init(()), frozen={"model": frozen}, round=jnp.int32(0))

    def init_client(key: Key) -> ClientState:
        params, _ = split_params(model, model.init(jax.random.split(key, 3)[0]))
        return ClientState(teacher=params, teacher_opt=optimizer.init(params))

    def init_clients(key: Key, ids: Array) -> ClientState:
        return map_clients(lambda i: (init_client(client_key(key, 0, i)), ()), (ids,), layout=layout)[0]

    def local(server: ServerState, client: ClientState, data, key: Key) -> LocalResult:
        (params, state), loss = local_steps(
            lambda carry, mini, key: task_step(model, optimizer, loss_fn, server.frozen["model"], carry, mini, key),
            (client.teacher, client.teacher_opt),
            data,
            key,
            batch=batch,
            epochs=epochs,
            steps=steps,
        )
        return LocalResult(
            client=ClientState(teacher=params, teacher_opt=state), message=(), terms=task_terms(teacher=loss)
        )

    return Algorithm(
        init_server=init_server,
        init_clients=init_clients,
        round=federated_round(local, layout=layout),
        predict={
            "model": Predictor(model, lambda server, client: merge_params(client.teacher, server.frozen["model"]))
        },
        layout=layout,
    )
