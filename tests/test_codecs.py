"""Laws of `fedkd_jax.codecs`: what arrives, and what it costs, against the paper's rule counted naively."""

import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import strategies
from hypothesis import assume, given
from hypothesis import strategies as st

from fedkd_jax import energy_threshold, identity_codec, matrix_view, payload_bytes, payload_floats, svd_codec
from fedkd_jax.codecs import compressible_by_rank, encode, init_codec, max_factored_rank

KEY = jax.random.key(0)
SHAPES = {"conv": (3, 3, 4, 8), "dense": (24, 20), "head": (20, 3), "pair": (2, 2), "bias": (20,), "gain": ()}


@st.composite
def updates(draw):
    """A tree of updates whose matrices have a drawn rank and noise, and a scale apart from each other."""
    rng, out = np.random.default_rng(draw(strategies.seeds)), {}
    for name, shape in SHAPES.items():
        x = rng.normal(size=shape)
        if len(shape) >= 2:
            m, n = int(np.prod(shape[:-1])), shape[-1]
            rank, noise = draw(st.integers(0, min(m, n))), draw(st.sampled_from([0.0, 1e-3, 1.0]))
            x = ((rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))) + noise * rng.normal(size=(m, n))).reshape(
                shape
            )
        out[name] = np.asarray(x * 10.0 ** draw(st.integers(-6, 3)), np.float32)
    return {"model": out}


@st.composite
def large_updates(draw):
    """Matrices of any rank under noise of any size, from those that go as a few directions to those that go raw."""
    rng, out = np.random.default_rng(draw(strategies.seeds)), {}
    for name, (m, n) in {"wide": (64, 96), "tall": (270, 264)}.items():
        rank, noise = draw(st.integers(0, 80)), draw(st.sampled_from([0.0, 0.01, 0.3]))
        decay = draw(st.sampled_from([1.0, 0.95, 0.7])) ** np.arange(rank)
        x = (rng.normal(size=(m, rank)) * decay) @ rng.normal(size=(rank, n)) + noise * rng.normal(size=(m, n))
        out[name] = x.astype(np.float32)
    return out


def over_rounds(hundredths):
    """A schedule that makes T an argument, so that one compilation serves all draws."""
    return hundredths / 100


@functools.cache
def jitted(method="auto"):
    codec = svd_codec(over_rounds, method=method)

    def both(update, hundredths):
        payload = codec.encode(update, hundredths, KEY)
        return payload, codec.decode(payload)

    return jax.jit(both)


thresholds = st.integers(40, 99)


def send(update, hundredths):
    """The oracle, for draws whose ranks float32 can decide."""
    arrived, cost = reference.send(
        jax.tree.map(lambda x: x.astype(np.float64), update), np.float32(hundredths) / np.float32(100)
    )
    assume(cost["margin"] > 1e-5)
    return arrived, cost


@pytest.mark.parametrize("method", ["gram", "svd"])
@given(update=updates(), hundredths=thresholds)
def test_what_arrives_and_what_it_costs_equals_numpy(method, update, hundredths):
    arrived, cost = send(update, hundredths)
    payload, decoded = jitted(method)(update, jnp.int32(hundredths))
    assert int(payload_floats(payload)) == cost["floats"]
    assert int(payload_bytes(payload)) == cost["bytes"]
    full = {"model/conv": 8, "model/dense": 20, "model/head": 3}
    assert {k: int(v) for k, v in payload.ranks.items()} == {
        k: full[k] if v is None else v for k, v in cost["ranks"].items()
    }
    for name, x in update["model"].items():
        y, expected = np.asarray(decoded["model"][name]), arrived["model"][name]
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        if cost["ranks"].get(f"model/{name}") is None:
            np.testing.assert_array_equal(y, x)  # raw decodes to exactly itself
        else:
            energy = np.sum(x.astype(np.float64) ** 2)
            distance = np.sum((x - y.astype(np.float64)) ** 2)
            assert distance <= (1 - hundredths / 100) * energy
            # equal singular values may be cut either way, so compare how far the two are from x
            np.testing.assert_allclose(
                distance / max(energy, 1e-30), np.sum((x - expected) ** 2) / max(energy, 1e-30), atol=1e-5
            )


