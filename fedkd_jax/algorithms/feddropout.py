"""Federated dropout: Caldas et al., "Expanding the reach of federated learning by reducing client resource requirements",
2018 (arXiv 1812.07210).

Every client of a round gets a sub-model of its own, in which a random share of each hidden layer's units is left out, trains it
and sends its update. Weights of units left out neither travel nor count; the server averages each weight over the clients that
had it: w_j <- w_j + sum_i n_i m_ij (y_ij - w_j) / sum_i n_i m_ij. Which units a client has follows from its key, so only
weights travel, as many down as up.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedkd_jax.aggregate import example_weight
from fedkd_jax.algorithms.fedavg import init_shared, task_step
from fedkd_jax.check import check_fn, check_number, check_type
from fedkd_jax.codecs.base import check_size
from fedkd_jax.local import check_local, local_steps
from fedkd_jax.losses import cross_entropy, task_terms
from fedkd_jax.models import Predictor, merge_params, split_params
from fedkd_jax.parallel import Layout
from fedkd_jax.rounds import Report, Round, federated_round
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
    Params,
    Payload,
    PyTree,
    SendFn,
    ServerState,
    Turn,
    Wire,
    record,
)

UNITS_STREAM = 2**31 - 1  # folded into a client's key of the round for its units; `local_steps` splits that key
SubModel = Callable[[Key, Params], PyTree]  # (key, parameters) -> what is kept of each, bool of its shape


@record
class SubUpdate:
    """An update of some of the weights.

    >>> SubUpdate(update=jnp.zeros(3), kept=jnp.array([True, False, True])).kept.sum().item()
    2
    """

    update: PyTree  # zero where not kept
    kept: PyTree  # bool, or the weight of those that kept it


def keep_units(share: Number) -> SubModel:
    """Keeps ceil(share d) random units of every hidden layer of width d: of dense layers, and inside the feed-forward networks
    of stacked transformer layers, each for itself. Filters of convolutions, and attention, are kept whole.

    Raises:
        ValueError: a share outside (0, 1]; when used, parameters without any such layer.

    >>> from fedkd_jax import mlp
    >>> kept = keep_units(0.5)(jax.random.key(0), mlp((4, 6, 2)).init(jax.random.key(1)))
    >>> {name: int(x.sum()) for name, x in kept["dense_0"].items()}, int(kept["dense_1"]["kernel"].sum())
    ({'bias': 3, 'kernel': 12}, 6)
    """
    check_number("share", share, "(0, 1]")

    def units(key: Key, shape: tuple[int, ...]) -> Array:
        first = jnp.arange(shape[-1]) < math.ceil(round(share * shape[-1], 6))
        return jax.random.permutation(key, jnp.broadcast_to(first, shape), axis=-1, independent=True)

    def both(kept: Array, unit: Array) -> Array:
        return kept & jnp.broadcast_to(unit, kept.shape)

    def sub_model(key: Key, params: Params) -> PyTree:
        kept = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
        dense = sorted((name for name in params if re.fullmatch(r"dense_\d+", name)), key=lambda n: int(n[6:]))
        for i, (name, above) in enumerate(itertools.pairwise(dense)):
            unit = units(jax.random.fold_in(key, i), params[name]["bias"].shape)
            kept[name] = {leaf: both(x, unit) for leaf, x in kept[name].items()}
            kept[above] = kept[above] | {"kernel": both(kept[above]["kernel"], unit[:, None])}
        if "up" in params.get("layers", {}):
            unit = units(jax.random.fold_in(key, len(dense)), params["layers"]["up"]["bias"].shape)  # [layers, inner]
            up, down = kept["layers"]["up"], kept["layers"]["down"]
            kept["layers"]["up"] = up | {"kernel": both(up["kernel"], unit[:, None]), "bias": unit}
            kept["layers"]["down"] = down | {"kernel": both(down["kernel"], unit[..., None])}
        elif len(dense) < 2:
            raise ValueError(
                f"params has {', '.join(params)}; allowed: dense_0, dense_1 and so on, or layers with up and down"
            )
        return kept

    return sub_model


def sub_codec() -> Codec:
    """Of a `SubUpdate`, what is kept travels; the server adds up updates and the weights of those that had them.

    >>> message = SubUpdate(update=jnp.array([3.0, 0.0, 5.0]), kept=jnp.array([True, False, True]))
    >>> int(sub_codec().encode(message, 0, jax.random.key(0)).nbytes)
    8
    """

    def encode(message: SubUpdate, round, key) -> Payload:
        del round, key
        check_size(jax.tree.leaves(message.update))
        pairs = list(zip(jax.tree.leaves(message.update), jax.tree.leaves(message.kept), strict=True))
        count = lambda size: sum((kept.sum(dtype=jnp.int32) * size(x) for x, kept in pairs), jnp.int32(0))  # noqa: E731
        return Payload(content=message, floats=count(lambda x: 1), nbytes=count(lambda x: x.dtype.itemsize), ranks={})

    def decode(payload: Payload) -> SubUpdate:
        as_numbers = jax.tree.map(lambda kept, x: kept.astype(x.dtype), payload.content.kept, payload.content.update)
        return dataclasses.replace(payload.content, kept=as_numbers)

    return Codec(encode, decode)


def _mean_codec() -> Codec:
    """On the server: of a mean `SubUpdate`, each weight's mean over those that had it."""

    def encode(mean: SubUpdate, round, key) -> Payload:
        del round, key
        update = jax.tree.map(lambda x, kept: x / jnp.where(kept > 0, kept, 1.0), mean.update, mean.kept)
        return Payload(content=update, floats=jnp.int32(0), nbytes=jnp.int32(0), ranks={})

    return Codec(encode, lambda payload: payload.content)


