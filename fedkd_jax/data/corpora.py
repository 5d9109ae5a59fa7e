"""Corpora that are more than inputs with one label each: named entities, and speeches with their speakers.

The files stay where they are; what is read of them is prepared once in the cache as `sources.load` does it. For
detection of adverse drug reactions, one label a sentence, see `load("ade_corpus_v2")` and `load("psytar")`.
"""

import dataclasses

import numpy as np

from fedkd_jax.data.cache import Folder
from fedkd_jax.data.sources import prepare_local, read_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tagged:
    """One split of a corpus of named entities, on the host, before tokenisation.

    >>> tagged = Tagged(words=[["Lithium", "coma"]], tags=[np.array([1, 3])],
    ...                 names=("O", "B-Drug", "I-Drug", "B-Effect", "I-Effect"))
    >>> len(tagged), [tagged.names[tag] for tag in tagged.tags[0]]
    (1, ['B-Drug', 'B-Effect'])
    """

    words: list[list[str]]  # n sentences
    tags: list[np.ndarray]  # of each sentence [words] int32, indices into names
    names: tuple[str, ...]  # "O" first, then B- and I- of each type; the tags are valid IOB2
    natural: np.ndarray | None = None  # [n] the document of each sentence, where known

    def __post_init__(self):
        if [len(words) for words in self.words] != [len(tags) for tags in self.tags]:
            raise ValueError("tags are of other sentences than words; allowed: one tag for each word")
        if any(len(tags) and not 0 <= min(tags) <= max(tags) < len(self.names) for tags in self.tags):
            raise ValueError(f"tags hold an index that names has not; allowed: 0 to {len(self.names) - 1}")

    def __len__(self) -> int:
        return len(self.words)

    def take(self, ids: np.ndarray) -> "Tagged":
        """The sentences of these numbers."""
        natural = None if self.natural is None else self.natural[ids]
        words, tags = [self.words[i] for i in ids], [self.tags[i] for i in ids]
        return dataclasses.replace(self, words=words, tags=tags, natural=natural)


def load_tagged(name: str, *, data_dir: Folder = None, cache_dir: Folder = None, split: str = "train") -> Tagged:
    """Read a corpus of named entities.

    Args:
      name: "psytar" (drug reviews; all/train.txt, dev.txt, test.txt), "bc5cdr" or "ncbi_disease" (abstracts; train.tsv,
        devel.tsv, test.tsv), or "ade_corpus_v2" (case reports; DRUG-AE.rel, without an official test split). Its files lie
        in data_dir/NAME or data_dir.
      data_dir: default `$FEDKD_DATA_DIR`.
      cache_dir: where the corpus is prepared on first use; as for `load`.
      split: "train", "validation", "test" in the notation of tfds, "train[:10%]"; of ade_corpus_v2 "train" only.

    Returns:
      Tagged, sentences in the order of the file. `natural` is the PubMed id for ade_corpus_v2, else None. Of a drug
      and an effect that overlap there the longer is kept: of 10,839 distinct mentions 120 are dropped, all of them drugs.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an unknown name or split, or a malformed line, with its file and number.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "DRUG-AE.rel").write_text("7|Lithium coma.|coma|18|22|Lithium|10|17")
    ...     tagged = load_tagged("ade_corpus_v2", data_dir=folder, cache_dir=folder)
    >>> tagged.words, tagged.tags, tagged.natural.tolist()
    ([['Lithium', 'coma', '.']], [array([1, 3, 0], dtype=int32)], ['7'])
    """
    from fedkd_jax.data.corpus_builders import TaggedWords  # tfds takes 0.3 s to import: only those who load pay

    if name not in TaggedWords.FILES:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(TaggedWords.FILES)}")
    files = TaggedWords.FILES[name].values()
    builder = prepare_local(name, list(files), TaggedWords, data_dir, cache_dir, config=name)
    words, tags, documents = _columns(builder, split, ("words", "tags", "document"))
    return Tagged(
        words=[[word.decode() for word in sentence] for sentence in words],
        tags=[np.asarray(sentence, np.int32) for sentence in tags],
        names=tuple(builder.info.features["tags"].feature.names),
        natural=np.array([document.decode() for document in documents]) if any(documents) else None,
    )


def load_speeches(*, data_dir: Folder = None, cache_dir: Folder = None, split: str = "train") -> list[tuple[str, str]]:
    """Read tiny Shakespeare as (speaker, text), in the order of input.txt in data_dir/tiny_shakespeare or data_dir.

    7,222 speeches of 309 speakers, of which 125 are a name without a text.

    Args:
      data_dir: default `$FEDKD_DATA_DIR`.
      cache_dir: where the speeches are prepared on first use; as for `load`.
      split: "train" in the notation of tfds, "train[:90%]".

    Raises:
      FileNotFoundError: input.txt is missing.
      ValueError: an unknown split, or text before the first speaker.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "input.txt").write_text("All:\\nSpeak, speak.\\n")
    ...     load_speeches(data_dir=folder, cache_dir=folder)
    [('All', 'Speak, speak.')]
    """
    from fedkd_jax.data.corpus_builders import LocalTinyShakespeare

    files = list(LocalTinyShakespeare.FILES)
    builder = prepare_local("tiny_shakespeare", files, LocalTinyShakespeare, data_dir, cache_dir)
    speakers, texts = _columns(builder, split, ("speaker", "text"))
    return [(speaker.decode(), text.decode()) for speaker, text in zip(speakers, texts, strict=True)]


def _columns(builder, split, names):
    rows = [row for block in read_blocks(builder, split) for row in block]
    return tuple([row[name] for row in rows] for name in names)
