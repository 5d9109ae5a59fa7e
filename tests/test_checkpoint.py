"""Laws of `fedkd_jax.checkpoint`: a run goes on from disk to the same bits, whatever happened after it was saved."""

import dataclasses
import errno
import functools
import itertools
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
import two_processes
from hypothesis import strategies as st

from fedkd_jax import (
    Checkpoints,
    DiskStore,
    HostStore,
    Layout,
    LossTerms,
    RoundInfo,
    Stopped,
    checkpoint,
    client_mesh,
    journal,
    load_state,
    save_state,
    simulate,
)
from fedkd_jax.history import HistoryFiles
from fedkd_jax.recorder import Recorder, read_parts

KEY = jax.random.key(23)
DATA = strategies.small_data()


@functools.cache
def algorithm(name="fedkd, optimiser kept"):
    return strategies.ALGORITHMS[name](Layout(chunk=1))


def run(population=5, rounds=3, store=None, name="fedkd, optimiser kept"):
    return simulate(algorithm(name), population, DATA, KEY, rounds=rounds, cohort=2, store=store)[0]


@functools.cache
def whole():
    state = run(rounds=6, store=HostStore())
    return jax.device_get((state.server, state.clients.take(np.arange(5))))


def finished(state):
    clients = state.clients if isinstance(state.clients, type(whole()[1])) else state.clients.take(np.arange(5))
    chex.assert_trees_all_equal(jax.device_get((state.server, clients)), whole())


def test_a_run_on_the_device_goes_on(tmp_path):
    state = run()
    save_state(tmp_path, state)
    back = load_state(tmp_path, algorithm(), 5, KEY)
    chex.assert_trees_all_equal(back, state)
    chex.assert_trees_all_equal_dtypes(back, state)
    finished(run(back))


@pytest.mark.parametrize("to", ["host", "disk"])
def test_a_run_that_was_killed_goes_on_from_its_store(tmp_path, to):
    """What was written after the checkpoint is in the file, too, and hurts nobody; nor does it if it happens again."""
    store = DiskStore(tmp_path)
    state = run(store=store)
    save_state(tmp_path, state)
    run(state, rounds=2)
    store.close()
    for _ in range(2):
        store = HostStore() if to == "host" else DiskStore(tmp_path, resume=True)
        back = load_state(tmp_path, algorithm(), 5, KEY, store=store)
        assert int(back.server.round) == 3
        finished(run(back))
        store.close()


def test_every_round_may_be_saved_and_space_is_used_again(tmp_path):
    store = DiskStore(tmp_path)
    state = run(rounds=1, store=store)
    for _ in range(5):
        save_state(tmp_path, state)
        state = run(state, rounds=1)
    finished(state)
    rows = store.path.stat().st_size // store.row_bytes
    assert rows <= len(store) + 2  # and those of one cohort more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients.bin", "index-5.npz", "server"]


