"""How the server weighs its clients and makes one update of theirs: the mean, or what stands where not all can be trusted."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from fedkd_jax.check import check_number
from fedkd_jax.types import Array, Number, PyTree


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


def fixed_weight(count: Int[Array, ""]) -> Float[Array, ""]:
    """1 for every client, also one without examples: where a mean is over all, or noise must not get lost with its sender.

    >>> float(fixed_weight(jnp.int32(0)))
    1.0
    """
    return jnp.ones_like(count, jnp.float32)


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


# ---- where clients are not trusted -----------------------------------------------------------------------------------


def clip_update(max_norm: Number) -> Callable[[PyTree], PyTree]:
    """`update -> update min(1, C / |update|)`, C = max_norm, the norm over all leaves together; up to C it stays as it is.

    For `Aggregator(bound=...)`: no client moves a mean by more than C times its weight (Sun et al., "Can you really backdoor
    federated learning?", 2019), and what differential privacy calls sensitivity is bounded (`private_mean`). The norm is C to
    float32's rounding; of an update whose norm float32 cannot hold nothing is left.

    Raises:
        ValueError: `max_norm` not above 0.

    >>> [clip_update(5.0)(jnp.array(x)).tolist() for x in ([6.0, 8.0], [3.0, -4.0])]
    [[3.0, 4.0], [3.0, -4.0]]
    """
    check_number("max_norm", max_norm, "(0, inf)")
    clip = optax.clip_by_global_norm(float(max_norm))
    return lambda update: clip.update(update, optax.EmptyState())[0]


def coordinate_median(updates: PyTree, weights: PyTree) -> PyTree:
    """Of every number by itself the median of the clients that are counted, each alike; 0 where there is none.

    Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018. Hostile clients, fewer
    than half, cannot move a number out of the range of the others'. Where clients' data differ, it is not what the mean is:
    numbers that only a few clients move stay where they are.

    Args:
        updates: leaves `[K, ...]`.
        weights: `[K]`, or a PyTree like `updates` where each number counts by itself; what is 0 is not counted, whatever the
            update holds there, and all others count the same and are finite, as a round sees to.

    >>> coordinate_median({"w": jnp.array([[1.0, 5.0], [3.0, 6.0], [9.0, jnp.nan]])}, jnp.array([7.0, 2.0, 0.0]))["w"].tolist()
    [2.0, 5.5]
    """
    return _middle_mean(updates, weights, lambda n: max(0, n - 1) // 2)


def trimmed_mean(share: Number) -> Callable[[PyTree, PyTree], PyTree]:
    """`(updates [K], weights) -> update`: of every number by itself the mean without the floor(share n) smallest and as many
    largest of the n that are counted, each alike; 0 where there is none. Of fewer than 1 / share it is the mean.

    Yin et al. 2018, as `coordinate_median`, also for the arguments. With at most floor(share n) hostile clients no number
    leaves the range of the others'.

    Raises:
        ValueError: a share outside [0, 0.5), of what is left out on each side.

    >>> trimmed_mean(0.25)(jnp.array([-100.0, 1.0, 2.0, 9.0]), jnp.ones(4)).tolist()
    1.5
    """
    check_number("share", share, "[0, 0.5)")
    return lambda updates, weights: _middle_mean(
        updates, weights, lambda n: min(math.floor(round(share * n, 6)), max(0, n - 1) // 2)
    )


def _middle_mean(updates: PyTree, weights: PyTree, left_out: Callable[[int], int]) -> PyTree:
    """Of n numbers that are counted, the mean of all but the `left_out(n)` smallest and largest."""

    def leaf(x, w):
        counted = (w > 0).reshape(w.shape + (1,) * (x.ndim - w.ndim))
        ordered = jnp.sort(jnp.where(counted, x, jnp.inf), axis=0)
        n = counted.sum(axis=0, keepdims=True)
        out = jnp.array([left_out(n) for n in range(x.shape[0] + 1)])[n]
        place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        middle = jnp.where((place >= out) & (place < n - out), ordered, 0).sum(axis=0)
        return middle / jnp.maximum(n - 2 * out, 1)[0]

    if isinstance(weights, jax.Array | np.ndarray):
        weights = jax.tree.map(lambda _: weights, updates)
    return jax.tree.map(leaf, updates, weights)
