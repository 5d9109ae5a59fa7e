"""The programs as a user runs them: config files do two rounds, errors are one line, nothing is overwritten."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
import strategies
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from fedkd_jax import Checkpoints, History, Layout, RoundInfo, client_mesh, report, task_terms
from fedkd_jax.build import build_algorithm
from fedkd_jax.config import load_config, to_yaml
from fedkd_jax.plots import accuracy_plot
from fedkd_jax.report import table_rows
from sims import bench, common, compare, hardware, placement, run, spectrum
from sims import report as report_program

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def data_dir() -> str | None:
    for folder in (os.environ.get("FEDKD_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if folder and (pathlib.Path(folder) / "fashion_mnist").is_dir():
            return str(folder)
    return None


def small(path: pathlib.Path) -> list[str]:
    """Flags that make a config two rounds of little data, its methods and models as they are."""
    config = load_config(path)
    if config.checkpoint is not None or config.data.task == "characters":
        pytest.skip("minutes of a CPU; tests/test_tasks.py runs every task with a small model")
    if len(config.methods) > 8:
        pytest.skip("minutes of compilation; tests/test_build.py has a round of each of its methods")
    flags = ["--rounds", "2", "--eval-every", "1", "--seeds", "0", "--steps", "1", "--epochs", "1"]
    if config.data.name == "fashion_mnist":
        if data_dir() is None:
            pytest.skip("Fashion-MNIST is not here; point FEDKD_DATA_DIR to it")
        flags += ["--data.dir", data_dir(), "--data.split", "train[:400]", "--data.clients", "4", "--cohort", "2"]
        flags += ["--data.min-examples", "2"]
    if config.data.name == "synthetic":
        flags += ["--data.eval-clients", "20", "--cohort", "4"]
    return flags


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_runs_two_rounds(path, tmp_path, capsys):
    flags, config = small(path), load_config(path)
    if config.teacher.kind == "cnn":  # one of its methods, which takes half a minute to compile
        config = dataclasses.replace(config, methods={"FedKD": config.methods["FedKD"]})
    if config.hostile or any(method.noise for method in config.methods.values()):  # they differ in few numbers
        first, *_, last = config.methods
        config = dataclasses.replace(config, methods={name: config.methods[name] for name in (first, last)})
    (tmp_path / path.name).write_text(to_yaml(config))
    folder = compare.main([str(tmp_path / path.name), *flags, "--devices", "1", "--out", str(tmp_path / "out")])
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) >= 1 + len(config.methods)
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {r["method"] for r in results} == set(config.methods)
    assert {r["round"] for r in results} == {1, 2}
    assert all(r["not_finite"] == 0 for r in results)
    for name in ("accuracy.png", "bars.png", "pareto.png", "spread.png", "clients.png"):
        assert (folder / name).stat().st_size > 10_000
    assert (folder / "report.html").read_text().count("<img") == 5
    for name in config.methods:
        assert name in (folder / "table.md").read_text()
    assert load_config(folder / "config.yaml").rounds == 2
    assert "rounds/s" in capsys.readouterr().out


def test_run_writes_metrics_and_events(tmp_path):
    path = ROOT / "configs" / "digits.yaml"
    where = ["--devices", "1", "--out", str(tmp_path / "out")]
    where += ["--teacher.hidden", "32", "--student.hidden", "16"]
    folder = run.main([str(path), "--method", "FedKD", *small(path), *where])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert 0 <= lines[-1]["teacher/accuracy"] <= 1
    assert lines[1]["bytes_per_client"] > lines[0]["bytes_per_client"] > 0
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "table.md").read_text().count("FedKD") == 2  # teacher and student
    page = report_program.main([str(folder), "--out", str(tmp_path / "page.html")]).read_text()
    assert lines[-1]["method"] == "FedKD"
    assert page.count("--method FedKD --seeds 0") == 1


def timeless(folder):
    records = common.read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in records]


@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_run_goes_on_from_its_folder(store, tmp_path, monkeypatch, capsys):
    """After SIGTERM, and a line that was cut short, with what was asked for the first time; `sims.kills` kills."""
    flags = [str(ROOT / "configs" / "digits.yaml"), "--method", "local only", "--rounds", "6", "--eval-every", "2"]
    flags += ["--store", store, "--devices", "1"]
    whole, part = run.main([*flags, "--out", str(tmp_path / "whole")]), tmp_path / "part"
    note = Checkpoints.note

    def terminated(self, first, info):
        note(self, first, info)
        if first >= 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "note", terminated)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        run.main([*flags, "--out", str(part)])
    monkeypatch.undo()
    assert f"of 6, which is saved; it goes on with\npython -m sims.run --resume {part}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with (part / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "acc')
    assert run.main(["--resume", str(part)]) == part
    assert timeless(part) == timeless(whole)
    assert (part / "table.csv").read_text() == (whole / "table.csv").read_text()
    if store == "disk":
        return  # what follows does not look at it
    with pytest.raises(SystemExit, match=r"cohort is 3, in .*part None; data.clients is 9, in .*part 20; allowed"):
        run.main(["--resume", str(part), "--cohort", "3", "--data.clients", "9"])
    with pytest.raises(SystemExit, match="method is 'FedKD'; allowed: 'local only', that of "):
        run.main(["--resume", str(part), "--method", "FedKD"])
    run.main(["--resume", str(part), "--rounds", "7", "--devices", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "rounds is 7, was 6" in said and "devices is 2, was 1: from here on the same but for rounding" in said
    assert [record["round"] for record in timeless(part)] == [2, 4, 6, 7]
    for file in ("metrics.jsonl", "options.json"):
        (part / file).write_bytes(b"[7]\n")
        with pytest.raises(SystemExit, match=rf"error: .*{file} is damaged, TypeError: .*; allowed: as it was saved"):
            run.main(["--resume", str(part), "--rounds", "8"])


def test_devices_and_chunks_give_the_same_numbers(tmp_path):
    """`--devices 8` on forced host devices, and any `--chunk`, are one device to rounding; FedKD's are in test_simulate.py."""
    path, ends = str(ROOT / "configs" / "digits.yaml"), []
    for i, flags in enumerate((["--devices", "1"], ["--devices", "8"], ["--devices", "1", "--chunk", "3"])):
        short = ["--rounds", "3", "--eval-every", "3", "--out", str(tmp_path / str(i))]
        out = run.main([path, "--method", "FedAvg of the student", *short, *flags])
        ends.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        for key in other.keys() - {"seconds"}:
            if not isinstance(other[key], str):
                np.testing.assert_allclose(other[key], ends[0][key], rtol=1e-3, err_msg=key)


