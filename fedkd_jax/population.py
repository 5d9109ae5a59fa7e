"""Where the clients' states live: on the device, stacked; or in a store, in host memory or on disk, a row per client seen.

On the device every client has a state from the start. A store makes a client's state from `fold_in(key, id)` when it is first
asked for and keeps it once the client has taken part, so that space follows the clients that were sampled, not the
population. A run has the same bits with any of them.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.parallel import Layout, place, place_rows
from fedkd_jax.types import Algorithm, ClientState, FederatedData, Key, PyTree, ServerState, State

CHUNK_BYTES = 2**26  # of host memory, taken at a time
PAGE_BYTES = 4096
CALL_BYTES = 2**30  # a system call moves 2 GiB at most


# ---- on the device -----------------------------------------------------------------------------------------------------


def init_state(algorithm: Algorithm, population: int, key: Key) -> State:
    """The state before the first round: the server, and every client made from `fold_in(key, id)`.

    Over D devices the population is padded to a multiple of D; the surplus clients are never sampled.

    Raises:
        ValueError: `population` below 1.

    >>> import optax
    >>> from fedkd_jax import local_only, mlp
    >>> state = init_state(local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), 5, jax.random.key(0))
    >>> state.clients.teacher["dense_0"]["kernel"].shape
    (5, 4, 2)
    """
    if population < 1:
        raise ValueError(f"population is {population}; allowed: at least 1")
    layout = algorithm.layout or Layout()
    size = -(-population // layout.devices) * layout.devices
    clients = _init_clients(algorithm.init_clients, jax.random.split(key)[1], jnp.arange(size))
    return State(server=init_server(algorithm, key), clients=place(clients, layout, "clients"))


def init_server(algorithm: Algorithm, key: Key) -> ServerState:
    """The server of `init_state`, alone.

    >>> import optax
    >>> from fedkd_jax import local_only, mlp
    >>> algorithm = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2)
    >>> int(init_server(algorithm, jax.random.key(0)).round)
    0
    """
    return place(_init_server(algorithm.init_server, jax.random.split(key)[0]), algorithm.layout or Layout())


_init_server = jax.jit(lambda init, key: init(key), static_argnums=0)  # one compilation for all runs of an algorithm
_init_clients = jax.jit(lambda init, key, ids: init(key, ids), static_argnums=0)


def place_data(data: FederatedData, layout: Layout | None) -> FederatedData:
    """The examples on every device of the layout.

    >>> import numpy as np
    >>> data = FederatedData(inputs=np.zeros((2, 1)), labels=np.zeros(2, int), start=np.array([0]),
    ...                      count=np.array([2]), max_count=2)
    >>> type(place_data(data, None).labels).__name__
    'ArrayImpl'
    """
    return place(data, layout or Layout())


# ---- in a store --------------------------------------------------------------------------------------------------------


class Store:
    """Client states outside the device: `HostStore` and `DiskStore` are the ones to use, see there for an example.

    A client that has taken part has a slot, a row of `row_bytes` bytes which holds the leaves of its state one after another.
    A subclass reads and writes rows by slot. Of several processes each has a store, with the rows of its own range of ids.

    >>> len(HostStore())
    0
    """

    def __init__(self):
        self._slots: dict[int, int] = {}
        self._elsewhere: set[int] = set()  # clients whose rows other processes have
        self._shapes: tuple[list[jax.ShapeDtypeStruct], Any] | None = None
        self._key: np.ndarray | None = None
        self.round: int | None = 0  # rounds done by those who are kept; None while some are under way
        self.waited = 0.0  # seconds that rounds waited for states, in all

    def open(self, algorithm: Algorithm, key: Key, population: int | None = None) -> None:
        """Says whose states these are: `key` is that of `init_state`; how many clients there are matters to several processes
        only. `simulate` calls it.

        Raises:
            ValueError: the store was opened with states of other shapes, or with another key.
            TypeError: a state holds random keys.
        """
        shapes = jax.eval_shape(algorithm.init_clients, key, jax.ShapeDtypeStruct((1,), jnp.int32))
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes))
        if self._shapes not in (None, (leaves, tree)):
            raise ValueError("store is of another algorithm's states; allowed: shapes as it was opened with")
        if self._key is not None and not np.array_equal(self._key, jax.random.key_data(key)):
            raise ValueError("store is of another run's clients; allowed: the key it was opened with")
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
            raise TypeError("client states hold typed random keys; allowed: arrays of numbers")
        self._shapes, self._key, self._population = (leaves, tree), np.asarray(jax.random.key_data(key)), population
        self.layout = algorithm.layout or Layout()
        init_key = place(jax.random.split(key)[1], self.layout)
        self._init = functools.partial(_init_clients, algorithm.init_clients, init_key)
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
        *starts, end = np.cumsum([0, *(-(-size // 8) * 8 for size in sizes)]).tolist()
        self._spans = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        # large rows are whole pages: a file is rewritten in half the time
        self.row_bytes: int = -(-end // PAGE_BYTES) * PAGE_BYTES if end > 16 * PAGE_BYTES else end

    def __len__(self) -> int:
        """Number of clients that have a row."""
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """What the rows take."""
        return len(self) * self.row_bytes

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids [K]` have no row yet, here or in another process, `[K]` bool."""
        return np.array([i not in self._slots and i not in self._elsewhere for i in ids.tolist()], bool)

    def note(self, ids: np.ndarray) -> None:
        """That these clients have a row, in another process if not here."""
        self._elsewhere.update(i for i in ids.tolist() if i not in self._slots)

    def read(self, ids: np.ndarray, there: np.ndarray) -> ClientState:
        """The rows of `ids [K]` as states `[K]` in NumPy, where `there [K]`; the others are not to be used."""
        leaves, tree = self._opened()
        rows = np.empty((len(ids), self.row_bytes), np.uint8)
        slots = np.array([self._slots[i] for i in ids[there].tolist()], np.int64)
        self._read(rows, np.flatnonzero(there), slots)
        parts = [rows[:, a:b] for a, b in self._spans]
        shaped = [p.view(s.dtype).reshape(len(ids), *s.shape) for p, s in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, shaped)

    def write(self, ids: np.ndarray, clients: ClientState) -> None:
        """Keeps the states `[K]` of `ids [K]`."""
        leaves, _ = self._opened()
        rows = np.empty((len(ids), self.row_bytes), np.uint8)
        for leaf, shape, (a, b) in zip(jax.tree.leaves(clients), leaves, self._spans, strict=True):
            if shape.size:
                rows[:, a:b] = np.asarray(leaf, shape.dtype).reshape(len(ids), shape.size).view(np.uint8)
        new = dict(
            zip((i for i in ids.tolist() if i not in self._slots), itertools.count(len(self._slots)), strict=False)
        )
        self._write(rows, np.array([new[i] if i in new else self._slots[i] for i in ids.tolist()], np.int64))
        self._slots |= new  # only now: where the write failed there is no client with half a state

    def init(self, ids: np.ndarray) -> ClientState:
        """The states `[K]` that `ids [K]` begin with, on the device."""
        self._opened()
        return self._init(np.asarray(ids, np.int32))

    def take(self, ids: np.ndarray) -> ClientState:
        """The states `[K]` of `ids [K]`, on the device, whether they have taken part or not.

        Of several processes all ask for the same ids, in the places of each (`Layout.own`) its own.
        """
        self._opened()
        fresh, own = self.missing(ids), self.layout.own(len(ids))
        if fresh.all():
            return self.init(ids)
        clients = place_rows(self.read(ids[own], ~fresh[own]), self.layout)
        return select_clients(fresh, self.init(ids), clients) if fresh.any() else clients

    def groups(self, ids: np.ndarray, nbytes: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`(rows, ids[rows], valid)` of groups of one size, of states of at most so many bytes, for `take`; filled up where not
        valid."""
        self._opened()
        processes = jax.process_count() if self.layout.mesh is not None else 1
        size = min(len(ids), max(1, nbytes // max(self.row_bytes, 1)))
        share = 1 if processes == 1 else (self._population or 0) // processes  # ids of a process
        each = size if processes == 1 else -(-size // self.layout.devices) * self.layout.devices // processes
        own = [np.arange(len(ids)) if processes == 1 else np.flatnonzero(ids // share == p) for p in range(processes)]
        for first in range(0, max(map(len, own)), each):
            places = [(rows[first : first + each], p) for p, rows in enumerate(own)]
            rows, who, valid = np.zeros((3, processes, each), np.int64)
            for some, p in places:
                n = len(some)
                rows[p, :n], valid[p, :n] = some, 1
                rows[p, n:] = some[-1] if n else 0
                who[p] = ids[rows[p]] if n else p * share
            yield rows.reshape(-1), who.reshape(-1), valid.reshape(-1).astype(bool)

    def close(self) -> None:
        """Lets go of what it holds open."""

    def _opened(self):
        if self._shapes is None:
            raise ValueError("the store is not open; allowed: after open(algorithm, key), which simulate calls")
        return self._shapes

    def _read(self, rows: np.ndarray, into: np.ndarray, slots: np.ndarray) -> None:
        """`rows[into] = ` what the slots hold."""
        raise NotImplementedError

    def _write(self, rows: np.ndarray, slots: np.ndarray) -> None:
        raise NotImplementedError


class HostStore(Store):
    """Client states in host memory.

    >>> import optax
    >>> from fedkd_jax import local_only, mlp
    >>> algorithm, store = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), HostStore()
    >>> store.open(algorithm, jax.random.key(0))
    >>> store.write(np.array([7]), store.take(np.array([7])))
    >>> len(store), store.nbytes, store.take(np.array([3, 7])).teacher["dense_0"]["kernel"].shape
    (1, 40, (2, 4, 2))
    """

    def __init__(self):
        super().__init__()
        self._chunks: list[np.ndarray] = []

    def _of_chunk(self, slots: np.ndarray):
        """`(chunk, which of the slots are in it, where)`."""
        size = max(1, CHUNK_BYTES // max(self.row_bytes, 1))
        while len(slots) and len(self._chunks) * size <= slots.max():
            self._chunks.append(np.empty((size, self.row_bytes), np.uint8))
        for number in np.unique(slots // size):
            which = np.flatnonzero(slots // size == number)
            yield self._chunks[number], which, slots[which] - number * size

    def _read(self, rows, into, slots):
        for chunk, which, where in self._of_chunk(slots):
            rows[into[which]] = chunk[where]

    def _write(self, rows, slots):
        for chunk, which, where in self._of_chunk(slots):
            chunk[where] = rows[which]


class DiskStore(Store):
    """Client states in a file of a folder, which is made; the file grows with the clients that have taken part.

    Raises:
        FileExistsError: the folder already has such a file.

    >>> import optax, tempfile
    >>> from fedkd_jax import local_only, mlp
    >>> algorithm, folder = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), tempfile.mkdtemp()
    >>> store = DiskStore(folder)
    >>> store.open(algorithm, jax.random.key(0))
    >>> store.write(np.array([7, 3]), store.take(np.array([7, 3])))
    >>> (pathlib.Path(folder) / "clients.bin").stat().st_size
    80
    >>> store.close()
    """

    def __init__(self, folder: str | pathlib.Path):
        super().__init__()
        self.path = pathlib.Path(folder) / "clients.bin"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _runs(self, slots: np.ndarray):
        """`(first, last + 1)` of slots that lie one after another in the file: a system call each."""
        if not self.row_bytes:
            return
        most = max(1, CALL_BYTES // self.row_bytes)
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        for a, b in zip([0, *cuts], [*cuts, len(slots)], strict=True):
            yield from ((c, min(c + most, b)) for c in range(a, b, most))

    def _read(self, rows, into, slots):
        order = np.argsort(slots)
        into, slots = into[order], slots[order]
        for a, b in self._runs(slots):
            views, at = [rows[i] for i in into[a:b]], int(slots[a]) * self.row_bytes
            for c in range(0, len(views), 1024):  # as many as a call takes
                some = views[c : c + 1024]
                if os.preadv(self._file, some, at + c * self.row_bytes) != len(some) * self.row_bytes:
                    raise OSError(
                        f"{self.path} has {os.fstat(self._file).st_size} bytes; allowed: {self.nbytes}, as written"
                    )

    def _write(self, rows, slots):
        order = np.argsort(slots)
        if (np.diff(order) != 1).any():
            rows, slots = rows[order], slots[order]
        for a, b in self._runs(slots):
            left, at = memoryview(rows[a:b]).cast("B"), int(slots[a]) * self.row_bytes
            while len(left):
                done = os.pwrite(self._file, left, at)
                left, at = left[done:], at + done


@functools.partial(jax.jit, donate_argnames=("other",))
def select_clients(which: jax.Array, one: PyTree, other: PyTree) -> PyTree:
    """Of each client of a cohort its state in `one` where `which [K]`, else in `other`, which is consumed.

    >>> select_clients(jnp.array([True, False]), {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))})["w"].tolist()
    [[0.0], [1.0]]
    """
    pick = lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, one, other)
