"""Readers of text corpora as their authors distribute them: local files to plain lists, in the order of the files.

Files are UTF-8, with or without a byte-order mark, with either kind of line ending. A line that cannot be read, has a NUL or is
longer than `LONGEST` bytes is a ValueError that begins with `FILE, line LINE:`; empty lines mean nothing except where the
format says so. Nothing here knows tensorflow-datasets: `corpus_builders` prepares what is read here, `sources.load` and
`corpora` hand it out.
"""

import codecs
import csv
import pathlib
import re
from collections.abc import Iterator, Sequence

Span = tuple[int, int, str]  # text[start:end] and its type
LONGEST = 2**13  # bytes of a line: time and memory of what follows are bounded by it


def read_relations(path: pathlib.Path) -> dict[tuple[str, str], list[Span]]:
    """Sentences of DRUG-AE.rel of the ADE corpus, lines `document|sentence|effect|begin|end|drug|begin|end`.

    The offsets count from the beginning of the document, which is not at hand: the strings are searched in the sentence,
    and the offsets of all its lines together say which occurrence is meant, as they differ from the place in the sentence
    by one and the same number. Of two places that would do the earlier is taken.

    Returns:
      {(document, sentence): its distinct spans, in order}, of types "Drug" and "Effect", without outer blanks.

    Raises:
      ValueError: other than eight fields, an offset that is no number, a string that is not in the sentence, or offsets
        that contradict each other.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "DRUG-AE.rel")
    ...     _ = path.write_text("7|Lithium, then lithium-induced coma.|coma|52|56|lithium|36|43")
    ...     read_relations(path)
    {('7', 'Lithium, then lithium-induced coma.'): [(14, 21, 'Drug'), (30, 34, 'Effect')]}
    """
    marked: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    shifts: dict[tuple[str, str], set[int]] = {}
    for number, line in _lines(path):
        fields = line.split("|")
        if not line:
            continue
        if len(fields) != 8 or not all(re.fullmatch(r"[0-9]{1,9}", fields[i]) for i in (3, 4, 6, 7)):
            raise _malformed(path, number, f"{line[:80]!r} is not document|sentence|effect|begin|end|drug|begin|end")
        document, text, effect, effect_begin, _, drug, drug_begin, _ = fields
        key = document, text
        _check_document(path, number, document)
        for begin, string, kind in ((int(effect_begin), effect, "Effect"), (int(drug_begin), drug, "Drug")):
            here = {begin - match.start() for match in re.finditer(f"(?={re.escape(string)})", text)}
            if not here or not string.strip():
                raise _malformed(path, number, f"{kind.lower()} {_cut(string)} is not in the sentence {_cut(text)}")
            shifts[key] = shifts.get(key, here) & here
            if not shifts[key]:
                raise _malformed(
                    path, number, f"offset {begin} of {_cut(string)} contradicts the others of its sentence"
                )
            marked.setdefault(key, []).append((begin, string, kind))
    return {key: sorted({_strip(*mark, max(shifts[key])) for mark in marks}) for key, marks in marked.items()}


def _strip(begin, string, kind, shift):
    start = begin - shift + len(string) - len(string.lstrip())
    return start, start + len(string.strip()), kind


def tag_spans(text: str, spans: Sequence[Span]) -> tuple[list[str], list[str]]:
    """Words of a text (runs of word characters, other characters singly) and their IOB2 tags.

    Of spans that have a word in common the longest wins, then the first, then the first type; the others are dropped.

    >>> tag_spans("Acute lithium-induced coma.", [(6, 13, "Drug"), (0, 13, "Effect"), (22, 26, "Effect")])
    (['Acute', 'lithium', '-', 'induced', 'coma', '.'], ['B-Effect', 'I-Effect', 'O', 'O', 'B-Effect', 'O'])
    """
    words = list(re.finditer(r"\w+|[^\w\s]", text))
    tags = ["O"] * len(words)
    for start, end, kind in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        inside = [i for i, word in enumerate(words) if word.start() < end and word.end() > start]
        if all(tags[i] == "O" for i in inside):
            for i in inside:
                tags[i] = f"{'B' if i == inside[0] else 'I'}-{kind}"
    return [word.group() for word in words], tags


def read_ade(relations: pathlib.Path, negatives: pathlib.Path) -> list[tuple[str, int, str]]:
    """The ADE corpus for detection, as (sentence, label, document): 1 for those of DRUG-AE.rel, then 0 for ADE-NEG.txt.

    The same sentence of the same document is one example. Where both files have it, it is positive: a relation is
    something that an annotator saw.

    Raises:
      ValueError: as `read_relations`, or a line of `negatives` that is not `document NEG sentence`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     relations, negatives = pathlib.Path(folder, "DRUG-AE.rel"), pathlib.Path(folder, "ADE-NEG.txt")
    ...     _ = relations.write_text("7|Lithium coma.|coma|18|22|Lithium|10|17")
    ...     _ = negatives.write_text("7 NEG A case report.")
    ...     read_ade(relations, negatives)
    [('Lithium coma.', 1, '7'), ('A case report.', 0, '7')]
    """
    labels = dict.fromkeys(read_relations(relations), 1)
    for number, line in _lines(negatives):
        match = re.fullmatch(r"(\S+) NEG (.*\S.*)", line)
        if match:
            _check_document(negatives, number, match[1])
            labels.setdefault((match[1], match[2]), 0)
        elif line:
            raise _malformed(negatives, number, f"{line[:80]!r} is not document NEG sentence")
    return [(text, label, document) for (document, text), label in labels.items()]


