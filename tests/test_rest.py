"""Laws of `fedkd_jax.rest`: rounding at random to a neighbour, right in the mean; states that rest in half the bytes."""

import functools
import inspect

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import strategies
from hypothesis import given
from hypothesis.extra import numpy as hnp

from fedkd_jax import HostStore, fedkd, fml, init_state, local_only, mlp, stochastic_round
from fedkd_jax.rest import from_rest, to_rest

KEY = jax.random.key(31)
MOST = np.uint32(0x7F7F0000)  # bits of bfloat16's largest number, as a float32
bits = hnp.arrays(np.uint32, 64, elements=st.integers(0, 2**32 - 1))
rounded = jax.jit(stochastic_round)


def upper(x):
    """The bits of bfloat16s, so that NaN and subnormal numbers can be compared, too."""
    return np.asarray(x).view(np.uint16).astype(np.uint32)


@given(bits, strategies.seeds)
def test_what_is_rounded_becomes_one_of_its_neighbours(pattern, seed):
    x, got = pattern.view(np.float32), upper(rounded(pattern.view(np.float32), jax.random.key(seed)))
    below = pattern >> 16  # towards zero
    exact, nan = pattern % 2**16 == 0, np.isnan(x)
    assert ((got == below) | (got == below + 1))[~nan].all()
    assert (got == below)[exact & ~nan].all()
    assert ((got & 0x7F80 == 0x7F80) == ~np.isfinite(x)).all()  # neither made nor lost
    assert ((got & 0x7F != 0) == nan)[~np.isfinite(x)].all()
    beyond = (pattern & 0x7FFFFFFF > MOST) & np.isfinite(x)
    assert (got & 0x7FFF == MOST >> 16)[beyond].all()


@pytest.mark.parametrize(
    "pattern", [0, 0x80000000, 1, 0x7F7F0000, 0x7F7FFFFF, 0xFF7F8001, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF]
)
def test_the_edges_of_float32(pattern):
    test_what_is_rounded_becomes_one_of_its_neighbours.hypothesis.inner_test(np.full(64, pattern, np.uint32), 0)


@given(strategies.floats(64), strategies.seeds)
def test_the_mean_over_keys_is_what_was_rounded(x, seed):
    got = np.asarray(many_times(x, jax.random.key(seed)), np.float64)
    step = got.max(0) - got.min(0)  # of a neighbour to the other, 0 where there is one only
    assert (np.abs(got.mean(0) - x) <= 5 * step / 2 / np.sqrt(len(got)) + 2e-3 * np.abs(x) / 2**8).all()


@functools.cache
def _many():
    return jax.jit(lambda x, key: jax.vmap(stochastic_round, (None, 0))(x, jax.random.split(key, 1000)))


def many_times(x, key):
    return _many()(x, key)


def test_small_steps_arrive_which_rounding_to_the_nearest_would_lose():
    """A thousand rounds in which 1 grows by a 32nd of bfloat16's step."""

    def grow(i, kept):
        keys = jax.random.split(jax.random.fold_in(KEY, i), 2)
        wide = [x.astype(jnp.float32) + 2.0**-12 for x in kept]
        return stochastic_round(wide[0], keys[0]), wide[1].astype(jnp.bfloat16)

    one = jnp.ones(256, jnp.bfloat16)
    at_random, nearest = jax.jit(lambda: jax.lax.fori_loop(0, 1000, grow, (one, one)))()
    np.testing.assert_allclose(np.asarray(at_random, np.float64).mean(), 1 + 1000 / 2**12, rtol=0.01)
    assert (nearest == 1).all()


def test_only_arrays_of_float32_rest_and_come_back():
    tree = {"w": jnp.array([1.0, 1 + 2.0**-9]), "rate": jnp.float32(0.1), "count": jnp.arange(3), "none": ()}
    for key in (None, KEY):
        rested = to_rest(tree, jnp.bfloat16, key)
        assert [str(x.dtype) for x in jax.tree.leaves(rested)] == ["int32", "float32", "bfloat16"]
        back = from_rest(rested, "bfloat16")
        chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)
        chex.assert_trees_all_equal(to_rest(back, jnp.bfloat16, key), rested)  # a client that does not train stays
        chex.assert_trees_all_equal({**back, "w": tree["w"]}, tree)
    with pytest.raises(ValueError, match="has an array of float16; allowed: float32"):
        to_rest({"w": jnp.ones(2, jnp.float16)}, jnp.bfloat16)