@given(update=large_updates(), hundredths=thresholds)
def test_larger_matrices_cost_what_numpy_counts(update, hundredths):
    """By subspace iteration, with products of M^T M or of M, where these shapes allow it."""
    _, cost = send(update, hundredths)
    payload, decoded = jitted()(update, jnp.int32(hundredths))
    assert (int(payload.floats), int(payload.nbytes)) == (cost["floats"], cost["bytes"])
    for name, x in update.items():
        rank = cost["ranks"][name]
        assert int(payload.ranks[name]) == (min(x.shape) if rank is None else rank)
        lost = np.sum((x - np.asarray(decoded[name], np.float64)) ** 2)
        assert lost == 0 if rank is None else lost <= (1 - hundredths / 100) * np.sum(x.astype(np.float64) ** 2)


@given(updates(), thresholds)
def test_a_message_never_costs_more_than_the_update_itself(update, hundredths):
    payload, _ = jitted()(update, jnp.int32(hundredths))
    dense = identity_codec().encode(update, 0, KEY)
    assert int(dense.floats) == sum(int(np.prod(s)) for s in SHAPES.values())
    assert int(dense.nbytes) == 4 * int(dense.floats)
    assert 0 < int(payload.floats) <= int(dense.floats)
    assert 0 < int(payload.nbytes) <= int(dense.nbytes)
    assert payload.floats.dtype == payload.nbytes.dtype == jnp.int32


@given(updates(), thresholds, thresholds)
def test_cost_and_ranks_rise_with_the_threshold(update, a, b):
    low, high = (jitted()(update, jnp.int32(t))[0] for t in sorted((a, b)))
    assert int(low.floats) <= int(high.floats)
    assert int(low.nbytes) <= int(high.nbytes)
    assert all(int(low.ranks[k]) <= int(high.ranks[k]) for k in low.ranks)


class Schedules(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_schedule_is_read_at_the_round(self):
        update = {"w": np.diag(np.arange(30.0, 0, -1)).astype(np.float32)}
        scheduled = self.variant(svd_codec(energy_threshold(0.2, 0.6, 4)).encode)
        ranks = [int(scheduled(update, jnp.int32(t), KEY).ranks["w"]) for t in range(4)]
        assert ranks == [reference.exact_rank(update["w"], t) for t in np.linspace(0.2, 0.6, 4)]
        assert ranks == sorted(set(ranks))

    @chex.variants(with_jit=True, without_jit=True)
    @given(updates())
    def test_identity_is_identity(self, update):
        codec = identity_codec()
        payload = self.variant(codec.encode)(update, 0, KEY)
        chex.assert_trees_all_equal(self.variant(codec.decode)(payload), update)
        assert payload.ranks == {}


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_largest_rank_that_pays_is_found(m, n):
    pays = [k for k in range(1, min(m, n) + 1) if k * (m + n) + k * k < m * n]
    assert max_factored_rank(m, n) == max(pays, default=0)


def test_leaves_that_are_not_compressible_go_raw():
    update = {"embed": {"table": jnp.ones((30, 20))}, "dense": {"kernel": jnp.ones((30, 20))}}
    seen = {}

    def compressible(path, leaf):
        seen[path] = leaf.shape
        return not path.startswith("embed")

    payload = svd_codec(0.9, compressible=compressible).encode(update, 0, KEY)
    assert seen == {"embed/table": (30, 20), "dense/kernel": (30, 20)}
    assert {k: int(v) for k, v in payload.ranks.items()} == {"dense/kernel": 1}
    assert int(payload.floats) == 600 + 51
    assert int(payload.nbytes) == 4 * (600 + 50) + 4
    assert [compressible_by_rank("x", np.zeros((2,) * d)) for d in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_broken_leaf_goes_raw_and_the_others_do_not_notice(poison):
    whole = {"a": np.ones((24, 20), np.float32), "b": np.ones((24, 20), np.float32)}
    broken = dict(whole, a=whole["a"].copy())
    broken["a"][3, 4] = poison
    codec = svd_codec(0.9)
    payload = jax.jit(codec.encode)(broken, 0, KEY)
    assert {k: int(v) for k, v in payload.ranks.items()} == {"a": 20, "b": 1}
    decoded = codec.decode(payload)
    np.testing.assert_array_equal(decoded["a"], broken["a"])
    np.testing.assert_allclose(decoded["b"], broken["b"], rtol=1e-5)


def test_counts_follow_the_width_of_the_numbers():
    half = {"w": jnp.ones((30, 20), jnp.bfloat16)}
    assert int(identity_codec().encode(half, 0, KEY).nbytes) == 1200


def test_errors_name_the_argument_its_value_and_what_is_allowed():
    for bad in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"threshold is {bad}; allowed: .*\(0, 1\]"):
            svd_codec(bad)
    with pytest.raises(ValueError, match=r"update has 4000000000 bytes; allowed: at most 2147483647"):
        jax.eval_shape(lambda x: identity_codec().encode(x, 0, KEY), jax.ShapeDtypeStruct((10**9,), jnp.float32))
    with pytest.raises(ValueError, match=r"method is 'qr'; allowed"):
        svd_codec(0.9, method="qr").encode({"w": jnp.ones((9, 9))}, 0, KEY)


@pytest.mark.parametrize("name", ["svd", "identity"])
@given(update=updates(), weights=st.lists(st.floats(0, 5), min_size=3, max_size=3))
def test_adding_up_messages_equals_adding_up_what_they_decode_to(name, update, weights):
    encode, decode, decode_sum = jitted_sum(name)
    stacked = jax.tree.map(lambda x: np.stack([x, -2 * x, x[..., ::-1] if x.ndim else x]), update)
    weights = np.array(weights, np.float32)
    payloads = encode(stacked)
    each, total = decode(payloads), decode_sum(payloads, weights)
    expected = jax.tree.map(lambda x: np.tensordot(weights, np.asarray(x, np.float64), 1), each)
    for x, y in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * max(np.abs(y).max(), 1e-9))


