"""Messages of every codec, plain and sealed, for `sims.fuzz` to change and for tests to open."""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax import (
    Channel,
    Codec,
    Payload,
    WireError,
    chain,
    error_feedback,
    identity_codec,
    matrix_view,
    power_codec,
    quantise,
    server_sketch_codec,
    sketch_codec,
    spectrum_codec,
    svd_codec,
    top_k,
)
from fedkd_jax.algorithms.feddropout import SubUpdate, sub_codec
from fedkd_jax.codecs import encode, init_codec
from fedkd_jax.types import Key, PyTree
from fedkd_jax.wire import deserialise, serialise, template
from sims.fuzz import Target

SHAPES: dict[str, tuple[int, ...]] = {
    "bias": (20,),
    "conv": (3, 3, 4, 8),
    "dense": (24, 20),
    "gain": (),
    "layers": (3, 12, 10),
}
Update = dict[str, np.ndarray]


# ---- messages of every codec -------------------------------------------------------------------------------------------


def make_update(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Update:
    """An update whose matrices have ranks from 0 to full, each leaf of a scale of its own.

    >>> make_update(0)["conv"].shape
    (3, 3, 4, 8)
    """
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        x = rng.normal(size=shape)
        if len(shape) >= 2:
            *rest, m, n = shape if name == "layers" else (int(np.prod(shape[:-1])), shape[-1])
            ranks = rng.integers(0, min(m, n) + 1, size=rest or [1])
            made = [rng.normal(size=(m, r)) @ rng.normal(size=(r, n)) for r in ranks]
            x = (np.stack(made) + rng.choice([0.0, 1e-3, 1.0]) * rng.normal(size=(len(made), m, n))).reshape(shape)
        out[name] = np.asarray(x * 10.0 ** rng.integers(-6, 4), np.float32)
    return out


class Sender(NamedTuple):
    """How an update becomes a payload, and what the payload decodes to.

    >>> Sender.of(identity_codec()).encode(make_update(0), jax.random.key(0)).content["gain"].shape
    ()
    """

    encode: Callable[[Update, Key], Payload]
    decode: Callable[[Payload], PyTree]

    @classmethod
    def of(cls, codec: Codec, before: Callable[[Update, Key], PyTree] = lambda update, key: update) -> "Sender":
        """Of a codec, with the state it begins with; `before` makes of an update what it encodes.

        >>> double = Sender.of(identity_codec(), lambda update, key: jax.tree.map(lambda x: 2 * x, update))
        >>> float(double.encode({"w": jnp.ones(())}, jax.random.key(0)).content["w"])
        2.0
        """

        def run(update: Update, key: Key) -> Payload:
            made = before(update, key)
            return encode(codec, made, 0, key, init_codec(codec, made))[0]

        return cls(run, codec.decode)


def _stacked(path: str, leaf):
    return matrix_view(leaf.shape, stack=1 if path == "layers" else 0)


def _narrow(update: Update, key: Key) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), update)


def _some(update: Update, key: Key) -> SubUpdate:
    kept = jax.tree.map(lambda x: jax.random.bernoulli(key, 0.7, x.shape), update)
    return SubUpdate(update=jax.tree.map(lambda x, on: jnp.where(on, x, 0), update, kept), kept=kept)


def _sketched(update: Update, key: Key) -> PyTree:
    up = sketch_codec(3, 50)
    return up.decode(up.encode(update, 0, key))


SENDERS: dict[str, Callable[[], Sender]] = {
    "raw": lambda: Sender.of(identity_codec()),
    "svd": lambda: Sender.of(svd_codec(0.9)),
    "svd, stacked, warm": lambda: Sender.of(svd_codec(0.9, view=_stacked, method="randomized", warm_start=True)),
    "svd, bfloat16": lambda: Sender.of(svd_codec(0.9, view=_stacked), _narrow),
    **{f"{b} bits": functools.partial(lambda b: Sender.of(quantise(b)), b) for b in (2, 3, 8, 11, 16)},
    "5 bits, bfloat16": lambda: Sender.of(quantise(5), _narrow),
    "svd, 8 bits": lambda: Sender.of(chain(svd_codec(0.9, view=_stacked), quantise(8))),
    "power": lambda: Sender.of(power_codec(2, view=_stacked)),
    "power, 5 bits": lambda: Sender.of(error_feedback(chain(power_codec(2), quantise(5)))),
    "top": lambda: Sender.of(error_feedback(top_k(0.2))),
    "top, most": lambda: Sender.of(top_k(0.7)),
    "top, 8 bits": lambda: Sender.of(chain(top_k(0.2), quantise(8))),
    "top, most, 8 bits": lambda: Sender.of(chain(top_k(0.7), quantise(8))),
    "sketch": lambda: Sender.of(sketch_codec(3, 50)),
    "sketch down": lambda: Sender.of(server_sketch_codec(3, 50, 0.1), _sketched),
    "spectrum": lambda: Sender.of(spectrum_codec(svd_codec(0.9))),
    "dropout": lambda: Sender.of(sub_codec(), _some),
}


def messages(names: list[str] | None = None, seed: int = 0) -> list[tuple[bytes, Payload]]:
    """A message of each codec, and its template.

    >>> [(message, _)] = messages(["8 bits"])
    >>> len(message)
    1186
    """
    update, key, out = make_update(seed), jax.random.key(seed), []
    for name in SENDERS if names is None else names:
        payload = jax.jit(SENDERS[name]().encode)(update, key)
        out.append((serialise(payload), template(payload)))
    return out


# ---- targets -----------------------------------------------------------------------------------------------------------


def wire(now: pathlib.Path, names: list[str] | None = None) -> Target:
    """`deserialise`, of whose results `serialise` must make the input again.

    >>> target = wire(pathlib.Path(), ["8 bits"])
    >>> target.read(0, target.valid[0]).ranks
    {}
    """
    made = messages(names)

    def read(i: int, data: bytes) -> Payload:
        payload = deserialise(data, made[i][1])
        assert serialise(payload) == data, "it reads what nobody writes"
        return payload

    return Target([message for message, _ in made], read, (WireError,))


def sealed(now: pathlib.Path, names: list[str] | None = None) -> Target:
    """`Channel.open` of messages that were all opened before: every input is changed or a replay.

    >>> target = sealed(pathlib.Path(), ["8 bits"])
    >>> target.read(0, target.valid[0])
    Traceback (most recent call last):
    fedkd_jax.wire.WireError: message has number 0 of client 0's up; allowed: 1 and more, it was opened or a later one was
    """
    ends = {side: Channel(bytes(range(32)), run=bytes(16), client=0, side=side) for side in ("client", "server")}
    valid = [ends["client"].seal(message, 5) for message, _ in messages(names)]
    for message in valid:
        ends["server"].open(message, 5)

    def read(i: int, data: bytes) -> None:
        ends["server"].open(data, 5)
        raise AssertionError("it opens a message that is not the next")

    return Target(valid, read, (WireError,), readable=False)


TARGETS: dict[str, Callable[[pathlib.Path], Target]] = {"wire": wire, "sealed": sealed}
