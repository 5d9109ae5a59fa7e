"""Laws of what is the same to the bit, beside those of `test_population.py` (where states live), `test_checkpoint.py` (going
on), `test_simulate.py` (5 + 5 rounds are 10), `test_parallel.py` (chunks, devices) and `test_rounds.py` (order of a cohort).
"""

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import strategies

from fedkd_jax import HostStore, Layout, Participation, simulate, unreliable

SHAKY = Participation(first=3, turn=unreliable(dropout=0.3, stragglers=0.3, least=0.2, spread=0.5))
WHOLE = strategies.small_data()
# without the gaps between clients, which are NaN, and without an example of the third
DATA = dataclasses.replace(WHOLE, inputs=np.nan_to_num(WHOLE.inputs), count=WHOLE.count * (np.arange(5) != 2))
TEST = strategies.small_data(seed=1)
TEST = dataclasses.replace(TEST, inputs=np.nan_to_num(TEST.inputs))


def run(name, data=DATA, **options):
    algorithm = strategies.ALGORITHMS[name](Layout(chunk=1))
    return simulate(algorithm, 5, data, jax.random.key(29), rounds=3, cohort=3, test=TEST, eval_every=2, **options)


def digest():
    state, history = run("fedavg, PowerSGD", participation=SHAKY)
    found = hashlib.sha256()
    for leaf in jax.tree.leaves((state, history)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def test_another_process_makes_the_same_bits():
    code = "import conftest, test_determinism; print(test_determinism.digest())"
    env = os.environ | {"PYTHONHASHSEED": "4321"}  # names hash to other numbers
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.split()[-1] == digest()


@pytest.mark.parametrize("name", ["fedkd, quantised factors", "feddropout"])
def test_no_random_key_is_used_twice(name):
    with jax.debug_key_reuse(True):
        run(name, store=HostStore(), participation=SHAKY)
        key = jax.random.key(0)
        jax.random.normal(key)
        with pytest.raises(jax.errors.KeyReuseError):  # it does look
            jax.random.normal(key)


def test_a_run_can_be_searched_for_its_first_nan():
    """Nothing in it makes one, also not where a client has no example, and is then thrown away; one in the data is found."""
    with jax.debug_nans(True):
        state, _ = run("fedkd")
        chex.assert_tree_all_finite(jax.device_get(state))
        with pytest.raises(FloatingPointError, match="nan"):
            run("fedkd", dataclasses.replace(DATA, inputs=np.full_like(DATA.inputs, np.nan)))
