"""What a client keeps between rounds, in half the bits: float32 while it trains, bfloat16 at rest.

bfloat16 has 8 significant bits. Rounded to the nearest, a weight that a round moves by less than 1 / 512 of itself would stay
where it is, in every round, and training would stand still. Rounded up or down at random it arrives in the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fedkd_jax.types import Array, Key, PyTree

NAN = 0x7FC0  # bits of a bfloat16; those of a float32 might be in its lower half alone


def stochastic_round(x: Float[Array, "..."], key: Key) -> Float[jax.Array, "..."]:
    """To one of the two neighbours in bfloat16, to each the likelier the nearer it is: the mean over keys is x.

    What bfloat16 can represent stays as it is, so do NaN and infinity; what is finite stays finite: beyond bfloat16's
    largest number, 3.39e38, it becomes that.

    Args:
        x: `[...]` float32.
        key: a typed PRNG key.

    Returns:
        `[...]` bfloat16.

    Raises:
        TypeError: no key.

    >>> x = jnp.full(10_000, 1 + 1 / 512)  # a quarter of the way from 1 to the next
    >>> rounded = stochastic_round(x, jax.random.key(0))
    >>> sorted(set(rounded.tolist())), abs(float((rounded > 1).mean()) - 0.25) < 0.02
    ([1.0, 1.0078125], True)
    """
    x = jnp.asarray(x, jnp.float32)
    # a bfloat16 is the upper half of a float32: random lower halves, added, carry as often as they should
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    noise = jnp.where(jnp.abs(x) < float(jnp.finfo(jnp.bfloat16).max), noise, 0)
    upper = jnp.where(jnp.isnan(x), NAN, (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16)
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def to_rest(tree: PyTree, dtype: Any, key: Key | None = None) -> PyTree:
    """The arrays of float32 of one client, in `dtype`; scalars and all other types stay as they are.

    Args:
        tree: parameters, or an optimiser's state.
        dtype: float32, which changes nothing, or bfloat16.
        key: for `stochastic_round`, the client's of this round; without one it is to the nearest, once, where states begin.

    Raises:
        ValueError: another `dtype`; arrays in bfloat16 or float16 that are to rest in bfloat16.

    >>> tree = {"w": jnp.array([1.0, 1.001]), "step": jnp.int32(3)}
    >>> to_rest(tree, jnp.bfloat16)
    {'step': Array(3, dtype=int32), 'w': Array([1, 1], dtype=bfloat16)}
    >>> to_rest(tree, jnp.float32) is tree
    True
    """
    if not _rests(dtype):
        return tree

    def leaf(i: int, x: Any) -> Any:
        if not (x.ndim and jnp.issubdtype(x.dtype, jnp.floating)):
            return x
        if x.dtype != jnp.float32:
            raise ValueError(f"what is to rest in bfloat16 has an array of {x.dtype}; allowed: float32")
        if key is None:  # and not astype, which XLA may leave out where it is undone in the same program
            return jax.lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16)
        return stochastic_round(x, jax.random.fold_in(key, i))

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaf(i, x) for i, x in enumerate(leaves)])


def from_rest(tree: PyTree, dtype: Any) -> PyTree:
    """What `to_rest(tree, dtype)` gave, in float32 again.

    Raises:
        ValueError: a `dtype` that is neither float32 nor bfloat16.

    >>> from_rest(to_rest({"w": jnp.array([1.5])}, jnp.bfloat16), jnp.bfloat16)
    {'w': Array([1.5], dtype=float32)}
    """
    if not _rests(dtype):
        return tree
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def check_rest(**dtypes: Any) -> None:
    """Refuses what states cannot rest in.

    Raises:
        TypeError: no dtype.
        ValueError: a dtype that is neither float32 nor bfloat16.

    >>> try: check_rest(teacher_dtype=jnp.int8)
    ... except ValueError as error: print(error)
    teacher_dtype is int8; allowed: float32, bfloat16
    """
    for name, dtype in dtypes.items():
        try:
            jnp.dtype(dtype)
        except TypeError:
            raise TypeError(f"{name} is {dtype!r}; allowed: float32, bfloat16") from None
        if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {jnp.dtype(dtype)}; allowed: float32, bfloat16")


def _rests(dtype: Any) -> bool:
    check_rest(dtype=dtype)
    return jnp.dtype(dtype) == jnp.bfloat16
