"""Readers under hostile input: `python -m sims.fuzz [READER...] [--count N] [--seed S]`, all readers by default.

What the readers of files are given is in fuzz_readers.py: corpora, news, images, configs, checkpoints, tokenizers, traces,
stores and records of runs; what messages are, plain ("wire") and sealed, in fuzz_messages.py.

Inputs are made of valid ones, which are changed, cut, stretched, spliced, or go on at random; a text also loses or repeats
lines and columns, and gets other numbers, other encodings and very long lines; JSON and archives are changed inside. A reader
must read an input, or refuse it with an error that it documents. Whatever else happens is counted under "others", and the
input is kept in OUT/READER-VALID-N.bin, to be read again with `--replay FILE`. Memory beyond `--memory` GB more than at the
start is an error, and more than `--seconds` of the processor for an input is, too; where that ends the program, it is
OUT/READER-VALID-now.bin.

The table says, for each reader, how many inputs were read, how many were refused, the slowest, and by how much memory grew.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import argparse
import collections
import faulthandler
import pathlib
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sims import common, hardware

Change = Callable[[random.Random, bytes, bytes], bytes]  # (rng, input, another one) -> input


class Target(NamedTuple):
    """A reader, and what it is to be given.

    >>> Target([b"7"], lambda i, data: int(data), (ValueError,)).read(0, b"12")
    12
    """

    valid: list[bytes]  # what inputs are made of
    read: Callable[
        [int, bytes], object
    ]  # (of which valid one, the input); an AssertionError where it reads what it must not
    errors: tuple[type[Exception], ...]  # that it documents
    kinds: Mapping[str, Change] = {}  # of its own, beside `KINDS`
    readable: bool = True  # whether it reads valid ones; it does not where every input is a replay


# ---- inputs ------------------------------------------------------------------------------------------------------------


def _flipped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _extreme(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    word = rng.choice((b"\x00", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 4, b"\0" * 8))
    return data[:at] + word + data[at + len(word) :]


def _longer(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.choice((len(data), rng.randrange(len(data))))
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def _spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _random_end(rng: random.Random, data: bytes, other: bytes) -> bytes:
    keep = rng.randrange(len(data))
    return data[:keep] + rng.randbytes(rng.choice((len(data) - keep, rng.randint(0, 2 * len(data)))))


def _lines(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A line less, twice, elsewhere, empty, or of another input."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    changed = {
        "less": lambda: lines.pop(i),
        "twice": lambda: lines.insert(j, lines[i]),
        "elsewhere": lambda: lines.insert(j, lines.pop(i)),
        "empty": lambda: lines.insert(i, b""),
        "another": lambda: lines.insert(i, rng.choice(other.split(b"\n"))),
    }
    rng.choice(list(changed.values()))()
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)


def _columns(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A column of a line less, twice, empty, or elsewhere."""
    lines = data.split(b"\n")
    i, by = rng.randrange(len(lines)), rng.choice((b"\t", b"|", b" ", b",", b":"))
    cells = lines[i].split(by)
    j = rng.randrange(len(cells))
    cells = rng.choice(
        (cells[:j] + cells[j + 1 :], cells + [cells[j]], cells[:j] + [b""] + cells[j + 1 :], cells[::-1])
    )
    return b"\n".join([*lines[:i], by.join(cells), *lines[i + 1 :]])


NUMBERS = (
    b"0",
    b"-1",
    b"1e999",
    b"nan",
    b".inf",
    b"2147483648",
    b"9223372036854775808",
    b"1" * 5000,
    b"0.5",
    b"\xd9\xa3",
    b"1_0",
)


def _numbers(rng: random.Random, data: bytes, other: bytes) -> bytes:
    places = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not places:
        return data
    place = rng.choice(places)
    return data[: place.start()] + rng.choice(NUMBERS) + data[place.end() :]


