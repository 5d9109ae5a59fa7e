"""Where prepared data are kept, and a store of arrays that are slow to make and easy to name."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Folder = str | os.PathLike | None


def cache_folder(cache_dir: Folder = None) -> pathlib.Path:
    """cache_dir, else `$FEDKD_CACHE_DIR`, else `~/.cache/fedkd_jax`.

    >>> cache_folder("mine").name
    'mine'
    """
    return pathlib.Path(os.path.expanduser(cache_dir or os.environ.get("FEDKD_CACHE_DIR") or "~/.cache/fedkd_jax"))


def cached_arrays(
    parts: Sequence[Any], make_fn: Callable[[], Sequence[np.ndarray]], cache_dir: Folder = None
) -> list[np.ndarray]:
    """What `make_fn()` returns, kept in a file of the cache that goes by a digest of `parts`.

    A file appears whole or not at all, so processes may share a cache. One that is damaged or not the cache's own is
    written anew.

    Args:
      parts: all that the arrays depend on: strings, numbers, arrays, lists of them. The first should be a name with a
        version, to be raised when the same parts come to mean other arrays.
      make_fn: called only where there is no such file; its arrays hold numbers or fixed-width strings.
      cache_dir: as for `cache_folder`.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for squares in (lambda: [np.arange(3) ** 2], lambda: print("not called")):
    ...         cached_arrays(["squares 1", 3], squares, folder)
    [array([0, 1, 4])]
    [array([0, 1, 4])]
    """
    plain = json.dumps(parts, default=lambda value: np.asarray(value).tolist())
    key = hashlib.sha256(plain.encode()).hexdigest()
    path = cache_folder(cache_dir) / "arrays" / f"{key[:32]}.npz"
    # Whatever a strange file does to NumPy: what cannot be read is not there.
    with contextlib.suppress(Exception), path.open("rb") as file, np.load(file) as stored:
        if stored["key"] == key:
            return [stored[name] for name in stored.files if name != "key"]
    arrays = list(make_fn())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            np.savez_compressed(file, *arrays, key=key)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink()
            raise
    return arrays