@functools.cache
def jitted_sum(name):
    codec = svd_codec(0.8) if name == "svd" else identity_codec()
    encode = jax.jit(jax.vmap(lambda u: codec.encode(u, 0, KEY)))
    return encode, jax.jit(jax.vmap(codec.decode)), jax.jit(codec.decode_sum)


def test_matrices_of_one_shape_are_compressed_together_as_each_alone():
    rng = np.random.default_rng(0)
    layers = np.stack(
        [np.outer(rng.normal(size=24), rng.normal(size=20)), rng.normal(size=(24, 20)), np.zeros((24, 20))]
    )
    layers = layers.astype(np.float32)
    heads = layers[0].reshape(24, 4, 5)
    stacked = svd_codec(
        0.9, view=lambda path, leaf: matrix_view(leaf.shape, stack=leaf.ndim - 2 if "layers" in path else 0)
    )
    payload = stacked.encode(
        {"layers": layers, "dense": layers[1], "heads": heads, "bias": np.ones(3, np.float32)}, 0, KEY
    )
    assert {k: np.asarray(v).tolist() for k, v in payload.ranks.items()} == {
        "layers": [1, 20, 0],
        "dense": 20,
        "heads": 1,
    }
    decoded = stacked.decode(payload)
    np.testing.assert_array_equal(decoded["layers"][1], layers[1])
    np.testing.assert_allclose(decoded["layers"][0], layers[0], atol=1e-5)
    np.testing.assert_allclose(decoded["heads"], heads, atol=1e-5)
    alone = [svd_codec(0.9).encode({"w": x}, 0, KEY) for x in (*layers, layers[1], layers[0])]
    assert int(payload.floats) == sum(int(p.floats) for p in alone) + 3
    assert int(payload.nbytes) == sum(int(p.nbytes) for p in alone) + 12


def test_no_gradient_goes_through_and_straight_through_is_one_line():
    update, codec = (
        {"w": jnp.ones((24, 20)), "raw": jax.random.normal(KEY, (24, 20)), "bias": jnp.ones(3)},
        svd_codec(0.9),
    )

    def through(update):
        return codec.decode(codec.encode(update, 0, KEY))

    def straight(update):
        sent = jax.tree.map(lambda x, y: x + jax.lax.stop_gradient(y - x), update, through(update))
        return sum(jnp.sum(x) for x in jax.tree.leaves(sent))

    nothing = jax.grad(lambda u: sum(jnp.sum(x) for x in jax.tree.leaves(through(u))))(update)
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, update))
    chex.assert_trees_all_equal(jax.grad(straight)(update), jax.tree.map(jnp.ones_like, update))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_compiles_for_accelerators_without_one(platform):
    update = {
        "dense": jnp.zeros((128, 64)),
        "same": jnp.zeros((128, 64)),
        "conv": jnp.zeros((5, 5, 32, 64)),
        "bias": jnp.zeros(64),
        "large": jnp.zeros((300, 280)),
    }
    codec = svd_codec(energy_threshold(0.95, 0.98, 10))

    def many(updates):
        payloads = jax.vmap(lambda u: codec.encode(u, 0, KEY))(updates)
        return codec.decode_sum(payloads, jnp.ones(4)), payloads.nbytes

    updates = jax.tree.map(lambda x: jnp.stack([x] * 4), update)
    exported = jax.export.export(jax.jit(many), platforms=[platform])(updates)
    assert exported.platforms == (platform,)
    assert [x.shape for x in exported.out_avals] == [(64,), (5, 5, 32, 64), (128, 64), (300, 280), (128, 64), (4,)]
    text = exported.mlir_module()
    assert "lapack" not in text
    assert "gesvd" not in text  # which "svd" would be there
    assert ("cusolver_syevd" if platform == "cuda" else "Eigh") in text