def test_clients_in_host_memory_are_written_whole(tmp_path):
    state = run(store=HostStore())
    for _ in range(2):
        save_state(tmp_path, state)
        state = run(load_state(tmp_path, algorithm(), 5, KEY, store=HostStore()), rounds=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index-4.npz", "rows-4.bin", "server"]
    finished(run(state, rounds=1))


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        load_state(tmp_path, algorithm(), 5, KEY)
    store = DiskStore(tmp_path / "a")
    state = run(store=store)
    with pytest.raises(ValueError, match=r"folder is .*b; allowed: .*a, where the store is"):
        save_state(tmp_path / "b", state)
    save_state(tmp_path / "a", state)
    with pytest.raises(ValueError, match=r"has .*; allowed: .*, as the algorithm has"):
        load_state(tmp_path / "a", algorithm("fedavg"), 5, KEY, store=HostStore())
    with pytest.raises(ValueError, match=r"index-3.npz is of another run's clients"):
        load_state(tmp_path / "a", algorithm(), 5, jax.random.key(24), store=HostStore())
    with pytest.raises(ValueError, match=r"store is in .*c; allowed: .*a, where the checkpoint is"):
        load_state(tmp_path / "a", algorithm(), 5, KEY, store=DiskStore(tmp_path / "c"))
    with pytest.raises(ValueError, match="a has a checkpoint of round 3; allowed: one of a round before 3"):
        save_state(tmp_path / "a", state)
    with pytest.raises(ValueError, match=r"store holds . clients; allowed: a new one"):
        load_state(tmp_path / "a", algorithm(), 5, KEY, store=store)
    run(state, rounds=1)
    with pytest.raises(ValueError, match="state is of round 3, its store at 4; allowed: the newest state"):
        save_state(tmp_path / "a", state)
    (tmp_path / "a" / "index-3.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"index-3\.npz"):
        load_state(tmp_path / "a", algorithm(), 5, KEY, store=HostStore())


def test_a_file_that_is_cut_is_told(tmp_path):
    store = DiskStore(tmp_path / "a")
    save_state(tmp_path / "a", run(store=store))
    with open(store.path, "r+b") as file:
        file.truncate(store.row_bytes)
    with pytest.raises(BlockingIOError, match=r"clients\.bin is of a run that goes on, .*; allowed: one at a time"):
        DiskStore(tmp_path / "a", resume=True)
    store.close()
    with pytest.raises(ValueError, match="the store is closed"):
        store.take(np.arange(5))
    with pytest.raises(FileNotFoundError, match=r"clients\.bin has \d+ bytes; allowed: "):
        load_state(tmp_path / "a", algorithm(), 5, KEY, store=DiskStore(tmp_path / "a", resume=True))


def test_what_a_file_holds_is_never_written_over_by_a_new_run(tmp_path):
    store = DiskStore(tmp_path)
    save_state(tmp_path, run(store=store))
    store.close()
    store = DiskStore(tmp_path, resume=True)
    run(store=store)  # begins anew, in the same file
    store.close()
    finished(run(load_state(tmp_path, algorithm(), 5, KEY, store=DiskStore(tmp_path, resume=True))))


def test_two_processes_go_on_where_one_stopped_and_one_where_two_did(cpu, tmp_path):
    """Each has its own range of ids, in a file of its own; the sums are in another order, so it is equal to rounding."""
    layout = Layout(chunk=1)
    alone, history = two_processes.run(layout, two_processes.CLIENTS, 6, store=HostStore())
    store = DiskStore(tmp_path)
    state, _ = two_processes.run(layout, two_processes.CLIENTS, 2, store=store)
    save_state(tmp_path, state)
    store.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(pathlib.Path(two_processes.__file__))]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=400) for process in both]
    finally:
        for process in both:
            process.kill()  # they ignore SIGTERM
    assert [process.returncode for process in both] == [0, 0], said
    rows, accuracy = zip(*(out.strip().splitlines()[-1].split() for out, _ in said), strict=True)
    assert accuracy[0] == accuracy[1]
    back = two_processes.load(layout, tmp_path)
    assert len(back.clients) == sum(map(int, rows))
    assert int(back.server.round) == 4
    end, rest = two_processes.run(layout, back, 2)
    everybody = np.arange(two_processes.CLIENTS)
    chex.assert_trees_all_close(end.server, alone.server, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(end.clients.take(everybody), alone.clients.take(everybody), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(rest.rounds, jax.tree.map(lambda x: x[4:], history.rounds), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(rest.evaluations, history.evaluations[-1:], rtol=1e-4, atol=1e-5)


# ---- checkpoints of a run under way ------------------------------------------------------------------------------------

TEST = strategies.small_data(seed=1)


def stored(where, folder):
    return {"device": lambda: None, "host": HostStore, "disk": lambda: DiskStore(folder, resume=True)}[where]()


def saved_run(folder, where="device", total=6, on_rounds=None, on_evaluation=None, cohort=2, key=KEY, **options):
    """The same call each time: it begins, or goes on."""
    options = dict(rounds=1) | options
    store, checkpoints = stored(where, folder), Checkpoints(folder, **options)
    more = dict(test=TEST, eval_every=4, on_rounds=on_rounds, on_evaluation=on_evaluation)
    more |= dict(store=store, checkpoints=checkpoints)
    try:
        return simulate(algorithm(), 5, DATA, key, rounds=total, cohort=cohort, **more)
    finally:
        if where == "disk":
            store.close()


@functools.cache
def in_one_piece():
    state, history = simulate(algorithm(), 5, DATA, KEY, rounds=6, cohort=2, test=TEST, eval_every=4)
    return jax.device_get((state, history))


class Killed(Exception):
    pass


def killed_after(round):
    def on_rounds(done, _):
        if done >= round:
            raise Killed

    return on_rounds


def same_as_in_one_piece(folder, where, state, history):
    clients = state.clients
    if where != "device":
        clients = load_state(folder, algorithm(), 5, KEY).clients
    chex.assert_trees_all_equal(jax.device_get((state.server, clients)), tuple(vars(in_one_piece()[0]).values()))
    chex.assert_trees_all_equal(history, in_one_piece()[1])
    chex.assert_trees_all_equal_dtypes(history.rounds, in_one_piece()[1].rounds)


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_the_same_call_again_is_a_run_in_one_piece(where, tmp_path):
    """Whenever it ended: before a checkpoint, after one, in rounds after one, or not at all."""
    for round in (1, 3, 3, 6):
        with pytest.raises(Killed):
            saved_run(tmp_path, where, on_rounds=killed_after(round))
    for _ in range(2):
        same_as_in_one_piece(tmp_path, where, *saved_run(tmp_path, where))
    with pytest.raises(ValueError, match="rounds is 5; allowed: at least 6, as are done in "):
        saved_run(tmp_path, where, total=5)
    fewer = dataclasses.replace(DATA, start=DATA.start[:4], count=DATA.count[:4])
    with pytest.raises(ValueError, match="population is 4; allowed: 5, as in "):
        simulate(algorithm(), 4, fewer, KEY, rounds=6, cohort=2, checkpoints=Checkpoints(tmp_path))


@pytest.mark.parametrize("where", ["device", "disk"])
def test_a_journal_is_gone_on_from_by_hand_too_but_not_after_a_start_of_the_machine(where, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        saved_run(tmp_path, where, total=3, on_rounds=killed_after(3))
    store = stored(where, tmp_path)
    back = load_state(tmp_path, algorithm(), 5, KEY, store=store)
    assert int(back.server.round) == 2
    if store is not None:
        store.close()
    monkeypatch.setattr(journal, "_boot", lambda: "another")
    assert Checkpoints(tmp_path).latest() is None
    monkeypatch.setattr(journal, "_boot", lambda: "")  # of a system that does not tell
    saved_run(tmp_path, where, total=1)
    assert Checkpoints(tmp_path).latest() == 1
    assert journal.Journal(tmp_path).newest() is None
    monkeypatch.undo()
    same_as_in_one_piece(tmp_path, where, *saved_run(tmp_path, where))


@pytest.mark.parametrize("where", ["host", "disk"])
def test_what_the_journal_needs_stays_until_a_newer_checkpoint_is_whole(where, tmp_path, monkeypatch):
    """A checkpoint of round 2, round 3 in the journal, a checkpoint of 4 that never ends, killed in round 5."""
    due, save = Checkpoints.due, checkpoint._save

    def whole_at_2_and_4(self, round, last):
        due(self, round, last)
        self._whole = round in (2, 4)
        return True

    def never_ends(manager, folder, state, store, meta):
        return store.save(folder, 4) if meta["round"] == 4 else save(manager, folder, state, store, meta)

    monkeypatch.setattr(Checkpoints, "due", whole_at_2_and_4)
    monkeypatch.setattr(checkpoint, "_save", never_ends)
    with pytest.raises(Killed):
        saved_run(tmp_path, where, on_rounds=killed_after(5))
    monkeypatch.undo()
    assert Checkpoints(tmp_path).latest() == 3
    same_as_in_one_piece(tmp_path, where, *saved_run(tmp_path, where))


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    """And after an error free again."""
    again = lambda done, _: saved_run(tmp_path)  # noqa: E731
    with pytest.raises(BlockingIOError, match=r"lock-0 is of a run that goes on, .*; allowed: one at a time"):
        saved_run(tmp_path, on_rounds=again)
    same_as_in_one_piece(tmp_path, "device", *saved_run(tmp_path))


@pytest.mark.parametrize(("was", "now"), [("device", "disk"), ("disk", "device"), ("host", "disk"), ("disk", "host")])
def test_clients_may_go_elsewhere(was, now, tmp_path):
    for where, round in ((was, 4), (now, 6)):
        with pytest.raises(Killed):
            saved_run(tmp_path, where, on_rounds=killed_after(round))
    same_as_in_one_piece(tmp_path, now, *saved_run(tmp_path, now))


def test_a_run_that_is_to_stop_saves_and_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path, minutes=60.0)
    store = DiskStore(tmp_path, resume=True)
    options = dict(cohort=2, test=TEST, eval_every=4, store=store, checkpoints=checkpoints)
    on_rounds = lambda done, _: checkpoints.stop() if done == 2 else None  # noqa: E731
    with pytest.raises(Stopped, match="stopped after round 2, which is saved"):
        simulate(algorithm(), 5, DATA, KEY, rounds=6, on_rounds=on_rounds, **options)
    store.close()
    assert checkpoints.latest() == 2
    same_as_in_one_piece(tmp_path, "disk", *saved_run(tmp_path, "disk"))


@pytest.mark.parametrize("where", ["device", "disk"])
def test_the_newest_are_kept_and_an_older_one_is_whole(where, tmp_path, monkeypatch):
    monkeypatch.setattr("fedkd_jax.checkpoint.LEAST_SHARE", 0)  # of what the last one took: one after each call
    monkeypatch.setattr(sys.modules["fedkd_jax.simulate"], "SECONDS_PER_CALL", 0)
    saved_run(tmp_path, where, total=5, keep=3, rounds=None, minutes=0.0)
    assert sorted(p.name for p in (tmp_path / "server").iterdir()) == ["3", "4", "5"]
    shutil.rmtree(tmp_path / "server" / "5")
    shutil.rmtree(tmp_path / "server" / "4")
    assert Checkpoints(tmp_path).latest() == 3
    same_as_in_one_piece(tmp_path, where, *saved_run(tmp_path, where, keep=2))


@pytest.mark.parametrize(
    ("where", "options", "expected"),
    [
        ("device", dict(rounds=4), [4, 6]),
        ("device", dict(rounds=1), [4, 6]),  # a CPU's devices write after the others
        ("host", dict(rounds=3), [3, 6]),
        ("device", dict(rounds=None), [6]),
        ("device", dict(rounds=None, minutes=0.0), [1, 2]),
    ],
)
def test_a_checkpoint_is_due_by_rounds_by_time_and_at_the_end(where, options, expected, tmp_path, monkeypatch):
    if options["rounds"] == 1 and jax.default_backend() != "cpu":
        expected = [1, 2]
    saved, save = [], Checkpoints.save
    monkeypatch.setattr("fedkd_jax.checkpoint.LEAST_SHARE", 0)  # of what the last one took

    def spy(self, state, *more):
        saved.append(int(state.server.round))
        save(self, state, *more)

    monkeypatch.setattr(Checkpoints, "save", spy)
    saved_run(tmp_path, where, **options)
    assert saved[: len(expected)] == expected
    assert saved[-1] == 6


@pytest.mark.parametrize("where", ["device", "disk"])
def test_a_disk_that_is_full_is_told_and_what_was_saved_is_whole(where, tmp_path, monkeypatch):
    left = [50]

    def until_full(write):
        def full(*args):
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1
            return write(*args)

        return full

    monkeypatch.setattr(os, "pwrite", until_full(os.pwrite))  # clients' states
    monkeypatch.setattr(os, "pwritev", until_full(lambda file, parts, at, write=os.pwritev: write(file, parts[:2], at)))
    with pytest.raises(OSError, match="No space left on device"):
        saved_run(tmp_path, where)
    monkeypatch.undo()
    assert Checkpoints(tmp_path).latest() in range(1, 6)
    same_as_in_one_piece(tmp_path, where, *saved_run(tmp_path, where))


@hypothesis.given(
    sizes=st.lists(st.integers(0, 9), max_size=9), pieces=st.lists(st.integers(1, 7), min_size=1), at=st.integers(0, 5)
)
def test_a_journal_goes_on_where_the_system_stopped_writing(sizes, pieces, at, tmp_path_factory):
    parts = [np.arange(size, dtype=np.uint8) + i for i, size in enumerate(sizes)]
    path, whole, turn = (
        tmp_path_factory.mktemp("journal") / "file",
        b"".join(map(bytes, parts)),
        itertools.cycle(pieces),
    )

    def some(file, views, at):
        return os.pwrite(file, b"".join(views)[: next(turn)], at)

    path.write_bytes(b"x" * at)
    with path.open("r+b") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", some)
        journal._write(file.fileno(), path, parts, at)
    assert path.read_bytes() == b"x" * at + whole


def some_info(cohort, seed=0):
    rng = np.random.default_rng(seed)
    some = lambda kind, but: {f.name: rng.random(cohort) for f in dataclasses.fields(kind) if f.name not in but}  # noqa: E731
    ranks = {"dense_0/kernel": rng.integers(9, size=(cohort, 2))}
    return RoundInfo(terms=LossTerms(**some(LossTerms, ())), ranks=ranks, **some(RoundInfo, ("terms", "ranks", "turn")))


@hypothesis.given(
    devices=st.integers(1, 3),
    every=st.integers(1, 3),
    rounds=st.integers(1, 7),
    cohort=st.integers(1, 6),
    slow=st.lists(st.sampled_from([0.0, 0.002]), min_size=1),
)
def test_a_record_is_of_one_round_however_the_devices_run(devices, every, rounds, cohort, slow, tmp_path_factory):
    """Nothing but `part` holds them back, which is so where nothing is added up over clients."""
    folder, told = tmp_path_factory.mktemp("recorder"), []
    files, kept = HistoryFiles(folder), journal.Journal(folder)
    about = lambda round: told.append(kept.newest()) or {"round": round, "rows": len(told)}  # noqa: E731
    saves = lambda round: round % every == 0 and round != rounds  # noqa: E731
    options = dict(saves=saves, cohort=cohort, devices=devices, about=about)
    recorder = Recorder(kept, files, **options)
    server = lambda round: [np.full((2, 3), round, np.float32), np.array(round)]  # noqa: E731
    clients = lambda round: [100.0 * round + np.arange(devices * 2 * 3).reshape(devices * 2, 3), np.arange(devices * 2)]  # noqa: E731
    info = lambda round: some_info(cohort, seed=round)  # noqa: E731

    def run(device, pauses):
        for round in range(1, rounds + 1):
            time.sleep(next(pauses))
            own = slice(device * 2, (device + 1) * 2)
            mine = slice(device * cohort // devices, (device + 1) * cohort // devices) if cohort % devices == 0 else ...
            known = jax.tree.map(lambda x: x[mine], info(round))  # noqa: B023
            recorder.part(device, round, server(round), [x[own] for x in clients(round)], known)

    threads = [threading.Thread(target=run, args=(i, itertools.cycle(slow[i:] + slow[:i]))) for i in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    recorder.check()
    recorder.close()
    saved = [round for round in range(every, rounds, every)]
    assert len(told) == len(saved)
    # while a record was written, the one before was whole
    assert [None if x is None else x[0]["round"] for x in told] == [None, *saved[:-1]][: len(saved)]
    history = files.read(rounds, files.fields(), [])
    chex.assert_trees_all_equal(history.rounds, jax.tree.map(lambda *x: np.stack(x), *map(info, range(1, rounds + 1))))
    if saved:
        said, arrays = kept.newest()
        assert said["round"] == saved[-1]
        shapes = lambda leaves: [(x.dtype, x.shape) for x in leaves]  # noqa: E731
        read = read_parts(arrays, shapes(server(0)), shapes(clients(0)), [], devices=devices)
        chex.assert_trees_all_equal(read, [*server(saved[-1]), *clients(saved[-1])])
    files.close()
    kept.close()


def test_a_device_that_cannot_write_lets_the_others_go_on(tmp_path, monkeypatch):
    files, kept = HistoryFiles(tmp_path), journal.Journal(tmp_path)
    recorder = Recorder(
        kept, files, saves=lambda round: True, cohort=1, devices=2, about=lambda round: {"round": round}
    )
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(journal.Journal, "put", lambda *_: (_ for _ in ()).throw(full))
    run = lambda: [recorder.part(1, round, [], [], some_info(1)) for round in (1, 2, 3)]  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    recorder.part(0, 1, [], [], some_info(1))
    with pytest.raises(OSError, match="No space left"):
        recorder.check()
    recorder.close()
    files.close()
    kept.close()


def test_files_are_closed_only_when_no_device_writes(tmp_path, monkeypatch):
    """A program that runs on after an interrupt must not write where another file is by then."""
    kept, begun, goes_on, closed = journal.Journal(tmp_path), *(threading.Event() for _ in range(3))
    recorder = Recorder(
        kept, HistoryFiles(tmp_path), saves=lambda round: True, cohort=1, devices=1, about=lambda r: {"round": r}
    )
    monkeypatch.setattr(journal.Journal, "put", lambda *_: begun.set() or goes_on.wait(20))
    device = threading.Thread(target=recorder.part, args=(0, 1, [], [], some_info(1)))
    device.start()
    assert begun.wait(20)
    closes = threading.Thread(target=lambda: recorder.close() or closed.set())
    closes.start()
    assert not closed.wait(0.1)
    goes_on.set()
    assert closed.wait(20)
    assert kept.newest()[0]["round"] == 1
    recorder.part(0, 2, [], [], some_info(1))
    assert kept.newest()[0]["round"] == 1
    kept.close()


@pytest.mark.parametrize("name", ["fedkd, optimiser kept", "local_only"])
@pytest.mark.parametrize("cohort", [2, 3, 5])
def test_devices_write_their_own_clients_and_the_next_run_is_the_same_program(name, cohort, tmp_path, eight_devices):
    """States of 5 clients are padded to 6 for two devices, and cohorts of 3 and 5 are not split."""
    split = strategies.ALGORITHMS[name](Layout(mesh=client_mesh(2), chunk=1))
    options = dict(cohort=cohort, test=TEST, eval_every=4)
    whole = jax.device_get(simulate(split, 5, DATA, KEY, rounds=6, **options))
    programs = []
    for i in range(2):
        checkpoints = Checkpoints(tmp_path / f"{i}", rounds=1)
        with pytest.raises(Killed):
            simulate(split, 5, DATA, KEY, rounds=6, on_rounds=killed_after(5), checkpoints=checkpoints, **options)
        assert checkpoints.latest() == 5  # the last is a checkpoint, which was not yet begun
        programs.append(sys.modules["fedkd_jax.simulate"]._run_rounds._cache_size())
        state, history = simulate(split, 5, DATA, KEY, rounds=6, checkpoints=Checkpoints(tmp_path / f"{i}"), **options)
        chex.assert_trees_all_equal(jax.device_get((state, history)), whole)
    assert programs[0] == programs[1]


@pytest.mark.parametrize("where", ["device", "host"])
def test_no_state_is_there_without_its_evaluation(where, tmp_path):
    """Killed after round 4, before it was evaluated: the state is that of round 3."""
    with pytest.raises(Killed):
        saved_run(tmp_path, where, on_rounds=killed_after(4))
    assert Checkpoints(tmp_path).latest() == 3
    evaluated = []
    state, history = saved_run(tmp_path, where, on_evaluation=lambda history: evaluated.append(history.evaluations[-1]))
    same_as_in_one_piece(tmp_path, where, state, history)
    assert [evaluation["round"] for evaluation in evaluated] == [4, 6]


def test_what_fails_when_orbax_writes_is_told_as_the_disks(tmp_path, monkeypatch):
    def save(*_):
        raise ValueError("NOT_FOUND: Error writing: File too large\nand more")

    monkeypatch.setattr(checkpoint, "_save", save)
    with pytest.raises(
        OSError, match=r"could not be written, ValueError: NOT_FOUND.*File too large; saved in .* is round 5"
    ):
        saved_run(tmp_path)
    monkeypatch.undo()
    same_as_in_one_piece(tmp_path, "device", *saved_run(tmp_path))


@pytest.mark.parametrize("file", ["evaluation-4.npz", "server/6/meta/metadata"])
def test_what_is_damaged_is_told(file, tmp_path):
    saved_run(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:7])
    with pytest.raises(ValueError, match=r" is damaged, .*; allowed: as it was saved"):
        saved_run(tmp_path, total=7)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    saved_run(tmp_path / "a", total=2)
    with pytest.raises(ValueError, match=r"key is .*; allowed: .*, that of the run in .*a"):
        saved_run(tmp_path / "a", key=jax.random.key(24))
    with pytest.raises(ValueError, match=r"cohort is 3; allowed: 2, as in .*a"):
        saved_run(tmp_path / "a", cohort=3)
    with pytest.raises(ValueError, match=r"has .*; allowed: .*, as the algorithm has"):
        simulate(algorithm("fedavg"), 5, DATA, KEY, rounds=3, checkpoints=Checkpoints(tmp_path / "a"))
    with pytest.raises(ValueError, match="population is a State, with checkpoints; allowed: the number of clients"):
        simulate(algorithm(), run(rounds=1), DATA, KEY, rounds=3, checkpoints=Checkpoints(tmp_path / "a"))
    save_state(tmp_path / "b", run(rounds=1))
    with pytest.raises(ValueError, match="b has a state without a history; allowed: what Checkpoints saved"):
        saved_run(tmp_path / "b")
    for options in (dict(rounds=0), dict(minutes=-1.0), dict(keep=0)):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name} is {value}; allowed: "):
            Checkpoints(tmp_path, **options)
    os.truncate(tmp_path / "a" / "rounds.bin", 10)
    with pytest.raises(FileNotFoundError, match=r"rounds.bin has 0 rounds; allowed: at least 2"):
        saved_run(tmp_path / "a")


def test_a_type_that_would_be_cast_is_refused(tmp_path):
    save_state(tmp_path, run())
    half = algorithm("fedkd, optimiser kept")
    half = half._replace(init_server=lambda key: jax.tree.map(to_half, algorithm().init_server(key)))
    with pytest.raises(ValueError, match=r"has .*float32.*; allowed: .*bfloat16"):
        load_state(tmp_path, half, 5, KEY)


def to_half(x):
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