def test_clients_may_fail_and_cohorts_go_in_groups(tmp_path):
    path, trace = str(ROOT / "configs" / "digits.yaml"), tmp_path / "trace.npy"
    np.save(trace, np.arange(20)[None] % 2 == np.arange(2)[:, None])  # the even ones, then the odd ones
    short = ["--rounds", "3", "--eval-every", "3", "--cohort", "8", "--devices", "1", "--store", "host", "--group", "3"]
    flags = ["--participation.trace", str(trace), "--participation.spread", "1.0", "--participation.first", "6"]
    argv = [path, "--method", "FedAvg of the student", *short, *flags]
    folder = run.main([*argv, "--out", str(tmp_path / "out")])
    (record,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert (record["asked"], record["counted"]) == (24, 18)
    assert record["simulated_seconds"] > 0
    assert "25.00" in (folder / "table.md").read_text()  # % lost
    assert load_config(folder / "config.yaml").participation.first == 6
    np.save(trace, np.zeros((2, 3)))
    with pytest.raises(
        SystemExit, match=r"participation.trace is .*; allowed: .*\[T, G\] bool with some true, not float64"
    ):
        run.main([*argv, "--out", str(tmp_path / "other")])


def test_what_a_device_may_take_decides_how_many_clients_train_at_once():
    config, options = common.parse("run", [str(ROOT / "configs" / "digits.yaml"), "--devices", "1"])
    config = dataclasses.replace(config, methods={"local": config.methods["local only"]})
    options = dataclasses.replace(options, memory=0.02)
    assert 1 < placement.choose_layout(config, options, common_data(config)).chunk < 20


def run_program(*argv: str, cwd: pathlib.Path, shell: str = ":") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", f'{shell}; exec "$@"', "sh", sys.executable, "-m", *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("text", ["roundz: 3", "methods: {a: {t_start: 1.5}}", "{cohort: 9, data: {clients: 3}}"])
def test_a_bad_config_ends_the_program_with_one_line(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    done = run_program("sims.run", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_that_cannot_be_written_is_told_once(tmp_path):
    """As a full disk is; libraries alone print hundreds of lines."""
    config = str(ROOT / "configs" / "digits.yaml")
    argv = ["sims.run", config, "--method", "local only", *small(pathlib.Path(config)), "--out", "run"]
    done = run_program(*argv, cwd=tmp_path, shell="ulimit -f 1000")
    assert done.returncode == 1
    assert done.stderr.startswith("error: a checkpoint could not be written")
    assert done.stderr.endswith(
        "saved in run/checkpoint is nothing; it goes on with\npython -m sims.run --resume run\n"
    )
    assert done.stderr.count("\n") == 2


def test_the_program_sets_its_environment_and_says_so(tmp_path):
    flags = small(ROOT / "configs" / "digits.yaml")
    done = run_program("sims.run", str(ROOT / "configs" / "digits.yaml"), *flags, "--devices", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 device(s)" in done.stdout
    assert "OPENBLAS_NUM_THREADS=1" in done.stdout
    assert (tmp_path / "runs").is_dir()


def test_a_run_folder_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = common.run_folder(common.Options(), "x")
    assert common.run_folder(common.Options(), "x") != first
    (first / "metrics.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="out is"):
        common.run_folder(common.Options(out=str(first)), "x")
    assert (first / "metrics.jsonl").read_text() == "mine"


def test_measured_chunk_is_one_of_the_candidates(tmp_path):
    config, options = common.parse(
        "run", [str(ROOT / "configs" / "digits.yaml"), "--chunk", "measure", "--devices", "1", "--batch", "64"]
    )
    config = dataclasses.replace(config, methods={"local": config.methods["local only"]})
    layout = placement.choose_layout(config, options, common_data(config))
    assert layout.chunk in (1, 8, 20)


def common_data(config):
    from fedkd_jax.build import build_data

    return build_data(config)


@pytest.mark.parametrize("chunk", ["0", "-1", "many"])
def test_bad_chunk_is_told(chunk):
    with pytest.raises(ValueError, match=r"chunk is .*allowed"):
        common.parse("run", [str(ROOT / "configs" / "digits.yaml"), "--chunk", chunk])


def test_table_says_mean_std_and_ratio():
    def seeds(*accuracies, sent):
        return [
            [
                {
                    "round": 1,
                    "m/accuracy": a,
                    "m/accuracy_per_client": a,
                    "bytes_per_client": sent,
                    "uplink_bytes_per_client": sent / 4,
                    "floats_per_client": 1.0,
                }
            ]
            for a in accuracies
        ]

    runs = {"full": seeds(0.8, 0.9, sent=5e6), "small": seeds(0.7, 0.7, sent=1e6), "none": seeds(0.5, 0.5, sent=0.0)}
    rows = table_rows(runs, "full")
    assert rows[0]["accuracy %"] == "85.00 ± 7.07"  # the sample's standard deviation
    assert [row["less"] for row in rows] == ["1.0x", "5.0x", "-"]
    figure = accuracy_plot(runs)
    assert len(figure.axes[0].lines) == 3
    assert "none" in figure.axes[1].get_title()
    figure.draw_without_rendering()
    left, right = ({t.get_text() for t in axis.get_xticklabels(which="both")} - {""} for axis in figure.axes)
    assert all(label.isdecimal() for label in left)  # rounds are whole, also where there is only one
    assert {"1", "2", "5"} <= right and not any("$" in label or "e" in label for label in right)


def history(*f1):
    """Two rounds of three clients, evaluated after the second."""
    z = np.ones((2, 3), int)
    info = RoundInfo(
        ids=z,
        terms=jax.tree.map(lambda _: z * 1.0, task_terms()),
        uplink_bytes=z,
        downlink_bytes=z,
        uplink_floats=z,
        downlink_floats=z,
        finite=z > 0,
        weight=z,
        ranks={},
    )
    values = {"accuracy": np.array([1.0, 0.5, np.nan]), "f1": np.array(f1)}
    evaluation = {"round": 2, "m": values, "pooled": {"m": {"accuracy": 0.6, "f1": 0.3}}}
    return History(rounds=info, evaluations=(evaluation,))


def test_records_hold_pooled_values_and_tables_any_metrics_and_clients():
    counts, names = np.array([1, 4, 0]), ("reviews", "abstracts", "none")
    seeds = [
        report.records(history(*f1), counts, 3, of_clients=["f1"]) for f1 in ((0.2, 0.4, np.nan), (0.4, 0.4, np.nan))
    ]
    first = seeds[0][-1]
    assert (first["m/accuracy"], first["m/accuracy_per_client"], first["m/f1"]) == (0.6, 0.75, 0.3)
    assert json.loads(json.dumps(first, allow_nan=False))["m/f1_of_client"] == [0.2, 0.4, None]
    assert "m/f1_of_client" not in report.records(history(0.2, 0.4, np.nan), counts, 3)[-1]

    spent = report.records(history(0.2, 0.4, np.nan), counts, 3, epsilon=lambda rounds, turns: rounds + turns / 100)
    assert spent[-1]["epsilon"] == 2.06  # the one client there is took part six times
    noised, plain = table_rows({"noised": [spent], "FedAvg": seeds}, None, ("f1",))
    assert (noised["epsilon"], plain["epsilon"]) == ("2.06", "-")

    (row,) = table_rows({"FedAvg": seeds}, None, ("accuracy", "f1"))
    traffic = ["up/client", "down/client", "bytes/client", "floats/client"]
    assert list(row) == ["method", "model", "accuracy %", "f1 %", "per client %", *traffic]
    assert row["f1 %"] == "30.00 ± 0.00"
    assert row["per client %"] == "35.00 ± 7.07"
    (row,) = report.client_rows({"FedAvg": seeds}, "f1", names)
    assert [row[name] for name in names] == ["30.00 ± 14.14", "40.00 ± 0.00", "-"]

    for told in (
        lambda: table_rows({"FedAvg": seeds}, None, ("f2",)),
        lambda: table_rows({"FedAvg": seeds}, None, "accuracy"),
        lambda: accuracy_plot({"FedAvg": seeds}, metric="f2"),
        lambda: report.client_rows({"FedAvg": seeds}, "accuracy", names),
    ):
        with pytest.raises(ValueError, match=r"metrics is .*allowed: .*f1"):
            told()
    with pytest.raises(ValueError, match=r"names is .*allowed: 3"):
        report.client_rows({"FedAvg": seeds}, "f1", names[:2])


def test_a_comparison_goes_on_where_it_was_left(tmp_path):
    """More methods and seeds, or runs cut off: what was finished is taken as it is, everything else is as if run at once."""
    short = load_config(ROOT / "configs" / "digits.yaml")
    methods = {name: short.methods[name] for name in ("local only", "FedAvg of the student")}
    methods["the same"] = methods["local only"]
    (tmp_path / "config.yaml").write_text(to_yaml(dataclasses.replace(short, methods=methods)))
    flags = [str(tmp_path / "config.yaml"), "--rounds", "4", "--eval-every", "2", "--devices", "1"]
    flags += ["--data.clients", "4"]
    whole = compare.main([*flags, "--seeds", "0", "1", "--out", str(tmp_path / "whole")])
    part = compare.main([*flags, "--seeds", "0", "--out", str(tmp_path / "part")])
    first, second = sorted((part / "cells").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    kept = first.read_text()
    second.with_suffix(".partial").write_text(second.read_text()[:-30])
    second.unlink()
    (part / "cells" / "of-another-config.jsonl").write_text(kept)
    again = compare.main([*flags, "--seeds", "0", "1", "--resume", str(part)])
    assert first.read_text() == kept  # not run again: the same seconds
    assert (part / "cells" / "of-another-config.jsonl").read_text() == kept
    assert not list((part / "cells").glob("*.partial"))
    tables = [(folder / "table.csv").read_text() for folder in (whole, again)]
    assert tables[0] == tables[1]
    results = [common.read_jsonl(folder / "results.jsonl") for folder in (whole, again)]
    told = [{(r["method"], r["seed"], r["round"]): r | {"seconds": 0} for r in of_run} for of_run in results]
    assert told[0] == told[1]
    assert len(told[0]) == len(results[0]) == 3 * 2 * 2

    rows = pyarrow.parquet.read_table(again / "results.parquet").to_pylist()
    assert {row["metric"] for row in rows} >= {"accuracy", "accuracy_per_client", "bytes_per_client", "teacher_task"}
    for row in rows:
        record = told[1][row["method"], row["seed"], row["round"]]
        metric, _, client = row["metric"].partition(" of client ")
        if client:
            assert record[f"{row['model']}/{metric}_of_client"][int(client)] == row["value"]
            continue
        assert record[f"{row['model']}/{row['metric']}" if row["model"] else row["metric"]] == row["value"]
    assert rows[0]["jax"] == jax.__version__
    assert len((again / "results.csv").read_text().splitlines()) == 1 + len(rows)


def test_seeds_at_once_are_cells_of_their_own(eight_devices, tmp_path, capsys, monkeypatch):
    config = load_config(ROOT / "configs" / "digits.yaml")
    data = dataclasses.replace(config.data, clients=4)
    methods = {"local": config.methods["local only"]}
    config = dataclasses.replace(config, methods=methods, rounds=3, eval_every=2, data=data)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    clients, method, versions = common_data(config), methods["local"], hardware.versions()
    algorithm, silent = build_algorithm(config, method, clients), Progress(disable=True)
    alone = {i: common.run_method(config, algorithm, clients, [i], "", silent, lambda *_: None)[0] for i in (1, 2)}
    cell = compare.cell_of(config, method, 1, compare.fingerprint(config, clients))
    (cells := tmp_path / "out" / "cells").mkdir(parents=True)
    for record in alone[1]:
        common.append_jsonl(cells / f"{cell}.jsonl", {**record, "seconds": 7.0, **versions})
    append, told = common.append_jsonl, []

    def spy(path, record):
        append(path, record)
        if path.parent == cells:
            told.append((record["round"], sorted(len(common.read_jsonl(p)) for p in cells.glob("*.partial"))))

    monkeypatch.setattr(common, "append_jsonl", spy)
    flags = ["--devices", "2", "--seeds", "0", "1", "2", "--resume", str(tmp_path / "out")]
    flags += ["--seeds-at-once", "True"]
    out = compare.main([str(tmp_path / "config.yaml"), *flags])
    assert "local, seeds 0, 2 " in capsys.readouterr().out
    assert told == [(2, [0, 1]), (2, [1, 1]), (3, [1, 2]), (3, [2, 2])]  # as they come, of both
    assert {path.suffix for path in cells.iterdir()} == {".jsonl"}
    results = common.read_jsonl(out / "results.jsonl")
    assert {(r["seed"], r["seconds"] == 7.0) for r in results} == {(0, False), (1, True), (2, False)}
    found = [{key: r[key] for key in alone[2][0]} for r in results if r["seed"] == 2]
    chex.assert_trees_all_close(found, alone[2], rtol=1e-3)


def test_seeds_run_at_once_where_devices_are_busy_and_states_fit(eight_devices, monkeypatch):
    config = load_config(ROOT / "configs" / "digits.yaml")
    clients = common_data(config)
    algorithm = build_algorithm(config, config.methods["FedKD"], clients)

    def devices(seeds, there, wanted=True):
        options, layout = common.Options(seeds_at_once=wanted), Layout(mesh=client_mesh(there) if there > 1 else None)
        layout = placement.seeds_layout(options, seeds, algorithm, clients, layout)
        return layout and layout.devices

    asked = ((0, 2), (1, 2), (2, 1), (2, 2), (3, 2), (4, 8), (5, 8))
    assert [devices(*each) for each in asked] == [None, None, 1, 2, 2, None, 5]
    assert devices(2, 2, False) is None
    monkeypatch.setattr(hardware, "memory_bytes", lambda: 2 * 10**8)  # a seed needs 28 MB, twice
    assert (devices(2, 2), devices(3, 2)) == (2, None)


@pytest.mark.parametrize("program", ["run", "compare", "spectrum"])
def test_a_config_alone_is_a_command(program):
    path = str(ROOT / "configs" / "digits.yaml")
    assert common.parse(program, [path]) == (load_config(path), common.Options())


def test_what_may_not_be_resumed_is_told(tmp_path):
    path = str(ROOT / "configs" / "digits.yaml")
    for program, flags, said in (
        (compare, ["--resume", str(tmp_path), "--out", str(tmp_path)], "without --out"),
        (spectrum, ["--resume", str(tmp_path)], "allowed: null, or for sims.run and sims.compare"),
        (run, ["--resume", str(tmp_path / "nowhere")], "the folder of a run or a comparison"),
        (run, ["--resume", str(tmp_path)], "config.yaml"),
        (run, ["--save-rounds", "0"], "save_rounds is 0"),
        (run, ["--save-minutes", "-1"], "save_minutes is -1"),
        (run, ["--keep", "0"], "keep is 0"),
    ):
        with pytest.raises(SystemExit, match=said):
            program.main([path, *small(pathlib.Path(path)), *flags])


def test_cells_are_told_apart_by_method_and_data():
    path = str(ROOT / "configs" / "digits.yaml")
    config = load_config(path)
    cells = [compare.cell_of(config, method, 0, examples) for method in config.methods.values() for examples in "ab"]
    assert len(set(cells)) == len(cells)
    fewer = dataclasses.replace(config, data=dataclasses.replace(config.data, clients=3))
    assert compare.fingerprint(config, common_data(config)) != compare.fingerprint(fewer, common_data(fewer))


@given(st.integers(2, 6), strategies.seeds)
def test_a_difference_is_tested_over_pairs_of_seeds(few, seed):
    one, other, worse = np.random.default_rng(seed).normal([[0.5], [0.55], [0.1]], 0.02, (3, few))
    runs = {name: [[{"m/f1": v}] for v in values] for name, values in (("a", one), ("b", other), ("c", worse))}
    first, *rows = report.significance_rows(runs, "f1", ["c", "a"])
    assert (first["against"], first["difference"], first["p"]) == ("-", "-", "-")  # the best of the two baselines
    for row, values in zip(rows, (other, worse), strict=True):
        assert row["against"] == "a"
        d = 100 * (values - one)
        t = d.mean() / (d.std(ddof=1) / np.sqrt(few))
        assert row["difference"] == f"{d.mean():+.2f}"
        np.testing.assert_allclose(float(row["p"]), 2 * scipy.stats.t.sf(abs(t), few - 1), rtol=0.06)
        half = scipy.stats.t.ppf(0.975, few - 1) * 100 * values.std(ddof=1) / np.sqrt(few)
        assert row["f1 %"] == f"{100 * values.mean():.2f} ± {half:.2f}"


def test_significance_needs_pairs_and_a_baseline():
    runs = {"a": [[{"m/f1": 0.5}]]}
    with pytest.raises(ValueError, match="runs has 1 seed"):
        report.significance_rows(runs, "f1", ["a"])
    runs = {"a": 2 * runs["a"], "b": 2 * runs["a"]}
    with pytest.raises(ValueError, match=r"baselines is \['c'\]; allowed: some of a, b"):
        report.significance_rows(runs, "f1", ["c"])
    assert [row["p"] for row in report.significance_rows(runs, "f1", ["a"])] == ["-", "-"]
    runs = {"nan": [[{"m/f1": np.nan}], [{"m/f1": 0.5}]], **runs}
    rows = report.significance_rows(runs, "f1", ["nan", "a"])
    assert [row["difference"] for row in rows] == ["-", "-", "+0.00"]
    assert [row["difference"] for row in report.significance_rows(runs, "f1", ["nan"])] == 3 * ["-"]


def test_models_are_tested_against_the_same_model_of_the_baseline():
    two = [[{"teacher/f1": t, "student/f1": s}] for t, s in ((0.9, 0.5), (0.92, 0.6))]
    runs = {"FML": two, "FedKD": two, "FedAvg": [[{"model/f1": v}] for v in (0.8, 0.7)]}
    rows = report.significance_rows(runs, "f1", ["FML", "FedAvg"])
    assert [(row["against"], row["difference"]) for row in rows] == [
        ("-", "-"),
        ("FML, teacher", "-36.00"),
        ("FML, teacher", "+0.00"),
        ("FML, student", "+0.00"),
        ("FML, teacher", "-16.00"),
    ]


def test_every_bench_is_told_of():
    assert bench.__doc__ is not None
    told = bench.__doc__.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in told] == [*bench.BENCHES]


def test_bench_writes_results_and_a_plot(tmp_path, monkeypatch):
    rows = [
        {"varied": v, "population": 9, "cohort": 4, "store": "host", "clients/s": 2.0, "ms a round": 2e3}
        for v in ("population", "cohort")
    ]
    monkeypatch.setitem(bench.BENCHES, "scale", lambda devices, quick: iter(rows))
    folder = bench.main(["scale", "--devices", "1", "--out", str(tmp_path / "out")])
    assert json.loads((folder / "results.json").read_text()) == rows
    assert (folder / "scale.png").stat().st_size > 0
