"""`python -m sims.bench scale`: rounds of FedKD as in configs/million.yaml, with more clients, larger cohorts, more devices,
and cohorts in groups.

One thing is varied at a time, with clients' states on the device, in host memory and on disk. The clients are those of
`synthetic(N)`: where states are in a store, a cohort's examples are made when its turn comes; on the device, those of all N are
there from the start, and so are their states. Populations that would take a quarter of the memory are not tried there.
What is compared runs in turns in one process, each from the state where its last turn left it:

ms a round, clients/s  medians over the rounds of all turns but the first, which compiles, and in these but the first round.
                       Short rounds are timed several at once, as far as a second goes
waited                 share of that time in which the device waited for clients' states
MB moved               client states read and written in a round. A client that takes part for the first time has no row yet
                       and is not read: of a million, nearly all
of limit               the least that local steps could take, as a share of the round: the longer of all their matrix products
                       at the rate of the same products alone, and of parameters, gradients and optimiser states read and
                       written at every step at the rate at which as many bytes of a client are, in a cache if they fit. Both
                       rates are measured in the same turns, on as many devices. Compression is not counted in it.
MB host, device, disk  the most that a process of its own held in as many rounds, with JAX itself but with programs that are
                       compiled already; of the device where it tells (a CPU's memory is the host's); and the size of the
                       file, which is in the folder that the program runs in, and which the system buffers

scale.png shows the speed against population and cohort. It all takes half an hour on two cores; `--resume FOLDER` goes on after
the groups that were finished.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import collections
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from fedkd_jax import DiskStore, HostStore, energy_threshold, fedkd, mlp, mutual_distillation, simulate, svd_codec
from fedkd_jax.algorithms.fedkd import mutual_step
from fedkd_jax.data import synthetic
from fedkd_jax.plots import MARKERS, STYLES
from fedkd_jax.types import Algorithm, Batch
from sims import hardware, limits
from sims.workload import make_layout

TEACHER, STUDENT = mlp((60, 256, 40, 10)), mlp((60, 64, 10))
TEACHER_OPTIMIZER = optax.adam(1e-3)
STUDENT_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
BATCH, EPOCHS = 10, 5
POPULATIONS = (10**3, 10**4, 10**5, 10**6)
STORES = ("device", "host", "disk")
SOURCE = functools.cache(synthetic)  # one compilation for all cases of a population
STEPS = 15  # of a client in a round, about: for the rates
MEMORY = ("MB host", "MB device", "MB disk")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run.

    >>> Case(1000, 64, "host", 1).cohort
    64
    """

    population: int
    cohort: int
    store: str
    devices: int
    group: int | None = None  # of a cohort's states that are on the devices at a time


@functools.cache
def make_algorithm(devices: int) -> Algorithm:
    """FedKD of `configs/million.yaml`.

    >>> make_algorithm(1).init_clients(jax.random.key(0), jnp.arange(2)).teacher["dense_0"]["kernel"].shape
    (2, 60, 256)
    """
    codec = svd_codec(energy_threshold(0.95, 0.98, rounds=200))
    return fedkd(
        TEACHER,
        STUDENT,
        example=np.ones((1, 60), np.float32),
        teacher_optimizer=TEACHER_OPTIMIZER,
        student_optimizer=STUDENT_OPTIMIZER,
        batch=BATCH,
        epochs=EPOCHS,
        uplink=codec,
        downlink=codec,
        layout=make_layout(devices),
    )


