"""From one set of examples to ragged clients in flat storage, and from a population to a cohort.

Clients hold different numbers of examples. Padding each to the largest would cost N * max_count rows, so all examples
lie in one flat array, sorted by client, and a client is `start` and `count`. Only these two have a client axis, which
makes a cohort two small gathers: `take_clients`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.check import check_int, check_number, check_type
from fedkd_jax.types import Array, ClientSource, FederatedData, Number, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """One split of a data set, on the host, before it is dealt to clients.

    >>> examples = Examples(inputs=np.zeros((4, 2), np.float32), labels=np.array([0, 1, 1, 0], np.int32),
    ...                     classes=("no", "yes"), natural=np.array(["ann", "ann", "bob", "ann"]))
    >>> len(examples), len(examples.classes)
    (4, 2)
    """

    inputs: np.ndarray  # [n, ...] float32; images [n, H, W, C] in [0, 1]
    labels: np.ndarray  # [n] int32
    classes: tuple[str, ...]  # the names of the classes; labels index it
    natural: np.ndarray | None = None  # [n] who each example belongs to, where the data say so

    def __post_init__(self):
        labels, n = self.labels, len(self.labels)
        if len(self.inputs) != n or (self.natural is not None and len(self.natural) != n):
            of = (
                f"{len(self.inputs)} inputs"
                if self.natural is None
                else f"{len(self.inputs)} inputs and {len(self.natural)} natural"
            )
            raise ValueError(f"labels has {n} entries for {of}; allowed: one for each example")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels is {labels.dtype}{list(labels.shape)}; allowed: integers [n]")
        if n and not (labels.min() >= 0 and labels.max() < len(self.classes)):
            raise ValueError(
                f"labels are {labels.min()} to {labels.max()}; allowed: 0 to {len(self.classes) - 1}, as classes has"
            )

    def __len__(self) -> int:
        return len(self.labels)


def federate(inputs: Any, labels: Array, clients: Sequence[np.ndarray]) -> FederatedData:
    """Gather the examples of each client into flat storage.

    Args:
      inputs: an array `[n, ...]`, or a PyTree of them (token ids and their mask, say).
      labels: `[n, ...]` integers.
      clients: N arrays of int indices into the n examples, one per client, as a partition or a split returns them. A
        client may be empty; an index may occur more than once, it is then stored more than once.

    Returns:
      FederatedData in NumPy, in the order of `clients`: `start [N]` and `count [N]` int32, `max_count` at least 1. It
      is left on the host because only the caller knows the sharding: put it on the device once (`jax.device_put`)
      rather than hand NumPy to a compiled function in every round.

    Raises:
      ValueError: an index is not an integer in 0..n-1, all clients are empty, inputs and labels differ in length, or labels are
        no integers.

    >>> data = federate(np.array([[0.0], [1.0], [2.0]]), np.array([7, 8, 9]), [np.array([2, 0]), np.array([], int),
    ...                                                                        np.array([1])])
    >>> data.labels, data.start, data.count, data.max_count
    (array([9, 7, 8]), array([0, 2, 2], dtype=int32), array([2, 0, 1], dtype=int32), 2)
    """
    labels, n = np.asarray(labels), len(labels)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels is {labels.dtype}{list(labels.shape)}; allowed: integers [n, ...]")
    lengths = sorted({len(leaf) for leaf in jax.tree.leaves(inputs)})
    if lengths != [n]:
        raise ValueError(f"inputs has {lengths} rows but labels has {n}; allowed: one row of both for each example")
    index = flat_index(clients, n)
    count = np.array([len(ids) for ids in clients], np.int32)
    if not len(index):
        raise ValueError(f"clients holds {len(count)} clients without any example; allowed: at least one with one")
    start = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int32)
    return FederatedData(
        inputs=jax.tree.map(lambda leaf: np.asarray(leaf)[index], inputs),
        labels=labels[index],
        start=start,
        count=count,
        max_count=int(count.max()),
    )


def flat_index(clients: Sequence[np.ndarray], n: int) -> np.ndarray:
    """All indices in a row, int64 `[sum of counts]`, checked client by client so that the error can name one.

    Raises:
      ValueError: an index is not an integer in 0..n-1.

    >>> flat_index([np.array([3, 1]), np.array([], int)], 4)
    array([3, 1])
    """
    flat = [np.asarray(ids) for ids in clients]
    for i, ids in enumerate(flat):
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"clients[{i}] has shape {ids.shape}, dtype {ids.dtype}; allowed: a flat int array")
        if ids.size and (ids.min() < 0 or ids.max() >= n):
            raise ValueError(f"clients[{i}] holds index {ids.min()}..{ids.max()}; allowed: 0..{n - 1}")
    return np.concatenate([np.zeros(0, np.int64), *flat]).astype(np.int64)


def check_data(name: str, data: FederatedData | ClientSource) -> None:
    """Refuses data that cannot be: what `simulate` and `evaluate` do before anything compiles.

    An empty client is allowed, and so is one of a single class, or one whose inputs hold a NaN: the first makes no step, and
    what is not finite stays with its client, who has no weight in the round. How many classes there are is the model's
    business: a label beyond them makes its client's loss NaN, see `cross_entropy`.

    Raises:
      TypeError: no `FederatedData` and no `ClientSource`; a source without a number of clients or without a function.
      ValueError: arrays of different lengths, labels that are no integers, no clients, or `start`, `count` and `max_count` that
        do not lie within the arrays.

    >>> good = federate(np.zeros((5, 2)), np.zeros(5, int), [np.arange(3), np.arange(3, 5)])
    >>> check_data("data", good)
    >>> try: check_data("data", dataclasses.replace(good, count=np.array([3, 9]), max_count=9))
    ... except ValueError as error: print(error)
    data has clients in rows 0 to 11; allowed: 0 to 4, those of its arrays
    """
    check_type(name, data, (FederatedData, ClientSource))
    if isinstance(data, ClientSource):
        check_int(f"{name}.clients", data.clients)
        if not callable(data.take):
            raise TypeError(f"{name}.take is {data.take!r}; allowed: a function ids [k] -> FederatedData")
        return
    check_int(f"{name}.max_count", data.max_count)
    shapes = sorted({np.shape(leaf)[: 1 + data.stacked] for leaf in jax.tree.leaves((data.inputs, data.labels))})
    if len(shapes) != 1 or len(shapes[0]) != 1 + data.stacked or not all(shapes[0]):
        rows = "[K, max_count, ...]" if data.stacked else "[n, ...]"
        raise ValueError(f"{name} has arrays of leading axes {shapes}; allowed: {rows} of inputs and labels alike")
    clients = [np.shape(data.start), np.shape(data.count)]
    for field, value in (("labels", data.labels), ("start", data.start), ("count", data.count)):
        kind = getattr(value, "dtype", np.dtype(object))
        if kind.kind not in "iu" or (
            field != "labels" and (len(clients[0]) != 1 or clients[0] != clients[1] or clients[0] == (0,))
        ):
            wanted = (
                "integers [n, ...]"
                if field == "labels"
                else "integers [N] of at least 1 client, as many in start as in count"
            )
            raise ValueError(f"{name}.{field} is {kind}{list(np.shape(value))}; allowed: {wanted}")
    if not all(isinstance(x, np.ndarray) or x.is_fully_addressable for x in (data.start, data.count)):
        return  # of several processes, which have a part each
    start, count = np.asarray(data.start, np.int64), np.asarray(data.count, np.int64)
    if count.min() < 0 or count.max() > data.max_count:
        raise ValueError(f"{name}.count is {count.min()} to {count.max()}; allowed: 0 to max_count, {data.max_count}")
    first, last = start.min(), (start + count).max() - 1
    rows = data.max_count if data.stacked else len(data.labels)
    if first < 0 or last >= rows:
        raise ValueError(f"{name} has clients in rows {first} to {last}; allowed: 0 to {rows - 1}, those of its arrays")


def check_ids(ids: np.ndarray, clients: int) -> np.ndarray:
    """The ids `[k]` of some of so many clients, in NumPy.

    Raises:
      ValueError: no integers in 0..clients-1.

    >>> try: check_ids(np.array([0, 5]), 5)
    ... except ValueError as error: print(error)
    ids is [0 5]; allowed: integers [k] of 0 to 4
    """
    ids = np.asarray(ids)
    whole = ids.ndim == 1 and ids.dtype.kind in "iu"
    if not whole or ids.min(initial=0) < 0 or ids.max(initial=0) >= clients:
        raise ValueError(f"ids is {ids}; allowed: integers [k] of 0 to {clients - 1}")
    return ids


def take_clients(data: FederatedData, ids: Array) -> FederatedData:
    """The data of a cohort: `ids [K]` int gives `start` and `count` `[K]`, a scalar id gives one client's.

    The flat arrays are shared, so nothing is copied; works under `jit` and `vmap`, where an id out of range is clamped.

    >>> data = federate(np.zeros((5, 2)), np.zeros(5, int), [np.arange(3), np.arange(3, 5)])
    >>> take_clients(data, jnp.array([1, 1, 0])).count
    Array([2, 2, 3], dtype=int32)
    """
    own, shared = client_parts(data)
    return join_parts(jax.tree.map(lambda x: jnp.asarray(x)[ids], own), shared)


def client_parts(data: FederatedData) -> tuple[FederatedData, PyTree]:
    """`(own, shared)` of a cohort: what has a client axis, and the arrays all clients look into, None where data are stacked.

    >>> own, (inputs, labels) = client_parts(federate(np.zeros((5, 2)), np.zeros(5, int), [np.arange(3), np.arange(3, 5)]))
    >>> own.count.tolist(), own.inputs, inputs.shape
    ([3, 2], (), (5, 2))
    """
    return (
        (data, None) if data.stacked else (dataclasses.replace(data, inputs=(), labels=()), (data.inputs, data.labels))
    )


def join_parts(own: FederatedData, shared: PyTree) -> FederatedData:
    """The inverse of `client_parts`, of a cohort or of one of its clients.

    >>> data = federate(np.zeros((5, 2)), np.zeros(5, int), [np.arange(3), np.arange(3, 5)])
    >>> join_parts(*client_parts(data)).labels.shape
    (5,)
    """
    return own if shared is None else dataclasses.replace(own, inputs=shared[0], labels=shared[1])


def stack_clients(data: FederatedData) -> FederatedData:
    """The same clients with arrays of their own, `[K, max_count, ...]`, so that the client axis can be split over devices.

    Rows past a client's count hold anything.

    >>> data = federate(np.arange(5.0), np.arange(5), [np.arange(3), np.arange(3, 5)])
    >>> stack_clients(data).labels.tolist()
    [[0, 1, 2], [3, 4, 4]]
    """
    if data.stacked:
        return data
    start, most, n = np.asarray(data.start), data.max_count, len(data.labels)
    if n == len(start) * most and np.array_equal(start, np.arange(len(start)) * most):  # as cohorts of a source are
        split = lambda x: x.reshape(len(start), most, *x.shape[1:])  # noqa: E731
    else:
        rows = np.minimum(start[:, None] + np.arange(most), n - 1)
        split = lambda x: x[rows]  # noqa: E731
    return dataclasses.replace(
        data,
        inputs=jax.tree.map(split, data.inputs),
        labels=split(data.labels),
        start=np.zeros(start.shape, np.int32),
        stacked=True,
    )


def population_size(data: FederatedData | ClientSource) -> int:
    """The number of clients N.

    Raises:
      TypeError: neither data nor a source.

    >>> population_size(federate(np.zeros((5, 2)), np.zeros(5, int), [np.arange(3), np.arange(3, 5)]))
    2
    """
    check_type("data", data, (FederatedData, ClientSource))
    return data.clients if isinstance(data, ClientSource) else data.start.shape[0]


def train_test_split(
    clients: Sequence[np.ndarray], test_fraction: Number, seed: int, labels: np.ndarray | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split each client's examples into its own training and test part.

    A client's split depends on the seed, its position and its own examples, not on the other clients.

    Args:
      clients: N int index arrays.
      test_fraction: in [0, 1). Of m examples `round(m * test_fraction)` become test, but where the fraction is not zero
        a client with two or more keeps at least one on either side; a single example is always for training.
      seed: any non-negative int.
      labels: `[n]` int; if given, each client's test part has its classes in proportion, to within one example.

    Returns:
      (train, test): two lists of N sorted int64 index arrays.

    Raises:
      ValueError: test_fraction is outside [0, 1), a negative seed, or an index without a label.

    >>> train, test = train_test_split([np.arange(4), np.array([8])], 0.25, seed=0)
    >>> [len(ids) for ids in train], [len(ids) for ids in test]
    ([3, 1], [1, 0])
    """
    check_number("test_fraction", test_fraction, "[0, 1)")
    check_int("seed", seed, 0, 2**63 - 1)
    if labels is not None:
        flat_index(clients, len(labels))
    parts = [_split_one(np.asarray(ids), test_fraction, (seed, i), labels) for i, ids in enumerate(clients)]
    return [train for train, _ in parts], [test for _, test in parts]


def _split_one(ids, test_fraction, seed, labels):
    m = len(ids)
    tests = 0 if m < 2 or test_fraction == 0 else min(max(round(m * test_fraction), 1), m - 1)
    if tests == 0:
        return np.sort(ids).astype(np.int64), np.zeros(0, np.int64)
    rng = np.random.default_rng(seed)
    ids = rng.permutation(ids).astype(np.int64)
    if labels is not None:
        ids = ids[np.argsort(np.asarray(labels)[ids], kind="stable")]
    # Every m/tests-th example from a random offset: each is drawn with probability tests/m, and once the examples lie
    # in order of their label this is a stratified draw.
    drawn = (np.arange(tests) * m + rng.integers(m)) // tests
    return np.sort(np.delete(ids, drawn)), np.sort(ids[drawn])
