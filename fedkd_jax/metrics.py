"""Metrics: what a model's answers are worth, added up over batches and clients inside the compiled evaluation.

A plain function `(logits, labels, mask) -> []` is a mean over unmasked rows. What is no mean over rows, such as an F-score,
is a `Metric`: counts that add up, and a value of them. Labels below 0 mark places without an answer and count nowhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import ArrayLike

from fedkd_jax.check import check_fn, check_int
from fedkd_jax.losses import check_labels
from fedkd_jax.types import Array, PyTree

Counts = Mapping[str, Any]


class Metric(NamedTuple):
    """A metric of counts that add up over batches and clients.

    `counts(logits [B, ..., C], labels [B, ...], mask [B]) -> PyTree` of arrays runs inside the compiled evaluation; masked
    rows have labels -1. It is a static argument of `jit`: a function made anew at every call is compiled at every call.
    `value(counts) -> array` runs in NumPy, over any leading axes: `[N]` for each client, `[]` for all together.

    >>> said_zero = lambda logits, labels, mask: {"zero": ((logits.argmax(-1) == 0) & mask).sum(), "n": mask.sum()}
    >>> share = Metric(counts=said_zero, value=lambda counts: counts["zero"] / counts["n"])
    >>> float(share.value(share.counts(np.eye(2), np.array([0, 1]), np.array([True, True]))))
    0.5
    """

    counts: Callable[..., PyTree]
    value: Callable[[PyTree], Any]


AnyMetric = Callable[..., Array] | Metric


def accuracy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], mask: Shaped[Array, "*batch"]
) -> Float[Array, ""]:
    """Share of unmasked entries whose largest logit is the label's; labels below 0 do not count; 0 when none is left.

    >>> logits = jnp.array([[0.0, 1.0], [3.0, 2.0], [0.0, 9.0]])
    >>> float(accuracy(logits, jnp.array([1, 1, 1]), jnp.array([True, True, False])))
    0.5
    """
    check_labels(logits, labels)
    mask = jnp.asarray(mask, bool) & (labels >= 0)
    correct = (jnp.argmax(logits, axis=-1) == labels) & mask
    return correct.sum().astype(jnp.float32) / jnp.maximum(mask.sum(), 1)


def as_metric(metric: AnyMetric) -> Metric:
    """A plain function as the `Metric` that it is: the mean of its batches' values, weighted by their unmasked rows.

    >>> share = as_metric(accuracy)
    >>> counts = share.counts(jnp.eye(3), jnp.array([0, 0, -1]), jnp.array([True, True, False]))
    >>> float(counts["sum"]), float(share.value(counts))
    (1.0, 0.5)
    """
    if isinstance(metric, Metric):
        return metric
    check_fn("metric", metric, "(logits, labels, mask) -> [], or a Metric")
    return Metric(_RowMean(metric), _mean)


@dataclasses.dataclass(frozen=True)  # equal where fn is, so that nothing is compiled twice
class _RowMean:
    fn: Callable[..., Array]

    def __call__(self, logits, labels, mask) -> Counts:
        return {"sum": mask.sum() * self.fn(logits, labels, _over(mask, labels)), "n": mask.sum()}


def _over(mask: Array, labels: Array) -> jax.Array:
    """The mask of rows `[B]` over labels `[B, ...]`."""
    return jnp.broadcast_to(jnp.asarray(mask, bool).reshape(-1, *[1] * (labels.ndim - 1)), labels.shape)


def _ratio(total: ArrayLike, n: ArrayLike, undefined: float) -> np.ndarray:
    total, n = np.asarray(total, np.float64), np.asarray(n, np.float64)
    return np.divide(total, n, out=np.full(n.shape, undefined), where=n > 0)


def _mean(counts: Counts) -> np.ndarray:
    return _ratio(counts["sum"], counts["n"], np.nan)


def _token_hits(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], mask: Shaped[Array, "b"]
) -> Counts:
    check_labels(logits, labels)
    counted = _over(mask, labels) & (labels >= 0)
    return {"sum": ((jnp.argmax(logits, axis=-1) == labels) & counted).sum(), "n": counted.sum()}


# Accuracy over positions with a label rather than over rows, so long rows weigh more; NaN where there is no position.
token_accuracy = Metric(_token_hits, _mean)


# ---- F-scores ----------------------------------------------------------------------------------------------------------


def _f_scores(counts: Callable[..., Counts]) -> dict[str, Metric]:
    """From hits, predicted and actual. NaN where there is none of the latter two and so nothing to be right about."""

    def share(hits: int, *of: str) -> Callable[[Counts], np.ndarray]:
        total = lambda c: np.sum([np.asarray(c[name], np.float64) for name in of], axis=0)  # noqa: E731
        some = lambda c: np.asarray(c["predicted"]) + np.asarray(c["actual"]) > 0  # noqa: E731
        return lambda c: np.where(some(c), _ratio(hits * np.asarray(c["hits"]), total(c), 0.0), np.nan)

    return {
        "precision": Metric(counts, share(1, "predicted")),
        "recall": Metric(counts, share(1, "actual")),
        "f1": Metric(counts, share(2, "predicted", "actual")),
    }


def binary_f1(positive: int = 1) -> dict[str, Metric]:
    """Precision, recall and F1 of one class, from logits `[B, C]` and labels `[B]`; 0 where undefined, as in scikit-learn, but
    NaN where the class neither is nor is predicted: such a client has no part in a mean over clients.

    Args:
        positive: the class.

    Returns:
        `{"precision", "recall", "f1"}`, over all examples of all batches.

    Raises:
        ValueError: `positive` below 0, or when used, not in 0..C-1.

    >>> f1 = binary_f1()["f1"]
    >>> counts = f1.counts(jnp.array([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]), jnp.array([1, 0, 0]), jnp.ones(3, bool))
    >>> float(f1.value(counts)).__round__(3)
    0.667
    """
    check_int("positive", positive, 0)
    return _f_scores(_binary_counts(positive))


@functools.cache
def _binary_counts(positive: int) -> Callable[..., Counts]:
    def counts(logits: Float[Array, "b c"], labels: Int[Array, "b"], mask: Shaped[Array, "b"]) -> Counts:
        if not 0 <= positive < logits.shape[-1]:
            raise ValueError(f"positive is {positive}; allowed: 0 to {logits.shape[-1] - 1}, the classes of the logits")
        check_labels(logits, labels)
        counted = _over(mask, labels) & (labels >= 0)
        predicted = (jnp.argmax(logits, axis=-1) == positive) & counted
        actual = (labels == positive) & counted
        return {"hits": (predicted & actual).sum(), "predicted": predicted.sum(), "actual": actual.sum()}

    return counts


def entity_f1(names: Sequence[str]) -> dict[str, Metric]:
    """Precision, recall and F1 over entities, micro-averaged: an entity counts where both its ends and its type are right.

    Entities are read from tags as conlleval and seqeval's default mode do, also from sequences that are not valid IOB2: one
    starts at B-, and at I- after O or after another type. Logits are `[B, L, C]`, labels `[B, L]` with -1 where there is no
    word (further pieces of a word, special tokens, padding); such positions are taken out first, so neighbours are words.

    Args:
        names: the C tags by label, "O", "B-TYPE" and "I-TYPE".

    Returns:
        `{"precision", "recall", "f1"}`, over all entities of all batches; 0 where undefined, as in seqeval, but NaN where there
        is no entity and none is predicted.

    Raises:
        ValueError: another kind of tag, a tag twice; when used, if C is not the number of names.

    >>> f1 = entity_f1(("O", "B-Drug", "I-Drug"))["f1"]
    >>> logits = jnp.eye(3)[jnp.array([[1, 2, 0, 1]])]
    >>> labels = jnp.array([[1, 2, -1, 0]])
    >>> {name: int(n) for name, n in f1.counts(logits, labels, jnp.array([True])).items()}
    {'hits': 1, 'predicted': 2, 'actual': 1}
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for i, name in enumerate(names):
        if (
            not isinstance(name, str)
            or name in names[:i]
            or not (name == "O" or (name[:2] in ("B-", "I-") and name[2:]))
        ):
            raise ValueError(f"names has {name!r}; allowed: 'O', 'B-TYPE' and 'I-TYPE', each once")
    return _f_scores(_entity_counts(names))


