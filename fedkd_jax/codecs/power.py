"""PowerSGD's codec: a low rank that is given, from one step of the power method."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedkd_jax.check import check_fn, check_int
from fedkd_jax.codecs.base import check_size, named
from fedkd_jax.codecs.low_rank import compressible_by_rank, view_by_shape
from fedkd_jax.svd import MatrixView
from fedkd_jax.types import Array, Codec, Leaf, Payload, PyTree, record, static_field


@record
class _Product:
    """b matrices of a leaf as products."""

    left: Leaf  # [b, m, r], orthonormal columns
    right: Leaf  # [b, r, n]
    shape: Any = static_field()  # the leaf's, and its dtype
    dtype: Any = static_field()


def power_codec(
    rank: int,
    *,
    compressible: Callable[[str, Array], bool] = compressible_by_rank,
    view: Callable[[str, Array], MatrixView] = view_by_shape,
) -> Codec:
    """Each matrix M as P Q^T of rank r: P = orth(M Q), Q <- M^T P, from the Q of the sender's last message.

    Costs r (m + n) float32 numbers for a matrix where that is less than the matrix itself; others go raw. It is biased: use it
    as `error_feedback(power_codec(rank))`, PowerSGD's form. Each client multiplies with a Q of its own, where PowerSGD's
    workers share one.

    Reference: Vogels, Karimireddy, Jaggi, "PowerSGD: practical low-rank gradient compression", NeurIPS 2019.

    Args:
        rank: r, at least 1.
        compressible, view: as for `svd_codec`.

    Raises:
        ValueError: a rank below 1.

    >>> codec, update = power_codec(1), {"w": jnp.outer(jnp.arange(8.0), jnp.arange(6.0)), "b": jnp.ones(6)}
    >>> payload, state = codec.encode(update, 0, jax.random.key(0), codec.init(update))
    >>> bool(jnp.allclose(codec.decode(payload)["w"], update["w"], atol=1e-4)), int(payload.floats)
    (True, 20)
    """
    check_int("rank", rank)
    check_fn("compressible", compressible, "(path, leaf) -> bool")
    check_fn("view", view, "(path, leaf) -> MatrixView")

    def matrices_of(name: str, leaf: Array) -> Array | None:
        if not (jnp.issubdtype(leaf.dtype, jnp.floating) and compressible(name, leaf)):
            return None
        matrices = view(name, leaf).matrices(leaf)
        _, m, n = matrices.shape
        return matrices if 4 * rank * (m + n) < m * n * leaf.dtype.itemsize else None  # factors travel as float32

    def init(update: PyTree) -> dict[str, Array]:
        state: dict[str, Array] = {}
        for i, (name, leaf) in enumerate(named(update).items()):
            if (matrices := matrices_of(name, leaf)) is not None:
                b, _, n = matrices.shape
                state[name] = jax.random.normal(jax.random.key(i), (b, n, rank))
        return state

    def compress(update: PyTree, round, key, state: dict[str, Array]):
        del round, key
        leaves = named(jax.lax.stop_gradient(update))
        check_size(leaves.values())
        content, sent, floats, nbytes, state = {}, {}, 0, 0, dict(state)
        for name, leaf in leaves.items():
            if (matrices := matrices_of(name, leaf)) is None:
                content[name], sent[name] = leaf, jnp.int32(leaf.size)
                floats, nbytes = floats + leaf.size, nbytes + leaf.nbytes
                continue
            b, m, n = matrices.shape
            matrices = matrices.astype(jnp.float32)
            left = jnp.linalg.qr(matrices @ state[name])[0]
            right = jnp.swapaxes(left, 1, 2) @ matrices
            # a matrix of zeros must not leave a start of zeros, from which nothing is ever found
            some = jnp.any(right != 0, axis=(1, 2), keepdims=True)
            state[name] = jnp.where(some, jnp.swapaxes(right, 1, 2), state[name])
            product = _Product(left=left, right=right, shape=leaf.shape, dtype=leaf.dtype)
            content[name], sent[name] = product, jax.tree.map(lambda x: jnp.int32(x.size), product)
            floats, nbytes = floats + b * rank * (m + n), nbytes + 4 * b * rank * (m + n)
        content, sent = (jax.tree.unflatten(jax.tree.structure(update), x.values()) for x in (content, sent))
        payload = Payload(content=content, floats=jnp.int32(floats), nbytes=jnp.int32(nbytes), ranks={}, sent=sent)
        return payload, state

    def decode(payload: Payload) -> PyTree:
        def leaf(x):
            if not isinstance(x, _Product):
                return x
            return (x.left @ x.right).reshape(x.shape).astype(x.dtype)

        return jax.tree.map(leaf, payload.content, is_leaf=lambda x: isinstance(x, _Product))

    return Codec(compress, decode, init=init)
