"""What users give is checked where it enters: an error says the argument, its value and what is allowed, before anything
compiles. Of a wrong type it is a TypeError, of a value that cannot be a ValueError.
"""

import contextlib
import numbers
import pathlib
from collections.abc import Iterator
from typing import Any


def check_int(name: str, value: Any, least: int = 1, most: int = 2**31 - 1, why: str = "") -> None:
    """An integer, Python's or NumPy's, from `least` to `most`; an error says `why` so.

    Raises:
        TypeError: no integer; True is none, and 2.0 neither.
        ValueError: out of range.

    >>> check_int("rounds", 3)
    >>> try: check_int("bits", 17, 2, 16)
    ... except ValueError as error: print(error)
    bits is 17; allowed: 2 to 16
    >>> try: check_int("cohort", 9, 1, 5, "the population")
    ... except ValueError as error: print(error)
    cohort is 9; allowed: 1 to 5, the population
    >>> try: check_int("rounds", 2.0)
    ... except TypeError as error: print(error)
    rounds is 2.0; allowed: an integer, at least 1
    """
    short = most == 2**31 - 1 and (not _whole(value) or value < least)
    allowed = f"at least {least}" if short else f"{least} to {most}"
    allowed += f", {why}" if why else ""
    if not _whole(value):
        raise TypeError(f"{name} is {value!r}; allowed: an integer, {allowed}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(name: str, value: Any, allowed: str) -> None:
    """A real number, Python's or NumPy's, in an interval as mathematics writes it: "(0, 1]"; "[0, inf)" is finite.

    Raises:
        TypeError: no number; True is none.
        ValueError: outside, or NaN.

    >>> check_number("share", 0.5, "(0, 1]")
    >>> try: check_number("alpha", float("inf"), "(0, inf)")
    ... except ValueError as error: print(error)
    alpha is inf; allowed: a number in (0, inf)
    """
    low, high = map(float, allowed[1:-1].split(","))
    number: Any = value
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; allowed: a number in {allowed}")
    above = low < number if allowed[0] == "(" else low <= number
    below = number < high if allowed[-1] == ")" else number <= high
    if not (above and below):
        raise ValueError(f"{name} is {value}; allowed: a number in {allowed}")


def check_type(name: str, value: Any, kind: type | tuple[type, ...], allowed: str | None = None) -> None:
    """An instance of `kind`.

    Args:
        name, value: the argument.
        kind: as for `isinstance`.
        allowed: how the error describes it; by default by the type's name.

    Raises:
        TypeError: something else.

    >>> try: check_type("seed", "0", int)
    ... except TypeError as error: print(error)
    seed is '0'; allowed: an instance of int
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name} is {value!r}; allowed: {allowed or f'an instance of {names}'}")


def check_fn(name: str, value: Any, allowed: str) -> None:
    """Something to call.

    Raises:
        TypeError: something else.

    >>> try: check_fn("loss_fn", "l2", "(logits, labels, mask) -> []")
    ... except TypeError as error: print(error)
    loss_fn is 'l2'; allowed: a function (logits, labels, mask) -> []
    """
    if not callable(value):
        raise TypeError(f"{name} is {value!r}; allowed: a function {allowed}")


@contextlib.contextmanager
def damaged(path: pathlib.Path) -> Iterator[None]:
    """Within it a file is read that was saved by this library: whatever goes wrong with a strange one is told by its name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not as it was saved.

    >>> try:
    ...     with damaged(pathlib.Path("run.json")): {}["round"]
    ... except ValueError as error: print(error)
    run.json is damaged, KeyError: 'round'; allowed: as it was saved
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is damaged, {type(error).__name__}: {said}; allowed: as it was saved") from error
