"""Evaluation of every model an algorithm predicts with: on each client's own test examples, and on all of them together."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.check import check_int, check_type
from fedkd_jax.cohort import take
from fedkd_jax.data import check_data, client_parts, join_parts, take_clients
from fedkd_jax.local import gather_batch
from fedkd_jax.losses import cross_entropy
from fedkd_jax.metrics import AnyMetric, accuracy, as_metric
from fedkd_jax.models import Predictor
from fedkd_jax.parallel import Layout, known_to_all, map_clients
from fedkd_jax.stores import Store
from fedkd_jax.types import Algorithm, FederatedData, Leaf, Predict, PyTree, State

METRICS: Mapping[str, AnyMetric] = {"accuracy": accuracy, "loss": cross_entropy}
RESERVED = ("round", "pooled")
GROUP_BYTES = 2**26  # of states out of a store, at a time


def evaluate(
    algorithm: Algorithm,
    state: State,
    data: FederatedData,
    *,
    metrics: Mapping[str, AnyMetric] = METRICS,
    batch: int = 256,
    ids: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Each client's metrics on its own examples, and those of all clients' examples, for each of the algorithm's models.

    Args:
        algorithm: whose `predict` says which models there are.
        state: server and all N clients.
        data: N clients' test examples; labels `[n, ...]` as the metrics want them, which may not be as in training.
        metrics: `{name: metric}`, each a `Metric` or a mean over unmasked rows `f(logits, labels, mask) -> []`, whose mask has
            the labels' shape. Labels of masked rows are -1.
        batch: rows of a batch.
        ids: `[n]` int, where `data` is of these n clients only, in this order; N is then n below.

    Returns:
        `{model: {metric: [N] float32}}`, NaN for a client without examples; and `"pooled": {model: {metric: float}}`, the
        value of all clients' counts together, for a plain function the mean weighted by rows.

    Raises:
        TypeError: no `Algorithm`, `State`, data or metrics.
        ValueError: a model is called "round" or "pooled"; not as many `ids` as clients in `data`, or no such clients; data that
            cannot be, see `check_data`; `batch` below 1.

    >>> import optax
    >>> from fedkd_jax import fedavg, mlp
    >>> algorithm = fedavg(mlp((2, 2)), optimizer=optax.sgd(0.1), batch=2)
    >>> data = FederatedData(inputs=np.eye(2, dtype=np.float32), labels=np.arange(2), start=np.array([0, 2]),
    ...                      count=np.array([2, 0]), max_count=2)
    >>> from fedkd_jax import init_state
    >>> state = init_state(algorithm, 2, jax.random.key(0))
    >>> result = evaluate(algorithm, state, data)
    >>> result["model"]["accuracy"].shape, result["pooled"]["model"]["accuracy"] - float(result["model"]["accuracy"][0])
    ((2,), 0.0)
    """
    check_type("state", state, State)
    options, values = _plan(algorithm, data, metrics, batch)
    if ids is not None:
        held = [] if isinstance(state.clients, Store) else [x.shape[0] for x in jax.tree.leaves(state.clients)]
        last = min(held, default=2**31 - 1) - 1
        ids = np.asarray(ids)
        whole = ids.shape == (len(data.start),) and ids.dtype.kind in "iu"
        if not whole or np.min(ids) < 0 or np.max(ids) > last:
            raise ValueError(f"ids is {ids}; allowed: {len(data.start)} of 0 to {last}, one for each client of data")
    if not isinstance(state.clients, Store):
        if ids is not None:
            state = State(server=state.server, clients=_take(state.clients, jnp.asarray(ids)))
        return values(_counts(state, data, **options))
    store, of_rows, counts = state.clients, [], []
    ids = np.arange(len(data.start)) if ids is None else np.asarray(ids)
    for rows, own, valid in store.groups(ids, GROUP_BYTES):
        some = State(server=state.server, clients=store.take(own))
        of_group = jax.device_get(_counts(some, _take_data(data, rows), **options))
        counts.append(jax.tree.map(lambda x: x[valid], of_group))  # noqa: B023
        of_rows.append(rows[valid])
    order = np.argsort(np.concatenate(of_rows))
    return values(jax.tree.map(lambda *x: np.concatenate(x)[order], *counts))


