"""Dynamic gradient approximation (eqs. 8-9): truncated SVD that keeps a share of a matrix's energy.

Pure functions of one matrix, under `jit`, `vmap` and `shard_map`, with static shapes: the rank is a count, the rest is masked.
Three factorisations find the smallest rank, each with its cost:

"svd"         `jnp.linalg.svd`: LAPACK's, all singular vectors of both sides.
"gram"        eigenvectors V of the smaller Gram matrix G = M^T M, then U S = M V.
"randomized"  `subspace_iteration` from a few random probes until the rank is certain, which takes a handful of thin matrix
              products, of M or of G, where the energy lies in few directions; "gram" where it stays uncertain.

"auto" is "randomized" for all but small matrices (`choose_method`, which holds the measurements). Where the caller has no use
for more than `max_rank` directions, two sums over G can show that more are needed, and nothing is factorised at all
(`_energy_bound`).

A matrix whose squares leave float32, or its thin products, is divided by a power of two near its entries. All products are at
highest precision: TF32 would spoil the Gram matrix.

Nothing here is differentiated: gradients through an SVD are NaN wherever singular values repeat or vanish, so the factors carry
none (`stop_gradient`). For the straight-through gradient, write `x + stop_gradient(decode(encode(x)) - x)`.
"""

import functools
import itertools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from fedkd_jax.check import check_int, check_number, check_type
from fedkd_jax.subspace import ROUNDING, contract, measure, power_of_two, random_probes, subspace_iteration, tied, when
from fedkd_jax.types import Array, Factors, LowRank, Number

METHODS = ("auto", "svd", "gram", "randomized")
SMALL = 2**16  # with fewer entries than this, a condition costs more than it saves


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
        check_number(name, value, "(0, 1]")
    check_int("rounds", rounds)
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

    Raises:
        ValueError: other than one axis.

    >>> import jax.numpy as jnp
    >>> s = jnp.array([3.0, 2.0, 1.0])                      # energies 9, 4, 1 of 14
    >>> [int(retained_rank(s, t)) for t in (0.5, 0.7, 0.95, 1.0)], int(retained_rank(0 * s, 0.5))
    ([1, 2, 3, 3], 0)
    """
    if jnp.ndim(singular_values) != 1:
        raise ValueError(f"singular_values has shape {jnp.shape(singular_values)}; allowed: one axis")
    s = jnp.asarray(singular_values)
    s = s / power_of_two(jnp.max(s, initial=0.0))
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
        `LowRank(u [m, r], s [r], vt [r, n], rank [])`, entries past `rank` zero. A matrix with a NaN or
        infinite entry, or a Frobenius norm beyond float32, gives NaN factors of full rank; no other gives a NaN. "svd" gives
        orthonormal columns of u throughout; the others, which work with M^T M in float32, to about 1e-3 down to a hundredth of
        the largest singular value, and no longer below a thousandth. V is orthonormal with all.

    Raises:
        ValueError: unknown method, a matrix that is not 2-D or complex, `max_rank` below 1, a number for a threshold that is
            outside (0, 1] (a traced one is not looked at).

    >>> import jax.numpy as jnp
    >>> matrix = jnp.outer(jnp.arange(1.0, 5.0), jnp.array([1.0, 0.0, 2.0]))
    >>> low_rank = truncated_svd(matrix, 0.95)
    >>> int(low_rank.rank), bool(jnp.allclose(reconstruct(low_rank), matrix, atol=1e-5))
    (1, True)
    """
    if jnp.ndim(matrix) == 2 and matrix.shape[0] < matrix.shape[1]:
        _check(matrix, threshold, method, max_rank)
        low_rank = truncated_svd(jnp.asarray(matrix).T, threshold, method=method, max_rank=max_rank)
        return LowRank(low_rank.vt.T, low_rank.s, low_rank.u.T, low_rank.rank)
    matrix, r = _check(matrix, threshold, method, max_rank)
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
    start: Float[Array, "c k"] | None = None,
) -> Factors:
    """What travels: M ~ left right of the smallest rank that keeps more than T of the energy; nothing where that rank is
    above `max_rank`.

    The factor of the longer side is U diag(s), the other one V^T (of a wide matrix U): K (m + n) numbers, the energy of
    U diag(s) V^T, and no division by small singular values.

    Args:
        matrix, threshold, method: as in `truncated_svd`.
        max_rank: the static number of columns r; what needs more is not factorised.
        start: directions `[c, min(m, n)]` in the space of the shorter side from which subspace iteration begins, such as those
            of an earlier, similar matrix, in unit rows or rows of zeros. The other methods do not use it.

    Returns:
        `Factors(left [m, r], right [r, n], rank [])`, zero past `rank`. Where more than r columns are needed, or an entry
        is not finite, `rank` is r + 1 and both factors are zero.

    Raises:
        ValueError: as `truncated_svd`, or `start` of another shape than `[sketch_columns(k), k]`, k = min(m, n).

    >>> import jax.numpy as jnp
    >>> matrix = jnp.outer(jnp.arange(1.0, 5.0), jnp.array([1.0, 0.0, 2.0]))
    >>> factors = factorise(matrix, 0.95)
    >>> int(factors.rank), bool(jnp.allclose(factors.left @ factors.right, matrix, atol=1e-5))
    (1, True)
    >>> int(factorise(jnp.eye(20), 0.95, max_rank=5).rank)
    6
    """
    if jnp.ndim(matrix) == 2 and matrix.shape[0] < matrix.shape[1]:
        factors = factorise(jnp.asarray(matrix).T, threshold, method=method, max_rank=max_rank, start=start)
        return Factors(factors.right.T, factors.left.T, factors.rank)
    matrix, r = _check(matrix, threshold, method, max_rank)
    if start is not None and jnp.shape(start) != (shape := (sketch_columns(matrix.shape[1]), matrix.shape[1])):
        raise ValueError(
            f"start has shape {jnp.shape(start)}; allowed: {shape}, [sketch_columns(k), k] with k = min(m, n)"
        )
    return _factorise(matrix, threshold, method, r, precise=False, start=start)


