"""Evaluation of every model an algorithm predicts with, on each client's own test examples."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.local import gather_batch
from fedkd_jax.losses import cross_entropy
from fedkd_jax.metrics import accuracy
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.types import Algorithm, Array, FederatedData, State

METRICS: Mapping[str, Callable] = {"accuracy": accuracy, "loss": cross_entropy}


def evaluate(
    algorithm: Algorithm,
    state: State,
    data: FederatedData,
    *,
    metrics: Mapping[str, Callable[..., Array]] = METRICS,
    batch: int = 256,
) -> dict[str, dict[str, np.ndarray]]:
    """Each client's metrics on its own examples, for each of the algorithm's models.

    Args:
        algorithm: whose `predict` says which models there are.
        state: server and all N clients.
        data: N clients' test examples.
        metrics: `{name: f(logits, labels, mask) -> []}`, means over unmasked entries.
        batch: rows of a batch.

    Returns:
        `{model: {metric: [N] float32}}`, NaN for a client without examples.

    >>> import optax
    >>> from fedkd_jax import fedavg, mlp
    >>> algorithm = fedavg(mlp((2, 2)), optimizer=optax.sgd(0.1), batch=2)
    >>> data = FederatedData(inputs=np.eye(2, dtype=np.float32), labels=np.arange(2), start=np.array([0, 2]),
    ...                      count=np.array([2, 0]), max_count=2)
    >>> from fedkd_jax import init_state
    >>> state = init_state(algorithm, 2, jax.random.key(0))
    >>> evaluate(algorithm, state, data)["model"]["accuracy"].shape
    (2,)
    """
    batch = min(batch, data.max_count)
    static = dict(layout=algorithm.layout or Layout(), names=tuple(metrics), fns=tuple(metrics.values()), batch=batch)
    results = _evaluate(
        state, data, models=tuple(algorithm.predict), predict=tuple(algorithm.predict.values()), **static
    )
    empty = np.asarray(data.count) == 0
    return jax.tree.map(lambda x: np.where(empty, np.nan, np.asarray(x)), results)


@functools.partial(jax.jit, static_argnames=("models", "predict", "layout", "names", "fns", "batch"))
def _evaluate(state, data, *, models, predict, layout, names, fns, batch):
    size = -(-data.max_count // batch) * batch

    def one_client(client, start, count, server, data):
        own = dataclasses.replace(data, start=start, count=count)

        def add(i, sums):
            b = gather_batch(own, jnp.arange(size), i, batch)
            rows = b.mask.sum()
            for model, f in zip(models, predict, strict=True):
                logits = f(server, client, b.inputs).logits
                for name, metric in zip(names, fns, strict=True):
                    mask = jnp.broadcast_to(b.mask.reshape(-1, *[1] * (b.labels.ndim - 1)), b.labels.shape)
                    sums[model][name] += rows * metric(logits, b.labels, mask)
            return sums

        zeros = {model: {name: jnp.float32(0) for name in names} for model in models}
        sums = jax.lax.fori_loop(0, (count + batch - 1) // batch, add, zeros)
        return jax.tree.map(lambda x: x / jnp.maximum(count, 1), sums), ()

    clients = jax.tree.map(lambda x: x[: data.start.shape[0]], state.clients)
    out, _ = map_clients(one_client, (clients, data.start, data.count), (state.server, data), layout=layout)
    return out
