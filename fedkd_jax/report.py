"""What a comparison says: one record per evaluation, tables of them, how sure a difference is. Nothing here runs a model."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from fedkd_jax.metrics import client_mean
from fedkd_jax.types import History, Number

Record = dict[str, Any]


def records(
    history: History,
    counts: np.ndarray,
    clients: int,
    *,
    of_clients: Sequence[str] = (),
    epsilon: Callable[[int, int], float] | None = None,
) -> list[Record]:
    """One flat record per evaluation: round, traffic so far, and each model's metrics over all test examples
    (`model/metric`) and averaged over clients (`model/metric_per_client`).

    Where clients may fail there are also, of all rounds so far, how many were asked, the messages that counted, and the seconds
    that the server waited for them, one round after another.

    `bytes_per_client` adds up both directions over all rounds so far and divides by the population, as the paper does.

    Args:
        history: what `simulate` returned.
        counts: test examples of each client `[N]`.
        clients: the population's size.
        of_clients: metrics of which every client's own value is kept too: `model/metric_of_client`, a list, None for a
            client without a value. For few clients: it grows with their number.
        epsilon: `(rounds done, the most of them that one client took part in) -> epsilon`, of a method with noise.

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
    turn = rounds.turn or None
    waited = np.zeros(0) if turn is None else np.where(turn.counted, turn.seconds, 0).max(axis=1)
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
        if epsilon is not None:
            _, turns = np.unique(rounds.ids[: row + 1], return_counts=True)
            record["epsilon"] = epsilon(evaluation["round"], done + int(turns.max()))
        there = np.ones(rounds.ids.shape[1], bool)
        if turn is not None:
            there = turn.present[row]
            record["asked"], record["counted"] = (int(x[: row + 1].sum()) for x in (turn.present, turn.counted))
            record["simulated_seconds"] = float(waited[: row + 1].sum())
        for name in ("teacher_task", "student_task", "teacher_distill", "student_distill", "hidden"):
            record[f"train/{name}"] = float(np.mean(getattr(rounds.terms, name)[row][there])) if there.any() else np.nan
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
        many times less than the baseline each of the two is. For what is not quantised "less floats" is the paper's. Where
        clients may fail, the share of those asked whose message did not count, and the seconds that the server waited. Where
        messages went as bytes, "sealed" is what these measured, both ways. Where a method has differential privacy, epsilon,
        the largest of the seeds', "-" of the others.

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
    private = any("epsilon" in seeds[0][-1] for seeds in runs.values())
    for method, seeds in runs.items():
        last = [run[-1] for run in seeds]
        for model in models_with(last[0], *metrics):
            row = {"method": method, "model": model}
            for metric in metrics:
                row[f"{metric} %"] = _mean_std([100 * r[f"{model}/{metric}"] for r in last])
            row["per client %"] = _mean_std([100 * r[f"{model}/{metrics[-1]}_per_client"] for r in last])
            sent = costs[method] > 0
            up = float(np.mean([r["uplink_bytes_per_client"] for r in last]))
            for column, count in (("up", up), ("down", costs[method] - up), ("bytes", costs[method])):
                row[f"{column}/client"] = human_bytes(count) if sent else "-"
            if "sealed_bytes_per_client" in last[0]:
                sealed = float(np.mean([r["sealed_bytes_per_client"] for r in last]))
                row["sealed/client"] = human_bytes(sealed) if sent else "-"
            row["floats/client"] = f"{floats[method]:,.0f}" if sent else "-"
            if baseline is not None:
                for column, count in (("less", costs), ("less floats", floats)):
                    row[column] = f"{count[baseline] / count[method]:.1f}x" if sent and costs[baseline] else "-"
            if "asked" in last[0]:
                row["lost %"] = _mean_std([100 * (1 - r["counted"] / max(r["asked"], 1)) for r in last])
                row["simulated s"] = _mean_std([r["simulated_seconds"] for r in last])
            if private:
                row["epsilon"] = f"{max(r['epsilon'] for r in last):.3g}" if "epsilon" in last[0] else "-"
            rows.append(row)
    return rows


def final_scores(runs: Mapping[str, Sequence[Sequence[Record]]], metric: str) -> dict[tuple[str, str], np.ndarray]:
    """`{(method, model): [S]}`, the metric at the end in percent, one number for each seed.

    Raises:
        ValueError: a method without a model that has it.

    >>> final_scores({"FedAvg": [[{"model/f1": 0.25}], [{"model/f1": 0.5}]]}, "f1")
    {('FedAvg', 'model'): array([25., 50.])}
    """
    return {
        (method, model): 100 * np.array([run[-1][f"{model}/{metric}"] for run in seeds])
        for method, seeds in runs.items()
        for model in models_with(seeds[0][-1], metric)
    }


