"""From a name to arrays, through tensorflow-datasets without TensorFlow.

A set is prepared once as `array_record` files and read back with `as_data_source`; `tfds.load`, which needs TensorFlow,
is never called. Local copies come first and nothing is downloaded unless asked for: without a network, tfds tries for
205 s before it fails.
"""

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fedkd_jax.check import check_type
from fedkd_jax.data.cache import Folder, cache_folder
from fedkd_jax.data.federated import Examples


def load(
    name: str = "digits",
    *,
    data_dir: Folder = None,
    cache_dir: Folder = None,
    split: str = "train",
    test_split: str | None = "test",
    download: bool = False,
    natural: str | None = None,
) -> tuple[Examples, Examples | None]:
    """Read a data set as (examples, official test examples or None).

    Args:
      name: one of
        `"digits"`: scikit-learn's digits, 1,797 images `[8, 8, 1]`; needs no file, has no official test split.
        `"fashion_mnist"`: 60,000 + 10,000 images `[28, 28, 1]` from the four original `*-ubyte.gz` files, which lie in
        data_dir or data_dir/fashion_mnist.
        `"ade_corpus_v2"`: 20,960 sentences of case reports, "no ADR" (16,688) or "ADR" (4,272, adverse drug reaction), from
        DRUG-AE.rel and ADE-NEG.txt in data_dir or data_dir/ade_corpus_v2; one split; `natural="document"` is the PubMed id.
        `"psytar"`: sentences of drug reviews with the same classes, train 4,201, validation 612, test 1,189, from
        binary/train.csv, dev.csv, test.csv in data_dir or data_dir/psytar.
        `"tfds:NAME"` or `"tfds:NAME/config"`: any set of the TFDS catalogue, or a builder of yours that has been
        imported, already prepared as array_record in data_dir or cache_dir.
      data_dir: where the files are; default `$FEDKD_DATA_DIR`.
      cache_dir: where sets are prepared on first use; default `$FEDKD_CACHE_DIR`, else `~/.cache/fedkd_jax`. Processes
        may share it: a set appears in it whole or not at all.
      split: what to read as examples, in the notation of tfds: `"train"`, `"train[:10%]"`, `"train+validation"`.
      test_split: what to read as test examples; None, or a split that the set has not, gives None.
      download: whether a "tfds:" set that is not prepared may be downloaded into cache_dir. The builders of the
        catalogue need TensorFlow for that, once; reading needs none.
      natural: the feature, one integer or text an example, that says who it belongs to: a writer, a user.

    Returns:
      Examples in the order of the prepared files. uint8 images become float32 in [0, 1] (digits are divided by 16,
      others by 255) with a channel axis; other floats become float32, other integers int32; text becomes an array of
      `str`, for the caller to tokenise. `natural` holds the feature of that name, or None.

    Raises:
      FileNotFoundError: a file is missing, or a set not prepared and download is False.
      ModuleNotFoundError: download needs TensorFlow and it is not installed.
      TypeError: a name or split that is no string.
      ValueError: the name or split is unknown, the files are damaged, not array_record, without an integer `label`
        or without the feature `natural`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as cache:
    ...     examples, test = load("digits", cache_dir=cache)
    >>> examples.inputs.shape, examples.labels[:4], test
    ((1797, 8, 8, 1), array([0, 1, 2, 3], dtype=int32), None)
    """
    check_type("name", name, str)
    check_type("test_split", test_split, (str, type(None)))
    data_dir, cache_dir = _path(data_dir or os.environ.get("FEDKD_DATA_DIR")), cache_folder(cache_dir)
    if name == "digits":
        from fedkd_jax.data.builders import Digits  # tfds takes 0.3 s to import: only those who load pay

        builder = _prepare(lambda: Digits(data_dir=cache_dir, file_format="array_record"))
    elif name == "fashion_mnist":
        from fedkd_jax.data.builders import IDX_FILES, LocalFashionMnist

        files = [file for pair in IDX_FILES.values() for file in pair]
        builder = prepare_local(name, files, LocalFashionMnist, data_dir, cache_dir)
    elif name == "ade_corpus_v2":
        from fedkd_jax.data.corpus_builders import AdeCorpusV2

        builder = prepare_local(name, AdeCorpusV2.FILES, AdeCorpusV2, data_dir, cache_dir)
    elif name == "psytar":
        from fedkd_jax.data.corpus_builders import Psytar

        builder = prepare_local(name, list(Psytar.FILES.values()), Psytar, data_dir, cache_dir)
    elif name.startswith("tfds:"):
        builder = _catalogue(name.removeprefix("tfds:"), data_dir, cache_dir, download)
    else:
        raise ValueError(f"name is {name!r}; allowed: digits, fashion_mnist, ade_corpus_v2, psytar, tfds:NAME")
    white = 16 if name == "digits" else 255
    test = test_split is not None and test_split.split("[")[0] in builder.info.splits
    return _read(builder, split, white, natural), _read(builder, test_split, white, natural) if test else None


