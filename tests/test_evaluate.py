"""Laws of `fedkd_jax.evaluate`: metrics of each client's own examples and of all together, however they are batched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support
from strategies import one

from fedkd_jax import FederatedData, Layout, Outputs, State, client_mesh, evaluate
from fedkd_jax.metrics import Metric, binary_f1, ranking, token_accuracy

KEY = jax.random.key(17)
COUNTS = (7, 0, 6, 1, 5)


@functools.cache
def trained(layout=None):
    algorithm = strategies.small_fedkd(layout)
    ids = np.arange(5)
    return algorithm, State(server=algorithm.init_server(KEY), clients=algorithm.init_clients(KEY, ids))


def clients_logits(state, data):
    """Of each model, each client's logits and labels, in NumPy."""
    out = {"teacher": [], "student": []}
    for i, (start, count) in enumerate(zip(data.start, data.count, strict=True)):
        x, y = np.float64(data.inputs[start : start + count]), data.labels[start : start + count]
        for model, params in (("teacher", one(state.clients.teacher, i)), ("student", state.server.params)):
            out[model].append((reference.forward(reference.to64(params), x)[0], y))
    return out


def expected(state, data):
    """Accuracy and loss of teachers and student, client by client and pooled."""
    out = {"pooled": {}}
    for model, clients in clients_logits(state, data).items():
        accuracy = [np.mean(z.argmax(-1) == y) if len(y) else np.nan for z, y in clients]
        loss = [reference.ce(z, y, np.ones(len(y), bool)) if len(y) else np.nan for z, y in clients]
        out[model] = {"accuracy": np.float32(accuracy), "loss": np.float32(loss)}
        z, y = (np.concatenate(x) for x in zip(*clients, strict=True))
        out["pooled"][model] = {
            "accuracy": float(np.mean(z.argmax(-1) == y)),
            "loss": float(reference.ce(z, y, np.ones(len(y), bool))),
        }
    return out


@settings(max_examples=10)
@given(strategies.seeds, st.sampled_from([1, 3, 256]))
def test_metrics_equal_numpy_whatever_the_batch(seed, batch):
    """Strangers' rows are NaN, so reading one would show."""
    (algorithm, state), data = trained(), strategies.small_data(seed, COUNTS)
    result = evaluate(algorithm, state, data, batch=batch)
    chex.assert_trees_all_close(result, expected(state, data), rtol=1e-4, atol=1e-5)
    chex.assert_shape(jax.tree.leaves([result["teacher"], result["student"]]), (5,))


@settings(max_examples=10)
@given(strategies.seeds, st.sampled_from([3, 256]))
def test_pooled_f1_is_of_all_predictions_and_no_mean(seed, batch):
    (algorithm, state), data = trained(), strategies.small_data(seed, COUNTS)
    result = evaluate(algorithm, state, data, metrics=binary_f1(2), batch=batch)
    for model, clients in clients_logits(state, data).items():
        everybody = tuple(np.concatenate(x) for x in zip(*clients, strict=True))
        for i, (z, y) in enumerate([*clients, everybody]):
            found = [
                result[model][n][i] if i < 5 else result["pooled"][model][n] for n in ("precision", "recall", "f1")
            ]
            options = dict(labels=[0, 1, 2], zero_division=0)
            some = len(y) and (np.concatenate([y, z.argmax(-1)]) == 2).any()
            of_class = precision_recall_fscore_support(y, z.argmax(-1), **options) if some else np.full((3, 3), np.nan)
            np.testing.assert_allclose(found, [of[2] for of in of_class[:3]], rtol=1e-6)


def test_eight_devices_equal_one(eight_devices):
    data = strategies.small_data(1, COUNTS)
    algorithm, state = trained(Layout(mesh=client_mesh(8)))
    chex.assert_trees_all_close(evaluate(algorithm, state, data), expected(state, data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 256])
