"""`Model(init, apply)`: Flax modules brought to pure functions, and parameters that are frozen."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from fedkd_jax.check import check_fn, check_type
from fedkd_jax.types import ClientState, Model, Outputs, Params, PyTree, ServerState


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """A `Model` from a function that builds a Flax module, crossing from nnx to plain dicts once.

    `build(rngs)` returns a module whose `__call__(inputs)` gives `Outputs` or bare logits. Where it also takes `rngs`
    (for dropout), that is `nnx.Rngs(key)` in training and None in evaluation. All variables must be `nnx.Param`: stacked
    client states need pure functions, so no batch statistics, and dropout gets its `rngs` in the call, not in the constructor.
    Where the module has a method `scorer(inputs)`, it becomes the model's.

    Raises:
        TypeError: `build` is no function, or gives no module, or one that holds a variable that is not `nnx.Param`.
        ValueError: `apply` gets parameters of another structure.

    >>> model = from_nnx(lambda rngs: nnx.Linear(64, 10, rngs=rngs))
    >>> params = model.init(jax.random.key(0))
    >>> sorted(params), model.apply(params, jnp.ones((2, 64))).logits.shape
    (['bias', 'kernel'], (2, 10))
    """
    check_fn("build", build, "(rngs) -> nnx.Module")
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    check_type("build", abstract, nnx.Module, "a function (rngs) -> nnx.Module")
    graphdef, state = nnx.split(abstract)
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.Param):
            name = "/".join(map(str, path))
            raise TypeError(
                f"build gives a module whose {name} is a {type(variable).__name__}; allowed: nnx.Param only"
            )
    structure = jax.tree.structure(state)
    expected = jax.tree.structure(nnx.to_pure_dict(state))
    takes_rngs = "rngs" in inspect.signature(type(abstract).__call__).parameters

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

    def module_of(params: Params) -> Any:
        leaves, given = jax.tree.flatten(params)
        if given != expected:
            raise ValueError(f"params have the structure {given}; allowed: {expected}")
        return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))

    def apply(params: Params, inputs: Any, *, key: jax.Array | None = None) -> Outputs:
        rngs = {"rngs": None if key is None else nnx.Rngs(key)} if takes_rngs else {}
        out = module_of(params)(inputs, **rngs)
        return out if isinstance(out, Outputs) else Outputs(out)

    scorer = (lambda params, inputs: module_of(params).scorer(inputs)) if hasattr(abstract, "scorer") else None
    return Model(init, apply, scorer=scorer)


def freeze(model: Model, frozen: Callable[[tuple[str, ...], Any], bool]) -> Model:
    """The same model with some parameters never trained, never sent, and kept once for all clients.

    Args:
        model: any model; its `init` should give every client the same frozen values (pretrained ones, usually).
        frozen: `(path, leaf) -> bool`, path a tuple of dict keys.

    Raises:
        TypeError: no model, or no function.

    >>> from fedkd_jax import mlp
    >>> model = freeze(mlp((64, 32, 10)), lambda path, leaf: path[0] == "dense_0")
    >>> trainable, kept = split_params(model, model.init(jax.random.key(0)))
    >>> sorted(trainable), sorted(kept)
    (['dense_1'], ['dense_0'])
    """
    check_type("model", model, Model)
    check_fn("frozen", frozen, "(path, leaf) -> bool")
    return model._replace(frozen=frozen)


def rematerialise(model: Model) -> Model:
    """The same model, which keeps nothing but its outputs for its gradient and runs forward once more instead.

    In FedKD's step, where both models run forward before either is differentiated, neither's inner values then wait for the
    other. While it is differentiated they are all there, so for one deep model alone nothing is gained:
    `TransformerConfig(remat=True)` does it layer by layer. An MLP's inner values are its hidden states, which are outputs.

    Whether the compiled program needs less is the compiler's to say. XLA on a CPU needs more by default, as it begins the
    second pass early; with `XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false` it waits.

    Raises:
        TypeError: no model.

    >>> from fedkd_jax import cnn
    >>> plain, x = cnn((12, 12, 1), (4,), (8,), 3), jnp.ones((9, 12, 12, 1))
    >>> params = plain.init(jax.random.key(0))
    >>> def held(model):
    ...     _, gradient = jax.vjp(lambda p: model.apply(p, x).logits, params)
    ...     return sum(leaf.size for leaf in jax.tree.leaves(gradient))
    >>> held(plain) > 5 * held(rematerialise(plain))
    True
    """
    check_type("model", model, Model)
    return model._replace(apply=jax.checkpoint(model.apply))


def compute_in(model: Model, dtype: Any) -> Model:
    """The same model, which computes in `dtype`; parameters, their gradients and outputs are float32.

    Parameters and inputs are cast where they are floating point; tokens, tables of integers and masks stay as they are. A
    transformer has a dtype of its own, `TransformerConfig(dtype=...)`, whose softmax and normalisation stay in float32.

    Args:
        model: any model.
        dtype: bfloat16, or any other floating-point type.

    Raises:
        TypeError: no model, or no dtype.
        ValueError: a dtype that is not floating point.

    >>> from fedkd_jax import mlp
    >>> model = compute_in(mlp((64, 32, 10)), jnp.bfloat16)
    >>> params, x = model.init(jax.random.key(0)), jnp.ones((3, 64))
    >>> out, exact = model.apply(params, x), mlp((64, 32, 10)).apply(params, x)
    >>> str(out.hidden[0].dtype), 0 < float(jnp.abs(out.logits - exact.logits).max()) < 0.1
    ('float32', True)
    """
    check_type("model", model, Model)
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; allowed: a floating-point type, such as bfloat16") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}; allowed: a floating-point type, such as bfloat16")

    def cast(tree: PyTree, dtype: Any = dtype) -> PyTree:
        narrow = lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x  # noqa: E731
        return jax.tree.map(narrow, tree)

    def apply(params: Params, inputs: PyTree, *, key: jax.Array | None = None) -> Outputs:
        return cast(model.apply(cast(params), cast(inputs), key=key), jnp.float32)

    wide = model.scorer

    def scorer(params: Params, inputs: PyTree) -> Callable[[PyTree], Any]:
        assert wide is not None
        score = wide(cast(params), cast(inputs))
        return lambda rows: cast(score(cast(rows)), jnp.float32)

    return model._replace(apply=apply, scorer=None if wide is None else scorer)


def split_params(model: Model, params: Params) -> tuple[Params, Params]:
    """`(trainable, frozen)`, two nested dicts that together are `params`.

    >>> from fedkd_jax import mlp
    >>> split_params(mlp((4, 2)), {"dense_0": 1})
    ({'dense_0': 1}, {})
    """
    if model.frozen is None:
        return params, {}
    flat = traverse_util.flatten_dict(params)
    kept = {path: leaf for path, leaf in flat.items() if model.frozen(path, leaf)}
    trainable = {path: leaf for path, leaf in flat.items() if path not in kept}
    return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(kept)


def merge_params(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split_params`.

    >>> merge_params({"head": {"w": 1}}, {"head": {"b": 2}, "embed": 3})
    {'head': {'w': 1, 'b': 2}, 'embed': 3}
    """
    if not frozen:
        return trainable
    flat = {**traverse_util.flatten_dict(trainable), **traverse_util.flatten_dict(frozen)}
    return traverse_util.unflatten_dict(flat)


@dataclasses.dataclass(frozen=True)  # and no NamedTuple: jit wants a weak reference
class Predictor:
    """What an algorithm predicts with: a model, and where its parameters are; `predictor(server, client, inputs) -> Outputs`,
    for a shared model also without a client, `None`.

    >>> from fedkd_jax import mlp
    >>> shared = Predictor(mlp((4, 2)), lambda server, client: merge_params(server.params, server.frozen))
    >>> params = shared.model.init(jax.random.key(0))
    >>> server = ServerState(params=params, opt_state=(), frozen={}, round=jnp.int32(0))
    >>> shared(server, None, jnp.ones((3, 4))).logits.shape
    (3, 2)
    """

    model: Model
    params: Callable[[ServerState, Any], Params]  # all of them, trainable and frozen, for one client

    def __post_init__(self):
        check_type("model", self.model, Model, "a Model, mlp((64, 10)) say")

    def __call__(self, server: ServerState, client: ClientState | None, inputs: PyTree) -> Outputs:
        return self.model.apply(self.params(server, client), inputs)
