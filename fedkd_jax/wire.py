"""A message as bytes: what of a payload travels and nothing else, sealed so that only the other end can read it.

    message = version [1] | template [16] | parts               sealed = nonce [12] | AES-256-GCM of the message | tag [16]

The template is a digest of names, shapes, dtypes and widths of a payload, which both ends know from model and codec; so none of
them is taken from a message, and nothing is allocated on its word. What a sparse or sketched message stands for is in it by
its size only. Parts come leaf by leaf, little-endian:

    any array                its entries
    `Factored`, b matrices   a bit for each, whether as factors; ranks int32; columns of left; rows of right; raw matrices
    `Levels`                 integers of `bits` bits in two's complement, one after another; the scale, where there are any
    `Sparse`                 values; places
    `SubUpdate`              the entries that are kept; which these are both ends know

These are the bytes that codecs count, and a constant more: `overhead`.
"""

import dataclasses
import functools
import hashlib
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedkd_jax.algorithms.feddropout import SubUpdate
from fedkd_jax.check import check_int, check_type
from fedkd_jax.codecs.low_rank import Factored
from fedkd_jax.codecs.quantised import Levels
from fedkd_jax.codecs.sparse import Sparse
from fedkd_jax.types import Factors, Payload, PyTree

VERSION = 1
TEMPLATE_BYTES, NONCE_BYTES, TAG_BYTES, RUN_BYTES = 16, 12, 16, 16
WHOLE = [...]  # of an array: the indices whose entries travel, one after another
DIRECTIONS = ("up", "down")


class WireError(ValueError):
    """A message is not what this end may take: changed, cut short, replayed, of somebody else, or of another template.

    >>> issubclass(WireError, ValueError)
    True
    """


# ---- bytes -------------------------------------------------------------------------------------------------------------


def serialise(payload: Payload) -> bytes:
    """What travels of `payload.content`, `payload.nbytes` bytes, behind a header of constant length.

    Every codec of the library sends what it counts. Of one's own codec every leaf of the content travels whole.

    >>> from fedkd_jax import identity_codec
    >>> message = serialise(identity_codec().encode({"w": np.ones(3, np.float32)}, 0, jax.random.key(0)))
    >>> len(message), np.frombuffer(message[17:], np.float32).tolist()
    (29, [1.0, 1.0, 1.0])
    """
    writer = _Writer()
    _travel(writer, payload.content)
    return b"".join([_header(payload)[0], *writer.parts])


def deserialise(message: bytes, like: Payload) -> Payload:
    """The payload that a message holds, all arrays in NumPy, bit for bit as `serialise` was given it.

    Nothing that is not of the template is accepted, and of what is there is one message only: `serialise` of the result is
    `message` again. Memory is a small multiple of the template's arrays and the message's length, whatever it says.

    Args:
        message: of `serialise`.
        like: what is expected, `template(payload)` or `jax.eval_shape` of the codec's `encode`.

    Returns:
        A payload for `decode`, with `nbytes` as it was counted; what else the sender's held of counts is not sent.

    Raises:
        WireError: another version or template, a message too short or too long, a rank or a place out of range, set bits that
            mean nothing.
        ValueError: `like` lacks what both ends are to know, see `template`.

    >>> from fedkd_jax import identity_codec
    >>> payload = identity_codec().encode({"w": np.ones(3, np.float32)}, 0, jax.random.key(0))
    >>> deserialise(serialise(payload), template(payload)).content
    {'w': array([1., 1., 1.], dtype=float32)}
    >>> deserialise(serialise(payload)[:-1], template(payload))
    Traceback (most recent call last):
    fedkd_jax.wire.WireError: message has 28 bytes, in w; allowed: 1 more at least
    """
    header, flags = _header(like)
    if message[:1] != header[:1]:
        raise WireError(f"message has version {message[:1].hex() or 'none'}; allowed: {header[:1].hex()}")
    if message[: len(header)] != header:
        given, own = message[1 : len(header)].hex(), header[1:].hex()
        raise WireError(f"message has template {given}; allowed: {own}, of the same model, codec and version")
    reader = _Reader(message, len(header))
    content = _travel(reader, like.content)
    if reader.at != len(message):
        raise WireError(f"message has {len(message)} bytes; allowed: {reader.at}, what its parts take")
    nbytes = np.int32(len(message) - len(header) - flags)
    return Payload(content=content, floats=(), nbytes=nbytes, ranks={})


