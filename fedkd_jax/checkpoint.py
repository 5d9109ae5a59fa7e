"""A run on disk, to go on from: the server by Orbax, the clients with it or, where they are in a store, in the store's files.

A checkpoint is there when Orbax has renamed its folder; until then the one before is, and nothing that it needs is written
over: not rows of clients (see `stores.py`), not the history, which only grows. Between two of them the newest state may be in
the journal.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fedkd_jax.check import check_int, check_number, damaged
from fedkd_jax.history import HistoryFiles
from fedkd_jax.journal import Journal, plain
from fedkd_jax.parallel import Layout
from fedkd_jax.population import halves, state_shapes
from fedkd_jax.recorder import Recorder, read_parts
from fedkd_jax.stores import HostStore, Store, lock
from fedkd_jax.types import Algorithm, ClientState, History, Key, Number, PyTree, RoundInfo, State

LEAST_SHARE = 20  # a checkpoint by time is due when rounds have taken so many times as long as the last one did


class Stopped(Exception):
    """A run that was asked to stop has saved what it had.

    >>> Stopped(7).round
    7
    """

    def __init__(self, round: int):
        super().__init__(f"stopped after round {round}, which is saved")
        self.round = round


class Checkpoints:
    """What `simulate(checkpoints=...)` saves, and goes on from where there is something: the same call again, after a run was
    stopped or killed, gives the bits of one that never was.

    What is saved is the server, the clients wherever they live, codecs' states, the run's key, and the history; what is there
    stays whole until the next is, at whatever moment the process ends. Of several processes all have one, with a folder that
    all of them see.

    Args:
        folder: where; a `DiskStore` must be `DiskStore(folder, resume=True)` of the same folder.
        rounds: the state goes into the journal after every so many rounds, counted from the run's first: in milliseconds, but
            the longer the more clients there are whose states, or in a `DiskStore` whose places, are to be written. It survives
            the process, not the machine (see `Journal`). Of several processes it is a checkpoint. None for never. On a CPU the
            devices write their states from within the compiled rounds; JAX's compilation cache does not keep such programs.
        minutes: a checkpoint by Orbax, while the next rounds run, after so many minutes, or 20 times what the last one took, if
            that is longer; None for none by time. There is always one after the last round.
        keep: so many of the newest checkpoints stay.

    Raises:
        ValueError: `rounds`, `minutes` or `keep` out of range.
        BlockingIOError: in a run, another one is going on in the folder.

    >>> import optax, tempfile
    >>> from fedkd_jax import fedavg, mlp, simulate
    >>> from fedkd_jax.data import synthetic
    >>> algorithm, data = fedavg(mlp((60, 10)), optimizer=optax.sgd(0.1), batch=10), synthetic(6).take(np.arange(6))
    >>> folder, key = tempfile.mkdtemp(), jax.random.key(0)
    >>> run = lambda rounds: simulate(algorithm, 6, data, key, rounds=rounds, checkpoints=Checkpoints(folder, rounds=1))
    >>> _ = run(rounds=2)
    >>> state, history = run(rounds=3)  # one more
    >>> int(state.server.round), history.rounds.ids.shape
    (3, (3, 6))
    """

    def __init__(
        self, folder: str | pathlib.Path, *, rounds: int | None = None, minutes: Number | None = 5, keep: int = 1
    ):
        if rounds is not None:
            check_int("rounds", rounds)
        if minutes is not None:
            check_number("minutes", minutes, "[0, inf)")
        check_int("keep", keep)
        self.folder, self.rounds, self.minutes, self.keep = pathlib.Path(folder), rounds, minutes, keep
        self._stop = False

    def latest(self) -> int | None:
        """The newest round that is saved, None where there is none.

        >>> Checkpoints("nowhere").latest() is None
        True
        """
        return _latest(self.folder)

    def stop(self) -> None:
        """Asks the run to end after the rounds that are under way, which it then saves; `simulate` raises `Stopped`. For a
        signal handler, or another thread."""
        self._stop = True

    def open(
        self, algorithm: Algorithm, population: int, key: Key, store: Store | None, *, rounds: int, cohort: int
    ) -> tuple[State, History] | None:
        """The newest state that is saved, if there is one. This and the following are what `simulate` calls."""
        self._store, self._key, self._population, self._files = store, key, population, HistoryFiles(self.folder)
        self._journal, self._saving, self._noted, self._whole = Journal(self.folder), None, None, False
        self._begun, self._took = time.monotonic(), 0.0
        self._evaluated: list[int] = []  # after which rounds, of evaluations that are written
        self._same: dict[str, Any] = {}
        self._recorder: Recorder | None = None
        self._by_save: Callable[[int], bool] = lambda round: True
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder / f"lock-{jax.process_index()}")
        self._manager = _manager(self.folder, self.keep, wait=False)
        try:
            if _latest(self.folder) is None:
                return None
            state, meta = _load(self._manager, self.folder, algorithm, population, key, store, self._journal)
            done = int(state.server.round)
            history = self._files.read(done, meta["rounds"], meta["evaluations"])
            if done > rounds:
                raise ValueError(f"rounds is {rounds}; allowed: at least {done}, as are done in {self.folder}")
            if (before := history.rounds.ids.shape[1]) != cohort:
                raise ValueError(f"cohort is {cohort}; allowed: {before}, as in {self.folder}")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self._evaluated = [evaluation["round"] for evaluation in history.evaluations]
        self._noted = done  # in the journal, or else a checkpoint
        return state, history

    def recorder(self, state: State, layout: Layout, cohort: int, last: int, eval_every: int | None) -> int | None:
        """The number of the `Recorder` that rounds on the device call from this state on; None where `save` does its work.

        Where a round is evaluated it always does, so that no state is there without its evaluation.
        """
        if self.rounds is None or jax.default_backend() != "cpu" or jax.process_count() > 1:
            return None
        every, devices = self.rounds, layout.devices
        self._by_save = lambda round: round == last or (eval_every is not None and round % eval_every == 0)
        saves = lambda round: round % every == 0 and not self._by_save(round)  # noqa: E731
        self._describe(state)
        about = lambda round: self._meta(round) | {"index": [], "devices": devices}  # noqa: E731
        self._recorder = Recorder(self._journal, self._files, saves=saves, cohort=cohort, devices=devices, about=about)
        return self._recorder.number

    def bound(self, done: int, last: int) -> int:
        """The round that is to be the last of those that run in one program after `done` rounds."""
        if self.rounds is None or self._recorder is not None:
            return last
        return min(last, (done // self.rounds + 1) * self.rounds)

    def note(self, first: int, info: RoundInfo) -> None:
        """What happened in the rounds `[r]` that begin with round `first`."""
        if self._recorder is not None:
            self._recorder.check()
        self._files.write(first, info)

    def note_evaluation(self, evaluation: dict) -> None:
        """What an evaluation gave, which is after the rounds that were noted."""
        self._files.write_evaluation(evaluation)
        self._evaluated.append(evaluation["round"])

    def due(self, round: int, last: int) -> bool:
        """Whether to save after this round."""
        least = math.inf if self.minutes is None else max(60 * self.minutes, LEAST_SHARE * self._took)
        self._stop, by_time = _any_process(self._stop, bool(time.monotonic() - self._begun >= least))
        by_rounds = self.rounds is not None and round % self.rounds == 0 and self._by_save(round)
        self._whole = self._stop or by_time or round == last or (by_rounds and jax.process_count() > 1)
        return self._whole or by_rounds

    def save(self, state: State, last: int) -> None:
        """Saves what is there, as `due` said; raises `Stopped`, if it was to stop. The state may be consumed afterwards."""
        round, start = int(state.server.round), time.monotonic()
        self._describe(state)
        meta = self._meta(round)
        if not self._whole:
            return self._note_down(state, meta)
        self._settle()
        self._files.sync()
        with _told():
            _save(self._manager, self.folder, state, self._store, meta)
        self._saving = round
        if self._stop or round == last:
            self._settle()
        self._begun, self._took = time.monotonic(), time.monotonic() - start
        if self._stop and round < last:
            self._stop = False
            raise Stopped(round)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Lets go of what it holds open; an error of the disk says what is left."""
        try:
            if self._recorder is not None:
                self._recorder.close()
            self._files.close()
            self._journal.close()
            with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):  # which says it already
                self._manager.close()
        finally:
            self._lock.close()
            if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
                round = self.latest()
                there = "nothing" if round is None else f"round {round}, which is whole"
                raise OSError(f"{error}; saved in {self.folder} is {there}") from error

    def _settle(self) -> None:
        """The last checkpoint is there, and those before it are forgotten."""
        with _told():
            self._manager.wait_until_finished()
        self._forget_others()

    def _describe(self, state: State) -> None:
        if not self._same:  # the same after every round
            self._same = _about(state, self._store, self._key) | {"population": self._population}

    def _meta(self, round: int) -> dict:
        return self._same | {"round": round, "rounds": self._files.fields(), "evaluations": [*self._evaluated]}

    def _note_down(self, state: State, meta: dict) -> None:
        round, carried, index = meta["round"], state, {}
        if self._store is not None:
            carried, index = state.server, self._store.index(self.folder, round, sync=False)
        meta["index"] = [[name, x.dtype.str, list(x.shape)] for name, x in index.items()]
        self._journal.write(meta, [*map(plain, jax.tree.leaves(carried)), *index.values()])
        self._noted = round
        self._forget_others()

    def _forget_others(self) -> None:
        """Of clients in a store, what is kept is what checkpoints need, the one that is being written, and the journal."""
        if self._store is None:
            return
        # those on the disk: Orbax does not name the one before any more as soon as the next is begun
        steps = _steps(self.folder)
        if self._noted is not None and max(steps, default=-1) >= self._noted:
            self._noted = None
        rounds = {*steps, *(r for r in (self._saving, self._noted) if r is not None)}
        if rounds:
            self._store.forget(self.folder, sorted(rounds))


