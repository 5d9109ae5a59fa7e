"""Laws of `fedkd_jax.participation`: who takes part is fair and follows key, round and id; whoever is lost leaves no trace but
what is his own."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import (
    HostStore,
    Layout,
    Participation,
    Turn,
    available_by,
    available_with,
    init_state,
    local_steps,
    sample_cohort,
    simulate,
    take,
    unreliable,
)
from fedkd_jax.data import take_clients
from fedkd_jax.participation import sample_strata
from fedkd_jax.types import FederatedData

KEY = jax.random.key(5)
DATA, TEST = strategies.small_data(), strategies.small_data(1)
TRACE = np.random.default_rng(0).random((7, 5)) < 0.3  # in some rows fewer than two are there
HALF = available_with(0.5)

# ---- who is there ------------------------------------------------------------------------------------------------------

CASES = {  # population, cohort, strata, available
    "exact": (20, 3, 1, HALF),
    "few": (10, 4, 2, available_by(TRACE)),
    "asked": (1000, 4, 1, HALF),
    "hardly anybody": (1000, 4, 2, available_with(0.01)),
    "nobody": (400, 4, 1, lambda key, round, i: round < 0),
    "strata": (1000, 6, 3, None),
}


@functools.cache
def sampler(name):
    population, cohort, strata, available = CASES[name]
    draw = lambda key, round: sample_strata(key, round, population, cohort, strata, available)  # noqa: E731
    return jax.jit(draw), jax.jit(jax.vmap(lambda r: draw(KEY, r)))


@pytest.mark.parametrize("name", CASES)
@given(seed=strategies.seeds, round=st.integers(0, 10**6))
def test_a_cohort_is_of_those_who_are_there(name, seed, round):
    population, cohort, strata, available = CASES[name]
    key = jax.random.key(seed)
    ids, present = map(np.asarray, sampler(name)[0](key, round))
    assert (np.diff(ids) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < population
    np.testing.assert_array_equal(ids // (population // strata), np.repeat(np.arange(strata), cohort // strata))
    if available is None:
        assert present.all()
    else:
        there = np.array([bool(available(key, round, jnp.int32(i))) for i in ids])
        assert (there | ~present).all()
        if population <= 64 * cohort // strata:  # all are asked, so a place is empty only where nobody is left
            everybody = np.asarray(jax.vmap(lambda i: available(key, round, i))(jnp.arange(population)))
            some = everybody.reshape(strata, -1).sum(axis=1)
            np.testing.assert_array_equal(present.reshape(strata, -1).sum(axis=1), np.minimum(some, cohort // strata))


@pytest.mark.parametrize("name", ["exact", "asked", "strata"])
def test_everybody_who_is_there_is_equally_likely(name):
    """Five standard deviations of a binomial count; who is there is drawn anew in each round."""
    population, cohort, _, _ = CASES[name]
    rounds = 4_000
    ids, present = map(np.asarray, sampler(name)[1](jnp.arange(rounds)))
    assert present.all() or name == "exact"
    counts, p = np.bincount(ids[present], minlength=population), present.sum() / rounds / population
    assert np.abs(counts - rounds * p).max() < 5 * np.sqrt(rounds * p * (1 - p))
    assert present.sum() > 0.99 * rounds * cohort


def test_by_default_all_are_there_and_nothing_happens():
    ids, turn = Participation().draw(KEY, 3, 100, 5)
    assert turn is None
    np.testing.assert_array_equal(ids, sample_cohort(KEY, 3, 100, 5))


# ---- what they manage --------------------------------------------------------------------------------------------------


UNRELIABLE = jax.jit(unreliable(dropout=0.3, stragglers=0.5, spread=1.0))


@functools.cache
def drawn(first):
    everything = Participation(available=HALF, turn=UNRELIABLE, first=first)
    return jax.jit(lambda key, round: everything.draw(key, round, 9, 6))


@given(seed=strategies.seeds, round=st.integers(0, 9), first=st.sampled_from([1, 3, 6]))
def test_the_server_waits_for_the_first_of_those_who_send(seed, round, first):
    ids, turn = jax.device_get(drawn(first)(jax.random.key(seed), round))
    assert (turn.sends <= turn.present).all()
    assert (turn.counted <= turn.sends).all()
    assert turn.counted.sum() == min(first, turn.sends.sum())
    waited = turn.seconds[turn.counted].max(initial=0)
    assert (turn.seconds[turn.sends & ~turn.counted] >= waited).all()
    assert ((turn.work > 0) == turn.present).all()
    chex.assert_trees_all_equal_dtypes(
        turn, Turn(work=np.float32(0), sends=np.True_, seconds=np.float32(0), present=np.True_, counted=np.True_)
    )
    own = jax.device_get(UNRELIABLE(jax.random.key(seed), round, int(ids[0])))
    if turn.present[0]:  # of the client alone, whoever else is there
        np.testing.assert_allclose((turn.work[0], turn.seconds[0]), (own.work, own.seconds), rtol=1e-6)


def test_how_often_clients_fail_is_as_was_asked_for():
    n = 20_000
    turn = jax.vmap(lambda i: unreliable(dropout=0.2, stragglers=0.4, least=0.5, spread=0.7)(KEY, 1, i))(jnp.arange(n))
    near = lambda p: 5 * math.sqrt(p * (1 - p) / n)  # noqa: E731
    assert abs(float((~turn.sends).mean()) - 0.2) < near(0.2)
    assert abs(float((turn.work < 1).mean()) - 0.4) < near(0.4)
    part = np.asarray(turn.work)[np.asarray(turn.work) < 1]
    assert part.min() >= 0.5
    assert abs(part.mean() - 0.75) < 0.01
    assert abs(float(jnp.log(turn.seconds / turn.work).std()) - 0.7) < 0.02
    assert abs(np.corrcoef(turn.sends, turn.work)[0, 1]) < 5 / math.sqrt(n)
    later = jax.vmap(lambda i: unreliable(spread=0.7)(KEY, 2, i))(jnp.arange(5))
    np.testing.assert_allclose(later.seconds, (turn.seconds / turn.work)[:5], rtol=1e-6)  # a slow client stays slow


@given(count=st.integers(0, 12), tenths=st.integers(0, 10), steps=st.sampled_from([None, 5]))
def test_a_straggler_makes_a_share_of_its_steps(count, tenths, steps):
    data = FederatedData(
        inputs=jnp.zeros((12, 1)), labels=jnp.zeros(12, int), start=0, count=count, max_count=12, work=tenths / 10
    )
    made, _ = local_steps(lambda c, b, k: (c + 1, {"n": b.mask.mean()}), 0, data, KEY, batch=4, epochs=2, steps=steps)
    whole = 2 * math.ceil(count / 4) if steps is None else steps * (count > 0)
    assert int(made) == -(-whole * tenths // 10)


# ---- rounds ------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(name):
    algorithm = strategies.ALGORITHMS[name](Layout(chunk=1))
    return algorithm, jax.jit(algorithm.round), init_state(algorithm, 5, KEY)


def turn_of(work=(1.0,) * 5, sends=(True,) * 5, present=(True,) * 5, counted=(True,) * 5):
    sends, present, counted = (np.array(x, bool) for x in (sends, present, counted))
    work = np.array(work, np.float32) * present
    return Turn(work=work, sends=sends & present, seconds=work, present=present, counted=counted & sends & present)


def one_round(name, ids, turn=None):
    _, run, state = compiled(name)
    ids = np.array(ids)
    more = () if turn is None else (turn,)
    return run(state.server, take(state.clients, ids), take_clients(DATA, ids), ids, KEY, *more)


NAMES = ("fedkd, optimiser kept", "scaffold", "fedavg, top k", "feddropout", "centralised")


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_in_which_nothing_happens_changes_no_bit(name):
    plain, turned = one_round(name, range(5)), one_round(name, range(5), turn_of())
    chex.assert_trees_all_equal(plain[:2], turned[:2])
    chex.assert_trees_all_equal(plain[2], dataclasses.replace(turned[2], turn=()))


@pytest.mark.parametrize("name", NAMES)
@given(
    fate=st.lists(st.sampled_from(["counts", "counts", "lost", "late", "absent"]), min_size=5, max_size=5),
)
def test_whoever_is_lost_leaves_no_trace_with_others(name, fate):
    fate = np.array(fate)
    turn = turn_of(sends=fate != "lost", present=fate != "absent", counted=fate != "late")
    _, _, before = compiled(name)
    server, clients, info = one_round(name, range(5), turn)
    whole, everybody, all_of_it = one_round(name, range(5))
    there = np.flatnonzero(fate == "counts")
    if name != "centralised":  # as if only they had been asked; their sum has zeros in between
        np.testing.assert_array_equal(np.asarray(info.weight) > 0, fate == "counts")
        for i in range(5):
            mine = strategies.one(clients, i)
            goes_on = strategies.one(everybody if fate[i] != "absent" else before.clients, i)
            if fate[i] in ("lost", "late"):  # what belongs to the message is as it was
                old = strategies.one(before.clients, i)
                goes_on = dataclasses.replace(goes_on, codec=old.codec, control=old.control)
            chex.assert_trees_all_equal(mine, goes_on)
    sent, got = np.isin(fate, ["counts", "late"]), fate != "absent"
    np.testing.assert_array_equal(info.uplink_bytes, all_of_it.uplink_bytes * sent)
    if name not in ("fedavg, top k", "fedkd, optimiser kept"):  # whose downlink depends on what is in it
        np.testing.assert_array_equal(info.downlink_bytes, all_of_it.downlink_bytes * got)
    assert int(server.round) == 1
    if len(there) == 5:
        chex.assert_trees_all_equal(server, whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("there", [(0, 2, 4), (1,)])
def test_the_server_does_as_if_only_they_had_been_asked(name, there):
    fate = np.isin(np.arange(5), there)
    server, _, _ = one_round(name, range(5), turn_of(sends=fate))
    alone, _, _ = one_round(name, there)
    if name == "scaffold":  # c is the mean of all c_i: of fewer counted it moves less
        share = len(there) / 5
        expected = jax.tree.map(lambda c: share * c, alone.params.pop("control"))
        chex.assert_trees_all_close(server.params.pop("control"), expected, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(server, alone, rtol=1e-6, atol=1e-7)
    nobody, _, _ = one_round(name, range(5), turn_of(sends=[False] * 5))
    chex.assert_trees_all_close(nobody.params, compiled(name)[2].server.params, atol=1e-7)


# ---- runs --------------------------------------------------------------------------------------------------------------

EVERYTHING = Participation(
    available=available_by(TRACE), turn=unreliable(dropout=0.3, stragglers=0.5, spread=1.0), first=2
)


@functools.cache
def run(store=False, rounds=6, participation=EVERYTHING, cohort=3, **options):
    algorithm, _, _ = compiled("fedkd, optimiser kept")
    options = dict(rounds=rounds, cohort=cohort, test=TEST, participation=participation) | options
    return simulate(algorithm, 5, DATA, KEY, store=HostStore() if store else None, **options)


def test_where_states_are_changes_no_bit_and_who_was_not_there_has_none():
    (state, history), (other, rows) = run(), run(store=True)
    chex.assert_trees_all_equal(history.rounds, rows.rounds)
    chex.assert_trees_all_equal(history.evaluations, rows.evaluations)
    chex.assert_trees_all_equal(state.server, other.server)
    ids, turn = history.rounds.ids, history.rounds.turn
    assert not turn.present.all()
    assert len(other.clients) == len(np.unique(ids[turn.present]))
    for t in range(6):
        expected = jax.device_get(EVERYTHING.draw(jax.random.split(KEY)[1], t, 5, 3))
        chex.assert_trees_all_equal((ids[t], jax.tree.map(lambda x: x[t], turn)), expected)  # noqa: B023


def test_a_run_goes_on_as_if_it_had_not_stopped():
    half, _ = run(rounds=4)
    algorithm, _, _ = compiled("fedkd, optimiser kept")
    whole, _ = simulate(algorithm, half, DATA, KEY, rounds=2, cohort=3, participation=EVERYTHING)
    chex.assert_trees_all_equal(whole, run()[0])


@pytest.mark.parametrize(("group", "participation"), [(1, EVERYTHING), (2, None)])
def test_groups_change_nothing_but_the_order_of_a_sum(group, participation):
    how = dict(participation=participation)
    (state, history), (other, rows) = run(**how), run(store=True, group=group, **how)
    chex.assert_trees_all_close(rows.rounds, history.rounds, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(other.server, state.server, rtol=1e-5, atol=1e-6)
    everybody = jax.device_get(other.clients.take(np.arange(5)))
    chex.assert_trees_all_close(everybody, jax.device_get(state.clients), rtol=1e-5, atol=1e-6)
    ids, turn = history.rounds.ids, history.rounds.turn
    assert len(other.clients) == len(np.unique(ids if turn == () else ids[turn.present]))


def test_what_is_refused():
    for make, message in (
        (lambda: available_with(0.0), r"probability is 0.0; allowed: a number in \(0, 1\]"),
        (
            lambda: available_by(np.zeros((2, 3), bool)),
            r"trace is bool\[2, 3\], 0 true; allowed: bool\[T, G\], some true",
        ),
        (lambda: unreliable(dropout=1.5), r"dropout is 1.5; allowed: a number in \[0, 1\]"),
        (lambda: unreliable(least=0.0), r"least is 0.0; allowed: a number in \(0, 1\]"),
        (lambda: unreliable(spread=-1.0), r"spread is -1.0; allowed: a number in \[0, inf\)"),
        (lambda: Participation(first=0), "first is 0; allowed: at least 1"),
        (lambda: run(participation=Participation(first=4)), "first is 4; allowed: 1 to the cohort, 3"),
        (lambda: run(participation=Participation(strata=2)), "strata is 2; allowed: a divisor of the population, 5"),
        (lambda: run(group=2), "group is 2 without a store; allowed: None"),
        (lambda: run(store=True, group=0), "group is 0; allowed: at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    algorithm, _, _ = compiled("centralised")
    with pytest.raises(ValueError, match="group is 2 with a round that is not in two parts"):
        simulate(algorithm, 5, DATA, KEY, rounds=1, store=HostStore(), group=2)
