"""Laws of `fedkd_jax.parallel`: however a cohort is laid out, the result is that of a Python loop."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import Layout, client_mesh, map_clients
from fedkd_jax.parallel import place

SHARED = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def train(own, steps, shared):
    """A ragged little training, so that clients differ in the number of steps: `(own, info), summand`."""

    def step(_, w):
        return w - 0.1 * jnp.tanh(w @ shared).sum() * shared.sum(axis=1)

    new = jax.lax.fori_loop(0, steps, step, own["w"])
    return ({"w": new}, {"norm": jnp.vdot(new, new), "steps": steps}), {"sum": new, "one": jnp.float32(1)}


@functools.cache
def mapped(chunk=None, devices=None):
    layout = Layout(mesh=None if devices is None else client_mesh(devices), chunk=chunk)
    return jax.jit(lambda own, steps: map_clients(train, (own, steps), (SHARED,), layout=layout))


one = jax.jit(lambda own, steps: train(own, steps, SHARED))


def loop(own, steps):
    results = [one({"w": own["w"][i]}, steps[i]) for i in range(len(steps))]
    outs = jax.tree.map(lambda *x: jnp.stack(x), *[out for out, _ in results])
    return outs, functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), [summand for _, summand in results])


@st.composite
def cohorts(draw, clients=5):
    return {"w": draw(strategies.floats((clients, 4), 2.0))}, np.array(
        draw(st.lists(st.integers(0, 4), min_size=clients, max_size=clients))
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, None])
@given(cohort=cohorts())
def test_chunked_equals_a_loop(chunk, cohort):
    out, expected = mapped(chunk)(*cohort), loop(*cohort)
    chex.assert_trees_all_close(out, expected, rtol=1e-5, atol=1e-5)
    assert float(out[1]["one"]) == 5  # padding is not counted
    if chunk == 1:
        chex.assert_trees_all_equal(out, expected)  # to the bit


@pytest.mark.parametrize("clients", [5, 8])
@pytest.mark.parametrize(("devices", "chunk"), [(1, None), (2, 2), (8, None), (8, 1)])
@given(data=st.data())
def test_sharded_equals_a_loop(eight_devices, devices, chunk, clients, data):
    cohort = data.draw(cohorts(clients))
    out = jax.block_until_ready(mapped(chunk, devices)(*cohort))
    chex.assert_trees_all_close(out, loop(*cohort), rtol=1e-5, atol=1e-5)
    assert float(out[1]["one"]) == clients


@pytest.mark.parametrize("chunk", [1, 4])
def test_states_are_written_in_the_place_of_the_old_ones(chunk):
    """What comes back like the first of `stacked` needs no memory beside it; what does not is the same."""
    own, steps = {"w": jnp.ones((64, 4, 500))}, jnp.arange(64)

    def run(own, steps, pack, like):
        new = lambda own, steps: (pack(({"w": (own["w"] + steps).astype(like)}, steps)), steps)  # noqa: E731
        return map_clients(new, (own, steps), layout=Layout(chunk=chunk))[0]

    def held(pack):
        jitted = jax.jit(run, donate_argnums=0, static_argnums=(2, 3))
        return jitted.lower(own, steps, pack, jnp.float32).compile().memory_analysis().temp_size_in_bytes

    assert held(tuple) < own["w"].nbytes / 4 < held(list)
    expected = own["w"] + steps[:, None, None]
    for pack, like in ((tuple, jnp.float32), (list, jnp.float32), (tuple, jnp.bfloat16)):
        new, also = run(own, steps, pack, like)
        chex.assert_trees_all_equal((new["w"], also), (expected.astype(like), steps))


def in_pairs(own, steps):
    return map_clients(train, (own, steps), (SHARED,), layout=Layout(chunk=2))


class Eager(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @given(cohorts())
    def test_with_jit_and_without(self, cohort):
        run = self.variant(in_pairs)
        chex.assert_trees_all_close(run(*cohort), loop(*cohort), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2])
@given(cohort=cohorts(), order=st.permutations(range(5)))
def test_permuting_the_cohort_permutes_what_comes_out(chunk, cohort, order):
    order = np.array(order)
    (outs, total), (moved, other) = mapped(chunk)(*cohort), mapped(chunk)(*jax.tree.map(lambda x: x[order], cohort))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[order], outs), moved, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(total, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
@given(cohort=cohorts(), i=st.integers(0, 4))
def test_a_broken_client_does_not_touch_its_neighbours(chunk, cohort, i):
    """The padding repeats the last client, so a broken last client must not reach the sum twice, or at all by 0 * NaN."""
    own, steps = cohort
    broken = {"w": own["w"].copy()}
    broken["w"][i] = np.nan
    (out, _), _ = mapped(chunk)(broken, steps)
    (clean, _), _ = mapped(chunk)(own, steps)
    np.testing.assert_array_equal(np.delete(out["w"], i, 0), np.delete(clean["w"], i, 0))
    assert np.isnan(out["w"][i]).all()


def test_padding_leaves_no_trace_even_where_its_result_is_not_finite():
    fn = lambda x: (x, {"inverse": 1 / x})  # noqa: E731
    _, total = map_clients(fn, (jnp.array([1.0, 2.0, 4.0]),), layout=Layout(chunk=2))
    assert float(total["inverse"]) == 1.75


@given(st.integers(1, 300), st.integers(1, 80))
def test_groups_hold_everybody_with_little_padding(clients, chunk):
    groups, size = Layout(chunk=chunk).groups(clients)
    assert 1 <= size <= chunk
    assert groups * size >= clients
    assert groups * size - clients < groups  # fewer surplus rows than groups
    assert size > min(chunk, clients) // 2
    assert groups * size <= -(-clients // chunk) * chunk


@given(st.integers(1, 300), st.integers(1, 2**22))
def test_on_a_cpu_a_chunk_fits_the_cache(cpu, clients, client_bytes):
    _, size = Layout().groups(clients, client_bytes)
    assert size == 1 or size * client_bytes <= 2**18


def test_where_things_lie(eight_devices):
    layout = Layout(mesh=client_mesh(8))
    assert (layout.devices, Layout().devices) == (8, 1)
    split, whole = place(jnp.arange(16.0), layout, "clients"), place(jnp.arange(16.0), layout)
    assert {s.data.shape for s in split.addressable_shards} == {(2,)}
    assert {s.data.shape for s in whole.addressable_shards} == {(16,)}
    assert layout.groups(9) == (2, 1)
    assert client_mesh().size == len(jax.devices())


def test_errors_name_the_argument_its_value_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"chunk is 0; allowed: at least 1"):
        Layout(chunk=0)
    with pytest.raises(ValueError, match=r"mesh has axes \('x',\); allowed: \('clients',\)"):
        Layout(mesh=jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)))
    for devices in (0, 10**6):
        with pytest.raises(ValueError, match=rf"devices is {devices}; allowed: 1 to {len(jax.devices())}"):
            client_mesh(devices)