def save_state(folder: str | pathlib.Path, state: State) -> None:
    """Writes a state, of which `load_state` makes the same; the one that was there before is deleted then.

    Of several processes all call it, with a folder that all of them see. Clients on disk must be in this folder: nothing is
    copied then, but what the next rounds write takes new space, once.

    Raises:
        ValueError: a store that has gone on since, or is in another folder; a checkpoint of this round or a later.

    >>> import optax, tempfile
    >>> from fedkd_jax import init_state, local_only, mlp
    >>> algorithm, folder = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), tempfile.mkdtemp()
    >>> save_state(folder, init_state(algorithm, 5, jax.random.key(0)))
    >>> load_state(folder, algorithm, 5, jax.random.key(0)).clients.teacher["dense_0"]["kernel"].shape
    (5, 4, 2)
    """
    folder, round = pathlib.Path(folder), int(state.server.round)
    folder.mkdir(parents=True, exist_ok=True)
    store = state.clients if isinstance(state.clients, Store) else None
    if store is not None and store.round != round:
        raise ValueError(f"state is of round {round}, its store at {store.round}; allowed: the newest state")
    there = _latest(folder)
    if there is not None and there >= round:
        raise ValueError(f"{folder} has a checkpoint of round {there}; allowed: one of a round before {round}, or none")
    with _manager(folder) as manager:
        _save(manager, folder, state, store, _about(state, store, None) | {"rounds": None, "evaluations": []})
        manager.wait_until_finished()
    if store is not None:
        store.forget(folder, [round])


