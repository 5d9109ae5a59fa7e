"""tensorflow-datasets builders of text corpora from local files in `manual_dir`; like `builders`, without TensorFlow.

What the files look like is in `readers`. Raise a builder's VERSION when what it writes of the same files changes: the
version is part of the path it is prepared in.
"""

import pathlib
from collections.abc import Mapping

import tensorflow_datasets as tfds

from fedkd_jax.data.readers import read_ade, read_psytar, read_relations, read_speeches, read_tagged, tag_spans

ADR_CLASSES = ("no ADR", "ADR")


class AdeCorpusV2(tfds.core.GeneratorBasedBuilder):
    """Detection of adverse drug reactions in case reports: text, label, document (PubMed id), in one split.

    >>> AdeCorpusV2.name
    'ade_corpus_v2'
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put DRUG-AE.rel and ADE-NEG.txt of the ADE corpus V2 into manual_dir."
    FILES = ("DRUG-AE.rel", "ADE-NEG.txt")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": _adr(), "document": tfds.features.Text()}
        return _text_info(
            self, features, ("text", "label"), "ADE corpus V2: which sentences tell of an adverse effect."
        )

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir)
        return {"train": self._generate_examples(*(folder / file for file in self.FILES))}

    def _generate_examples(self, relations, negatives):
        for i, (text, label, document) in enumerate(_some(relations, read_ade(relations, negatives))):
            yield i, {"text": text, "label": label, "document": document}


class Psytar(tfds.core.GeneratorBasedBuilder):
    """Detection of adverse drug reactions in drug reviews: text and label, in three splits.

    >>> Psytar.name
    'psytar'
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the folder `binary` of PsyTAR into manual_dir."
    FILES: Mapping[str, str] = {"train": "binary/train.csv", "validation": "binary/dev.csv", "test": "binary/test.csv"}

    def _info(self):
        features = {"text": tfds.features.Text(), "label": _adr()}
        return _text_info(self, features, ("text", "label"), "PsyTAR: which sentences tell of an adverse reaction.")

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir)
        return {split: self._generate_examples(folder / file) for split, file in self.FILES.items()}

    def _generate_examples(self, path):
        for i, (text, label) in enumerate(_some(path, read_psytar(path))):
            yield i, {"text": text, "label": label}


class TaggedWords(tfds.core.GeneratorBasedBuilder):
    """Named entities: words, IOB2 tags, document (empty where not known); one config per corpus.

    >>> sorted(TaggedWords.builder_configs)
    ['ade_corpus_v2', 'bc5cdr', 'ncbi_disease', 'psytar']
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the files of the corpus, FILES[config], into manual_dir."
    FILES: Mapping[str, Mapping[str, str]] = {
        "ade_corpus_v2": {"train": "DRUG-AE.rel"},
        "bc5cdr": {"train": "train.tsv", "validation": "devel.tsv", "test": "test.tsv"},
        "ncbi_disease": {"train": "train.tsv", "validation": "devel.tsv", "test": "test.tsv"},
        "psytar": {"train": "all/train.txt", "validation": "all/dev.txt", "test": "all/test.txt"},
    }
    TYPES: Mapping[str, tuple[str, ...]] = {
        "ade_corpus_v2": ("Drug", "Effect"),
        "bc5cdr": ("Chemical", "Disease"),
        "ncbi_disease": ("Disease",),
        "psytar": ("ADR", "DI", "SSI", "WD"),
    }
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in FILES]  # noqa: RUF012 (tfds wants a list)

    def _info(self):
        types = self.TYPES[self.builder_config.name]
        names = ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]
        features = {
            "words": tfds.features.Sequence(tfds.features.Text()),
            "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
            "document": tfds.features.Text(),
        }
        return _text_info(self, features, ("words", "tags"), "Sentences with named entities.")

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir)
        files = self.FILES[self.builder_config.name]
        return {split: self._generate_examples(folder / file) for split, file in files.items()}

    def _generate_examples(self, path):
        name = self.builder_config.name
        if name == "ade_corpus_v2":
            rows = [(*tag_spans(text, spans), document) for (document, text), spans in read_relations(path).items()]
        else:
            rows = [(words, tags, "") for words, tags in read_tagged(path, self.TYPES[name])]
        for i, (words, tags, document) in enumerate(_some(path, rows)):
            yield i, {"words": words, "tags": tags, "document": document}


class LocalTinyShakespeare(tfds.core.GeneratorBasedBuilder):
    """Speeches from Shakespeare's plays: speaker and text, in one split.

    >>> LocalTinyShakespeare.name
    'local_tiny_shakespeare'
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put input.txt of tiny Shakespeare into manual_dir."
    FILES = ("input.txt",)

    def _info(self):
        features = {"speaker": tfds.features.Text(), "text": tfds.features.Text()}
        return _text_info(self, features, None, "Tiny Shakespeare, speech by speech.")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(pathlib.Path(dl_manager.manual_dir, *self.FILES))}

    def _generate_examples(self, path):
        for i, (speaker, text) in enumerate(_some(path, read_speeches(path))):
            yield i, {"speaker": speaker, "text": text}


def _some(path, rows):
    if not rows:  # of which tfds says less
        raise ValueError(f"{path} holds no example; allowed: one or more")
    return rows


def _adr():
    return tfds.features.ClassLabel(names=list(ADR_CLASSES))


def _text_info(builder, features, supervised_keys, description):
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=supervised_keys,
        disable_shuffling=True,  # example i of the prepared set is example i of the files
    )
