"""From text to arrays of integers, once and on the host: wordpieces of whole texts or of tagged words, characters.

Arrays have a fixed length; where a label is -1 there is nothing to predict. Tokenising is remembered in the cache:
`cached_texts`, `cached_words`.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from fedkd_jax.check import check_int, check_type
from fedkd_jax.data.cache import Folder, cached_arrays

BATCH = 1000  # texts handed to the tokenizer at once: bounds the encodings alive, which are far larger than their ids


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a pretrained model, which neither pads nor truncates, and to which "[PAD]" in a text is three words.

    Args:
      folder: with `tokenizer.json`, as the models on Hugging Face have it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not that of a tokenizer.

    >>> import tempfile
    >>> from tokenizers.models import WordLevel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Tokenizer(WordLevel({"[UNK]": 0, "rash": 1}, "[UNK]")).save(f"{folder}/tokenizer.json")
    ...     load_tokenizer(folder).token_to_id("rash")
    1
    """
    path = pathlib.Path(os.path.expanduser(folder)) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; a pretrained model's folder has a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is not the file of a tokenizer: {error}") from error
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= 2**31:
        raise ValueError(f"{path} has a token of number {last}; allowed: numbers below {2**31}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # somebody's "[SEP]" is text like any other
    return tokenizer


def encode_texts(texts: Sequence[str] | np.ndarray, tokenizer: Tokenizer, length: int) -> Int32[np.ndarray, "n length"]:
    """Token ids of texts: [CLS], the pieces that fit, [SEP], then [PAD].

    Args:
      texts: n strings, some may be empty.
      tokenizer: one that knows these three tokens and neither pads nor truncates: `load_tokenizer`.
      length: at least 3.

    Raises:
      TypeError: one text instead of several, something else than a tokenizer.
      ValueError: length is too small, or the tokenizer pads, truncates, lacks a special token or cannot read a text, such as
        one without a token for what it does not know.

    >>> from tokenizers.models import WordPiece
    >>> pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "head", "##ache"]
    >>> tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    >>> encode_texts(["headache", "head", ""], tokenizer, 4)
    array([[1, 4, 5, 2],
           [1, 4, 2, 0],
           [1, 2, 0, 0]], dtype=int32)
    """
    return _encode_texts(texts, tokenizer, length)[0]


def encode_words(
    words: Sequence[Sequence[str]], tags: Sequence[Sequence[int] | np.ndarray], tokenizer: Tokenizer, length: int
) -> tuple[Int32[np.ndarray, "n length"], Int32[np.ndarray, "n length"]]:
    """Token ids of tagged words, and the tag of each word at its first piece.

    A tag stands at one position only, so that a word counts once however many pieces it has. A word that does not fit is
    lost, and so is one of which the tokenizer makes no piece (a lone zero-width space): see `lost_words`.

    Args:
      words: n sentences.
      tags: of each sentence as many integers >= 0 as it has words.
      tokenizer: as for `encode_texts`.
      length: at least 3.

    Returns:
      (tokens, labels). Tokens as `encode_texts` has them; labels are -1 at [CLS], [SEP], [PAD] and further pieces.

    Raises:
      ValueError: as `encode_texts`, or a sentence whose tags are not one integer >= 0 for each word.

    >>> from tokenizers.models import WordPiece
    >>> pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "head", "##ache"]
    >>> tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    >>> encode_words([["headache", "head"]], [[7, 8]], tokenizer, 6)
    (array([[1, 4, 5, 4, 2, 0]], dtype=int32), array([[-1,  7, -1,  8, -1, -1]], dtype=int32))
    """
    special = _special(tokenizer, length)
    arrays = [np.asarray(each) for each in tags]
    if len(arrays) != len(words):
        raise ValueError(f"tags has {len(arrays)} sentences but words has {len(words)}; allowed: as many in both")
    for i, (sentence, each) in enumerate(zip(words, arrays, strict=True)):
        if each.shape != (len(sentence),) or (each.size and (each.dtype.kind not in "iu" or each.min() < 0)):
            raise ValueError(f"tags[{i}] is {each}; allowed: an integer >= 0 for each of {len(sentence)} words")
    tokens = np.full((len(words), length), special[0], np.int32)
    labels = np.full((len(words), length), -1, np.int32)
    encodings = _encodings([list(sentence) for sentence in words], tokenizer, is_pretokenized=True)
    for i, encoding in enumerate(encodings):
        _fill(tokens[i], encoding.ids, special)
        # The word of each piece, which skips the words without any: counting pieces instead would shift what follows.
        source = np.array(encoding.word_ids, int)[: length - 2]
        first = np.diff(source, prepend=-1) != 0
        labels[i, 1 : 1 + len(source)][first] = arrays[i][source[first]]
    return tokens, labels


def lost_words(words: Sequence[Sequence[str]], labels: Int32[np.ndarray, "n length"]) -> int:
    """How many words `encode_words` found no place for: those cut off, and those without a piece.

    >>> lost_words([["a", "b", "c"], []], np.array([[-1, 0, 0, -1], [-1, -1, -1, -1]], np.int32))
    1
    """
    return sum(map(len, words)) - int((labels >= 0).sum())


def _encode_texts(texts, tokenizer, length):
    special = _special(tokenizer, length)
    tokens, cut = np.full((len(texts), length), special[0], np.int32), np.zeros(len(texts), np.int32)
    if isinstance(texts, str):
        raise TypeError(f"texts is {texts[:80]!r}; allowed: a sequence of strings")
    encodings = _encodings([str(text) for text in texts], tokenizer)
    for i, encoding in enumerate(encodings):
        _fill(tokens[i], encoding.ids, special)
        cut[i] = max(len(encoding.ids) - (length - 2), 0)
    return tokens, cut


def _special(tokenizer, length):
    check_type("tokenizer", tokenizer, Tokenizer, "a tokenizer, see load_tokenizer")
    check_int("length", length, 3, why="as [CLS] and [SEP] take two places")
    if tokenizer.padding or tokenizer.truncation:
        raise ValueError("tokenizer pads or truncates; allowed: one that does neither, as load_tokenizer returns it")
    ids = {token: tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise ValueError(f"tokenizer has no {' and no '.join(missing)}; allowed: one with all of {' '.join(ids)}")
    return tuple(ids.values())


def _encodings(inputs, tokenizer, **kwargs):
    for start in range(0, len(inputs), BATCH):
        try:
            encodings = tokenizer.encode_batch(inputs[start : start + BATCH], add_special_tokens=False, **kwargs)
        except Exception as error:  # tokenizers raises nothing narrower
            where = f"texts {start} to {start + BATCH - 1}"
            raise ValueError(f"tokenizer cannot read {where}: {error}; allowed: one that reads any text") from error
        yield from encodings


def _fill(row, ids, special):
    _, cls, sep = special
    ids = [cls, *ids[: len(row) - 2], sep]
    row[: len(ids)] = ids


# ---- characters ------------------------------------------------------------------------------------------------------


class Characters(NamedTuple):
    """Pieces of texts for a model that predicts the next character; character c of the vocabulary is `index(c) + 1`.

    >>> Characters._fields
    ('inputs', 'labels', 'source', 'vocabulary')
    """

    inputs: np.ndarray  # [n, length] int32, 0 where the piece is over
    labels: np.ndarray  # [n, length] int32, the character that follows each; -1 where the piece is over
    source: np.ndarray  # [n] int32, the text of each piece
    vocabulary: str  # V distinct characters; a model has V + 1 classes, as 0 is padding


def characters(texts: Sequence[str], length: int, *, vocabulary: str | None = None) -> Characters:
    """Cut each text into pieces of `length` + 1 characters and predict each but the first of a piece.

    The last character of a piece is also the first of the next one, so each character of a text but its first is
    predicted once. A text of fewer than two characters has no piece.

    Args:
      texts: strings, such as speeches.
      length: at least 1.
      vocabulary: distinct characters; default those that occur, sorted. Give that of the training texts for others.

    Raises:
      ValueError: length < 1, a vocabulary with a repeated character, or a character that is not in it.

    >>> pieces = characters(["abba", "", "ab"], length=2)
    >>> pieces.inputs.tolist(), pieces.labels.tolist(), pieces.source.tolist(), pieces.vocabulary
    ([[1, 2], [2, 0], [1, 0]], [[2, 2], [1, -1], [2, -1]], [0, 0, 2], 'ab')
    """
    check_int("length", length)
    if isinstance(texts, str):
        raise TypeError(f"texts is {texts[:80]!r}; allowed: a sequence of strings")
    vocabulary = "".join(sorted(set().union(*texts))) if vocabulary is None else vocabulary
    ids = {character: i for i, character in enumerate(vocabulary, 1)}
    if len(ids) < len(vocabulary):
        raise ValueError(f"vocabulary is {vocabulary!r}; allowed: distinct characters")
    unknown = set().union(*texts) - ids.keys()
    if unknown:
        raise ValueError(f"texts hold {''.join(sorted(unknown))!r}; allowed: the characters of {vocabulary!r}")
    source = [i for i, text in enumerate(texts) for _ in range(0, len(text) - 1, length)]
    pieces = [text[start : start + length + 1] for text in texts for start in range(0, len(text) - 1, length)]
    inputs, labels = np.zeros((len(pieces), length), np.int32), np.full((len(pieces), length), -1, np.int32)
    for row, next_row, piece in zip(inputs, labels, pieces, strict=True):
        coded = [ids[character] for character in piece]
        row[: len(coded) - 1], next_row[: len(coded) - 1] = coded[:-1], coded[1:]
    return Characters(inputs, labels, np.array(source, np.int32), vocabulary)


# ---- cache -----------------------------------------------------------------------------------------------------------


def cached_texts(
    texts: Sequence[str] | np.ndarray, tokenizer: Tokenizer, length: int, cache_dir: Folder = None
) -> tuple[Int32[np.ndarray, "n length"], Int32[np.ndarray, "n"]]:
    """`encode_texts`, and how many pieces of each text did not fit; remembered in cache_dir (default as for `load`) for these
    texts, tokenizer and length.

    >>> import tempfile
    >>> from tokenizers.models import WordLevel
    >>> tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "rash": 3}, "[PAD]"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tokens, cut = cached_texts(["rash"], tokenizer, 4, folder)
    ...     tokens, cut, len(list(pathlib.Path(folder).rglob("*.npz")))
    (array([[1, 3, 2, 0]], dtype=int32), array([0], dtype=int32), 1)
    """
    parts = ["encode_texts 3", texts, tokenizer.to_str(), length]
    tokens, cut = cached_arrays(parts, lambda: _encode_texts(texts, tokenizer, length), cache_dir)
    return tokens, cut


def cached_words(
    words: Sequence[Sequence[str]],
    tags: Sequence[Sequence[int] | np.ndarray],
    tokenizer: Tokenizer,
    length: int,
    cache_dir: Folder = None,
) -> tuple[Int32[np.ndarray, "n length"], Int32[np.ndarray, "n length"]]:
    """`encode_words`, remembered as `cached_texts` is.

    >>> import tempfile
    >>> from tokenizers.models import WordLevel
    >>> tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "rash": 3}, "[PAD]"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cached_words([["rash"]], [[5]], tokenizer, 4, folder)
    (array([[1, 3, 2, 0]], dtype=int32), array([[-1,  5, -1, -1]], dtype=int32))
    """
    parts = ["encode_words 2", words, tags, tokenizer.to_str(), length]
    tokens, labels = cached_arrays(parts, lambda: encode_words(words, tags, tokenizer, length), cache_dir)
    return tokens, labels
