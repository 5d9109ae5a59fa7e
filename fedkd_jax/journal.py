"""The newest state of a run as raw bytes, written in milliseconds: what `checkpoint.py` has between two checkpoints.

Orbax takes a tenth of a second of a core for any checkpoint, which after each of many short rounds is more than the rounds. A
record is the bytes of arrays, one after another, in one of two files that are written in turns, so that one of them is whole at
whatever moment the process is killed. Nothing waits for the disk, so a record counts only until the machine is started anew.
"""

import collections
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.types import Array

MOST_PARTS = 1024  # of one call of the system
HEAD = 16  # bytes: the length of what describes the record, 0 while it is written, and its end


class Journal:
    """The two files of a folder.

    >>> import tempfile
    >>> journal = Journal(pathlib.Path(tempfile.mkdtemp()))
    >>> journal.newest() is None
    True
    >>> for round in (1, 2, 3): journal.write({"round": round}, [np.arange(4) + round, np.ones(2, np.float32)])
    >>> about, arrays = journal.newest()
    >>> about["round"], [x.tolist() for x in arrays([(np.int64, (4,)), (np.float32, (2,))])]
    (3, [[3, 4, 5, 6], [1.0, 1.0]])
    >>> journal.close()
    """

    def __init__(self, folder: pathlib.Path):
        self.paths = [folder / f"journal-{i}.bin" for i in range(2)]
        self._files: list[int] = []
        self._next = 0  # the file that is written next

    def write(self, about: dict[str, Any], arrays: Sequence[Array]) -> None:
        """A record with its `round`, and what else JSON holds; the one before stays whole.

        Raises:
            OSError: the disk is full.
        """
        pieces = [piece for array in arrays for piece in _pieces(array)]
        for piece in pieces:  # from an accelerator they come side by side
            if isinstance(piece, jax.Array):
                piece.copy_to_host_async()
        parts = [as_bytes(piece) for piece in pieces]
        self.begin()
        self.put(0, parts)
        self.end(about, sum(part.size for part in parts))

    def begin(self) -> None:
        """From here on the older of the two records is not whole; `put` and `end` write a new one."""
        if not self._files:
            self._files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in self.paths]
        self._put([np.zeros(HEAD, np.uint8)], 0)

    def put(self, at: int, parts: Sequence[np.ndarray]) -> None:
        """Bytes one after another, from byte `at` of the record on. Several threads may put theirs."""
        self._put(parts, HEAD + at)

    def end(self, about: dict[str, Any], size: int) -> None:
        """All `size` bytes of the arrays are there."""
        said = json.dumps(about | {"boot": _boot()}).encode()
        self._put([np.frombuffer(said, np.uint8)], HEAD + size)
        self._put([np.array([len(said), HEAD + size], np.int64).view(np.uint8)], 0)
        self._next = 1 - self._next

    def newest(self):
        """`(about, arrays)` of the newest record that is whole, None where there is none; the other file is written next.

        `arrays([(dtype, shape)])` reads them.
        """
        found = [(about, i) for i, path in enumerate(self.paths) if (about := _read_about(path)) is not None]
        if not found:
            return None
        about, i = max(found, key=lambda record: record[0]["round"])
        self._next = 1 - i
        return about, lambda shapes: _read_arrays(self.paths[i], shapes)

    def close(self) -> None:
        """Lets go of what it holds open."""
        while self._files:
            os.close(self._files.pop())

    def _put(self, parts: Sequence[np.ndarray], at: int) -> None:
        _write(self._files[self._next], self.paths[self._next], parts, at)


@functools.cache
def _boot() -> str:
    """Which time since the machine was started this is; "" where the system does not tell, and a journal never counts."""
    path = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def plain(leaf: jax.Array) -> jax.Array:
    """Numbers, also of random keys.

    >>> plain(jax.random.key(7)).tolist()
    [0, 7]
    """
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def as_bytes(array: Array) -> np.ndarray:
    """Its bytes, of an array of this process's memory without a copy.

    >>> as_bytes(np.ones((1, 2), np.int16)).tolist()
    [1, 0, 1, 0]
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _pieces(array: Array) -> list[Array]:
    """An array, or the pieces of one that is split over devices along its first axis."""
    if not isinstance(array, jax.Array):
        return [array]
    return [array.addressable_data(i) for i in _order(array.sharding, array.shape)]


@functools.lru_cache(maxsize=1024)
def _order(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[int]:
    """Which pieces of such an array are the whole, in their order along its first axis."""
    if sharding.is_fully_replicated:
        return [0]
    indices: Any = sharding.addressable_devices_indices_map(shape).values()
    starts = [index[0].start or 0 for index in indices]
    return [starts.index(start) for start in sorted(set(starts))]


def _write(file: int, path: pathlib.Path, parts: Sequence[np.ndarray], at: int) -> None:
    """Writes bytes one after another, from `at` on."""
    left = collections.deque(part.data for part in parts if part.size)
    while left:
        try:
            done = os.pwritev(file, list(itertools.islice(left, MOST_PARTS)), at)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        at += done
        while left and done >= len(left[0]):
            done -= len(left.popleft())
        if done:
            left[0] = left[0][done:]


def _read_about(path: pathlib.Path) -> dict[str, Any] | None:
    """What describes the record of a file, None where it is not whole or from before the machine was started."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        length, end = np.frombuffer(file.read(HEAD).ljust(HEAD, b"\0"), np.int64).tolist()
        if length <= 0 or end < HEAD or end + length > os.fstat(file.fileno()).st_size:
            return None
        file.seek(end)
        try:
            about = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return None
    known = isinstance(about, dict) and type(about.get("round")) is int
    return about if known and about.get("boot") == _boot() != "" else None


def _read_arrays(path: pathlib.Path, shapes: Sequence[tuple[Any, Sequence[int]]]) -> list[np.ndarray]:
    def read() -> Iterator[np.ndarray]:
        at = HEAD
        for dtype, shape in shapes:
            array = np.fromfile(path, dtype, int(np.prod(shape)), offset=at).reshape(shape)
            at += array.nbytes
            yield array

    return list(read())
