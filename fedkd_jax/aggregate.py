"""How the server weighs and averages its clients."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from fedkd_jax.types import Array, PyTree


def example_weight(count: Int[Array, ""]) -> Float[Array, ""]:
    """FedAvg's weight: the client's number of examples.

    >>> float(example_weight(jnp.int32(7)))
    7.0
    """
    return jnp.asarray(count, jnp.float32)


def uniform_weight(count: Int[Array, ""]) -> Float[Array, ""]:
    """1 for every client that has examples.

    >>> float(uniform_weight(jnp.int32(7))), float(uniform_weight(jnp.int32(0)))
    (1.0, 0.0)
    """
    return (jnp.asarray(count) > 0).astype(jnp.float32)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every inexact leaf is finite everywhere.

    >>> bool(all_finite({"a": jnp.ones(3), "n": jnp.int32(1)})), bool(all_finite(jnp.array([1.0, jnp.nan])))
    (True, False)
    """
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.bool_(True)


def weighted_sum(updates: PyTree, weights: Float[Array, "k"]) -> PyTree:
    """sum_k weights[k] updates[k] over the leading axis `[k]`, in float32 or wider; a weight of zero adds exact zeros, whatever
    the update holds.

    >>> float(weighted_sum({"w": jnp.array([jnp.nan, 3.0])}, jnp.array([0.0, 2.0]))["w"])
    6.0
    """

    def leaf(x):
        w = weights.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(w > 0, w * x, 0).sum(axis=0)

    return jax.tree.map(leaf, updates)


def weighted_mean(summed: tuple[PyTree, Float[Array, ""]]) -> PyTree:
    """The mean from summands added up in any grouping; zeros where all weights are zero.

    >>> float(weighted_mean((jnp.float32(12.0), jnp.float32(3.0))))
    4.0
    """
    total, weight = summed
    return jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1.0), total)