def load_state(
    folder: str | pathlib.Path, algorithm: Algorithm, population: int, key: Key, *, store: Store | None = None
) -> State:
    """The newest state that `save_state` or `Checkpoints` wrote, to give to `simulate`, which goes on to the same bits; the
    number of processes may be another one, and clients may go to another place than where they were.

    Args:
        folder: where it was saved.
        algorithm, population, key: as they were given to `simulate`.
        store: where clients are to be: a new `HostStore`, or `DiskStore(folder, resume=True)`, or None for on the device.

    Raises:
        FileNotFoundError: there is no checkpoint, or a file of it is gone.
        ValueError: it is of another run, as far as shapes and types, and where it is known the key, tell; the store is not a
            new one.

    >>> import optax, tempfile
    >>> from fedkd_jax import local_only, mlp
    >>> try: load_state(tempfile.mkdtemp(), local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), 5, jax.random.key(0))
    ... except FileNotFoundError as error: print(str(error).split()[-2:])
    ['no', 'checkpoint']
    """
    folder = pathlib.Path(folder)
    if _latest(folder) is None:
        raise FileNotFoundError(f"{folder} has no checkpoint")
    with _manager(folder) as manager:
        return _load(manager, folder, algorithm, population, key, store, Journal(folder))[0]


def _about(state: State, store: Store | None, key: Key | None) -> dict:
    """What must be as it was for the state to be of use."""
    carried = state if store is None else state.server
    return {
        "round": int(state.server.round),
        "store": store is not None,
        "processes": jax.process_count(),
        "population": None,
        "shapes": _shapes(carried),
        "key": None if key is None else np.asarray(jax.random.key_data(key)).tolist(),
    }


def _save(manager, folder: pathlib.Path, state: State, store: Store | None, meta: dict) -> None:
    if store is not None:
        store.save(folder, meta["round"])
    carried = ocp.args.StandardSave(state if store is None else state.server)
    manager.save(meta["round"], args=ocp.args.Composite(state=carried, meta=ocp.args.JsonSave(meta)))


