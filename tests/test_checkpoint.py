"""Laws of `fedkd_jax.checkpoint`: a run goes on from disk to the same bits, whatever happened after it was saved."""

import functools
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import strategies
import two_processes

from fedkd_jax import DiskStore, HostStore, Layout, load_state, save_state, simulate

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
        back = load_state(
            tmp_path, algorithm(), 5, KEY, store=HostStore() if to == "host" else DiskStore(tmp_path, resume=True)
        )
        assert int(back.server.round) == 3
        finished(run(back))


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
    with pytest.raises(ValueError, match=r"store is None; allowed: a new HostStore, or DiskStore"):
        load_state(tmp_path / "a", algorithm(), 5, KEY)
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


def test_a_file_that_is_cut_and_one_that_is_not_a_disk_stores_are_told(tmp_path):
    store = DiskStore(tmp_path / "a")
    save_state(tmp_path / "a", run(store=store))
    with open(store.path, "r+b") as file:
        file.truncate(store.row_bytes)
    with pytest.raises(FileNotFoundError, match=r"clients\.bin has \d+ bytes; allowed: "):
        load_state(tmp_path / "a", algorithm(), 5, KEY, store=DiskStore(tmp_path / "a", resume=True))
    store.close()
    with pytest.raises(ValueError, match="the store is closed"):
        store.take(np.arange(5))
    save_state(tmp_path / "b", run(store=HostStore()))
    with pytest.raises(ValueError, match="store is a DiskStore; allowed: a HostStore"):
        load_state(tmp_path / "b", algorithm(), 5, KEY, store=DiskStore(tmp_path / "b", resume=True))


def test_what_a_file_holds_is_never_written_over_by_a_new_run(tmp_path):
    store = DiskStore(tmp_path)
    save_state(tmp_path, run(store=store))
    store.close()
    run(store=DiskStore(tmp_path, resume=True))  # begins anew, in the same file
    finished(run(load_state(tmp_path, algorithm(), 5, KEY, store=DiskStore(tmp_path, resume=True))))


def test_two_processes_go_on_where_one_stopped_and_one_where_two_did(tmp_path):
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
