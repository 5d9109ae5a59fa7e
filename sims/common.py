"""What `sims.run`, `sims.compare` and `sims.spectrum` share: the command line, progress, run folders, running one method."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedkd_jax import Checkpoints, Layout, plots, report, simulate, simulate_seeds
from fedkd_jax.build import build_participation
from fedkd_jax.check import damaged
from fedkd_jax.config import Experiment, load_config, to_yaml, validate
from fedkd_jax.stores import Store
from fedkd_jax.tasks import Clients
from fedkd_jax.types import Algorithm, History

FEW_CLIENTS = 8  # and tables have a column for each
SEVERAL_CLIENTS = 1000  # and the last record holds each one's score
MAY_CHANGE = ("rounds", "eval_every", "name", "baseline")  # when a run goes on
SIGNIFICANCE = (
    "95 % intervals over seeds; difference in points from the row it is tested against, and p of a paired t-test"
)
console = Console()
if not console.is_terminal:
    console = Console(width=200)  # in a pipe or a log file rich assumes 80 columns and cuts tables


@dataclasses.dataclass(frozen=True)
class Options:
    """Where and how to run; none of it changes the numbers.

    >>> Options().chunk
    'auto'
    """

    method: str | None = None  # sims.run: which of the config's methods; default the first
    out: str | None = None  # folder for the results; default runs/NAME-N
    devices: int | None = None  # devices the clients are split over; default all (on a CPU one per core)
    # the folder of an earlier sims.run, which goes on from its checkpoint, or sims.compare, of which what is finished is not
    # run again; without CONFIG with the config of the folder, and sims.run with the options it had
    resume: str | None = None
    save_rounds: int | None = None  # sims.run: the state goes into the journal after every so many rounds
    save_minutes: float | None = (
        5.0  # and a checkpoint is written after so many minutes; where both are None, nothing, ever
    )
    keep: int = 1  # checkpoints that stay, the newest
    seeds_at_once: bool = False  # sims.compare: a method's seeds in one program, if their states fit the memory twice
    # where clients' states live: on the "device" all of them; in "host" memory, or on "disk" in the results' folder while it
    # runs, those that have taken part; "auto" is the first that holds them
    store: Literal["auto", "device", "host", "disk"] = "auto"
    chunk: str = "auto"  # clients trained at once on a device: a number, "auto" by platform, or "measure" to time some
    # with a store, clients of a cohort whose states are on the devices at a time: a number, or "auto", all that fit
    group: str = "auto"
    # sims.run: this is one of several processes, each of which has a part of the clients: "auto" where SLURM, MPI, Kubernetes
    # or a TPU pod tells which, or "HOST:PORT,COUNT,INDEX"; needs `out`, a folder that all of them see; `devices` are then
    # those of a process
    processes: str | None = None
    memory: float | None = None  # GB that a device may take, for "auto"; by default what an accelerator has
    # sims.run: every message goes as bytes, sealed with AES-GCM and opened at the other end; the results are the same, and
    # tables have the bytes measured beside those counted
    wire: bool = False


def parse(program: str, argv: list[str] | None = None) -> tuple[Experiment, Options]:
    """`CONFIG [--overrides]`: the config file, then any of its keys and of `Options` as flags.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as f:
    ...     _ = f.write("rounds: 3"); f.flush()
    ...     parse("run", [f.name, "--data.clients", "5", "--chunk", "4"])[0].data.clients
    5
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    path = argv.pop(0) if argv and not argv[0].startswith("-") else None
    earlier = _earlier(argv)
    if earlier is not None and path is None:
        path = earlier / "config.yaml"
    if path is None and not {"-h", "--help"} & set(argv):
        raise ValueError(f"no config given; usage: python -m sims.{program} CONFIG [--overrides]")
    default = Experiment() if path is None else load_config(path)

    def options(
        experiment: Annotated[Experiment, tyro.conf.arg(name="")] = default,
        options: Annotated[Options, tyro.conf.arg(name="")] = Options() if earlier is None else read_options(earlier),
    ):
        return experiment, options

    flags = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    experiment, chosen = tyro.cli(options, args=argv, prog=f"python -m sims.{program} CONFIG", config=flags)
    validate(experiment)
    if chosen.method is not None and chosen.method not in experiment.methods:
        raise ValueError(f"method is {chosen.method!r}; allowed: {', '.join(experiment.methods)}")
    if chosen.resume is not None and (program not in ("run", "compare") or chosen.out is not None):
        raise ValueError(f"resume is {chosen.resume!r}; allowed: null, or for sims.run and sims.compare without --out")
    if chosen.save_rounds is not None and chosen.save_rounds < 1:
        raise ValueError(f"save_rounds is {chosen.save_rounds}; allowed: at least 1, or null")
    if chosen.save_minutes is not None and not chosen.save_minutes >= 0:
        raise ValueError(f"save_minutes is {chosen.save_minutes}; allowed: at least 0, or null")
    if chosen.keep < 1:
        raise ValueError(f"keep is {chosen.keep}; allowed: at least 1")
    if chosen.seeds_at_once and chosen.store in ("host", "disk"):
        raise ValueError(f"store is {chosen.store!r} with seeds_at_once; allowed: 'auto' or 'device'")
    if chosen.seeds_at_once and program != "compare":
        raise ValueError("seeds_at_once is True; allowed: False, or for sims.compare")
    if chosen.wire and chosen.resume is not None:
        raise ValueError("wire is True with resume; allowed: False, as what was measured before is not saved")
    if chosen.wire and (program != "run" or chosen.processes is not None):
        raise ValueError("wire is True; allowed: False, or for sims.run in one process")
    if chosen.processes is not None and chosen.chunk == "measure":
        raise ValueError("chunk is 'measure' with processes; allowed: a number or 'auto'")
    if chosen.processes is not None and (program != "run" or (chosen.out or chosen.resume) is None):
        raise ValueError(f"processes is {chosen.processes!r}; allowed: null, or for sims.run with a folder as --out")
    if chosen.group != "auto" and not (chosen.group.isdecimal() and int(chosen.group) > 0):
        raise ValueError(f"group is {chosen.group!r}; allowed: a number from 1 up, or 'auto'")
    if chosen.memory is not None and not chosen.memory > 0:
        raise ValueError(f"memory is {chosen.memory}; allowed: more than 0 GB")
    if chosen.chunk not in ("auto", "measure") and not (chosen.chunk.isdecimal() and int(chosen.chunk) > 0):
        raise ValueError(f"chunk is {chosen.chunk!r}; allowed: a number from 1 up, 'auto' or 'measure'")
    return experiment, chosen