def _path(folder):
    return None if folder is None else pathlib.Path(os.path.expanduser(folder))


MOST_CLASSES = 2**20
DAMAGED = "allowed: files as they were prepared; what is deleted in the cache is prepared again"


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---- preparing -------------------------------------------------------------------------------------------------------


def _is_prepared(builder):
    return (builder.data_path / "dataset_info.json").exists()


def _prepare(build, **config):
    """The builder `build()` makes, prepared. tfds writes to `incomplete.*` and renames: of two processes one wins."""
    import tensorflow_datasets as tfds

    try:
        builder = build()
    except Exception as error:  # of a prepared set's dataset_info.json
        raise ValueError(f"a prepared set is damaged, {_one_line(error)}; {DAMAGED}") from error
    if _is_prepared(builder):
        return builder
    try:
        with contextlib.redirect_stdout(sys.stderr):  # tfds prints its notices; a program's output is its own
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False, **config))
    except OSError:  # the rename fails when another process has put its copy there in the meantime
        if not _is_prepared(builder):
            raise
    return build()


def prepare_local(
    name: str,
    files: Sequence[str],
    builder: Callable[..., Any],
    data_dir: Folder = None,
    cache_dir: Folder = None,
    **kwargs: Any,
) -> Any:
    """A tfds builder that reads local files, prepared in the cache.

    Args:
      name: of the set and of the folder below data_dir that may hold its files.
      files: paths within that folder, or within data_dir itself.
      builder: the builder's class; it finds the files in its manual_dir.
      data_dir, cache_dir: as for `load`.
      **kwargs: to the class, such as `config`.

    Raises:
      FileNotFoundError: there is no data_dir, or a file is in neither folder.

    >>> from fedkd_jax.data.corpus_builders import LocalTinyShakespeare
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "input.txt").write_text("All:\\nSpeak, speak.\\n")
    ...     prepare_local("tiny_shakespeare", ["input.txt"], LocalTinyShakespeare, folder, folder).info.splits
    {'train': <SplitInfo num_examples=1, num_shards=1>}
    """
    where = f"{name} is read from {' '.join(files)} in data_dir or data_dir/{name}"
    data_dir = _path(data_dir or os.environ.get("FEDKD_DATA_DIR"))
    if data_dir is None:
        raise FileNotFoundError(f"{where}, but there is no data_dir: pass it or set FEDKD_DATA_DIR")
    folder = next((f for f in (data_dir / name, data_dir) if (f / files[0]).exists()), data_dir)
    for file in files:
        if not (folder / file).exists():
            raise FileNotFoundError(f"{where}, but there is no {file} in {folder}; pass data_dir or set FEDKD_DATA_DIR")
    # The cache goes by content, so that another folder's files (a subset, a sibling set) are never taken for these. Each
    # file has its own digest: two that are cut elsewhere but make the same whole are others.
    digests = [hashlib.sha256((folder / file).read_bytes()).digest() for file in files]
    root = cache_folder(cache_dir) / f"{name}-{hashlib.sha256(b''.join(digests)).hexdigest()[:12]}"
    return _prepare(lambda: builder(data_dir=root, file_format="array_record", **kwargs), manual_dir=folder)


def _catalogue(name, data_dir, cache_dir, download):
    import tensorflow_datasets as tfds

    roots = [root for root in (data_dir, cache_dir) if root is not None]
    for root in roots if download or not name.startswith("huggingface:") else []:  # of which tfds asks the network
        try:
            builder = tfds.builder(name, data_dir=root)
        except tfds.core.DatasetNotFoundError:  # no builder of that name, and no prepared files in this root
            continue
        except Exception as error:  # a name, config or version that cannot be, or a damaged dataset_info.json
            raise ValueError(
                f"name is {'tfds:' + name!r}, {_one_line(error)}; {DAMAGED}, a name that tfds knows"
            ) from error
        if _is_prepared(builder):
            return builder
    where = " or ".join(map(str, roots))
    if not download:
        raise FileNotFoundError(
            f'load("tfds:{name}") found no prepared {name} in {where}: point data_dir to where tfds prepared it with '
            'file_format="array_record", or pass download=True (needs a network and, once, TensorFlow)'
        )
    try:
        builder = tfds.builder(name, data_dir=cache_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tensorflow-datasets knows no set named {name!r}, and none is prepared in {where}") from error
    if type(builder).__module__.startswith("tensorflow_datasets.") and importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError(
            f"preparing {name} needs TensorFlow, once: pip install tensorflow-cpu (reading what it prepared does not), "
            f"or prepare it on another machine and copy {builder.data_path}"
        )
    return _prepare(lambda: tfds.builder(name, data_dir=cache_dir, file_format="array_record"))


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_split(builder: Any, split: str) -> Any:
    """The rows of a prepared set, a tfds data source, to be read by number.

    Args:
      builder: of tfds.
      split: in the notation of tfds.

    Raises:
      ValueError: the split is unknown or empty, or the set is stored otherwise than as array_record.

    >>> import tempfile
    >>> from fedkd_jax.data.corpus_builders import LocalTinyShakespeare
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "input.txt").write_text("All:\\nSpeak, speak.\\n")
    ...     builder = prepare_local("tiny_shakespeare", ["input.txt"], LocalTinyShakespeare, folder, folder)
    ...     try: open_split(builder, "train[:0%]")
    ...     except ValueError as error: print(error)
    split 'train[:0%]' of local_tiny_shakespeare/1.0.0 is empty
    """
    check_type("split", split, str)
    try:
        examples = builder.info.splits[split].num_examples
    except KeyError as error:  # an unknown split is a ValueError
        where = f"{builder.info.full_name} in {builder.data_path}"
        raise ValueError(f"{where} is damaged, {_one_line(error)}; {DAMAGED}") from error
    if examples <= 0:
        raise ValueError(f"split {split!r} of {builder.info.full_name} is empty")
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.info.full_name} in {builder.data_path} is not stored as array_record; prepare it with "
            "file_format='array_record'"
        ) from error