# ---- in a method -------------------------------------------------------------------------------------------------------

FEATURES, TARGETS = strategies.FEATURES, strategies.TARGETS


def halves(tree):
    return [x.dtype == jnp.bfloat16 for x in jax.tree.leaves(tree) if x.ndim > 1]


def test_states_rest_in_half_the_bytes_and_what_is_asked_for_alone():
    options = dict(optimizer=optax.adam(0.05), batch=4)
    of = lambda **rest: local_only(mlp((FEATURES, 8, TARGETS)), **options, **rest)  # noqa: E731
    numbers, sizes = FEATURES * 8 + 8 + 8 * TARGETS + TARGETS, []
    for teacher, moments in [(4, 4), (2, 4), (4, 2), (2, 2)]:
        kinds = {4: jnp.float32, 2: "bfloat16"}
        own = of(teacher_dtype=kinds[teacher], moments_dtype=kinds[moments])
        clients = jax.eval_shape(lambda own=own: init_state(own, 5, KEY).clients)
        assert set(halves(clients.teacher)) == {teacher == 2}
        assert set(halves(clients.teacher_opt)) == {moments == 2}
        store = HostStore()
        store.open(own, KEY)
        sizes.append(store.row_bytes)
        assert (
            abs(store.row_bytes - numbers * (teacher + 2 * moments)) <= 8 * 14
        )  # each leaf begins at 8 bytes, and a count
    assert sizes[0] > 1.9 * sizes[3]


def test_bfloat16_at_rest_trains_as_well_as_float32():
    data, ids, losses, teachers, moved = strategies.small_data(), np.arange(5), [], [], []
    for rest in ("float32", "bfloat16"):
        own = local_only(mlp((FEATURES, 8, TARGETS)), optimizer=optax.adam(0.02), batch=4, **dtypes(rest))
        clients, run = own.init_clients(KEY, ids), jax.jit(own.round)
        server, info, first = own.init_server(KEY), None, from_rest(clients.teacher, "bfloat16")
        for _ in range(6):
            server, clients, info = run(server, clients, data, ids, KEY)
        losses.append(info.terms.teacher_task)
        teachers.append(from_rest(clients.teacher, rest))
        moved.append(optax.tree.norm(optax.tree.sub(teachers[-1], first)))
    np.testing.assert_allclose(*losses, rtol=0.1, atol=0.01)
    apart = optax.tree.norm(optax.tree.sub(*teachers))
    assert 0 < apart < 0.2 * min(moved)


def dtypes(rest):
    return dict(teacher_dtype=rest, moments_dtype=rest)


def test_float32_at_rest_is_the_default_and_fml_rests_like_fedkd():
    for method in (local_only, fedkd):
        defaults = {name: p.default for name, p in inspect.signature(method).parameters.items()}
        assert defaults["teacher_dtype"] is defaults["moments_dtype"] is jnp.float32
    tree = {"w": jnp.ones(2)}
    assert to_rest(tree, jnp.float32, KEY) is from_rest(tree, jnp.float32) is tree
    sgd = optax.sgd(0.1, momentum=0.9)
    own = fml(mlp((4, 2)), mlp((4, 2)), teacher_optimizer=sgd, student_optimizer=sgd, batch=2, **dtypes("bfloat16"))
    clients = jax.eval_shape(own.init_clients, KEY, np.arange(3))
    assert set(halves((clients.teacher, clients.teacher_opt))) == {True}


def test_errors_name_the_argument_its_value_and_what_is_allowed():
    for name in ("teacher_dtype", "moments_dtype"):
        with pytest.raises(ValueError, match=f"{name} is float16; allowed: float32, bfloat16"):
            local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2, **{name: jnp.float16})
        with pytest.raises(ValueError, match=f"{name} is int8; allowed: float32, bfloat16"):
            strategies.small_fedkd(**{name: jnp.int8})
