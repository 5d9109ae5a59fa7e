"""Several methods over several seeds: `python -m sims.compare CONFIG [--overrides]`, one table like the paper's Table 1.

Every method sees the same clients, the same splits and the same seeds. Writes into a new folder runs/NAME-N: config.yaml
(resolved), results.jsonl (every evaluation of every run, as it comes), table.md, table.csv, clients.png, a plot of the task's
score (accuracy.png, f1.png, auc.png), clients.md where clients have names, and remarks.txt where there is something to know.
"""

if __name__ == "__main__":
    from sims import hardware

    hardware.prepare_environment()

import pathlib
import time

from fedkd_jax import report
from fedkd_jax.build import build_algorithm, build_data
from fedkd_jax.config import Experiment
from sims import common, hardware


def baseline_of(config: Experiment) -> str | None:
    """The method whose traffic is 1.0x: the config's, or the first that is FedAvg of the teacher without compression.

    >>> baseline_of(Experiment()) is None
    True
    """
    full = (
        n for n, m in config.methods.items() if (m.algorithm, m.model, m.codec) == ("fedavg", "teacher", "identity")
    )
    return config.baseline or next(full, None)


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Runs all methods of the config with all seeds; returns the folder."""
    start = time.perf_counter()
    with common.one_line_errors():
        config, options = common.parse("compare", argv)
        clients = build_data(config)
        layout = common.choose_layout(config, options, clients)
        algorithms = {n: build_algorithm(config, m, clients, layout) for n, m in config.methods.items()}
        common.check_memory(algorithms, clients)
        folder = common.run_folder(options, config.name)
    common.write_config(folder, config)
    common.console.print(hardware.describe(layout, config.cohort or len(clients.parts)))
    common.console.print(
        f"{len(algorithms)} methods x {len(config.seeds)} seeds, {len(clients.parts)} clients, {config.rounds} rounds"
        f" -> {folder}"
    )
    common.tell_remarks(folder, clients)
    common.plot_clients(folder, clients)

    runs = {}
    with common.progress_bar() as progress:
        for name, algorithm in algorithms.items():
            runs[name] = []
            for seed in config.seeds:
                *_, records = common.run_method(
                    config,
                    algorithm,
                    clients,
                    seed,
                    f"{name}, seed {seed}",
                    progress,
                    lambda record, name=name, seed=seed: common.append_jsonl(
                        folder / "results.jsonl", {"method": name, "seed": seed, **record}
                    ),
                )
                runs[name].append(records)

    scores = clients.scores
    rows = report.table_rows(runs, baseline_of(config), scores)
    held_out = common.held_out(config)
    title = f"{config.name}: {held_out} {scores[-1]} after {config.rounds} rounds, mean ± std over {len(config.seeds)} seeds"
    common.console.print("", common.make_table(rows, title))
    (folder / "table.md").write_text(report.markdown(rows) + "\n")
    (folder / "table.csv").write_text(report.as_csv(rows))
    if clients.names is not None and len(clients.names) <= common.FEW_CLIENTS:
        each = report.client_rows(runs, scores[-1], clients.names)
        common.console.print("", common.make_table(each, f"{config.name}: {scores[-1]} % of each client"))
        (folder / "clients.md").write_text(report.markdown(each) + "\n")
    report.accuracy_plot(runs, folder / f"{scores[-1]}.png", metric=scores[-1], split=held_out, title=config.name)
    common.console.print(f"{time.perf_counter() - start:.0f} s; table, figure, results and config: {folder}")
    return folder


if __name__ == "__main__":
    main()