def read_psytar(path: pathlib.Path) -> list[tuple[str, int]]:
    """Sentences of PsyTAR and whether they tell of an adverse reaction, from a table with columns `sentences` and `ADR`.

    Columns are separated by tabs, a sentence in quotes may have line breaks. Repeated sentences are kept.

    Raises:
      ValueError: a column is missing or there twice, a row has another number of fields than the header, or ADR is not 0 or 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "train.csv")
    ...     _ = path.write_text('sentences\\tADR\\tWD\\nI felt dizzy.\\t1\\t0\\n"It ""works""."\\t0\\t0')
    ...     read_psytar(path)
    [('I felt dizzy.', 1), ('It "works".', 0)]
    """
    reader = csv.reader((line + "\n" for _, line in _lines(path)), delimiter="\t", strict=True)
    examples = []
    try:
        header = next(reader, [])
        if not header.count("sentences") == header.count("ADR") == 1:
            raise _malformed(path, 1, f"the columns are {_cut(header)}; sentences and ADR must be among them, once")
        for row in reader:
            fields = dict(zip(header, row, strict=False))
            if row and (len(row) != len(header) or fields["ADR"] not in ("0", "1")):
                raise _malformed(path, reader.line_num, f"{_cut(row)} has not {len(header)} fields with ADR 0 or 1")
            if row:
                examples.append((fields["sentences"], int(fields["ADR"])))
    except csv.Error as error:
        raise _malformed(path, reader.line_num, str(error)) from error
    return examples


def read_tagged(path: pathlib.Path, types: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Sentences as (words, IOB2 tags) from lines `word<TAB>tag`, an empty line after each sentence.

    Args:
      path: the file.
      types: of entities: tags may be "O", and "B-" or "I-" before one of these.

    Raises:
      ValueError: a line that is not a word, a tab and such a tag.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "train.tsv")
    ...     _ = path.write_text("No\\tO\\nlung\\tI-Disease\\ncancer\\tI-Disease\\n\\nGood\\tO\\n")
    ...     read_tagged(path, ["Disease"])
    [(['No', 'lung', 'cancer'], ['O', 'B-Disease', 'I-Disease']), (['Good'], ['O'])]
    """
    allowed = {"O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in types)}
    sentences, words, tags = [], [], []
    for number, line in [*_lines(path), (0, "")]:
        word, _, tag = line.partition("\t")
        if line and (not word or tag not in allowed):
            raise _malformed(path, number, f"{_cut(line)} is not a word, a tab and one of {sorted(allowed)}")
        if line:
            words.append(word)
            tags.append(tag)
        elif words:
            sentences.append((words, iob2(tags)))
            words, tags = [], []
    return sentences


def iob2(tags: Sequence[str]) -> list[str]:
    """Valid IOB2: an "I-X" that continues nothing, as IOB1 and careless files have it, becomes "B-X".

    >>> iob2(["I-Drug", "I-Drug", "I-Effect", "O", "B-Drug", "B-Drug"])
    ['B-Drug', 'I-Drug', 'B-Effect', 'O', 'B-Drug', 'B-Drug']
    """
    pairs = zip(["O", *tags], tags, strict=False)
    return [f"B-{tag[2:]}" if tag[0] == "I" and before[2:] != tag[2:] else tag for before, tag in pairs]


def read_speeches(path: pathlib.Path) -> list[tuple[str, str]]:
    """The speeches of a play as (speaker, text); one begins with a line `Name:` after an empty line.

    A text has its line breaks inside but none outside; it is empty where the file has a name and nothing below it.

    Raises:
      ValueError: something is said before the first name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "input.txt")
    ...     _ = path.write_text("All:\\nResolved.\\nresolved.\\n\\nFirst Citizen:\\nHe said:\\nNo.\\n")
    ...     read_speeches(path)
    [('All', 'Resolved.\\nresolved.'), ('First Citizen', 'He said:\\nNo.')]
    """
    speeches: list[tuple[str, list[str]]] = []
    before = ""
    for number, line in _lines(path):
        if not before and len(line) > 1 and line.endswith(":"):
            speeches.append((line[:-1], []))
        elif speeches:
            speeches[-1][1].append(line)
        elif line:
            raise _malformed(path, number, f"{line[:80]!r} comes before the first line of a name and a colon")
        before = line
    return [(speaker, "\n".join(lines).strip("\n")) for speaker, lines in speeches]


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    # Not `str.splitlines`, which also breaks at characters that may stand within a sentence.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if len(line) > LONGEST or b"\0" in line:
            raise _malformed(path, number, f"{len(line)} bytes; allowed: at most {LONGEST}, and no NUL among them")
        try:
            yield number, line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise _malformed(path, number, f"not UTF-8: {error}") from error


def _check_document(path, number, document):
    if len(document) > 256:  # all become an array of the longest one's width
        raise _malformed(
            path, number, f"document {_cut(document)} has {len(document)} characters; allowed: at most 256"
        )


def _cut(value):
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _malformed(path, number, words):
    return ValueError(f"{path}, line {number}: {words}")
