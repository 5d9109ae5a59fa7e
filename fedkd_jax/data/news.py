"""News recommendation from files in MIND's format, through tensorflow-datasets without TensorFlow.

Texts and impressions stay apart: a catalogue of news, in which index 0 is "no such news" with an empty text, and flat
arrays of indices into it. `training_rows` and `evaluation_rows` make rectangular rows of them, for `federate`.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from fedkd_jax.check import check_int
from fedkd_jax.data.cache import Folder, cached_arrays
from fedkd_jax.data.sources import prepare_local, read_blocks

SPLITS = ("train", "dev", "test")
LONGEST = 2**20  # bytes of a line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impressions:
    """The impressions of one split: who was shown which news, and what he had read before. Ragged, so flat with offsets.

    Impression i has the history `history[history_offset[i] : history_offset[i + 1]]`, oldest first, and the candidates
    `candidates[candidate_offset[i] : candidate_offset[i + 1]]`. News are indices into the catalogue, 0 is unknown.

    >>> impressions = Impressions(user=np.array(["ann"]), history=np.array([5, 2]), history_offset=np.array([0, 2]),
    ...                           candidates=np.array([3, 4, 1]), clicked=np.array([0, 1, 0]),
    ...                           candidate_offset=np.array([0, 3]))
    >>> len(impressions), impressions.unknown
    (1, 0)
    """

    user: np.ndarray  # [n] str
    history: np.ndarray  # [sum of lengths] int32
    history_offset: np.ndarray  # [n + 1] int64
    candidates: np.ndarray  # [sum of lengths] int32
    clicked: np.ndarray  # [sum of lengths] int8: 1, 0, or -1 where the file has no labels
    candidate_offset: np.ndarray  # [n + 1] int64

    def __len__(self) -> int:
        return len(self.user)

    @property
    def unknown(self) -> int:
        """How many entries of history and candidates are not in the catalogue."""
        return int((self.history == 0).sum() + (self.candidates == 0).sum())

    def take(self, ids: np.ndarray) -> "Impressions":
        """The impressions of these numbers."""

        def rows(offset):
            length = np.diff(offset)[ids]
            new = np.concatenate([[0], np.cumsum(length)])
            return np.arange(new[-1]) + np.repeat(offset[ids] - new[:-1], length), new

        (read, history_offset), (shown, candidate_offset) = map(rows, (self.history_offset, self.candidate_offset))
        return dataclasses.replace(
            self,
            user=self.user[ids],
            history=self.history[read],
            history_offset=history_offset,
            candidates=self.candidates[shown],
            clicked=self.clicked[shown],
            candidate_offset=candidate_offset,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class News:
    """A catalogue of m news, in lists of 1 + m strings whose entry 0 is "", and the impressions that refer to it.

    >>> news = News(ids=["", "N7"], categories=["", "sports"], subcategories=["", "golf"], titles=["", "A hole in one"],
    ...             abstracts=["", ""], splits={})
    >>> len(news)
    2
    """

    ids: list[str]
    categories: list[str]
    subcategories: list[str]
    titles: list[str]
    abstracts: list[str]
    splits: Mapping[str, Impressions]  # "train", "test", and "dev" where there is a test/ as well

    def __len__(self) -> int:
        return len(self.ids)


def load_news(
    name_or_folder: str | os.PathLike = "news20", *, data_dir: Folder = None, cache_dir: Folder = None
) -> News:
    """Read news.tsv and behaviors.tsv of the folders train/, dev/ and test/, whichever there are, into one catalogue.

    As MIND comes they may also be called MINDsmall_train/ and so on: one folder in *_train for train.

    Args:
      name_or_folder: the folder that holds them, or its name within data_dir.
      data_dir: default `$FEDKD_DATA_DIR`.
      cache_dir: where the files are prepared on first use, by their content; default `$FEDKD_CACHE_DIR`, else
        `~/.cache/fedkd_jax`.

    Returns:
      News. Of two news of one id the first counts, train before dev before test: the folders overlap. dev/ is the
      split "test" where there is no test/, as in MIND-small; where there are both, each has its own name.

    Raises:
      FileNotFoundError: there is no such folder, or a file is missing in it.
      ValueError: a line is malformed, see `read_news` and `read_behaviors`; or several folders are in *_train.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train = pathlib.Path(folder, "train")
    ...     train.mkdir()
    ...     _ = (train / "news.tsv").write_text("N7\\tsports\\tgolf\\tA hole in one\\nN8\\tnews\\tworld\\tRain\\n")
    ...     _ = (train / "behaviors.tsv").write_text("1\\tU1\\t11/11/2019 9:05:58 AM\\tN8 N9\\tN8-0 N7-1\\n")
    ...     news = load_news(folder, cache_dir=folder)
    >>> news.titles, news.splits["train"].history, news.splits["train"].candidates
    (['', 'A hole in one', 'Rain'], array([2, 0], dtype=int32), array([2, 1], dtype=int32))
    """
    folder, splits = _find(name_or_folder, data_dir)
    table, behaviors = (
        prepare_local(
            f"news-{'-'.join(splits)}",
            [f"{where.name}/{kind}.tsv" for where in splits.values()],
            _builder(),
            folder,
            cache_dir,
            config=kind,
        )
        for kind in COLUMNS
    )
    columns, index = _catalogue(table, splits)
    impressions = {split: _impressions(behaviors, table, split, index, cache_dir) for split in splits}
    if "test" not in splits and "dev" in splits:
        impressions["test"] = impressions.pop("dev")
    return News(**columns, splits=impressions)


def _find(name_or_folder, data_dir):
    """The folder, and the folders in it by split."""
    data_dir = data_dir or os.environ.get("FEDKD_DATA_DIR")
    name = pathlib.Path(os.path.expanduser(name_or_folder))
    tried = [*([pathlib.Path(os.path.expanduser(data_dir)) / name] if data_dir else []), name]
    for folder in tried:
        splits = _splits_in(folder)
        if splits:
            return folder, splits
    where = " or ".join(map(str, dict.fromkeys(tried)))
    raise FileNotFoundError(
        f"load_news found no folder train, dev or test (nor one in *_train, *_dev, *_test) in {where}; pass the folder that "
        "holds them, or set FEDKD_DATA_DIR to where it lies"
    )


def _splits_in(folder):
    """{split: its folder}, whichever there are."""
    found = {}
    for split in SPLITS:
        named = [where for where in sorted(folder.glob(f"*_{split}")) if where.is_dir()]
        own = [folder / split] if (folder / split).is_dir() else named
        if len(own) > 1:
            names = ", ".join(where.name for where in own)
            raise ValueError(f"{folder} has the folders {names}; allowed: {split}, or one folder in *_{split}")
        if own:
            found[split] = own[0]
    return found


# ---- the files -------------------------------------------------------------------------------------------------------


COLUMNS = {
    "news": ("id", "category", "subcategory", "title", "abstract"),
    "behaviors": ("user", "history", "candidates", "clicked"),
}


def read_news(path: pathlib.Path) -> Iterator[dict[str, str]]:
    """The lines of a news.tsv: id, category, subcategory, title; abstract, url and two lists of entities may lack.

    Raises:
      ValueError: a line has fewer than 4 columns, more than 8, no id, a NUL, or is not UTF-8; or the file is empty. It
        names the file and the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "news.tsv")
    ...     _ = path.write_text("N7\\tsports\\tgolf\\tA hole in one\\n")
    ...     list(read_news(path))
    [{'id': 'N7', 'category': 'sports', 'subcategory': 'golf', 'title': 'A hole in one', 'abstract': ''}]
    """
    for _, cells in _lines(path, 4, 8):
        yield dict(itertools.zip_longest(COLUMNS["news"], cells[:5], fillvalue=""))


def read_behaviors(path: pathlib.Path) -> Iterator[dict[str, str]]:
    """The lines of a behaviors.tsv: impression id, user, time, history "N1 N2" or "", impressions.

    Impressions are "N3-1 N4-0", or "N3 N4" where the labels are kept secret; then ids hold no hyphen.

    Yields:
      user, history "N1 N2", candidates "N3 N4" and clicked, a character for each of them: "10", "--" without labels.

    Raises:
      ValueError: a line has not 5 columns, no id, no user or one of more than 256 characters, no impressions, a label other
        than 0 and 1, a NUL, or is not UTF-8; or the file is empty. It names the file and the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "behaviors.tsv")
    ...     _ = path.write_text("1\\tU1\\t11/11/2019 9:05:58 AM\\tN8 N9\\tN8-0 N7-1\\n")
    ...     list(read_behaviors(path))
    [{'user': 'U1', 'history': 'N8 N9', 'candidates': 'N8 N7', 'clicked': '01'}]
    """
    for where, (_, user, _, history, impressions) in _lines(path, 5, 5):
        user, shown = user.strip(), impressions.split()
        if not user or not shown:
            raise ValueError(f"{where}: has no {'impressions' if user else 'user'}")
        if len(user) > 256:  # users become an array of the longest one's width
            raise ValueError(f"{where}: user has {len(user)} characters; allowed: at most 256")
        labelled = "-" in shown[0]
        for entry in shown:
            if (entry[-2:] not in ("-0", "-1") or len(entry) < 3) if labelled else "-" in entry:
                allowed = "ID-0 and ID-1" if labelled else "ID without a label, as the first has none"
                raise ValueError(f"{where}: impression is {entry[:80]!r}; allowed: {allowed}")
        yield {
            "user": user,
            "history": " ".join(history.split()),
            "candidates": " ".join(entry[:-2] for entry in shown) if labelled else " ".join(shown),
            "clicked": "".join(entry[-1] for entry in shown) if labelled else "-" * len(shown),
        }


def _lines(path, least, most):
    where = None
    with open(path, "rb") as file:  # in text mode a "\r" would end a line; csv would take stray quotes for its own
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            if len(line) > LONGEST:
                raise ValueError(f"{path}, line {number}: has more than {LONGEST} bytes; allowed: at most these")
            if not line.strip(b"\r\n"):
                continue
            where = f"{path}, line {number}"
            if b"\0" in line:
                raise ValueError(f"{where}: has a NUL; allowed: text in UTF-8")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: is not UTF-8, {error}") from error
            cells = text.rstrip("\r\n").split("\t")
            if not least <= len(cells) <= most:
                allowed = least if least == most else f"{least} to {most}"
                raise ValueError(f"{where}: has {len(cells)} columns between tabs; allowed: {allowed}")
            cells[0] = cells[0].strip()
            if not cells[0]:
                raise ValueError(f"{where}: has no id")
            yield where, cells
    if where is None:
        raise ValueError(f"{path} is empty")


@functools.cache
def _builder():
    import tensorflow_datasets as tfds  # 0.3 s to import: only those who load pay

    class NewsTsv(tfds.core.GeneratorBasedBuilder):
        """The two tables of news recommendation, from news.tsv and behaviors.tsv below `manual_dir`."""

        VERSION = tfds.core.Version("1.0.2")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=kind) for kind in COLUMNS]  # noqa: RUF012
        MANUAL_DOWNLOAD_INSTRUCTIONS = "Put news.tsv and behaviors.tsv into train/, dev/ or test/ of manual_dir."

        def _info(self):
            features = {column: tfds.features.Text() for column in COLUMNS[self.builder_config.name]}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            folder, kind = pathlib.Path(dl_manager.manual_dir), self.builder_config.name
            files = {split: where / f"{kind}.tsv" for split, where in _splits_in(folder).items()}
            return {split: self._generate_examples(file) for split, file in files.items() if file.exists()}

        def _generate_examples(self, path):
            yield from enumerate(read_news(path) if path.name == "news.tsv" else read_behaviors(path))

    return NewsTsv


def _catalogue(builder, splits):
    """The columns of `News`, and {id as bytes: index}."""
    index, columns = {}, [[""] for _ in COLUMNS["news"]]
    for row in itertools.chain.from_iterable(rows for split in splits for rows in read_blocks(builder, split)):
        if row["id"] not in index:
            index[row["id"]] = len(index) + 1
            for column, name in zip(columns, COLUMNS["news"], strict=True):
                column.append(row[name].decode())
    names = ("ids", "categories", "subcategories", "titles", "abstracts")
    return dict(zip(names, columns, strict=True)), index


def _impressions(behaviors, table, split, index, cache_dir):
    """The arrays are remembered, as making them is slow: 65,000 impressions took 4 s."""
    parts = [
        "impressions 1",
        str(behaviors.data_path),
        str(table.data_path),
        split,
    ]  # folders that go by the files' content
    arrays = cached_arrays(parts, lambda: _read_impressions(behaviors, split, index), cache_dir)
    return Impressions(**dict(zip((f.name for f in dataclasses.fields(Impressions)), arrays, strict=True)))


def _read_impressions(builder, split, index):
    """The fields of `Impressions`, in their order."""
    users, clicked, parts = [], [], []
    for rows in read_blocks(builder, split):
        users += [row["user"].decode() for row in rows]
        clicked += [row["clicked"] for row in rows]
        parts.append(
            [*_look_up([row["history"] for row in rows], index), *_look_up([row["candidates"] for row in rows], index)]
        )
    history, read, candidates, offered = (np.concatenate(part) for part in zip(*parts, strict=True))
    labels = np.frombuffer(b"".join(clicked), np.int8)
    labels = np.where(labels == ord("-"), np.int8(-1), labels - np.int8(ord("0")))
    offsets = (np.append(0, np.cumsum(count)) for count in (read, offered))
    return [np.array(users), history, next(offsets), candidates, labels, next(offsets)]


def _look_up(texts, index):
    """The news of some texts "N1 N2" in a row, 0 where unknown, and how many each text holds."""
    ids = [text.split() for text in texts]
    count = np.array([len(some) for some in ids], np.int64)
    flat = itertools.chain.from_iterable(ids)
    return np.fromiter(map(index.get, flat, itertools.repeat(0)), np.int32, count.sum()), count


# ---- rows ------------------------------------------------------------------------------------------------------------


def training_rows(
    impressions: Impressions, *, history: int = 50, negatives: int = 4, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """One row for each click: the news clicked among some of the same impression that were not.

    Args:
      impressions: n rows come of their n clicks, in order; an impression without labels has none.
      history: H, how many of the news read are kept: the newest.
      negatives: how many candidates that were not clicked are drawn, without replacement, afresh for each row.
      seed: any non-negative int; what a row draws depends on it, on `negatives` and on the row's number alone.

    Returns:
      (inputs, labels, users), where inputs is `{"history": [n, H] int32, "candidates": [n, 1 + negatives] int32}`, the
      news clicked first, labels is `[n]` int32 zeros and users `[n]` str. A history is oldest first with 0 behind;
      where there are too few negatives, -1 follows them: no candidate.

    Raises:
      ValueError: an argument is out of range, or there is no click.

    >>> impressions = Impressions(user=np.array(["ann"]), history=np.array([5, 2]), history_offset=np.array([0, 2]),
    ...                           candidates=np.array([3, 4]), clicked=np.array([0, 1]),
    ...                           candidate_offset=np.array([0, 2]))
    >>> inputs, labels, users = training_rows(impressions, history=3, negatives=2, seed=0)
    >>> inputs["history"].tolist(), inputs["candidates"].tolist(), labels.tolist()
    ([[5, 2, 0]], [[4, 3, -1]], [0])
    """
    check_int("history", history)
    check_int("negatives", negatives)
    check_int("seed", seed, 0, 2**63 - 1)
    clicks, others = (np.flatnonzero(impressions.clicked == label) for label in (1, 0))
    if not len(clicks):
        raise ValueError(
            f"impressions holds {len(impressions)} impressions without any click: there is no row to train on"
        )
    offset = impressions.candidate_offset
    owner = np.searchsorted(offset, clicks, side="right") - 1
    first = np.searchsorted(others, offset)  # impression i left out others[first[i] : first[i + 1]]
    count = first[owner + 1] - first[owner]
    candidates = np.full((len(clicks), 1 + negatives), -1, np.int32)
    candidates[:, 0] = impressions.candidates[clicks]
    # R. W. Floyd's sampling without replacement (Comm. ACM 30, 1987), all rows at once: of m, draw j of k is among the
    # first m - k + j + 1, and the last of these where it repeats an earlier draw.
    uniform = np.random.default_rng(seed).random((len(clicks), negatives))
    drawn = np.full((len(clicks), negatives), -1)
    for j in range(negatives):
        last = count - np.minimum(count, negatives) + j
        pick = (uniform[:, j] * (last + 1)).astype(np.int64)
        pick = np.where((drawn[:, :j] == pick[:, None]).any(1), last, pick)
        rows = np.flatnonzero(j < count)
        drawn[rows, j] = pick[rows]
        candidates[rows, 1 + j] = impressions.candidates[others[first[owner[rows]] + pick[rows]]]
    inputs = {"history": _newest(impressions, history)[owner], "candidates": candidates}
    return inputs, np.zeros(len(clicks), np.int32), impressions.user[owner]


def evaluation_rows(
    impressions: Impressions, *, history: int = 50, candidates: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """One row for each of n impressions, with all its candidates.

    Args:
      impressions: with labels.
      history: H, as in `training_rows`.
      candidates: C, the width; None is the longest impression's. Of a longer impression the first C are kept, or the
        first C - 1 and the first one clicked where that would be lost.

    Returns:
      (inputs, labels, users, cut), where inputs is `{"history": [n, H] int32, "candidates": [n, C] int32}`, labels is
      `[n, C]` int32: 1 clicked, 0 not, -1 no candidate; users is `[n]` str and cut `[n]` int64 how many candidates each
      row lacks. A row without a click, for which there is no ranking metric, is one whose impression had none.

    Raises:
      ValueError: an argument is out of range, or impressions have no labels.

    >>> impressions = Impressions(user=np.array(["ann"]), history=np.array([5, 2]), history_offset=np.array([0, 2]),
    ...                           candidates=np.array([3, 4, 1]), clicked=np.array([0, 0, 1]),
    ...                           candidate_offset=np.array([0, 3]))
    >>> inputs, labels, users, cut = evaluation_rows(impressions, history=3, candidates=2)
    >>> inputs["history"].tolist(), inputs["candidates"].tolist(), labels.tolist(), cut.tolist()
    ([[5, 2, 0]], [[3, 1]], [[0, 1]], [1])
    """
    check_int("history", history)
    unlabelled = np.count_nonzero(impressions.clicked < 0)
    if unlabelled:
        raise ValueError(
            f"impressions holds {unlabelled} candidates without a label, so nobody can say what was clicked; evaluation "
            'needs a split with labels (of MIND\'s own, "train" and "dev")'
        )
    offset = impressions.candidate_offset
    length = np.diff(offset)
    width = int(length.max(initial=1)) if candidates is None else candidates
    check_int("candidates", width)
    kept = np.minimum(length, width)
    shown = _padded(impressions.candidates, offset[:-1], kept, width, 0)
    labels = _padded(impressions.clicked, offset[:-1], kept, width, -1)
    clicks = np.flatnonzero(impressions.clicked == 1)
    first = np.append(clicks, offset[-1])[np.searchsorted(clicks, offset[:-1])]  # the first click in or after a row
    lost = np.flatnonzero((first >= offset[:-1] + width) & (first < offset[1:]))
    shown[lost, -1], labels[lost, -1] = impressions.candidates[first[lost]], 1
    inputs = {"history": _newest(impressions, history), "candidates": shown}
    return inputs, labels, impressions.user, length - kept


def _newest(impressions, width):
    offset = impressions.history_offset
    kept = np.minimum(np.diff(offset), width)
    return _padded(impressions.history, offset[1:] - kept, kept, width, 0)


def _padded(flat, start, count, width, fill):
    """[n, width] int32: row i is flat[start[i] : start[i] + count[i]], with `fill` behind."""
    out = np.full((len(start), width), fill, np.int32)
    for column in range(width):  # one index array of [n] at a time instead of one of [n, width]
        rows = np.flatnonzero(column < count)
        out[rows, column] = flat[start[rows] + column]
    return out
