"""What people look at: one record per evaluation, the comparison table, plots. Nothing here runs a model."""

import csv
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from fedkd_jax.metrics import client_mean
from fedkd_jax.types import History, Number

Record = dict[str, Any]
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"


def records(history: History, counts: np.ndarray, clients: int, *, of_clients: Sequence[str] = ()) -> list[Record]:
    """One flat record per evaluation: round, traffic so far, and each model's metrics over all test examples
    (`model/metric`) and averaged over clients (`model/metric_per_client`).

    `bytes_per_client` adds up both directions over all rounds so far and divides by the population, as the paper does.

    Args:
        history: what `simulate` returned.
        counts: test examples of each client `[N]`.
        clients: the population's size.
        of_clients: metrics of which every client's own value is kept too: `model/metric_of_client`, a list, None for a
            client without a value. For few clients: it grows with their number.

    >>> import jax
    >>> from fedkd_jax import RoundInfo, task_terms
    >>> z = np.full((2, 1), 4)
    >>> info = RoundInfo(ids=z, terms=jax.tree.map(lambda _: z * 1.0, task_terms()), uplink_bytes=z, downlink_bytes=z,
    ...                  uplink_floats=z, downlink_floats=z, finite=z > 0, weight=z, ranks={})
    >>> evaluation = {"round": 2, "model": {"accuracy": np.array([0.5])}, "pooled": {"model": {"accuracy": 0.5}}}
    >>> record = records(History(rounds=info, evaluations=(evaluation,)), np.array([3]), 1)[0]
    >>> record["bytes_per_client"], record["model/accuracy"], record["model/accuracy_per_client"]
    (16.0, 0.5, 0.5)
    """
    rounds = history.rounds
    traffic = {name: np.cumsum(np.asarray(getattr(rounds, name), np.int64).sum(axis=1)) / clients for name in _TRAFFIC}
    done = history.evaluations[-1]["round"] - len(rounds.ids) if history.evaluations else 0
    out = []
    for evaluation in history.evaluations:
        row = evaluation["round"] - done - 1
        record: Record = {
            "round": evaluation["round"],
            "uplink_bytes_per_client": float(traffic["uplink_bytes"][row]),
            "bytes_per_client": float(traffic["uplink_bytes"][row] + traffic["downlink_bytes"][row]),
            "floats_per_client": float(traffic["uplink_floats"][row] + traffic["downlink_floats"][row]),
            "not_finite": int((~np.asarray(rounds.finite[: row + 1])).sum()),
        }
        for name in ("teacher_task", "student_task", "teacher_distill", "student_distill", "hidden"):
            record[f"train/{name}"] = float(np.mean(getattr(rounds.terms, name)[row]))
        for model, pooled in evaluation["pooled"].items():
            for metric, value in pooled.items():
                values = evaluation[model][metric]
                record[f"{model}/{metric}"] = value
                record[f"{model}/{metric}_per_client"] = client_mean(values, counts)
                if metric in of_clients:
                    record[f"{model}/{metric}_of_client"] = [None if np.isnan(v) else float(v) for v in values]
        out.append(record)
    return out


_TRAFFIC = ("uplink_bytes", "downlink_bytes", "uplink_floats", "downlink_floats")


def table_rows(
    runs: Mapping[str, Sequence[Sequence[Record]]], baseline: str | None, metrics: Sequence[str] = ("accuracy",)
) -> list[dict[str, str]]:
    """The comparison as the paper's Table 1: a row per method and model.

    Args:
        runs: `{method: one list of records per seed}`; the last record of each counts.
        baseline: the method whose traffic is 1.0x; None leaves the column out.
        metrics: which metrics, a column each, of the models that have all of them.

    Returns:
        Rows of strings: method, model, metrics over all examples and the last of them per client, in percent, mean and
        standard deviation over seeds, traffic per client in bytes, up, down and both, and in the paper's float count, and how
        many times less than the baseline each of the two is. For what is not quantised "less floats" is the paper's.

    Raises:
        ValueError: a method without a model that has them.

    >>> def run(accuracy, sent):
    ...     return [[{"model/accuracy": accuracy, "model/accuracy_per_client": accuracy, "bytes_per_client": sent,
    ...               "uplink_bytes_per_client": sent / 2, "floats_per_client": sent / 4}]]
    >>> rows = table_rows({"FedAvg": run(0.9, 4e6), "ours": run(0.91, 2e5)}, "FedAvg")
    >>> rows[1]["accuracy %"], rows[1]["up/client"], rows[1]["less"], rows[1]["less floats"]
    ('91.00', '100.00 kB', '20.0x', '20.0x')
    """
    costs, floats = (
        {method: float(np.mean([run[-1][f"{unit}_per_client"] for run in seeds])) for method, seeds in runs.items()}
        for unit in ("bytes", "floats")
    )
    rows = []
    for method, seeds in runs.items():
        last = [run[-1] for run in seeds]
        for model in _models(last[0], *metrics):
            row = {"method": method, "model": model}
            for metric in metrics:
                row[f"{metric} %"] = _mean_std([100 * r[f"{model}/{metric}"] for r in last])
            row["per client %"] = _mean_std([100 * r[f"{model}/{metrics[-1]}_per_client"] for r in last])
            sent = costs[method] > 0
            up = float(np.mean([r["uplink_bytes_per_client"] for r in last]))
            for column, count in (("up", up), ("down", costs[method] - up), ("bytes", costs[method])):
                row[f"{column}/client"] = human_bytes(count) if sent else "-"
            row["floats/client"] = f"{floats[method]:,.0f}" if sent else "-"
            if baseline is not None:
                for column, count in (("less", costs), ("less floats", floats)):
                    row[column] = f"{count[baseline] / count[method]:.1f}x" if sent and costs[baseline] else "-"
            rows.append(row)
    return rows


