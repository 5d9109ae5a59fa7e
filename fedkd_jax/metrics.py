"""Metrics: pure functions `(logits, labels, mask) -> []`, means over unmasked entries, so they can be averaged over batches."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from fedkd_jax.types import Array


def accuracy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], mask: Shaped[Array, "*batch"]
) -> Float[Array, ""]:
    """Share of unmasked entries whose largest logit is the label's; 0 when all are masked.

    >>> logits = jnp.array([[0.0, 1.0], [3.0, 2.0], [0.0, 9.0]])
    >>> float(accuracy(logits, jnp.array([1, 1, 1]), jnp.array([True, True, False])))
    0.5
    """
    mask = jnp.asarray(mask, bool)
    correct = (jnp.argmax(logits, axis=-1) == labels) & mask
    return correct.sum().astype(jnp.float32) / jnp.maximum(mask.sum(), 1)


def client_mean(values: Float[np.ndarray, "n"], counts: Int[Array, "n"]) -> float:
    """Mean over clients that have test examples, each client alike.

    >>> client_mean(np.array([0.5, 1.0, np.nan]), np.array([3, 1, 0]))
    0.75
    """
    has = np.asarray(counts) > 0
    return float(np.mean(np.asarray(values)[has])) if has.any() else float("nan")


def example_mean(values: Float[np.ndarray, "n"], counts: Int[Array, "n"]) -> float:
    """Mean over all clients' test examples.

    >>> example_mean(np.array([0.5, 1.0, np.nan]), np.array([3, 1, 0]))
    0.625
    """
    counts = np.asarray(counts)
    has = counts > 0
    return float(np.average(np.asarray(values)[has], weights=counts[has])) if has.any() else float("nan")