def _send_kept(send_fn: SendFn) -> SendFn:
    """Of a `SubUpdate`; what is not kept stays zero."""

    def send(message: SubUpdate, client_id, key) -> SubUpdate:
        update = send_fn(message.update, client_id, key)
        return dataclasses.replace(
            message, update=jax.tree.map(lambda x, on: jnp.where(on, x, 0), update, message.kept)
        )

    return send


def _of_kept(aggregator: Aggregator) -> Aggregator:
    """Of `SubUpdate`s; of each weight those who have it are counted."""
    if aggregator.noise is not None:
        raise ValueError(
            "aggregator has noise; allowed: one without, as the number of clients behind each weight shows"
        )
    given: Any = aggregator

    def bounded(sub: SubUpdate) -> SubUpdate:
        return dataclasses.replace(sub, update=given.bound(sub.update))

    def combined(subs: SubUpdate, weights) -> SubUpdate:
        own = jax.tree.map(lambda kept: kept * weights.reshape(-1, *[1] * (kept.ndim - 1)), subs.kept)
        update = given.combine(subs.update, own)
        return SubUpdate(update=update, kept=jax.tree.map(jnp.ones_like, update))

    return Aggregator(given.bound and bounded, given.combine and combined)


def feddropout(
    model: Model,
    *,
    sub_model: SubModel,
    optimizer: optax.GradientTransformation,
    batch: int,
    epochs: int = 1,
    steps: int | None = None,
    loss_fn: Callable[..., Array] = cross_entropy,
    weight_fn: Callable[[Array], Array] = example_weight,
    server_optimizer: optax.GradientTransformation | None = None,
    send_fn: SendFn | None = None,
    aggregator: Aggregator | None = None,
    layout: Layout | None = None,
    wire: Wire | None = None,
) -> Algorithm:
    """Federated dropout of any model of which `sub_model` knows the units.

    Args:
        model: the shared model; units left out are trained as zeros, of which nothing comes where the activation of 0 is 0.
        sub_model: which weights a client has, such as `keep_units(0.75)`; drawn for every client and round.
        optimizer: optax, of the clients; starts anew each round.
        batch: rows of a mini-batch.
        epochs, steps: local work a round: passes over the client's examples, or a number of steps.
        loss_fn: `(logits, labels, mask) -> []`.
        weight_fn, server_optimizer, layout, wire: see `federated_round`.
        send_fn, aggregator: see there; of each weight only those who have it are counted.

    Returns:
        An `Algorithm` that predicts with "model", the whole one.

    Raises:
        TypeError: as `fedavg`.
        ValueError: a model in which `sub_model` finds no units; `batch`, `epochs` or `steps` below 1; an aggregator with noise,
            which hides updates but not how many clients each weight's mean is of.

    >>> from fedkd_jax import mlp
    >>> algorithm = feddropout(mlp((64, 32, 10)), sub_model=keep_units(0.75), optimizer=optax.sgd(0.1), batch=10)
    >>> sorted(algorithm.predict)
    ['model']
    """
    check_type("model", model, Model)
    check_fn("sub_model", sub_model, "(key, parameters) -> kept, keep_units(0.5) say")
    check_local(batch=batch, epochs=epochs, steps=steps, loss_fn=loss_fn, optimizer=optimizer)
    server_optimizer, codec = server_optimizer or optax.sgd(1.0), sub_codec()
    key = jax.random.key(0)
    jax.eval_shape(lambda: sub_model(key, split_params(model, model.init(key))[0]))  # a model without units is told now

    def init_clients(key: Key, ids: Array) -> ClientState:
        del key, ids
        return ClientState()

    def masked(tree: PyTree, kept: PyTree) -> SubUpdate:
        return SubUpdate(update=jax.tree.map(lambda x, on: jnp.where(on, x, 0), tree, kept), kept=kept)

    def download(server: ServerState, key: Key) -> Payload:
        kept = sub_model(jax.random.fold_in(key, UNITS_STREAM), server.params)
        return codec.encode(masked(server.params, kept), server.round, key)

    def local(server, client: ClientState, data, key: Key) -> LocalResult:
        start, kept = server.params.update, server.params.kept
        (params, _), loss = local_steps(
            lambda carry, mini, key: task_step(model, optimizer, loss_fn, server.frozen["model"], carry, mini, key),
            (start, optimizer.init(start)),
            data,
            key,
            batch=batch,
            epochs=epochs,
            steps=steps,
        )
        message = masked(optax.tree.sub(params, start), kept)
        return LocalResult(client=client, message=message, terms=task_terms(student=loss))

    base = federated_round(
        local,
        uplink=codec,
        downlink=_mean_codec(),
        download=download,
        weight_fn=weight_fn,
        server_optimizer=server_optimizer,
        send_fn=None if send_fn is None else _send_kept(send_fn),
        aggregator=None if aggregator is None else _of_kept(aggregator),
        layout=layout,
        wire=wire,
    )

    def finish(server: ServerState, reports: Report, summed, ids, key, turn: Turn | None = None):
        server, info = base.finish(server, reports, summed, ids, key, turn)
        present = 1 if turn is None else turn.present
        down = dict(downlink_bytes=reports.nbytes * present, downlink_floats=reports.floats * present)
        return server, dataclasses.replace(info, **down)

    return Algorithm(
        init_server=init_shared(model, server_optimizer),
        init_clients=init_clients,
        round=Round(base.train, finish),
        predict={"model": Predictor(model, lambda server, client: merge_params(server.params, server.frozen["model"]))},
        layout=layout,
    )