def reconstruct(low_rank: LowRank) -> Float[Array, "m n"]:
    """U diag(s) V^T, `[m, n]`, at highest matrix precision. The reference code forgets the diag.

    Raises:
        TypeError: no `LowRank`.

    >>> import jax.numpy as jnp
    >>> matrix = jnp.array([[3.0, 1.0], [0.0, 2.0]])
    >>> bool(jnp.allclose(reconstruct(truncated_svd(matrix, 1.0)), matrix, atol=1e-5))
    True
    """
    check_type("low_rank", low_rank, LowRank)
    return contract(low_rank.u * low_rank.s[None, :], low_rank.vt, 1, 0)


def weighted_product(factors: Factors, weights: Float[Array, "k"]) -> Float[Array, "m n"]:
    """The sum over clients of w_k left_k right_k, `[m, n]`, as one matrix product of inner size k r: no client's own matrix is
    built. Columns that no client uses take no part, in steps of a quarter and a half of r.

    Args:
        factors: of k clients, `left [k, m, r]`, `right [k, r, n]`, `rank [k]`.
        weights: `[k]`.

    Raises:
        ValueError: shapes that are not these.

    >>> import jax, jax.numpy as jnp
    >>> matrices = jnp.stack([jnp.outer(jnp.arange(4.0), jnp.arange(3.0)), jnp.ones((4, 3))])
    >>> factors = jax.vmap(lambda matrix: factorise(matrix, 0.9))(matrices)
    >>> weighted_product(factors, jnp.array([1.0, 10.0]))[3].round(4).tolist()
    [10.0, 13.0, 16.0]
    """
    check_type("factors", factors, Factors)
    (*k, m, r), (*same, inner, n) = factors.left.shape, factors.right.shape
    if k != same or r != inner or tuple(k) != jnp.shape(weights) or len(k) != 1:
        raise ValueError(
            f"factors has shapes {factors.left.shape} and {factors.right.shape} with weights {jnp.shape(weights)}; allowed: "
            "[k, m, r], [k, r, n] and [k]"
        )

    def add(columns, _):
        w = weights[:, None, None]
        left = jnp.where(w > 0, factors.left[..., :columns] * w, 0)
        axes = (((0, 2), (0, 1)), ((), ()))
        return jax.lax.dot_general(left, factors.right[:, :columns], axes, precision=jax.lax.Precision.HIGHEST)

    used = jnp.max(jnp.where(factors.rank > r, 0, factors.rank), initial=0)
    return _only_used(used, r, len(weights) * m * n, add, jnp.zeros((m, n), jnp.result_type(factors.left, weights)))


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


# ---- which factorisation, and where ------------------------------------------------------------------------------------


