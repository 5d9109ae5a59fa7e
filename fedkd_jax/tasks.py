"""The tasks of the paper, each as clients with their examples, a model's head, and what its answers are worth.

What a task decides is in `Clients`; models, methods and rounds do not know it. Metrics of a task come in the order of the
paper's tables, the one that decides last.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from fedkd_jax import data as fd
from fedkd_jax.evaluate import METRICS
from fedkd_jax.losses import cross_entropy
from fedkd_jax.metrics import AnyMetric, binary_f1, entity_f1, ranking, token_accuracy
from fedkd_jax.models import TransformerConfig, language_model, recommender, tagger, text_classifier
from fedkd_jax.types import ClientSource, FederatedData, Model, Number, PyTree

SCORED_NEWS = 16_384  # of one client, looked up at a time: a row of MIND may have 50 news read and 300 shown
Split = tuple[list[np.ndarray], list[np.ndarray]]  # (training, test) indices of every client


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clients:
    """Data dealt to clients, on the host, and what their task asks for.

    Where there is a `source`, the training examples come from there, and `train`, `labels` and `parts` are some clients' only.

    >>> [field.name for field in dataclasses.fields(Clients)][:5]
    ['train', 'test', 'labels', 'parts', 'classes']
    """

    train: FederatedData
    test: FederatedData
    labels: np.ndarray  # [n] of all that is counted in the picture of who holds what
    parts: list[np.ndarray]  # who holds which of them
    classes: tuple[str, ...]
    unit: str = "examples"  # what these labels are of, in the plural
    metrics: Mapping[str, AnyMetric] = dataclasses.field(default_factory=lambda: METRICS)  # {name: metric}
    scores: tuple[str, ...] = ("accuracy",)  # of the metrics, what a table shows; the last one decides
    names: tuple[str, ...] | None = None  # of the clients, where they are few and have one
    model: Callable[[TransformerConfig], Model] | None = None  # a transformer with this task's head
    eval_batch: int = 256  # rows of test data at a time
    remarks: tuple[str, ...] = ()  # what a reader of the results has to know
    source: ClientSource | None = None
    eval_ids: np.ndarray | None = None  # whose examples `test` holds, if not everybody's

    @property
    def size(self) -> int:
        """The number of clients N."""
        return len(self.parts) if self.source is None else self.source.clients

    @property
    def scored(self) -> tuple[str, ...] | None:
        """The names of those whose examples `test` holds, where clients have some."""
        ids = range(self.size) if self.eval_ids is None else self.eval_ids
        return None if self.names is None else tuple(self.names[i] for i in ids)


def subset(n: int, examples: int | None, seed: int) -> np.ndarray:
    """Which of n examples are used: `examples` of them in their order, drawn once for a seed; all where it is None.

    >>> subset(5, None, 0).tolist(), len(subset(5, 3, 0)), len(subset(5, 9, 0))
    ([0, 1, 2, 3, 4], 3, 5)
    """
    if examples is None or examples >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:examples])


def _cut(what: str, cut: np.ndarray, length: int) -> tuple[str, ...]:
    """A remark on how many texts have more than `length` tokens, if any."""
    return (f"{np.count_nonzero(cut):,} of {len(cut):,} {what} are cut to {length} tokens",) if cut.any() else ()


def _federate(part: str, inputs: PyTree, labels: np.ndarray, clients: list[np.ndarray]) -> FederatedData:
    if not any(map(len, clients)):
        allowed = "one at least: more examples, fewer clients, or another share of them for testing"
        raise ValueError(f"the {part} part of {len(clients)} clients has no example; allowed: {allowed}")
    return fd.federate(inputs, labels, clients)


def classification(
    examples: fd.Examples, split: Split, tokenizer: Tokenizer | None = None, length: int = 64
) -> Clients:
    """One class per example: images, or texts, which become tokens; of two classes of text the second is the positive one.

    Args:
        examples: inputs `[n, ...]`, or `[n]` texts.
        split: of the examples among clients.
        tokenizer: of texts.
        length: tokens of a text, see `encode_texts`.

    Raises:
        ValueError: texts without a tokenizer.

    >>> examples = fd.Examples(inputs=np.eye(3, dtype=np.float32), labels=np.array([0, 1, 1], np.int32), classes=("a", "b"))
    >>> classification(examples, ([np.array([0, 1])], [np.array([2])])).test.labels.tolist()
    [1]
    """
    inputs, more = examples.inputs, {}
    if inputs.dtype == object:
        if tokenizer is None:
            raise ValueError("tokenizer is None; allowed: a tokenizer, as the examples are texts")
        inputs, cut = fd.cached_texts(list(inputs), tokenizer, length)
        more["remarks"] = _cut("texts", cut, length)
        classes = len(examples.classes)
        more["model"] = lambda config: text_classifier(config, classes)
        if classes == 2:
            more |= dict(metrics={**binary_f1(), **METRICS}, scores=("precision", "recall", "f1"))
    train, test = split
    return Clients(
        train=_federate("training", inputs, examples.labels, train),
        test=_federate("test", inputs, examples.labels, test),
        labels=examples.labels,
        parts=[np.sort(np.concatenate(pair)) for pair in zip(train, test, strict=True)],
        classes=examples.classes,
        **more,
    )


def tagging(
    corpora: Mapping[str, tuple[fd.Tagged, fd.Tagged]],
    tokenizer: Tokenizer,
    length: int = 64,
    test_length: int | None = None,
) -> Clients:
    """Named entities: every corpus is a client with its own tags, among which it chooses; the models know the union of all.

    Args:
        corpora: {name: (training, test) sentences}.
        tokenizer, length: see `encode_words`.
        test_length: of the test sentences, by default the same. Words past it are not evaluated; `remarks` says how many.

    >>> from tokenizers.models import WordLevel
    >>> words = Tokenizer(WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "rash": 3}, "[PAD]"))
    >>> def corpus(kind):
    ...     return fd.Tagged(words=[["rash"]], tags=[np.array([1])], names=("O", f"B-{kind}", f"I-{kind}"))
    >>> clients = tagging({"x": (corpus("ADR"),) * 2, "y": (corpus("Effect"),) * 2}, words, length=3)
    >>> clients.classes, clients.train.labels.tolist(), clients.train.inputs["classes"][1].astype(int).tolist()
    (('O', 'B-ADR', 'I-ADR', 'B-Effect', 'I-Effect'), [[-1, 1, -1], [-1, 3, -1]], [1, 0, 0, 1, 1])
    """
    union = tuple(dict.fromkeys(name for pair in corpora.values() for name in pair[0].names))
    number = {name: i for i, name in enumerate(union)}

    def federated(which: int, length: int) -> tuple[FederatedData, list[int]]:
        tokens, labels, used, parts, lost = [], [], [], [], []
        for pair in corpora.values():
            tagged = pair[which]
            own = np.array([number[name] for name in tagged.names], np.int32)
            ids, tags = fd.cached_words(tagged.words, [own[t] for t in tagged.tags], tokenizer, length)
            lost.append(fd.lost_words(tagged.words, tags))
            start = sum(map(len, tokens))
            tokens.append(ids)
            labels.append(tags)
            used.append(np.tile(np.isin(np.arange(len(union)), own), (len(ids), 1)))
            parts.append(np.arange(start, start + len(ids)))
        inputs = {"tokens": np.concatenate(tokens), "classes": np.concatenate(used)}
        return _federate(("training", "test")[which], inputs, np.concatenate(labels), parts), lost

    entities = [
        [number[pair[0].names[t]] for tagged in pair for tags in tagged.tags for t in tags if t > 0]
        for pair in corpora.values()
    ]
    starts = np.cumsum([0, *map(len, entities)])
    test_length = test_length or length
    train, _ = federated(0, length)
    test, lost = federated(1, test_length)
    return Clients(
        train=train,
        test=test,
        labels=np.concatenate([np.array(e, np.int32) for e in entities]),
        parts=[np.arange(a, b) for a, b in itertools.pairwise(starts)],
        classes=union,
        unit="tagged words",
        metrics=entity_f1(union) | {"loss": cross_entropy},
        scores=("precision", "recall", "f1"),
        names=tuple(corpora),
        model=lambda config: tagger(config, len(union)),
        remarks=tuple(
            f"{name}: {words:,} of {sum(map(len, tagged.words)):,} words lie past {test_length} tokens, or have none,"
            " and are not evaluated"
            for (name, (_, tagged)), words in zip(corpora.items(), lost, strict=True)
            if words
        ),
    )


def recommendation(
    news: fd.News,
    deal: Callable[[np.ndarray, np.ndarray], Split],
    tokenizer: Tokenizer,
    length: int = 32,
    *,
    history: int = 50,
    negatives: int = 4,
    candidates: int | None = None,
    seed: int = 0,
    abstracts: bool = False,
    validation: Number = 0,
) -> Clients:
    """News recommendation: a click among candidates that were not clicked, given what the reader clicked before.

    Args:
        news: the catalogue and its impressions.
        deal: (users of the training rows, users of the test rows) -> the rows of every client.
        tokenizer, length: of titles, see `encode_texts`.
        history, negatives, seed: see `training_rows`.
        candidates: see `evaluation_rows`; `remarks` says how many impressions it cuts.
        abstracts: whether a news's text is its title and abstract.
        validation: the share of the training impressions that is held out and evaluated instead of the test split.

    Evaluated is "test", or "dev" where test has no labels, as in MIND-large; `remarks` says so.

    Raises:
        ValueError: no split to train on, or none with labels to evaluate.

    >>> from tokenizers.models import WordLevel
    >>> words = Tokenizer(WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "rain": 3}, "[PAD]"))
    >>> shown = fd.Impressions(user=np.array(["ann"]), history=np.array([1]), history_offset=np.array([0, 1]),
    ...                        candidates=np.array([2, 1]), clicked=np.array([1, 0]), candidate_offset=np.array([0, 2]))
    >>> text = ["", "rain", "rain"]
    >>> news = fd.News(ids=text, categories=text, subcategories=text, titles=text, abstracts=text,
    ...                splits={"train": shown, "test": shown})
    >>> everything = lambda users, readers: ([np.arange(len(users))], [np.arange(len(readers))])
    >>> clients = recommendation(news, everything, words, 4, history=1, negatives=2)
    >>> clients.train.inputs["candidates"].tolist(), clients.test.labels.tolist()
    ([[2, 1, -1]], [[1, 0]])
    """
    texts = [f"{t} {a}".strip() for t, a in zip(news.titles, news.abstracts, strict=True)] if abstracts else news.titles
    tokens, cut_texts = fd.cached_texts(texts, tokenizer, length)
    if "train" not in news.splits:
        raise ValueError(f"news has the splits {', '.join(news.splits)}; allowed: train, and test or dev to evaluate")
    train, remarks = news.splits["train"], [*_cut("news", cut_texts[1:], length)]
    if validation:
        (learn,), (held_out,) = fd.train_test_split([np.arange(len(train))], validation, seed)
        train, test = train.take(learn), train.take(held_out)
    else:
        labelled = (s for s in ("test", "dev") if s in news.splits and (news.splits[s].clicked >= 0).any())
        split = next(labelled, None)
        if split is None:
            raise ValueError(
                f"news has the splits {', '.join(news.splits)}; allowed: a test or a dev whose impressions have labels"
            )
        test = news.splits[split]
        if split != "test":
            remarks.append(f"evaluated on {split}, as test has no labels")
    for name, shown in (("training", train), ("held-out", test)):
        if shown.unknown:
            entries = len(shown.history) + len(shown.candidates)
            remarks.append(
                f"{shown.unknown:,} of {entries:,} news read or shown in {name} impressions are in no news.tsv: without text"
            )
    inputs, labels, users = fd.training_rows(train, history=history, negatives=negatives, seed=seed)
    shown, clicked, readers, cut = fd.evaluation_rows(test, history=history, candidates=candidates)
    train_parts, test_parts = deal(users, readers)
    evaluated = np.concatenate(test_parts)
    known, long = _known_clicks(train, test.take(evaluated)), np.count_nonzero(cut[evaluated])
    if known:
        remarks.append(
            f"{known:,} of {len(evaluated):,} held-out impressions have a click that the same reader's training histories hold"
        )
    if long:
        remarks.append(f"{long:,} of {len(evaluated):,} impressions were cut to {candidates} candidates")
    return Clients(
        train=_federate("training", inputs, labels, train_parts),
        test=_federate("test", shown, clicked, test_parts),
        labels=np.repeat(np.arange(2), [len(labels), len(clicked)]),
        parts=[np.concatenate([a, len(labels) + b]) for a, b in zip(train_parts, test_parts, strict=True)],
        classes=("clicks to learn from", "test impressions"),
        unit="rows",
        eval_batch=max(1, min(256, SCORED_NEWS // (history + clicked.shape[1]))),
        metrics=ranking(),
        scores=("mrr", "ndcg@5", "ndcg@10", "auc"),
        model=lambda config: recommender(config, tokens),
        remarks=tuple(remarks),
    )


def _known_clicks(train: fd.Impressions, test: fd.Impressions) -> int:
    """In how many test impressions a news is clicked that stands in a history of the same reader in training."""
    _, who = np.unique(np.concatenate([train.user, test.user]), return_inverse=True)
    catalogue = 1 + max(int(x.max(initial=0)) for x in (train.history, test.candidates))
    read = np.repeat(who[: len(train)], np.diff(train.history_offset)) * catalogue + train.history
    row = np.repeat(np.arange(len(test)), np.diff(test.candidate_offset))
    clicks = (test.clicked == 1) & (test.candidates > 0)
    row, clicked = row[clicks], test.candidates[clicks]
    return len(np.unique(row[np.isin(who[len(train) :][row] * catalogue + clicked, read)]))


def next_character(
    speeches: Sequence[tuple[str, str]],
    test_fraction: Number,
    seed: int,
    length: int = 64,
    *,
    min_examples: int = 2,
    validation: bool = False,
) -> Clients:
    """The next character of what somebody says: every speaker who says enough is a client.

    Args:
        speeches: (speaker, text).
        test_fraction: of each speaker's pieces.
        seed: of that split.
        length: characters of a piece, see `characters`.
        min_examples: pieces of a speaker, 2 or more: one to train on and one to test; who has fewer is left out.
        validation: whether a part of the training pieces is held out and evaluated instead.

    Raises:
        ValueError: `min_examples` is out of range, or nobody says so much.

    >>> clients = next_character([("A", "to be or not"), ("B", "no"), ("A", "to be")], 0.5, 0, length=4)
    >>> clients.names, clients.train.inputs.shape
    (('A',), (2, 4))
    """
    pieces = fd.characters([text for _, text in speeches], length)
    speakers = np.array([speaker for speaker, _ in speeches])[pieces.source]
    said = dict(zip(*np.unique(speakers, return_counts=True), strict=True))
    names = [name for name, count in said.items() if count >= min_examples]
    most = max(said.values(), default=0)
    if min_examples < 2 or not names:
        raise ValueError(f"min_examples is {min_examples}; allowed: 2 to {most}, what one speaker says most")
    parts = [np.flatnonzero(speakers == name) for name in names]
    vocab = len(pieces.vocabulary) + 1  # and padding
    train, test = fd.train_test_split(parts, test_fraction, seed)
    if validation:
        train, test = fd.train_test_split(train, test_fraction, seed + 1)
    return Clients(
        train=_federate("training", pieces.inputs, pieces.labels, train),
        test=_federate("test", pieces.inputs, pieces.labels, test),
        labels=np.zeros(len(speakers), np.int32),
        parts=parts,
        classes=("pieces",),
        unit="pieces",
        metrics={"loss": cross_entropy, "accuracy": token_accuracy},
        names=tuple(map(str, names)),
        model=lambda config: language_model(dataclasses.replace(config, vocab=vocab, causal=True)),
    )
