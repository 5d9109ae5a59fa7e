"""Dynamic gradient approximation (eqs. 8-9): truncated SVD that keeps a share of a matrix's energy.

Pure functions of one matrix, under `jit` and `vmap`, with static shapes: the rank is a count, the rest is masked. A matrix
is first divided by a power of two near its largest entry, because squares of 1e-20 or 1e+20 leave float32.

Nothing here is differentiated: FedKD compresses finished updates, and gradients through an SVD are NaN wherever singular
values repeat; the factors carry no gradient (`stop_gradient`).
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from fedkd_jax.types import Array, LowRank, Number

METHODS = ("auto", "svd", "gram")


def energy_threshold(start: Number, end: Number, rounds: int) -> optax.Schedule:
    """T(t), eq. 9: linear from `start` in round 0 to `end` in round `rounds - 1`, constant afterwards.

    The reference code uses t = (round + 1) / rounds, so it never uses T_start itself; we follow the paper's text.

    Raises:
        ValueError: `start` or `end` outside (0, 1], or `rounds` below 1.

    >>> threshold = energy_threshold(0.95, 0.98, rounds=4)
    >>> [round(float(threshold(t)), 4) for t in range(4)]
    [0.95, 0.96, 0.97, 0.98]
    """
    for name, value in (("start", start), ("end", end)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; allowed: a share of energy in (0, 1]")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; allowed: at least 1")
    return optax.linear_schedule(start, end, transition_steps=max(rounds - 1, 1))


def retained_rank(singular_values: Float[Array, "r"], threshold: Number | Float[Array, ""]) -> Int[Array, ""]:
    """The smallest K with sum_{k<=K} s_k^2 / sum_k s_k^2 > T, eq. 8; all of them if none does, 0 for an all-zero input.

    The reference code's loop takes one too few. We compare the energy that is cut with 1 - T, summed from the smallest
    value up: its rounding error is relative to the tail, not to the total.

    Args:
        singular_values: `[r]` float32, not negative, not increasing.
        threshold: T in (0, 1].

    Returns:
        `[]` int32; r where a value is NaN or infinite (nothing may be dropped).

    >>> import jax.numpy as jnp
    >>> s = jnp.array([3.0, 2.0, 1.0])                      # energies 9, 4, 1 of 14
    >>> [int(retained_rank(s, t)) for t in (0.5, 0.7, 0.95, 1.0)], int(retained_rank(0 * s, 0.5))
    ([1, 2, 3, 3], 0)
    """
    s = jnp.asarray(singular_values)
    s = s / _power_of_two(s)
    energy = s * s
    tail = jnp.cumsum(energy[::-1])[::-1]  # tail[k] is lost when the first k are kept
    rank = jnp.sum(tail >= (1.0 - threshold) * tail[0]).astype(jnp.int32)
    return jnp.where(jnp.isfinite(tail[0]), jnp.where(tail[0] > 0, rank, 0), s.shape[0]).astype(jnp.int32)


def truncated_svd(
    matrix: Float[Array, "m n"],
    threshold: Number | Float[Array, ""],
    *,
    method: str = "auto",
    max_rank: int | None = None,
) -> LowRank:
    """The truncated SVD M ~ U diag(s) V^T of the smallest rank that keeps more than T of the energy.

    Methods: `"svd"` is `jnp.linalg.svd`; `"gram"` takes the eigenvectors V of the smaller Gram matrix (M^T M or M M^T, at
    highest precision) and U s = M V, 1 to 12 times faster with the same rank; `"auto"` is `"gram"`.

    Args:
        matrix: `[m, n]` float32.
        threshold: T in (0, 1], a number or a traced scalar.
        method: one of "auto", "svd", "gram".
        max_rank: the static number of columns r, min(m, n) by default. Where more are needed, the first r are kept and
            `rank` is r.

    Returns:
        `LowRank(u [m, r], s [r], vt [r, n], rank [])`, entries past `rank` zero; never NaN for finite input. A matrix
        with a NaN or infinite entry gives NaN factors of full rank.

    Raises:
        ValueError: unknown method, a matrix that is not 2-D, `max_rank` below 1.

    >>> import jax.numpy as jnp
    >>> matrix = jnp.outer(jnp.arange(1.0, 5.0), jnp.array([1.0, 0.0, 2.0]))
    >>> low_rank = truncated_svd(matrix, 0.95)
    >>> int(low_rank.rank), bool(jnp.allclose(reconstruct(low_rank), matrix, atol=1e-5))
    (1, True)
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if jnp.ndim(matrix) != 2:
        raise ValueError(f"matrix has shape {jnp.shape(matrix)}; allowed: two axes")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; allowed: at least 1")
    matrix = jax.lax.stop_gradient(jnp.asarray(matrix))
    m, n = matrix.shape
    r = min(m, n) if max_rank is None else min(m, n, max_rank)
    if min(m, n) == 0:
        return LowRank(jnp.zeros((m, r)), jnp.zeros(r), jnp.zeros((r, n)), jnp.int32(0))
    if method != "svd" and m < n:
        low_rank = truncated_svd(matrix.T, threshold, method=method, max_rank=max_rank)
        return LowRank(low_rank.vt.T, low_rank.s, low_rank.u.T, low_rank.rank)

    scale = _power_of_two(matrix)
    finite = jnp.all(jnp.isfinite(matrix))
    scaled = jnp.where(finite, matrix, 0.0) / scale  # LAPACK must not see a NaN
    if method == "svd":
        u, s, vt = _one_by_one(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))(scaled)
        rank = jnp.minimum(retained_rank(s, threshold), r)
        u, s, vt = u[:, :r], s[:r], vt[:r]
    else:
        eigenvalues, v = _one_by_one(lambda a: tuple(jnp.linalg.eigh(a, symmetrize_input=False)))(_mm(scaled.T, scaled))
        rank = jnp.minimum(retained_rank(jnp.sqrt(jnp.maximum(eigenvalues[::-1], 0.0)), threshold), r)
        v = v[:, ::-1][:, :r]
        u = _mm(scaled, v)  # = U diag(s)
        s = jnp.linalg.norm(u, axis=0)
        u = u / jnp.where(s > 0, s, 1.0)[None, :]
        vt = v.T
    keep = jnp.arange(r) < rank
    u, s, vt = jnp.where(keep[None, :], u, 0.0), jnp.where(keep, s * scale, 0.0), jnp.where(keep[:, None], vt, 0.0)
    nan = jnp.where(finite, 0.0, jnp.nan)
    return LowRank(u + nan, s + nan, vt + nan, jnp.where(finite, rank, r).astype(jnp.int32))


