"""One experiment: `python -m sims.run CONFIG [--method NAME] [--overrides]`.

Writes into a new folder runs/NAME-METHOD-N: config.yaml (resolved), metrics.jsonl, TensorBoard events, a picture of
the task's score (accuracy.png, f1.png, auc.png), clients.png (who holds what), table.md and table.csv, and remarks.txt where
there are any. `python -m sims.report FOLDER` makes a page of it.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import contextlib
import pathlib
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter

from fedkd_jax import plots, report
from fedkd_jax.build import build_algorithm, build_data, build_participation
from sims import common, hardware, placement


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Runs one method of the config; returns the folder."""
    with common.one_line_errors():
        config, options = common.parse("run", argv)
        name = options.method or next(iter(config.methods))
        method = config.methods[name]
        hardware.make_devices(options.devices)  # some data are made with JAX
        hardware.start_processes(options.processes)
        first = jax.process_index() == 0
        common.console.quiet = not first
        clients = build_data(config)
        layout = placement.choose_layout(config, options, clients)
        algorithm = build_algorithm(config, method, clients, layout)
        build_participation(config)  # a file that is none is told now
        where = placement.choose_stores(config, options, {name: algorithm}, clients)[name]
        if first:
            folder = common.run_folder(options, f"{config.name}-{name}".replace(" ", "-"))
        else:
            folder = pathlib.Path(options.out or "")
    multihost_utils.sync_global_devices("the folder is there")
    if first:
        common.write_config(folder, config)
        common.plot_clients(folder, clients)
        common.tell_remarks(folder, clients)
    common.console.print(hardware.describe(layout, config.cohort or clients.size))
    in_all = "" if clients.source else f", {len(clients.labels):,} {clients.unit} in all"
    common.console.print(
        f"{name}: {clients.size:,} clients with {int(np.min(clients.train.count))} to {int(np.max(clients.train.count))}"
        f" training examples{in_all} -> {folder}"
    )

    versions = hardware.versions()
    stored = placement.open_store(where, folder)
    events = SummaryWriter(str(folder)) if first else contextlib.nullcontext()
    with events as writer, common.progress_bar() as progress, stored as store:
        began, of_run = time.perf_counter(), {"method": name, "seed": config.seeds[0]}

        def on_record(_: int, record: dict) -> None:
            if writer is None:
                return
            spent = {"seconds": round(time.perf_counter() - began, 3)}
            if store is not None:
                spent["seconds_waiting"] = round(store.waited, 3)
            common.append_jsonl(folder / "metrics.jsonl", of_run | record | spent | versions)
            for key, value in record.items():
                if key != "round" and not isinstance(value, list):
                    writer.add_scalar(key, value, record["round"])

        seeds = config.seeds[:1]
        group = None if store is None else placement.choose_group(options, algorithm, config.cohort or clients.size)
        (records,) = common.run_method(
            config, algorithm, clients, seeds, name, progress, on_record, store=store, group=group
        )
        if store is not None:
            held = f"states of {len(store):,} clients, {report.human_bytes(store.nbytes)} ({where})"
            common.console.print(f"{held}; rounds waited {store.waited:.1f} s for them")
    common.console.print(f"peak memory {report.human_bytes(hardware.peak_memory_bytes())}")

    if not first:
        return folder
    rows, held_out = report.table_rows({name: [records]}, None, clients.scores), common.held_out(config)
    common.console.print("", common.make_table(rows, f"{config.name}, {held_out}, {config.rounds} rounds"))
    common.write_table(folder, "table", rows)
    if clients.scored is not None and len(clients.scored) <= common.FEW_CLIENTS:
        common.write_table(folder, "clients", report.client_rows({name: [records]}, clients.scores[-1], clients.scored))
    main = clients.scores[-1]
    plots.accuracy_plot({name: [records]}, folder / f"{main}.png", metric=main, split=held_out, title=config.name)
    common.console.print(f"config, metrics, events, plots and table: {folder}")
    return folder


if __name__ == "__main__":
    main()