def significance_rows(
    runs: Mapping[str, Sequence[Sequence[Record]]], metric: str, baselines: Sequence[str]
) -> list[dict[str, str]]:
    """How sure a difference is: each row's mean with its 95 % interval, and a paired test against the best baseline.

    The interval is Student's, of the mean over seeds; the test is the two-sided paired t-test over seeds, as in the paper.
    Seeds are the same for all methods, so that they are pairs; with few of them only large differences show.

    Args:
        runs: as in `table_rows`, two seeds or more.
        metric: which metric.
        baselines: the methods of which the one with the highest mean is what others are tested against.

    Returns:
        Rows of strings: method, model, mean and half width of the interval in percent, the difference from the best baseline
        in points, and p; "-" for the baseline itself, and for p where all seeds differ by the same.

    Raises:
        ValueError: fewer than two seeds, or no baseline among the methods that has a finite value for each seed.

    >>> def runs(*values): return [[{"model/f1": v}] for v in values]
    >>> rows = significance_rows({"FedAvg": runs(0.60, 0.62, 0.61), "ours": runs(0.71, 0.72, 0.73)}, "f1", ["FedAvg"])
    >>> rows[0]["difference"], rows[1]["f1 %"], rows[1]["difference"], rows[1]["p"]
    ('-', '72.00 ± 2.48', '+11.00', '0.0027')
    """
    values = {
        (method, model): 100 * np.array([run[-1][f"{model}/{metric}"] for run in seeds])
        for method, seeds in runs.items()
        for model in _models(seeds[0][-1], metric)
    }
    few = min(map(len, values.values()))
    if few < 2:
        raise ValueError(f"runs has {few} seed of a method; allowed: two or more, for a deviation")
    known = [row for row in values if row[0] in baselines and np.isfinite(values[row]).all()]
    if not known:
        raise ValueError(f"baselines is {list(baselines)}; allowed: some of {', '.join(runs)}")
    best = max(known, key=lambda row: values[row].mean())
    rows = []
    for (method, model), own in values.items():
        half = scipy.stats.t.ppf(0.975, len(own) - 1) * scipy.stats.sem(own)
        row = {"method": method, "model": model, f"{metric} %": f"{own.mean():.2f} ± {half:.2f}"}
        other = values[best]
        row |= {"difference": "-", "p": "-"}
        if (method, model) != best and len(own) == len(other) and np.isfinite(own).all():
            row["difference"] = f"{own.mean() - other.mean():+.2f}"
            if np.ptp(own - other) > 1e-9:  # the test divides by the differences' deviation
                row["p"] = f"{scipy.stats.ttest_rel(own, other).pvalue:.2g}"
        rows.append(row)
    return rows


def tidy_rows(runs: Mapping[str, Sequence[Sequence[Record]]], versions: Sequence[str] = ()) -> list[Record]:
    """Everything in the long form that plotting and statistics packages want: a row for each number of each evaluation.

    Args:
        runs: as in `table_rows`.
        versions: keys of the records that say with what they were made, each a column.

    Returns:
        Rows `{"method", "seed", "cell", "round", "seconds", *versions, "model", "metric", "value"}`; model is "" where a
        number is of the whole run, such as traffic. Clients' own values have the metric "f1 of client 3".

    >>> run = [{"seed": 0, "cell": "a", "round": 2, "seconds": 1.5, "jax": "0.10", "model/f1": 0.7, "not_finite": 0}]
    >>> for row in tidy_rows({"FedAvg": [run]}, ["jax"]): print(list(row.values()))
    ['FedAvg', 0, 'a', 2, 1.5, '0.10', 'model', 'f1', 0.7]
    ['FedAvg', 0, 'a', 2, 1.5, '0.10', '', 'not_finite', 0.0]
    """
    rows = []
    keys = ("seed", "cell", "round", "seconds", *versions)
    for method, seeds in runs.items():
        for record in (record for run in seeds for record in run):
            of_run = {"method": method, **{key: record.get(key) for key in keys}}
            for key, value in record.items():
                model, _, metric = key.rpartition("/")
                if key in (*keys, "method"):
                    continue
                named = [(metric, value)]
                if isinstance(value, list):
                    named = [(f"{metric.removesuffix('_of_client')} of client {i}", v) for i, v in enumerate(value)]
                for name, number in named:
                    number = float("nan") if number is None else float(number)
                    rows.append({**of_run, "model": model, "metric": name, "value": number})
    return rows