def read_blocks(builder: Any, split: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of a split of a prepared set, 10,000 at a time: that bounds the number of small arrays alive at once.

    Raises:
      ValueError: as `open_split`, or the prepared files are damaged.

    >>> import tempfile
    >>> from fedkd_jax.data.corpus_builders import LocalTinyShakespeare
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "input.txt").write_text("All:\\nSpeak, speak.\\n")
    ...     builder = prepare_local("tiny_shakespeare", ["input.txt"], LocalTinyShakespeare, folder, folder)
    ...     [len(rows) for rows in read_blocks(builder, "train")]
    [1]
    """
    source = open_split(builder, split)
    for start in range(0, len(source), 10_000):
        try:
            rows = source.__getitems__(range(start, min(start + 10_000, len(source))))
            if any(value is None for row in rows for value in row.values()):
                raise ValueError("a row lacks a feature")
        except Exception as error:  # whatever a damaged file does to its reader
            where = f"{builder.info.full_name} in {builder.data_path}"
            raise ValueError(f"{where} is damaged, {_one_line(error)}; {DAMAGED}") from error
        yield rows


def _read(builder, split, white, natural=None):
    # Measured on two CPU cores: all 70,000 Fashion-MNIST images in 2.7 to 3.2 s through `__getitems__`, most of it
    # decoding; one by one 137 us each (of 5,000). Not worth a second cache, of arrays, that can go stale.
    name, features = builder.info.full_name, dict(builder.info.features.items())
    label = features.get("label")
    if label is None or label.shape != () or np.dtype(label.np_dtype).kind not in "iu":
        raise ValueError(f"{name} has no integer feature named label; its features are {sorted(features)}")
    input_key = builder.info.supervised_keys[0] if builder.info.supervised_keys else "image"
    if input_key not in features:
        raise ValueError(f"{name} has no input feature named {input_key}; its features are {sorted(features)}")
    if natural is not None and (natural not in features or features[natural].shape != ()):
        raise ValueError(f"natural is {natural!r}; {name} has no such feature of one value; its are {sorted(features)}")
    blocks, labels, owners = [], [], []
    for rows in read_blocks(builder, split):
        blocks.append(_stack([row[input_key] for row in rows], white, name))
        labels += [row["label"] for row in rows]
        owners += [row[natural] for row in rows] if natural is not None else []
    wide = np.asarray(labels)
    if wide.min(initial=0) < -MOST_CLASSES or wide.max(initial=0) >= MOST_CLASSES:
        said = f"{wide.min()} to {wide.max()}"
        raise ValueError(f"{name} has labels {said}; allowed: numbers of at most {MOST_CLASSES} classes")
    labels = wide.astype(np.int32)
    # A plain integer has no names: its classes are then the numbers up to the largest.
    classes = getattr(label, "names", None) or [str(i) for i in range(labels.max() + 1)]
    owner = None if natural is None else np.array([o.decode() if isinstance(o, bytes) else o for o in owners])
    return Examples(inputs=np.concatenate(blocks), labels=labels, classes=tuple(classes), natural=owner)


def _stack(values, white, name):
    if isinstance(values[0], bytes):
        return np.array([text.decode() for text in values], object)
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"{name} has inputs of different shapes, such as {sorted(shapes)[:3]}: cannot stack them")
    block = np.stack(values)
    if block.dtype == np.uint8:
        block = block[..., None] if block.ndim == 3 else block  # [n, H, W] -> [n, H, W, C]
        return block.astype(np.float32) / np.float32(white)
    if block.dtype.kind not in "biuf":
        raise ValueError(f"{name} has inputs of dtype {block.dtype}; numbers, images and text can be read")
    return block.astype(np.float32 if block.dtype.kind == "f" else np.int32)