def reconstruct(low_rank: LowRank) -> Float[Array, "m n"]:
    """U diag(s) V^T, `[m, n]`, at highest matrix precision. The reference code forgets the diag.

    >>> import jax.numpy as jnp
    >>> matrix = jnp.array([[3.0, 1.0], [0.0, 2.0]])
    >>> bool(jnp.allclose(reconstruct(truncated_svd(matrix, 1.0)), matrix, atol=1e-5))
    True
    """
    return _mm(low_rank.u * low_rank.s[None, :], low_rank.vt)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix view of a tensor: the last axis against all others, so a convolution `[kh, kw, cin, cout]` is
    `[kh * kw * cin, cout]`. The paper only speaks of matrices.

    Raises:
        ValueError: fewer than two axes.

    >>> matrix_shape((128, 10)), matrix_shape((5, 5, 32, 64))
    ((128, 10), (800, 64))
    """
    if len(shape) < 2:
        raise ValueError(f"shape is {shape}; allowed: two axes or more")
    return math.prod(shape[:-1]), shape[-1]


def _mm(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # TF32 would spoil the Gram matrix


def _power_of_two(x: jax.Array) -> jax.Array:
    """The power of two at or below max |x|; 1 for zero and for non-finite input."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    usable = jnp.isfinite(largest) & (largest >= jnp.finfo(x.dtype).tiny)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1.0))
    return jnp.ldexp(jnp.ones_like(largest), exponent - 1)


def _one_by_one(decompose):
    """On a CPU, make `vmap` a loop: two batched LAPACK calls of different shapes in one program can hang there for good
    (jax 0.10.2, two cores), and batches are serial from jax 0.11 on anyway. On a GPU eigh is truly batched."""
    return jax.custom_batching.sequential_vmap(decompose) if jax.default_backend() == "cpu" else decompose
