"""Laws of `fedkd_jax.evaluate` and `fedkd_jax.metrics`: means over each client's own examples, however they are batched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import reference
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import one

from fedkd_jax import Layout, State, accuracy, client_mesh, evaluate
from fedkd_jax.metrics import client_mean, example_mean

KEY = jax.random.key(17)
COUNTS = (7, 0, 6, 1, 5)


@functools.cache
def trained(layout=None):
    algorithm = strategies.small_fedkd(layout)
    ids = np.arange(5)
    return algorithm, State(server=algorithm.init_server(KEY), clients=algorithm.init_clients(KEY, ids))


def expected(state, data):
    """Accuracy and loss of teachers and student, client by client, in NumPy."""
    out = {model: {"accuracy": [], "loss": []} for model in ("teacher", "student")}
    for i, (start, count) in enumerate(zip(data.start, data.count, strict=True)):
        x, y = np.float64(data.inputs[start : start + count]), data.labels[start : start + count]
        for model, params in (("teacher", one(state.clients.teacher, i)), ("student", state.server.params)):
            logits, _ = reference.forward(reference.to64(params), x)
            out[model]["accuracy"].append(np.mean(logits.argmax(-1) == y) if count else np.nan)
            out[model]["loss"].append(reference.ce(logits, y, np.ones(count, bool)) if count else np.nan)
    return jax.tree.map(np.float32, out, is_leaf=lambda x: isinstance(x, list))


@settings(max_examples=10)
@given(strategies.seeds, st.sampled_from([1, 3, 256]))
def test_metrics_equal_numpy_whatever_the_batch(seed, batch):
    """Strangers' rows are NaN, so reading one would show."""
    (algorithm, state), data = trained(), strategies.small_data(seed, COUNTS)
    result = evaluate(algorithm, state, data, batch=batch)
    chex.assert_trees_all_close(result, expected(state, data), rtol=1e-4, atol=1e-5)
    chex.assert_shape(jax.tree.leaves(result), (5,))


def test_eight_devices_equal_one(eight_devices):
    data = strategies.small_data(1, COUNTS)
    algorithm, state = trained(Layout(mesh=client_mesh(8)))
    chex.assert_trees_all_close(evaluate(algorithm, state, data), expected(state, data), rtol=1e-4, atol=1e-5)


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


class Metrics(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @given(strategies.floats((4, 3)), strategies.labels(4, 3), strategies.masks(4))
    def test_accuracy_is_the_share_of_unmasked_hits(self, logits, labels, mask):
        value = self.variant(accuracy)(logits, labels, mask)
        hits = [z.argmax() == y for z, y, m in zip(logits, labels, mask, strict=True) if m]
        np.testing.assert_allclose(value, np.mean(hits) if hits else 0.0, rtol=1e-6)
        hidden = np.where(mask[:, None], logits, np.nan).astype(np.float32)
        assert self.variant(accuracy)(hidden, np.where(mask, labels, -9).astype(np.int32), mask) == value


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=1, max_size=6))
def test_means_over_clients_and_over_examples(rows):
    values, counts = np.array([v for v, _ in rows]), np.array([c for _, c in rows])
    seen = [v for v, c in rows if c]
    values[counts == 0] = np.nan
    if not seen:
        assert np.isnan(client_mean(values, counts))
        assert np.isnan(example_mean(values, counts))
        return
    np.testing.assert_allclose(client_mean(values, counts), np.mean(seen))
    np.testing.assert_allclose(example_mean(values, counts), sum(v * c for v, c in rows) / counts.sum(), atol=1e-12)
