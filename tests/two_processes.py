"""One of two processes of `test_checkpoint.py`: `python two_processes.py RANK PORT FOLDER` goes on with what is in FOLDER,
and saves a run of its own, which it goes on with."""

import functools
import os
import pathlib
import sys

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).parent))  # `strategies`, as under pytest

import jax

if __name__ == "__main__":  # before anything makes an array
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))

import chex
import numpy as np
import strategies

from fedkd_jax import (
    Checkpoints,
    DiskStore,
    HostStore,
    Layout,
    Participation,
    client_mesh,
    load_state,
    save_state,
    simulate,
    unreliable,
)
from fedkd_jax.data import synthetic

CLIENTS, KEY = 8, jax.random.key(3)
TRAIN, TEST = (synthetic(CLIENTS, features=strategies.FEATURES, classes=strategies.TARGETS, part=p) for p in (0, 1))
PARTICIPATION = Participation(strata=2, turn=unreliable(dropout=0.3, stragglers=0.5))


algorithm = functools.cache(strategies.ALGORITHMS["fedkd, optimiser kept"])


def run(layout, population, rounds, **options):
    options |= dict(cohort=4, group=2, participation=PARTICIPATION, test=TEST, eval_ids=np.array([6, 1, 7]))
    return simulate(algorithm(layout), population, TRAIN, KEY, rounds=rounds, **options)


def load(layout, folder):
    return load_state(folder, algorithm(layout), CLIENTS, KEY, store=DiskStore(folder, resume=True))


if __name__ == "__main__":
    layout, folder = Layout(mesh=client_mesh(), chunk=1), sys.argv[3]
    state, history = run(layout, load(layout, folder), rounds=2)
    save_state(folder, state)

    def saved(rounds):
        own = pathlib.Path(folder) / "run"
        store = DiskStore(own, resume=True)
        try:
            return run(layout, CLIENTS, rounds, store=store, checkpoints=Checkpoints(own, rounds=1))
        finally:
            store.close()

    (whole, told), _, (end, again) = run(layout, CLIENTS, 3, store=HostStore()), saved(2), saved(3)
    chex.assert_trees_all_equal(end.server, whole.server)
    chex.assert_trees_all_equal(again.rounds, told.rounds)
    chex.assert_trees_all_equal(again.evaluations[-1], told.evaluations[-1])
    print(len(state.clients), history.evaluations[-1]["pooled"]["teacher"]["accuracy"])
