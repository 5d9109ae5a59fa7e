"""Laws of codecs other than FedKD's own: what arrives, what it costs, and that nothing is lost where errors are fed back."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax import (
    Payload,
    chain,
    error_feedback,
    identity_codec,
    power_codec,
    quantise,
    server_sketch_codec,
    sketch_codec,
    svd_codec,
    top_k,
)
from fedkd_jax.codecs import encode, init_codec, sketch, unsketch

KEY = jax.random.key(3)
SHAPES = {"dense": (24, 20), "head": (20, 3), "bias": (20,), "gain": ()}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
COUNT = {"bits 2": 2, "bits 4": 4, "bits 8": 8, "bits 16": 16}


@st.composite
def updates(draw, scales=st.integers(-3, 3)):
    rng = np.random.default_rng(draw(strategies.seeds))
    out = {
        name: np.asarray(rng.normal(size=shape) * 10.0 ** draw(scales), np.float32) for name, shape in SHAPES.items()
    }
    rank = draw(st.integers(1, 20))
    out["dense"] = (rng.normal(size=(24, rank)) @ rng.normal(size=(rank, 20))).astype(np.float32)
    return out


@functools.cache
def sender(name):
    codec = CODECS[name]()
    return (
        codec,
        jax.jit(lambda update, round, key, state: encode(codec, update, round, key, state)),
        jax.jit(codec.decode),
    )


CODECS = {
    **{name: functools.partial(quantise, bits) for name, bits in COUNT.items()},
    "top": lambda: top_k(0.2),
    "power": lambda: power_codec(3),
    "svd, 8 bits": lambda: chain(svd_codec(0.9), quantise(8)),
    "top, 8 bits": lambda: chain(top_k(0.2), quantise(8)),
    "power, 8 bits": lambda: chain(power_codec(3), quantise(8)),
}


def send(name, update, key=KEY, round=0, state=None):
    codec, run, decode = sender(name)
    payload, state = run(update, round, key, init_codec(codec, update) if state is None else state)
    return payload, decode(payload), state


@pytest.mark.parametrize("name", CODECS)
@given(update=updates())
def test_what_arrives_is_an_update_and_costs_what_it_says(name, update):
    payload, arrived, _ = send(name, update)
    assert isinstance(payload, Payload)
    chex.assert_trees_all_equal_shapes_and_dtypes(arrived, jax.tree.map(jnp.asarray, update))
    chex.assert_tree_all_finite(arrived)
    assert 0 < payload.nbytes <= 4 * SIZE + 4 * len(SHAPES)
    assert payload.floats > 0
    _, zero, _ = send(name, jax.tree.map(np.zeros_like, update))
    assert not any(x.any() for x in jax.tree.leaves(zero))


# ---- small integers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNT)
@given(update=updates(), seed=strategies.seeds)
def test_numbers_go_to_a_neighbour_on_their_leafs_grid(name, update, seed):
    bits = COUNT[name]
    payload, arrived, _ = send(name, update, jax.random.key(seed))
    for x, y in zip(jax.tree.leaves(update), jax.tree.leaves(arrived), strict=True):
        step = np.abs(x).max() / (2 ** (bits - 1) - 1)
        assert np.abs(np.float64(x) - y).max() <= step * (1 + 1e-4) + 1e-30
        np.testing.assert_allclose(np.asarray(y) / step, np.round(np.asarray(y) / step), atol=1e-2)
        assert np.abs(y).max() <= np.abs(x).max() * (1 + 1e-6)
    assert payload.nbytes == sum(-(-x.size * bits // 8) + 4 for x in jax.tree.leaves(update))
    assert payload.floats == SIZE


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_right_on_average(bits):
    x, codec = np.linspace(-1, 1, 41, dtype=np.float32), quantise(bits)
    arrived = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, 0, key))))(jax.random.split(KEY, 4000))
    deviation = arrived.std(0) / np.sqrt(4000)
    assert (np.abs(arrived.mean(0) - x) < 5 * deviation + 1e-6).all()


def test_one_sender_rounds_differently_each_time():
    update = {name: np.full(shape, 0.3, np.float32) for name, shape in SHAPES.items()}
    update["dense"][0, 0] = 1.0
    one, other = (send("bits 2", update, jax.random.key(seed))[1] for seed in (1, 2))
    assert (one["dense"] != other["dense"]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad):
    update = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    update["dense"][1, 2] = bad
    for name in ("bits 8", "svd, 8 bits"):
        assert not np.isfinite(send(name, update)[1]["dense"]).all()


@functools.cache
def plain_factors():
    plain = svd_codec(0.9)

    def run(update):
        payload = plain.encode(update, 0, KEY)
        return payload, plain.decode(payload)

    return jax.jit(run)


@settings(max_examples=10)
@given(update=updates())
def test_factors_may_be_sent_as_integers(update):
    """The chain costs a quarter of the factors, and 4 bytes for the scale of each array; what arrives is near what they say."""
    first, decoded = plain_factors()(update)
    payload, arrived, _ = send("svd, 8 bits", update)
    assert payload.floats == first.floats
    assert payload.ranks == first.ranks
    counts = [int(count) for count in jax.tree.leaves(first.sent)]
    is_number = [jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(first.content)]
    numbers = [count for count, of_floats in zip(counts, is_number, strict=True) if of_floats]
    ranks = sum(counts) - sum(numbers)
    assert first.nbytes == 4 * sum(numbers) + 4 * ranks
    assert payload.nbytes == sum(numbers) + 4 * sum(count > 0 for count in numbers) + 4 * ranks
    for x, y in zip(jax.tree.leaves(decoded), jax.tree.leaves(arrived), strict=True):
        assert np.abs(x - y).max() <= 0.1 * np.abs(x).max() + 1e-6


def test_only_what_can_shorten_a_message_follows_in_a_chain():
    with pytest.raises(ValueError, match=r"codec 1 of the chain has no recode; allowed after the first: quantise"):
        chain(svd_codec(0.9), top_k(0.1))
    for bits in (1, 17):
        with pytest.raises(ValueError, match=rf"bits is {bits}; allowed: 2 to 16"):
            quantise(bits)
    with pytest.raises(ValueError, match=r"rank is 0; allowed: at least 1"):
        power_codec(0)
    assert chain(identity_codec()).decode(chain(identity_codec()).encode(np.ones(3), 0, KEY)).tolist() == [1, 1, 1]


# ---- few numbers -------------------------------------------------------------------------------------------------------


@given(update=updates())
def test_the_largest_numbers_arrive_exactly(update):
    payload, arrived, _ = send("top", update)
    flat, got = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (update, arrived))
    k = -(-SIZE // 5)
    assert payload.floats == 2 * k
    assert payload.nbytes == 8 * k
    kept = got != 0
    np.testing.assert_array_equal(got[kept], flat[kept])
    assert kept.sum() == k
    assert np.abs(flat[kept]).min() >= np.abs(flat[~kept]).max()


@pytest.mark.parametrize("name", ["top", "power", "bits 2", "svd, 8 bits"])
@settings(max_examples=5)
@given(seed=strategies.seeds)
def test_with_feedback_everything_arrives_in_the_end(name, seed):
    """What was sent in all, and the error that is left, are what was to be sent."""
    rng, codec = np.random.default_rng(seed), error_feedback(CODECS[name]())
    draw = lambda: {n: np.asarray(rng.normal(size=shape), np.float32) for n, shape in SHAPES.items()}  # noqa: E731
    run = feedback(name)
    state = codec.init(draw())
    wanted = arrived = jax.tree.map(lambda shape: np.zeros(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    for t in range(4):
        update = draw()
        decoded, state = run(update, t, jax.random.fold_in(KEY, t), state)
        wanted, arrived = (jax.tree.map(np.add, a, b) for a, b in ((wanted, update), (arrived, decoded)))
    total = jax.tree.map(np.add, arrived, state["error"])
    chex.assert_trees_all_close(total, wanted, rtol=1e-3, atol=1e-3)


@functools.cache
def feedback(name):
    codec = error_feedback(CODECS[name]())

    def run(update, t, key, state):
        payload, state = codec.encode(update, t, key, state)
        return codec.decode(payload), state

    return jax.jit(run)


def test_feedback_finds_what_is_small_but_steady():
    codec, state = error_feedback(top_k(0.5)), {"error": np.zeros(2, np.float32), "codec": ()}
    seen = np.zeros(2)
    for t in range(10):
        payload, state = codec.encode(np.array([1.0, 0.3], np.float32), t, KEY, state)
        seen += codec.decode(payload)
    np.testing.assert_allclose(seen + state["error"], [10, 3], rtol=1e-5)
    assert seen[1] > 1.5


# ---- a given rank ------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=strategies.seeds, rank=st.integers(1, 6))
def test_the_power_method_is_exact_up_to_its_rank_and_then_better_each_time(seed, rank):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(24, rank)) @ rng.normal(size=(rank, 20))
    update = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()} | {"dense": np.float32(matrix)}
    errors, state = [], None
    for _ in range(30):
        payload, arrived, state = send("power", update, state=state)
        errors.append(np.linalg.norm(arrived["dense"] - matrix) / np.linalg.norm(matrix))
    assert payload.floats == 3 * (24 + 20) + 3 * 20 + 20 + 1  # the head goes raw: 3 (20 + 3) is no less than 60
    if rank <= 3:
        assert errors[0] < 1e-4
    best = np.sqrt((np.linalg.svd(matrix, compute_uv=False)[3:] ** 2).sum()) / np.linalg.norm(matrix)
    assert best - 1e-4 <= errors[-1] <= errors[0] + 1e-4
    assert errors[-1] <= 1.1 * best + 1e-3


# ---- sketches ----------------------------------------------------------------------------------------------------------


sketched = jax.jit(sketch, static_argnums=(1, 2, 3))
unsketched = jax.jit(unsketch, static_argnums=1)


@given(seed=strategies.seeds)
def test_sketches_add_up(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 200)).astype(np.float32)
    whole = sketched(2 * x - y, 3, 40)
    np.testing.assert_allclose(whole, 2 * sketched(x, 3, 40) - sketched(y, 3, 40), rtol=1e-4, atol=1e-4)
    assert (sketched(x, 3, 40, 1) != sketched(x, 3, 40)).any()


def test_a_sketch_without_jit_is_the_same():
    x = np.random.default_rng(0).normal(size=200).astype(np.float32)
    np.testing.assert_allclose(sketch(x, 3, 40), sketched(x, 3, 40), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        unsketch(sketched(x, 3, 40), 200), unsketched(sketched(x, 3, 40), 200), rtol=1e-4, atol=1e-5
    )


@settings(max_examples=20)
@given(seed=strategies.seeds)
def test_a_sketch_knows_the_heavy_numbers(seed):
    rng = np.random.default_rng(seed)
    x = 0.01 * rng.normal(size=1000).astype(np.float32)
    heavy = rng.choice(1000, 5, replace=False)
    x[heavy] = 10 * rng.choice([-1, 1], 5)
    guess = np.asarray(unsketched(sketched(x, 7, 200), 1000))
    assert set(np.argsort(-np.abs(guess))[:5]) == set(heavy)
    np.testing.assert_allclose(guess[heavy], x[heavy], atol=0.5)


@functools.cache
def server_sketches(rows, columns, momentum):
    up, down = sketch_codec(rows, columns), server_sketch_codec(rows, columns, 0.1, momentum=momentum)
    answer = jax.jit(lambda message, t, state: down.encode(message, t, KEY, state))
    return jax.jit(lambda update: up.decode(up.encode(update, 0, KEY))), answer, jax.jit(down.decode)


@settings(max_examples=10)
@given(seed=strategies.seeds, momentum=st.sampled_from([0.0, 0.5]))
def test_the_server_sends_what_it_finds_and_forgets_the_cells_where_it_was(seed, momentum):
    rng, rows, columns = np.random.default_rng(seed), 5, 60
    down = server_sketch_codec(rows, columns, 0.1, momentum=momentum)
    like = {"a": np.zeros((10, 8), np.float32), "b": np.zeros(20, np.float32)}
    state, (send, answer, read) = down.init(like), server_sketches(rows, columns, momentum)
    for t in range(3):
        update = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)
        message = send(update)
        moving = momentum * np.asarray(state["momentum"]) + np.asarray(message.table)
        error = np.asarray(state["error"]) + moving
        payload, state = answer(message, t, state)
        arrived = read(payload)
        chex.assert_trees_all_equal_shapes_and_dtypes(arrived, jax.tree.map(jnp.asarray, like))
        flat = np.concatenate([np.ravel(arrived["a"]), np.ravel(arrived["b"])])
        found = np.asarray(unsketched(jnp.asarray(error), 100))
        sent = np.flatnonzero(flat)  # of numbers that share their cells, the same as it chose
        np.testing.assert_allclose(np.sort(np.abs(flat))[-10:], np.sort(np.abs(found))[-10:], rtol=1e-4, atol=1e-5)
        assert np.count_nonzero(flat) <= 10
        assert payload.nbytes == 80
        numbers = np.zeros(100, np.float32)
        numbers[sent] = rng.uniform(1, 2, len(sent))
        hit = np.asarray(sketched(numbers, rows, columns)) != 0
        for name, before in (("momentum", moving), ("error", error)):
            np.testing.assert_allclose(state[name], np.where(hit, 0, before), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.125])
def test_what_the_server_has_not_sent_stays_bounded(share):
    """Also where it sends more numbers than a row has columns."""
    size, rows, columns = 2000, 5, 100
    down = server_sketch_codec(rows, columns, share)
    rng, like = np.random.default_rng(0), np.zeros(size, np.float32)
    up, state = sketch_codec(rows, columns), down.init(like)

    @jax.jit
    def step(update, t, state):
        return down.encode(up.decode(up.encode(update, t, KEY)), t, KEY, state)[1]

    norms = []
    for t in range(60):
        state = step(rng.normal(size=size).astype(np.float32), t, state)
        norms.append(float(jnp.linalg.norm(state["error"])))
    assert max(norms[30:]) < 10 * max(norms[:10])


def test_a_message_of_few_numbers_never_costs_more_than_all_of_them():
    update = {"w": np.ones((10, 10), np.float32)}
    for share, cost in ((0.07, 7 * 8), (0.3, 30 * 8), (0.8, 400), (1.0, 400)):
        codec = top_k(share)
        payload = codec.encode(update, 0, KEY)
        assert int(payload.nbytes) == cost
        assert int(payload.floats) == cost // 4


def test_a_codec_of_ones_own_may_be_shortened_and_narrow_numbers_too():
    own = identity_codec()._replace(
        encode=lambda u, r, k: dataclasses.replace(identity_codec().encode(u, r, k), sent=())
    )
    update = np.array([1e-4, -1e-4, 0.5e-4], np.float16)
    codec = chain(own, quantise(16))
    payload = codec.encode(update, 0, KEY)
    assert int(payload.nbytes) == 6 + 4
    np.testing.assert_allclose(codec.decode(payload), update, rtol=2e-3)


def test_many_chained_messages_add_up_as_they_decode():
    codec = chain(svd_codec(0.9), quantise(8))
    rng = np.random.default_rng(0)
    updates = {"w": rng.normal(size=(3, 24, 20)).astype(np.float32), "b": rng.normal(size=(3, 20)).astype(np.float32)}
    payloads = jax.vmap(lambda update, key: codec.encode(update, 0, key))(updates, jax.random.split(KEY, 3))
    weights = jnp.array([1.0, 0.0, 2.0])
    assert codec.decode_sum is not None
    each = jax.vmap(codec.decode)(payloads)
    expected = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), each)
    chex.assert_trees_all_close(codec.decode_sum(payloads, weights), expected, rtol=1e-4, atol=1e-4)
