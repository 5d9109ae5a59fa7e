"""Figures show the numbers they are given: bars and intervals, the front, heat maps, boxes and spectra."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax import figures, identity_codec, spectrum_codec, svd_codec
from fedkd_jax.codecs import cumulative_energy
from fedkd_jax.report import half_width

scores = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@settings(max_examples=30)
@given(strategies.seeds, st.integers(1, 4))
def test_bars_are_means_and_whiskers_their_intervals(seed, seeds):
    values = np.random.default_rng(seed).normal(70, 3, (2, 3, seeds))
    groups = {f"g{i}": {f"b{j}": values[i, j] for j in range(3) if (i, j) != (1, 2)} for i in range(2)}
    (axis,) = figures.bars_plot(groups).axes
    drawn = [values[i, j] for i in range(2) for j in range(3) if (i, j) != (1, 2)]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], np.mean(drawn, axis=1))
    tops = [bar.get_y() for bar in axis.patches]
    assert tops == sorted(tops) and len(set(tops)) == len(tops)  # one under the other
    segments = [c.get_segments()[0] for c in axis.collections]
    for own, ((left, _), (right, _)) in zip(drawn, segments, strict=True):
        half = scipy.stats.sem(own) * scipy.stats.t.ppf(0.975, seeds - 1) if seeds > 1 else 0.0
        np.testing.assert_allclose((left, right), (own.mean() - half, own.mean() + half))
    low, high = axis.get_xlim()
    assert low < min(left for (left, _), _ in segments) and max(right for _, (right, _) in segments) < high


@given(st.lists(st.tuples(*2 * [st.integers(0, 5).map(float)]), min_size=1, max_size=8))
def test_the_front_is_what_no_other_beats(points):
    beaten = lambda p: any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)  # noqa: E731
    assert figures._front(points) == sorted({p for p in points if not beaten(p)})


def test_the_heat_map_and_the_boxes_hold_their_numbers():
    cells = {(0.9, 0.9): (95.0, 1.0), (0.9, 0.98): (96.0, 2.0), (0.95, 0.98): (97.0, 3.0)}
    axis = figures.threshold_plot(cells).axes[0]
    grid = axis.images[0].get_array()
    np.testing.assert_array_equal(grid.filled(np.nan), [[95.0, 96.0], [np.nan, 97.0]])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.9", "0.98"]
    clients = [[0.1, 0.2, 0.3, None], [0.3, 0.4, 0.5, 0.9]]
    axis = figures.clients_plot({"FedKD": clients}).axes[0]
    medians = [line.get_xdata()[0] for line in axis.lines if line.get_color() == "black" and len(line.get_xdata()) == 2]
    assert any(np.isclose(x, 30.0) for x in medians)  # the last client has no value with a seed


@settings(max_examples=5)
@given(scores, scores)
def test_a_comparison_has_the_figures_that_its_numbers_allow(own, other):
    few = min(len(own), len(other))
    record = lambda s, sent: {  # noqa: E731
        "round": 1,
        "t/f1": s,
        "bytes_per_client": sent,
        "t/f1_of_client": [s, 1 - s],
    }
    runs = {"a": [[record(s, 0)] for s in own[:few]], "b": [[record(s, 1e6)] for s in other[:few]]}
    assert list(figures.comparison_figures(runs, metric="f1")) == ["f1", "bars", "pareto", "spread"]
    named = figures.comparison_figures(
        runs, metric="f1", clients=["x", "y"], thresholds={"a": (0.9, 0.9), "b": (0.9, 1.0)}
    )
    assert list(named) == ["f1", "bars", "pareto", "client-bars", "thresholds"]
    for figure, caption in named.values():
        assert caption and figure.axes
    silent = {"a": runs["a"]}
    assert "pareto" not in figures.comparison_figures(silent, metric="f1")


def test_an_interval_of_one_value_is_unknown():
    assert np.isnan(half_width([3.0]))


CODECS = {"identity": identity_codec(), "svd": svd_codec(0.9)}


@functools.cache
def jitted(name, plain=False):
    return jax.jit((CODECS[name] if plain else spectrum_codec(CODECS[name])).encode)


@settings(max_examples=10)
@given(strategies.seeds, st.sampled_from(["identity", "svd"]))
def test_looking_at_a_message_changes_nothing_and_sees_all_of_it(seed, name):
    rng = np.random.default_rng(seed)
    update = {"w": rng.normal(size=(9, 4)), "layer": {"b": rng.normal(size=4)}, "zero": np.zeros((4, 9))}
    update = jax.tree.map(lambda x: x.astype(np.float32), update)
    codec, key = spectrum_codec(CODECS[name]), jax.random.key(seed)
    payload, state = jitted(name)(update, 0, key, codec.init(update))
    plain = jitted(name, plain=True)(update, 0, key)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), payload, plain))
    assert jax.tree.structure(state) == jax.tree.structure(codec.init(update))
    assert set(state["spectrum"]) == {"w", "zero"}
    np.testing.assert_allclose(state["spectrum"]["w"][0], np.linalg.svd(update["w"])[1], rtol=1e-4, atol=1e-5)
    energy = cumulative_energy(state["spectrum"]["w"])
    assert (np.diff(energy) >= 0).all() and np.isclose(energy[..., -1], 1.0).all()
    np.testing.assert_allclose(energy[0, 0], np.linalg.norm(update["w"], 2) ** 2 / (update["w"] ** 2).sum(), rtol=1e-4)
    assert np.isnan(cumulative_energy(state["spectrum"]["zero"])).all()


@pytest.mark.parametrize("rounds", [(1,), (1, 5)])
def test_spectra_are_drawn_from_first_to_last_round(rounds):
    energy = {"query": {r: np.array([0.8, 0.9, 1.0]) for r in rounds}, "up": {r: np.array([0.5, 1.0]) for r in rounds}}
    needed = {kind: {r: [0.5, 0.25] for r in rounds} for kind in energy}
    left, right = figures.spectrum_plot(energy, needed).axes
    curves = [line.get_ydata() for line in left.lines if len(line.get_ydata()) > 2]
    assert all((curve == energy["query"][1]).all() for curve in curves)
    np.testing.assert_allclose([line.get_ydata() for line in right.lines], 37.5)
