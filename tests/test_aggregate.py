"""Laws of `fedkd_jax.aggregate`: a weighted mean that can be added up in any grouping, and weights."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import example_weight, uniform_weight
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
