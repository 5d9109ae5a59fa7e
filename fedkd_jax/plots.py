"""Plots: a metric against rounds and against traffic, and who holds what. Nothing here uses pyplot's state."""

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from fedkd_jax.report import Record, final_scores, row_labels

STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"


def plain(text: str, width: int = 30) -> str:
    """A name as it may stand in a figure: in short lines, and no mathematics.

    >>> plain("a name of $5", 8)
    'a name\\nof \\\\$5'
    """
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def accuracy_plot(
    runs: Mapping[str, Sequence[Sequence[Record]]],
    path: str | os.PathLike | None = None,
    *,
    metric: str = "accuracy",
    split: str = "test",
    title: str = "",
) -> Figure:
    """The metric against rounds and against megabytes sent per client: mean over seeds, a band of one standard deviation.

    Methods that send nothing are horizontal lines in the right panel.

    Args:
        runs: as in `table_rows`.
        path: where to save it, if anywhere.
        metric: which metric.
        split: of which examples, for the axis.
        title: of the figure.

    Raises:
        ValueError: a method without a model that has it.

    >>> run = [[{"round": r, "model/accuracy": 0.1 * r, "bytes_per_client": 1e6 * r} for r in (1, 2)]]
    >>> [axis.get_xlabel() for axis in accuracy_plot({"FedAvg": run}).axes]
    ['round', 'megabytes sent and received per client']
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    silent, handles = [], {}
    for index, ((method, model), label) in enumerate(row_labels(final_scores(runs, metric)).items()):
        seeds, color = runs[method], f"C{index % 10}"
        values = 100 * np.array([[record[f"{model}/{metric}"] for record in run] for run in seeds])
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=1) if len(seeds) > 1 else None
        rounds = [record["round"] for record in seeds[0]]
        megabytes = np.mean([[record["bytes_per_client"] / 1e6 for record in run] for run in seeds], axis=0)
        kwargs = dict(
            color=color,
            linestyle=STYLES[index % 4],
            marker=MARKERS[index % 8],
            markersize=4,
            markevery=max(1, len(rounds) // 8),
        )
        (handles[plain(label)],) = left.plot(rounds, mean, **kwargs)
        if megabytes[-1] > 0:
            right.plot(megabytes, mean, **kwargs)
        else:
            right.axhline(mean[-1], color=color, linestyle=STYLES[index % 4], linewidth=1)
            silent.append(label)
        if std is not None:
            left.fill_between(rounds, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set(xlabel="round", ylabel=f"{split} {metric} [%]")
    right.set(xlabel="megabytes sent and received per client")
    if len(right.lines) > len(silent):
        right.set_xscale("log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # or a range below a decade may show no number at all
        right.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        right.xaxis.set_minor_formatter(NullFormatter())
    if silent:
        right.set_title(f"nothing sent (horizontal lines): {plain(', '.join(silent), 60)}", fontsize=8)
    if len(left.lines) <= 8:
        left.legend(handles.values(), handles, fontsize=8)
    else:  # it would hide the curves
        figure.set_size_inches(13, 4.6)
        figure.legend(handles.values(), handles, fontsize=7, loc="outside right center")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    if title:
        figure.suptitle(plain(title, 80))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def partition_plot(
    labels: np.ndarray,
    clients: Sequence[np.ndarray],
    class_names: Sequence[str],
    path_or_ax: str | pathlib.Path | Axes | None = None,
    *,
    unit: str = "examples",
    client_names: Sequence[str] | None = None,
) -> Figure:
    """Plot who holds what.

    Up to 60 clients and 20 classes: one bar per client, stacked by class. Beyond: an image of the share
    each class has in a client, clients sorted by their most frequent class and its share. Uses no pyplot state.

    Args:
      labels: `[n]` int, indices into class_names.
      clients: N int index arrays.
      class_names: C names.
      path_or_ax: a file to write (its suffix gives the format), axes to draw on, or None.
      unit: what is counted, in the plural.
      client_names: N names for up to 30 clients, otherwise they are numbered.

    Returns:
      The figure.

    >>> figure = partition_plot(np.array([0, 1, 1]), [np.array([0, 1]), np.array([2])], ["cat", "dog"])
    >>> figure.axes[0].get_title()
    'Who holds what: 3 examples, 2 classes, 2 clients'
    """
    n_clients, n_classes = len(clients), len(class_names)
    counts = np.array([np.bincount(labels[ids], minlength=n_classes) for ids in clients]).reshape(n_clients, n_classes)
    bars = n_clients <= 60 and n_classes <= 20
    if isinstance(path_or_ax, Axes):
        ax = path_or_ax
    else:
        height = 1.6 + 0.2 * max(n_clients, n_classes) if bars else 1.8 + 0.28 * min(n_classes, 40)
        ax = Figure(figsize=(8, max(height, 2.5)), layout="constrained").add_subplot()
    if bars:
        _draw_bars(ax, counts, class_names, unit)
        each = n_clients <= 30
        ax.set_yticks(range(0, n_clients, 1 if each else 5), client_names if each else None)
    else:
        _draw_shares(ax, counts, class_names, unit)
    ax.set_title(f"Who holds what: {counts.sum():,} {unit}, {n_classes} classes, {n_clients:,} clients")
    figure = ax.get_figure(root=True)
    assert figure is not None
    if isinstance(path_or_ax, str | pathlib.Path):
        figure.savefig(path_or_ax, dpi=150)
    return figure


def _draw_bars(ax, counts, class_names, unit):
    colors = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    left = np.zeros(len(counts), int)
    for c, name in enumerate(class_names):
        ax.barh(np.arange(len(counts)), counts[:, c], left=left, height=0.85, color=colors(c), label=name)
        left += counts[:, c]
    ax.set(xlabel=unit, ylabel="client", ylim=(len(counts) - 0.5, -0.5))
    ax.legend(title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw_shares(ax, counts, class_names, unit):
    empty = counts.sum(1) == 0
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    share = share[np.lexsort((-share.max(1), share.argmax(1), empty))]
    # The default interpolation blurs one class into the next.
    image = ax.imshow(share.T, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    note = f"; the last {empty.sum():,} hold nothing" if empty.any() else ""
    ax.set(xlabel="client, sorted by its most frequent class" + note, ylabel="class")
    if len(class_names) <= 40:
        ax.set_yticks(range(len(class_names)), class_names)
    ax.get_figure(root=True).colorbar(image, ax=ax, label=f"share of the client's {unit}")
