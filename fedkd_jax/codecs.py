"""Codecs: how an update becomes a message and back, and what the message costs.

A codec is a pair of pure functions for one client. The cost is counted where the message is encoded: in the paper's count
of numbers, K (m + n) + K^2 for a matrix sent as factors, and in bytes of a real message, which sends (U diag(s)) and V,
K (m + n) numbers, and K itself. Which leaves went as factors is a bit mask in the message's constant header, not counted.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Int

from fedkd_jax.svd import energy_threshold, matrix_shape, reconstruct, truncated_svd
from fedkd_jax.types import Array, Codec, LowRank, Number, Payload, PyTree, Schedule, record

__all__ = ["energy_threshold", "identity_codec", "payload_bytes", "payload_floats", "svd_codec"]

RANK_BYTES = 4


@record
class _Factored:
    """A leaf that may travel as factors: those, or the leaf as it is (the other one is zero)."""

    factors: LowRank
    raw: Array
    as_factors: Array  # [] bool


def payload_floats(payload: Payload) -> Int[Array, ""]:
    """How many numbers a message holds, in the paper's count: K (m + n) + K^2 for factors, m n for a raw matrix; `[]` int32.

    >>> import jax, jax.numpy as jnp
    >>> codec = svd_codec(0.95)
    >>> int(payload_floats(codec.encode({"w": jnp.ones((30, 20)), "b": jnp.ones(20)}, 0, jax.random.key(0))))
    71
    """
    return payload.floats


def payload_bytes(payload: Payload) -> Int[Array, ""]:
    """How many bytes a real message needs: 4 K (m + n) and 4 for K, or 4 m n for a raw matrix; `[]` int32.

    >>> import jax, jax.numpy as jnp
    >>> codec = svd_codec(0.95)
    >>> int(payload_bytes(codec.encode({"w": jnp.ones((30, 20)), "b": jnp.ones(20)}, 0, jax.random.key(0))))
    284
    """
    return payload.nbytes


def identity_codec() -> Codec:
    """Sends everything as it is: floats = the number of entries, bytes = their size.

    >>> import jax, jax.numpy as jnp
    >>> codec = identity_codec()
    >>> payload = codec.encode({"w": jnp.ones((30, 20))}, 0, jax.random.key(0))
    >>> int(payload.floats), int(payload.nbytes), codec.decode(payload)["w"].shape
    (600, 2400, (30, 20))
    """

    def encode(update: PyTree, round, key) -> Payload:
        del round, key
        leaves = jax.tree.leaves(update)
        _check_size(leaves)
        return Payload(
            content=update,
            floats=jnp.int32(sum(x.size for x in leaves)),
            nbytes=jnp.int32(sum(x.nbytes for x in leaves)),
            ranks={},
        )

    return Codec(encode, lambda payload: payload.content)


def compressible_by_rank(path: str, leaf: Array) -> bool:
    """Default choice of `svd_codec`: every leaf with two axes or more.

    >>> import numpy as np
    >>> compressible_by_rank("dense/kernel", np.zeros((4, 3))), compressible_by_rank("dense/bias", np.zeros(3))
    (True, False)
    """
    del path
    return leaf.ndim >= 2


def svd_codec(
    threshold: Number | Schedule,
    *,
    compressible: Callable[[str, Array], bool] = compressible_by_rank,
    method: str = "auto",
) -> Codec:
    """FedKD's compression: each matrix as the factors of the smallest rank that keeps more than T of its energy.

    A leaf goes as factors only where K (m + n) + K^2 < m n, the paper's rule; otherwise it goes raw and decodes to exactly
    itself, so a message never costs more than `identity_codec`'s. A leaf with a NaN or infinite entry goes raw.

    Args:
        threshold: T in (0, 1], or a schedule round -> T such as `energy_threshold(0.95, 0.98, rounds)`.
        compressible: `(path, leaf) -> bool`, path as "dense/kernel"; False sends the leaf raw. A tensor of more than two
            axes is seen as the matrix `matrix_shape` gives.
        method: as in `truncated_svd`.

    Raises:
        ValueError: a constant threshold outside (0, 1].

    >>> import jax, jax.numpy as jnp
    >>> codec = svd_codec(energy_threshold(0.95, 0.98, rounds=10))
    >>> update = {"kernel": jnp.outer(jnp.arange(8.0), jnp.arange(6.0)), "bias": jnp.arange(6.0)}
    >>> payload = codec.encode(update, 0, jax.random.key(0))
    >>> int(payload.ranks["kernel"]), bool(jnp.allclose(codec.decode(payload)["kernel"], update["kernel"], atol=1e-4))
    (1, True)
    """
    if not callable(threshold) and not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; allowed: a share of energy in (0, 1]")

    def encode(update: PyTree, round, key) -> Payload:
        del key
        share = threshold(round) if callable(threshold) else threshold
        leaves, treedef = jax.tree.flatten_with_path(update)
        _check_size([leaf for _, leaf in leaves])
        content, ranks, floats, nbytes = [], {}, jnp.int32(0), jnp.int32(0)
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            most = max_factored_rank(*matrix_shape(leaf.shape)) if compressible(name, leaf) else 0
            if most == 0:
                content.append(leaf)
                floats, nbytes = floats + leaf.size, nbytes + leaf.nbytes
                continue
            m, n = matrix_shape(leaf.shape)
            # one column more than could be sent shows that more is needed
            factors = truncated_svd(leaf.reshape(m, n), share, method=method, max_rank=most + 1)
            k, as_factors = factors.rank, factors.rank <= most
            content.append(
                _Factored(
                    factors=jax.tree.map(functools.partial(_zero_unless, as_factors), factors),
                    raw=_zero_unless(~as_factors, leaf),
                    as_factors=as_factors,
                )
            )
            ranks[name] = jnp.where(as_factors, k, min(m, n)).astype(jnp.int32)
            floats += jnp.where(as_factors, k * (m + n) + k * k, leaf.size)
            nbytes += jnp.where(as_factors, k * (m + n) * leaf.dtype.itemsize + RANK_BYTES, leaf.nbytes)
        return Payload(content=jax.tree.unflatten(treedef, content), floats=floats, nbytes=nbytes, ranks=ranks)

    def decode(payload: Payload) -> PyTree:
        def leaf(x):
            if not isinstance(x, _Factored):
                return x
            return jnp.where(x.as_factors, reconstruct(x.factors).reshape(x.raw.shape), x.raw)

        return jax.tree.map(leaf, payload.content, is_leaf=lambda x: isinstance(x, _Factored))

    return Codec(encode, decode)


def max_factored_rank(m: int, n: int) -> int:
    """The largest K with K (m + n) + K^2 < m n; 0 where even one pair of vectors costs more than the matrix.

    >>> max_factored_rank(768, 768), max_factored_rank(1, 50)
    (318, 0)
    """
    k = int(((m + n) ** 2 + 4 * m * n) ** 0.5 - (m + n)) // 2 + 1
    while k > 0 and k * (m + n) + k * k >= m * n:
        k -= 1
    return k


def _zero_unless(keep, x):
    return jnp.where(keep, x, jnp.zeros_like(x))


def _check_size(leaves):
    size = sum(x.nbytes for x in leaves)
    if size > jnp.iinfo(jnp.int32).max:
        raise ValueError(
            f"update has {size} bytes; allowed: at most {jnp.iinfo(jnp.int32).max}, what the int32 count holds"
        )
