"""Laws of `fedkd_jax.metrics`: what the field's own libraries say, however examples are batched, masked and padded."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import ndcg_score, precision_recall_fscore_support, roc_auc_score

from fedkd_jax import accuracy
from fedkd_jax.metrics import Metric, as_metric, binary_f1, client_mean, entity_f1, ranking, token_accuracy

TAGS = ("O", "B-Drug", "I-Drug", "B-ADR", "I-ADR")
ROWS, LENGTH, CANDIDATES = 4, 8, 12


@functools.cache
def compiled(counts):
    return jax.jit(counts)


def values(metrics: dict[str, Metric], logits, labels, mask=None) -> dict[str, float]:
    mask = np.ones(len(labels), bool) if mask is None else mask
    return {
        name: float(m.value(jax.device_get(compiled(m.counts)(logits, labels, mask)))) for name, m in metrics.items()
    }


def integers(shape, low, high):
    return hnp.arrays(np.int32, shape, elements=st.integers(low, high))


class Accuracy(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @given(strategies.floats((4, 3)), strategies.labels(4, 3), strategies.masks(4), strategies.masks(4))
    def test_is_the_share_of_hits_where_there_is_an_answer_and_no_mask(self, logits, labels, mask, answered):
        kept = mask & answered
        value = self.variant(accuracy)(logits, np.where(answered, labels, -1).astype(np.int32), mask)
        hits = [z.argmax() == y for z, y, m in zip(logits, labels, kept, strict=True) if m]
        np.testing.assert_allclose(value, np.mean(hits) if hits else 0.0, rtol=1e-6)
        hidden = np.where(kept[:, None], logits, np.nan).astype(np.float32)
        assert self.variant(accuracy)(hidden, np.where(mask & answered, labels, -9).astype(np.int32), mask) == value


# ---- F-scores ----------------------------------------------------------------------------------------------------------


@given(strategies.floats((10, 3)), integers(10, -1, 2), st.integers(0, 2))
def test_binary_f1_is_scikit_learns(logits, labels, positive):
    answered = labels >= 0
    options = dict(labels=[0, 1, 2], zero_division=0)
    expected = precision_recall_fscore_support(labels[answered], logits.argmax(-1)[answered], **options)
    found = values(binary_f1(positive), logits, labels)
    assert list(found) == ["precision", "recall", "f1"]
    if expected[3][positive] or (logits.argmax(1)[labels >= 0] == positive).any():
        np.testing.assert_allclose(list(found.values()), [of_class[positive] for of_class in expected[:3]])
    else:  # scikit-learn's 0 would count against a client who has nothing to find and finds nothing
        assert np.isnan(list(found.values())).all()


@given(integers((ROWS, LENGTH), 0, 4), integers((ROWS, LENGTH), -1, 4))
def test_entity_f1_is_seqevals_for_any_tags(predicted, labels):
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval is not installed")
    guess, truth = (
        [[TAGS[tag] for tag in row[kept]] for row, kept in zip(tags, labels >= 0, strict=True)]
        for tags in (predicted, labels)
    )
    expected = seqeval.precision_recall_fscore_support(truth, guess, average="micro", zero_division=0)
    found = values(entity_f1(TAGS), np.eye(5, dtype=np.float32)[predicted], labels)
    if any(tag != "O" for tags in (*guess, *truth) for tag in tags):
        np.testing.assert_allclose(list(found.values()), expected[:3])
    else:
        assert np.isnan(list(found.values())).all()


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=LENGTH - 1),
    st.permutations(range(LENGTH)),
    strategies.seeds,
)
def test_positions_without_a_word_change_nothing(words, order, seed):
    """Between words, at either end, whatever the logits say there."""
    found = []
    for where in (range(len(words)), sorted(order[: len(words)])):
        logits = np.random.default_rng(seed).normal(size=(ROWS, LENGTH, 5)).astype(np.float32)
        labels = np.full((ROWS, LENGTH), -1, np.int32)
        for i, (guess, truth) in zip(where, words, strict=True):
            logits[1, i], labels[1, i] = np.eye(5)[guess], truth
        counts = entity_f1(TAGS)["f1"].counts
        found.append(compiled(counts)(logits, labels, np.ones(ROWS, bool)))
    chex.assert_trees_all_equal(*found)
    assert found[0]["actual"] >= len({truth for _, truth in words if TAGS[truth].startswith("B")})


@pytest.mark.parametrize("names", [("O", "E-Drug"), ("O", "B-"), ("O", "B-Drug", "O"), ("O", "Drug")])
def test_other_tags_are_refused(names):
    with pytest.raises(ValueError, match=r"names has .*allowed"):
        entity_f1(names)


def test_classes_that_do_not_fit_the_logits_are_refused():
    logits, mask = np.zeros((2, 3), np.float32), np.ones(2, bool)
    with pytest.raises(ValueError, match=r"positive is 3; allowed: 0 to 2"):
        binary_f1(3)["f1"].counts(logits, np.zeros(2, np.int32), mask)
    with pytest.raises(ValueError, match=r"names has 5 tags; allowed: 3"):
        entity_f1(TAGS)["f1"].counts(logits[:, None], np.zeros((2, 1), np.int32), mask)


# ---- ranking -----------------------------------------------------------------------------------------------------------


def scores(shape):
    """Few different ones, so that many tie."""
    return integers(shape, 0, 3).map(lambda x: np.float32(x))


def counted(labels):
    return [i for i, row in enumerate(labels) if {0, 1} <= set(row)]


@given(scores((ROWS, CANDIDATES)), integers((ROWS, CANDIDATES), -1, 1))
def test_ranking_is_scikit_learns(logits, labels):
    """Also with ties: `ndcg_score` averages over their orders, too."""
    found, rows = values(ranking(), logits, labels), counted(labels)
    if not rows:
        assert np.isnan(list(found.values())).all()
        return
    kept = [(labels[i][labels[i] >= 0], logits[i][labels[i] >= 0]) for i in rows]
    for name, score in (
        ("auc", roc_auc_score),
        ("ndcg@5", lambda y, z: ndcg_score([y], [z], k=5)),
        ("ndcg@10", lambda y, z: ndcg_score([y], [z], k=10)),
    ):
        np.testing.assert_allclose(found[name], np.mean([score(y, z) for y, z in kept]), atol=1e-5)


def mind(ranked):
    """MIND's measures of clicks in the order of their ranks, one formula after the other."""
    ranked, rank = np.asarray(ranked), np.arange(1, len(ranked) + 1)
    clicked, other = rank[ranked == 1], rank[ranked == 0]
    out = {"auc": np.mean([a < b for a in clicked for b in other]), "mrr": np.sum(ranked / rank) / np.sum(ranked)}
    for k in (5, 10):
        gain = lambda y, k=k: np.sum((2.0 ** y[:k] - 1) / np.log2(rank[:k] + 1))  # noqa: E731
        out[f"ndcg@{k}"] = gain(ranked) / gain(np.sort(ranked)[::-1])
    return out