def client_rows(
    runs: Mapping[str, Sequence[Sequence[Record]]], metric: str, names: Sequence[str]
) -> list[dict[str, str]]:
    """Who does how well: a row per method and model, a column per client.

    Args:
        runs: as in `table_rows`, with records made with `of_clients=[metric]`.
        metric: which metric.
        names: the N clients' names.

    Returns:
        Rows of strings: method, model and each client's value in percent, mean and standard deviation over seeds; "-" for a
        client without a value.

    Raises:
        ValueError: records without the clients' values, or not N names, or a name twice.

    >>> run = [[{"model/f1": 0.7, "model/f1_of_client": [0.5, 0.9]}]]
    >>> client_rows({"FedAvg": run}, "f1", ["reviews", "abstracts"])
    [{'method': 'FedAvg', 'model': 'model', 'reviews': '50.00', 'abstracts': '90.00'}]
    """
    rows = []
    for method, seeds in runs.items():
        last = [run[-1] for run in seeds]
        for model in _models(last[0], f"{metric}_of_client"):
            values = [r[f"{model}/{metric}_of_client"] for r in last]
            if len(set(names)) != len(names) or len(names) != len(values[0]):
                raise ValueError(
                    f"names is {list(names)}; allowed: {len(values[0])} different ones, one for each client"
                )
            row = {"method": method, "model": model}
            for name, of_seeds in zip(names, zip(*values, strict=True), strict=True):
                row[name] = "-" if None in of_seeds else _mean_std([100 * v for v in of_seeds])
            rows.append(row)
    return rows


def _models(record: Record, *metrics: str) -> list[str]:
    """The models of which the record holds all these metrics."""
    held: dict[str, list[str]] = {}
    for key in record:
        model, _, metric = key.partition("/")
        if metric and model != "train":
            held.setdefault(model, []).append(metric)
    models = [model for model, names in held.items() if set(metrics) <= set(names)]
    if not models:
        allowed = "; ".join(f"{model} has {', '.join(names)}" for model, names in held.items())
        raise ValueError(f"metrics is {metrics}; allowed: what the records hold of a model: {allowed or 'nothing'}")
    return models


def _mean_std(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def human_bytes(count: Number) -> str:
    """Bytes in decimal units, as the paper counts.

    >>> human_bytes(2.05e9), human_bytes(999_999), human_bytes(512)
    ('2.05 GB', '1.00 MB', '512 B')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.999995 * size:  # what would be 1000.00 of the unit below
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table.

    >>> print(markdown([{"a": "1", "b": "x|y"}]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text[1] = "|" + "---|" * len(rows[0])
    return "\n".join(text)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, the columns those of all rows.

    >>> as_csv([{"a": 1}, {"a": 2}]).split()
    ['a', '1', '2']
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


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
    silent, index = [], 0
    for method, seeds in runs.items():
        models = _models(seeds[0][0], metric)
        for model in models:
            label = method if len(models) == 1 else f"{method}, {model}"
            color = f"C{index % 10}"
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
            left.plot(rounds, mean, label=label, **kwargs)
            if megabytes[-1] > 0:
                right.plot(megabytes, mean, **kwargs)
            else:
                right.axhline(mean[-1], color=color, linestyle=STYLES[index % 4], linewidth=1)
                silent.append(label)
            if std is not None:
                left.fill_between(rounds, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
            index += 1
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set(xlabel="round", ylabel=f"{split} {metric} [%]")
    right.set(xlabel="megabytes sent and received per client")
    if len(right.lines) > len(silent):
        right.set_xscale("log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # or a range below a decade may show no number at all
        right.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        right.xaxis.set_minor_formatter(NullFormatter())
    if silent:
        right.set_title(f"nothing sent (horizontal lines): {', '.join(silent)}", fontsize=8)
    if index <= 8:
        left.legend(fontsize=8)
    else:  # it would hide the curves
        figure.set_size_inches(13, 4.6)
        figure.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
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