class Run:
    """A case that goes on at each call, and what was seen of its rounds: all cohorts and their examples, and times.

    >>> Run(Case(50, 4, "host", 1), tempfile.mkdtemp()).cohorts.shape
    (0, 4)
    """

    def __init__(self, case: Case, folder: str):
        self.case, self.algorithm, source = case, make_algorithm(case.devices), SOURCE(case.population)
        self.store = {"device": lambda: None, "host": HostStore, "disk": lambda: DiskStore(folder)}[case.store]()
        self.data: Any = source.take(np.arange(case.population)) if self.store is None else source
        self.state: Any = None
        self.cohorts = self.counts = np.zeros((0, case.cohort), np.int32)
        self.seconds: list[float] = []  # of each round
        self.waited = 0.0  # of these, in all

    def __call__(self, rounds: int) -> None:
        stamps = []

        def on_rounds(done, _):
            stamps.append((time.perf_counter(), done, 0.0 if self.store is None else self.store.waited))

        self.state, history = simulate(
            self.algorithm,
            self.state or self.case.population,
            self.data,
            jax.random.key(0),
            rounds=rounds,
            cohort=self.case.cohort,
            store=None if self.state else self.store,
            group=self.case.group,
            on_rounds=on_rounds,
        )
        self.cohorts = np.concatenate([self.cohorts, history.rounds.ids])
        self.counts = np.concatenate([self.counts, history.rounds.weight])
        for (start, a, before), (end, b, after) in itertools.pairwise(stamps):
            self.seconds += [(end - start) / (b - a)] * (b - a)
            self.waited += after - before

    def forget(self) -> None:
        """The times so far, which compilation is in."""
        self.seconds, self.waited = [], 0.0


def rows_moved(cohorts: np.ndarray) -> float:
    """Rows that a store reads and writes in a round, on average over the rounds `[R, K]` since it was empty: those who take
    part are written; read are those who have a row, but for those of the round before.

    >>> rows_moved(np.array([[0, 1], [1, 2], [0, 3]]))  # 2 + 0, 2 + 0, 2 + 1
    2.3333333333333335
    """
    seen, last, moved = set(), set(), 0
    for ids in map(set, cohorts.tolist()):
        moved += len(ids) + len((ids & seen) - last)
        seen, last = seen | ids, ids
    return moved / len(cohorts)


def step_needs() -> tuple[collections.Counter[limits.Product], int]:
    """The matrix products of a local step, and how many bytes it reads and writes.

    >>> products, size = step_needs()
    >>> sum(p.flops * n for p, n in products.items()), size > 32 * 26_306  # parameters, gradients and two moments, twice
    (1598400, True)
    """
    state = jax.eval_shape(make_algorithm(1).init_clients, jax.random.key(0), jnp.arange(1))
    one = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)  # noqa: E731
    teacher, projection = one(state.teacher), one(state.projection)
    student = jax.eval_shape(STUDENT.init, jax.random.key(0))
    batch = Batch(inputs=jnp.ones((BATCH, 60)), labels=jnp.zeros(BATCH, int), mask=jnp.ones(BATCH, bool))
    apply = lambda model: lambda p: model.apply(p, batch.inputs)  # noqa: E731
    step = lambda *p: mutual_step(apply(TEACHER), apply(STUDENT), mutual_distillation, p, batch)[0]  # noqa: E731
    size = limits.step_bytes((teacher, projection), one((state.teacher_opt, state.projection_opt)))
    size += limits.step_bytes(student, jax.eval_shape(STUDENT_OPTIMIZER.init, student))
    return limits.products_of(step, teacher, projection, student), size


def measure_memory(case: Case, turns: int, rounds: int) -> dict[str, float | None]:
    """Megabytes that this process has held at most after so many turns of so many rounds; run by a process of its own."""
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-scale-") as folder:
        run = Run(case, folder)
        for _ in range(turns):
            run(rounds)
        devices = [device.memory_stats() or {} for device in jax.devices()[: case.devices]]
        known = all("peak_bytes_in_use" in stats for stats in devices)
        host, disk = hardware.peak_memory_bytes() / 1e6, None
        device = sum(stats["peak_bytes_in_use"] for stats in devices) / 1e6 if known else None
        if isinstance(run.store, DiskStore):
            disk = run.store.path.stat().st_size / 1e6
            run.store.close()
        return dict(zip(MEMORY, (host, device, disk), strict=True))


