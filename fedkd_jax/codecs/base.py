"""What all codecs share: the cost of a message, the codec that changes nothing, and codecs one after the other.

A codec is a pair of pure functions for one client, and one that adds up the messages of many. The cost is counted where the
message is encoded: in the paper's count of numbers, and in bytes of a real message. Of what `Payload.content` holds only
`Payload.sent` travels: shapes are static, so that a message of varying size is padded.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from fedkd_jax.aggregate import weighted_sum
from fedkd_jax.check import check_type
from fedkd_jax.types import Array, Codec, Key, Leaf, Payload, PyTree


def payload_floats(payload: Payload) -> Int[Array, ""]:
    """How many numbers a message holds, in the paper's count: K (m + n) + K^2 for factors, m n for a raw matrix; `[]` int32.

    Raises:
        TypeError: no `Payload`.

    >>> from fedkd_jax import svd_codec
    >>> codec = svd_codec(0.95)
    >>> int(payload_floats(codec.encode({"w": jnp.ones((30, 20)), "b": jnp.ones(20)}, 0, jax.random.key(0))))
    71
    """
    check_type("payload", payload, Payload)
    return payload.floats


def payload_bytes(payload: Payload) -> Int[Array, ""]:
    """How many bytes a real message needs; of factors 4 K (m + n) and 4 for K, of a raw matrix 4 m n; `[]` int32.

    Raises:
        TypeError: no `Payload`.

    >>> from fedkd_jax import svd_codec
    >>> codec = svd_codec(0.95)
    >>> int(payload_bytes(codec.encode({"w": jnp.ones((30, 20)), "b": jnp.ones(20)}, 0, jax.random.key(0))))
    284
    """
    check_type("payload", payload, Payload)
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
        return raw_payload(update)

    return Codec(
        encode, lambda payload: payload.content, lambda payloads, weights: weighted_sum(payloads.content, weights)
    )


def init_codec(codec: Codec | None, update: PyTree) -> PyTree:
    """The state a codec starts with, `()` where it has none.

    >>> import numpy as np
    >>> init_codec(identity_codec(), np.zeros(3)), init_codec(None, np.zeros(3))
    ((), ())
    """
    return () if codec is None or codec.init is None else codec.init(update)


def encode(codec: Codec, update: PyTree, round: Leaf, key: Key, state: PyTree) -> tuple[Payload, PyTree]:
    """`(payload, new state)`, whether the codec has a state or not.

    Raises:
        ValueError: the codec has a state and `state` is not one of its own.

    >>> import jax, numpy as np
    >>> payload, state = encode(identity_codec(), np.zeros(3, np.float32), 0, jax.random.key(0), ())
    >>> int(payload.floats), state
    (3, ())
    """
    if codec.init is None:
        return codec.encode(update, round, key), state
    expected, given = (jax.tree.structure(x) for x in (jax.eval_shape(codec.init, update), state))
    if expected != given:
        raise ValueError(f"state has the structure {given}; allowed: {expected}, what init_codec(codec, update) gives")
    return codec.encode(update, round, key, state)


def chain(first: Codec, *rest: Codec) -> Codec:
    """Codecs one after the other: each of `rest` recodes what the one before it sends, such as SVD factors as 8-bit integers.

    The cost is that of the last message. A state, such as that of error feedback, can only be the first's: to feed back the
    errors of a whole chain, write `error_feedback(chain(...))`.

    Raises:
        TypeError: something else than codecs.
        ValueError: one of `rest` cannot shorten another's message.

    >>> from fedkd_jax import quantise, svd_codec
    >>> update = {"w": jnp.outer(jnp.arange(30.0), jnp.arange(20.0))}
    >>> for codec in (identity_codec(), svd_codec(0.95), chain(svd_codec(0.95), quantise(8))):
    ...     print(int(codec.encode(update, 0, jax.random.key(0)).nbytes))
    2400
    204
    62
    """
    check_type("first", first, Codec)
    for i, codec in enumerate(rest, 1):
        check_type(f"codec {i} of the chain", codec, Codec)
        if codec.recode is None:
            raise ValueError(f"codec {i} of the chain has no recode; allowed after the first: quantise(...)")

    def recoded(payload: Payload, round, keys) -> Payload:
        for codec, key in zip(rest, keys, strict=True):
            assert codec.recode is not None
            payload = codec.recode(payload, round, key)
        return payload

    def encode(update: PyTree, round, key, *state) -> Any:
        key, *keys = jax.random.split(key, 1 + len(rest))
        if first.init is None:
            return recoded(first.encode(update, round, key), round, keys)
        payload, new = first.encode(update, round, key, *state)
        return recoded(payload, round, keys), new

    def of_first(payload: Payload) -> Payload:
        for codec in rest[::-1]:
            payload = dataclasses.replace(payload, content=codec.decode(payload))
        return payload

    def decode_sum(payloads: Payload, weights) -> PyTree:
        assert first.decode_sum is not None
        return first.decode_sum(jax.vmap(of_first)(payloads), weights)

    decode = lambda payload: first.decode(of_first(payload))  # noqa: E731
    return Codec(encode, decode, None if first.decode_sum is None else decode_sum, first.init)


def error_feedback(codec: Codec) -> Codec:
    """What a message could not say is added to the next one: e <- (g + e) - decode(encode(g + e)), from e = 0.

    Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes", ICML 2019. Every client, and the
    server of a downlink, keeps an e of the size of an update. What arrives must be nearer to what was sent than 0
    is: of `quantise(2)` it is not, and e grows.

    Raises:
        TypeError: no codec.

    >>> from fedkd_jax import top_k
    >>> codec, update = error_feedback(top_k(0.5)), jnp.array([3.0, 2.0])
    >>> state = codec.init(update)
    >>> for round in range(3):
    ...     payload, state = codec.encode(update, round, jax.random.key(0), state)
    ...     print(codec.decode(payload).tolist(), state["error"].tolist())
    [3.0, 0.0] [0.0, 2.0]
    [0.0, 4.0] [3.0, 0.0]
    [6.0, 0.0] [0.0, 2.0]
    """
    check_type("codec", codec, Codec)

    def init(update: PyTree) -> dict[str, PyTree]:
        return {"error": optax.tree.zeros_like(update), "codec": init_codec(codec, update)}

    def compress(update: PyTree, round, key, state):
        wanted = optax.tree.add(update, state["error"])
        payload, own = encode(codec, wanted, round, key, state["codec"])
        return payload, {"error": optax.tree.sub(wanted, codec.decode(payload)), "codec": own}

    return Codec(compress, codec.decode, codec.decode_sum, init)


def raw_payload(update: PyTree) -> Payload:
    """The message of an update as it is.

    Raises:
        ValueError: more bytes than the int32 count holds.

    >>> payload = raw_payload({"w": jnp.ones((30, 20))})
    >>> int(payload.nbytes), int(payload.sent["w"])
    (2400, 600)
    """
    leaves = jax.tree.leaves(update)
    check_size(leaves)
    return Payload(
        content=update,
        floats=jnp.int32(sum(x.size for x in leaves)),
        nbytes=jnp.int32(sum(x.nbytes for x in leaves)),
        ranks={},
        sent=jax.tree.map(lambda x: jnp.int32(x.size), update),
    )


def named(tree: PyTree) -> dict[str, Any]:
    """{path as "dense/kernel": leaf}.

    >>> named({"dense": {"kernel": 1, "bias": 2}})
    {'dense/bias': 2, 'dense/kernel': 1}
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_size(leaves: Iterable[Array]) -> None:
    """An update is of arrays, and must not have more bytes than an int32 counts.

    Raises:
        TypeError: something else.
        ValueError: too many bytes.

    >>> check_size([jnp.zeros(3)])
    """
    leaves = list(leaves)
    for leaf in leaves:
        if not hasattr(leaf, "nbytes"):
            raise TypeError(f"update has a leaf {leaf!r}; allowed: arrays")
    size = sum(x.nbytes for x in leaves)
    if size > jnp.iinfo(jnp.int32).max:
        raise ValueError(
            f"update has {size} bytes; allowed: at most {jnp.iinfo(jnp.int32).max}, what the int32 count holds"
        )
