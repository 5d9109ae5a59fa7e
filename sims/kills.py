"""`python -m sims.kills [CONFIG] [--count 100]`: kills runs at random moments, has them go on, and compares.

For each store a run of `sims.run` ends undisturbed that has a journal of every round and checkpoints by Orbax as often as it
lets itself. The same run, begun anew, is killed (SIGKILL) at a random moment and resumed, again and again; when it comes to
its end all of it must be the same to the bit: the states of server and clients, what happened in each round, each evaluation,
the metrics. Then it begins anew, until there were so many kills. Nine of ten moments are drawn from the time in which rounds
run and checkpoints are written, one from the start. After a quarter of the kills the journal is deleted, which is what a
start of the machine does to it.
"""

import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedkd_jax import load_state
from fedkd_jax.build import build_algorithm, build_data
from fedkd_jax.config import load_config
from sims import common, hardware, placement

STARTING = 0.1  # the share of kills before the first round is done
REBOOTS = 0.25  # so many kills are followed by what a start of the machine does: the journal counts no more


@dataclasses.dataclass(frozen=True)
class Kills:
    """What is killed, and how often.

    >>> Kills().count
    100
    """

    config: tyro.conf.Positional[str] = "configs/digits.yaml"
    method: str = "FedKD"
    count: int = 100  # kills, over all stores
    rounds: int = 12
    stores: tuple[str, ...] = ("device", "host", "disk")
    seed: int = 0  # of the moments
    flags: tuple[str, ...] = ()  # more for sims.run


def command(options: Kills, store: str, folder: pathlib.Path) -> list[str]:
    """Begins the run, or goes on with it.

    >>> command(Kills(), "disk", pathlib.Path("nowhere"))[-4:]
    ['--save-minutes', '0', '--out', 'nowhere']
    """
    begin = [sys.executable, "-m", "sims.run"]
    if (folder / "config.yaml").exists():
        return [*begin, "--resume", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)  # killed before it had begun
    flags = ["--method", options.method, "--rounds", str(options.rounds), "--eval-every", "3", "--store", store]
    saves = ["--save-rounds", "1", "--save-minutes", "0", "--out", str(folder)]
    return [*begin, options.config, *flags, *options.flags, *saves]


def changed(path: pathlib.Path) -> float:
    """When a file was changed, 0 if it is not there.

    >>> changed(pathlib.Path("nowhere"))
    0.0
    """
    return path.stat().st_mtime if path.exists() else 0.0


def run_until(argv: list[str], folder: pathlib.Path, env: dict, moment: float | None, starting: bool) -> float | None:
    """Runs it, kills it so many seconds after its first round, or its start; returns how long it took after that, None if it
    was killed.

    Raises:
        RuntimeError: it failed by itself.
    """
    rows = folder / "checkpoint" / "rounds.bin"
    before = changed(rows)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(argv, env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not starting and changed(rows) == before:
                time.sleep(0.002)
            begun = time.monotonic()
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                return None
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}: {said.read()[-2000:]}")
    return time.monotonic() - begun


def results(folder: pathlib.Path) -> dict[str, object]:
    """All that a run has come to: arrays, and records."""
    config, saved = load_config(folder / "config.yaml"), common.read_options(folder)
    clients, checkpoint = build_data(config), folder / "checkpoint"
    layout = placement.choose_layout(config, saved, clients)
    algorithm = build_algorithm(config, config.methods[saved.method or ""], clients, layout)
    state = load_state(checkpoint, algorithm, clients.size, jax.random.key(config.seeds[0]))
    found: dict[str, object] = {f"state {i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    found["rounds"] = np.fromfile(checkpoint / "rounds.bin", np.uint8)
    for path in checkpoint.glob("evaluation-*.npz"):
        with np.load(path) as file:
            found |= {f"{path.name} {name}": value for name, value in file.items()}
    timeless = [
        {k: v for k, v in r.items() if not k.startswith("seconds")} for r in common.read_jsonl(folder / "metrics.jsonl")
    ]
    return found | {"metrics": timeless, "table": (folder / "table.csv").read_text()}


def differ(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """What is not the same to the bit.

    >>> differ({"a": np.array([np.nan]), "b": 1}, {"a": np.array([np.nan]), "b": 2})
    ['b']
    """

    def bits(x):
        return (x.dtype.str, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else repr(x)

    return [
        name
        for name in {**one, **other}
        if name not in one or name not in other or bits(one[name]) != bits(other[name])
    ]


def kill_runs(options: Kills, store: str, count: int, where: pathlib.Path, progress: Progress) -> dict[str, str]:
    """A row of the table: so many kills of runs with one store."""
    draw = random.Random(f"{options.seed} {store}")
    env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(where / "cache"))
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    whole = where / f"{store}-whole"
    task = progress.add_task(f"{store}: in one piece", total=count)
    for attempt in range(2):  # the second finds what is not a journal's compiled: so long does a run take
        folder = whole if attempt == 0 else where / f"{store}-again"
        seconds = run_until(command(options, store, folder), folder, env, None, False) or 0.0
    expected, kills, in_save, ended, reboots = results(whole), 0, 0, 0, 0
    wrong = differ(expected, results(folder))
    folder = where / f"{store}-0"
    progress.update(task, description=store)
    while kills < count or folder.exists():
        starting = draw.random() < STARTING
        moment = None if kills >= count else draw.uniform(0, 8.0 if starting else seconds)
        if run_until(command(options, store, folder), folder, env, moment, starting) is None:
            kills += 1
            in_save += any((folder / "checkpoint").glob("**/*tmp*"))
            if draw.random() < REBOOTS:
                reboots += 1
                for path in (folder / "checkpoint").glob("journal-*.bin"):
                    path.unlink()
            progress.update(task, completed=kills)
            continue
        wrong += differ(expected, results(folder))
        ended += 1
        folder = where / f"{store}-{ended}"
    return {
        "store": store,
        "kills": str(kills),
        "within a save": str(in_save),
        "without a journal": str(reboots),
        "ends compared": str(ended),
        "differences": ", ".join(wrong) or "0",
    }


def main(argv: list[str] | None = None) -> list[dict[str, str]]:
    """Kills as often as asked for; returns the rows of the table."""
    options = tyro.cli(Kills, args=argv, prog="python -m sims.kills")
    hardware.make_devices(None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with tempfile.TemporaryDirectory(prefix="kills-") as where, Progress(*columns, console=common.console) as progress:
        for i, store in enumerate(options.stores):
            count = options.count // len(options.stores) + (i < options.count % len(options.stores))
            rows.append(kill_runs(options, store, count, pathlib.Path(where), progress))
    common.console.print(common.make_table(rows, f"{options.count} kills of {options.method}, {options.config}"))
    if any(row["differences"] != "0" for row in rows):
        sys.exit("error: a run that was killed and went on has other results than one in one piece")
    return rows


if __name__ == "__main__":
    main()
