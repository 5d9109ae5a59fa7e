"""Dynamic gradient approximation (eqs. 8-9): truncated SVD that keeps a share of a matrix's energy.

Pure functions of one matrix, under `jit`, `vmap` and `shard_map`, with static shapes: the rank is a count, the rest is masked.
Three factorisations find the smallest rank, each with its cost:

"svd"         `jnp.linalg.svd`: LAPACK's, all singular vectors of both sides.
"gram"        eigenvectors V of the smaller Gram matrix G = M^T M, then U S = M V.
"randomized"  subspace iteration on a few random columns until the rank is certain (`_certified_rank`), which takes a
              handful of thin matrix products where the energy lies in few directions; "gram" where it stays uncertain.

"auto" is "randomized" where the matrix is large enough and not too tall, else "gram" (`sketch_columns`, which holds the
measurements). Where the caller has no use for more than `max_rank` directions, two sums over G can show that more are
needed, and nothing is factorised at all (`_energy_bound`).

A matrix is first divided by a power of two near its largest entry, because squares of 1e-20 or 1e+20 leave float32. All
products are at highest precision: TF32 would spoil the Gram matrix.

Nothing here is differentiated: gradients through an SVD are NaN wherever singular values repeat or vanish, so the factors carry
none (`stop_gradient`). Who wants the straight-through gradient writes `x + stop_gradient(decode(encode(x)) - x)`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from fedkd_jax.types import Array, Factors, LowRank, Number

METHODS = ("auto", "svd", "gram", "randomized")
SWEEPS = 4  # of subspace iteration, before the Gram matrix is asked
SMALL = 2**16  # entries of a matrix for which a condition costs more than what it saves
ROUNDING = 2e-6  # float32 decides a rank only where the energy is further than this from T


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
    s = s / _power_of_two(jnp.max(s, initial=0.0))
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

    Args:
        matrix: `[m, n]` float32.
        threshold: T in (0, 1], a number or a traced scalar.
        method: one of "auto", "svd", "gram", "randomized", see the head of this file.
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
    if jnp.ndim(matrix) == 2 and matrix.shape[0] < matrix.shape[1]:
        low_rank = truncated_svd(jnp.asarray(matrix).T, threshold, method=method, max_rank=max_rank)
        return LowRank(low_rank.vt.T, low_rank.s, low_rank.u.T, low_rank.rank)
    matrix, r = _check(matrix, method, max_rank)
    factors = _factorise(matrix, threshold, method, r, precise=True)
    left, scale, _ = _scaled(factors.left)
    s = jnp.linalg.norm(left, axis=0)
    nan = jnp.where(_scaled(matrix)[2], 0.0, jnp.nan)
    u = left / jnp.where(s > 0, s, 1.0)[None, :]
    return LowRank(u + nan, s * scale + nan, factors.right + nan, jnp.minimum(factors.rank, r))


def factorise(
    matrix: Float[Array, "m n"],
    threshold: Number | Float[Array, ""],
    *,
    method: str = "auto",
    max_rank: int | None = None,
) -> Factors:
    """What travels: M ~ left right of the smallest rank that keeps more than T of the energy; nothing where that rank is
    above `max_rank`.

    The factor of the longer side is U diag(s), the other one V^T (of a wide matrix U): K (m + n) numbers, the energy of
    U diag(s) V^T, and no division by small singular values.

    Args:
        matrix, threshold, method: as in `truncated_svd`.
        max_rank: the static number of columns r; what needs more is not factorised.

    Returns:
        `Factors(left [m, r], right [r, n], rank [])`, zero past `rank`. Where more than r columns are needed, or an entry
        is not finite, `rank` is r + 1 and both factors are zero.

    Raises:
        ValueError: as `truncated_svd`.

    >>> import jax.numpy as jnp
    >>> matrix = jnp.outer(jnp.arange(1.0, 5.0), jnp.array([1.0, 0.0, 2.0]))
    >>> factors = factorise(matrix, 0.95)
    >>> int(factors.rank), bool(jnp.allclose(factors.left @ factors.right, matrix, atol=1e-5))
    (1, True)
    >>> int(factorise(jnp.eye(20), 0.95, max_rank=5).rank)
    6
    """
    if jnp.ndim(matrix) == 2 and matrix.shape[0] < matrix.shape[1]:
        factors = factorise(jnp.asarray(matrix).T, threshold, method=method, max_rank=max_rank)
        return Factors(factors.right.T, factors.left.T, factors.rank)
    matrix, r = _check(matrix, method, max_rank)
    return _factorise(matrix, threshold, method, r, precise=False)


def reconstruct(low_rank: LowRank) -> Float[Array, "m n"]:
    """U diag(s) V^T, `[m, n]`, at highest matrix precision. The reference code forgets the diag.

    >>> import jax.numpy as jnp
    >>> matrix = jnp.array([[3.0, 1.0], [0.0, 2.0]])
    >>> bool(jnp.allclose(reconstruct(truncated_svd(matrix, 1.0)), matrix, atol=1e-5))
    True
    """
    return _mm(low_rank.u * low_rank.s[None, :], low_rank.vt)


def weighted_product(factors: Factors, weights: Float[Array, "k"]) -> Float[Array, "m n"]:
    """The sum over clients of w_k left_k right_k, `[m, n]`, as one matrix product of inner size k r: no client's own matrix is
    built. Where no client uses more than a quarter of the r columns, the others take no part.

    Args:
        factors: of k clients, `left [k, m, r]`, `right [k, r, n]`, `rank [k]`.
        weights: `[k]`.

    >>> import jax, jax.numpy as jnp
    >>> matrices = jnp.stack([jnp.outer(jnp.arange(4.0), jnp.arange(3.0)), jnp.ones((4, 3))])
    >>> factors = jax.vmap(lambda matrix: factorise(matrix, 0.9))(matrices)
    >>> weighted_product(factors, jnp.array([1.0, 10.0]))[3].round(4).tolist()
    [10.0, 13.0, 16.0]
    """
    _, m, r = factors.left.shape
    n, narrow = factors.right.shape[-1], r // 4
    used = jnp.max(jnp.where(factors.rank > r, 0, factors.rank), initial=0)

    def product(columns):
        left = factors.left[..., :columns] * weights[:, None, None]
        axes = (((0, 2), (0, 1)), ((), ()))
        return jax.lax.dot_general(left, factors.right[:, :columns], axes, precision=jax.lax.Precision.HIGHEST)

    if m * n < SMALL:
        return product(r)
    few = when(used > 0, lambda: product(narrow), jnp.zeros((m, n)))
    return when(used > narrow, lambda: product(r), few)


class MatrixView(NamedTuple):
    """A tensor seen as `[b, m, n]` matrices, and back: the first `stack` axes count matrices, the next `rows` axes are joined
    to rows, the rest to columns.

    >>> import jax.numpy as jnp
    >>> view, kernels = matrix_view((12, 5, 5, 32, 64), stack=1), jnp.ones((12, 5, 5, 32, 64))
    >>> view.matrices(kernels).shape, view.tensor(view.matrices(kernels)).shape
    ((12, 800, 64), (12, 5, 5, 32, 64))
    """

    shape: tuple[int, ...]
    stack: int
    rows: int

    def matrices(self, tensor: Float[Array, "..."]) -> Float[Array, "b m n"]:
        """The tensor as `[b, m, n]`."""
        axes = (self.shape[: self.stack], self.shape[self.stack :][: self.rows], self.shape[self.stack + self.rows :])
        return tensor.reshape([math.prod(a) for a in axes])

    def tensor(self, matrices: Float[Array, "b m n"]) -> Float[Array, "..."]:
        """The inverse."""
        return matrices.reshape(self.shape)


def matrix_view(shape: tuple[int, ...], *, stack: int = 0) -> MatrixView:
    """The matrix a tensor is compressed as: the last axis against all others, so a convolution `[kh, kw, cin, cout]` is
    `[kh * kw * cin, cout]`. Of three axes the first two or the last two are joined, whichever gives the smaller m + n:
    attention's `[d, heads, d_head]` is `[d, heads * d_head]` and its output `[heads, d_head, d]` is `[heads * d_head, d]`. The
    paper only speaks of matrices.

    Args:
        shape: of the tensor.
        stack: how many leading axes only count matrices, as in layers `[layers, m, n]` that are scanned over.

    Raises:
        ValueError: fewer than two axes beyond `stack`.

    >>> [matrix_view(shape).rows for shape in ((128, 10), (5, 5, 32, 64), (768, 12, 64), (12, 64, 768))]
    [1, 3, 1, 2]
    """
    inner = shape[stack:]
    if stack < 0 or len(inner) < 2:
        raise ValueError(f"shape is {shape} with stack={stack}; allowed: two axes or more beyond the stack")
    rows = len(inner) - 1
    if rows == 2 and inner[0] + inner[1] * inner[2] < inner[0] * inner[1] + inner[2]:
        rows = 1
    return MatrixView(shape, stack, rows)


def when(wanted, make, otherwise):
    """`make()` where wanted, else `otherwise`, of the same shapes: a loop of at most one turn.

    Under `vmap`, `cond` runs both branches for everybody, always; this runs `make` as soon as one of the batch wants it.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(lambda x: when(x < 0, lambda: -x, x))(jnp.array([1, -2])).tolist()
    [1, 2]
    """
    return jax.lax.while_loop(lambda c: c[0], lambda _: (jnp.bool_(False), make()), (wanted, otherwise))[1]


# ---- which factorisation, and where ------------------------------------------------------------------------------------


def sketch_columns(m: int, n: int) -> int:
    """How many random columns "auto" tries first on an `[m, n]` matrix; 0: it goes to the Gram matrix at once.

    TODO measurements

    >>> sketch_columns(768, 768), sketch_columns(10, 128)
    (64, 0)
    """
    m, n = max(m, n), min(m, n)
    r = min(3 * n // 8, max(64, n // 12)) // 8 * 8
    return r if n >= 48 and 6 * r * m <= n * (m + 12 * n) else 0


def _check(matrix, method, max_rank):
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if jnp.ndim(matrix) != 2:
        raise ValueError(f"matrix has shape {jnp.shape(matrix)}; allowed: two axes")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; allowed: at least 1")
    r = min(matrix.shape) if max_rank is None else min(*matrix.shape, max_rank)
    return jax.lax.stop_gradient(jnp.asarray(matrix, jnp.float32)), r


def _factorise(matrix, threshold, method, r, precise) -> Factors:
    """Of a tall matrix. `precise`: singular vectors are wanted, and the first r of them even where more would be needed;
    otherwise any directions that keep enough energy will do, and none where r are too few."""
    m, n = matrix.shape
    if r == 0:
        return Factors(jnp.zeros((m, r)), jnp.zeros((r, n)), jnp.int32(0))
    columns = {"auto": sketch_columns(m, n), "randomized": max(3 * n // 8, 1)}.get(method, 0)
    if method == "svd":
        run = functools.partial(_svd, r, precise)
    elif columns == 0:
        run = functools.partial(_gram, r, precise, np.zeros(0, np.float32))
    else:
        run = functools.partial(_randomized, r, precise, columns)
    # On a CPU `vmap` becomes a loop: two batched LAPACK calls of different shapes in one program can hang there for good
    # (jax 0.10.2, two cores), and batches are serial from jax 0.11 on anyway. On a GPU eigh is truly batched.
    one_by_one = jax.custom_batching.sequential_vmap(run)
    return jax.lax.platform_dependent(matrix, jnp.float32(threshold), cpu=one_by_one, default=run)


def _svd(r, precise, matrix, threshold) -> Factors:
    scaled, scale, finite = _scaled(matrix)
    u, s, vt = jnp.linalg.svd(scaled, full_matrices=False)
    rank = _counted(retained_rank(s, threshold), finite, r)
    keep = _filled(rank, r, precise)
    left = jnp.where(keep[None, :], (u * s[None, :])[:, :r] * scale, 0.0)
    return Factors(left, jnp.where(keep[:, None], vt[:r], 0.0), rank)


def _gram(r, precise, ritz, matrix, threshold) -> Factors:
    """Eigenvectors of M^T M, unless two sums over it show that r are too few."""
    (m, n), (scaled, scale, finite) = matrix.shape, _scaled(matrix)
    gram = _mm(scaled.T, scaled)
    too_many = Factors(jnp.zeros((m, r)), jnp.zeros((r, n)), jnp.int32(r + 1))

    def eigenvectors():
        values, v = jnp.linalg.eigh(gram, symmetrize_input=False)
        rank = _counted(retained_rank(jnp.sqrt(jnp.maximum(values[::-1], 0.0)), threshold), finite, r)
        keep = _filled(rank, r, precise)
        right = jnp.where(keep[None, :], v[:, ::-1][:, :r], 0.0)
        few = r if matrix.size < SMALL else r // 4  # which is often enough
        left = _pad(_mm(scaled, right[:, :few] * scale), r)
        if few < r:
            left = when(keep.sum() > few, lambda: _mm(scaled, right * scale), left)
        return Factors(left, right.T, rank)

    if precise or r == n:
        return eigenvectors()
    return when(finite & ~(_energy_bound(r, gram, ritz) <= threshold - ROUNDING), eigenvectors, too_many)


def _randomized(r, precise, columns, matrix, threshold) -> Factors:
    """Subspace iteration, and the Gram matrix where that leaves the rank undecided."""
    found, certain, ritz = _subspace_iteration(r, precise, columns, matrix, threshold)
    return when(~certain, lambda: _gram(r, precise, ritz, matrix, threshold), found)


def _measure(matrix) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(scale, sum of squares of matrix / scale, whether all is finite)`, scale a power of two near the entries.

    One look at a large matrix, and two more only where its squares leave float32.
    """

    def carefully():
        scale = _power_of_two(
            jnp.max(jnp.abs(matrix), initial=0.0)
        )  # a maximum on a CPU may overlook a NaN, a sum does not
        total = jnp.sum((matrix / scale) ** 2)
        return scale, total, jnp.isfinite(total)

    if matrix.size < SMALL:
        return carefully()
    total = jnp.sum(matrix * matrix)
    scale = _power_of_two(jnp.sqrt(total / matrix.size))
    usual = (total > 1e-20) & (total < 1e30)
    return when(~usual, carefully, (scale, total / scale**2, jnp.bool_(True)))


