"""Readers under hostile input: `python -m sims.fuzz NAME [--count N] [--seed S]`, NAME one of

wire      `deserialise`: messages of every codec
sealed    `Channel.open`: the same, sealed

Inputs are made of valid ones, which are changed, cut, stretched, spliced, or go on at random. A reader must read an input, and
keep what it documents of what it reads, or refuse it with an error that it documents. Anything else ends the program, which
prints the input. The table says how many of each kind were read and refused.
"""

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    report,
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
from sims import common, hardware

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


class Target(NamedTuple):
    """A reader, and what it is to be given.

    >>> Target([b"7"], lambda i, data: int(data), (ValueError,)).read(0, b"12")
    12
    """

    valid: list[bytes]  # what inputs are made of
    read: Callable[
        [int, bytes], object
    ]  # (of which valid one, the input); AssertionError where it reads what it must not
    errors: tuple[type[Exception], ...]  # that it documents


def wire(names: list[str] | None = None) -> Target:
    """`deserialise`, of whose results `serialise` must make the input again.

    >>> target = wire(["8 bits"])
    >>> target.read(0, target.valid[0]).ranks
    {}
    """
    made = messages(names)

    def read(i: int, data: bytes) -> Payload:
        payload = deserialise(data, made[i][1])
        assert serialise(payload) == data, "it reads what nobody writes"
        return payload

    return Target([message for message, _ in made], read, (WireError,))


def sealed(names: list[str] | None = None) -> Target:
    """`Channel.open` of messages that were all opened before: every input is changed or a replay.

    >>> target = sealed(["8 bits"])
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

    return Target(valid, read, (WireError,))


TARGETS: dict[str, Callable[[], Target]] = {"wire": wire, "sealed": sealed}


# ---- inputs ------------------------------------------------------------------------------------------------------------


WORDS = (b"\x00", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 4, b"\x00" * 8)


def _flipped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _extreme(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    word = rng.choice(WORDS)
    return data[:at] + word + data[at + len(word) :]


def _longer(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.choice((len(data), rng.randrange(len(data))))
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def _spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _random_end(rng: random.Random, data: bytes, other: bytes) -> bytes:
    keep = rng.randrange(len(data))
    return data[:keep] + rng.randbytes(rng.choice((len(data) - keep, rng.randint(0, 2 * len(data)))))


KINDS: dict[str, Callable[[random.Random, bytes, bytes], bytes]] = {
    "bits flipped": _flipped,
    "extreme bytes": _extreme,
    "cut short": lambda rng, data, other: data[: rng.randrange(len(data))],
    "longer": _longer,
    "spliced": _spliced,
    "random from some byte on": _random_end,
    "random": lambda rng, data, other: rng.randbytes(rng.randint(0, 2 * len(data))),
}


def fuzz(target: Target, count: int, seed: int = 0, on_inputs: Callable[[int], None] = lambda done: None) -> list[dict]:
    """Gives a reader `count` inputs, of every kind in turn; a row per kind, how many it was, how many were read and refused.

    Raises:
        RuntimeError: an input that made anything but a documented error, which is the cause; the message has the input.

    >>> fuzz(Target([b"12"], lambda i, data: int(data), (ValueError,)), 7)[2]
    {'kind': 'cut short', 'inputs': 1, 'read': 1, 'refused': 0}
    """
    rng, kinds = random.Random(seed), list(KINDS)
    rows = [{"kind": kind, "inputs": 0, "read": 0, "refused": 0} for kind in kinds]
    for i in range(count):
        row, which = rows[i % len(kinds)], rng.randrange(len(target.valid))
        data = KINDS[row["kind"]](rng, target.valid[which], rng.choice(target.valid))
        row["inputs"] += 1
        try:
            target.read(which, data)
            row["read"] += 1
        except target.errors:
            row["refused"] += 1
        except Exception as error:
            made = f"input {i} of seed {seed}, {row['kind']}, of valid input {which}: {data.hex()}"
            raise RuntimeError(f"{made} made {error!r}; allowed: {[e.__name__ for e in target.errors]}") from error
        if i % 1000 == 999:
            on_inputs(i + 1)
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs one target under a progress bar and prints the table; ends with status 1 where an input breaks the reader."""
    parser = argparse.ArgumentParser(prog="python -m sims.fuzz", description="A reader under hostile input.")
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--count", type=int, default=100_000, help="inputs (100,000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles more than it computes
    target = TARGETS[options.target]()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    before, began = hardware.peak_memory_bytes(), time.perf_counter()
    with Progress(*columns, console=common.console) as progress:
        task = progress.add_task(options.target, total=options.count)
        try:
            rows = fuzz(target, options.count, options.seed, lambda done: progress.update(task, completed=done))
        except RuntimeError as error:
            sys.exit(f"error: {error}")
        progress.update(task, completed=options.count)
    seconds, grown = time.perf_counter() - began, hardware.peak_memory_bytes() - before
    shown = [{key: value if isinstance(value, str) else f"{value:,}" for key, value in row.items()} for row in rows]
    title = f"{options.target}: {options.count:,} inputs in {seconds:.0f} s, seed {options.seed}"
    common.console.print(common.make_table(shown, title))
    common.console.print(f"nothing but documented errors; peak memory grew by {report.human_bytes(grown)}")
    return rows


if __name__ == "__main__":
    main()
