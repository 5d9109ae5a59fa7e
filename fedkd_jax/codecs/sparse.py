"""Few of many numbers: the largest, and count sketches, in which FetchSGD's server looks for them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Int

from fedkd_jax.aggregate import weighted_sum
from fedkd_jax.check import check_int, check_number
from fedkd_jax.codecs.base import check_size, raw_payload
from fedkd_jax.types import Array, Codec, Leaf, Number, Payload, PyTree, record, static_field

INDEX_BYTES = 4


@record
class Sparse:
    """The largest entries of a flattened update with their places; or all n entries, zeros but for the largest.

    >>> Sparse(values=jnp.ones(2), indices=jnp.array([7, 1]), like=(None, 9, jnp.float32)).indices.tolist()
    [7, 1]
    """

    values: Leaf  # [k], or [n]
    indices: Leaf  # [k] int32, or ()
    like: Any = static_field()  # as `_ravel` gives it


def _ravel(update: PyTree) -> tuple[jax.Array, tuple]:
    """The numbers of an update in a row, and what makes an update of such a row: (unravel, size, dtype)."""
    flat, unravel = ravel_pytree(update)
    return flat, (unravel, flat.size, flat.dtype)


def _count(share: Number, size: int) -> int:
    return math.ceil(round(share * size, 6))  # 0.07 * 100 is 7.000000000000001


def _largest(flat: Float[Array, "n"], k: int) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    indices = jax.lax.top_k(jnp.abs(flat), k)[1]
    return flat[indices], indices


def _sparse_payload(values, indices, like) -> Payload:
    k, width, (_, size, _) = len(indices), values.dtype.itemsize, like
    if k * (width + INDEX_BYTES) >= size * width:
        values, indices = jnp.zeros(size, values.dtype).at[indices].set(values), ()
    content = Sparse(values=values, indices=indices, like=like)
    return raw_payload(content)


def _dense(payload: Payload) -> PyTree:
    unravel, size, dtype = payload.content.like
    values, indices = payload.content.values.astype(dtype), payload.content.indices
    return unravel(values if isinstance(indices, tuple) else jnp.zeros(size, dtype).at[indices].set(values))


def top_k(share: Number) -> Codec:
    """The k entries of the whole update that are largest in absolute value, with their places; the rest arrives as zero.

    k = ceil(share n) of n numbers. A message holds k values and k indices, 2k numbers in the paper's count, 8k bytes of
    float32; where all n numbers, most of them zeros, take no more bytes than that, it holds these. It is biased: use it as
    `error_feedback(top_k(share))`.

    Reference: Aji and Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017.

    Raises:
        ValueError: a share outside (0, 1].

    >>> codec = top_k(0.4)
    >>> payload = codec.encode({"a": jnp.array([1.0, -3.0]), "b": jnp.array([[2.0, 0.5, 0.1]])}, 0, jax.random.key(0))
    >>> decoded = codec.decode(payload)
    >>> decoded["a"].tolist(), decoded["b"].tolist(), int(payload.nbytes)
    ([0.0, -3.0], [[2.0, 0.0, 0.0]], 16)
    """
    check_number("share", share, "(0, 1]")

    def encode(update: PyTree, round, key) -> Payload:
        del round, key
        check_size(jax.tree.leaves(update))
        flat, like = _ravel(update)
        return _sparse_payload(*_largest(flat, _count(share, flat.size)), like)

    return Codec(encode, _dense)


# ---- count sketches ----------------------------------------------------------------------------------------------------


def _hashes(size: int, rows: int, columns: int, seed: int) -> tuple[Int[Array, "rows n"], Float[Array, "rows n"]]:
    """Of every number its column and its sign in each row; the same for everybody."""
    bits = jax.lax.map(lambda key: jax.random.bits(key, (size,)), jax.random.split(jax.random.key(seed), rows))
    return ((bits >> 1) % columns).astype(jnp.int32), 1.0 - 2.0 * (bits & 1).astype(jnp.float32)


def sketch(flat: Float[Array, "n"], rows: int, columns: int, seed: int = 0) -> Float[Array, "rows columns"]:
    """The count sketch of n numbers: in each row, number i is added with a random sign to a random one of the columns. Linear.

    >>> one, other = jnp.arange(5.0), jnp.ones(5)
    >>> bool(jnp.allclose(sketch(one, 3, 4) + sketch(other, 3, 4), sketch(one + other, 3, 4)))
    True
    """
    where, sign = _hashes(flat.size, rows, columns, seed)
    add = lambda where, sign: jnp.zeros(columns, jnp.float32).at[where].add(sign * flat)  # noqa: E731
    return jax.vmap(add)(where, sign)


def unsketch(table: Float[Array, "rows columns"], size: int, seed: int = 0) -> Float[Array, "size"]:
    """What the numbers may have been: for each the median over rows of its column times its sign. Unbiased per row.

    >>> x = jnp.zeros(100).at[jnp.array([3, 70])].set(jnp.array([5.0, -7.0]))
    >>> guess = unsketch(sketch(x, 5, 40), 100)
    >>> guess[jnp.array([3, 70])].tolist(), float(jnp.median(jnp.abs(guess)))
    ([5.0, -7.0], 0.0)
    """
    rows, columns = table.shape
    where, sign = _hashes(size, rows, columns, seed)
    return jnp.median(jnp.take_along_axis(table, where, axis=1) * sign, axis=0)


@record
class Sketched:
    """A count sketch of an update, which may be added to others.

    >>> Sketched(table=jnp.zeros((3, 10)), like=()).table.shape
    (3, 10)
    """

    table: Leaf  # [rows, columns]
    like: Any = static_field()  # as `_ravel` gives it


def sketch_codec(rows: int, columns: int, *, seed: int = 0) -> Codec:
    """Sends the count sketch of an update, `rows` x `columns` numbers, and decodes to it, a `Sketched`.

    For `server_sketch_codec` on the way down, which finds the largest numbers in the sum.

    Raises:
        ValueError: fewer than one row or column.

    >>> codec = sketch_codec(3, 10)
    >>> payload = codec.encode({"w": jnp.ones((8, 9))}, 0, jax.random.key(0))
    >>> codec.decode(payload).table.shape, int(payload.nbytes)
    ((3, 10), 120)
    """
    _check_table(rows, columns, seed)

    def encode(update: PyTree, round, key) -> Payload:
        del round, key
        flat, like = _ravel(update)
        return raw_payload(Sketched(table=sketch(flat, rows, columns, seed), like=like))

    decode_sum = lambda payloads, weights: weighted_sum(payloads.content, weights)  # noqa: E731
    return Codec(encode, lambda payload: payload.content, decode_sum)


def server_sketch_codec(rows: int, columns: int, share: Number, *, momentum: Number = 0.9, seed: int = 0) -> Codec:
    """FetchSGD's server: momentum and error accumulation on sketches, and the largest numbers that they hold, sent down.

    Of the mean S of the clients' sketches, with M and E sketches that the server keeps, from 0:
        M <- momentum M + S;  E <- E + M;  D = the k largest of unsketch(E);  D is sent, 2k numbers.
    Then every cell of M and E that a number of D falls into is set to 0, as in the authors' code. The paper's
    E <- E - sketch(D) takes from a cell what several numbers of D guessed there, and E grew without bound in our trials
    from k = columns / 5 on.

    Raises:
        ValueError: fewer than one row or column, a share outside (0, 1], a momentum outside [0, 1).

    >>> up, down = sketch_codec(5, 50), server_sketch_codec(5, 50, 0.1, momentum=0.0)
    >>> update = {"w": jnp.zeros(20).at[jnp.array([4, 9])].set(jnp.array([2.0, -1.0]))}
    >>> table = up.decode(up.encode(update, 0, jax.random.key(0)))
    >>> payload, state = down.encode(table, 0, jax.random.key(0), down.init(update))
    >>> bool(jnp.allclose(down.decode(payload)["w"], update["w"])), float(jnp.abs(state["error"]).max())
    (True, 0.0)
    """
    _check_table(rows, columns, seed)
    check_number("share", share, "(0, 1]")
    check_number("momentum", momentum, "[0, 1)")

    def init(update: PyTree) -> dict[str, Any]:
        del update
        return {"momentum": jnp.zeros((rows, columns)), "error": jnp.zeros((rows, columns))}

    def compress(sketched: Sketched, round, key, state):
        del round, key
        _, size, _ = sketched.like
        moving = momentum * state["momentum"] + sketched.table
        error = state["error"] + moving
        values, indices = _largest(unsketch(error, size, seed), _count(share, size))
        columns_of, _ = _hashes(size, rows, columns, seed)
        row = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, len(indices)))
        state = {
            name: table.at[row, columns_of[:, indices]].set(0.0)
            for name, table in (("momentum", moving), ("error", error))
        }
        return _sparse_payload(values, indices, sketched.like), state

    return Codec(compress, _dense, init=init)


def _check_table(rows, columns, seed):
    check_int("rows", rows)
    check_int("columns", columns)
    check_int("seed", seed, 0)