def test_inputs_may_be_a_tree_and_labels_a_table(batch):
    """Answers for each token, and scores of candidates, of a model whose logits are its inputs."""
    rng, (algorithm, state) = np.random.default_rng(3), trained()
    flat = strategies.small_data(3, COUNTS)
    n = len(flat.labels)
    inputs = {"scores": rng.normal(size=(n, 6)).astype(np.float32), "sign": rng.choice([-1, 1], n).astype(np.float32)}
    own = np.concatenate([np.arange(s, s + c) for s, c in zip(flat.start, flat.count, strict=True)])

    def outputs(server, client, x):
        return Outputs(x["scores"] * x["sign"][:, None])

    def token_outputs(server, client, x):
        return Outputs(outputs(server, client, x).logits.reshape(-1, 2, 3))

    def with_labels(labels):
        fields = dict(start=flat.start, count=flat.count, max_count=flat.max_count)
        return FederatedData(inputs=inputs, labels=labels.astype(np.int32), **fields)

    logits = inputs["scores"] * inputs["sign"][:, None]
    tokens = rng.integers(-1, 3, (n, 2))
    result = evaluate(
        algorithm._replace(predict={"m": token_outputs}),
        state,
        with_labels(tokens),
        metrics={"a": token_accuracy},
        batch=batch,
    )
    hits = (logits.reshape(-1, 2, 3).argmax(-1) == tokens)[own]
    assert result["pooled"]["m"]["a"] == pytest.approx(hits.sum() / (tokens[own] >= 0).sum())

    clicks = np.where(np.arange(6) == rng.integers(0, 5, (n, 1)), 1, 0)
    clicks[:, 5] = rng.choice([-1, 0], n)
    measured = algorithm._replace(predict={"m": outputs})
    result = evaluate(measured, state, with_labels(clicks), metrics=ranking(), batch=batch)
    rank = np.array([1 + (z > z[y == 1])[y >= 0].sum() for z, y in zip(logits, clicks, strict=True)])
    of_client = [np.mean(1 / rank[s : s + c]) if c else np.nan for s, c in zip(flat.start, flat.count, strict=True)]
    np.testing.assert_allclose(result["m"]["mrr"], of_client, rtol=1e-5)
    assert result["pooled"]["m"]["mrr"] == pytest.approx(np.mean(1 / rank[own]), rel=1e-5)


def test_metrics_made_anew_are_not_compiled_anew():
    (algorithm, state), data, traces = trained(), strategies.small_data(2, COUNTS), []

    def student(server, client, inputs):
        traces.append(1)
        return algorithm.predict["student"](server, client, inputs)

    watched = algorithm._replace(predict={"student": student})
    first = evaluate(watched, state, data, metrics=binary_f1())
    seen = len(traces)
    second = evaluate(watched, state, data, metrics=binary_f1())
    assert len(traces) == seen > 0
    chex.assert_trees_all_equal(first, second)
    evaluate(watched, state, data, metrics=binary_f1(2))
    assert len(traces) > seen


def test_a_metric_of_ones_own_may_divide_by_zero_where_nobody_is():
    (algorithm, state), data = trained(), strategies.small_data(2, COUNTS)
    zeros = lambda logits, labels, mask: {"zeros": (labels == 0).sum(), "n": mask.sum()}  # noqa: E731
    result = evaluate(algorithm, state, data, metrics={"zeros": Metric(zeros, lambda c: c["zeros"] / c["n"])}, batch=4)
    clients = [data.labels[s : s + c] == 0 for s, c in zip(data.start, data.count, strict=True)]
    np.testing.assert_allclose(result["teacher"]["zeros"], [y.mean() if len(y) else np.nan for y in clients], rtol=1e-6)
    assert result["pooled"]["teacher"]["zeros"] == np.concatenate(clients).mean()


@pytest.mark.parametrize("name", ["round", "pooled"])
def test_models_may_not_be_called_as_the_other_entries(name):
    algorithm, state = trained()
    with pytest.raises(ValueError, match=f"{name}.*allowed"):
        evaluate(algorithm._replace(predict={name: algorithm.predict["student"]}), state, strategies.small_data())


def test_own_metrics_are_taken():
    algorithm, state = trained()
    share = lambda logits, labels, mask: ((labels == 0) & mask).sum() / jnp.maximum(mask.sum(), 1)  # noqa: E731
    data = strategies.small_data(2, COUNTS)
    result = evaluate(algorithm, state, data, metrics={"zeros": share}, batch=4)["student"]
    counts = [
        np.mean(data.labels[s : s + c] == 0) if c else np.nan for s, c in zip(data.start, data.count, strict=True)
    ]
    assert set(result) == {"zeros"}
    np.testing.assert_allclose(result["zeros"], counts, rtol=1e-5)
