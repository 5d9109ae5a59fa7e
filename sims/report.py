"""One HTML page of finished runs: `python -m sims.report RUN... [--out PAGE]`.

RUN is a folder that sims.compare, sims.run or sims.spectrum wrote. The page holds their tables, figures and configs and how to
make each number again; it opens offline and in any browser. sims.compare writes one of itself.
"""

import argparse
import csv
import dataclasses
import pathlib
import shlex
from collections.abc import Mapping

from fedkd_jax import figures
from fedkd_jax.config import Experiment, MethodConfig, load_config
from fedkd_jax.page import Section, Table, Text, render
from fedkd_jax.report import Record, models_with
from sims import common

CENTRAL = "centralised"  # no federated method, and above all of them


def read_runs(folder: pathlib.Path) -> dict[str, list[list[Record]]]:
    """`{method: records of each seed}` of a finished comparison or run.

    Raises:
        FileNotFoundError: there is none, or one of an earlier version.
        ValueError: a line of its records that is none.

    >>> try: read_runs(pathlib.Path("nowhere"))
    ... except FileNotFoundError as error: print(str(error).split(",")[0])
    RUN is 'nowhere'; allowed: the folder of a run that is finished
    """
    runs: dict[str, dict[int, list[Record]]] = {}
    paths = [path for name in ("results.jsonl", "metrics.jsonl") if (path := folder / name).exists()]
    records = common.read_jsonl(paths[0]) if paths else []
    keys = {"method": str, "seed": int, "seconds": int | float}
    whole = all(isinstance(record.get(key), kind) for record in records for key, kind in keys.items())
    if not (folder / "table.csv").exists() or not records or not whole:
        allowed = (
            "the folder of a run that is finished, with table.csv and results.jsonl or metrics.jsonl of this version"
        )
        raise FileNotFoundError(f"RUN is {str(folder)!r}; allowed: {allowed}")
    for record in records:
        runs.setdefault(record["method"], {}).setdefault(record["seed"], []).append(record)
    return {method: list(seeds.values()) for method, seeds in runs.items()}


def thresholds_of(methods: Mapping[str, MethodConfig]) -> dict[str, tuple[float, float]]:
    """`{method: (t_start, t_end)}` of the methods that differ from another in these alone; empty if they are no grid.

    >>> methods = {str(t): MethodConfig(codec="svd", t_start=t[0], t_end=t[1]) for t in ((0.8, 0.9), (0.9, 0.9), (0.8, 0.8))}
    >>> list(thresholds_of(methods).values())
    [(0.8, 0.9), (0.9, 0.9), (0.8, 0.8)]
    """
    alike: dict[MethodConfig, dict[str, tuple[float, float]]] = {}
    for name, method in methods.items():
        if method.codec == "svd":
            alike.setdefault(dataclasses.replace(method, t_start=1.0, t_end=1.0), {})[name] = (
                method.t_start,
                method.t_end,
            )
    most = max(alike.values(), key=len, default={})
    starts, stops = ({pair[i] for pair in most.values()} for i in (0, 1))
    return most if len(most) > 2 and len(starts) > 1 and len(stops) > 1 else {}


def comparison(folder: pathlib.Path, config: Experiment) -> Section:
    """What the page says of a comparison or a single run.

    >>> try: comparison(pathlib.Path("nowhere"), Experiment())
    ... except FileNotFoundError as error: print(str(error).split(";")[0])
    RUN is 'nowhere'
    """
    runs = read_runs(folder)
    rows = read_csv(folder / "table.csv")
    scores = [column for column in rows[0] if column.endswith(" %")]
    metric, held_out = scores[-2].removesuffix(" %"), common.held_out(config)
    central = [name for name, method in config.methods.items() if method.algorithm == CENTRAL]
    aside = f"; {', '.join(central)} is not federated and left out of that" if set(central) & set(runs) else ""
    caption = (
        f"{held_out} results after {config.rounds} rounds; bold is best, underlined second best of a column{aside}"
    )
    tables = [
        Table(
            caption,
            rows,
            ranked=[column for column in (*scores, "less", "less floats") if column in rows[0]],
            unranked=central,
        )
    ]
    if (path := folder / "significance.csv").exists():
        tables.append(Table(common.SIGNIFICANCE, read_csv(path)))
    names = None
    if (path := folder / "clients.csv").exists():
        each = read_csv(path)
        names = [column for column in each[0] if column not in ("method", "model")]
        tables.append(Table(f"{metric} % of each client", each, ranked=names, unranked=central))
    drawn: dict = figures.comparison_figures(
        runs,
        metric=metric,
        split=held_out,
        title=config.name,
        clients=names,
        thresholds=thresholds_of({name: config.methods[name] for name in runs}),
    )
    if (path := folder / "clients.png").exists():
        drawn["clients"] = (path.read_bytes(), "who holds what")
    return Section(
        title=f"{config.name}: {', '.join(runs)}" if len(runs) == 1 else config.name,
        remarks=[*facts(config, runs), *remarks_of(folder)],
        tables=[*tables, cells(runs, metric)],
        figures=drawn,
        texts=[Text("config.yaml, with every key", (folder / "config.yaml").read_text())],
    )


