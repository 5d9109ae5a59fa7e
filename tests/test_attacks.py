"""Laws of `fedkd_jax.attacks`: who is hostile, and what they send or learn from."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import attacked, hostile_share, label_flip, scaled, sign_flip
from fedkd_jax.data import from_arrays, stack_clients

KEY = jax.random.key(3)
update = strategies.floats((2, 3)).map(lambda x: {"w": x, "b": x[0]})


@given(update, st.integers(1, 40))
def test_flipping_the_sign_twice_is_nothing_and_a_scale_scales(update, scale):
    flip = sign_flip()
    chex.assert_trees_all_equal(flip(flip(update, KEY), KEY), update)
    chex.assert_trees_all_equal(sign_flip(scale)(update, KEY), jax.tree.map(lambda x: -x * np.float32(scale), update))
    chex.assert_trees_all_equal(scaled(scale)(update, KEY), jax.tree.map(lambda x: x * np.float32(scale), update))


@pytest.mark.parametrize("scale", [0, -2.0, float("nan")])
def test_a_sign_is_not_flipped_by_a_negative_scale(scale):
    with pytest.raises(ValueError, match=r"scale is .*; allowed: a number in"):
        sign_flip(scale)


@given(strategies.floats((5, 3)), strategies.masks((5,)))
def test_only_the_hostile_attack(updates, bad):
    send = jax.jit(jax.vmap(attacked(sign_flip(10.0), lambda i: jnp.asarray(bad)[i]), in_axes=(0, 0, None)))
    expected = np.where(bad[:, None], -10 * updates, updates)
    np.testing.assert_array_equal(send({"w": updates}, np.arange(5), KEY)["w"], expected)


@given(st.sampled_from([1, 20, 101]), st.integers(0, 99), strategies.seeds)
def test_the_share_is_exact_and_who_is_hostile_is_a_function_of_the_id(population, percent, seed):
    hostile = hostile_share(percent / 100, population, seed=seed)
    ids = np.arange(population)
    who = np.asarray(hostile(ids))  # an id for an id
    assert who.sum() == percent * population // 100
    order = np.random.default_rng(seed).permutation(population)
    np.testing.assert_array_equal(hostile(order), who[order])
    np.testing.assert_array_equal(hostile_share(percent / 100, population, seed=seed)(ids), who)


def test_another_seed_draws_others():
    draws = {tuple(np.asarray(jax.vmap(hostile_share(0.5, 30, seed=s))(np.arange(30)))) for s in range(5)}
    assert len(draws) == 5


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_not_everybody_can_be_hostile(share):
    with pytest.raises(ValueError, match=r"share is .*; allowed: a number in \[0, 1\)"):
        hostile_share(share, 10)


@given(strategies.masks((5,)), strategies.seeds, st.integers(0, 5))
def test_labels_of_the_hostile_are_mirrored_and_nothing_else_is(bad, seed, unanswered):
    data = strategies.small_data(seed)
    data.labels[data.start[0] : data.start[0] + unanswered] = -1
    hostile = lambda i: jnp.asarray(bad)[i]  # noqa: E731
    flipped = label_flip(data, hostile, strategies.TARGETS)
    own = np.zeros(len(data.labels), bool)
    for i in np.flatnonzero(bad):
        own[data.start[i] : data.start[i] + data.count[i]] = True
    mirrored = np.where(data.labels < 0, data.labels, strategies.TARGETS - 1 - data.labels)
    np.testing.assert_array_equal(flipped.labels, np.where(own, mirrored, data.labels))
    chex.assert_trees_all_equal(dataclasses.replace(flipped, labels=data.labels), data)
    chex.assert_trees_all_equal(label_flip(flipped, hostile, strategies.TARGETS), data)


def test_a_label_beyond_the_classes_is_told():
    with pytest.raises(ValueError, match=r"classes is 1; allowed: [23] and more, for the labels of client 0"):
        label_flip(strategies.small_data(), lambda i: i == 0, 1)


def test_labels_of_a_source_and_of_stacked_clients_are_the_same():
    data, hostile = strategies.small_data(), lambda i: i % 2 == 0
    whole, ids = label_flip(data, hostile, strategies.TARGETS), np.array([4, 1, 2])
    taken = label_flip(from_arrays(data), hostile, strategies.TARGETS).take(ids)
    stacked = label_flip(stack_clients(data), hostile, strategies.TARGETS)
    for k, i in enumerate(ids):
        expected = whole.labels[whole.start[i] :][: whole.count[i]]
        np.testing.assert_array_equal(taken.labels[taken.start[k] :][: taken.count[k]], expected)
        np.testing.assert_array_equal(stacked.labels[i][: whole.count[i]], expected)