def _earlier(argv: Sequence[str]) -> pathlib.Path | None:
    """The folder that `--resume` names."""
    for flag, value in itertools.pairwise([*argv, ""]):
        if flag.split("=")[0] == "--resume":
            folder = pathlib.Path(flag.partition("=")[2] or value)
            if not folder.is_dir():
                raise FileNotFoundError(f"resume is {str(folder)!r}; allowed: the folder of a run or a comparison")
            return folder
    return None


def write_options(folder: pathlib.Path, options: Options) -> None:
    """How a run is run, for `--resume`; without what is each time its own.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     write_options(pathlib.Path(where), Options(chunk="4")); read_options(pathlib.Path(where)).chunk
    '4'
    """
    own = dataclasses.asdict(dataclasses.replace(options, out=None, resume=None, processes=None, wire=False))
    _replace_text(folder / "options.json", json.dumps(own, indent=1) + "\n")


def read_options(folder: pathlib.Path) -> Options:
    """What `write_options` wrote, or the default where there is none.

    Raises:
        ValueError: the file is damaged.

    >>> read_options(pathlib.Path("nowhere")) == Options()
    True
    """
    path = folder / "options.json"
    with damaged(path):
        return Options(**json.loads(path.read_text())) if path.exists() else Options()


def check_same(saved: Experiment, config: Experiment, method: str, folder: pathlib.Path) -> None:
    """Whether a run with this config and method may go on from one with the saved.

    Raises:
        ValueError: saying which keys differ; rounds, eval_every, name, baseline, and other methods may.

    >>> try: check_same(Experiment(), dataclasses.replace(Experiment(), cohort=3, rounds=9), "FedKD", pathlib.Path("runs/a"))
    ... except ValueError as error: print(str(error).split(";")[0])
    cohort is 3, in runs/a None
    """

    def flat(tree, *path):
        if isinstance(tree, dict):
            return {key: value for name in tree for key, value in flat(tree[name], *path, str(name)).items()}
        return {".".join(path): tree}

    def keys(experiment: Experiment):
        chosen = {name: own for name, own in experiment.methods.items() if name == method}
        of_run = dataclasses.replace(experiment, methods=chosen, seeds=experiment.seeds[:1])
        return {k: v for k, v in flat(dataclasses.asdict(of_run)).items() if k not in MAY_CHANGE}

    old, new = keys(saved), keys(config)
    differ = [f"{k} is {new.get(k)}, in {folder} {old.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
    if differ:
        raise ValueError(f"{'; '.join(differ)}; allowed with resume: other values of {', '.join(MAY_CHANGE)} only")


@contextlib.contextmanager
def stop_on_signals(checkpoints: Checkpoints) -> Iterator[list[int]]:
    """Within it, Ctrl-C and SIGTERM end the run after the rounds under way, and save it; a second one ends it at once. Gives
    the signals there were.

    >>> with stop_on_signals(Checkpoints("nowhere")) as seen: seen
    []
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def stop(number, _) -> None:
        seen.append(number)
        checkpoints.stop()
        signal.signal(number, before[number])
        console.print(f"{signal.Signals(number).name}: finishing the round, then saving; once more to end at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rewind_jsonl(path: pathlib.Path, round: int) -> float:
    """Leaves only the records of rounds up to this one, without a line that was cut short; returns the "seconds" of the last.

    Raises:
        ValueError: the file is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     path = pathlib.Path(where) / "m.jsonl"
    ...     _ = path.write_text('{"round": 1, "seconds": 2.5}\\n{"round": 3, "seconds": 4}\\n{"rou')
    ...     rewind_jsonl(path, 2), path.read_text()
    (2.5, '{"round": 1, "seconds": 2.5}\\n')
    """
    with damaged(path):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] <= round]
        seconds = float(json.loads(kept[-1])["seconds"]) if kept else 0.0
    _replace_text(path, "".join(kept))
    return seconds


def _replace_text(path: pathlib.Path, text: str) -> None:
    """All of it or, if the program is killed, nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def run_folder(options: Options, name: str) -> pathlib.Path:
    """A new empty folder, as nothing that is there is overwritten; with `resume` an earlier one.

    Raises:
        FileExistsError: `--out` names a folder that is not empty.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     run_folder(Options(out=where + "/a"), "x").name
    'a'
    """
    if options.resume is not None:
        return pathlib.Path(options.resume)
    if options.out is not None:
        folder = pathlib.Path(options.out)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"out is {options.out!r}; allowed: a new or empty folder; --resume goes on with one")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    number = 1
    while True:
        try:
            (folder := pathlib.Path("runs") / f"{name}-{number}").mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