def choose_method(m: int, n: int) -> str:
    """What "auto" is for an `[m, n]` matrix, from `sims.bench svd` on two CPU cores (no accelerator was at hand).

    Milliseconds per matrix of a stack of 8, T = 0.95, "gram" / "randomized":

    ===========  ============  ======================  ============
    matrix       gradient      update of 5 Adam steps  noise
    ===========  ============  ======================  ============
    256 x 128    0.47 / 0.36   0.53 / 0.53             0.14 / 0.15
    1536 x 384   4.8 / 1.8     6 / 6.7                 1.9 / 2.5
    768 x 768    20 / 2.1      23 / 24                 3 / 3.6
    3072 x 768   35 / 9.8      42 / 45                 15 / 18
    30522 x 128  16 / 16       15 / 15                 17 / 17
    576 x 64     0.35 / 0.21   0.24 / 0.24             0.26 / 0.25
    ===========  ============  ======================  ============

    What decides is the spectrum, which only an attempt finds out. In vain it costs up to half as much again, and for updates of
    many Adam steps `method="gram"` saves that. Below a shorter side of 48 the two differ by some 30 microseconds of one core
    at most.

    T, batch and platform have their say where they are known. T: when the program runs, the attempt is given up after its
    first products where its directions miss more than 4 (1 - T) of the energy; which of the two is faster was the same for
    T = 0.95 and 0.98. Batch: it was the same for stacks of 1, 8 and 64 too, because a CPU takes the matrices one by one, each
    as long as it needs. An accelerator takes them together, as long as the slowest needs, and "svd", whose batches are
    serial there above 32 x 32 (not measured by us), is never chosen.

    >>> [choose_method(*shape) for shape in ((768, 768), (30522, 128), (10, 128))]
    ['randomized', 'randomized', 'gram']
    """
    return "randomized" if min(m, n) >= 48 else "gram"


