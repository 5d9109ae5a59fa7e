"""Laws of `fedkd_jax.models`: pure functions over plain dicts, equal to what lax and NumPy compute."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import strategies
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import Model, Outputs, cnn, compute_in, freeze, from_nnx, mlp, rematerialise
from fedkd_jax.models import conv2d, max_pool, merge_params, split_params

KEY = jax.random.key(5)
both = chex.variants(with_jit=True, without_jit=True)
MODELS = {"mlp": (mlp((12, 7, 6, 3)), (2, 3, 4)), "cnn": (cnn((12, 10, 2), (3, 4), (5,), 3, size=3), (2, 12, 10, 2))}


def lax_conv(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Layers(chex.TestCase):
    @both
    @given(strategies.floats((2, 6, 5, 2), 2.0), strategies.floats((3, 2, 2, 4), 2.0))
    def test_conv2d_equals_lax(self, images, kernel):
        np.testing.assert_allclose(self.variant(conv2d)(images, kernel), lax_conv(images, kernel), rtol=1e-4, atol=1e-4)

    @both
    @given(st.sampled_from([(2, 6, 4, 3), (2, 7, 5, 3)]), strategies.seeds)
    def test_max_pool_equals_lax(self, shape, seed):
        images = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        expected = jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        np.testing.assert_array_equal(self.variant(max_pool)(images), expected)

    @both
    @given(strategies.floats((3, 12)), strategies.seeds)
    def test_mlp_equals_numpy(self, x, seed):
        model = MODELS["mlp"][0]
        params = model.init(jax.random.key(seed))
        out = self.variant(model.apply)(params, x)
        logits, hidden = reference.forward(reference.to64(params), x.astype(np.float64))
        chex.assert_trees_all_close(
            (out.logits, list(out.hidden)), jax.tree.map(np.float32, (logits, hidden)), rtol=1e-4, atol=1e-4
        )


@given(strategies.seeds)
def test_the_gradient_of_conv2d_is_that_of_lax(seed):
    rng = np.random.default_rng(seed)
    images, kernel = rng.normal(size=(2, 6, 5, 2)).astype(np.float32), rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    one, other = (conv_gradient(f)(images, kernel) for f in (conv2d, lax_conv))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-4)


@functools.cache
def conv_gradient(f):
    return jax.jit(jax.grad(lambda x, k: (f(x, k) ** 2).sum(), (0, 1)))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_two_pure_functions_over_plain_dicts(name):
    model, shape = MODELS[name]
    x = jax.random.normal(KEY, shape)
    init = jax.jit(model.init)
    params = init(KEY)
    assert type(params) is dict
    assert all(type(p) is dict for p in params.values())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    chex.assert_trees_all_equal(params, init(KEY))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, init(jax.random.key(6)))), strict=True))
    out = jax.jit(model.apply)(params, x)
    assert isinstance(out, Outputs)
    chex.assert_trees_all_close(out, model.apply(params, x, key=KEY), rtol=1e-5, atol=1e-6)
    chex.assert_shape(out.logits, (2, 3))
    stacked = jax.jit(jax.vmap(model.init))(jax.random.split(KEY, 4))
    many = jax.jit(jax.vmap(model.apply, (0, None)))(stacked, x)
    for i in range(4):
        alone = jax.jit(model.apply)(jax.tree.map(lambda p: p[i], stacked), x)  # noqa: B023
        chex.assert_trees_all_close(jax.tree.map(lambda o: o[i], many), alone, rtol=1e-4, atol=1e-5)  # noqa: B023


@given(strategies.seeds)
def test_the_cnn_is_convolution_pooling_relu_and_dense(seed):
    model, shape = MODELS["cnn"]
    params, x = model.init(jax.random.key(seed)), jax.random.normal(KEY, shape)
    out, hidden = jax.jit(model.apply)(params, x), []
    for i in range(2):
        x = jax.nn.relu(lax_conv(x, params[f"conv_{i}"]["kernel"]) + params[f"conv_{i}"]["bias"].reshape(1, 1, 1, -1))
        x = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )  # relu first: no matter
        hidden.append(x)
    x = x.reshape(2, -1)
    hidden.append(jax.nn.relu(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"].reshape(1, -1)))
    logits = hidden[-1] @ params["dense_1"]["kernel"] + params["dense_1"]["bias"].reshape(1, -1)
    chex.assert_trees_all_close(out, Outputs(logits, tuple(hidden)), rtol=1e-4, atol=1e-5)


# ---- from_nnx ----------------------------------------------------------------------------------------------------------


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


class StoredDropout(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(x)


class CalledDropout(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(4, 64, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.dropout(self.linear(x), deterministic=rngs is None, rngs=rngs)


@pytest.mark.parametrize(
    ("module", "variable"), [(Norm, "norm/mean is a BatchStat"), (StoredDropout, "dropout/rngs/count is a RngCount")]
)
def test_modules_that_hold_more_than_parameters_are_refused(module, variable):
    with pytest.raises(TypeError, match=rf"{variable}; allowed: nnx.Param only"):
        from_nnx(module)


def test_dropout_follows_the_key_of_the_call_and_rests_without():
    model = from_nnx(CalledDropout)
    params, x, apply = model.init(KEY), jnp.ones((3, 4)), jax.jit(model.apply)
    rest = apply(params, x).logits
    np.testing.assert_allclose(
        rest, x @ params["linear"]["kernel"] + params["linear"]["bias"].reshape(1, -1), rtol=1e-5
    )
    one, again, other = (apply(params, x, key=jax.random.key(i)).logits for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    dropped = np.asarray(one) == 0
    assert 0.3 < dropped.mean() < 0.7
    np.testing.assert_allclose(np.asarray(one)[~dropped], 2 * np.asarray(rest)[~dropped], rtol=1e-5)


def test_parameters_of_another_structure_are_refused():
    model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    params = model.init(KEY)
    for bad in (
        {"kernel": params["kernel"]},
        {**params, "more": params["bias"]},
        {"k": params["kernel"], "bias": params["bias"]},
    ):
        with pytest.raises(ValueError, match=r"params have the structure .*; allowed: "):
            model.apply(bad, jnp.ones((2, 4)))


def test_bare_logits_and_outputs_are_both_taken():
    model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    out = model.apply(model.init(KEY), jnp.ones((2, 4)))
    assert isinstance(out, Outputs)
    assert (out.hidden, out.attention) == ((), ())


# ---- wrappers ----------------------------------------------------------------------------------------------------------


@functools.cache
def output_and_gradient(name, *wrappers):
    model = functools.reduce(lambda model, wrap: wrap(model), wrappers, MODELS[name][0])

    def loss(params, x):
        out = model.apply(params, x)
        return (out.logits**2).sum() + sum((h**2).sum() for h in out.hidden), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_rematerialised_model_is_the_same_and_holds_parameters_and_inputs_only(name):
    model, shape = MODELS[name]
    params, x = model.init(KEY), jax.random.normal(KEY, shape)
    one, other = (output_and_gradient(name, *w)(params, x) for w in ((), (rematerialise,)))
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)

    def held(model):
        gradient = jax.eval_shape(lambda p, x: jax.vjp(lambda p: model.apply(p, x), p)[1], params, x)
        return sum(leaf.size for leaf in jax.tree.leaves(gradient))

    assert held(rematerialise(model)) <= sum(leaf.size for leaf in jax.tree.leaves((params, x)))
    assert name == "mlp" or held(model) > 4 * held(rematerialise(model))


def bfloat16(model):
    return compute_in(model, jnp.bfloat16)


@pytest.mark.parametrize("name", MODELS)
@given(seed=strategies.seeds)
def test_computing_in_bfloat16_is_close_and_gives_float32(name, seed):
    model, shape = MODELS[name]
    params, x = jax.jit(model.init)(jax.random.key(seed)), jax.random.normal(jax.random.key(seed + 1), shape)
    (_, exact), slope = output_and_gradient(name)(params, x)
    (_, near), near_slope = output_and_gradient(name, bfloat16)(params, x)
    chex.assert_trees_all_equal_shapes_and_dtypes((near, near_slope), (exact, slope))
    for one, other in zip(*map(jax.tree.leaves, (near, exact)), strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 + 0.02 * np.abs(other).max())  # steps are 2^-8
    distance = optax.tree.norm(optax.tree.sub(near_slope, slope))
    assert distance < 0.3 * optax.tree.norm(slope)  # the largest of four pixels may be another
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (near, exact)), strict=True))


def test_computing_in_bfloat16_casts_floats_only():
    seen = []

    def look(*trees):
        seen.append([str(x.dtype) for x in jax.tree.leaves(trees)])
        return jnp.ones((2, 3), jnp.bfloat16)

    def apply(params, inputs, *, key=None):
        return Outputs(look(params, inputs), mask=inputs["mask"])

    frozen = lambda path, leaf: path == ("table",)  # noqa: E731
    scorer = lambda params, inputs: lambda rows: look(params, inputs, rows)  # noqa: E731
    model = compute_in(Model(init=lambda key: {}, apply=apply, frozen=frozen, scorer=scorer), "bfloat16")
    params = {"table": np.zeros(2, np.int32), "w": np.zeros(2, np.float32)}
    inputs = {"mask": np.ones(2, bool), "tokens": np.ones(2, np.int8), "x": np.ones(2, np.float32)}
    out = model.apply(params, inputs)
    assert (out.logits.dtype, out.mask.dtype, model.frozen) == (jnp.float32, bool, frozen)
    assert model.scorer(params, inputs)(inputs).dtype == jnp.float32
    cast = ["int32", "bfloat16", "bool", "int8", "bfloat16"]
    assert seen == [cast, [*cast, *cast[2:]]]
    assert compute_in(mlp((4, 2)), "bfloat16").scorer is None
    with pytest.raises(ValueError, match="dtype is int8; allowed: a floating-point type"):
        compute_in(mlp((4, 2)), jnp.int8)


# ---- frozen parameters -------------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(["dense_0", "dense_1", "dense_2"])), st.booleans())
def test_split_and_merge_are_inverse(layers, biases_too):
    model = freeze(MODELS["mlp"][0], lambda path, leaf: path[0] in layers and (biases_too or leaf.ndim == 2))
    params = MODELS["mlp"][0].init(KEY)
    trainable, kept = split_params(model, params)
    chex.assert_trees_all_equal(merge_params(trainable, kept), params)
    assert set(kept) == layers
    assert all(set(layer) == ({"kernel", "bias"} if biases_too else {"kernel"}) for layer in kept.values())
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (trainable, kept, params)]
    assert sizes[0] + sizes[1] == sizes[2]


def test_errors_name_the_argument_its_value_and_what_is_allowed():
    for widths in ((4,), (4, 0)):
        with pytest.raises(ValueError, match=r"widths.* is .*; allowed: "):
            mlp(widths)
    with pytest.raises(
        ValueError, match=r"channels has 3 layers; allowed: as many as an image of \(8, 8, 1\) leaves pixels for"
    ):
        cnn((8, 8, 1), (2, 2, 2), (4,), 3)
