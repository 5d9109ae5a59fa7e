"""One experiment: `python -m sims.run CONFIG [--method NAME] [--overrides]`.

Writes into a new folder runs/NAME-METHOD-N: config.yaml (resolved), metrics.jsonl, TensorBoard events, a picture of
the task's score (accuracy.png, f1.png, auc.png), clients.png (who holds what), table.md and table.csv, and remarks.txt where
there are any. `python -m sims.report FOLDER` makes a page of it.

Its checkpoint is written while it runs (--save-rounds, --save-minutes) and at its end. After a kill, a full disk, Ctrl-C or
SIGTERM, which finish what runs and save, `python -m sims.run --resume FOLDER` goes on to the same numbers; with `--rounds N`
also a run that had ended.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import contextlib
import dataclasses
import logging
import os
import pathlib
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter

from fedkd_jax import Checkpoints, Stopped, Transport, plots, report
from fedkd_jax.build import build_algorithm, build_data, build_epsilon, build_participation, poison
from fedkd_jax.config import load_config
from sims import common, hardware, placement


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Runs one method of the config; returns the folder."""
    with common.one_line_errors():
        config, options = common.parse("run", argv)
        name = options.method or next(iter(config.methods))
        method, saved, were = config.methods[name], config, options
        if options.resume is not None:
            earlier = pathlib.Path(options.resume)
            saved, were = load_config(earlier / "config.yaml"), common.read_options(earlier)
            if were.method not in (None, name):
                raise ValueError(f"method is {name!r}; allowed: {were.method!r}, that of {earlier}")
            common.check_same(saved, config, name, earlier)
        hardware.make_devices(options.devices)  # some data are made with JAX
        hardware.start_processes(options.processes)
        first = jax.process_index() == 0
        common.console.quiet = not first
        clients = build_data(config)
        layout = placement.choose_layout(config, options, clients)
        transport = Transport() if options.wire else None
        algorithm = build_algorithm(config, method, clients, layout, wire=transport)
        epsilon = build_epsilon(config, method, algorithm, clients.size)
        build_participation(config)  # a file that is none is told now
        where = placement.choose_stores(config, options, {name: algorithm}, clients)[name]
        if first:
            folder = common.run_folder(options, f"{config.name}-{name}".replace(" ", "-"))
        else:
            folder = pathlib.Path(options.resume or options.out or "")
        saves = options.save_rounds is not None or options.save_minutes is not None
        cadence = dict(rounds=options.save_rounds, minutes=options.save_minutes, keep=options.keep)
        checkpoints = Checkpoints(folder / "checkpoint", **cadence) if saves else None
        done = 0 if checkpoints is None else checkpoints.latest() or 0
        if done > config.rounds:
            raise ValueError(f"rounds is {config.rounds}; allowed: at least {done}, as are done in {folder}")
        before = common.rewind_jsonl(folder / "metrics.jsonl", done) if first else 0.0
    multihost_utils.sync_global_devices("the folder is there")
    devices = layout.devices // jax.process_count()
    if first:
        resolved: dict[str, Any] = dict(method=name, store=where, devices=devices)
        if layout.chunk is not None:
            resolved["chunk"] = str(layout.chunk)
        common.write_options(folder, dataclasses.replace(options, **resolved))
        common.write_config(folder, config)  # with it there is something to resume
        common.plot_clients(folder, clients)
        common.tell_remarks(folder, clients)
    common.console.print(hardware.describe(layout, config.cohort or clients.size))
    in_all = "" if clients.source else f", {len(clients.labels):,} {clients.unit} in all"
    common.console.print(
        f"{name}: {clients.size:,} clients with {int(np.min(clients.train.count))} to {int(np.max(clients.train.count))}"
        f" training examples{in_all} -> {folder}"
    )
    if options.resume is not None:
        common.console.print(f"goes on after round {done}" if done else "no checkpoint yet: from the start")
        if config.rounds != saved.rounds:
            common.console.print(f"rounds is {config.rounds}, was {saved.rounds}: so long are schedules from here on")
        if hardware.unsettled(jax.default_backend(), os.environ.get("XLA_FLAGS", "")):
            common.console.print(
                "XLA_FLAGS has no --xla_gpu_deterministic_ops=true: from here on the same but for rounding"
            )
        if devices != were.devices is not None:
            common.console.print(f"devices is {devices}, was {were.devices}: from here on the same but for rounding")

    versions = hardware.versions()
    stored = placement.open_store(where, folder if checkpoints is None else checkpoints.folder, stays=saves)
    events = _events(folder, done + 1) if first else contextlib.nullcontext()
    stopping = contextlib.nullcontext([]) if checkpoints is None else common.stop_on_signals(checkpoints)
    with contextlib.ExitStack() as stack:
        writer, progress = stack.enter_context(events), stack.enter_context(common.progress_bar())
        store, signals = stack.enter_context(stored), stack.enter_context(stopping)
        began, of_run = time.perf_counter() - before, {"method": name, "seed": config.seeds[0]}

        def on_record(_: int, record: dict) -> None:
            if writer is None:
                return
            spent = {"seconds": round(time.perf_counter() - began, 3)}
            if store is not None:
                spent["seconds_waiting"] = round(store.waited, 3)
            if transport is not None:
                record |= transport.measured(clients.size)
            common.append_jsonl(folder / "metrics.jsonl", of_run | record | spent | versions)
            for key, value in record.items():
                if key != "round" and not isinstance(value, list):
                    writer.add_scalar(key, value, record["round"])

        seeds = config.seeds[:1]
        group = None if store is None else placement.choose_group(options, algorithm, config.cohort or clients.size)
        more: dict[str, Any] = dict(store=store, group=group, checkpoints=checkpoints, epsilon=epsilon)
        again = f"it goes on with\npython -m sims.run --resume {shlex.quote(str(folder))}"
        found = poison(config, method, clients)
        try:
            (records,) = common.run_method(config, algorithm, found, seeds, name, progress, on_record, **more)
        except Stopped as stopped:
            progress.stop()
            common.console.print(f"stopped after round {stopped.round} of {config.rounds}, which is saved; {again}")
            sys.exit(128 + signals[0] if signals else 1)
        except OSError as error:
            progress.stop()
            sys.exit(f"error: {error}" + (f"; {again}" if saves else ""))
        if store is not None:
            held = f"states of {len(store):,} clients, {report.human_bytes(store.nbytes)} ({where})"
            common.console.print(f"{held}; rounds waited {store.waited:.1f} s for them")
        if transport is not None:
            records[-1] |= transport.measured(clients.size)
            common.console.print(transport.summary(records[-1]["bytes_per_client"] * clients.size))
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
    common.console.print(f"config, metrics, events, plots, table{' and checkpoint' if saves else ''}: {folder}")
    return folder


@contextlib.contextmanager
def _events(folder: pathlib.Path, first: int) -> Iterator[SummaryWriter]:
    """For TensorBoard, from round `first` on."""
    writer = SummaryWriter(str(folder), purge_step=first)
    try:
        yield writer
    finally:
        with contextlib.suppress(OSError):  # a full disk is told by who needs it
            writer.close()


def _tell_once() -> None:
    """For a program: of a file that could not be written Orbax, TensorStore and tensorboardX print hundreds of lines beside
    what they raise, which the program ends with."""
    unraisable, in_thread = sys.unraisablehook, threading.excepthook

    def of_tensorboard(x: object) -> bool:
        return (getattr(x, "__module__", None) or "").startswith("tensorboardX")

    def is_told(args: Any) -> bool:
        return of_tensorboard(args.object) or str(args.exc_value) == "Event loop is closed"  # TensorStore's

    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    sys.unraisablehook = lambda args: None if is_told(args) else unraisable(args)
    threading.excepthook = lambda args: None if of_tensorboard(args.thread) else in_thread(args)


if __name__ == "__main__":
    _tell_once()
    main()
