"""What users give is checked where it enters: an error says the argument, its value and what is allowed, before anything
compiles. Of a wrong type it is a TypeError, of a value that cannot be a ValueError.
"""

import numbers
from typing import Any


def check_int(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> None:
    """An integer, Python's or NumPy's, from `least` to `most`.

    Raises:
        TypeError: no integer; True is none, and 2.0 neither.
        ValueError: out of range.

    >>> check_int("rounds", 3)
    >>> try: check_int("bits", 17, 2, 16)
    ... except ValueError as error: print(error)
    bits is 17; allowed: 2 to 16
    >>> try: check_int("rounds", 2.0)
    ... except TypeError as error: print(error)
    rounds is 2.0; allowed: an integer, at least 1
    """
    short = most == 2**31 - 1 and (not _whole(value) or value < least)
    allowed = f"at least {least}" if short else f"{least} to {most}"
    if (least, most) == (-(2**31), 2**31 - 1):  # the caller has bounds of its own
        allowed = "of 32 bits"
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
