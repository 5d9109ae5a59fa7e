"""SCAFFOLD: Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated learning", ICML 2020.

Every client keeps a control variate c_i, the server their mean c; both start at 0. In a round, from w:
    local steps      y <- y - eta (g_i(y) - c_i + c),  K_i of them
    own variate      c_i' = c_i - c + (w - y) / (K_i eta)                    (option II)
    sent             y - w  and  c_i' - c_i
    server           w <- w + mean(y - w),   c <- c + |S| / N mean(c_i' - c_i)
Model and variates travel both ways, so a round costs twice FedAvg's.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedkd_jax.aggregate import fixed_weight
from fedkd_jax.algorithms.fedavg import task_step
from fedkd_jax.check import check_number
from fedkd_jax.codecs import init_codec
from fedkd_jax.local import check_local, count_steps, local_steps
from fedkd_jax.losses import cross_entropy, task_terms
from fedkd_jax.models import Predictor, merge_params, split_params
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.rounds import Round, federated_round
from fedkd_jax.types import (
    Aggregator,
    Algorithm,
    Array,
    ClientState,
    Codec,
    Key,
    LocalResult,
    Model,
    Number,
    SendFn,
    ServerState,
    Wire,
)


def scaffold(
    model: Model,
    *,
    learning_rate: Number,
    batch: int,
    epochs: int = 1,
    steps: int | None = None,
    participation: Number = 1.0,
    uplink: Codec | None = None,
    downlink: Codec | None = None,
    loss_fn: Callable[..., Array] = cross_entropy,
    server_optimizer: optax.GradientTransformation | None = None,
    send_fn: SendFn | None = None,
    aggregator: Aggregator | None = None,
    layout: Layout | None = None,
    wire: Wire | None = None,
) -> Algorithm:
    """SCAFFOLD of any model; local steps are plain SGD, of which the variates' equation speaks.

    Both means are over the cohort's clients, each alike as in the paper, also one without examples, so that c is the mean of
    all c_i. A client that is left out because it is not finite breaks that.

    Args:
        model: the shared model.
        learning_rate: eta.
        batch: rows of a mini-batch.
        epochs, steps: local work a round: passes over the client's examples, or a number of steps.
        participation: |S| / N, the share of the clients that a cohort is.
        uplink, downlink: codecs of model and variates together; raw by default. What a lossy one loses of a variate is missing
            from c for good, unless it is wrapped in `error_feedback`.
        loss_fn: `(logits, labels, mask) -> []`.
        server_optimizer: optax, of the model alone.
        send_fn, aggregator, layout, wire: see `federated_round`; the first two see model and variates together.

    Returns:
        An `Algorithm` that predicts with "model". `ServerState.params` is `{"model": w, "control": c}`, a client's c_i is
        `ClientState.control`.

    Raises:
        TypeError, ValueError: as `fedavg`.
        ValueError: a learning rate that is not above 0, a participation outside (0, 1].

    >>> from fedkd_jax import mlp
    >>> algorithm = scaffold(mlp((64, 32, 10)), learning_rate=0.1, batch=10)
    >>> sorted(algorithm.init_server(jax.random.key(0)).params)
    ['control', 'model']
    """
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_number("participation", participation, "(0, 1]")
    check_local(batch=batch, epochs=epochs, steps=steps, loss_fn=loss_fn)
    kinds: dict[Hashable, Any] = {
        "model": server_optimizer or optax.sgd(1.0),
        "control": optax.sgd(float(participation)),
    }
    server_optimizer = optax.multi_transform(kinds, {"model": "model", "control": "control"})

    def start(key: Key):
        params, frozen = split_params(model, model.init(key))
        return {"model": params, "control": optax.tree.zeros_like(params)}, frozen

    def init_server(key: Key) -> ServerState:
        params, frozen = start(key)
        return ServerState(
            params=params,
            opt_state=server_optimizer.init(params),
            frozen={"model": frozen},
            round=jnp.int32(0),
            codec=init_codec(downlink, params),
        )

    def init_clients(key: Key, ids: Array) -> ClientState:
        params, _ = start(key)
        state = ClientState(control=params["control"], codec=init_codec(uplink, params))
        return map_clients(lambda _: (state, ()), (ids,), layout=layout)[0]

    def local(server: ServerState, client: ClientState, data, key: Key) -> LocalResult:
        shared, control, own = server.params["model"], server.params["control"], client.control
        correction = optax.tree.sub(control, own)
        sgd = optax.chain(
            optax.stateless(lambda gradient, _: optax.tree.add(gradient, correction)), optax.sgd(float(learning_rate))
        )
        (params, _), loss = local_steps(
            lambda carry, mini, key: task_step(model, sgd, loss_fn, server.frozen["model"], carry, mini, key),
            (shared, sgd.init(shared)),
            data,
            key,
            batch=batch,
            epochs=epochs,
            steps=steps,
        )
        made = count_steps(data.count, data.work, batch=batch, epochs=epochs, steps=steps)
        update = optax.tree.sub(params, shared)
        # c_i' - c_i = -c - (y - w) / (K eta); a client that made no step keeps its own
        scale = 1.0 / (jnp.maximum(made, 1) * learning_rate)
        change = jax.tree.map(lambda c, u: jnp.where(made > 0, -c - u * scale, 0.0), control, update)
        return LocalResult(
            client=ClientState(control=optax.tree.add(own, change)),
            message={"model": update, "control": change},
            terms=task_terms(student=loss),
        )

    given: Any = aggregator or Aggregator()
    # c <- c + |S| / N mean of c_i' - c_i, and S are those who are counted
    of_counted = lambda update, share: {**update, "control": optax.tree.scale(share, update["control"])}  # noqa: E731
    combined = lambda updates, weights: of_counted(given.combine(updates, weights), (weights > 0).mean())  # noqa: E731
    base = federated_round(
        local,
        uplink=uplink,
        downlink=downlink,
        weight_fn=fixed_weight,
        server_optimizer=server_optimizer,
        send_fn=send_fn,
        aggregator=given._replace(combine=given.combine and combined),
        layout=layout,
        wire=wire,
    )

    def finish(server: ServerState, reports, summed, ids, key, turn=None):
        total, counted = summed
        if given.combine is None and given.noise is None:  # with noise it is divided by |S| already
            total = of_counted(total, counted / ids.shape[0])
        return base.finish(server, reports, (total, counted), ids, key, turn)

    return Algorithm(
        init_server=init_server,
        init_clients=init_clients,
        round=Round(base.train, finish),
        predict={
            "model": Predictor(
                model, lambda server, client: merge_params(server.params["model"], server.frozen["model"])
            )
        },
        layout=layout,
    )
