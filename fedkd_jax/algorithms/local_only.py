"""Local training only: every client its own model on its own data, nothing sent. The paper's "mentor, local only"."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedkd_jax.algorithms.fedavg import task_step
from fedkd_jax.cohort import client_key
from fedkd_jax.local import check_local, local_steps
from fedkd_jax.losses import cross_entropy, task_terms
from fedkd_jax.models import Predictor, merge_params, split_params
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.rest import check_rest, from_rest, to_rest
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
    teacher_dtype: Any = jnp.float32,
    moments_dtype: Any = jnp.float32,
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
        teacher_dtype, moments_dtype: in which a client's model and its optimiser state are between rounds, as in `fedkd`.
        layout: how clients are mapped over the hardware.

    Returns:
        An `Algorithm` that predicts with "model", the client's own.

    Raises:
        TypeError, ValueError: as `fedavg`.
        ValueError: a `teacher_dtype` or `moments_dtype` that is neither float32 nor bfloat16.

    >>> from fedkd_jax import mlp
    >>> algorithm = local_only(mlp((64, 32, 10)), optimizer=optax.sgd(0.1), batch=10)
    >>> algorithm.init_clients(jax.random.key(0), jnp.arange(3)).teacher["dense_1"]["bias"].shape
    (3, 10)
    """
    check_local(batch=batch, epochs=epochs, steps=steps, loss_fn=loss_fn, optimizer=optimizer)
    check_rest(teacher_dtype=teacher_dtype, moments_dtype=moments_dtype)

    def init_server(key: Key) -> ServerState:
        _, frozen = split_params(model, model.init(key))
        return ServerState(params=(), opt_state=optax.sgd(1.0).init(()), frozen={"model": frozen}, round=jnp.int32(0))

    def init_client(key: Key) -> ClientState:
        params, _ = split_params(model, model.init(jax.random.split(key, 3)[0]))
        return ClientState(
            teacher=to_rest(params, teacher_dtype), teacher_opt=to_rest(optimizer.init(params), moments_dtype)
        )

    def init_clients(key: Key, ids: Array) -> ClientState:
        return map_clients(lambda i: (init_client(client_key(key, 0, i)), ()), (ids,), layout=layout)[0]

    def local(server: ServerState, client: ClientState, data, key: Key) -> LocalResult:
        (params, state), loss = local_steps(
            lambda carry, mini, key: task_step(model, optimizer, loss_fn, server.frozen["model"], carry, mini, key),
            (from_rest(client.teacher, teacher_dtype), from_rest(client.teacher_opt, moments_dtype)),
            data,
            key,
            batch=batch,
            epochs=epochs,
            steps=steps,
        )
        rest_keys = jax.random.split(jax.random.fold_in(key, 2))  # a stream beside the two of `local_steps`
        new = ClientState(
            teacher=to_rest(params, teacher_dtype, rest_keys[0]),
            teacher_opt=to_rest(state, moments_dtype, rest_keys[1]),
        )
        return LocalResult(client=new, message=(), terms=task_terms(teacher=loss))

    return Algorithm(
        init_server=init_server,
        init_clients=init_clients,
        round=federated_round(local, layout=layout),
        predict={
            "model": Predictor(
                model,
                lambda server, client: merge_params(from_rest(client.teacher, teacher_dtype), server.frozen["model"]),
            )
        },
        layout=layout,
    )