def facts(config: Experiment, runs: dict[str, list[list[Record]]]) -> list[str]:
    """What was run and with what, in sentences.

    >>> run = [[{"seed": 0, "seconds": 2.5, "jax": "0.10", "python": "3.11"}]]
    >>> facts(Experiment(rounds=3), {"FedKD": run})
    ['digits: 3 rounds, all clients in each, seeds 0.', 'Run with jax 0.10, python 3.11; 2 s in all.']
    """
    records = [run[-1] for seeds in runs.values() for run in seeds]
    seeds = sorted({record["seed"] for record in records})
    cohort = "all clients" if config.cohort is None else f"{config.cohort} clients"
    lines = [
        f"{config.data.name}: {config.rounds} rounds, {cohort} in each, seeds {', '.join(map(str, seeds))}.",
    ]
    versions = {
        key: ", ".join(sorted({str(record[key]) for record in records}))
        for key in ("fedkd_jax", "jax", "jaxlib", "python", "devices")
        if all(key in record for record in records)
    }
    with_what = ", ".join(f"{key} {value}" for key, value in versions.items())
    return [*lines, f"Run with {with_what}; {sum(record['seconds'] for record in records):.0f} s in all."]


def remarks_of(folder: pathlib.Path) -> list[str]:
    """Of remarks.txt, if there are any.

    >>> remarks_of(pathlib.Path("nowhere"))
    []
    """
    path = folder / "remarks.txt"
    return path.read_text().splitlines() if path.exists() else []


def cells(runs: dict[str, list[list[Record]]], metric: str) -> Table:
    """Every number of the table with the command that makes it again, from the section's config.

    >>> run = [[{"seed": 3, "seconds": 2.0, "model/f1": 0.5, "cell": "ab"}]]
    >>> cells({"teacher FedAvg": run}, "f1").rows[0]["command"]
    "python -m sims.run config.yaml --method 'teacher FedAvg' --seeds 3"
    """
    rows = []
    for method, seeds in runs.items():
        for record in (run[-1] for run in seeds):
            scores = ", ".join(
                f"{model} {100 * record[f'{model}/{metric}']:.2f}" for model in models_with(record, metric)
            )
            command = f"python -m sims.run config.yaml --method {shlex.quote(method)} --seeds {record['seed']}"
            rows.append(
                {
                    "method": method,
                    "seed": str(record["seed"]),
                    f"{metric} %": scores,
                    "seconds": f"{record['seconds']:.0f}",
                    "cell": str(record.get("cell", "-")),
                    "command": command,
                }
            )
    return Table("How to make each number again: save the config below as config.yaml", rows, folded=True)


def spectrum(folder: pathlib.Path, config: Experiment) -> Section:
    """What the page says of a run of sims.spectrum.

    >>> try: spectrum(pathlib.Path("nowhere"), Experiment())
    ... except FileNotFoundError as error: print(str(error).split(",")[0])
    RUN is 'nowhere'; allowed: the folder of a run that is finished
    """
    if not (folder / "spectrum.png").exists():
        raise FileNotFoundError(
            f"RUN is {str(folder)!r}; allowed: the folder of a run that is finished, with spectrum.png"
        )
    rows = read_csv(folder / "spectrum.csv")
    method, seed, last = rows[-1]["method"], rows[-1]["seed"], rows[-1]["round"]
    shown = [row for row in rows if row["round"] in ("1", last)]
    picture = (
        (folder / "spectrum.png").read_bytes(),
        "energy in the first values, and values needed, by kind of matrix",
    )
    again = f"python -m sims.spectrum config.yaml --method {shlex.quote(method)} --seeds {seed}"
    return Section(
        title=f"{config.name}: singular values of the updates of {method}, seed {seed}",
        remarks=[
            f"{last} rounds. To make it again, save the config below as config.yaml: {again}",
            *remarks_of(folder),
        ],
        tables=[Table("singular values needed, mean over clients and layers with its 95 % interval", shown)],
        figures={"spectrum": picture},
        texts=[Text("config.yaml, with every key", (folder / "config.yaml").read_text())],
    )


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """Rows of strings.

    Raises:
        ValueError: no table.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     _ = (path := pathlib.Path(where) / "a.csv").write_text("a,b\\n1,x"); read_csv(path)
    [{'a': '1', 'b': 'x'}]
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; allowed: a table as a program of sims wrote it") from error


def section_of(folder: pathlib.Path) -> Section:
    """A run folder as a section of a page.

    Raises:
        FileNotFoundError: not the folder of a run, or of one that is not finished.

    >>> try: section_of(pathlib.Path("nowhere"))
    ... except FileNotFoundError as error: print(str(error).split(";")[0])
    RUN is 'nowhere'
    """
    if not (folder / "config.yaml").exists():
        raise FileNotFoundError(
            f"RUN is {str(folder)!r}; allowed: a folder that a program of sims wrote, with config.yaml"
        )
    config = load_config(folder / "config.yaml")
    return (spectrum if (folder / "spectrum.csv").exists() else comparison)(folder, config)


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Writes the page; returns its path."""
    parser = argparse.ArgumentParser("python -m sims.report", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=pathlib.Path, help="folder of a run")
    parser.add_argument("--out", default="report.html", type=pathlib.Path, help="the page, a new file")
    options = parser.parse_args(argv)
    with common.one_line_errors():
        if options.out.exists():
            raise FileExistsError(f"out is {str(options.out)!r}; allowed: a file that is not there yet")
        sections = [section_of(folder) for folder in options.runs]
        title = sections[0].title if len(sections) == 1 else f"{len(sections)} runs"
        options.out.write_text(render(title, sections), encoding="utf-8")
    common.console.print(f"page of {len(sections)} run(s): {options.out}")
    return options.out


if __name__ == "__main__":
    main()