def overhead(like: Payload) -> int:
    """How many bytes a sealed message has beside those that are counted, the same for all of a model and codec.

    1 + 16 + 12 + 16 = 45 for version, template, nonce and tag, and ceil(b / 8) for each leaf that may go as factors of its b
    matrices.

    >>> from fedkd_jax import identity_codec, svd_codec
    >>> update = {"w": np.ones((30, 20), np.float32), "b": np.ones(20, np.float32)}
    >>> [overhead(codec.encode(update, 0, jax.random.key(0))) for codec in (identity_codec(), svd_codec(0.9))]
    [45, 46]
    """
    header, flags = _header(like)
    return len(header) + flags + NONCE_BYTES + TAG_BYTES


def template(payload: Payload) -> Payload:
    """What the other end knows of a payload before it comes: shapes and dtypes, and in federated dropout which units a client
    has, as these follow from its key and the round.

    >>> from fedkd_jax import identity_codec
    >>> template(identity_codec().encode(np.ones(3, np.float32), 0, jax.random.key(0))).content
    ShapeDtypeStruct(shape=(3,), dtype=float32)
    """

    def shapes(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def known(x):
        return SubUpdate(update=shapes(x.update), kept=x.kept) if isinstance(x, SubUpdate) else shapes(x)

    content = jax.tree.map(known, payload.content, is_leaf=lambda x: isinstance(x, SubUpdate))
    return Payload(content=content, floats=(), nbytes=(), ranks={})


def _header(like: Payload) -> tuple[bytes, int]:
    leaves, structure = jax.tree.flatten(like.content)
    return _describe(structure, tuple((np.shape(x), np.dtype(x.dtype)) for x in leaves))


@functools.lru_cache(maxsize=256)
def _describe(structure, leaves: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> tuple[bytes, int]:
    """The header of a template's messages, and how many bytes of flags they have."""
    content = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    words = [f"{_name(path)} {x.dtype} {x.shape}" for path, x in jax.tree.flatten_with_path(content)[0]]
    flags = 0

    def note(x) -> bool:
        nonlocal flags
        if isinstance(x, Levels):
            words.append(f"{x.bits} bits of {x.dtype}")
        if isinstance(x, Sparse):
            words.append(f"{x.like[1]} numbers of {x.like[2]}")
        if isinstance(x, Factored):
            flags += -(-x.as_factors.size // 8)
        return False

    jax.tree.leaves(content, is_leaf=note)
    return bytes([VERSION]) + hashlib.sha256("\n".join(words).encode()).digest()[:TEMPLATE_BYTES], flags


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


class _Writer:
    def __init__(self):
        self.parts: list[bytes] = []
        self.path: Any = ()

    def array(self, x, where: Sequence, shape=None, bits: int | None = None) -> np.ndarray:
        x = np.asarray(x)
        entries = [x.reshape(x.shape if shape is None else shape)[w].reshape(-1) for w in where]
        if entries:
            entries = entries[0] if len(entries) == 1 else np.concatenate(entries)
            self.parts.append(entries.tobytes() if bits is None else _pack(entries, bits))
        return x

    def flags(self, x) -> np.ndarray:
        x = np.asarray(x)
        self.parts.append(np.packbits(x).tobytes())
        return x


class _Reader:
    def __init__(self, message: bytes, at: int):
        self.message, self.at = message, at
        self.path: Any = ()

    def take(self, count: int) -> np.ndarray:
        """The next `count` bytes."""
        missing = self.at + count - len(self.message)
        if missing > 0:
            where = f"{len(self.message)} bytes, in {_name(self.path)}"
            raise WireError(f"message has {where}; allowed: {missing} more at least")
        self.at += count
        return np.frombuffer(self.message, np.uint8, count, self.at - count)

    def array(self, x, where: Sequence, shape=None, bits: int | None = None) -> np.ndarray:
        out = np.zeros(x.shape if shape is None else shape, x.dtype)
        parts = [out[w] for w in where]
        count = sum(part.size for part in parts)
        if bits is None:
            entries = self.take(count * out.itemsize)
            if out.dtype == bool and entries.max(initial=0) > 1:
                raise _refused(self, int(entries.max()), "0 or 1")
            entries = entries.view(out.dtype)
        else:
            entries = _unpack(self.bits(count * bits), bits, out.dtype)
        at = 0
        for w, part in zip(where, parts, strict=True):
            out[w] = entries[at : at + part.size].reshape(part.shape)
            at += part.size
        return out.reshape(x.shape)

    def flags(self, x) -> np.ndarray:
        return self.bits(x.size).astype(bool).reshape(x.shape)

    def bits(self, count: int) -> np.ndarray:
        bits = np.unpackbits(self.take(-(-count // 8)))
        if bits[count:].any():
            raise _refused(self, "set bits past the last", "none")
        return bits[:count]


def _refused(io, value, allowed) -> WireError:
    return WireError(f"message has {value} in {_name(io.path) or 'its content'}; allowed: {allowed}")


def _pack(entries: np.ndarray, bits: int) -> bytes:
    rows = np.unpackbits(entries.astype(">i2").view(np.uint8).reshape(-1, 2), axis=1)
    return np.packbits(rows[:, 16 - bits :]).tobytes()


def _unpack(stream: np.ndarray, bits: int, dtype) -> np.ndarray:
    rows = stream.reshape(-1, bits)
    sign = np.broadcast_to(rows[:, :1], (len(rows), 16 - bits))
    return np.packbits(np.concatenate([sign, rows], axis=1), axis=1).view(">i2").astype(dtype).reshape(-1)


# ---- what travels, in which order: for the writer of values, and for the reader of shapes ---------------------------------


def _travel(io, content: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten_with_path(content, is_leaf=lambda x: isinstance(x, tuple(_FORMATS)))
    out = []
    for path, x in leaves:
        io.path = path
        out.append(_one(io, x, WHOLE))
    return jax.tree.unflatten(structure, out)


def _one(io, x, where: Sequence, shape=None):
    if isinstance(x, Levels):
        return _levels(io, x, where, shape)
    return _FORMATS[type(x)](io, x) if type(x) in _FORMATS else io.array(x, where, shape)


def _levels(io, x: Levels, where: Sequence, shape=None) -> Levels:
    levels = io.array(x.levels, where, shape, x.bits)
    some = any(levels.reshape(levels.shape if shape is None else shape)[w].size for w in where)
    return dataclasses.replace(x, levels=levels, scale=io.array(x.scale, WHOLE if some else []))


def _factored(io, x: Factored) -> Factored:
    (b, m, r), n = _shape(x.factors.left), _shape(x.factors.right)[-1]
    as_factors = io.flags(x.as_factors)
    rank = io.array(x.factors.rank, [as_factors])
    if as_factors.any() and not (rank[as_factors].min() >= 0 and rank[as_factors].max() <= r):
        raise _refused(io, f"ranks {rank[as_factors].tolist()}", f"0 to {r}")
    which = np.flatnonzero(as_factors)
    left = _one(io, x.factors.left, [np.s_[i, :, : rank[i]] for i in which])
    right = _one(io, x.factors.right, [np.s_[i, : rank[i]] for i in which])
    raw = _one(io, x.raw, [*np.flatnonzero(~as_factors)], (b, m, n))
    rank = np.where(as_factors, rank, np.int32(r + 1))
    return Factored(factors=Factors(left, right, rank), raw=raw, as_factors=as_factors)


def _shape(x) -> tuple[int, ...]:
    return (x.levels if isinstance(x, Levels) else x).shape


def _sparse(io, x: Sparse) -> Sparse:
    values, indices, size = _one(io, x.values, WHOLE), x.indices, x.like[1]
    if not isinstance(indices, tuple):
        indices = io.array(indices, WHOLE)
        if len(indices) and not (indices.min() >= 0 and indices.max() < size):
            raise _refused(io, f"places {indices.min()} to {indices.max()}", f"0 to {size - 1}")
        if len(np.unique(indices)) != len(indices):
            raise _refused(io, "a place twice", "each once")
    return dataclasses.replace(x, values=values, indices=indices)


def _sub_update(io, x: SubUpdate) -> SubUpdate:
    if any(isinstance(kept, jax.ShapeDtypeStruct) for kept in jax.tree.leaves(x.kept)):
        raise ValueError("like has shapes for kept; allowed: arrays, what the client keeps, which both ends know")
    kept = jax.tree.map(np.asarray, x.kept)
    return SubUpdate(update=jax.tree.map(lambda u, k: io.array(u, [k]), x.update, kept), kept=kept)


_FORMATS: dict[type, Callable] = {Levels: _levels, Factored: _factored, Sparse: _sparse, SubUpdate: _sub_update}


# ---- sealed ------------------------------------------------------------------------------------------------------------


class Channel:
    """One end of a client's connection to the server in one run: seals what leaves it, opens what comes.

    The key is HKDF-SHA256 of the run's secret, salted with the run's name and expanded with the client's id: one for each
    client and run. The nonce is the direction and a counter that only ever rises, so no two messages of a key share one.
    Version, run, client, direction and round are authenticated with the message, and a counter that is not above all that were
    opened before is refused: a message opens once, in its round, at the other end of its channel, and never after a later one.

    Args:
        secret: of the run, 16 bytes or more that nobody else knows; new for every start of a run, since a counter begins at 0.
        run: its name, 16 bytes, which may be known.
        client: id, 0 or more.
        side: "client" or "server", whose end this is. There is one of each: two with the same secret would repeat nonces.

    Raises:
        TypeError, ValueError: a secret, name, id or side of another kind; of `seal` and `open`, a round that is no
            integer from 0.

    >>> secret, run = bytes(range(32)), b"sixteen letters."
    >>> client, server = (Channel(secret, run=run, client=7, side=side) for side in ("client", "server"))
    >>> sealed = client.seal(b"update", round=3)
    >>> len(sealed), server.open(sealed, round=3)
    (34, b'update')
    >>> server.open(sealed, round=3)
    Traceback (most recent call last):
    fedkd_jax.wire.WireError: message has number 0 of client 7's up; allowed: 1 and more, it was opened or a later one was
    """

    def __init__(self, secret: bytes, *, run: bytes, client: int, side: str):
        for name, value in (("secret", secret), ("run", run)):
            check_type(name, value, bytes)
        if len(secret) < 16:
            raise ValueError(f"secret has {len(secret)} bytes; allowed: at least 16")
        if len(run) != RUN_BYTES:
            raise ValueError(f"run has {len(run)} bytes; allowed: {RUN_BYTES}")
        if side not in ("client", "server"):
            raise ValueError(f"side is {side!r}; allowed: 'client', 'server'")
        check_int("client", client, 0, 2**63 - 1)
        key = HKDF(SHA256(), 32, salt=run, info=struct.pack(">11sBQ", b"fedkd_jax k", VERSION, client)).derive(secret)
        self._cipher, self._run, self._client = AESGCM(key), run, client
        self._sends, self._gets = DIRECTIONS if side == "client" else DIRECTIONS[::-1]
        self._sent = self._got = 0  # the numbers of the next messages
        self._lock = threading.Lock()

    def _known(self, direction: str, round: int) -> bytes:
        check_int("round", round, 0, 2**63 - 1)
        of = VERSION, self._run, self._client, DIRECTIONS.index(direction), round
        return struct.pack(">B16sQBQ", *of)

    def seal(self, message: bytes, round: int) -> bytes:
        """The message, encrypted, 28 bytes longer.

        >>> end = Channel(bytes(32), run=bytes(16), client=0, side="server")
        >>> end.seal(b"", 0)[:12] != end.seal(b"", 0)[:12]
        True
        """
        with self._lock:
            nonce, self._sent = struct.pack(">IQ", DIRECTIONS.index(self._sends), self._sent), self._sent + 1
        return nonce + self._cipher.encrypt(nonce, message, self._known(self._sends, round))

    def open(self, sealed: bytes, round: int) -> bytes:
        """What the other end sealed for this round.

        Raises:
            WireError: a message that was changed, cut short, made longer, opened before, overtaken by another, or is of
                another client, run, round or direction.

        >>> ends = [Channel(bytes(32), run=bytes(16), client=0, side=side) for side in ("client", "server")]
        >>> ends[1].open(ends[0].seal(b"update", 1), 2)
        Traceback (most recent call last):
        fedkd_jax.wire.WireError: message was changed or is another; allowed: client 0's up of round 2, as it was sealed
        """
        of = f"client {self._client}'s {self._gets}"
        if len(sealed) < NONCE_BYTES + TAG_BYTES:
            raise WireError(f"message has {len(sealed)} bytes; allowed: {NONCE_BYTES + TAG_BYTES} and more")
        nonce = sealed[:NONCE_BYTES]
        try:
            message = self._cipher.decrypt(nonce, sealed[NONCE_BYTES:], self._known(self._gets, round))
        except InvalidTag:
            own = f"{of} of round {round}, as it was sealed"
            raise WireError(f"message was changed or is another; allowed: {own}") from None
        _, number = struct.unpack(">IQ", nonce)
        with self._lock:
            if number < self._got:
                later = f"{self._got} and more, it was opened or a later one was"
                raise WireError(f"message has number {number} of {of}; allowed: {later}")
            self._got = number + 1
        return message
