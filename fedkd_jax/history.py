"""The history of a run on disk, as it grows: what `History` holds, for `checkpoint.py`."""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fedkd_jax.check import damaged
from fedkd_jax.codecs.base import named
from fedkd_jax.types import History, LossTerms, RoundInfo, Turn


class HistoryFiles:
    """A row of bytes for each round in rounds.bin, and evaluation-ROUND.npz for each evaluation; of several processes the first
    one's.

    A checkpoint says how many rows and which evaluations it needs. They are never changed: a round that is run again has the
    same.

    >>> import dataclasses, tempfile
    >>> files = HistoryFiles(pathlib.Path(tempfile.mkdtemp()))
    >>> some = lambda kind: {field.name: np.ones((2, 3)) for field in dataclasses.fields(kind)}  # rounds of 3 clients
    >>> ranks = {"dense_0/kernel": np.full((2, 3), 7)}
    >>> info = RoundInfo(**some(RoundInfo) | {"terms": LossTerms(**some(LossTerms)), "ranks": ranks, "turn": ()})
    >>> files.write(0, info)
    >>> files.write_evaluation({"round": 2, "model": {"accuracy": np.ones(3)}, "pooled": {"model": {"accuracy": 1.0}}})
    >>> history = files.read(2, files.fields(), [2])
    >>> history.rounds.ranks["dense_0/kernel"].shape, history.evaluations[0]["pooled"]
    ((2, 3), {'model': {'accuracy': 1.0}})
    >>> files.close()
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.path = folder, folder / "rounds.bin"
        self._dtype: np.dtype | None = None  # of a row
        self._writes = jax.process_index() == 0
        self._file: int | None = None
        self._unsynced: list[pathlib.Path] = []  # of evaluations

    def write(self, first: int, info: RoundInfo) -> None:
        """The rounds `[r]` that begin with round `first`; not safe from a loss of power before `sync`.

        Raises:
            ValueError: they are not like those before, as of a cohort of another size.
        """
        fields = named(info)
        dtype = np.dtype([(name, x.dtype, x.shape[1:]) for name, x in fields.items()])
        if self._dtype not in (None, dtype):
            raise ValueError(f"{self.path} has rounds of {self._dtype}; allowed: {dtype}, as this run's")
        self._dtype = dtype
        if not self._writes:
            return
        rows = np.empty(len(info.ids), dtype)
        for name, x in fields.items():
            rows[name] = x
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        left, at = rows.view(np.uint8).data.cast("B"), first * dtype.itemsize
        while len(left):
            done = os.pwrite(self._file, left, at)
            left, at = left[done:], at + done

    def write_evaluation(self, evaluation: dict) -> None:
        """An entry of `History.evaluations`; not safe from a loss of power before `sync`."""
        if not self._writes:
            return
        path = self._evaluation(evaluation["round"])
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **{json.dumps(keys): value for keys, value in _flat(evaluation)})
        path.with_suffix(".tmp").rename(path)
        self._unsynced.append(path)

    def sync(self) -> None:
        """Puts all on the disk that this process wrote or read."""
        if self._file is not None:
            os.fsync(self._file)
        while self._unsynced:
            with self._unsynced[-1].open("rb") as file:
                os.fsync(file.fileno())
            self._unsynced.pop()

    def fields(self) -> list | None:
        """What a row is, `[[field, dtype, shape]]`, None where there was none."""
        if self._dtype is None:
            return None
        return [[name, of.base.str, list(of.shape)] for name, (of, *_) in (self._dtype.fields or {}).items()]

    def read(self, rounds: int, fields: list | None, evaluations: Sequence[int]) -> History:
        """The first rounds, whose rows are what `fields` said, and the evaluations of these rounds.

        Raises:
            FileNotFoundError: a file is gone or too short.
            ValueError: there was no history.
        """
        if fields is None:
            raise ValueError(f"{self.folder} has a state without a history; allowed: what Checkpoints saved")
        self._dtype = np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in fields])
        rows = np.fromfile(self.path, self._dtype, rounds)
        if len(rows) != rounds:
            raise FileNotFoundError(f"{self.path} has {len(rows)} rounds; allowed: at least {rounds}")
        loaded = [self._read_evaluation(round) for round in evaluations]
        # the process that wrote them may have been killed before
        self._unsynced = [self._evaluation(round) for round in evaluations if self._writes]
        return History(rounds=_info(rows), evaluations=tuple(loaded))

    def close(self) -> None:
        """Lets go of what it holds open."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _evaluation(self, round: int) -> pathlib.Path:
        return self.folder / f"evaluation-{round}.npz"

    def _read_evaluation(self, round: int) -> dict:
        evaluation: dict = {}
        path = self._evaluation(round)
        with damaged(path), path.open("rb") as opened, np.load(opened) as file:
            for keys, value in file.items():
                *outer, last = json.loads(keys)
                inner = evaluation
                for key in outer:
                    inner = inner.setdefault(key, {})
                inner[last] = value if value.ndim else value.item()
        return evaluation


def _flat(tree: dict, *path: str) -> Iterator[tuple[list[str], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, *path, key)
        else:
            yield [*path, key], value


def _info(rows: np.ndarray) -> RoundInfo:
    fields: dict[str, dict[str, np.ndarray]] = {"": {}, "terms": {}, "ranks": {}, "turn": {}}
    for name in rows.dtype.names or ():
        of, _, field = name.rpartition("/") if not name.startswith("ranks/") else ("ranks", "", name[len("ranks/") :])
        fields[of][field] = np.ascontiguousarray(rows[name])
    turn = Turn(**fields["turn"]) if fields["turn"] else ()
    return RoundInfo(**fields[""], terms=LossTerms(**fields["terms"]), ranks=fields["ranks"], turn=turn)
