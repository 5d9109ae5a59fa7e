"""Laws of `fedkd_jax.cohort`: uniform cohorts, keys that depend on round and client only, states in and out."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import client_key, put, sample_cohort, take

KEY = jax.random.key(3)
CASES = [(1, 1), (5, 5), (10, 3), (9, 8), (40, 5), (41, 5), (1000, 7)]  # all of them, by permutation, by Floyd's method
sample = jax.jit(sample_cohort, static_argnums=(2, 3))


@functools.cache
def cohorts(population, cohort, rounds):
    return np.asarray(jax.jit(jax.vmap(lambda r: sample_cohort(KEY, r, population, cohort)))(jnp.arange(rounds)))


@pytest.mark.parametrize(("population", "cohort"), CASES)
@given(seed=strategies.seeds, round=st.integers(0, 10**6))
def test_a_cohort_is_distinct_sorted_and_in_range(population, cohort, seed, round):
    ids = np.asarray(sample(jax.random.key(seed), round, population, cohort))
    assert ids.shape == (cohort,)
    assert ids.dtype == np.int32
    assert (np.diff(ids) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < population


@pytest.mark.parametrize(("population", "cohort"), [(10, 3), (20, 2), (41, 5)])
def test_every_client_is_equally_likely(population, cohort):
    """Five standard deviations of a binomial count."""
    rounds, p = 20_000, cohort / population
    counts = np.bincount(cohorts(population, cohort, rounds).ravel(), minlength=population)
    assert np.abs(counts - rounds * p).max() < 5 * np.sqrt(rounds * p * (1 - p))


@pytest.mark.parametrize("population", [5, 20])
def test_every_pair_is_equally_likely(population):
    rounds = 20_000
    pairs = {pair: 0 for pair in itertools.combinations(range(population), 2)}
    for pair in map(tuple, cohorts(population, 2, rounds).tolist()):
        pairs[pair] += 1
    p = 1 / len(pairs)
    assert np.abs(np.array(list(pairs.values())) - rounds * p).max() < 5 * np.sqrt(rounds * p)


def test_rounds_draw_different_cohorts():
    assert len(set(map(tuple, cohorts(1000, 7, 50).tolist()))) == 50


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 2**31 - 1)), min_size=2, max_size=8, unique=True))
def test_keys_of_different_clients_or_rounds_differ(pairs):
    rounds, ids = np.array(pairs).T
    keys = jax.vmap(client_key, (None, 0, 0))(KEY, rounds, ids)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == len(pairs)
    for i, (round, client) in enumerate(pairs):  # one by one, and as documented
        assert bool(keys[i] == jax.random.fold_in(jax.random.fold_in(KEY, round), client))


class TakeAndPut(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @given(strategies.floats((6, 2)), strategies.floats((3, 2)), st.permutations(range(6)))
    def test_put_writes_the_cohort_and_nothing_else(self, population, cohort, order):
        ids = jnp.array(order[:3])
        tree = {"w": jnp.asarray(population), "n": jnp.arange(6)}
        new = {"w": jnp.asarray(cohort), "n": jnp.array([70, 80, 90])}
        out = self.variant(put)(tree, ids, new)
        chex.assert_trees_all_equal(self.variant(take)(out, ids), new)
        rest = jnp.array(order[3:])
        chex.assert_trees_all_equal(take(out, rest), take(tree, rest))
        np.testing.assert_array_equal(tree["w"], population)  # what was given is left as it was
        chex.assert_trees_all_equal(put(tree, ids, take(tree, ids)), tree)


def test_errors_name_the_argument_its_value_and_what_is_allowed():
    for cohort in (0, 4):
        with pytest.raises(ValueError, match=rf"cohort is {cohort}; allowed: 1 to 3, the population"):
            sample_cohort(KEY, 0, 3, cohort)
