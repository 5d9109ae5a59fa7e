"""Populations whose examples are never all in memory: memory-mapped arrays, record files, and synthetic clients of any number.

Each is a `ClientSource`, whose `take(ids)` lays a cohort's examples out like a `FederatedData` with `max_count` rows a client.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.check import check_fn, check_int, check_number
from fedkd_jax.cohort import client_key
from fedkd_jax.data.federated import check_data, check_ids, flat_index
from fedkd_jax.parallel import map_clients
from fedkd_jax.types import ClientSource, FederatedData, Number, PyTree

MOST = 2**31 - 2  # ids are int32, and the last ones are not clients': see `rounds` and `cohort`


def from_arrays(data: FederatedData) -> ClientSource:
    """The clients of a `FederatedData` whose flat arrays stay where they are, such as `numpy.load(file, mmap_mode="r")`.

    Raises:
        TypeError, ValueError: data that cannot be, see `check_data`; when used, ids out of range.

    >>> data = FederatedData(inputs=np.arange(6.0), labels=np.arange(6), start=np.array([0, 2]), count=np.array([2, 4]),
    ...                      max_count=4)
    >>> cohort = from_arrays(data).take(np.array([1, 0]))
    >>> cohort.labels.tolist(), cohort.start.tolist(), cohort.count.tolist()
    ([2, 3, 4, 5, 0, 1, 0, 0], [0, 4], [4, 2])
    """
    check_data("data", data)

    def take(ids: np.ndarray) -> FederatedData:
        ids = check_ids(ids, len(data.start))
        count = np.asarray(data.count)[ids].astype(np.int32)
        inside = np.arange(data.max_count) < count[:, None]
        rows = np.where(inside, np.asarray(data.start)[ids][:, None] + np.arange(data.max_count), 0)
        read = lambda x: _masked(np.asarray(x[rows.reshape(-1)]), inside)  # noqa: E731
        return _cohort(jax.tree.map(read, data.inputs), read(data.labels), count, data.max_count)

    return ClientSource(clients=len(data.start), take=take)


def from_records(
    records: Any, clients: Sequence[np.ndarray], example_fn: Callable[[Any], tuple[PyTree, Any]]
) -> ClientSource:
    """Clients whose examples are records of a file: a `tfds.data_source`, an `array_record` file, a `grain.MapDataset`.

    Args:
        records: anything with `len` and `records[i]`; read many at a time where it has `__getitems__`.
        clients: N integer arrays, which records each client has, as a partition returns them.
        example_fn: `record -> (inputs, label)`, of a fixed shape.

    Raises:
        TypeError: `example_fn` is no function, or `records` has no length.
        ValueError: no client has an example, or one has a record that is not there; when used, ids out of range.

    >>> source = from_records([{"x": [0.5], "y": 3}, {"x": [2.5], "y": 4}], [np.array([1]), np.array([0, 1])],
    ...                       lambda r: (np.array(r["x"], np.float32), np.int32(r["y"])))
    >>> source.take(np.array([0, 1])).labels.tolist()
    [4, 0, 3, 4]
    """
    check_fn("example_fn", example_fn, "record -> (inputs, label)")
    flat_index(clients, len(records))
    most = max(map(len, clients), default=0)
    if not most:
        raise ValueError(f"clients holds {len(clients)} clients without any example; allowed: at least one with one")

    def take(ids: np.ndarray) -> FederatedData:
        ids = check_ids(ids, len(clients))
        count = np.array([len(clients[i]) for i in ids], np.int32)
        numbers = [int(row) for i in ids for row in clients[i]]
        many = getattr(records, "__getitems__", None)
        read = many(numbers) if many is not None else [records[row] for row in numbers]
        examples = [example_fn(record) for record in read] or [example_fn(records[0])]
        inside = np.arange(most) < count[:, None]
        place = np.where(inside, np.cumsum(inside).reshape(inside.shape) - 1, 0).reshape(-1)
        stack = lambda *leaves: _masked(np.stack(leaves)[place], inside)  # noqa: E731
        inputs = jax.tree.map(stack, *(x for x, _ in examples))
        return _cohort(inputs, stack(*(y for _, y in examples)), count, most)

    return ClientSource(clients=len(clients), take=take)


def synthetic(
    clients: int,
    *,
    alpha: Number = 1.0,
    beta: Number = 1.0,
    features: int = 60,
    classes: int = 10,
    counts: tuple[int, int] = (20, 40),
    seed: int = 0,
    part: int = 0,
) -> ClientSource:
    """Any number of clients that differ in what they do and in what they see, each made from `fold_in(seed, id)`.

    After Synthetic(alpha, beta) of Li et al. (FedProx, MLSys 2020). Client k labels with a model of its own,
    `y = argmax(W_k x + b_k)`, W_k = W + sqrt(alpha) N(0, 1), b_k likewise, W and b the same for all, with entries of N(0, 1);
    and its inputs x are of N(v_k, diag(j^-1.2)), v_k = sqrt(beta) N(0, 1). So alpha says how much the clients' tasks differ,
    beta how much their inputs do, and (0, 0) is iid.

    Differences from the paper: there W_k has no part in common with others, and v_k has unit variance about a mean that
    differs between clients; the number of examples is log-normal without a bound, here log-uniform between two.

    Args:
        clients: N, below 2^31 - 2; costs nothing.
        alpha, beta: variances, 0 or more.
        features, classes: sizes.
        counts: `(least, most)` examples of a client.
        seed: of everything.
        part: 0, 1, ...: other examples of the same clients, to test on.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: no client or too many, a negative variance, counts that are no range from 1 up, a size below 1; when used,
            ids out of range.

    >>> source = synthetic(1_000_000, counts=(5, 9))
    >>> cohort = source.take(np.array([999_999, 3]))
    >>> cohort.inputs.shape, bool((cohort.count >= 5).all() and (cohort.count <= 9).all())
    ((18, 60), True)
    """
    check_int("clients", clients, 1, MOST - 1)
    check_number("alpha", alpha, "[0, inf)")
    check_number("beta", beta, "[0, inf)")
    for name, value, lowest in (
        ("features", features, 1),
        ("classes", classes, 1),
        ("seed", seed, 0),
        ("part", part, 0),
    ):
        check_int(name, value, lowest)
    if len(counts) != 2 or not 1 <= counts[0] <= counts[1]:
        raise ValueError(f"counts is {counts}; allowed: (least, most), 1 <= least <= most")
    for value in counts:
        check_int("counts", value)
    least, most = counts

    def one(client_id):
        shared, own = jax.random.split(client_key(jax.random.key(seed), 0, client_id))
        keys = jax.random.split(shared, 3)
        shape = (features + 1, classes)  # W and b
        common = jax.random.normal(client_key(jax.random.key(seed), 1, 0), shape)  # no client's
        weights = common + jnp.sqrt(alpha) * jax.random.normal(keys[0], shape)
        mean = jnp.sqrt(beta) * jax.random.normal(keys[1], (features,))
        count = jnp.exp(jax.random.uniform(keys[2], minval=jnp.log(least), maxval=jnp.log(most + 1)))
        noise = jax.random.normal(jax.random.fold_in(own, part), (most, features))
        x = mean[None] + noise * jnp.arange(1, features + 1)[None] ** -0.6  # standard deviations
        y = jnp.argmax(x @ weights[:-1] + weights[-1:], axis=-1).astype(jnp.int32)
        return x, y, jnp.clip(count.astype(jnp.int32), least, most)

    @jax.jit
    def make(ids):
        (x, y, count), _ = map_clients(lambda i: (one(i), ()), (ids,))
        return x.reshape(-1, features), y.reshape(-1), count

    def take(ids: np.ndarray) -> FederatedData:
        x, y, count = make(jnp.asarray(check_ids(ids, clients), jnp.int32))
        return _cohort(x, y, count, most)

    return ClientSource(clients=clients, take=take)


def _masked(rows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Rows `[k * most, ...]` with zeros where there is padding."""
    return np.where(inside.reshape(-1, *[1] * (rows.ndim - 1)), rows, np.zeros((), rows.dtype))


def _cohort(inputs: PyTree, labels: Any, count: Any, most: int) -> FederatedData:
    start = np.arange(len(count), dtype=np.int32) * most
    return FederatedData(inputs=inputs, labels=labels, start=start, count=count, max_count=most)
