"""Several methods over several seeds: `python -m sims.compare CONFIG [--overrides]`, one table like the paper's Table 1.

Every method sees the same clients, the same splits and the same seeds. Writes into a new folder runs/NAME-N: config.yaml
(resolved), results.jsonl (every evaluation of every run), results.csv and results.parquet (the same with a row for each
number), tables as .md and .csv (table; significance, from two seeds on; clients, where few have names), plots (the task's
score, accuracy.png, f1.png or auc.png; bars.png; pareto.png; spread.png or client-bars.png; thresholds.png where methods are a
grid of T; clients.png, who holds what), remarks.txt where there is something to know, and all of it as one page, report.html.

A cell is one method with one seed. Its evaluations are in cells/DIGEST.partial while it runs and in cells/DIGEST.jsonl when it
is finished. With `--resume FOLDER` finished cells of the same digest are not run again, whatever else the config
now has, also more methods or seeds; nothing in cells/ is ever deleted but partial files.

With `--seeds-at-once True` the seeds of a method that are left to run do so in one program, see `placement.seeds_layout`.
"seconds" of a record is the time since they began, compilation included, over their number: a method's last ones add up to
what it took.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import dataclasses
import hashlib
import pathlib
import time
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from matplotlib.figure import Figure

from fedkd_jax import report
from fedkd_jax.build import build_algorithm, build_data, build_epsilon, build_participation, checkpoint_folder, poison
from fedkd_jax.config import Experiment, MethodConfig, to_yaml
from fedkd_jax.page import render
from fedkd_jax.parallel import Layout
from fedkd_jax.tasks import Clients
from sims import common, hardware, placement
from sims.report import section_of

TABLES = ("table", "significance", "clients")
PLOTS = ("bars", "pareto", "spread", "client-bars", "thresholds")
RESULTS = [f"{name}.{ending}" for name in TABLES for ending in ("md", "csv")] + [f"{name}.png" for name in PLOTS]
RESULTS += ["results.jsonl", "results.csv", "results.parquet", "report.html", "remarks.txt"]


def baseline_of(config: Experiment) -> str | None:
    """The method whose traffic is 1.0x: the config's, or the first that is FedAvg of the teacher without compression.

    >>> baseline_of(Experiment()) is None
    True
    """
    plain = ("fedavg", "teacher", "identity", None)
    full = (n for n, m in config.methods.items() if (m.algorithm, m.model, m.codec, m.bits) == plain)
    return config.baseline or next(full, None)


def cell_of(config: Experiment, method: MethodConfig, seed: int, examples: str) -> str:
    """A digest of what decides the numbers of one method with one seed, but versions and devices, which each record tells.

    Args:
        config, method, seed: of the cell; the config's other methods and seeds, its names and folders are of no account.
        examples: what `fingerprint` says of data and checkpoint.

    >>> config = Experiment()
    >>> one = cell_of(config, MethodConfig(), 0, "data")
    >>> one == cell_of(dataclasses.replace(config, seeds=(0, 1)), MethodConfig(), 0, "data")
    True
    >>> one == cell_of(dataclasses.replace(config, rounds=5), MethodConfig(), 0, "data")
    False
    """
    data = dataclasses.replace(config.data, dir=None)
    alone = dataclasses.replace(
        config, name="", data=data, checkpoint=None, methods={"": method}, seeds=(seed,), baseline=None
    )
    return hashlib.sha256(f"{to_yaml(alone)}{examples}".encode()).hexdigest()[:16]


def fingerprint(config: Experiment, clients: Clients) -> str:
    """A digest of the examples, who holds them, and the checkpoint's weights.

    >>> config = Experiment()
    >>> len(fingerprint(config, build_data(config)))
    64
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((clients.train, clients.test)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    if config.checkpoint is not None:
        with (checkpoint_folder(config) / "model.safetensors").open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Runs all methods of the config with all seeds; returns the folder."""
    start = time.perf_counter()
    with common.one_line_errors():
        config, options = common.parse("compare", argv)
        hardware.make_devices(options.devices)  # some data are made with JAX
        clients = build_data(config)
        layout = placement.choose_layout(config, options, clients)
        build_participation(config)  # a file that is none is told now
        algorithms = {n: build_algorithm(config, m, clients, layout) for n, m in config.methods.items()}
        epsilons = {n: build_epsilon(config, m, algorithms[n], clients.size) for n, m in config.methods.items()}
        stores = placement.choose_stores(config, options, algorithms, clients)
        folder = common.run_folder(options, config.name)
    for name in RESULTS:  # of an earlier config, until this one's cells are finished
        (folder / name).unlink(missing_ok=True)
    common.write_config(folder, config)
    common.console.print(hardware.describe(layout, config.cohort or clients.size))
    common.console.print(
        f"{len(algorithms)} methods x {len(config.seeds)} seeds, {clients.size:,} clients, {config.rounds} rounds"
        f" -> {folder}"
    )
    common.tell_remarks(folder, clients)
    common.plot_clients(folder, clients)

    (cells := folder / "cells").mkdir(exist_ok=True)
    examples, versions, one_device = fingerprint(config, clients), hardware.versions(), Layout(chunk=layout.chunk)
    runs: dict[str, list[list[report.Record]]] = {name: [] for name in algorithms}
    others = set()
    with common.progress_bar() as progress:
        for name, method in config.methods.items():
            digests = {seed: cell_of(config, method, seed, examples) for seed in config.seeds}
            files = {seed: cells / f"{digest}.jsonl" for seed, digest in digests.items()}
            for seed, done in files.items():
                if done.exists():
                    progress.add_task(f"{name}, seed {seed}: done before", total=config.rounds, completed=config.rounds)
            left = [seed for seed, done in files.items() if not done.exists()]
            at_once = placement.seeds_layout(
                options, len(left), algorithms[name], clients, layout, config.participation
            )
            if options.seeds_at_once and len(left) > 1 and at_once is None:
                common.console.print(
                    f"{name}: its seeds run one by one, for want of memory, for more devices than seeds, or for eval_clients"
                )
            algorithm = algorithms[name] if at_once is None else build_algorithm(config, method, clients, one_device)
            for seeds in [[seed] for seed in left] if at_once is None else [left]:
                began, partials = time.perf_counter(), {seed: files[seed].with_suffix(".partial") for seed in seeds}
                for partial in partials.values():
                    partial.write_text("")

                def on_record(seed, record, began=began, partials=partials):
                    seconds = round((time.perf_counter() - began) / len(partials), 3)
                    common.append_jsonl(partials[seed], {**record, "seconds": seconds, **versions})

                label = f"{name}, seed{'s' if at_once else ''} {', '.join(map(str, seeds))}"
                with placement.open_store("device" if at_once else stores[name], folder) as store:
                    cohort = config.cohort or clients.size
                    group = None if store is None else placement.choose_group(options, algorithm, cohort)
                    found, epsilon = poison(config, method, clients), epsilons[name]
                    more: dict[str, Any] = dict(store=store, group=group, epsilon=epsilon)
                    common.run_method(config, algorithm, found, seeds, label, progress, on_record, at_once, **more)
                for seed, partial in partials.items():
                    partial.replace(files[seed])
            for seed, done in files.items():
                of_run = {"method": name, "seed": seed, "cell": digests[seed]}
                runs[name].append([of_run | record for record in common.read_jsonl(done)])
            others |= {key for run in runs[name] for record in run for key in versions if record[key] != versions[key]}
    if others:
        common.console.print(f"some cells were run with another {', '.join(sorted(others))}: see results.csv")

    (path := folder / "results.partial").write_text("")
    for record in (record for seeds in runs.values() for run in seeds for record in run):
        common.append_jsonl(path, record)
    path.replace(folder / "results.jsonl")
    tidy = report.tidy_rows(runs, list(versions))
    (folder / "results.csv").write_text(report.as_csv(tidy))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tidy), folder / "results.parquet")
    scores = clients.scores
    rows = report.table_rows(runs, baseline_of(config), scores)
    held_out = common.held_out(config)
    over = f"mean ± std over {len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    title = f"{config.name}: {held_out} {scores[-1]} after {config.rounds} rounds, {over}"
    common.console.print("", common.make_table(rows, title))
    common.write_table(folder, "table", rows)
    if len(config.seeds) > 1:
        known = [n for n, m in config.methods.items() if m.algorithm not in ("fedkd", "centralised")]
        known = known or list(config.methods)[:1]  # of ablations, the first
        baselines = [config.baseline] if config.baseline else known
        sure = report.significance_rows(runs, scores[-1], baselines)
        common.write_table(folder, "significance", sure)
        common.console.print("", common.make_table(sure, f"{config.name}: {common.SIGNIFICANCE}"))
    if clients.scored is not None and len(clients.scored) <= common.FEW_CLIENTS:
        each = report.client_rows(runs, scores[-1], clients.scored)
        common.console.print("", common.make_table(each, f"{config.name}: {scores[-1]} % of each client"))
        common.write_table(folder, "clients", each)
    section = section_of(folder)
    for name, (figure, _) in section.figures.items():
        if isinstance(figure, Figure):
            figure.savefig(folder / f"{name}.png", dpi=150)
    (folder / "report.html").write_text(render(config.name, [section]), encoding="utf-8")
    common.console.print(
        f"{time.perf_counter() - start:.0f} s; tables, figures, results, config and report.html: {folder}"
    )
    return folder


if __name__ == "__main__":
    main()