def row_labels(rows: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What a figure calls each (method, model): the method, and the model where the method has several.

    >>> row_labels([("FedAvg", "model"), ("FedKD", "teacher"), ("FedKD", "student")])
    {('FedAvg', 'model'): 'FedAvg', ('FedKD', 'teacher'): 'FedKD, teacher', ('FedKD', 'student'): 'FedKD, student'}
    """
    rows = list(rows)
    methods = [method for method, _ in rows]
    labels = {row: row[0] if methods.count(row[0]) == 1 else ", ".join(row) for row in rows}
    return labels if len({*labels.values()}) == len(labels) else {row: ", ".join(row) for row in rows}


def half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half of the 95 % interval of the mean, Student's; NaN of one value.

    >>> round(half_width([1.0, 2.0, 3.0]), 2), half_width([1.0])
    (2.48, nan)
    """
    if len(values) < 2:
        return float("nan")
    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))


def significance_rows(
    runs: Mapping[str, Sequence[Sequence[Record]]], metric: str, baselines: Sequence[str]
) -> list[dict[str, str]]:
    """How sure a difference is: each row's mean with its 95 % interval, and a paired test against the best baseline.

    The interval is Student's, of the mean over seeds; the test is the two-sided paired t-test over seeds, as in the paper.
    Seeds are the same for all methods, so that they are pairs; with few of them only large differences show. A row is tested
    against the same model of the best baseline where it has that (students against its student), else against its best model.

    Args:
        runs: as in `table_rows`, two seeds or more.
        metric: which metric.
        baselines: the methods of which the one with the highest mean is what others are tested against.

    Returns:
        Rows of strings: method, model, mean and half width of the interval in percent, which row it is tested against, the
        difference in points, and p; "-" where there is nothing to compare: the best baseline's best model, a row with a value
        that is not finite, no baseline without one, or for p all seeds differing by the same.

    Raises:
        ValueError: fewer than two seeds, or no baseline among the methods.

    >>> def runs(*values): return [[{"model/f1": v}] for v in values]
    >>> rows = significance_rows({"FedAvg": runs(0.60, 0.62, 0.61), "ours": runs(0.71, 0.72, 0.73)}, "f1", ["FedAvg"])
    >>> rows[0]["difference"], rows[1]["f1 %"], rows[1]["against"], rows[1]["difference"], rows[1]["p"]
    ('-', '72.00 ± 2.48', 'FedAvg', '+11.00', '0.0027')
    """
    values = final_scores(runs, metric)
    few = min(map(len, values.values()))
    if few < 2:
        raise ValueError(f"runs has {few} seed of a method; allowed: two or more, for a deviation")
    if not set(baselines) & set(runs):
        raise ValueError(f"baselines is {list(baselines)}; allowed: some of {', '.join(runs)}")
    known = [row for row in values if row[0] in baselines and np.isfinite(values[row]).all()]
    best = max(known, key=lambda row: values[row].mean(), default=None)
    labels, rows = row_labels(values), []
    for (method, model), own in values.items():
        row = {"method": method, "model": model, f"{metric} %": f"{own.mean():.2f} ± {half_width(own):.2f}"}
        row |= {"against": "-", "difference": "-", "p": "-"}
        same = [row for row in known if best and row == (best[0], model) and row != (method, model)]
        against = same[0] if same else best
        fits = against not in (None, (method, model)) and np.isfinite(own).all()
        if fits and against and len(own) == len(values[against]):
            difference = own - values[against]
            row |= {"against": labels[against], "difference": f"{difference.mean():+.2f}"}
            if np.ptp(difference) > 1e-9:  # the test divides by the differences' deviation
                row["p"] = f"{scipy.stats.ttest_rel(own, values[against]).pvalue:.2g}"
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
        for model in models_with(last[0], f"{metric}_of_client"):
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


def models_with(record: Record, *metrics: str) -> list[str]:
    """The models of which the record holds all these metrics.

    Raises:
        ValueError: there is none.

    >>> models_with({"round": 1, "teacher/f1": 0.7, "student/f1": 0.6, "train/teacher_task": 0.1}, "f1")
    ['teacher', 'student']
    """
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
