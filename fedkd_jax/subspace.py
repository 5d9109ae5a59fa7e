"""Subspace iteration that knows when it has found the rank: what `svd.py` tries first on all but small matrices.

A basis X of c directions is multiplied by M^T M, again and again; within its span, Rayleigh-Ritz finds the best directions and
what energy they hold, never more than what as many singular vectors hold. The residuals then bound how much more those
could hold, and so certify that no smaller rank would do (`certified_rank`).

All is products with thin matrices and factorisations of c x c, which a GPU batches too. X is held transposed, which is how a
CPU multiplies it fastest, and nothing of M's size is written.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from fedkd_jax.types import Array, PyTree

SWEEPS = 5  # at most; what is not certain then needs all eigenvectors of the Gram matrix
ROUNDING = 5e-6  # float32 decides a rank only where the share of energy is further than this from T


def subspace_iteration(
    product: Callable[[Array], tuple[Array, Array]],
    probes: Float[Array, "c n"],
    threshold: Float[Array, ""],
    *,
    start: Float[Array, "c n"] | None = None,
    powers: int = 1,
    precise: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """The directions of the right space that hold most of the energy, and whether they are certain to be the fewest.

    Args:
        product: X `[c, n]` -> `(M X^T, X M^T M / |M|^2)`, the second `[c, n]`; the first may be empty, `[0, c]`, if not wanted.
            Of a matrix without energy, or not finite, both are zero.
        probes: `[c, n]`, directions to begin with that are orthogonal to none: `random_probes(c, n)`.
        threshold: T.
        start: better directions to begin with, `[c, n]`; probes take the place of rows of zeros, and see what is new.
        powers: products between two looks at the Ritz values; each look costs an `eigh` of c x c.
        precise: whether the sum of the K largest eigenvalues must be certain too, and not only that K directions keep enough.

    Returns:
        `(M V, V^T [c, n], K, whether K is certain)`, the best directions first, of which the first K keep more than T, and no
        fewer would. Not to be used where K is not certain.

    >>> matrix = jnp.outer(jnp.arange(6.0), jnp.arange(5.0)) + 1e-3 * jnp.eye(6, 5)
    >>> product = lambda x: (matrix @ x.T, x @ matrix.T @ matrix / jnp.sum(matrix**2))
    >>> *_, rank, certain = subspace_iteration(product, random_probes(3, 5), jnp.float32(0.9))
    >>> int(rank), bool(certain)
    (1, True)
    """
    c = len(probes)

    def orthonormal(x, accuracy=1e-3):
        return contract(whitening(contract(x, x, 1, 1), accuracy), x, 1, 0)

    def again(state):
        sweeps, hopeless, _, (*_, certain) = state
        return (sweeps < SWEEPS) & ~certain & ~hopeless

    def sweep(state):
        sweeps, _, image, _ = state
        for _ in range(powers - 1):
            _, image = product(orthonormal(image, 1e-5))
        # twice: once leaves errors of 1e-3 where M^T M has made some directions much longer than others
        x = orthonormal(orthonormal(image))
        y, image = product(x)
        h = contract(x, image, 1, 1)
        kept = jnp.trace(h)

        def rayleigh_ritz(_):
            values, z = jnp.linalg.eigh(h, symmetrize_input=False)
            values, z = values[::-1], z[:, ::-1]
            vectors, images = contract(z, x, 0, 0), contract(z, image, 0, 0)
            residuals = jnp.sum((images - vectors * values[:, None]) ** 2, axis=1)
            return vectors, images, z, *certified_rank(values, residuals, threshold, precise=precise)

        x, image, z, *found = when(kept > threshold, rayleigh_ritz, (x, image, none, *nothing))
        hopeless = ~(kept > threshold) & ((sweeps + 1) * powers >= 2)  # two products come near what many would hold
        return sweeps + 1, hopeless, image, (x, y, z, *found)

    none, nothing = jnp.zeros((c, c), probes.dtype), (jnp.int32(0), jnp.bool_(False))
    if start is None:
        y, image = product(probes)
        # rows of Q^T M, where Q is an orthonormal basis of M probes^T: what they hold is what that basis holds of M
        image = contract(whitening(contract(probes, image, 1, 1), 1e-3), image, 1, 0)
        # on the bench's matrices it misses at most 4.4 times what the best c directions miss, and none is given up in error
        hopeless = 1.0 - jnp.sum(image**2) > 4.0 * (1.0 - threshold)
    else:
        image = jnp.where(jnp.any(start != 0, axis=1, keepdims=True), start, probes)
        y, hopeless = jax.eval_shape(product, image)[0], jnp.bool_(False)
    state = (jnp.int32(0), hopeless, image, (jnp.zeros_like(image), jnp.zeros(y.shape, y.dtype), none, *nothing))
    *_, (x, y, z, rank, certain) = jax.lax.while_loop(again, sweep, tied(state, image[0, 0] > 0))
    return contract(y, z, 1, 0), x, rank, certain


def certified_rank(
    ritz: Float[Array, "c"], residuals: Float[Array, "c"], threshold: Float[Array, ""], *, precise: bool = False
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """`(K, whether no smaller rank keeps more than T)`.

    The first K Ritz vectors keep sum_{i<=K} ritz_i > T, so K is enough. That K - 1 are not: keep the first j >= K - 1 Ritz
    vectors apart from everything else, whose largest eigenvalue is at most mu = ritz_{j+1} + sqrt(residuals beyond j). For any
    s > 0, [[A, C], [C^T, D]] is at most [[A + C C^T / s, 0], [0, D + s]]; with s = ritz_{K-1} - mu the K - 1 largest
    eigenvalues on the right are in the first block, so the K - 1 largest of M^T M exceed the K - 1 largest Ritz values by no
    more than |C|^2 / s = sum_{i<=j} residuals_i / (ritz_{K-1} - mu), in sum.

    One thing is taken for granted, that nothing outside the basis is larger than its smallest Ritz values, as after sweeps
    from a random start; were it wrong, K would be too large, and the energy kept all the same.

    Args:
        ritz: `[c]`, not increasing, as shares of the energy.
        residuals: `[c]`, |M^T M v - ritz v|^2 in the same unit.
        threshold: T.
        precise: whether the sum of the K largest must be certain too.

    >>> ritz, none = jnp.array([0.7, 0.2, 0.06, 0.01]), jnp.zeros(4)
    >>> [x.item() for x in certified_rank(ritz, none, jnp.float32(0.8))]
    [2, True]
    >>> [x.item() for x in certified_rank(ritz, none + 1.0, jnp.float32(0.8))]
    [2, False]
    """
    c = len(ritz)
    kept, inside = jnp.cumsum(ritz), jnp.cumsum(residuals)
    rank = 1 + jnp.sum(kept <= threshold + ROUNDING).astype(jnp.int32)
    k = rank if precise else jnp.maximum(rank - 1, 1)  # so many Ritz values are compared with eigenvalues
    gap = ritz[k - 1] - ritz[1:] - jnp.sqrt(jnp.maximum(inside[-1] - inside[:-1], 0.0))
    usable = (jnp.arange(1, c) >= k) & (gap > 0)
    excess = jnp.min(jnp.where(usable, inside[:-1] / jnp.where(gap > 0, gap, 1.0), jnp.inf), initial=jnp.inf)
    below = jnp.where(rank > 1, kept[rank - 2], -jnp.inf)
    fewer_fail = below + excess <= threshold - ROUNDING
    fewest = fewer_fail & (excess <= ROUNDING) if precise else fewer_fail | (rank == 1)
    # False for NaN, Cholesky's of a basis without full rank
    return rank, fewest & (kept[-1] > threshold + ROUNDING) & (threshold < 1)


def random_probes(c: int, n: int) -> Float[Array, "c n"]:
    """Random signs, the same at every call: dense, because of two rows of M that a sparse sketch adds up one stays unseen.

    >>> random_probes(2, 3).shape
    (2, 3)
    """
    return jax.random.rademacher(jax.random.key(0), (c, n), jnp.float32)


def whitening(gram: Float[Array, "k k"], accuracy: float) -> Float[Array, "k k"]:
    """W with W gram W^T = 1: from Cholesky where every vector keeps a share `accuracy` of its length when those before it are
    taken out, else from eigh, with zero rows for directions that are not there.

    >>> gram = jnp.array([[4.0, 2.0], [2.0, 3.0]])
    >>> w = whitening(gram, 1e-3)
    >>> bool(jnp.allclose(w @ gram @ w.T, jnp.eye(2), atol=1e-5))
    True
    """
    lower = jnp.linalg.cholesky(gram, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, jnp.eye(len(gram), dtype=gram.dtype), left_side=True, lower=True)
    squares = jnp.diagonal(gram)

    def from_eigh(_):
        length = jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))
        values, z = jnp.linalg.eigh(gram * length[:, None] * length[None, :], symmetrize_input=False)
        usable = values > 1e-6 * values[-1]
        return (z * jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, values, 1.0)), 0.0)[None, :]).T * length[None, :]

    return when(~jnp.all(jnp.diagonal(lower) ** 2 > accuracy**2 * squares), from_eigh, inverse)


# ---- arithmetic --------------------------------------------------------------------------------------------------------


def measure(matrix: Float[Array, "m n"]) -> tuple[Float[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    """`(scale, sum of squares of matrix / scale, whether all is finite)`, scale a power of two near the entries. A matrix whose
    Frobenius norm leaves float32 counts as not finite: its factors would.

    One look at the matrix, and two more only where its squares leave float32.

    >>> scale, total, finite = measure(jnp.full((2, 2), 3e-30))
    >>> float(scale) < 1e-29, 4 < float(total) < 16, bool(finite)
    (True, True, True)
    """

    def carefully(_=None):
        # on a CPU a maximum may overlook a NaN; a sum does not
        scale = power_of_two(jnp.max(jnp.abs(matrix), initial=0.0))
        total = jnp.sum((matrix / scale) ** 2)
        return scale, total, jnp.sqrt(total) * scale < jnp.finfo(jnp.float32).max

    total = jnp.sum(matrix * matrix)
    scale = power_of_two(jnp.sqrt(total / matrix.size))
    usual = (total > 1e-20) & (total < 1e30)
    return when(~usual, carefully, (scale, total / scale**2, jnp.bool_(True)))


def power_of_two(x: Float[Array, ""]) -> Float[Array, ""]:
    """The power of two at or below a positive number, at most 2^126 (to divide by 2^127 gives 0); 1 for zero, NaN and infinity.

    >>> float(power_of_two(jnp.float32(5.0)))
    4.0
    """
    info = jnp.finfo(x.dtype)
    usable = jnp.isfinite(x) & (x >= info.tiny)
    bits = jax.lax.bitcast_convert_type(jnp.where(usable, jnp.minimum(x, 2.0**126), 1.0), f"int{info.bits}")
    return jax.lax.bitcast_convert_type(bits >> info.nmant << info.nmant, x.dtype)  # all but the exponent is zero


def contract(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product of two matrices over an axis of each, at highest precision: TF32 would spoil a Gram matrix.

    >>> contract(jnp.ones((2, 3)), jnp.ones((5, 3)), 1, 1).shape
    (2, 5)
    """
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def when(wanted: Bool[Array, ""], make: Callable[[PyTree], PyTree], otherwise: PyTree) -> PyTree:
    """`make(otherwise)` where wanted, else `otherwise`, of the same shapes: a loop of at most one turn.

    Under `vmap`, `cond` runs both branches for everybody, always; this runs `make` as soon as one of the batch wants it. What
    `make` overwrites of its argument is written in place.

    >>> jax.vmap(lambda x: when(x < 0, jnp.negative, x))(jnp.array([1, -2])).tolist()
    [1, 2]
    """

    def once(state):
        wanted, otherwise = state
        return wanted & False, tied(make(otherwise), wanted)

    return jax.lax.while_loop(lambda state: state[0], once, (wanted, tied(otherwise, wanted)))[1]


def tied(tree: PyTree, flag: Bool[Array, ""]) -> PyTree:
    """The same tree, which within `shard_map` now varies over the mesh axes that `flag` varies over: what a loop asks of the
    constants it starts from. The compiler removes it.

    >>> tied({"a": 3}, jnp.bool_(True))["a"].tolist()
    3
    """
    return jax.tree.map(lambda x: jnp.where(flag, x, x), tree)