class _Speed(ProgressColumn):
    def render(self, task) -> Text:
        if task.speed is None:
            return Text("" if task.finished else "compiling", style="cyan")
        return Text(f"{task.speed:{'.0f' if task.speed >= 10 else '.2g'}} rounds/s", style="cyan")


def progress_bar() -> Progress:
    """A bar with rounds, rounds per second and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=3600,  # rounds of a large model take minutes, and of rich's 30 s none would be left
    )


def run_method(
    config: Experiment,
    algorithm: Algorithm,
    clients: Clients,
    seeds: Sequence[int],
    label: str,
    progress: Progress,
    on_record: Callable[[int, dict], None],
    layout: Layout | None = None,
    store: Store | None = None,
    group: int | None = None,
    checkpoints: Checkpoints | None = None,
    epsilon: Callable[[int, int], float] | None = None,
) -> list[list[report.Record]]:
    """Runs one method under a progress bar; returns the records of each seed.

    Args:
        config, clients, algorithm: which, for one device where `layout` is given.
        seeds: one, or with `layout` as many as are to run at once.
        label, progress: the bar's.
        on_record: gets the seed and the record of each evaluation as it comes.
        layout: of `placement.seeds_layout`.
        store: where the clients' states are to live, if not on the device.
        group: how many of a cohort's are then on the devices at a time, if not all.
        checkpoints: what is saved, and gone on from.
        epsilon: of `build_epsilon`.

    >>> from fedkd_jax.build import build_algorithm, build_data
    >>> from fedkd_jax.config import DataConfig
    >>> config = Experiment(rounds=1, data=DataConfig(clients=2))
    >>> clients = build_data(config)
    >>> algorithm = build_algorithm(config, config.methods["FedKD"], clients)
    >>> told = lambda seed, record: print(seed, record["round"])
    >>> (rows,) = run_method(config, algorithm, clients, [7], "FedKD", Progress(disable=True), told)
    7 1
    >>> rows[-1]["round"]
    1
    """
    done_before = 0 if checkpoints is None else checkpoints.latest() or 0
    task = progress.add_task(label, total=config.rounds, completed=done_before)
    counts, size = clients.test.count, clients.size
    of_clients = clients.scores[-1:] if len(counts) <= SEVERAL_CLIENTS else ()
    keys = jax.numpy.stack([jax.random.key(seed) for seed in seeds])

    def kept(record: report.Record) -> report.Record:
        if len(counts) <= FEW_CLIENTS or record["round"] == config.rounds:
            return record
        return {key: value for key, value in record.items() if not key.endswith("_of_client")}

    def records(histories: Sequence[History]) -> list[list[report.Record]]:
        own: dict[str, Any] = dict(of_clients=of_clients, epsilon=epsilon)
        of_seeds = (report.records(history, counts, size, **own) for history in histories)
        return [[kept(record) for record in run] for run in of_seeds]

    def on_evaluation(histories: Sequence[History]) -> None:
        for seed, of_seed in zip(seeds, records(histories), strict=True):
            on_record(seed, of_seed[-1])

    began = time.perf_counter()

    def on_rounds(done: int, _) -> None:
        waited = "" if store is None else f", {store.waited / (time.perf_counter() - began):.0%} waiting for states"
        progress.update(task, completed=done, description=label + waited)

    options: dict[str, Any] = dict(
        rounds=config.rounds,
        cohort=config.cohort,
        test=clients.test,
        eval_every=config.eval_every,
        eval_batch=clients.eval_batch,
        metrics=clients.metrics,
        on_rounds=on_rounds,
    )
    if layout is None:
        (key,) = keys
        options |= dict(on_evaluation=lambda history: on_evaluation([history]), store=store, eval_ids=clients.eval_ids)
        options |= dict(participation=build_participation(config), group=group, checkpoints=checkpoints)
        _, history = simulate(algorithm, size, clients.source or clients.train, key, **options)
        return records([history])
    options |= dict(on_evaluation=on_evaluation, layout=layout)
    _, histories = simulate_seeds(algorithm, size, clients.train, keys, **options)
    return records(histories)


def held_out(config: Experiment) -> str:
    """What is evaluated.

    >>> held_out(Experiment())
    'test'
    """
    return "validation" if config.data.validation else "test"


def make_table(rows: list[dict[str, str]], title: str) -> Table:
    """Rows as a table.

    >>> make_table([{"method": "FedKD", "bytes": "7"}], "traffic").row_count
    1
    """
    table = Table(title=title)
    for column in rows[0] if rows else ():
        table.add_column(column, justify="left" if column in ("method", "model") else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def write_table(folder: pathlib.Path, name: str, rows: list[dict[str, str]]) -> None:
    """Rows as NAME.md, to read, and NAME.csv.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     write_table(folder := pathlib.Path(where), "table", [{"a": "1"}]); sorted(path.name for path in folder.iterdir())
    ['table.csv', 'table.md']
    """
    (folder / f"{name}.md").write_text(report.markdown(rows) + "\n")
    (folder / f"{name}.csv").write_text(report.as_csv(rows))


def write_config(folder: pathlib.Path, config: Experiment) -> None:
    """The resolved config, to run the same again.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     write_config(pathlib.Path(where), Experiment()); load_config(where + "/config.yaml") == Experiment()
    True
    """
    _replace_text(folder / "config.yaml", to_yaml(config))


def plot_clients(folder: pathlib.Path, clients: Clients) -> None:
    """Writes clients.png: who holds what.

    >>> import tempfile
    >>> from fedkd_jax.build import build_data
    >>> from fedkd_jax.config import DataConfig
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> plot_clients(folder, build_data(Experiment(data=DataConfig(clients=2))))
    >>> [path.name for path in folder.iterdir()]
    ['clients.png']
    """
    plots.partition_plot(
        clients.labels,
        clients.parts,
        clients.classes,
        folder / "clients.png",
        unit=clients.unit,
        client_names=clients.names,
    )


def tell_remarks(folder: pathlib.Path, clients: Clients) -> None:
    """What a reader of the results has to know, on the console and in remarks.txt, if there is anything.

    >>> import tempfile
    >>> from fedkd_jax.build import build_data
    >>> with tempfile.TemporaryDirectory() as where:
    ...     tell_remarks(pathlib.Path(where), build_data(Experiment()))
    ...     list(pathlib.Path(where).iterdir())
    []
    """
    for remark in clients.remarks:
        console.print(remark)
    if clients.remarks:
        (folder / "remarks.txt").write_text("\n".join(clients.remarks) + "\n")


def append_jsonl(path: pathlib.Path, record: dict) -> None:
    """One line of JSON at the end of a file; a number that is not finite becomes null.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     append_jsonl(path := pathlib.Path(where) / "m.jsonl", {"round": 1, "model/auc": float("nan")}); path.read_text()
    '{"round": 1, "model/auc": null}\\n'
    """
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with path.open("a") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """The lines that `append_jsonl` wrote, null as NaN.

    Raises:
        ValueError: a line that is no record, with its file and number.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     append_jsonl(path := pathlib.Path(where) / "m.jsonl", {"round": 1, "model/auc": float("nan")}); read_jsonl(path)
    [{'round': 1, 'model/auc': nan}]
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}; allowed: a record, as JSON on one line") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number}: a {type(record).__name__}; allowed: a record, as JSON on one line"
            )
        records.append({k: math.nan if v is None else v for k, v in record.items()})
    return records


@contextlib.contextmanager
def one_line_errors():
    """Within it, an error in the user's input ends the program with one line on standard error instead of a traceback.

    >>> with one_line_errors(): pass
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.file.flush()
        sys.exit(f"error: {' '.join(str(error).split())}")