def _encoded(rng: random.Random, data: bytes, other: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp037")), "replace")


def _strange(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Something that text seldom has."""
    words = (
        b"\0",
        b"\x1a",
        b"\r",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\xed\xa0\x80",
        b'"',
        b"'",
        b"\\",
        b"|",
        b"\t",
    )
    at = rng.randrange(len(data))
    return data[:at] + rng.choice(words) * rng.choice((1, 1, 3)) + data[at:]


def _long_line(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    piece = rng.choice((data[at : at + 1], data[at : at + 9], b"[", b"{a: ", b"(", b" ", b"a", b"&a [*a, "))
    return data[:at] + (piece or b"a") * rng.choice((100, 3000, 70_000 // max(len(piece), 1))) + data[at:]


KINDS: dict[str, Change] = {
    "bits flipped": _flipped,
    "extreme bytes": _extreme,
    "cut short": lambda rng, data, other: data[: rng.randrange(len(data))],
    "longer": _longer,
    "spliced": _spliced,
    "random from some byte on": _random_end,
    "random": lambda rng, data, other: rng.randbytes(rng.randint(0, 2 * len(data))),
    "lines": _lines,
    "columns": _columns,
    "numbers": _numbers,
    "encoding": _encoded,
    "strange characters": _strange,
    "long line": _long_line,
}


def inputs(target: Target, count: int, seed: int = 0) -> Iterable[tuple[str, int, bytes]]:
    """`count` inputs as (kind, of which valid one, bytes), of every kind in turn; some are changed twice.

    >>> [kind for kind, _, _ in inputs(Target([b"12"], int, ()), 3)]
    ['bits flipped', 'extreme bytes', 'cut short']
    """
    rng, kinds = random.Random(seed), KINDS | dict(target.kinds)
    for i in range(count):
        kind, which = list(kinds)[i % len(kinds)], rng.randrange(len(target.valid))
        data = kinds[kind](rng, target.valid[which], rng.choice(target.valid))
        if data and rng.random() < 0.2:
            data = KINDS[rng.choice(list(KINDS))](rng, data, rng.choice(target.valid))
        yield kind, which, data


# ---- readers under them ------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What a reader did.

    >>> Counts("idx", 2, 1, 1, [], 0.0).others
    []
    """

    reader: str
    inputs: int
    read: int
    refused: int
    others: list[tuple[str, int, BaseException, bytes]]  # (kind, of which valid one, error, input)
    slowest: float  # seconds of processor time


def fuzz(
    name: str,
    target: Target,
    count: int,
    seed: int = 0,
    on_inputs: Callable[[int], None] = lambda done: None,
    seconds: float = 0,
    keep: pathlib.Path | None = None,
) -> Counts:
    """Gives a reader `count` inputs.

    Args:
        name, target: the reader.
        count, seed: of `inputs`.
        on_inputs: is told, now and then, how many are done.
        seconds: an input that takes more processor time is an error; 0 for no limit, as signals go to the main thread alone.
        keep: a folder in which READER-VALID-now.bin is the input that is read, while it is.

    >>> counts = fuzz("int", Target([b"12"], lambda i, data: int(data), (ValueError,)), 700)
    >>> counts.read + counts.refused, counts.others
    (700, [])
    """
    read, refused, slowest, others = 0, 0, 0.0, []
    for i, (kind, which, data) in enumerate(inputs(target, count, seed)):
        now = None if keep is None else keep / f"{name}-{which}-now.bin"
        if now is not None:
            now.write_bytes(data)
        began = time.process_time()
        try:
            if seconds:
                signal.setitimer(signal.ITIMER_PROF, seconds)
            target.read(which, data)
            read += 1
        except target.errors:
            refused += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust's is no Exception
            others.append((kind, which, error, data))
        finally:
            if seconds:
                signal.setitimer(signal.ITIMER_PROF, 0)
        if now is not None:
            now.unlink()
        slowest = max(slowest, time.process_time() - began)
        if i % 100 == 99:
            on_inputs(i + 1)
    return Counts(name, count, read, refused, others, slowest)


def _too_slow(*_):
    raise TooSlow("the input takes too long")


class TooSlow(BaseException):
    """No reader documents it, and none may catch it.

    >>> issubclass(TooSlow, Exception)
    False
    """


def main(argv: list[str] | None = None) -> list[dict[str, str]]:
    """Runs the readers under a progress bar and prints the table; ends with status 1 where an input breaks one."""
    from sims import fuzz_messages, fuzz_readers

    TARGETS = fuzz_readers.TARGETS | fuzz_messages.TARGETS
    parser = argparse.ArgumentParser(prog="python -m sims.fuzz", description="Readers under hostile input.")
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--count", type=int, default=10_000, help="inputs for each reader (10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/fuzz"), help="where inputs are kept (runs/fuzz)"
    )
    parser.add_argument("--memory", type=float, default=2.0, help="GB more than at the start (2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of processor time for an input (10)")
    parser.add_argument("--replay", type=pathlib.Path, help="a kept input, of the one READER given")
    options = parser.parse_args(argv)
    with common.one_line_errors():
        unknown = [name for name in options.readers if name not in TARGETS]
        if unknown or (options.replay and len(options.readers) != 1):
            raise ValueError(f"READER is {options.readers}; allowed: some of {', '.join(TARGETS)}, one for --replay")
    options.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles more than it computes
    if options.replay:
        ((name, make),) = ((name, TARGETS[name]) for name in options.readers)
        which = int(options.replay.stem.split("-")[1])
        print(make(options.out / f"{name}.now").read(which, options.replay.read_bytes()))
        return []
    rows, broken = [], collections.Counter()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _too_slow)
    began = time.perf_counter()
    with Progress(*columns, console=common.console) as progress:
        for name in options.readers or TARGETS:
            now = options.out / f"{name}.now"
            target, task = TARGETS[name](now), progress.add_task(name, total=options.count)
            for i, valid in enumerate(target.valid if target.readable else ()):
                target.read(i, valid)
            before, start = hardware.peak_memory_bytes(), time.perf_counter()
            _limit_memory(options.memory)
            told = lambda done, task=task: progress.update(task, completed=done)  # noqa: E731
            counts = fuzz(name, target, options.count, options.seed, told, options.seconds, options.out)
            progress.update(task, completed=options.count)
            for i, (kind, which, error, data) in enumerate(counts.others):
                said = f"{type(error).__name__}: {error}".split("\n")[0][:120]
                broken[f"{name}: {said}"] += 1
                if broken[f"{name}: {said}"] <= 3:
                    (options.out / f"{name}-{which}-{i}.bin").write_bytes(data)
                    common.console.print(f"{name}-{which}-{i}.bin, {kind}: {said}", markup=False)
            grown = (hardware.peak_memory_bytes() - before) / 2**20
            rows.append(
                {
                    "reader": name,
                    "inputs": f"{counts.inputs:,}",
                    "read": f"{counts.read:,}",
                    "refused": f"{counts.refused:,}",
                    "others": f"{len(counts.others):,}",
                    "slowest ms": f"{1000 * counts.slowest:.0f}",
                    "peak MB": f"{grown:.0f}",
                    "s": f"{time.perf_counter() - start:.0f}",
                }
            )
            now.unlink(missing_ok=True)
            common.console.print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    total = options.count * len(rows)
    title = f"{total:,} inputs in {time.perf_counter() - began:.0f} s, seed {options.seed}"
    common.console.print(common.make_table(rows, title))
    if broken:
        sys.exit(f"error: {sum(broken.values())} inputs made other errors than are documented; see {options.out}")
    common.console.print("nothing but documented errors")
    return rows


def _limit_memory(gigabytes: float) -> None:
    """So many more than now; what goes beyond is a MemoryError."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        size = int(re.search(r"VmSize:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size + int(gigabytes * 2**30), most))


if __name__ == "__main__":
    main()