@functools.cache
def _entity_counts(names: tuple[str, ...]) -> Callable[..., Counts]:
    types = sorted({name[2:] for name in names if name != "O"})
    type_of = np.array([-1 if name == "O" else types.index(name[2:]) for name in names], np.int32)
    begins = np.array([name.startswith("B-") for name in names])

    def counts(logits: Float[Array, "b l c"], labels: Int[Array, "b l"], mask: Shaped[Array, "b"]) -> Counts:
        if logits.shape[-1] != len(names):
            raise ValueError(f"names has {len(names)} tags; allowed: {logits.shape[-1]}, the classes of the logits")
        check_labels(logits, labels)
        is_word = _over(mask, labels) & (labels >= 0)
        words_first = jnp.argsort(~is_word, axis=1, stable=True)

        def entities(tags):
            """Where entities start, their types, and where they stop, each `[B, L]`."""
            tags = jnp.where(is_word, tags, 0)
            kind = jnp.where(is_word, jnp.asarray(type_of)[tags], -1)
            kind, begin = (jnp.take_along_axis(x, words_first, axis=1) for x in (kind, jnp.asarray(begins)[tags]))
            before = jnp.pad(kind, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            start = (kind >= 0) & (begin | (before != kind))
            length = kind.shape[1]
            # an entity goes on up to the next word that starts another or is none
            stops = jnp.where(start | (kind < 0), jnp.arange(length)[None], length)
            stops = jnp.pad(stops, ((0, 0), (0, 1)), constant_values=length)[:, 1:]
            return start, kind, jax.lax.cummin(stops, axis=1, reverse=True)

        start, kind, stop = entities(jnp.argmax(logits, axis=-1))
        true_start, true_kind, true_stop = entities(labels)
        hits = start & true_start & (kind == true_kind) & (stop == true_stop)
        return {"hits": hits.sum(), "predicted": start.sum(), "actual": true_start.sum()}

    return counts


# ---- ranking -----------------------------------------------------------------------------------------------------------


def ranking() -> dict[str, Metric]:
    """How well scores rank the candidates of an impression, as MIND measures it: each impression by itself, then their mean.

    Scores `logits [B, C]`, labels `[B, C]`: 1 clicked, 0 not clicked, -1 no candidate. AUC is the share of (clicked, not
    clicked) pairs in the right order; MRR the mean of 1 / rank over the clicked; nDCG@k has gains 2^y - 1 and discounts
    log2(rank + 1), divided by the best there could be. Ties count as the mean over their orders (MIND's script takes them as
    they come), so the order of candidates is of no account; a NaN score ranks last. An impression without a click, or with
    nothing else, does not count, as AUC is not defined there.

    Returns:
        `{"auc", "mrr", "ndcg@5", "ndcg@10"}`; NaN where no impression counts.

    >>> logits, labels = jnp.array([[0.1, 0.9, 0.5], [1.0, 2.0, 0.0]]), jnp.array([[0, 1, 0], [1, 0, -1]])
    >>> {name: round(float(m.value(m.counts(logits, labels, jnp.ones(2, bool)))), 3) for name, m in ranking().items()}
    {'auc': 0.5, 'mrr': 0.75, 'ndcg@5': 0.815, 'ndcg@10': 0.815}
    """
    return {name: Metric(_ranking_counts, functools.partial(_impression_mean, name)) for name in _GAINS}


_GAINS: Mapping[str, Callable[[np.ndarray], np.ndarray] | None] = {  # rank -> what a clicked candidate there is worth
    "auc": None,
    "mrr": lambda rank: 1 / rank,
    "ndcg@5": lambda rank: (rank <= 5) / np.log2(rank + 1),
    "ndcg@10": lambda rank: (rank <= 10) / np.log2(rank + 1),
}


def _impression_mean(name: str, counts: Counts) -> np.ndarray:
    return _ratio(counts[name], counts["impressions"], np.nan)


def _ranking_counts(logits: Float[Array, "b c"], labels: Int[Array, "b c"], mask: Shaped[Array, "b"]) -> Counts:
    if jnp.shape(logits) != jnp.shape(labels) or jnp.ndim(labels) != 2:
        raise ValueError(
            f"labels has shape {jnp.shape(labels)}; allowed: [B, C], that of the logits, {jnp.shape(logits)}"
        )
    candidate, clicked = labels >= 0, labels > 0
    total, clicks = candidate.sum(axis=1), clicked.sum(axis=1)
    counted = jnp.asarray(mask, bool) & (clicks > 0) & (clicks < total)
    scores = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    mine, other = scores[:, :, None], scores[:, None, :]
    # a candidate has one of the ranks above + 1 ... above + tied
    above = ((other > mine) & candidate[:, None, :]).sum(axis=2)
    tied = jnp.maximum(((other == mine) & candidate[:, None, :]).sum(axis=2), 1)

    def mean(per_impression):
        return jnp.where(counted, per_impression, 0.0).sum()

    below = total[:, None] - above - (tied + 1) / 2  # all of them, ties half
    pairs = jnp.maximum(clicks * (total - clicks), 1)
    auc = (jnp.where(clicked, below, 0.0).sum(axis=1) - clicks * (clicks - 1) / 2) / pairs
    out = {"auc": mean(auc), "impressions": counted.sum()}
    for name, gain in _GAINS.items():
        if gain is not None:
            worth = jnp.asarray(np.cumsum([0.0, *gain(np.arange(1, labels.shape[1] + 1))]), jnp.float32)
            got = jnp.where(clicked, (worth[above + tied] - worth[above]) / tied, 0.0).sum(axis=1)
            best = jnp.maximum(clicks, 1) if name == "mrr" else worth[jnp.maximum(clicks, 1)]
            out[name] = mean(got / best)
    return out


# ---- over clients ------------------------------------------------------------------------------------------------------


def client_mean(values: Float[np.ndarray, "n"], counts: Int[Array, "n"]) -> float:
    """Mean over clients that have test examples and a value (NaN is none), each client alike.

    >>> client_mean(np.array([0.5, 1.0, np.nan]), np.array([3, 1, 0]))
    0.75
    """
    values = np.asarray(values)
    has = (np.asarray(counts) > 0) & ~np.isnan(values)
    return float(np.mean(values[has])) if has.any() else float("nan")
