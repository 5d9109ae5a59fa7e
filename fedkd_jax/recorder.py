"""The journal's record of a round, written from within the compiled program: each device writes its own clients, all at once.

Rounds then stay in one program, as they are without a journal. That Python can read a device's arrays where they lie is true of
a CPU only; elsewhere `checkpoint.py` writes between programs of a round each.
"""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from fedkd_jax.history import HistoryFiles
from fedkd_jax.journal import Journal, as_bytes, plain
from fedkd_jax.parallel import Layout, each_device
from fedkd_jax.types import Leaf, RoundInfo, State

# programs name theirs by a number, so that the next run's is not another program
_recorders: dict[int, "Recorder"] = {}
_numbers = itertools.count()


class Recorder:
    """Of one run, until `close`.

    Args:
        journal: where a state goes.
        history: where what happened in a round goes, before the state does.
        saves: `round -> whether` the state after it is written.
        cohort: clients in a round.
        devices: how many call for each round.
        about: `round -> what describes the record`.

    >>> import dataclasses, pathlib, tempfile
    >>> journal, history = (kind(pathlib.Path(tempfile.mkdtemp())) for kind in (Journal, HistoryFiles))
    >>> options = dict(saves=lambda round: True, cohort=4, devices=2, about=lambda round: {"round": round})
    >>> recorder, none = Recorder(journal, history, **options), {"terms": (), "ranks": {}, "turn": ()}
    >>> info = RoundInfo(**{field.name: np.zeros(2) for field in dataclasses.fields(RoundInfo)} | none)
    >>> for device in (1, 0): recorder.part(device, 5, [np.ones(1)], [np.full(3, device)], info)
    >>> recorder.close()
    >>> about, arrays = journal.newest()
    >>> about["round"], [x.tolist() for x in read_parts(arrays, [(float, (1,))], [(int, (6,))], [], devices=2)]
    (5, [[1.0], [0, 0, 0, 1, 1, 1]])
    >>> journal.close(), history.close()
    (None, None)
    """

    def __init__(
        self,
        journal: Journal,
        history: HistoryFiles,
        *,
        saves: Callable[[int], bool],
        cohort: int,
        devices: int,
        about: Callable[[int], dict[str, Any]],
    ):
        self._journal, self._history, self._about = journal, history, about
        self._saves, self._cohort, self._devices = saves, cohort, devices
        self._turn = threading.Condition()
        self._error: Exception | None = None
        self._round = 0  # that is written, 0 for none
        self._writing = 0  # devices that are at it
        self._infos: dict[int, RoundInfo] = {}  # of the devices that are done with it
        self.number = next(_numbers)
        _recorders[self.number] = self

    def close(self) -> None:
        """Nothing is written any more, not by a program that is still running either."""
        _recorders.pop(self.number, None)
        with self._turn:
            self._error = self._error or ValueError("the recorder is closed")
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._writing == 0)

    def check(self) -> None:
        """Raises what a device could not raise, as the others would have waited for it for ever."""
        if self._error is not None:
            raise self._error

    def part(self, device: int, round: int, server: list, clients: list, info: RoundInfo) -> None:
        """What a device has after a round: all of the server, and its own clients, and of what happened what is about these,
        or all where a cohort does not split evenly."""
        with self._turn:
            # nothing else holds a device back where nothing is added up over clients
            self._turn.wait_for(lambda: self._round in (0, round) or self._error is not None)
            if self._error is not None:
                return
            self._writing += 1
        try:
            self._part(device, round, server, clients, info)
        except Exception as error:
            self._error = error
        finally:
            with self._turn:
                self._writing -= 1
                self._turn.notify_all()

    def _part(self, device: int, round: int, server: list, clients: list, info: RoundInfo) -> None:
        saves = self._saves(round)
        with self._turn:
            if self._round == 0 and saves:
                self._journal.begin()
            self._round = round
        shared, own = [as_bytes(x) for x in server], [as_bytes(x) for x in clients]
        start, size = (sum(part.size for part in parts) for parts in (shared, own))
        if saves:  # each device in one piece: for many, they would wait for each other at the file
            self._journal.put(*((0, shared + own) if device == 0 else (start + device * size, own)))
        info = jax.tree.map(np.array, info)
        with self._turn:
            self._infos[device] = info
            if len(self._infos) < self._devices:
                return
            infos = [self._infos[i] for i in range(self._devices if _splits(self._cohort, self._devices) else 1)]
            self._history.write(round - 1, jax.tree.map(lambda *x: np.concatenate(x)[None], *infos))
            if saves:
                self._journal.end(self._about(round), start + self._devices * size)
            self._round = 0
            self._infos.clear()


def _splits(cohort: int, devices: int) -> bool:
    return cohort % devices == 0


def read_parts(arrays: Callable[[list], list], server: list, clients: list, more: list, *, devices: int) -> list:
    """What `Journal.newest` gives of a record whose clients so many devices wrote: `[(dtype, shape)]` as arrays.

    >>> written = np.arange(6.0)  # a number of the server, two clients of each device, and one more
    >>> arrays = lambda shapes: np.split(written, np.cumsum([shape[0] for _, shape in shapes])[:-1])
    >>> [x.tolist() for x in read_parts(arrays, [(float, (1,))], [(float, (4,))], [(float, (1,))], devices=2)]
    [[0.0], [1.0, 2.0, 3.0, 4.0], [5.0]]
    """
    own = [(dtype, (size // devices, *shape)) for dtype, (size, *shape) in clients]
    read = arrays([*server, *own * devices, *more])
    start, end = len(server), len(server) + len(own) * devices
    joined = [np.concatenate(read[i : end : len(own)]) for i in range(start, start + len(own))]
    return [*read[:start], *joined, *read[end:]]


def record(number: Leaf, state: State, info: RoundInfo, layout: Layout) -> None:
    """Within a compiled program, after a round: every device calls the `Recorder` of this number.

    >>> import optax, tempfile
    >>> from fedkd_jax import Checkpoints, fedavg, mlp, simulate
    >>> from fedkd_jax.data import synthetic
    >>> algorithm, data = fedavg(mlp((60, 10)), optimizer=optax.sgd(0.1), batch=10), synthetic(6).take(np.arange(6))
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), rounds=1)
    >>> _ = simulate(algorithm, 6, data, jax.random.key(0), rounds=3, checkpoints=checkpoints)  # which calls this
    >>> Journal(checkpoints.folder).newest()[0]["round"]  # after the third there is a checkpoint
    2
    """
    leaves = lambda tree: [plain(x) for x in jax.tree.leaves(tree)]  # noqa: E731
    own: dict[str, Any] = {"clients": leaves(state.clients)}
    shared: dict[str, Any] = {"number": number, "round": state.server.round, "server": leaves(state.server)}
    (own if _splits(len(info.ids), layout.devices) else shared)["info"] = info
    call = buffer_callback(_called, (), has_side_effect=True)
    each_device(lambda device, own, shared: call({"device": device} | own | shared), own, shared, layout=layout)


def _called(_, __, buffers) -> None:
    args = jax.tree.map(np.asarray, buffers)
    recorder = _recorders.get(int(args["number"]))
    if recorder is not None:
        recorder.part(int(args["device"]), int(args["round"]), args["server"], args["clients"], args["info"])
