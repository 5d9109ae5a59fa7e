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
      ValueError: an index is not an integer in 0..n-1, all clients are empty, or inputs and labels differ in length.

    >>> data = federate(np.array([[0.0], [1.0], [2.0]]), np.array([7, 8, 9]), [np.array([2, 0]), np.array([], int),
    ...                                                                        np.array([1])])
    >>> data.labels, data.start, data.count, data.max_count
    (array([9, 7, 8]), array([0, 2, 2], dtype=int32), array([2, 0, 1], dtype=int32), 2)
    """
    n = len(labels)
    lengths = sorted({len(leaf) for leaf in jax.tree.leaves(inputs)})
    if lengths != [n]:
        raise ValueError(f"inputs has {lengths} rows but labels has {n}; both must have one row per example")
    index = _flat_index(clients, n)
    count = np.array([len(ids) for ids in clients], np.int32)
    if not len(index):
        raise ValueError(f"clients holds {len(count)} clients without any example; at least one client must have one")
    start = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int32)
    return FederatedData(
        inputs=jax.tree.map(lambda leaf: np.asarray(leaf)[index], inputs),
        labels=np.asarray(labels)[index],
        start=start,
        count=count,
        max_count=int(count.max()),
    )


def _flat_index(clients: Sequence[np.ndarray], n: int) -> np.ndarray:
    """All indices in a row, int64 `[sum of counts]`, checked client by client so that the error can name one."""
    flat = [np.asarray(ids) for ids in clients]
    for i, ids in enumerate(flat):
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"clients[{i}] has shape {ids.shape}, dtype {ids.dtype}; it must be a flat int array")
        if ids.size and (ids.min() < 0 or ids.max() >= n):
            raise ValueError(f"clients[{i}] holds index {ids.min()}..{ids.max()}; allowed are 0..{n - 1}")
    return np.concatenate([np.zeros(0, np.int64), *flat]).astype(np.int64)


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

    >>> population_size(federate(np.zeros((5, 2)), np.zeros(5, int), [np.arange(3), np.arange(3, 5)]))
    2
    """
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
      ValueError: test_fraction is outside [0, 1).

    >>> train, test = train_test_split([np.arange(4), np.array([8])], 0.25, seed=0)
    >>> [len(ids) for ids in train], [len(ids) for ids in test]
    ([3, 1], [1, 0])
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; it must be in [0, 1)")
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
