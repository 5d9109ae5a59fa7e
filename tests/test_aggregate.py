"""Laws of `fedkd_jax.aggregate`: a weighted mean that can be added up in any grouping, weights, and what withstands hostile
clients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import clip_update, coordinate_median, example_weight, trimmed_mean, uniform_weight
from fedkd_jax.aggregate import all_finite, weighted_mean, weighted_sum

K = 4
values = strategies.floats((K, 3))
weights = st.lists(st.integers(0, 50), min_size=K, max_size=K).map(lambda w: np.array(w, np.float32))


def summed(updates, weights, order=tuple(range(K)), cut=2):
    """In two groups."""
    updates, weights = jnp.asarray(updates)[jnp.array(order)], jnp.asarray(weights)[jnp.array(order)]
    parts = [(weighted_sum({"w": updates[g]}, weights[g]), weights[g].sum()) for g in (slice(cut), slice(cut, None))]
    return jax.tree.map(jnp.add, *parts)


class Means(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @given(values, weights)
    def test_the_mean_equals_numpy_and_is_zero_without_weights(self, updates, weights):
        mean = self.variant(lambda u, w: weighted_mean(summed(u, w)))(updates, weights)["w"]
        expected = np.average(updates.astype(np.float64), axis=0, weights=weights) if weights.any() else np.zeros(3)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    @given(values, weights, st.integers(0, K - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
    def test_weight_zero_hides_whatever_the_update_holds(self, updates, weights, i, poison):
        weights[i] = 0
        mean = self.variant(lambda u, w: weighted_mean(summed(u, w)))
        broken = updates.copy()
        broken[i] = poison
        chex.assert_trees_all_equal(
            mean(broken, weights), mean(np.where(np.arange(K)[:, None] == i, 0, updates), weights)
        )


@given(values, weights, st.permutations(range(K)), st.integers(0, K))
def test_clients_can_be_added_up_in_any_order_and_grouping(updates, weights, order, cut):
    a, b = weighted_mean(summed(updates, weights)), weighted_mean(summed(updates, weights, order, cut))
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)


@given(values, st.integers(1, 50))
def test_equal_weights_give_the_plain_mean(updates, weight):
    mean = weighted_mean(summed(updates, np.full(K, weight, np.float32)))["w"]
    np.testing.assert_allclose(mean, updates.mean(0), rtol=1e-4, atol=1e-5)


@given(strategies.seeds)
def test_many_narrow_messages_are_added_up_in_float32(seed):
    updates = jax.random.uniform(jax.random.key(seed), (300, 5), jnp.bfloat16)
    add = jax.jit(lambda total, update: jax.tree.map(jnp.add, total, weighted_sum(update[None], jnp.ones(1))))
    total = functools.reduce(add, updates, jnp.zeros(5))
    np.testing.assert_allclose(total, updates.astype(jnp.float32).sum(0), rtol=1e-5)
    assert weighted_sum(updates, jnp.ones(300)).dtype == jnp.float32


@given(st.integers(0, 10**6))
def test_weights_of_a_client(count):
    assert float(example_weight(jnp.int32(count))) == count
    assert float(uniform_weight(jnp.int32(count))) == float(count > 0)
    assert example_weight(jnp.int32(count)).dtype == uniform_weight(jnp.int32(count)).dtype == jnp.float32


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@given(st.integers(0, 5))
def test_one_number_that_is_not_finite_is_found(poison, entry):
    tree = {"a": np.zeros(3, np.float32), "b": [np.zeros(3, np.float32)], "steps": np.int32(3), "none": ()}
    assert all_finite(tree)
    (tree["a"] if entry < 3 else tree["b"][0])[entry % 3] = poison
    assert not all_finite(tree)
    assert all_finite({"steps": np.int32(3)})
    assert all_finite(())


# ---- where clients are not trusted -------------------------------------------------------------------------------------

FIVE = strategies.floats((5, 3))
counted = strategies.masks((5,))
ROBUST = {
    "median": (jax.jit(coordinate_median), lambda x: np.median(x, axis=0), lambda n: (n - 1) // 2),
    **{
        f"trimmed {share}": (
            jax.jit(trimmed_mean(share)),
            lambda x, share=share: scipy.stats.trim_mean(x, share, axis=0),
            lambda n, share=share: int(share * n),
        )
        for share in (0.0, 0.2, 0.375)
    },
}
every = pytest.mark.parametrize("name", ROBUST)


def with_poison(updates, counted):
    """As a PyTree with leaves of two ranks; who is not counted holds anything."""
    updates = np.where(counted[:, None], updates, np.array([np.nan, np.inf, -3e38], np.float32))
    return {"matrix": updates.reshape(5, 1, 3), "number": updates[:, 0]}


@every
@given(FIVE, counted)
def test_medians_and_trimmed_means_are_numpys_of_those_who_are_counted(name, updates, counted):
    combine, oracle, _ = ROBUST[name]
    got = combine(with_poison(updates, counted), counted * np.float32(7.0))
    expected = oracle(updates[counted].astype(np.float64)) if counted.any() else np.zeros(3)
    np.testing.assert_allclose(got["matrix"], expected[None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["number"], expected[0], rtol=1e-5, atol=1e-6)


@every
@given(FIVE, counted, st.permutations(range(5)))
def test_the_order_of_the_cohort_changes_no_bit(name, updates, counted, order):
    combine, _, _ = ROBUST[name]
    whole, order, weights = with_poison(updates, counted), np.array(order), counted.astype(np.float32)
    permuted = combine(jax.tree.map(lambda x: x[order], whole), weights[order])
    chex.assert_trees_all_equal(combine(whole, weights), permuted)


@every
@given(FIVE, st.permutations(range(5)), st.sampled_from([-3e38, -50.0, 50.0, 3e38]), st.integers(3, 5))
def test_a_few_hostile_clients_cannot_leave_the_range_of_the_others(name, updates, order, evil, n):
    combine, _, withstands = ROBUST[name]
    counted = np.arange(5) < n
    bad = np.isin(np.arange(5), [i for i in order if i < n][: withstands(n)])
    got = combine(np.where(bad[:, None], np.float32(evil), updates), counted.astype(np.float32))
    honest = updates[counted & ~bad]
    assert (got >= honest.min(0) - 1e-5).all()
    assert (got <= honest.max(0) + 1e-5).all()


@every
@given(FIVE, strategies.masks((5, 3)))
def test_each_number_can_be_counted_by_itself(name, updates, counted):
    combine, _, _ = ROBUST[name]
    together = combine({"w": updates}, {"w": counted.astype(np.float32)})["w"]
    for i in range(3):
        alone = combine({"w": updates[:, i : i + 1]}, counted[:, i].astype(np.float32))["w"]
        np.testing.assert_array_equal(together[i : i + 1], alone)


@pytest.mark.parametrize("share", [-0.1, 0.5, float("nan")])
def test_a_share_that_leaves_nobody_is_an_error(share):
    with pytest.raises(ValueError, match=r"share is .*; allowed: .*\[0, 0.5\)"):
        trimmed_mean(share)


clip_to = jax.jit(lambda update, norm: clip_update(2.0)(optax.tree.scale(norm, update)))


@given(strategies.floats((4, 3)), st.integers(-9, 20).map(lambda n: 2.0**n))
def test_a_clipped_update_has_the_bound_as_norm_and_keeps_its_direction(values, scale):
    update = {"w": values, "b": values[0]}
    whole = jax.tree.map(lambda x: x.astype(np.float64) * scale, update)
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(whole)))
    got = clip_to(update, np.float32(scale))
    assert np.sqrt(sum((np.float64(x) ** 2).sum() for x in got.values())) <= 2.0 * (1 + 5e-6)
    expected = jax.tree.map(lambda x: x * min(1.0, 2.0 / max(norm, 1e-30)), whole)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    if norm < 1.99:
        chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x * np.float32(scale), update))


def test_an_update_beyond_float32_is_no_longer_than_the_bound():
    assert float(optax.tree.norm(clip_update(2.0)(jnp.full(9, 3e38)))) <= 2.0


@pytest.mark.parametrize("norm", [0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_is_none_is_an_error(norm):
    with pytest.raises(ValueError, match=r"max_norm is .*; allowed: a number in"):
        clip_update(norm)