def _load(
    manager,
    folder: pathlib.Path,
    algorithm: Algorithm,
    population: int,
    key: Key,
    store: Store | None,
    journal: Journal,
) -> tuple[State, dict]:
    """The newest checkpoint, or what the journal says, if that is newer."""
    layout, steps, index, arrays = algorithm.layout or Layout(), sorted(manager.all_steps()), None, None
    record = journal.newest()
    if record is None or (steps and record[0]["round"] <= steps[-1]):
        at = folder / "server" / str(steps[-1])
        with damaged(at):
            meta = manager.restore(steps[-1], args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    else:
        (meta, arrays), at = record, folder / "journal"
    if not isinstance(meta, dict) or not {"round", "store", "processes", "shapes", "key", "rounds"} <= meta.keys():
        raise ValueError(f"{at} is damaged; allowed: as it was saved")
    if meta.get("population") not in (None, population):
        raise ValueError(f"population is {population}; allowed: {meta['population']}, as in {folder}")
    own_key = np.asarray(jax.random.key_data(key)).tolist()
    if meta["key"] not in (None, own_key):
        raise ValueError(f"key is {own_key}; allowed: {meta['key']}, that of the run in {folder}")
    whole = state_shapes(algorithm, population)
    abstract = whole.server if meta["store"] else whole
    if (shapes := _shapes(abstract)) != meta["shapes"]:
        pairs = zip(meta["shapes"], shapes, strict=False)
        saved, own = next((p for p in pairs if p[0] != p[1]), ("other leaves", "these"))
        split = f", on {layout.devices} devices" if layout.mesh is not None else ""
        raise ValueError(f"{folder} has {saved}; allowed: {own}, as the algorithm has{split}")
    placed = _placed(abstract, layout)
    if arrays is None:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(placed))
        with damaged(at):
            restored = manager.restore(steps[-1], args=args)["state"]
    else:
        leaves, tree = jax.tree.flatten(placed)
        numbers = [(x.dtype, x.shape) for x in (jax.eval_shape(plain, leaf) for leaf in leaves)]
        alone = len(jax.tree.leaves(placed if meta["store"] else placed.server))
        more = [(dtype, shape) for _, dtype, shape in meta["index"]]
        read = read_parts(arrays, numbers[:alone], numbers[alone:], more, devices=meta.get("devices", 1))
        restored = tree.unflatten(map(_typed, read[: len(leaves)], leaves))
        index = {name: x for (name, *_), x in zip(meta["index"], read[len(leaves) :], strict=True)}
        steps = [*steps, meta["round"]]
    init_key, _ = halves(key)  # as `simulate` does
    if not meta["store"]:
        if store is not None:
            store.open(algorithm, init_key, population)
            store.write(np.arange(population), jax.tree.map(lambda x: x[:population], restored.clients))
            store.round = meta["round"]
            restored = State(server=restored.server, clients=store)
        return restored, meta
    into = HostStore() if store is None else store
    into.open(algorithm, init_key, population)
    into.load(folder, steps, meta["processes"], index)
    return State(server=restored, clients=into if store is not None else _stacked(into, whole.clients, layout)), meta


def _steps(folder: pathlib.Path) -> list[int]:
    """The rounds of checkpoints that are whole."""
    return [int(path.name) for path in (folder / "server").glob("*") if path.name.isdigit()]


def _latest(folder: pathlib.Path) -> int | None:
    record = Journal(folder).newest()
    return max([*_steps(folder), *([] if record is None else [record[0]["round"]])], default=None)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What fails when Orbax writes is an OSError, as TensorStore says of a full disk that a value is bad."""
    try:
        yield
    except (OSError, AssertionError):
        raise
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise OSError(f"a checkpoint could not be written, {type(error).__name__}: {said}") from error


def _stacked(store: Store, shapes: ClientState, layout: Layout) -> ClientState:
    """The states of all clients, on the device."""
    size = jax.tree.leaves(shapes)[0].shape[0] if jax.tree.leaves(shapes) else 0
    clients = store.take(np.arange(size))
    return jax.device_put(clients, layout.sharding("clients")) if layout.mesh is not None else clients


def _manager(folder: pathlib.Path, keep: int = 1, *, wait: bool = True) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=not wait, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder.absolute() / "server", options=options, item_names=("state", "meta"))


def _typed(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    keys = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.device_put(jax.random.wrap_key_data(leaf) if keys else leaf, like.sharding)


def _any_process(*flags: bool) -> tuple[bool, ...]:
    """Of each flag whether a process has it."""
    if jax.process_count() == 1:
        return flags
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())


def _shapes(tree: PyTree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    each = [f"{jax.tree_util.keystr(path)} {jnp.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves]
    return [*each, str(jax.tree.structure(tree))]


def _placed(abstract: Any, layout: Layout) -> Any:
    """Where what is restored goes: a server to every device, clients split over them."""

    def placed(tree, *spec):
        sharding = layout.sharding(*spec) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    if not isinstance(abstract, State):
        return placed(abstract)
    return State(server=placed(abstract.server), clients=placed(abstract.clients, "clients"))
