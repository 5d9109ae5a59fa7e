"""Laws of `fedkd_jax.simulate`: a run is its rounds, however it is cut, traced, interrupted or spread over devices."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import one

from fedkd_jax import (
    Layout,
    State,
    client_mesh,
    energy_threshold,
    evaluate,
    fedavg,
    init_state,
    mlp,
    put,
    sample_cohort,
    simulate,
    simulate_seeds,
    svd_codec,
    take,
)
from fedkd_jax.data import take_clients
from fedkd_jax.population import place_data

KEY = jax.random.key(19)


@functools.cache
def algorithm(devices=None, chunk=None):
    """FedKD with everything that must survive an interruption: a schedule, kept optimisers, cohorts."""
    codec = svd_codec(energy_threshold(0.5, 0.95, 10))
    layout = Layout(mesh=None if devices is None else client_mesh(devices), chunk=chunk)
    options = dict(student_optimizer=optax.adam(0.05), reset_student_optimizer=False, uplink=codec, downlink=codec)
    return strategies.small_fedkd(layout, **options)


DATA, TEST = strategies.small_data(), strategies.small_data(1)


@functools.cache
def ten():
    """Ten rounds, evaluated at every fifth."""
    return simulate(algorithm(), 5, DATA, KEY, rounds=10, cohort=2, test=TEST, eval_every=5)


def test_five_and_five_rounds_are_ten_to_the_bit():
    state, history = ten()
    half, first = simulate(algorithm(), 5, DATA, KEY, rounds=5, cohort=2, test=TEST, eval_every=5)
    kept = jax.tree.map(np.array, half)
    whole, second = simulate(algorithm(), half, DATA, KEY, rounds=5, cohort=2, test=TEST, eval_every=5)
    chex.assert_trees_all_equal(whole, state)
    chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), first.rounds, second.rounds), history.rounds)
    chex.assert_trees_all_equal(first.evaluations + second.evaluations, history.evaluations)
    chex.assert_trees_all_equal(half, kept)  # the state to go on from is not consumed


def test_a_run_is_a_python_loop_of_rounds():
    """The documented derivation: init and run keys, cohorts by round, states in and out."""
    final, history = ten()
    init_key, run_key = jax.random.split(KEY)
    state, run = init_state(algorithm(), 5, init_key), jax.jit(algorithm().round)
    for t in range(4):
        ids = sample_cohort(run_key, t, 5, 2)
        server, own, info = run(state.server, take(state.clients, ids), take_clients(DATA, ids), ids, run_key)
        state = State(server=server, clients=put(state.clients, ids, own))
        chex.assert_trees_all_close(one(history.rounds, t), info, rtol=1e-3, atol=1e-5)
    assert int(final.server.round) == 10


@pytest.mark.parametrize("name", ["local_only", "fedavg, optimiser kept"])
def test_clients_that_never_took_part_are_untouched(name):
    other = strategies.ALGORITHMS[name]()
    state, history = simulate(other, 5, DATA, KEY, rounds=2, cohort=2)
    before = init_state(other, 5, jax.random.split(KEY)[0])
    assert 2 <= len(np.unique(history.rounds.ids)) < 5
    for i in range(5):
        a, b = one(state.clients, i), one(before.clients, i)
        if i in history.rounds.ids:
            assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
        else:
            chex.assert_trees_all_equal(a, b)


def test_history_has_a_row_for_every_round_and_evaluation():
    state, history = ten()
    chex.assert_shape(jax.tree.leaves(history.rounds), (10, 2))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(history.rounds))
    assert [e["round"] for e in history.evaluations] == [5, 10]
    last = {k: v for k, v in history.evaluations[-1].items() if k != "round"}
    chex.assert_trees_all_equal(last, evaluate(algorithm(), state, TEST))
    assert len(np.unique(history.rounds.ids)) == 5  # in ten rounds everybody was drawn
    assert (np.diff(history.rounds.ids) > 0).all()
    ranks = history.rounds.ranks["dense_0/kernel"]
    assert ranks[:2].mean() < ranks[-2:].mean()  # T rises with the round


@pytest.mark.parametrize(("devices", "chunk"), [(8, None), (2, 2)])
def test_one_device_equals_many_and_chunks(eight_devices, devices, chunk):
    """Five clients over eight devices: the population is padded, two of a cohort leave six devices idle."""
    state, history = ten()
    other = algorithm(devices, chunk)
    many, rows = simulate(other, 5, place_data(DATA, other.layout), KEY, rounds=10, cohort=2, eval_every=5)
    many = State(server=many.server, clients=jax.tree.map(lambda x: np.asarray(x)[:5], many.clients))
    np.testing.assert_array_equal(rows.rounds.ids, history.rounds.ids)
    chex.assert_trees_all_close(many, state, rtol=5e-3, atol=5e-4)  # ten rounds of Adam amplify rounding
    chex.assert_trees_all_close(rows.rounds, history.rounds, rtol=5e-3, atol=5e-4)


# ---- cadence and traces, on a cheap method -----------------------------------------------------------------------------


def counted(base=None):
    """FedAvg, or what is given, whose round counts how often it is traced."""
    base, traces = base or fedavg(mlp((strategies.FEATURES, 3)), optimizer=optax.sgd(0.1), batch=4), []

    def round(*args):
        traces.append(1)
        return base.round(*args)

    return base._replace(round=round), traces


def test_one_trace_per_simulate_however_rounds_fall():
    once, traces = counted()
    simulate(once, 5, DATA, KEY, rounds=1, cohort=2)
    least = len(traces)
    many, traces = counted()
    seen = []
    options = dict(cohort=2, test=TEST, eval_every=3, on_rounds=lambda done, info: seen.append((done, len(info.ids))))
    state, _ = simulate(many, 5, DATA, KEY, rounds=11, **options)
    assert len(traces) == least
    simulate(many, state, DATA, jax.random.key(1), rounds=7, **options)  # neither a new key nor a later round
    assert len(traces) == least
    done, rows = np.array(seen).T
    assert done[-1] == 18
    assert rows.sum() == 18
    assert (np.cumsum(rows) == done).all()


@functools.cache
def cheap():
    return fedavg(mlp((strategies.FEATURES, 3)), optimizer=optax.sgd(0.1), batch=4)


@settings(max_examples=8)
@given(first=st.integers(1, 4), rounds=st.integers(5, 9), every=st.sampled_from([2, 5]))
def test_evaluations_come_at_multiples_and_after_the_last_round(first, rounds, every):
    state, _ = simulate(cheap(), 5, DATA, KEY, rounds=first, eval_every=1)
    heard = []
    options = dict(
        test=TEST, eval_every=every, on_evaluation=lambda h: heard.append((h.rounds.ids.shape[0], h.evaluations))
    )
    _, history = simulate(cheap(), state, DATA, KEY, rounds=rounds, **options)
    last = first + rounds
    expected = [t for t in range(first + 1, last + 1) if t == last or t % every == 0]
    assert [e["round"] for e in history.evaluations] == expected
    assert [so_far for so_far, _ in heard] == [t - first for t in expected]
    chex.assert_trees_all_equal([e[-1] for _, e in heard], list(history.evaluations))
    assert history.rounds.ids.shape == (rounds, 5)
    assert set(history.evaluations[-1]["model"]) == {"accuracy", "loss"}


def test_without_eval_every_there_is_one_evaluation_and_without_examples_none():
    _, history = simulate(cheap(), 5, DATA, KEY, rounds=5, test=TEST)
    assert [e["round"] for e in history.evaluations] == [5]
    _, history = simulate(cheap(), 5, DATA, KEY, rounds=5)
    assert history.evaluations == ()


def test_a_population_starts_from_its_ids_and_is_padded_over_devices(eight_devices):
    alone, spread = init_state(algorithm(), 5, KEY), init_state(algorithm(8), 5, KEY)
    chex.assert_tree_shape_prefix(spread.clients, (8,))
    chex.assert_trees_all_close(jax.tree.map(lambda x: np.asarray(x)[:5], spread.clients), alone.clients, rtol=1e-6)
    kernel = spread.clients.teacher["dense_0"]["kernel"]
    assert {s.data.shape[0] for s in kernel.addressable_shards} == {1}


# ---- many seeds at once ------------------------------------------------------------------------------------------------

KEYS = jax.random.split(KEY, 3)


@functools.cache
def one_by_one():
    """A method that keeps client states, the list of its traces, and its runs."""
    kept, traces = counted(strategies.ALGORITHMS["fedavg, optimiser kept"](Layout(chunk=1)))
    return kept, traces, [simulate(kept, 5, DATA, key, rounds=5, cohort=2, test=TEST, eval_every=2) for key in KEYS]


@pytest.mark.parametrize("chunk", [1, 3])
def test_seeds_at_once_are_runs_one_by_one(chunk):
    """To the bit where one runs after another."""
    kept, traces, alone = one_by_one()
    before, seen, heard = len(traces), [], []
    state, histories = simulate_seeds(
        kept,
        5,
        DATA,
        KEYS,
        rounds=5,
        cohort=2,
        test=TEST,
        eval_every=2,
        on_rounds=lambda done, infos: seen.append((done, len(infos))),
        on_evaluation=lambda histories: heard.append([h.evaluations[-1] for h in histories]),
        layout=Layout(chunk=chunk),
    )
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-5)
    same = chex.assert_trees_all_equal if chunk == 1 else close
    for i, (expected, history) in enumerate(alone):
        same(one(state, i), jax.tree.map(np.asarray, expected))
        same(histories[i], history)
        chex.assert_trees_all_equal(tuple(evaluations[i] for evaluations in heard), histories[i].evaluations)
    assert len(histories) == 3
    assert seen[-1] == (5, 3)
    assert len(traces) - before <= 1  # none, unless JAX's caches were emptied between two tests


def test_seeds_over_devices_go_on(eight_devices):
    """Two devices for three seeds, 2 rounds and then 3; the states to go on from are not consumed."""
    kept, _, alone = one_by_one()
    run = functools.partial(simulate_seeds, kept, data=DATA, keys=KEYS, cohort=2, eval_every=3)
    run = functools.partial(run, layout=Layout(mesh=client_mesh(2), chunk=1))
    half, first = run(population=5, rounds=2)
    whole, second = run(population=half, rounds=3)
    for i, (expected, history) in enumerate(alone):
        rounds = jax.tree.map(lambda *x: np.concatenate(x), first[i].rounds, second[i].rounds)
        chex.assert_trees_all_close(one(whole, i), jax.tree.map(np.asarray, expected), rtol=1e-3, atol=1e-5)
        chex.assert_trees_all_close(rounds, history.rounds, rtol=1e-3, atol=1e-5)
    again, third = run(population=half, rounds=3)
    chex.assert_trees_all_equal((again, third), (whole, second))
    with pytest.raises(ValueError, match="population has 3 states; allowed: one for each of keys, 2"):
        simulate_seeds(kept, half, DATA, KEYS[:2], rounds=3)
    with pytest.raises(ValueError, match=r"algorithm\.layout has 2 devices; allowed: 1"):
        simulate_seeds(algorithm(2, 2), 5, DATA, KEYS, rounds=1)


def test_errors_name_the_argument_its_value_and_what_is_allowed():
    for match, population, options in [
        (r"rounds is 0; allowed: at least 1", 5, dict(rounds=0)),
        (r"population is 4; allowed: 5", 4, dict(rounds=1)),
        (r"cohort is 0; allowed: 1 to 5, the population", 5, dict(rounds=1, cohort=0)),
        (r"cohort is 6; allowed: 1 to 5, the population", 5, dict(rounds=1, cohort=6)),
        (r"eval_every is 0; allowed: at least 1", 5, dict(rounds=1, eval_every=0)),
        (r"test has 2 clients; allowed: 5", 5, dict(rounds=1, test=take_clients(TEST, np.arange(2)))),
    ]:
        with pytest.raises(ValueError, match=match):
            simulate(cheap(), population, DATA, KEY, **options)
        with pytest.raises(ValueError, match=match):
            simulate_seeds(cheap(), population, DATA, KEYS, **options)
    with pytest.raises(ValueError, match=r"population is 0; allowed: at least 1"):
        init_state(cheap(), 0, KEY)
