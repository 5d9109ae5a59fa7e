"""FedAvg: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017.

Each client of the cohort trains the shared model on its own data and sends the update; the server adds the mean weighted by
examples: w <- w + sum_i n_i (w_i - w) / sum_i n_i. FedKD is compared with FedAvg of the teacher and of the student alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedkd_jax.aggregate import example_weight
from fedkd_jax.codecs import init_codec
from fedkd_jax.local import check_local, local_steps
from fedkd_jax.losses import cross_entropy, task_terms
from fedkd_jax.models import Predictor, merge_params, split_params
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.rounds import federated_round
from fedkd_jax.types import (
    Aggregator,
    Algorithm,
    Array,
    Batch,
    ClientState,
    Codec,
    Key,
    LocalResult,
    Model,
    SendFn,
    ServerState,
    Wire,
)


def task_step(model: Model, optimizer: optax.GradientTransformation, loss_fn, frozen, carry, batch: Batch, key: Key):
    """One step of plain training: `carry = (params, optimiser state)` -> `(carry, loss)`.

    >>> from fedkd_jax import mlp
    >>> model, optimizer = mlp((4, 2)), optax.sgd(0.1)
    >>> params = model.init(jax.random.key(0))
    >>> batch = Batch(inputs=jnp.ones((2, 4)), labels=jnp.array([0, 0]), mask=jnp.array([True, True]))
    >>> carry = params, optimizer.init(params)
    >>> losses = []
    >>> for _ in range(3):
    ...     carry, loss = task_step(model, optimizer, cross_entropy, {}, carry, batch, jax.random.key(1))
    ...     losses.append(float(loss))
    >>> losses[0] > losses[1] > losses[2]
    True
    """
    params, state = carry

    def loss(p):
        return loss_fn(model.apply(merge_params(p, frozen), batch.inputs, key=key).logits, batch.labels, batch.mask)

    value, gradient = jax.value_and_grad(loss)(params)
    step, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, step), state), value


def init_shared(
    model: Model, server_optimizer: optax.GradientTransformation, downlink: Codec | None = None
) -> Callable[[Key], ServerState]:
    """`init_server` of a method whose server holds `model`.

    >>> from fedkd_jax import mlp
    >>> server = init_shared(mlp((4, 2)), optax.sgd(1.0))(jax.random.key(0))
    >>> server.params["dense_0"]["kernel"].shape, int(server.round)
    ((4, 2), 0)
    """

    def init_server(key: Key) -> ServerState:
        params, frozen = split_params(model, model.init(key))
        return ServerState(
            params=params,
            opt_state=server_optimizer.init(params),
            frozen={"model": frozen},
            round=jnp.int32(0),
            codec=init_codec(downlink, params),
        )

    return init_server


def fedavg(
    model: Model,
    *,
    optimizer: optax.GradientTransformation,
    batch: int,
    epochs: int = 1,
    steps: int | None = None,
    uplink: Codec | None = None,
    downlink: Codec | None = None,
    loss_fn: Callable[..., Array] = cross_entropy,
    reset_optimizer: bool = True,
    weight_fn: Callable[[Array], Array] = example_weight,
    server_optimizer: optax.GradientTransformation | None = None,
    send_fn: SendFn | None = None,
    aggregator: Aggregator | None = None,
    layout: Layout | None = None,
    wire: Wire | None = None,
) -> Algorithm:
    """FedAvg of any model.

    Args:
        model: the shared model, the teacher's or the student's.
        optimizer: optax, of the clients.
        batch: rows of a mini-batch.
        epochs, steps: local work a round: passes over the client's examples, or a number of steps.
        uplink, downlink: codecs; raw by default.
        loss_fn: `(logits, labels, mask) -> []`.
        reset_optimizer: whether the clients' optimiser starts anew each round, or stays with the client.
        weight_fn, server_optimizer, send_fn, aggregator, layout, wire: see `federated_round`.

    Returns:
        An `Algorithm` that predicts with "model".

    Raises:
        TypeError: no model, optimiser, codec or function where there should be one.
        ValueError: `batch`, `epochs` or `steps` below 1.

    >>> from fedkd_jax import mlp
    >>> algorithm = fedavg(mlp((64, 32, 10)), optimizer=optax.sgd(0.1), batch=10)
    >>> algorithm.init_clients(jax.random.key(0), jnp.arange(3))
    ClientState(teacher=(), projection=(), teacher_opt=(), projection_opt=(), student_opt=(), codec=(), control=())
    """
    check_local(batch=batch, epochs=epochs, steps=steps, loss_fn=loss_fn, optimizer=optimizer)
    server_optimizer = server_optimizer or optax.sgd(1.0)

    def init_clients(key: Key, ids: Array) -> ClientState:
        params, _ = split_params(model, model.init(key))
        opt_state = () if reset_optimizer else optimizer.init(params)
        state = ClientState(student_opt=opt_state, codec=init_codec(uplink, params))
        return map_clients(lambda _: (state, ()), (ids,), layout=layout)[0]

    def local(server: ServerState, client: ClientState, data, key: Key) -> LocalResult:
        state = optimizer.init(server.params) if reset_optimizer else client.student_opt
        (params, state), loss = local_steps(
            lambda carry, mini, key: task_step(model, optimizer, loss_fn, server.frozen["model"], carry, mini, key),
            (server.params, state),
            data,
            key,
            batch=batch,
            epochs=epochs,
            steps=steps,
        )
        client = client if reset_optimizer else ClientState(student_opt=state)
        return LocalResult(client=client, message=optax.tree.sub(params, server.params), terms=task_terms(student=loss))

    return Algorithm(
        init_server=init_shared(model, server_optimizer, downlink),
        init_clients=init_clients,
        round=federated_round(
            local,
            uplink=uplink,
            downlink=downlink,
            weight_fn=weight_fn,
            server_optimizer=server_optimizer,
            send_fn=send_fn,
            aggregator=aggregator,
            layout=layout,
            wire=wire,
        ),
        predict={"model": Predictor(model, lambda server, client: merge_params(server.params, server.frozen["model"]))},
        layout=layout,
    )