@given(strategies.seeds, thresholds)
def test_a_warm_start_changes_no_rank_and_keeps_the_energy(seed, hundredths):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(96, 6)) @ rng.normal(size=(6, 64))
    cold, warm, init = jitted_warm()
    state = init({"w": base.astype(np.float32), "t": base.T.astype(np.float32)})
    chex.assert_shape([state["w"], state["t"]], (1, 24, 64))
    for step in (0.0, 0.3, 0.3, 3.0):
        x = (base := base + step * rng.normal(size=base.shape)).astype(np.float32)
        x[0] = 0
        update = {"w": x, "t": x.T.copy()}
        assume(reference.margin(x, np.float32(hundredths) / np.float32(100)) > 1e-5)
        (payload, state), expected = (
            warm(update, jnp.int32(hundredths), KEY, state),
            cold(update, jnp.int32(hundredths), KEY),
        )
        assert payload.ranks == expected.ranks
        assert (int(payload.floats), int(payload.nbytes)) == (int(expected.floats), int(expected.nbytes))
        decoded = svd_codec(0.9).decode(payload)
        for name in update:
            lost = np.sum((update[name] - np.asarray(decoded[name], np.float64)) ** 2)
            assert lost < (1 - hundredths / 100) * np.sum(x.astype(np.float64) ** 2)
        rank = int(payload.ranks["w"])
        used = 0 if rank > max_factored_rank(96, 64) else min(rank, 24)
        np.testing.assert_allclose(np.linalg.norm(state["w"][0], axis=1), np.arange(24) < used, atol=1e-3)


@functools.cache
def jitted_warm():
    codec = svd_codec(over_rounds, warm_start=True)
    return jax.jit(svd_codec(over_rounds).encode), jax.jit(codec.encode), codec.init


def test_a_codec_with_a_state_asks_for_its_own():
    codec, update = svd_codec(0.9, warm_start=True), {"w": jnp.ones((96, 64))}
    with pytest.raises(ValueError, match=r"state has the structure .* allowed: .*what init_codec"):
        encode(codec, update, 0, KEY, ())
    payload, state = encode(codec, update, 0, KEY, init_codec(codec, update))
    assert int(payload.ranks["w"]) == 1
    assert list(state) == ["w"]


def test_a_raw_leaf_decodes_to_exactly_itself():
    update = {"step": jnp.int32(2**24 + 1), "table": jnp.full((3, 1), 2**24 + 1), "zero": jnp.array([-0.0, 1.0])}
    decoded = svd_codec(0.9).decode(svd_codec(0.9).encode(update, 0, KEY))
    chex.assert_trees_all_equal(decoded, update)
    assert np.signbit(decoded["zero"][0])
    noise = np.random.default_rng(0).normal(size=(24, 20)).astype(np.float32)
    noise[0, 0], noise[0, 1] = -0.0, 1e-40  # a number below the normal ones
    decoded = np.asarray(svd_codec(0.9).decode(svd_codec(0.9).encode(noise, 0, KEY)))
    assert decoded.tobytes() == noise.tobytes()


def test_factors_of_a_narrow_leaf_travel_and_are_charged_as_narrow_numbers():
    update = {"w": jnp.outer(jnp.arange(1.0, 31), jnp.arange(1.0, 21)).astype(jnp.bfloat16)}
    payload = svd_codec(0.9).encode(update, 0, KEY)
    assert (int(payload.ranks["w"]), int(payload.nbytes)) == (1, 2 * 50 + 4)
    assert {x.dtype for x in (payload.content["w"].factors.left, payload.content["w"].factors.right)} == {
        jnp.dtype("bfloat16")
    }
    decoded = svd_codec(0.9).decode(payload)["w"]
    assert decoded.dtype == jnp.bfloat16
    np.testing.assert_allclose(decoded.astype(jnp.float32), update["w"].astype(jnp.float32), rtol=0.03)