def sketch_columns(n: int) -> int:
    """How many columns subspace iteration has for a matrix whose shorter side is n.

    >>> [sketch_columns(n) for n in (64, 128, 768, 3072)]
    [24, 48, 64, 256]
    """
    return max(min(3 * n // 8, max(64, n // 12)), 1)


def _check(matrix, threshold, method, max_rank):
    if isinstance(threshold, numbers.Real):
        check_number("threshold", threshold, "(0, 1]")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if jnp.ndim(matrix) != 2:
        raise ValueError(f"matrix has shape {jnp.shape(matrix)}; allowed: two axes")
    if jnp.iscomplexobj(matrix):
        raise ValueError(f"matrix has dtype {matrix.dtype}; allowed: real numbers")
    if max_rank is not None:
        check_int("max_rank", max_rank)
    r = min(matrix.shape) if max_rank is None else min(*matrix.shape, max_rank)
    return jax.lax.stop_gradient(jnp.asarray(matrix, jnp.float32)), r


@functools.partial(jax.jit, static_argnames=("method", "r", "precise"))
def _factorise(matrix, threshold, method, r, precise, start=None) -> Factors:
    """Of a tall matrix. `precise`: singular vectors are wanted, and the first r of them even where more would be needed;
    otherwise any directions that keep enough energy will do, and none where r are too few. One trace for all matrices of a
    shape."""
    m, n = matrix.shape
    if r == 0:
        return Factors(matrix[:, :r], matrix[:r], jnp.int32(0))
    method = choose_method(m, n) if method == "auto" else method
    run = functools.partial({"svd": _svd, "gram": _gram, "randomized": _randomized}[method], r, precise)
    # On a CPU `vmap` becomes a loop: two batched LAPACK calls of different shapes in one program can hang there for good
    # (jax 0.10.2, two cores), and batches are serial from jax 0.11 on anyway. On a GPU eigh is truly batched.
    one_by_one = jax.custom_batching.sequential_vmap(run)
    threshold, start = tied(jax.lax.stop_gradient((jnp.float32(threshold), start)), matrix[0, 0] > 0)
    return jax.lax.platform_dependent(matrix, threshold, start, cpu=one_by_one, default=run)


def _svd(r, precise, matrix, threshold, start) -> Factors:
    del start
    scaled, scale, finite = _scaled(matrix)
    u, s, vt = jnp.linalg.svd(scaled, full_matrices=False)
    return _sent(u * (s * scale)[None, :], vt, jnp.where(finite, retained_rank(s, threshold), r + 1), r, precise)


def _gram(r, precise, matrix, threshold, start, columns=0) -> Factors:
    """Eigenvectors of G = M^T M: by subspace iteration where so many columns are enough, otherwise all of them, unless sums
    over G show that r are too few."""

    def carefully(_):
        scaled, _, finite = _scaled(matrix)
        return contract(scaled, scaled, 0, 0), finite

    gram = contract(matrix, matrix, 0, 0)
    trace = jnp.trace(gram)
    lift = jnp.where(trace < 1e-20, 2.0**60, 1.0)  # or products with the smallest numbers of float32 are 0
    usual = (trace > 1e-20) & (trace < 1e30)
    gram, finite = when(~usual, carefully, (gram, jnp.bool_(True)))
    trace = jnp.trace(gram)
    gram = gram / jnp.where(trace > 0, trace, 1.0)

    def product(x):
        return jnp.zeros((0, columns), x.dtype), contract(x, gram, 1, 0)

    def eigenvectors(_):
        values, v = jnp.linalg.eigh(gram, symmetrize_input=False)
        return v[:, ::-1].T[:r], retained_rank(jnp.sqrt(jnp.maximum(values[::-1], 0.0)), threshold)

    right, rank, wanted = jnp.zeros((r, len(gram)), gram.dtype), jnp.where(trace > 0, r + 1, 0), trace > 0
    if columns:
        probes = random_probes(columns, len(gram))
        _, x, found, certain = subspace_iteration(product, probes, threshold, start=start, powers=3, precise=precise)
        right, rank, wanted = resized(x, right.shape), jnp.where(certain, found, rank), wanted & ~certain
    if not precise and r < len(gram):
        wanted &= _energy_bound(r, gram) > threshold - ROUNDING
    right, rank = when(wanted, eigenvectors, (right, rank))
    rank = jnp.where(finite, rank, r + 1)
    keep = _kept(rank, r, r, precise)

    def fill(columns, left):
        return left.at[:, :columns].set(contract(matrix, right[:columns] * lift, 1, 1) / lift)

    left = _only_used(jnp.sum(keep), r, matrix.size, fill, jnp.zeros((len(matrix), r), matrix.dtype))
    return _sent(left, right, rank, r, precise)


def _randomized(r, precise, matrix, threshold, start) -> Factors:
    """Subspace iteration, and all eigenvectors of the Gram matrix where that leaves the rank undecided."""
    c = sketch_columns(matrix.shape[1])
    if matrix.shape[1] <= 4 * c:  # products with G cost less than with M, even with that for G itself
        return _gram(r, precise, matrix, threshold, start, columns=c)
    scale, total, finite = measure(matrix)
    share = 1.0 / jnp.where(finite & (total > 0), total, 1.0)
    half = power_of_two(jnp.sqrt(scale))  # before and after, or products leave float32 at both of its ends

    def clean(thin):
        return jnp.where(finite, thin / (scale / half), 0.0)

    def product(x):
        y = clean(contract(matrix, x / half, 1, 1))
        return y, clean(contract(y / half, matrix, 0, 0)) * share

    probes = random_probes(c, matrix.shape[1])
    left, right, rank, certain = subspace_iteration(product, probes, threshold, start=start, precise=precise)
    certain = finite & (certain | (total == 0))
    few = _sent(left * scale, right, jnp.where(certain, rank, r + 1), r, precise)
    return when(finite & ~certain, lambda _: _gram(r, precise, matrix, threshold, None), few)


def _sent(left, right, rank, r, precise) -> Factors:
    """The first `rank` of k directions, `left [m, k]` and `right [k, n]`, in r columns."""
    keep = _kept(rank, r, len(right), precise)
    left, right = jnp.where(keep[None, :], left, 0.0), jnp.where(keep[:, None], right, 0.0)
    rank = jnp.minimum(rank, r + 1).astype(jnp.int32)
    return Factors(resized(left, (len(left), r)), resized(right, (r, right.shape[1])), rank)


def _kept(rank, r, k, precise):
    """Which of k directions travel: the first `rank`; where that is above r, the first r or none."""
    return jnp.arange(k) < jnp.where(rank > r, r if precise else 0, rank)


def resized(x: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Cut at the end of its axes, or filled up with zeros.

    >>> resized(jnp.ones((1, 3)), (2, 2)).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    return jax.lax.pad(x, x.dtype.type(0), [(0, new - old, 0) for new, old in zip(shape, x.shape, strict=True)])


def _only_used(used, r, size, make, nothing):
    """`make(columns, nothing)` with a quarter, a half or all of r columns, the fewest that hold those used, or `nothing` where
    none is; of small matrices always all."""
    if size < SMALL:
        return make(r, nothing)
    for fewer, columns in itertools.pairwise((0, r // 4, r // 2, r)):
        nothing = when((used > fewer) & (used <= columns), functools.partial(make, columns), nothing)
    return nothing


def _scaled(matrix) -> tuple[Array, Array, Array]:
    """`(matrix / scale, scale, whether it is finite)`; zeros where it is not, because LAPACK must not see a NaN."""
    scale, _, finite = measure(matrix)
    return jnp.where(finite, matrix / scale, 0.0), scale, finite


def _energy_bound(most, gram):
    """What share of the energy `most` directions can hold at most, from the trace (1) and the Frobenius norm of G.

    k of n values that sum to 1 and whose squares sum to q are at most k / n + sqrt(k (1 - k / n) (q - 1 / n)), reached where
    the k are equal and so are the others.
    """
    n = len(gram)
    q = jnp.sum(gram * gram) * (1.0 + ROUNDING)
    return most / n + jnp.sqrt(most * (1.0 - most / n) * jnp.maximum(q - 1.0 / n, 0.0))