def _scaled(matrix) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(matrix / scale, scale, whether it is finite)`; zeros where it is not, because LAPACK must not see a NaN."""
    scale, _, finite = _measure(matrix)
    return jnp.where(finite, matrix / scale, 0.0), scale, finite


def _counted(rank, finite, r):
    """What `Factors.rank` says."""
    return jnp.where(finite, jnp.minimum(rank, r + 1), r + 1).astype(jnp.int32)


def _filled(rank, r, precise):
    """Which of r columns are in use: the first `rank`; where that is above r all of them, or none."""
    return jnp.arange(r) < jnp.where(rank > r, r if precise else 0, rank)


def _pad(x, r):
    """To r columns."""
    return jnp.pad(x, ((0, 0), (0, max(r - x.shape[1], 0))))


# ---- subspace iteration ------------------------------------------------------------------------------------------------


def _subspace_iteration(r, precise, columns, matrix, threshold) -> tuple[Factors, jax.Array, jax.Array]:
    """`(factors, whether their rank is certain, Ritz values [columns])` of a tall matrix.

    Every sweep multiplies a basis X of the right space by M^T M and takes the best approximation within its span
    (Rayleigh-Ritz: eigenvectors of (M X)^T M X). Its energy is never more than what as many singular vectors hold.
    The start is a count sketch of the rows. X is held transposed, which is how a CPU multiplies it fastest, and nothing of
    the matrix's size is written.
    """
    scale, total, finite = _measure(matrix)
    share = 1.0 / jnp.where(finite & (total > 0), total, 1.0)

    def clean(thin):
        return jnp.where(finite, thin / scale, 0.0)

    def forward(x):
        return clean(_contract(matrix, x, 1, 1))  # M X, [m, columns]

    def backward(y):
        return clean(_contract(y, matrix, 0, 0))  # (M^T Y)^T, [columns, n]

    def again(state):
        sweeps, _, (*_, certain, hopeless) = state
        return (sweeps < SWEEPS) & ~certain & ~hopeless

    def sweep(state):
        sweeps, x, _ = state
        x = _orthonormal_rows(x)
        y = forward(x)
        image = backward(y)
        values, z = jnp.linalg.eigh(_contract(y, y, 0, 0), symmetrize_input=False)
        values, z = values[::-1] * share, z[:, ::-1]
        x, image = _contract(z, x, 0, 0), _contract(z, image, 0, 0) * share
        residuals = jnp.sum((image - x * values[:, None]) ** 2, axis=1)
        rank, certain, hopeless = _certified_rank(values, residuals, threshold, precise)
        certain, rank = certain | (total == 0), jnp.where(total > 0, rank, 0)
        return sweeps + 1, image, (x, y, z, values, rank, certain & finite, hopeless)

    y = forward(clean(_count_sketch(matrix, columns)))
    x = backward(_contract(y, _whitening(_contract(y, y, 0, 0), 1e-5), 1, 1))
    square, no = jnp.zeros((columns, columns)), jnp.bool_(False)
    nothing = (jnp.zeros_like(x), jnp.zeros_like(y), square, square[0], jnp.int32(0), no, no)
    _, _, (x, y, z, values, rank, certain, _) = jax.lax.while_loop(again, sweep, (0, x, nothing))

    rank = _counted(rank, True, r)
    keep = _pad(_filled(rank, r, precise)[None, :columns], columns)
    left = _pad(_contract(y, jnp.where(keep, z * scale, 0.0), 1, 0)[:, :r], r)
    right = _pad(jnp.where(keep, x.T, 0.0)[:, :r], r).T
    return Factors(left, right, rank), certain, values


def _certified_rank(ritz, residuals, threshold, precise):
    """`(K, whether no smaller rank keeps more than T, whether more sweeps are of no use)` from Ritz values as shares of the
    energy, and the squared lengths of their residuals.

    The first K Ritz vectors keep sum_{i<=K} ritz_i, so K is enough. That K - 1 are not: keep the first j >= K - 1 Ritz
    vectors apart from everything else, whose largest eigenvalue is at most mu = ritz_{j+1} + sqrt(residuals beyond j); then
    the K - 1 largest eigenvalues of G exceed the K - 1 largest Ritz values by no more than
    sum_{i<=j} residual_i / (ritz_{K-1} - mu), in sum. One thing is taken for granted, that nothing outside the basis is
    larger than its smallest Ritz values, as after sweeps from a random start; were it wrong, K would be too large, and the
    energy kept all the same.
    """
    r = len(ritz)
    kept = jnp.cumsum(ritz)
    rank = 1 + jnp.sum(kept <= threshold + ROUNDING)
    k = rank if precise else jnp.maximum(rank - 1, 1)  # so many Ritz values are compared with eigenvalues
    inside = jnp.cumsum(residuals)
    gap = ritz[k - 1] - ritz[1:] - jnp.sqrt(jnp.maximum(inside[-1] - inside[:-1], 0.0))
    usable = (jnp.arange(1, r) >= k) & (gap > 0)
    excess = jnp.min(jnp.where(usable, inside[:-1] / jnp.where(gap > 0, gap, 1.0), jnp.inf), initial=jnp.inf)
    below = jnp.where(rank > 1, kept[rank - 2], -jnp.inf)
    enough = (below + excess <= threshold - ROUNDING) & (excess <= ROUNDING if precise else True)
    # written so that NaN, which Cholesky gives for a basis without full rank, is not certain and hopeless
    hopeless = ~(kept[-1] > threshold - 0.3 * (1.0 - threshold))
    return rank, enough & (kept[-1] > threshold + ROUNDING), hopeless


def _energy_bound(k, gram, ritz):
    """What share of the energy k directions can hold at most, from the trace and the Frobenius norm of G.

    Without Ritz values: k / n + sqrt(k (1 - k / n) (q - 1 / n)), q = |G|_F^2 / tr(G)^2, reached where k eigenvalues are equal
    and so are the others. With them, which are lower bounds of the largest eigenvalues, the same for the rest.
    """
    n, r = gram.shape[0], len(ritz)
    trace = jnp.trace(gram)
    q = jnp.sum((gram / jnp.where(trace > 0, trace, 1.0)) ** 2)
    k, n, rest = k - r, n - r, 1.0 - jnp.sum(ritz)
    spread = jnp.sqrt(jnp.maximum(q - jnp.sum(ritz**2) - rest**2 / n, 0.0) + ROUNDING * q)
    bound = 1.0 - rest + rest * k / n + math.sqrt(max(k, 0) * (1 - k / n)) * spread
    bound = jnp.where(trace > 0, bound, 1.0)
    if r == 0:
        return bound
    plain = _energy_bound(k + r, gram, ritz[:0])
    # eigenvalues above their Ritz values would take from the rest; where that could raise the bound, nothing is known
    slope = 1.0 - k / n - math.sqrt(max(k, 0) * (1 - k / n)) * (ritz[-1] - rest / n) / spread
    return jnp.where(slope <= 0, jnp.minimum(bound, plain), plain) if k > 0 else plain


def _count_sketch(matrix, k):
    """k sums of rows, `[k, n]`: every row is added, with a random sign, to one of them."""
    m, _ = matrix.shape
    signed = jax.random.rademacher(jax.random.key(0), (m, 1), matrix.dtype)

    def add(i, sums):  # a slice that would reach over the end is moved back
        rows, signs = (jax.lax.dynamic_slice_in_dim(x, i * k, k) for x in (matrix, signed))
        return sums + rows * signs

    return jax.lax.fori_loop(0, -(-m // k), add, jnp.zeros((k, matrix.shape[1])), unroll=min(-(-m // k), 16))


def _orthonormal_rows(x):
    return _contract(_whitening(_contract(x, x, 1, 1), 1e-3), x, 1, 0)


def _whitening(gram, accuracy):
    """W with W gram W^T = 1, `[k, k]`: from Cholesky where every vector keeps a share `accuracy` of its length when those
    before it are taken out, else from eigh, with zero rows for what has no length of its own."""
    lower = jnp.linalg.cholesky(gram, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, jnp.eye(len(gram)), left_side=True, lower=True)
    squares = jnp.diagonal(gram)

    def from_eigh():
        length = jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))
        values, z = jnp.linalg.eigh(gram * length[:, None] * length[None, :], symmetrize_input=False)
        usable = values > 1e-6 * values[-1]
        return (z * jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, values, 1.0)), 0.0)[None, :]).T * length[None, :]

    return when(~jnp.all(jnp.diagonal(lower) ** 2 > accuracy**2 * squares), from_eigh, inverse)


def _contract(a, b, axis_a, axis_b):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _mm(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _power_of_two(largest: jax.Array) -> jax.Array:
    """The power of two at or below a number; 1 for zero, NaN and infinity."""
    usable = jnp.isfinite(largest) & (largest >= jnp.finfo(largest.dtype).tiny)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1.0))
    return jnp.ldexp(jnp.ones_like(largest), exponent - 1)
