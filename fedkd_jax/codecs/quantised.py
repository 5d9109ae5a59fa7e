"""Numbers as small integers: FedPAQ's codec, and what shortens the factors of another."""

from typing import Any

import jax
import jax.numpy as jnp

from fedkd_jax.check import check_int
from fedkd_jax.codecs.base import raw_payload
from fedkd_jax.types import Codec, Leaf, Payload, PyTree, record, static_field

SCALE_BYTES = 4


@record
class Levels:
    """A leaf as integers times a scale.

    >>> Levels(levels=jnp.zeros((3, 2), jnp.int8), scale=jnp.float32(0), bits=5, dtype=jnp.float32).bits
    5
    """

    levels: Leaf  # of the leaf's shape, int8 or int16
    scale: Leaf  # [] float32
    bits: int = static_field()  # of each integer as it travels
    dtype: Any = static_field()  # the leaf's


def quantise(bits: int) -> Codec:
    """Every number as one of 2^bits - 1 multiples of the largest absolute value of its leaf, rounded up or down at random.

    With s = 2^(bits-1) - 1 and m = max |x|, x becomes floor(s x / m + u) in -s..s, u uniform in [0, 1): its mean is s x / m, so
    that what arrives, times m / s, is unbiased, and nowhere further from x than m / s. Zeros stay zeros. A leaf costs
    `bits` for each number and 4 bytes for m, where anything of it is sent at all; leaves that are not floating point go raw.

    Reference: the low-precision quantiser of Alistarh et al., "QSGD", NeurIPS 2017, with the largest value for the norm.

    Args:
        bits: 2 to 16, the sign's among them. The simulation holds them in int8 or int16.

    Raises:
        ValueError: other `bits`; when it recodes, what is quantised already.

    >>> codec, update = quantise(2), jnp.array([1.0, -1.0, 0.0, 0.25])
    >>> arrived = jax.vmap(lambda key: codec.decode(codec.encode(update, 0, key)))(jax.random.split(jax.random.key(0), 4000))
    >>> arrived[0, :3].tolist(), abs(float(arrived[:, 3].mean()) - 0.25) < 0.03
    ([1.0, -1.0, 0.0], True)
    >>> int(codec.encode(update, 0, jax.random.key(0)).nbytes)
    5
    """
    check_int("bits", bits, 2, 16)
    most, kind = 2 ** (bits - 1) - 1, jnp.int8 if bits <= 8 else jnp.int16

    def one(x, key):
        scale = jnp.max(jnp.abs(x), initial=0.0)
        share = x / jnp.where(scale > 0, scale, 1.0)
        levels = jnp.floor(most * share.astype(jnp.float32) + jax.random.uniform(key, x.shape))
        levels = jnp.clip(levels, -most, most).astype(kind)
        return Levels(levels=levels, scale=scale.astype(jnp.float32), bits=bits, dtype=x.dtype)

    def recode(payload: Payload, round, key) -> Payload:
        del round
        if any(
            isinstance(x, Levels) for x in jax.tree.leaves(payload.content, is_leaf=lambda x: isinstance(x, Levels))
        ):
            raise ValueError("payload holds integers of another quantise; allowed: one in a chain")
        leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(payload.content))
        whole = [jnp.int32(x.size) for x in leaves]  # of a codec that does not say how many of its entries are padding
        counts = whole if not jax.tree.leaves(payload.sent) else structure.flatten_up_to(payload.sent)
        nbytes, out, sent = payload.nbytes, [], []
        for i, (x, count) in enumerate(zip(leaves, counts, strict=True)):
            if jnp.issubdtype(x.dtype, jnp.floating):
                packed = count // 8 * bits + (count % 8 * bits + 7) // 8
                nbytes += packed + jnp.where(count > 0, SCALE_BYTES, 0) - count * x.dtype.itemsize
                out.append(one(x, jax.random.fold_in(key, i)))
                sent.append(Levels(levels=count, scale=jnp.int32(count > 0), bits=bits, dtype=x.dtype))
            else:
                out.append(x)
                sent.append(count)
        content, sent = (jax.tree.unflatten(structure, x) for x in (out, sent))
        return Payload(content=content, floats=payload.floats, nbytes=nbytes, ranks=payload.ranks, sent=sent)

    def encode(update: PyTree, round, key) -> Payload:
        return recode(raw_payload(update), round, key)

    def decode(payload: Payload) -> PyTree:
        def leaf(x: Any):
            if not isinstance(x, Levels):
                return x
            return (x.levels.astype(jnp.float32) * (x.scale / most)).astype(x.dtype)

        return jax.tree.map(leaf, payload.content, is_leaf=lambda x: isinstance(x, Levels))

    return Codec(encode, decode, recode=recode)
