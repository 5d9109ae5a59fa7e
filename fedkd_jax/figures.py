"""The paper's figures, of a comparison or of spectra: a column wide, readable in grey. Nothing here uses pyplot's state."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from fedkd_jax import plots
from fedkd_jax.plots import plain
from fedkd_jax.report import Record, final_scores, half_width, row_labels

COLUMN = 3.5  # inches, 89 mm
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oo", "--")

Path = str | os.PathLike


def _figure(width: float, height: float, path: Path | None, draw) -> Figure:
    """A figure of small print, drawn by `draw(figure)` and saved."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for axis in figure.axes:
        axis.set_title(plain(axis.get_title(), 40))
        axis.tick_params(labelsize=7)
        for text in (axis.xaxis.label, axis.yaxis.label, axis.title):
            text.set_fontsize(8)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _grey(index: int, of: int) -> tuple[float, float, float, float]:
    """One of several colours whose lightness alone tells them apart."""
    return colormaps["cividis"](0.15 + 0.75 * index / max(of - 1, 1))


def comparison_figures(
    runs: Mapping[str, Sequence[Sequence[Record]]],
    *,
    metric: str,
    split: str = "test",
    title: str = "",
    clients: Sequence[str] | None = None,
    thresholds: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, tuple[Figure, str]]:
    """All figures that a comparison has, by file name, with their captions.

    Args:
        runs: as in `report.table_rows`.
        metric: which metric.
        split: of which examples.
        title: of the figures.
        clients: names of the clients, where they are few.
        thresholds: `{method: (t_start, t_end)}` of methods that differ in nothing else.

    >>> def run(score, sent): return [[{"round": 1, "model/f1": score, "bytes_per_client": sent}]]
    >>> list(comparison_figures({"FedAvg": run(0.6, 2e6), "FedKD": run(0.6, 1e6)}, metric="f1"))
    ['f1', 'bars', 'pareto']
    """
    scores, what = final_scores(runs, metric), f"{split} {metric}"
    label = f"{what} [%]"
    seeds = max(map(len, runs.values()))
    over = f"mean over {seeds} seeds with its 95 % interval" if seeds > 1 else "one seed"
    models: dict[str, dict[str, np.ndarray]] = {}
    for (method, model), values in scores.items():
        models.setdefault(method, {})[model] = values
    curves = plots.accuracy_plot(runs, metric=metric, split=split, title=title)
    bands = "; bands are one standard deviation over seeds" if seeds > 1 else ""
    bars = bars_plot(models, label=label, title=title)
    figures = {
        metric: (curves, f"{what} against rounds and against traffic{bands}"),
        "bars": (bars, f"{what} at the end, {over}; the axis does not begin at 0"),
    }
    if any(run[-1]["bytes_per_client"] > 0 for seeds in runs.values() for run in seeds):
        caption = f"{what} against traffic, {over}; the line is the front: no method has more for less"
        figures["pareto"] = (pareto_plot(runs, metric=metric, title=title), caption)
    of_client: dict[tuple[str, str], list[Any]] = {
        row: [run[-1].get(f"{row[1]}/{metric}_of_client") for run in runs[row[0]]] for row in scores
    }
    told = {label: of_client[row] for row, label in row_labels(scores).items() if None not in of_client[row]}
    if told:
        if clients is not None:
            groups = {
                name: {row: _percent(seeds)[:, i] for row, seeds in told.items()} for i, name in enumerate(clients)
            }
            caption = f"{what} of each client at the end, {over}; the axis does not begin at 0"
            figures["client-bars"] = (bars_plot(groups, label=label, title=title), caption)
        else:
            caption = (
                f"how {metric} is spread over clients at the end: quartiles, median (line) and mean (diamond), whiskers to the "
                "5th and 95th percentile; of each client the mean over seeds"
            )
            figures["spread"] = (clients_plot(told, label=f"{metric} of each client [%]", title=title), caption)
    if thresholds:
        model = max(model for method, model in scores if method in thresholds)  # the teacher, if there is one
        cells = {
            pair: (scores[method, model].mean(), np.mean([run[-1]["bytes_per_client"] for run in runs[method]]) / 1e6)
            for method, pair in thresholds.items()
        }
        caption = f"{what} of the {model} and megabytes a client, for the T of the first and the last round"
        figures["thresholds"] = (threshold_plot(cells, label=label, title=title), caption)
    return figures