def memory_of(case: Case, turns: int, rounds: int, cache: str) -> dict[str, float | None]:
    """`measure_memory` in a process of its own; `cache` is a folder for what they all compile."""
    # on an accelerator this process holds most of the memory already
    more = {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    argv = [sys.executable, "-m", "sims.bench_scale", json.dumps(dataclasses.asdict(case)), str(turns), str(rounds)]
    done = subprocess.run(argv, env=os.environ | more, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def groups(devices: int, quick: bool) -> dict[str, list[Case]]:
    """What is compared with what: cases that differ in one thing and in where states are.

    >>> {varied: sum(case.store == "disk" for case in cases) for varied, cases in groups(2, quick=False).items()}
    {'population': 4, 'devices': 2, 'group': 4, 'cohort': 3}
    """
    populations, cohorts, cohort = ((10**3, 10**4), (16, 64), 16) if quick else (POPULATIONS, (64, 256, 1024), 256)
    row_bytes = limits.nbytes(jax.eval_shape(make_algorithm(1).init_clients, jax.random.key(0), jnp.arange(1)))
    # twice: `simulate` copies the state that it goes on from
    fitting = [n for n in populations if n == populations[0] or 2 * n * row_bytes <= hardware.memory_bytes() / 4]
    sizes = {"device": fitting, "host": populations, "disk": populations}
    base = {store: min(sizes[store][-1], 10**5) for store in STORES}
    compared = {
        "population": [Case(n, cohort, store, devices) for store in STORES for n in sizes[store]],
        "devices": [Case(base[s], cohort, s, d) for s in STORES for d in sorted({1, devices})],
        "group": [
            Case(base["disk"], cohorts[-1], "disk", devices, g) for g in (None, *(cohorts[-1] // n for n in (2, 4, 8)))
        ],
        "cohort": [Case(base[s], k, s, devices) for s in STORES for k in cohorts if k <= base[s]],
    }
    return {varied: cases for varied, cases in compared.items() if not quick or varied not in ("devices", "group")}


def bench_scale(devices: int, quick: bool, done: Sequence[dict] = ()) -> Iterator[dict]:
    """A row per case, group by group; with `quick`, one process tells of memory. A group whose rows are all in `done` is not
    measured again."""
    turns, clients = (1, 96) if quick else (3, 1024)  # trained in a turn, about
    before = jax.config.values["jax_compilation_cache_dir"]
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        try:
            for varied, cases in groups(devices, quick).items():
                if len(earlier := [row for row in done if row["varied"] == varied]) == len(cases):
                    yield from earlier
                    continue
                with tempfile.TemporaryDirectory(dir=".", prefix="bench-scale-") as folder:
                    runs = [Run(case, f"{folder}/{i}") for i, case in enumerate(cases)]
                    times = take_turns(runs, turns, clients)
                    speeds = [speed(run, least_seconds(times, run.case)) for run in runs]
                    for run in runs:
                        if run.store is not None:
                            run.store.close()
                    del runs, run  # what they hold is memory that the next processes need
                for i, case in enumerate(cases):
                    known = not quick or (varied == "population" and i == 0)
                    each = rounds_of(case, clients)
                    memory = memory_of(case, 1 + turns, each, cache) if known else dict.fromkeys(MEMORY)
                    yield {"varied": varied, **speeds[i], **memory}
        finally:
            jax.config.update("jax_compilation_cache_dir", before)


def rounds_of(case: Case, clients: int) -> int:
    """Rounds of a turn that trains about so many clients.

    >>> rounds_of(Case(1000, 64, "host", 1), 640), rounds_of(Case(1000, 512, "host", 1), 640)
    (10, 4)
    """
    return max(4, clients // case.cohort)


def take_turns(runs: list[Run], turns: int, clients: int) -> dict[Any, list[float]]:
    """So many turns of all runs and their `rate_programs` after one that does not count; returns the times of the programs."""
    sizes = dict.fromkeys((run.case.cohort, run.case.devices) for run in runs)
    programs = {(*size, i): program for size in sizes for i, program in enumerate(rate_programs(*size))}
    times = {name: [] for name in programs}
    for turn in range(1 + turns):
        for run in runs:
            run(rounds_of(run.case, clients))
        for _, (name, program) in itertools.product(range(3), programs.items()):
            start = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - start)
        if turn == 0:
            times = {name: [] for name in programs}
            for run in runs:
                run.forget()
    return times


@functools.cache
def rate_programs(cohort: int, devices: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The matrix products alone, and the reads and writes alone, of `STEPS` local steps of each client of a cohort.

    >>> [out().shape for out in rate_programs(2, 1)]
    [(2,), (2,)]
    """
    (products, size), layout = step_needs(), make_layout(devices)
    multiply = limits.multiply(products, cohort, STEPS, layout)
    return multiply, limits.sweep(size // 2, cohort, STEPS, layout)


def least_seconds(times: dict[Any, list[float]], case: Case) -> float:
    """What a local step takes at least, as one of a cohort's, from the times of its `rate_programs`.

    >>> least_seconds({(2, 1, 0): [3.0, 4.0, 3.0], (2, 1, 1): [1.0]}, Case(9, 2, "host", 1)) == 3.0 / (2 * STEPS)
    True
    """
    longest = max(statistics.median(times[case.cohort, case.devices, i]) for i in range(2))
    return longest / (case.cohort * STEPS)


def speed(run: Run, least: float) -> dict[str, Any]:
    """What a row says of time, where a local step takes `least` seconds at least.

    >>> run = Run(Case(50, 4, "device", 1), tempfile.mkdtemp())
    >>> run.seconds, run.cohorts, run.counts = [0.5], np.zeros((1, 4)), np.array([[25, 25, 30, 20]])
    >>> row = speed(run, 1e-3)  # 5 epochs of 3, 3, 3 and 2 steps
    >>> row["clients/s"], round(row["of limit"], 6)
    (8.0, 0.11)
    """
    seconds = statistics.median(run.seconds)
    steps = float(EPOCHS * np.ceil(run.counts / BATCH).sum()) / len(run.counts)
    return {
        **dataclasses.asdict(run.case),
        "rounds": len(run.cohorts),
        "ms a round": 1e3 * seconds,
        "clients/s": run.case.cohort / seconds,
        "waited": None if run.store is None else run.waited / sum(run.seconds),
        "MB moved": 0.0 if run.store is None else rows_moved(run.cohorts) * run.store.row_bytes / 1e6,
        "of limit": least * steps / seconds,
    }


def plot(rows: list[dict]) -> Figure:
    """Clients per second and time of a round, against population and cohort, a line for each store.

    >>> row = {"varied": "cohort", "population": 9, "cohort": 4, "store": "host", "clients/s": 2.0, "ms a round": 2e3}
    >>> [axis.get_xlabel() for axis in plot([row, row | {"varied": "population"}]).axes][2:]
    ['clients N', 'clients in a round K']
    """
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (varied, label) in enumerate((("population", "clients N"), ("cohort", "clients in a round K"))):
        shown = [row for row in rows if row["varied"] == varied]
        for i, store in enumerate(STORES):
            own = [row for row in shown if row["store"] == store]
            fixed = {row["population"] if varied == "cohort" else row["cohort"] for row in own}
            name = f"{store}, {'N' if varied == 'cohort' else 'K'} = {max(fixed, default=0):,}"
            for ax, value in zip(axes[:, column], ("clients/s", "ms a round"), strict=True):
                style = {"color": f"C{i}", "linestyle": STYLES[i], "marker": MARKERS[i], "markersize": 5}
                ax.plot([row[varied] for row in own], [row[value] for row in own], label=name, **style)
        ticks = sorted({row[varied] for row in shown})
        axes[1, column].set(xlabel=label, xscale="log", xticks=ticks, xticklabels=[f"{n:,}" for n in ticks])
        axes[1, column].xaxis.set_minor_locator(NullLocator())
        axes[1, column].legend(title="clients' states", fontsize=8)
    axes[0, 0].set(ylabel="client updates per second", ylim=(0, 1.1 * max(row["clients/s"] for row in rows)))
    axes[1, 0].set(ylabel="ms a round", yscale="log")
    axes[1, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1, 0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes[1, 0].yaxis.set_minor_formatter(NullFormatter())
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    wanted = Case(**json.loads(sys.argv[1]))
    hardware.make_devices(wanted.devices)
    print(json.dumps(measure_memory(wanted, *map(int, sys.argv[2:]))))
