"""FedKD's codec: each matrix of an update as the factors of the smallest rank that keeps T of its energy (eqs. 8-9).

The cost of a matrix sent as factors is K (m + n) + K^2 in the paper's count; a real message sends (U diag(s)) and V, K (m + n)
numbers, and K itself. Which leaves went as factors is a bit mask in the message's constant header, not counted.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fedkd_jax.aggregate import weighted_sum
from fedkd_jax.check import check_fn, check_number
from fedkd_jax.codecs.base import check_size, named
from fedkd_jax.subspace import when
from fedkd_jax.svd import (
    METHODS,
    SMALL,
    MatrixView,
    choose_method,
    factorise,
    matrix_view,
    resized,
    sketch_columns,
    weighted_product,
)
from fedkd_jax.types import Array, Codec, Factors, Leaf, Number, Payload, PyTree, Schedule, record

RANK_BYTES = 4


@record
class Factored:
    """A leaf that may travel as factors, a pair for each of its b matrices; what goes raw has zero factors, and vice versa.

    >>> factors = Factors(jnp.zeros((1, 5, 2)), jnp.zeros((1, 2, 4)), jnp.zeros(1, jnp.int32))
    >>> Factored(factors=factors, raw=jnp.zeros((5, 4)), as_factors=jnp.array([True])).raw.shape
    (5, 4)
    """

    factors: Any  # Factors [b]
    raw: Leaf  # of the leaf's shape
    as_factors: Leaf  # [b] bool


def compressible_by_rank(path: str, leaf: Array) -> bool:
    """Default choice of `svd_codec`: every leaf with two axes or more (leaves that are not floating point go raw anyway).

    >>> import numpy as np
    >>> compressible_by_rank("dense/kernel", np.zeros((4, 3))), compressible_by_rank("dense/bias", np.zeros(3))
    (True, False)
    """
    del path
    return leaf.ndim >= 2


def view_by_shape(path: str, leaf: Array) -> MatrixView:
    """Default view of `svd_codec`: `matrix_view` of the leaf's shape.

    >>> import numpy as np
    >>> view_by_shape("conv/kernel", np.zeros((5, 5, 32, 64))).rows
    3
    """
    del path
    return matrix_view(leaf.shape)


def svd_codec(
    threshold: Number | Schedule,
    *,
    compressible: Callable[[str, Array], bool] = compressible_by_rank,
    view: Callable[[str, Array], MatrixView] = view_by_shape,
    method: str = "auto",
    warm_start: bool = False,
) -> Codec:
    """FedKD's compression: each matrix as the factors of the smallest rank that keeps more than T of its energy.

    A matrix goes as factors only where K (m + n) + K^2 < m n, the paper's rule; otherwise it goes raw and decodes to exactly
    itself, so a message never costs more than `identity_codec`'s. A matrix with a NaN or infinite entry goes raw.
    Matrices of one shape, of all leaves, are factorised together, in float32, and travel as float32; the factors of a 16-bit
    leaf are rounded to its dtype, which may cost more energy than T allows.

    Decoding has no gradient with respect to the update. For the straight-through one, in a loss that looks through the codec,
    write `update + stop_gradient(decode(encode(update)) - update)`.

    Args:
        threshold: T in (0, 1], or a schedule round -> T such as `energy_threshold(0.95, 0.98, rounds)`.
        compressible: `(path, leaf) -> bool`, path as "dense/kernel"; False sends the leaf raw.
        view: `(path, leaf) -> MatrixView`, which matrix a tensor of more than two axes is, or which matrices. For layers
            `[layers, m, n]`: `lambda path, leaf: matrix_view(leaf.shape, stack=1)`.
        method: as in `truncated_svd`.
        warm_start: whether each sender keeps the directions of its last message, `[columns, min(m, n)]` of every matrix, and
            begins its next subspace iteration there. Measured, that saves 10 to 40 % of the time of a matrix that does
            not change at all and nothing of others, whose certificate takes as many products as from random probes; "svd"
            and "gram" do not use it. Ranks are certified all the same; which directions are sent, and so the last digits of a
            result, then depend on what the sender sent before. Off by default for all this, and because the state must be
            kept for every client.

    Raises:
        ValueError: a constant threshold outside (0, 1], an unknown method.

    >>> from fedkd_jax import energy_threshold
    >>> codec = svd_codec(energy_threshold(0.95, 0.98, rounds=10))
    >>> update = {"kernel": jnp.outer(jnp.arange(8.0), jnp.arange(6.0)), "bias": jnp.arange(6.0)}
    >>> payload = codec.encode(update, 0, jax.random.key(0))
    >>> int(payload.ranks["kernel"]), bool(jnp.allclose(codec.decode(payload)["kernel"], update["kernel"], atol=1e-4))
    (1, True)
    """
    if not callable(threshold):
        check_number("threshold", threshold, "(0, 1]")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    check_fn("compressible", compressible, "(path, leaf) -> bool")
    check_fn("view", view, "(path, leaf) -> MatrixView")

    def matrices_of(name: str, leaf: Array) -> Array | None:
        """`[b, m, n]` of a leaf that may travel as factors."""
        if not (jnp.issubdtype(leaf.dtype, jnp.floating) and compressible(name, leaf)):
            return None
        matrices = view(name, leaf).matrices(leaf)
        return matrices if max_factored_rank(*matrices.shape[1:]) > 0 else None

    def init(update: PyTree) -> dict[str, Any]:
        state = {}
        for name, leaf in named(update).items():
            if (matrices := matrices_of(name, leaf)) is not None:
                b, m, n = matrices.shape
                if (choose_method(m, n) if method == "auto" else method) == "randomized":
                    state[name] = jnp.zeros((b, sketch_columns(min(m, n)), min(m, n)), jnp.float32)
        return state

    def compress(update: PyTree, round, key, state: dict[str, Any]) -> tuple[Payload, dict[str, Any]]:
        del key
        share = threshold(round) if callable(threshold) else threshold
        content = named(jax.lax.stop_gradient(update))
        check_size(content.values())
        groups, ranks, state = collections.defaultdict(dict), {}, dict(state)
        floats, nbytes, sent = jnp.int32(0), jnp.int32(0), {}
        for name, leaf in content.items():
            if (matrices := matrices_of(name, leaf)) is not None:
                groups[matrices.shape[1:], leaf.dtype][name] = matrices
            else:
                floats, nbytes, sent[name] = floats + leaf.size, nbytes + leaf.nbytes, jnp.int32(leaf.size)
        for ((m, n), dtype), group in groups.items():
            most = max_factored_rank(m, n)
            stack = jnp.concatenate([*group.values()])
            starts = jnp.concatenate([state[name] for name in group]) if group.keys() <= state.keys() else None
            factors = jax.vmap(
                lambda x, start, most=most: factorise(x, share, method=method, max_rank=most, start=start)
            )(stack, starts)
            as_factors = factors.rank <= most
            if jnp.finfo(dtype).bits < 32:  # they travel as wide as the leaf is, unless U diag(s) leaves float16
                left, right = factors.left.astype(dtype), factors.right.astype(dtype)
                as_factors &= jnp.all(jnp.isfinite(left), axis=(1, 2)) & jnp.all(jnp.isfinite(right), axis=(1, 2))
                left, right = (jnp.where(as_factors[:, None, None], x, 0) for x in (left, right))
                factors = Factors(left, right, jnp.where(as_factors, factors.rank, most + 1))
            k = jnp.where(as_factors, factors.rank, 0)
            numbers = jnp.where(as_factors, k * (m + n), m * n)
            width = jnp.where(as_factors, factors.left.dtype.itemsize, dtype.itemsize)
            floats += jnp.sum(numbers + k * k, dtype=jnp.int32)
            nbytes += jnp.sum(numbers * width + jnp.where(as_factors, RANK_BYTES, 0), dtype=jnp.int32)
            rank, start = jnp.where(as_factors, k, min(m, n)), 0
            for name, matrices in group.items():
                own = slice(start, start := start + len(matrices))
                raw = jnp.where(as_factors[own, None, None], 0, matrices).reshape(content[name].shape)
                content[name] = Factored(
                    factors=jax.tree.map(lambda x, own=own: x[own], factors), raw=raw, as_factors=as_factors[own]
                )
                count = lambda x: jnp.sum(x, dtype=jnp.int32)  # noqa: E731
                sent[name] = Factored(
                    factors=Factors(count(k[own] * m), count(k[own] * n), count(as_factors[own])),
                    raw=count(~as_factors[own]) * m * n,
                    as_factors=jnp.int32(0),
                )
                ranks[name] = rank[own] if view(name, content[name].raw).stack else rank[own][0]
                if name in state:
                    directions = factors.right[own] if m >= n else jnp.swapaxes(factors.left[own], 1, 2)
                    state[name] = resized(directions.astype(jnp.float32), state[name].shape)
        content, sent = (
            jax.tree.unflatten(jax.tree.structure(update), [x[name] for name in content]) for x in (content, sent)
        )
        return Payload(content=content, floats=floats, nbytes=nbytes, ranks=ranks, sent=sent), state

    def encode(update: PyTree, round, key) -> Payload:
        return compress(update, round, key, {})[0]

    def each(content: PyTree, factored: Callable, other: Callable) -> PyTree:
        def leaf(x):
            return factored(x) if isinstance(x, Factored) else other(x)

        return jax.tree.map(leaf, content, is_leaf=lambda x: isinstance(x, Factored))

    def decode(payload: Payload) -> PyTree:
        def one(x):
            low_rank = jax.vmap(
                lambda f: weighted_product(jax.tree.map(lambda y: y[None], f), jnp.ones(1, jnp.float32))
            )(x.factors)
            raw = x.raw.reshape(low_rank.shape)
            return jnp.where(x.as_factors[:, None, None], low_rank.astype(raw.dtype), raw).reshape(x.raw.shape)

        return each(payload.content, one, lambda x: x)

    def decode_sum(payloads: Payload, weights: Float[Array, "k"]) -> PyTree:
        return each(payloads.content, lambda x: _decoded(x, weights), lambda x: weighted_sum(x, weights))

    return Codec(compress, decode, decode_sum, init) if warm_start else Codec(encode, decode, decode_sum)


def _decoded(x: Factored, weights: Float[Array, "k"]) -> Array:
    """The weighted sum of k clients' messages of one leaf."""
    low_rank = jax.vmap(lambda factors: weighted_product(factors, weights), in_axes=1)(x.factors)
    shape = x.raw.shape[1:]
    if x.raw.size < SMALL:
        return low_rank.reshape(shape) + weighted_sum(x.raw, weights)
    some_raw = jnp.any(~x.as_factors & (weights > 0)[:, None])
    return low_rank.reshape(shape) + when(
        some_raw, lambda _: weighted_sum(x.raw, weights), jnp.zeros(shape, jnp.result_type(x.raw, weights))
    )


def max_factored_rank(m: int, n: int) -> int:
    """The largest K with K (m + n) + K^2 < m n; 0 where even one pair of vectors costs more than the matrix.

    >>> max_factored_rank(768, 768), max_factored_rank(1, 50)
    (318, 0)
    """
    k = int(((m + n) ** 2 + 4 * m * n) ** 0.5 - (m + n)) // 2 + 1
    while k > 0 and k * (m + n) + k * k >= m * n:
        k -= 1
    return k