def evaluate_seeds(
    algorithm: Algorithm,
    state: State,
    data: FederatedData,
    *,
    metrics: Mapping[str, AnyMetric] = METRICS,
    batch: int = 256,
    layout: Layout | None = None,
) -> list[dict[str, dict[str, Any]]]:
    """`evaluate` of every seed of `simulate_seeds`.

    Args:
        state: `[S, ...]`.
        algorithm, data, metrics, batch: as in `evaluate`.
        layout: where the seeds run.

    Returns:
        A dict per seed.

    Raises:
        ValueError: as `evaluate`.

    >>> import optax
    >>> from fedkd_jax import fedavg, mlp, simulate_seeds
    >>> algorithm = fedavg(mlp((2, 2)), optimizer=optax.sgd(0.1), batch=2)
    >>> data = FederatedData(inputs=np.eye(2, dtype=np.float32), labels=np.arange(2), start=np.array([0]),
    ...                      count=np.array([2]), max_count=2)
    >>> state, _ = simulate_seeds(algorithm, 1, data, jax.random.split(jax.random.key(0), 3), rounds=1)
    >>> len(evaluate_seeds(algorithm, state, data))
    3
    """
    check_type("state", state, State)
    options, values = _plan(algorithm, data, metrics, batch)
    counts = jax.device_get(_counts_of_seeds(state, data, seeds=layout or Layout(), **options))
    return [values(jax.tree.map(lambda x: x[i], counts)) for i in range(len(state.server.round))]  # noqa: B023


def _plan(algorithm: Algorithm, data: FederatedData, metrics: Mapping[str, AnyMetric], batch: int):
    """What `_counts` is compiled for, and the function from what it returns to what `evaluate` does."""
    check_type("algorithm", algorithm, Algorithm)
    check_int("batch", batch)
    check_type("metrics", metrics, Mapping, "{name: metric}")
    check_data("data", data)
    for model in algorithm.predict:
        if model in RESERVED:
            raise ValueError(f"a model is called {model!r}; allowed: any name but {' and '.join(RESERVED)}")
    whole = {name: as_metric(metric) for name, metric in metrics.items()}
    models = dict(sorted(algorithm.predict.items()))  # the order of the tables
    fns = tuple(dict.fromkeys(metric.counts for metric in whole.values()))  # precision and recall share theirs
    options: dict[str, Any] = dict(
        predict=tuple(models.values()),
        layout=algorithm.layout or Layout(),
        fns=fns,
        batch=min(batch, data.max_count),
    )
    rows = np.asarray(data.count)

    def values(counts) -> dict[str, dict[str, Any]]:
        out: dict[str, dict[str, Any]] = {model: {} for model in models}
        pooled: dict[str, dict[str, float]] = {model: {} for model in models}
        for model, of_model in zip(models, counts, strict=True):
            for name, metric in whole.items():
                own = jax.tree.map(np.asarray, of_model[fns.index(metric.counts)])
                together = jax.tree.map(lambda x: x.sum(axis=0, dtype=np.float64), own)
                with np.errstate(divide="ignore", invalid="ignore"):  # a client without examples may be 0 / 0
                    out[model][name] = np.where(rows > 0, metric.value(own), np.nan).astype(np.float32)
                    pooled[model][name] = float(metric.value(together)) if rows.any() else float("nan")
        return {**out, "pooled": pooled}

    return options, values


_take, _take_data = jax.jit(take), jax.jit(take_clients)


@functools.partial(jax.jit, static_argnames=("predict", "layout", "fns", "batch"))
def _counts(state, data, *, predict, layout, fns, batch):
    """Of each model, what each of `fns` counts, `[N]`."""
    size = -(-data.max_count // batch) * batch

    def one_client(client, own, server, shared):
        own = join_parts(own, shared)
        scorers = [_scorer(f, server, client, own) for f in predict]

        def of_batch(i):
            b = gather_batch(own, jnp.arange(size), i, batch)
            rows = b.mask.reshape(-1, *[1] * (b.labels.ndim - 1))
            labels = jnp.where(rows, b.labels.astype(jnp.int32), -1)
            logits = [score(b.inputs) for score in scorers]
            return [[fn(z, labels, b.mask) for fn in fns] for z in logits]

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_batch, 0))
        add = lambda i, sums: jax.tree.map(jnp.add, sums, of_batch(i))  # noqa: E731
        return jax.lax.fori_loop(0, (own.count + batch - 1) // batch, add, zeros), ()

    clients = jax.tree.map(lambda x: x[: data.start.shape[0]], state.clients)
    own, shared = client_parts(data)
    out, _ = map_clients(one_client, (clients, own), (state.server, shared), layout=layout)
    return known_to_all(out, layout)


@functools.partial(jax.jit, static_argnames=("seeds", "predict", "layout", "fns", "batch"))
def _counts_of_seeds(state, data, *, seeds, **options):
    return map_clients(lambda s, d: (_counts(s, d, **options), ()), (state,), (data,), layout=seeds)[0]


def _scorer(predict: Predict, server, client, own: FederatedData) -> Callable[[PyTree], Leaf]:
    """`rows -> logits`, for rows of one client's data."""
    if isinstance(predict, Predictor) and predict.model.scorer is not None:
        inputs = gather_batch(own, jnp.arange(own.max_count), 0, own.max_count).inputs
        return predict.model.scorer(predict.params(server, client), inputs)
    return lambda rows: predict(server, client, rows).logits
