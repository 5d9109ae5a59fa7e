"""How fast a round is: `python -m sims.bench NAME [--quick] [--devices D]`, NAME one of

round       what a round's time goes to, part by part, and the least that each part could take: see bench_round.py
scale       populations, cohorts and devices, clients' states on the device, in host memory and on disk: see bench_scale.py
loop        client updates per second of the compiled round and of a Python loop over clients with jitted steps
compression the share of FedKD's round that the SVD codec takes
layout      cohorts of 1 to 256 on one or all devices in chunks of several sizes; what the automatic choice loses
population  a round of 100 clients out of 1,000 and out of 20,000
compile     seconds to trace and to compile a round
svd         the factorisations against `jnp.linalg.svd`, on matrices of real training: see bench_svd.py; 40 minutes
text        training steps of transformers against their matrix products alone, and what clients hold: see bench_text.py

Work of all but scale, svd and text: 100 random examples a client, one epoch of batch 10, SGD; "mlp" is 64-128-10 and "cnn" two
5 x 5 convolutions of 32 and 64 channels and a dense layer of 512. FedKD has the same network as teacher and as student, the
hidden loss with its projection, and the SVD codec both ways. What is compared runs interleaved in one process, compilation
apart; figures are medians. "CPU ms" is processor time per client update, over all threads: it does not move when other
programs run.

The table grows as results come; they are also written to results.json in a new folder runs/bench-NAME-N; scale and svd
also plot.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.live import Live

from fedkd_jax import mutual_distillation, simulate
from fedkd_jax.algorithms.fedavg import task_step
from fedkd_jax.algorithms.fedkd import mutual_step
from fedkd_jax.cohort import client_key
from fedkd_jax.local import permutation
from fedkd_jax.losses import cross_entropy
from fedkd_jax.parallel import Layout, place
from fedkd_jax.types import Batch, ServerState
from sims import bench_round, bench_scale, bench_svd, bench_text, common, hardware
from sims.workload import BATCH, CODEC, EXAMPLES, MODELS, SGD, interleave, make_algorithm, make_data, make_layout


class CompiledRound:
    """A round of the library, compiled; each call runs one and returns the server.

    >>> CompiledRound("FedAvg", "mlp", 2, Layout())().params["dense_1"]["bias"].shape
    (10,)
    """

    def __init__(self, method: str, kind: str, cohort: int, layout: Layout):
        algorithm, key, ids = make_algorithm(method, kind, layout), jax.random.key(0), jnp.arange(cohort)
        split = ("clients",) if cohort % layout.devices == 0 else ()
        self.clients = place(jax.jit(algorithm.init_clients)(key, ids), layout, *split)
        self.server = place(algorithm.init_server(key), layout)
        self.rest = place((make_data(kind, cohort), ids, key), layout)
        start = time.perf_counter()
        lowered = jax.jit(algorithm.round, donate_argnums=(0, 1)).lower(self.server, self.clients, *self.rest)
        traced = time.perf_counter()
        self.run = lowered.compile()
        self.seconds = {"trace": traced - start, "compile": time.perf_counter() - traced}

    def __call__(self) -> ServerState:
        self.server, self.clients, _ = jax.block_until_ready(self.run(self.server, self.clients, *self.rest))
        return self.server


class PythonLoop:
    """The same mathematics as a Python loop over clients and batches, every step and every codec call compiled.

    >>> loop, compiled = PythonLoop("FedKD", "mlp", 2)(), CompiledRound("FedKD", "mlp", 2, Layout())()
    >>> [bool(jnp.allclose(a, b, atol=1e-5)) for a, b in zip(*map(jax.tree.leaves, (loop.params, compiled.params)))]
    [True, True, True, True]
    """

    def __init__(self, method: str, kind: str, cohort: int):
        algorithm, self.key = make_algorithm(method, kind, Layout()), jax.random.key(0)
        self.server, self.data, self.distils = (
            algorithm.init_server(self.key),
            make_data(kind, cohort),
            method != "FedAvg",
        )
        stacked = algorithm.init_clients(self.key, jnp.arange(cohort))
        self.clients: list[tuple] = [
            (c.teacher, c.projection) for c in (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(cohort))
        ]
        model, _ = MODELS[kind]

        def step(params, batch):
            if not self.distils:
                (params, _), _ = task_step(model, SGD, cross_entropy, {}, (params, SGD.init(params)), batch, self.key)
                return params
            apply = lambda p: model.apply(p, batch.inputs)  # noqa: E731
            gradients, _ = mutual_step(apply, apply, mutual_distillation, params, batch)
            return optax.apply_updates(params, SGD.update(gradients, SGD.init(params), params)[0])

        def order(round, i):
            local_key, _ = jax.random.split(client_key(self.key, round, i))
            return permutation(jax.random.fold_in(jax.random.split(local_key)[0], 0), EXAMPLES, EXAMPLES)

        def through_codec(update, round):
            return CODEC.decode(CODEC.encode(update, round, self.key)) if method == "FedKD" else update

        self.step, self.order, self.through_codec = jax.jit(step), jax.jit(order), jax.jit(through_codec)
        self.add, self.subtract = (jax.jit(lambda a, b, f=f: jax.tree.map(f, a, b)) for f in (jnp.add, jnp.subtract))

    def __call__(self) -> ServerState:
        old, round, total = self.server.params, self.server.round, None
        for i, private in enumerate(self.clients):
            rows = self.data.start[i] + np.asarray(self.order(round, i))
            params = (*private, old) if self.distils else old
            for batch in np.split(rows, EXAMPLES // BATCH):
                mini = Batch(inputs=self.data.inputs[batch], labels=self.data.labels[batch], mask=np.ones(BATCH, bool))
                params = self.step(params, mini)
            if self.distils:
                teacher, projection, params = params
                self.clients[i] = (teacher, projection)
            sent = self.through_codec(self.subtract(params, old), round)
            total = sent if total is None else self.add(total, sent)
        mean = jax.tree.map(lambda x: x / len(self.clients), total)
        params = self.add(old, self.through_codec(mean, round))
        self.server = jax.block_until_ready(dataclasses.replace(self.server, params=params, round=round + 1))
        return self.server


def row(method: str, clients: int, name: str, times: dict[str, float], more: dict) -> dict:
    """
    >>> row("FedAvg mlp", 10, "loop", {"wall": 0.5, "cpu": 0.1}, {})["updates/s"]
    20.0
    """
    rate, cpu = clients / times["wall"], 1e3 * times["cpu"] / clients
    return {"method": method, "clients": clients, "as": name, "updates/s": rate, **more, "CPU ms": cpu}


def layout_name(layout: Layout, cohort: int) -> str:
    """
    >>> layout_name(Layout(chunk=8), 12)
    '1 x 6'
    """
    return f"{layout.devices} x {layout.groups(cohort)[1]}"


def bench_loop(devices: int, quick: bool) -> Iterator[dict]:
    """The compiled round as it is laid out by default, on one device, and the Python loop."""
    for kind, cohort, repeats in (("mlp", 100, 7), ("cnn", 20, 3)):
        cohort, repeats = (max(cohort // 10, 2), 2) if quick else (cohort, repeats)
        for method in ("FedAvg", "FedKD", "FedKD without SVD"):
            programs: dict[str, Callable] = {
                f"{d} device(s)": CompiledRound(method, kind, cohort, make_layout(d)) for d in sorted({1, devices})
            }
            programs["Python loop"] = PythonLoop(method, kind, cohort)
            times = interleave(programs, repeats)
            loop = times["Python loop"]["wall"]
            for name, t in times.items():
                yield row(f"{method} {kind}", cohort, name, t, {"x loop": loop / t["wall"]})


def bench_compression(devices: int, quick: bool) -> Iterator[dict]:
    """FedKD's round with `svd_codec` both ways and with none, in turns: what share of it compression takes."""
    for kind, cohort, repeats in (("mlp", 100, 25), ("cnn", 20, 5)):
        cohort, repeats = (max(cohort // 10, 2), 2) if quick else (cohort, repeats)
        layout = make_layout(devices)
        programs: dict[str, Callable] = {
            name: CompiledRound(name, kind, cohort, layout) for name in ("FedKD", "FedKD without SVD")
        }
        ms = {name: 1e3 * t["wall"] for name, t in interleave(programs, repeats).items()}
        both, alone = ms["FedKD"], ms["FedKD without SVD"]
        yield {"method": f"FedKD {kind}", "clients": cohort, "ms": both, "ms without": alone, "share": 1 - alone / both}


def bench_layout(devices: int, quick: bool) -> Iterator[dict]:
    """Every cohort in layouts "devices x chunk"; "of best" is the rate as a share of that cohort's best."""
    for kind, method, cohorts in (
        ("mlp", "FedAvg", (1, 4, 16, 64, 256)),
        ("mlp", "FedKD", (1, 4, 16, 64, 256)),
        ("cnn", "FedAvg", (1, 4, 16)),
        ("cnn", "FedKD", (1, 4)),
    ):
        for cohort in cohorts[:2] if quick else cohorts:
            choices = [make_layout(d, c) for d in sorted({1, min(devices, cohort)}) for c in (1, 8, cohort)]
            layouts = {layout_name(layout, cohort): layout for layout in choices}
            layouts["automatic"] = make_layout(min(devices, cohort))
            programs: dict[str, Callable] = {
                name: CompiledRound(method, kind, cohort, layout) for name, layout in layouts.items()
            }
            times = interleave(programs, 2 if quick else 7 if kind == "mlp" else 3)
            best = min(t["wall"] for t in times.values())
            for name, t in times.items():
                yield row(f"{method} {kind}", cohort, name, t, {"of best": best / t["wall"]})


def bench_population(devices: int, quick: bool) -> Iterator[dict]:
    """Rounds of one `simulate`, in turns for two population sizes, whose states it goes on from."""
    cohort, rounds, repeats = (10, 4, 1) if quick else (100, 20, 3)
    for method in ("FedAvg", "FedKD"):
        algorithm, states, data, times = make_algorithm(method, "mlp", make_layout(devices)), {}, {}, {}
        for size in (1_000, 20_000):
            data[size], states[size], times[size] = make_data("mlp", size), size, []
        for _ in range(repeats):
            for size in states:
                stamps = []
                states[size], _ = simulate(
                    algorithm,
                    states[size],
                    data[size],
                    jax.random.key(0),
                    rounds=rounds,
                    cohort=cohort,
                    on_rounds=lambda done, _, stamps=stamps: stamps.append((time.perf_counter(), done)),
                )
                # the first call may compile; those after it run several rounds each
                times[size] += [(t - s) / (b - a) for (s, a), (t, b) in itertools.pairwise(stamps)]
        for size, seconds in times.items():
            each = statistics.median(seconds)
            yield {"method": f"{method} mlp", "population": size, "cohort": cohort, "ms a round": 1e3 * each}


def bench_compile(devices: int, quick: bool) -> Iterator[dict]:
    """Tracing and compiling, per method, model and number of devices; the cohort's size does not matter."""
    for kind in ("mlp",) if quick else ("mlp", "cnn"):
        for method in ("FedAvg", "FedKD"):
            for d in sorted({1, devices}):
                seconds = CompiledRound(method, kind, 4, make_layout(d)).seconds
                yield {"method": f"{method} {kind}", "devices": d, **seconds}


BENCHES = {
    "round": bench_round.bench_round,
    "scale": bench_scale.bench_scale,
    "loop": bench_loop,
    "compression": bench_compression,
    "layout": bench_layout,
    "population": bench_population,
    "compile": bench_compile,
    "svd": bench_svd.bench_svd,
    "text": bench_text.bench_text,
}
PLOTS = {"scale": bench_scale.plot, "svd": bench_svd.plot}


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Runs one of `BENCHES`; returns the folder with results.json."""
    parser = argparse.ArgumentParser(prog="python -m sims.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--quick", action="store_true", help="small cohorts and two repetitions, to see that it runs")
    parser.add_argument("--devices", type=int, help="devices the clients are split over; default all")
    parser.add_argument("--out", help="folder for the results; default runs/bench-NAME-N")
    parser.add_argument("--resume", help="scale: the folder of an earlier one, whose finished groups are not run again")
    chosen = parser.parse_args(argv)
    with common.one_line_errors():
        devices = hardware.choose_devices(chosen.devices, cohort=100)
        folder = common.run_folder(common.Options(out=chosen.out, resume=chosen.resume), f"bench-{chosen.bench}")
        more = {}
        if chosen.resume is not None:
            if chosen.bench != "scale" or not (folder / "results.json").is_file():
                raise ValueError(f"resume is {chosen.resume!r}; allowed: with scale, a folder with results.json")
            more = {"done": json.loads((folder / "results.json").read_text())}
    title = f"{chosen.bench}, {jax.default_backend()}, {devices} device(s), jax {jax.__version__}"
    rows, shown = [], []
    with Live(common.make_table([], title), console=common.console, refresh_per_second=1) as live:
        for result in BENCHES[chosen.bench](devices, chosen.quick, **more):
            rows.append(result)
            columns = bench_svd.COLUMNS if chosen.bench == "svd" else result
            cells = {k: "" if result[k] is None else result[k] for k in columns}
            shown.append({k: f"{x:.4g}" if isinstance(x, float) else str(x) for k, x in cells.items()})
            live.update(common.make_table(shown, title))
            (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    if chosen.bench in PLOTS:
        PLOTS[chosen.bench](rows).savefig(folder / f"{chosen.bench}.png", dpi=150)
    common.console.print(f"\nresults: {folder}")
    return folder


if __name__ == "__main__":
    main()
