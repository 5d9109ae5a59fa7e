"""Laws of `fedkd_jax.data.news`: files in MIND's format to a catalogue, impressions to rows."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkd_jax.data.news as news_module
from fedkd_jax.data.federated import federate
from fedkd_jax.data.news import Impressions, evaluation_rows, load_news, read_behaviors, read_news, training_rows
from fedkd_jax.data.partition import by_key

seeds = st.integers(0, 2**32 - 1)
ids = st.integers(1, 9).map("N{}".format)
# Whatever a title may hold: stray quotes, and what Python but not the format takes for the end of a line.
cells = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r\0"), max_size=6) | st.sampled_from(
    ['"', 'a "b', "x\x0by", "x\x85y", "x\u2028y", "x\ry", "é"]
)
articles = st.lists(
    st.tuples(ids, st.lists(cells, min_size=3, max_size=7)).map(lambda line: [line[0], *line[1]]),
    min_size=1,
    max_size=6,
)
users = st.sampled_from(["U1", "U2", "Zoë"])
shown = st.lists(st.tuples(ids, st.integers(0, 1)), min_size=1, max_size=6)
# An impression as (user, history, candidates, labels); labels are None in a test set.
lines = st.tuples(users, st.lists(ids, max_size=5), shown, st.sampled_from([True, True, False])).map(
    lambda d: (d[0], d[1], [one for one, _ in d[2]], [label for _, label in d[2]] if d[3] else None)
)
behaviors = st.lists(lines, min_size=1, max_size=5)
folders = st.dictionaries(st.sampled_from(["train", "dev", "test"]), st.tuples(articles, behaviors), min_size=1)


def behavior_line(number, line):
    user, history, candidates, labels = line
    shown = candidates if labels is None else [f"{c}-{label}" for c, label in zip(candidates, labels, strict=True)]
    return f"{number}\t{user}\t11/13/2019 8:36:57 AM\t{' '.join(history)}\t{' '.join(shown)}"


def write(folder, splits, end="\n"):
    for split, (news, impressions) in splits.items():
        (folder / split).mkdir(parents=True)
        texts = {
            "news.tsv": ["\t".join(line) for line in news],
            "behaviors.tsv": [behavior_line(i, line) for i, line in enumerate(impressions)],
        }
        for name, text in texts.items():
            (folder / split / name).write_bytes("".join(line + end for line in text).encode())
    return folder


TINY = {"train": ([["N1", "sports", "golf", "One"]], [("U1", ["N1"], ["N1", "N2"], [1, 0])])}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# ---- the files -------------------------------------------------------------------------------------------------------


@given(splits=folders, end=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=12)  # each prepares two tables
def test_what_was_written_to_files_is_what_is_loaded(splits, end, cache):
    with tempfile.TemporaryDirectory() as folder:
        news = load_news(write(pathlib.Path(folder), splits, end), cache_dir=cache)
    catalogue = {}
    for split in ("train", "dev", "test"):
        for line in splits.get(split, ([], []))[0]:
            catalogue.setdefault(line[0], [*line, ""][:5])
    assert news.ids == ["", *catalogue]
    for column, values in enumerate((news.ids, news.categories, news.subcategories, news.titles, news.abstracts)):
        assert values == ["", *(line[column] for line in catalogue.values())]
    if "test" not in splits:
        splits = {{"dev": "test"}.get(split, split): both for split, both in splits.items()}
    assert set(news.splits) == set(splits)
    for split, (_, written) in splits.items():
        read, unknown = news.splits[split], 0
        assert len(read) == len(written) and read.user.tolist() == [line[0] for line in written]
        assert (read.history.dtype, read.candidates.dtype, read.clicked.dtype) == (np.int32, np.int32, np.int8)
        for i, (_, history, candidates, labels) in enumerate(written):
            past = read.history[read.history_offset[i] : read.history_offset[i + 1]]
            here = slice(read.candidate_offset[i], read.candidate_offset[i + 1])
            for some, indices in ((history, past), (candidates, read.candidates[here])):
                assert [news.ids[index] for index in indices] == [one if one in catalogue else "" for one in some]
                unknown += sum(one not in catalogue for one in some)
            assert read.clicked[here].tolist() == (labels or [-1] * len(candidates))
        assert read.unknown == unknown


@given(news=articles, impressions=behaviors)
def test_the_readers_give_line_by_line_what_the_files_hold(news, impressions):
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), {"x": (news, impressions)})
        read = [list(row.values()) for row in read_news(pathlib.Path(folder, "x", "news.tsv"))]
        seen = list(read_behaviors(pathlib.Path(folder, "x", "behaviors.tsv")))
    for row, line in zip(read, news, strict=True):
        assert row == [*line, ""][:5]
    for row, (user, history, candidates, labels) in zip(seen, impressions, strict=True):
        assert (row["user"], row["history"].split(), row["candidates"].split()) == (user, history, candidates)
        assert row["clicked"] == ("-" * len(candidates) if labels is None else "".join(map(str, labels)))


GOOD = "1\tU1\ttime\tN1 N2\tN1-1 N2-0"
MALFORMED = [
    ("news", "N2\tsports\tgolf", "has 3 columns between tabs; allowed: 4 to 8"),
    ("news", "N2" + "\t" * 8, "has 9 columns between tabs; allowed: 4 to 8"),
    ("news", "\tsports\tgolf\ttitle", "has no id"),
    ("news", "N2", "has 1 columns"),
    ("news", "N2\tsports\tgolf\t\udcff", "is not UTF-8"),
    ("behaviors", "2\tU1\ttime\tN1", "has 4 columns between tabs; allowed: 5"),
    ("behaviors", GOOD + "\tN1", "has 6 columns between tabs; allowed: 5"),
    ("behaviors", " \tU1\ttime\tN1\tN1-1", "has no id"),
    ("behaviors", "2\t\ttime\tN1\tN1-1", "has no user"),
    ("behaviors", "2\t \ttime\tN1\tN1-1", "has no user"),
    ("behaviors", "2\tU1\ttime\tN1\t ", "has no impressions"),
    ("behaviors", "2\tU1\ttime\t\tN2-0 N1-x", "impression is 'N1-x'; allowed: ID-0 and ID-1"),
    ("behaviors", "2\tU1\ttime\t\tN1-x", "impression is 'N1-x'; allowed: ID-0 and ID-1"),
    ("behaviors", "2\tU1\ttime\t\tN2-0 N1-2", "impression is 'N1-2'"),
    ("behaviors", "2\tU1\ttime\t\tN2-0 -1", "impression is '-1'"),
    ("behaviors", "2\tU1\ttime\t\tN2-0 N1", "impression is 'N1'; allowed: ID-0 and ID-1"),
    ("behaviors", "2\tU1\ttime\t\tN2 N1-1", "impression is 'N1-1'; allowed: ID without a label, as the first has none"),
]


@pytest.mark.parametrize(("kind", "line", "words"), MALFORMED)
def test_a_malformed_line_is_an_error_that_names_it(tmp_path, kind, line, words):
    path = tmp_path / f"{kind}.tsv"
    good = GOOD if kind == "behaviors" else "N1\tsports\tgolf\tOne"
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{kind}.tsv, line 2: {words}"):
        list(read_news(path) if kind == "news" else read_behaviors(path))


def test_a_malformed_or_empty_file_leaves_nothing_behind_in_the_cache(tmp_path):
    folder, cache = write(tmp_path / "set", TINY), tmp_path / "cache"
    path = folder / "train" / "behaviors.tsv"
    whole = path.read_bytes()
    for content, words in (
        (whole + b"2\tU1\n", r"behaviors.tsv, line 2: has 2 columns"),
        (b"", "behaviors.tsv is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_news(folder, cache_dir=cache)
    path.write_bytes(whole)
    assert len(load_news(folder, cache_dir=cache).splits["train"]) == 1


def test_folders_are_found_by_name_and_a_missing_file_is_an_error(tmp_path, cache, monkeypatch):
    monkeypatch.delenv("FEDKD_DATA_DIR", raising=False)
    folder = write(tmp_path / "tiny", TINY)
    for where in (dict(name_or_folder="tiny", data_dir=tmp_path), dict(name_or_folder=str(folder))):
        assert load_news(**where, cache_dir=cache).ids == ["", "N1"]
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FEDKD_CACHE_DIR", str(cache))
    assert load_news("tiny").titles == ["", "One"]
    with pytest.raises(FileNotFoundError, match=r"no folder train, dev or test .*nowhere.*FEDKD_DATA_DIR"):
        load_news("nowhere")
    (folder / "train" / "behaviors.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no train/behaviors.tsv in .*tiny"):
        load_news("tiny")


def test_folders_may_have_the_names_that_mind_gives_them(tmp_path, cache):
    plain = load_news(write(tmp_path / "plain", TINY | {"dev": TINY["train"]}), cache_dir=cache)
    named = {"MINDsmall_train": TINY["train"], "MINDsmall_dev": TINY["train"]}
    news = load_news(write(tmp_path / "named", named), cache_dir=cache)
    assert news.ids == plain.ids
    assert list(news.splits) == list(plain.splits) == ["train", "test"]
    write(tmp_path / "named", {"MINDlarge_train": TINY["train"]})
    with pytest.raises(ValueError, match=r"has the folders MINDlarge_train, MINDsmall_train; allowed: train, or one"):
        load_news(tmp_path / "named", cache_dir=cache)


def test_a_byte_order_mark_blanks_around_an_id_and_empty_lines_mean_nothing(tmp_path, cache):
    folder = write(tmp_path / "set", TINY)
    path = folder / "train" / "news.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"N1\t", b"N1 \t") + b"\r\n\n")
    news = load_news(folder, cache_dir=cache)
    assert news.ids == ["", "N1"]
    assert news.splits["train"].unknown == 1  # N2


def test_impressions_are_made_once(tmp_path, cache, monkeypatch):
    first = load_news(write(tmp_path / "set", TINY), cache_dir=cache).splits["train"]
    monkeypatch.setattr(news_module, "_read_impressions", lambda *_: pytest.fail("read again"))
    again = load_news(tmp_path / "set", cache_dir=cache).splits["train"]
    for field in dataclasses.fields(first):
        one, other = (getattr(x, field.name) for x in (first, again))
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_the_same_files_under_another_split_are_another_set(tmp_path, cache):
    for split in ("train", "test"):
        assert list(load_news(write(tmp_path / split, {split: TINY["train"]}), cache_dir=cache).splits) == [split]


def test_reading_imports_no_tensorflow_and_importing_imports_no_tfds(tmp_path):
    code = (
        "import sys; from fedkd_jax.data.news import load_news; assert 'tensorflow_datasets' not in sys.modules\n"
        "load_news(sys.argv[1], cache_dir=sys.argv[1]); assert 'tensorflow_datasets' in sys.modules\n"
        "assert 'tensorflow' not in sys.modules; print('done')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(write(tmp_path / "set", TINY))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


# ---- rows ------------------------------------------------------------------------------------------------------------


def impressions_of(drawn):
    """`Impressions` of (user, history, candidates, labels or None) with indices for ids."""
    index = [[int(one[1:]) for one in some] for line in drawn for some in line[1:3]]
    labels = [line[3] or [-1] * len(line[2]) for line in drawn]
    flat = lambda rows, dtype: np.array([x for row in rows for x in row], dtype)  # noqa: E731
    offset = lambda rows: np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))  # noqa: E731
    return Impressions(
        user=np.array([line[0] for line in drawn], str),
        history=flat(index[::2], np.int32),
        history_offset=offset(index[::2]),
        candidates=flat(index[1::2], np.int32),
        clicked=flat(labels, np.int8),
        candidate_offset=offset(labels),
    )


def newest(history, width):
    kept = [int(one[1:]) for one in history[-width:]]
    return kept + [0] * (width - len(kept))


def number(news):
    return [int(one[1:]) for one in news]


clicked_lines = behaviors.filter(lambda drawn: any(1 in (line[3] or []) for line in drawn))


@given(drawn=clicked_lines, history=st.integers(1, 7), negatives=st.integers(1, 6), seed=seeds)
def test_every_click_makes_one_row_with_what_was_not_clicked_beside_it(drawn, history, negatives, seed):
    impressions = impressions_of(drawn)
    inputs, labels, users = training_rows(impressions, history=history, negatives=negatives, seed=seed)
    clicks = [
        (line, news)
        for line in drawn
        if line[3] is not None
        for news, label in zip(line[2], line[3], strict=True)
        if label == 1
    ]
    assert inputs["history"].shape == (len(clicks), history) and inputs["history"].dtype == np.int32
    assert inputs["candidates"].shape == (len(clicks), 1 + negatives) and inputs["candidates"].dtype == np.int32
    assert labels.dtype == np.int32 and labels.tolist() == [0] * len(clicks)
    assert users.tolist() == [line[0] for line, _ in clicks]
    for past, shown, (line, news) in zip(inputs["history"], inputs["candidates"], clicks, strict=True):
        assert past.tolist() == newest(line[1], history)
        assert shown[0] == int(news[1:])
        others = [one for one, label in zip(number(line[2]), line[3], strict=True) if label == 0]
        drew = min(len(others), negatives)
        assert Counter(shown[1 : 1 + drew].tolist()) <= Counter(others)
        assert (shown[1 + drew :] == -1).all()


@given(drawn=clicked_lines, more=behaviors, seed=seeds)
def test_a_row_is_a_function_of_the_seed_and_its_number(drawn, more, seed):
    one, _, _ = training_rows(impressions_of(drawn), negatives=2, seed=seed)
    two, _, _ = training_rows(impressions_of(drawn + more), negatives=2, seed=seed)
    for name, rows in one.items():
        np.testing.assert_array_equal(two[name][: len(rows)], rows)


def test_another_seed_and_another_row_draw_others_and_all_are_as_likely():
    line = ("U1", [], ["N9", *(f"N{i}" for i in range(1, 7))], [1] + [0] * 6)
    rows = [training_rows(impressions_of([line] * 3000), negatives=3, seed=seed)[0]["candidates"] for seed in (1, 2)]
    assert (rows[0] != rows[1]).any() and (rows[0][0] != rows[0]).any()
    np.testing.assert_allclose(np.bincount(rows[0][:, 1:].ravel(), minlength=7)[1:] / 3000, 1 / 2, atol=0.04)
    pairs = np.array([[(row == a).any() and (row == b).any() for a, b in ((1, 2), (5, 6))] for row in rows[0][:, 1:]])
    np.testing.assert_allclose(pairs.mean(0), 1 / 5, atol=0.04)  # C(4, 1) / C(6, 3)


labelled = behaviors.map(lambda drawn: [line for line in drawn if line[3] is not None])


@given(drawn=labelled, history=st.integers(1, 7), cap=st.none() | st.integers(1, 7))
def test_evaluation_rows_hold_all_candidates_or_the_first_and_a_click(drawn, history, cap):
    inputs, labels, users, cut = evaluation_rows(impressions_of(drawn), history=history, candidates=cap)
    width = cap or max([len(line[2]) for line in drawn], default=1)
    assert inputs["history"].shape == (len(drawn), history) and inputs["history"].dtype == np.int32
    assert inputs["candidates"].shape == labels.shape == (len(drawn), width)
    assert inputs["candidates"].dtype == labels.dtype == np.int32
    assert users.tolist() == [line[0] for line in drawn]
    assert cut.tolist() == [max(len(line[2]) - width, 0) for line in drawn]
    for i, (_, past, shown, clicked) in enumerate(drawn):
        assert inputs["history"][i].tolist() == newest(past, history)
        pairs = list(zip(number(shown), clicked, strict=True))
        kept = pairs[:width] + [(0, -1)] * (width - len(pairs))
        if 1 in clicked and clicked.index(1) >= width:
            kept[-1] = pairs[clicked.index(1)]
        assert list(zip(inputs["candidates"][i].tolist(), labels[i].tolist(), strict=True)) == kept
        assert (1 in labels[i]) == (1 in clicked)


def test_impressions_without_labels_are_an_error():
    line = ("U1", ["N1"], ["N2", "N3"], None)
    with pytest.raises(ValueError, match=r"holds 2 candidates without a label.*evaluation needs a split with labels"):
        evaluation_rows(impressions_of([line, ("U1", [], ["N2"], [1])]))
    with pytest.raises(ValueError, match="holds 1 impressions without any click"):
        training_rows(impressions_of([line]), seed=0)


@pytest.mark.parametrize("wrong", [dict(history=0), dict(negatives=0)])
def test_sizes_below_one_are_an_error(wrong):
    impressions = impressions_of([("U1", [], ["N1"], [1])])
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is 0"):
        training_rows(impressions, seed=0, **wrong)
    with pytest.raises(ValueError, match="is 0; allowed: at least 1"):
        evaluation_rows(impressions, **{"candidates" if name == "negatives" else name: 0})


# ---- real posts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def news20(cache):
    folder = pathlib.Path(os.environ.get("FEDKD_DATA_DIR", "unset"), "news20")
    if not folder.exists():
        pytest.skip("no news20: set FEDKD_DATA_DIR")
    return folder, load_news(folder, cache_dir=cache)


def test_news20_is_what_the_files_hold(news20):
    folder, news = news20
    written = {split: folder.joinpath(split, "news.tsv").read_bytes().split(b"\n")[:-1] for split in ("train", "test")}
    assert {split: len(rows) for split, rows in written.items()} == {"train": 13_047, "test": 10_071}
    assert len(news) == 1 + len(set(written["train"]) | set(written["test"]))
    texts = {one: [title, abstract] for one, title, abstract in zip(news.ids, news.titles, news.abstracts, strict=True)}
    for line in written["train"] + written["test"]:
        cells = line.decode().split("\t")
        assert texts[cells[0]] == cells[3:5]
    for split, n in (("train", 4846), ("test", 3025)):
        read = news.splits[split]
        assert len(read) == n and read.unknown == 0 and set(np.diff(read.candidate_offset)) == {5}
        for i, line in enumerate(folder.joinpath(split, "behaviors.tsv").read_text().splitlines()):
            _, user, _, history, shown = line.split("\t")
            past = read.history[read.history_offset[i] : read.history_offset[i + 1]]
            assert read.user[i] == user and [news.ids[j] for j in past] == history.split()
            here = slice(5 * i, 5 * i + 5)
            pairs = zip(read.candidates[here], read.clicked[here], strict=True)
            assert " ".join(f"{news.ids[j]}-{label}" for j, label in pairs) == shown


def test_the_users_of_news20_are_clients(news20):
    _, news = news20
    inputs, labels, users = training_rows(news.splits["train"], history=10, seed=0)
    assert inputs["candidates"].shape == (4846, 5) and (inputs["candidates"] > 0).all()
    data = federate(inputs, labels, by_key(users))
    assert len(data.count) == len(set(users)) == 1958 and data.count.sum() == 4846
    test, labels, _, cut = evaluation_rows(news.splits["test"], history=10)
    assert test["candidates"].shape == (3025, 5) and (labels.sum(1) == 1).all() and not cut.any()