def test_wide_leaves_travel_as_float32_factors_or_raw_as_they_are():
    """A process apart: `jax.enable_x64` as a context was once seen to be overlooked (float32 within it) in jax 0.10.2."""
    code = """
import chex, jax, jax.numpy as jnp, numpy as np
from fedkd_jax import svd_codec
noise = np.random.default_rng(0).normal(size=(270, 264))
update = {"low": jnp.ones((270, 264)), "noise": jnp.asarray(noise), "bias": jnp.ones(3)}
assert update["low"].dtype == jnp.float64
codec = svd_codec(0.9)
payload = jax.jit(codec.encode)(update, 0, jax.random.key(0))
stacked = jax.tree.map(lambda x: jnp.stack([x, x]), payload)
decoded, total = codec.decode(payload), jax.jit(codec.decode_sum)(stacked, jnp.array([1.0, 2.0], jnp.float32))
assert payload.floats.dtype == payload.nbytes.dtype == jnp.int32
assert int(payload.nbytes) == 4 * (270 + 264) + 4 + 8 * 270 * 264 + 8 * 3
chex.assert_trees_all_equal_shapes_and_dtypes(decoded, update)
np.testing.assert_array_equal(decoded["noise"], noise)
chex.assert_trees_all_close(total, jax.tree.map(lambda x: 3 * x, update), rtol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env={**os.environ, "JAX_ENABLE_X64": "1"})


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_what_float16_factors_cannot_hold_goes_raw(shape):
    codec, update = svd_codec(0.9), jnp.full(shape, 3e4, jnp.float16)
    payload = codec.encode(update, 0, KEY)
    chex.assert_tree_all_finite(payload.content)
    assert int(payload.nbytes) == 2 * 600
    chex.assert_trees_all_equal(codec.decode(payload), update)


@pytest.mark.parametrize("ranks", [(1, 2), (0, 30), (60, 1), (110, 3), (270, 2), (270, 0)])
def test_large_messages_are_added_up_however_many_columns_they_use(ranks):
    """One client more has a message that must not count."""
    rng = np.random.default_rng(0)
    shape, weights = (2, 270, 264), np.array([0.5, 2.0, 0.0], np.float32)
    updates = [rng.normal(size=(2, 270, k)) @ rng.normal(size=(2, k, 264)) for k in ranks]
    updates = np.stack([*updates, rng.normal(size=shape)]).astype(np.float32)
    payloads, total = jitted_large_sum()({"w": updates}, weights)
    most = max_factored_rank(270, 264)
    found = [264 if k > most else k for k in ranks]
    assert payloads.ranks["w"][:2].tolist() == [[k, k] for k in found]
    expected = np.einsum("k,k...->...", weights.astype(np.float64), updates.astype(np.float64))
    np.testing.assert_allclose(total["w"], expected, atol=2e-4 * np.abs(expected).max())
    decoded = svd_codec(0.99999).decode(strategies.one(payloads, 0))
    np.testing.assert_allclose(decoded["w"], updates[0], atol=5e-3 * max(np.abs(updates[0]).max(), 1.0))


@functools.cache
def jitted_large_sum():
    codec = svd_codec(0.99999, view=lambda path, leaf: matrix_view(leaf.shape, stack=1))

    def run(updates, weights):
        payloads = jax.vmap(lambda u: codec.encode(u, 0, KEY))(updates)
        return payloads, codec.decode_sum(payloads, weights)

    return jax.jit(run)


def test_a_warm_start_does_not_miss_a_new_direction():
    """Of matrices large enough for products with M itself: the new direction is orthogonal to all that was sent before."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, 8)))[0] for size in (270, 264))
    old = ((u[:, :7] * 0.9 ** np.arange(7)) @ v[:, :7].T).astype(np.float32)
    codec = svd_codec(0.9, warm_start=True)
    encode = jax.jit(codec.encode)
    _, state = encode({"w": old}, 0, KEY, codec.init({"w": old}))
    for size in (0.01, 0.3, 1.0, 30.0):
        new = old + np.float32(size) * np.outer(u[:, 7], v[:, 7]).astype(np.float32)
        payload, _ = encode({"w": new}, 0, KEY, state)
        assert int(payload.ranks["w"]) == reference.exact_rank(new, 0.9)
