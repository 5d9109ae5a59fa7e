"""Client states outside the device: in host memory or on disk, a row of bytes for each client that has taken part.

A checkpoint is an index of rows: what it refers to is not written over, the client's next state goes elsewhere.
"""

import contextlib
import fcntl
import functools
import mmap
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.check import damaged
from fedkd_jax.parallel import Layout, place, place_rows
from fedkd_jax.population import halves, make_clients
from fedkd_jax.types import Algorithm, ClientState, Key, PyTree

CHUNK_BYTES = 2**26  # of host memory, taken at a time
PAGE_BYTES = 4096
CALL_BYTES = 2**30  # a system call moves 2 GiB at most
FILE = 2**40  # slots are numbered from here in a second file, from twice here in a third


class Store:
    """Client states outside the device: `HostStore` and `DiskStore` are the ones to use, see there for an example.

    A client that has taken part has a slot, a row of `row_bytes` bytes which holds the leaves of its state one after another.
    A subclass reads and writes rows by slot. Of several processes each has a store, with the rows of its own range of ids.

    >>> len(HostStore())
    0
    """

    def __init__(self):
        self._slots: dict[int, int] = {}
        self._used = 0  # slots there ever were in the own file
        self._free: list[int] = []  # those of them that nothing refers to
        self._kept: dict[int, set[int]] = {}  # {round of a checkpoint: those that it refers to}: not written over
        self._elsewhere: set[int] = set()  # clients whose rows other processes have
        self._shapes: tuple[list[jax.ShapeDtypeStruct], Any] | None = None
        self._key: Any = None
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
        init_key = place(halves(key)[1], self.layout)
        self._init = functools.partial(make_clients, algorithm.init_clients, init_key)
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
        slots = {i: self._slot(i) for i in ids.tolist()}
        self._write(rows, np.array(list(slots.values()), np.int64))
        self._slots |= slots  # only now: where the write failed nobody has a row who had none

    def _slot(self, client_id: int) -> int:
        """Where a client's new state goes: into its own slot, or a fresh one where a checkpoint needs the old state."""
        slot = self._slots.get(client_id)
        if slot is not None and slot < FILE and not any(slot in kept for kept in self._kept.values()):
            return slot
        if self._free:
            return self._free.pop()
        self._used += 1
        return self._used - 1

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

    def save(self, folder: pathlib.Path, round: int) -> None:
        """Puts what is needed to go on from this round on the disk of `folder`; what older ones need is still there.

        The rows of clients, and index-ROUND.npz, what `index` says.
        """
        index = self.index(folder, round, sync=True)
        path = folder / f"index-{round}{_part()}.npz"
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **index)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".tmp").rename(path)
        names = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)

    def index(self, folder: pathlib.Path, round: int, *, sync: bool) -> dict[str, Any]:
        """Which file of `folder` and slot each client's row is in after this round; from now on they stay as they are.

        With `sync` they survive a loss of power.
        """
        self._opened()
        ids = np.array(sorted(self._slots), np.int64)
        slots = np.array([self._slots[i] for i in ids.tolist()], np.int64)
        files, slots = self._files(folder, round, slots, sync)
        return dict(ids=ids, slots=slots, files=np.array(files), key=self._key, row_bytes=np.array(self.row_bytes))

    def forget(self, folder: pathlib.Path, rounds: Sequence[int]) -> None:
        """Only checkpoints of these rounds are needed any more."""
        for path in folder.glob(f"*{_part()}.*"):
            found = re.fullmatch(rf"(?:index|rows)-(\d+){_part()}\.(?:npz|bin|tmp)", path.name)
            if found and int(found[1]) not in rounds:
                path.unlink()

    def load(
        self,
        folder: pathlib.Path,
        rounds: Sequence[int],
        processes: int,
        index: Mapping[str, Any] | None = None,
    ) -> None:
        """Goes on from what `save` left in the last of these rounds, by as many processes as there were then; by how many it is
        now does not matter. What it left in the others is kept. With `index`, from what that said of the last round.

        Raises:
            FileNotFoundError: a file of it is gone.
            ValueError: it is damaged, or of another run, or this store is not an open and new one.
        """
        self._opened()
        if self._slots or self._elsewhere or self.round != 0:
            raise ValueError(f"store holds {len(self)} clients; allowed: a new one")
        share = (self._population or 0) // jax.process_count()
        for p in range(processes):
            path = folder / f"index-{rounds[-1]}{_part(p, processes)}.npz"
            said = _read_index(path) if index is None else index
            _check_index(path, said)
            if not np.array_equal(said["key"], self._key) or said["row_bytes"] != self.row_bytes:
                raise ValueError(f"{path} is of another run's clients; allowed: the same algorithm and key")
            ids, slots, files = (said[name] for name in ("ids", "slots", "files"))
            mine = np.full(len(ids), True) if jax.process_count() == 1 else ids // share == jax.process_index()
            self._elsewhere.update(ids[~mine].tolist())
            self._adopt(folder, files.tolist(), ids, slots, mine)
        self._keep(folder, rounds)
        self.round = rounds[-1]

    def close(self) -> None:
        """Lets go of what it holds open."""

    def _files(self, folder: pathlib.Path, round: int, slots: np.ndarray, sync: bool) -> tuple[list[str], np.ndarray]:
        """The rows in these slots, on the disk: names of files, and slots in these."""
        raise NotImplementedError

    def _adopt(
        self, folder: pathlib.Path, files: list[str], ids: np.ndarray, slots: np.ndarray, mine: np.ndarray
    ) -> None:
        """Takes the rows of `ids[mine]` over."""
        opened = [(folder / name, os.open(folder / name, os.O_RDONLY)) for name in files]
        with contextlib.closing(_Files(opened, self.row_bytes)) as old:
            size = max(1, CHUNK_BYTES // max(self.row_bytes, 1))
            rows = np.flatnonzero(mine)
            for some in np.split(rows, range(size, len(rows), size)):
                states = np.empty((len(some), self.row_bytes), np.uint8)
                old.read(states, np.arange(len(some)), slots[some])
                new = {i: self._slot(i) for i in ids[some].tolist()}
                self._write(states, np.array(list(new.values()), np.int64))
                self._slots |= new

    def _keep(self, folder: pathlib.Path, rounds: Sequence[int]) -> None:
        """That checkpoints of these rounds are there."""

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
        self._chunks: list[np.ndarray] | None = []

    def close(self) -> None:
        self._chunks = None

    def _of_chunk(self, slots: np.ndarray):
        """`(chunk, which of the slots are in it, where)`."""
        if self._chunks is None:
            raise ValueError("the store is closed; allowed: a new one, or one that load_state fills")
        size = max(1, CHUNK_BYTES // max(self.row_bytes, 1))
        while len(slots) and len(self._chunks) * size <= slots.max():
            # memory that the system gets back, whatever malloc keeps
            own = mmap.mmap(-1, max(1, size * self.row_bytes))
            self._chunks.append(np.frombuffer(own, np.uint8, size * self.row_bytes).reshape(size, self.row_bytes))
        for number in np.unique(slots // size):
            which = np.flatnonzero(slots // size == number)
            yield self._chunks[number], which, slots[which] - number * size

    def _read(self, rows, into, slots):
        for chunk, which, where in self._of_chunk(slots):
            rows[into[which]] = chunk[where]

    def _write(self, rows, slots):
        for chunk, which, where in self._of_chunk(slots):
            chunk[where] = rows[which]

    def _files(self, folder, round, slots, sync):
        path = folder / f"rows-{round}{_part()}.tmp"
        size = max(1, CHUNK_BYTES // max(self.row_bytes, 1))
        with open(path, "wb") as file:
            for some in np.split(slots, range(size, len(slots), size)):
                rows = np.empty((len(some), self.row_bytes), np.uint8)
                self._read(rows, np.arange(len(some)), some)
                file.write(rows.data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        path = path.rename(path.with_suffix(".bin"))
        return [path.name], np.arange(len(slots))


class DiskStore(Store):
    """Client states in a file of a folder, which is made; the file grows with the clients that have taken part.

    Of several processes each has a file of its own in the folder, which all of them must see.

    Args:
        folder: where.
        resume: the folder may have such files: for `load_state`, and for `simulate` with `Checkpoints`.

    Raises:
        FileExistsError: the folder already has such a file, without `resume`.
        BlockingIOError: another store has the file open.

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

    def __init__(self, folder: str | pathlib.Path, *, resume: bool = False):
        super().__init__()
        self.path = pathlib.Path(folder) / f"clients{_part()}.bin"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL), 0o644)
        try:
            _lock(file, self.path)
        except BlockingIOError:
            os.close(file)
            raise
        needed = [*self.path.parent.glob("index-*.npz"), *self.path.parent.glob("journal-*.bin")]
        if resume and not needed:  # no checkpoint: what is there is of no use
            os.ftruncate(file, 0)
        self._disk = _Files([(self.path, file)])

    def open(self, algorithm: Algorithm, key: Key, population: int | None = None) -> None:
        super().open(algorithm, key, population)
        self._disk.row_bytes = self.row_bytes
        if self.row_bytes:  # what is in the file already is never written over
            self._used = max(self._used, -(-os.fstat(self._disk.own()).st_size // self.row_bytes))

    def close(self) -> None:
        self._disk.close()

    def _read(self, rows, into, slots):
        self._disk.read(rows, into, slots)

    def _write(self, rows, slots):
        self._disk.write(rows, slots)

    def _files(self, folder, round, slots, sync):
        if folder.resolve() != self.path.parent.resolve():
            raise ValueError(f"folder is {folder}; allowed: {self.path.parent}, where the store is")
        if sync:
            os.fsync(self._disk.own())
        self._kept[round] = set(slots[slots < FILE].tolist())
        return [path.name for path, _ in self._disk.files], slots

    def forget(self, folder, rounds):
        super().forget(folder, rounds)
        before = set().union(*self._kept.values())
        self._kept = {round: kept for round, kept in self._kept.items() if round in rounds}
        self._free += before.difference(self._slots.values(), *self._kept.values())

    def _adopt(self, folder, files, ids, slots, mine):
        if folder.resolve() != self.path.parent.resolve():
            raise ValueError(f"store is in {self.path.parent}; allowed: {folder}, where the checkpoint is")
        if any(not name.startswith("clients") for name in files):  # of a HostStore, and deleted with its checkpoint
            return super()._adopt(folder, files, ids, slots, mine)
        numbers = np.array([self._disk.number(folder / name) for name in files])
        for i, number in enumerate(numbers):
            path, file = self._disk.files[number]
            needed = int((slots[slots // FILE == i] % FILE).max(initial=-1) + 1) * self.row_bytes
            if os.fstat(file).st_size < needed:
                raise FileNotFoundError(f"{path} has {os.fstat(file).st_size} bytes; allowed: at least {needed}")
        slots = numbers[slots // FILE] * FILE + slots % FILE
        self._slots |= dict(zip(ids[mine].tolist(), slots[mine].tolist(), strict=True))

    def _keep(self, folder, rounds):
        for path in folder.glob("index-*.npz"):
            found = re.match(r"index-(\d+)", path.name)
            if found and int(found[1]) in rounds:
                said = _read_index(path)
                slots, files = said["slots"], said["files"].tolist()
                own = slots[np.array(files)[slots // FILE] == self.path.name] % FILE if files else slots
                self._kept.setdefault(int(found[1]), set()).update(own.tolist())
        self._kept[rounds[-1]] = {slot for slot in self._slots.values() if slot < FILE}
        needed = set().union(*self._kept.values(), self._slots.values())
        self._free = sorted(set(range(self._used)) - needed, reverse=True)


class _Files:
    """Rows in files; slots of the first are numbered from 0, of the second from `FILE`, and so on. The first is written."""

    def __init__(self, files: list[tuple[pathlib.Path, int]], row_bytes: int = 0):
        self.files, self.row_bytes = files, row_bytes

    def number(self, path: pathlib.Path) -> int:
        """Which of the files this is; it is opened, to read, if it is none of them yet."""
        for number, (known, _) in enumerate(self.files):
            if known.name == path.name:
                return number
        self.files.append((path, os.open(path, os.O_RDONLY)))
        return len(self.files) - 1

    def own(self) -> int:
        """The first file, which is written."""
        if not self.files:
            raise ValueError("the store is closed; allowed: a new one, or one that load_state fills")
        return self.files[0][1]

    def close(self) -> None:
        while self.files:
            os.close(self.files.pop()[1])

    def _runs(self, slots: np.ndarray):
        """`(first, last + 1)` of slots that lie one after another in a file: a system call each."""
        if not self.row_bytes:
            return
        most = max(1, CALL_BYTES // self.row_bytes)
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        for a, b in zip([0, *cuts], [*cuts, len(slots)], strict=True):
            yield from ((c, min(c + most, b)) for c in range(a, b, most))

    def read(self, rows: np.ndarray, into: np.ndarray, slots: np.ndarray) -> None:
        self.own()
        order = np.argsort(slots)
        into, slots = into[order], slots[order]
        for a, b in self._runs(slots):
            if a == b:
                continue
            views, (path, file) = [rows[i] for i in into[a:b]], self.files[int(slots[a]) // FILE]
            at = int(slots[a]) % FILE * self.row_bytes
            for c in range(0, len(views), 1024):  # as many as a call takes
                some, here = views[c : c + 1024], at + c * self.row_bytes
                if os.preadv(file, some, here) != len(some) * self.row_bytes:
                    end = here + len(some) * self.row_bytes
                    raise OSError(f"{path} has {os.fstat(file).st_size} bytes; allowed: at least {end}, as written")

    def write(self, rows: np.ndarray, slots: np.ndarray) -> None:
        order = np.argsort(slots)
        if (np.diff(order) != 1).any():
            rows, slots = rows[order], slots[order]
        for a, b in self._runs(slots):
            left, at = rows[a:b].data.cast("B"), int(slots[a]) * self.row_bytes if a < b else 0
            while len(left):
                try:
                    done = os.pwrite(self.own(), left, at)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.files[0][0])) from None
                left, at = left[done:], at + done


def _read_index(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    """What `Store.index` gave and `Store.save` wrote."""
    # np.load of a path would leave it open where it is no archive
    with damaged(path), path.open("rb") as file, np.load(file) as index:
        if any(member.compress_type for member in index.zip.infolist()):
            raise ValueError("it is compressed")  # and might unpack to anything
        said = {name: index[name] for name in ("key", "row_bytes", "ids", "slots", "files")}
    _check_index(path, said)
    return said


def _check_index(path: pathlib.Path, said: Mapping[str, np.ndarray]) -> None:
    ids, slots, files, row_bytes = (said[name] for name in ("ids", "slots", "files", "row_bytes"))
    whole = all(isinstance(x, np.ndarray) for x in said.values())  # of what is no array, NumPy gives the bytes
    flat = (
        whole
        and all(x.ndim == 1 and x.dtype == np.int64 for x in (ids, slots))
        and files.ndim == 1
        and files.dtype.kind == "U"
    )
    if (
        not flat
        or ids.shape != slots.shape
        or len(np.unique(ids)) != len(ids)
        or min(ids.min(initial=0), slots.min(initial=0)) < 0
        or slots.max(initial=-1) // FILE >= len(files)
        or any(pathlib.PurePath(name).name != name for name in files.tolist())
        or row_bytes.shape != ()
    ):
        raise ValueError(f"{path} is damaged; allowed: a row for each id, and files of its folder, as it was saved")


def lock(path: pathlib.Path) -> IO[bytes]:
    """A file that nobody else can lock until it is closed, or its process ends, however it ends.

    Raises:
        BlockingIOError: somebody else has.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "lock"
    >>> with lock(path):
    ...     try: lock(path)
    ...     except BlockingIOError as error: print(str(error).rsplit("; ")[-1])
    allowed: one at a time
    >>> lock(path).close()
    """
    file = path.open("wb")
    try:
        _lock(file.fileno(), path)
    except BlockingIOError:
        file.close()
        raise
    return file


def _lock(file: int, path: pathlib.Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"{path} is of a run that goes on, or a store that is open; allowed: one at a time"
        ) from None
    except OSError:  # of a file system that has no locks
        pass


def _part(process: int | None = None, processes: int | None = None) -> str:
    """What names of files end in, of several processes."""
    processes = jax.process_count() if processes is None else processes
    process = jax.process_index() if process is None else process
    return "" if processes == 1 else f"-{process}-of-{processes}"


@functools.partial(jax.jit, donate_argnames=("other",))
def select_clients(which: jax.Array, one: PyTree, other: PyTree) -> PyTree:
    """Of each client of a cohort its state in `one` where `which [K]`, else in `other`, which is consumed.

    >>> select_clients(jnp.array([True, False]), {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))})["w"].tolist()
    [[0.0], [1.0]]
    """
    pick = lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, one, other)