@given(scores((ROWS, 6)), integers((ROWS, 6), -1, 1))
def test_ranking_is_the_mean_over_all_orders_of_ties(logits, labels):
    found, rows = values(ranking(), logits, labels), []
    for i in counted(labels):
        y, z = labels[i][labels[i] >= 0], logits[i][labels[i] >= 0]
        orders = [list(o) for o in itertools.permutations(range(len(y))) if (np.diff(z[list(o)]) <= 0).all()]
        rows.append({name: np.mean([mind(y[o])[name] for o in orders]) for name in found})
    for name, value in found.items():
        np.testing.assert_allclose(value, np.mean([row[name] for row in rows]) if rows else np.nan, atol=1e-5)


def test_nan_scores_rank_last():
    labels, mask = np.array([[0, 1, 0]], np.int32), np.ones(1, bool)
    found = values(ranking(), np.array([[-5.0, np.nan, 1.0]], np.float32), labels, mask)
    assert found["auc"] == 0
    assert found["mrr"] == pytest.approx(1 / 3)


# ---- all of them -------------------------------------------------------------------------------------------------------

METRICS = {
    "accuracy": (as_metric(accuracy), (ROWS,), 3),
    "token_accuracy": (token_accuracy, (ROWS, LENGTH), 3),
    **{f"binary {name}": (metric, (ROWS,), 3) for name, metric in binary_f1().items()},
    **{f"entity {name}": (metric, (ROWS, LENGTH), 5) for name, metric in entity_f1(TAGS).items()},
    **{name: (metric, (ROWS, CANDIDATES), None) for name, metric in ranking().items()},
}


@pytest.mark.parametrize("name", METRICS)
@given(strategies.seeds, strategies.masks(ROWS))
def test_counts_of_two_parts_add_up_and_values_go_client_by_client(name, seed, mask):
    """What is masked may be NaN and have any label: it belongs to the other part."""
    metric, shape, classes = METRICS[name]
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape if classes is None else (*shape, classes)).astype(np.float32)
    labels = rng.integers(-1 if len(shape) > 1 else 0, classes or 2, shape).astype(np.int32)
    counts, parts = compiled(metric.counts), []
    for part in (mask, ~mask):
        of_row = part.reshape(-1, *[1] * (logits.ndim - 1))
        hidden = np.where(part.reshape(-1, *[1] * (labels.ndim - 1)), labels, -1).astype(np.int32)
        parts.append(counts(np.where(of_row, logits, np.nan).astype(np.float32), hidden, part))
        chex.assert_trees_all_close(parts[-1], counts(logits, labels, part), rtol=1e-6)
    whole = counts(logits, labels, np.ones(ROWS, bool))
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5)
    parts, whole = jax.device_get((parts, whole))
    stacked = metric.value(jax.tree.map(lambda *x: np.stack(x), *parts, whole))
    np.testing.assert_array_equal(stacked, [metric.value(c) for c in (*parts, whole)])
    assert stacked.shape == (3,)


@pytest.mark.parametrize(
    "make", [binary_f1, lambda: entity_f1(list(TAGS)), ranking, lambda: {"a": as_metric(accuracy)}]
)
def test_what_is_compiled_is_equal_when_made_anew(make):
    first, second = ([metric.counts for metric in make().values()] for _ in range(2))
    assert first == second
    assert len(set(first + second)) == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.booleans()), min_size=1, max_size=6))
def test_mean_over_clients_that_have_examples_and_a_value(rows):
    values, counts = np.array([v if has else np.nan for v, _, has in rows]), np.array([c for _, c, _ in rows])
    seen = [v for v, c, has in rows if c and has]
    np.testing.assert_allclose(client_mean(values, counts), np.mean(seen) if seen else np.nan)