def _percent(seeds: Sequence[Sequence[float | None]]) -> np.ndarray:
    """`[S, N]`, NaN where a client has no value."""
    return 100 * np.array(seeds, np.float64)


def bars_plot(
    values: Mapping[str, Mapping[str, Any]], path: Path | None = None, *, label: str = "", title: str = ""
) -> Figure:
    """Groups of bars, each the mean over seeds with its 95 % interval, as the paper's Figs. 1 to 3.

    The axis begins near the lowest value, not at 0. A bar that is not finite is left out.

    Args:
        values: `{group: {bar: one number a seed}}`, such as methods by client, or models by method.
        path: where to save it, if anywhere.
        label: of the axis.
        title: of the figure.

    >>> figure = bars_plot({"ADE": {"FedAvg": [70.0, 71.0], "FedKD": [72.0]}, "CADEC": {"FedKD": [61.0]}}, label="F [%]")
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['ADE', 'CADEC']
    """
    names = list(dict.fromkeys(name for bars in values.values() for name in bars))
    alone = len(names) == 1

    def draw(figure):
        axis = figure.add_subplot()
        y, ticks, ends, handles = 0.0, [], [], {}
        for bars in values.values():
            shown = [name for name in names if name in bars]
            ticks.append(y + (len(shown) - 1) / 2)
            for name in shown:
                i, mean, half = names.index(name), np.mean(bars[name]), half_width(bars[name])
                if np.isfinite(mean):
                    style = dict(color=_grey(i, len(names)), edgecolor="black", linewidth=0.4, hatch=HATCHES[i % 8])
                    handles[plain(name)] = axis.barh(y, mean, height=0.9, **style)
                    half = half if np.isfinite(half) else 0.0
                    axis.errorbar(mean, y, xerr=half, color="black", capsize=2, linewidth=0.8)
                    axis.annotate(
                        f"{mean:.1f}",
                        (mean + half, y),
                        xytext=(3, 0),
                        textcoords="offset points",
                        fontsize=6,
                        va="center",
                    )
                    ends += [mean - half, mean + half]
                y += 1
            y += 0.6
        low, high = min(ends, default=0.0), max(ends, default=1.0)
        room = max(high - low, 1.0)
        axis.set_xlim(low - 0.25 * room, high + 0.2 * room)
        axis.set_yticks(ticks, [plain(name) for name in values])
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        if title:
            axis.set_title(title)
        if not alone:
            figure.legend(handles.values(), handles, fontsize=7, loc="outside lower center", ncols=min(len(names), 3))

    count = sum(map(len, values.values())) + 0.6 * len(values)
    return _figure(COLUMN, 0.9 + 0.15 * count + (0 if alone else 0.12 * -(-len(names) // 3)), path, draw)


def pareto_plot(
    runs: Mapping[str, Sequence[Sequence[Record]]],
    path: Path | None = None,
    *,
    metric: str = "accuracy",
    title: str = "",
) -> Figure:
    """The metric at the end against megabytes a client sent and received, mean and 95 % interval, and the front: the rows for
    which no other has as much of the metric for as few bytes. What sends nothing is a dotted line.

    Args:
        runs: as in `report.table_rows`.
        path: where to save it, if anywhere.
        metric: which metric.
        title: of the figure.

    >>> def run(score, sent): return [[{"model/f1": score, "bytes_per_client": sent}]]
    >>> runs = {"local": run(0.5, 0), "small": run(0.6, 1e6), "worse": run(0.6, 2e6), "large": run(0.7, 3e6)}
    >>> [line.get_xdata().tolist() for line in pareto_plot(runs, metric="f1").axes[0].lines if line.get_label() == "front"]
    [[1.0, 3.0]]
    """
    scores = final_scores(runs, metric)
    sent = {row: float(np.mean([run[-1]["bytes_per_client"] for run in runs[row[0]]])) / 1e6 for row in scores}
    names = row_labels(scores)
    talking = [row for row in scores if sent[row] > 0 and np.isfinite(scores[row]).all()]

    def draw(figure):
        axis, notes = figure.add_subplot(), []
        for i, row in enumerate(scores, 1):
            mean, half = scores[row].mean(), half_width(scores[row])
            if row in talking:
                axis.errorbar(
                    sent[row], mean, yerr=half, fmt="o", color="black", markersize=3, capsize=2, linewidth=0.7
                )
                axis.annotate(str(i), (sent[row], mean), xytext=(3, 3), textcoords="offset points", fontsize=6)
                notes.append(plain(f"{i} {names[row]}", 40))
            elif np.isfinite(mean):
                axis.axhline(mean, color="grey", linestyle=":", linewidth=0.8)
                axis.annotate(
                    str(i), (1, mean), xycoords=("axes fraction", "data"), fontsize=6, ha="right", va="bottom"
                )
                notes.append(plain(f"{i} {names[row]} (nothing sent)", 40))
        front = _front([(sent[row], float(scores[row].mean())) for row in talking])
        if front:
            axis.step(*zip(*front, strict=True), where="post", color="black", linewidth=1, label="front")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(sent.values()) < 100 * front[0][0] else (1,)))
            axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="megabytes sent and received per client", ylabel=f"{metric} [%]", title=title)
        axis.grid(alpha=0.3)
        lines = [Line2D([], [], linestyle="none") for _ in notes]
        figure.legend(
            lines, notes, fontsize=6.5, loc="outside right upper", handlelength=0, handletextpad=0, frameon=False
        )

    return _figure(1.7 * COLUMN, max(2.8, 0.125 * len(scores) + 0.6), path, draw)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, score) that no other beats, from the cheapest up."""
    best, front = -np.inf, []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if score > best:
            best = score
            front.append((cost, score))
    return front


def threshold_plot(
    cells: Mapping[tuple[float, float], tuple[float, float]],
    path: Path | None = None,
    *,
    label: str = "",
    title: str = "",
) -> Figure:
    """A heat map of T_start and T_end: each field has the metric, and the megabytes below it.

    Args:
        cells: `{(t_start, t_end): (metric in percent, megabytes a client)}`; what is not there stays white.
        path: where to save it, if anywhere.
        label: of the metric.
        title: of the figure.

    >>> figure = threshold_plot({(0.9, 0.9): (95.0, 1.2), (0.9, 0.98): (96.0, 2.0)}, label="accuracy [%]")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['95.0\\n1.20 MB', '96.0\\n2.00 MB']
    """
    starts, stops = (sorted({pair[i] for pair in cells}) for i in (0, 1))
    grid = np.full((len(starts), len(stops)), np.nan)
    for (start, stop), (score, _) in cells.items():
        grid[starts.index(start), stops.index(stop)] = score

    def draw(figure):
        axis = figure.add_subplot()
        image = axis.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (start, stop), (score, megabytes) in cells.items():
            axis.text(
                stops.index(stop),
                starts.index(start),
                f"{score:.1f}\n{megabytes:.2f} MB",
                color="white" if score <= middle else "black",
                fontsize=7,
                ha="center",
                va="center",
            )
        axis.set_xticks(range(len(stops)), stops)
        axis.set_yticks(range(len(starts)), starts)
        axis.set(xlabel="T at the end", ylabel="T at the start", title=title)
        figure.colorbar(image, ax=axis).set_label(label, fontsize=8)

    return _figure(max(COLUMN, 0.9 + 0.7 * len(stops)), 0.9 + 0.45 * len(starts), path, draw)


def clients_plot(
    values: Mapping[str, Sequence[Sequence[float | None]]],
    path: Path | None = None,
    *,
    label: str = "",
    title: str = "",
) -> Figure:
    """How a metric is spread over clients, means over seeds: boxes from the lower to the upper quartile, whiskers from the 5th
    to the 95th percentile, clients beyond them as points. A client that has no value with a seed is left out.

    Args:
        values: `{row: [S, N]}`, shares, None where a client has no value.
        path: where to save it, if anywhere.
        label: of the axis.
        title: of the figure.

    >>> figure = clients_plot({"FedAvg": [[0.5, 0.9, None]]}, label="f1 [%]")
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['FedAvg']
    """
    boxes = {}
    for row, seeds in values.items():
        of_seeds = _percent(seeds)
        boxes[row] = of_seeds[:, np.isfinite(of_seeds).all(axis=0)].mean(axis=0)

    def draw(figure):
        axis = figure.add_subplot()
        axis.boxplot(
            [*boxes.values()],
            orientation="horizontal",
            tick_labels=[*map(plain, boxes)],
            whis=(5, 95),
            widths=0.6,
            showmeans=True,
            flierprops=dict(marker=".", markersize=2),
            meanprops=dict(marker="D", markersize=3, markerfacecolor="white", markeredgecolor="black"),
            medianprops=dict(color="black"),
        )
        axis.invert_yaxis()
        axis.set(xlabel=label, title=title)
        axis.grid(axis="x", alpha=0.3)

    return _figure(1.4 * COLUMN, 0.8 + 0.18 * len(boxes), path, draw)


def spectrum_plot(
    energy: Mapping[str, Mapping[int, np.ndarray]],
    needed: Mapping[str, Mapping[int, Any]],
    path: Path | None = None,
    *,
    threshold: float = 0.95,
    title: str = "",
) -> Figure:
    """As the paper's Fig. 4: how concentrated the updates' energy is for each kind of matrix, and how that changes.

    Left, the share of energy in the first k values, of the first round (dashed) and the last (solid); right, the share of all
    values needed for `threshold`, against rounds, with the 95 % interval of the mean over clients and layers.

    Args:
        energy: `{kind: {round: [r]}}`, cumulative, of the rounds to show; the first is dashed, the last solid.
        needed: `{kind: {round: shares of the full rank, one a matrix}}`.
        path: where to save it, if anywhere.
        threshold: T of the right panel.
        title: of the figure.

    >>> curve = {1: np.array([0.9, 1.0]), 5: np.array([0.7, 1.0])}
    >>> figure = spectrum_plot({"query": curve}, {"query": {1: [0.5, 0.5], 5: [1.0, 0.5]}})
    >>> [axis.get_xlabel() for axis in figure.axes]
    ['share of the singular values', 'round']
    """
    markers = "osD^vPX*"

    def draw(figure):
        (left, right), handles = figure.subplots(1, 2), {}
        for i, kind in enumerate(energy):
            color = _grey(i, len(energy))
            rounds = sorted(energy[kind])
            for round, style in ((rounds[0], "--"), (rounds[-1], "-")):
                curve = energy[kind][round]
                left.plot(np.arange(1, len(curve) + 1) / len(curve), curve, style, color=color, linewidth=1)
            at = sorted(needed[kind])
            mean = np.array([np.mean(needed[kind][round]) for round in at])
            half = np.nan_to_num([half_width(needed[kind][round]) for round in at])
            every = max(1, len(at) // 6)
            style = dict(color=color, marker=markers[i % 8], markersize=3, markevery=every, linewidth=1)
            (handles[plain(kind)],) = right.plot(at, 100 * mean, **style)
            right.fill_between(at, 100 * (mean - half), 100 * (mean + half), color=color, alpha=0.2, linewidth=0)
        left.axhline(threshold, color="grey", linestyle=":", linewidth=0.8)
        left.set(xlabel="share of the singular values", ylabel="share of the energy", xscale="log")
        left.set_title("first round dashed, last solid")
        left.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        right.set(xlabel="round", ylabel=f"values for T = {threshold:g} [% of all]")
        right.set_title(title)
        for axis in (left, right):
            axis.grid(alpha=0.3)
        figure.legend(handles.values(), handles, fontsize=7, loc="outside lower center", ncols=4)

    return _figure(2 * COLUMN, 2.7 + 0.13 * -(-len(energy) // 4), path, draw)
