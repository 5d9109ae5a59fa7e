"""How concentrated updates are: `python -m sims.spectrum CONFIG [--method NAME] [--overrides]`, as the paper's Fig. 4.

Runs one method that sends updates of a model, and looks at every client's update in every round before it is compressed: the
singular values of each matrix. Writes into a new folder runs/NAME-spectrum-N: config.yaml (resolved), spectrum.csv (for each
round and kind of matrix how many values T = 0.95 needs, and how much energy the first 1, 10 and 50 % of the values have, their
number rounded up), spectrum.png, and remarks.txt where there are any. `python -m sims.report FOLDER` makes a page of it.

A kind is a parameter's path: layers' matrices of the same path are one kind. Intervals are over clients and layers.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import dataclasses
import math
import pathlib

import jax
import numpy as np

from fedkd_jax import figures, report, simulate, spectrum_codec
from fedkd_jax.build import build_algorithm, build_data, poison
from fedkd_jax.codecs import cumulative_energy
from fedkd_jax.codecs.base import named
from fedkd_jax.models import layer_compressible, layer_view
from fedkd_jax.svd import retained_rank
from sims import common, hardware, placement

ALGORITHMS = ("fedkd", "fml", "fedavg", "fedprox")  # whose update a codec sees as it is
THRESHOLD = 0.95
SHARES = (0.01, 0.1, 0.5)


def kind_of(path: str) -> str:
    """What a figure calls the matrices under a path.

    >>> kind_of("layers/attention/query/kernel"), kind_of("dense_0/kernel")
    ('attention/query', 'dense_0')
    """
    return path.removeprefix("layers/").removesuffix("/kernel").removesuffix("/embedding")


def needed(values: np.ndarray, threshold: float) -> np.ndarray:
    """The share of all singular values that `threshold` of the energy needs, of each matrix.

    Args:
        values: `[matrices, r]`, not increasing.
        threshold: T.

    >>> needed(np.array([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), 0.95).tolist()
    [0.5, 1.0]
    """
    ranks = jax.vmap(retained_rank, (0, None))(values, threshold)
    return np.asarray(ranks) / values.shape[1]


def describe(shares: np.ndarray, energy: np.ndarray, size: tuple[int, int]) -> dict[str, str]:
    """The numbers of a row of spectrum.csv.

    >>> row = describe(np.array([1.0, 0.5]), np.array([0.9, 1.0]), (2, 2))
    >>> row["T = 0.95 needs"], row["% of all"], row["energy of 50 %"]
    ('1.5', '75.0 ± 317.7', '90.0')
    """
    r = len(energy)
    return {
        "matrix": " x ".join(map(str, size)),
        f"T = {THRESHOLD:g} needs": f"{r * shares.mean():.1f}",
        "% of all": f"{100 * shares.mean():.1f} ± {100 * report.half_width(shares):.1f}",
        **{f"energy of {100 * share:g} %": f"{100 * energy[math.ceil(share * r) - 1]:.1f}" for share in SHARES},
    }


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Runs the method and looks; returns the folder."""
    with common.one_line_errors():
        config, options = common.parse("spectrum", argv)
        name = options.method or next(iter(config.methods))
        method = config.methods[name]
        if method.algorithm not in ALGORITHMS:
            raise ValueError(f"method is {name!r}, {method.algorithm}; allowed: one that is {', '.join(ALGORITHMS)}")
        hardware.make_devices(options.devices)  # some data are made with JAX
        clients = poison(config, method, build_data(config))
        layout = placement.choose_layout(config, options, clients)
        algorithm = build_algorithm(
            config,
            method,
            clients,
            layout,
            lambda codec: spectrum_codec(codec, compressible=layer_compressible, view=layer_view),
        )
        if options.store in ("host", "disk"):
            raise ValueError(f"store is {options.store!r}; allowed for sims.spectrum: 'auto' or 'device'")
        if clients.source is not None:
            raise ValueError(
                f"data.name is {config.data.name!r}; allowed for sims.spectrum: examples that are in memory"
            )
        placement.choose_stores(config, dataclasses.replace(options, store="device"), {name: algorithm}, clients)
        folder = common.run_folder(options, f"{config.name}-spectrum")
    common.write_config(folder, config)
    common.console.print(hardware.describe(layout, config.cohort or clients.size))
    common.console.print(f"{name}: {clients.size:,} clients, {config.rounds} rounds -> {folder}")
    common.tell_remarks(folder, clients)

    key, state = jax.random.key(config.seeds[0]), clients.size
    rows, energy, shares = [], {}, {}
    with common.progress_bar() as progress:
        task = progress.add_task(name, total=config.rounds)
        for round in range(
            1, config.rounds + 1
        ):  # a round at a time, as nothing keeps what a client sent before its last
            state, history = simulate(algorithm, state, clients.train, key, rounds=1, cohort=config.cohort)
            progress.update(task, completed=round)
            ids = history.rounds.ids[0][history.rounds.finite[0]]
            leaves = named(state.server.params)
            for path, spectra in state.clients.codec["spectrum"].items():
                kind, values = kind_of(path), np.asarray(spectra)[ids].reshape(-1, spectra.shape[-1])
                values = values[values[:, 0] > 0]  # what did not move has no energy
                if not len(values):
                    continue
                _, m, n = layer_view(path, leaves[path]).matrices(leaves[path]).shape
                share, curve = needed(values, THRESHOLD), cumulative_energy(values).mean(axis=0)
                of_run = {"method": name, "seed": str(config.seeds[0]), "round": str(round), "kind": kind}
                rows.append(of_run | describe(share, curve, (m, n)))
                shares.setdefault(kind, {})[round] = share
                if round in (1, config.rounds):
                    energy.setdefault(kind, {})[round] = curve
            (folder / "spectrum.csv").write_text(report.as_csv(rows))

    title = f"{config.name}: {name}"
    figures.spectrum_plot(energy, shares, folder / "spectrum.png", threshold=THRESHOLD, title=title)
    shown = [row for row in rows if row["round"] in ("1", str(config.rounds))]
    shown = [{key: value for key, value in row.items() if key not in ("method", "seed")} for row in shown]
    common.console.print("", common.make_table(shown, f"{title}, singular values needed, first and last round"))
    common.console.print(f"config, table and figure: {folder}")
    return folder


if __name__ == "__main__":
    main()
