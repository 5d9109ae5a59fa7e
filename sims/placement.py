"""Where clients and seeds run, and whether they fit: the layout asked for, or the one that suits the hardware."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax import DiskStore, HostStore, Layout, client_mesh, report, simulate
from fedkd_jax.build import build_algorithm
from fedkd_jax.config import Experiment, ParticipationConfig
from fedkd_jax.data import take_clients
from fedkd_jax.population import state_shapes
from fedkd_jax.rounds import Round
from fedkd_jax.stores import Store
from fedkd_jax.tasks import Clients
from fedkd_jax.types import Algorithm
from sims import hardware, limits
from sims.common import Options, console


def choose_layout(config: Experiment, options: Options, clients: Clients) -> Layout:
    """The layout asked for, or the one that suits the hardware.

    >>> from fedkd_jax.build import build_data
    >>> from fedkd_jax.config import DataConfig
    >>> config = Experiment(data=DataConfig(clients=3))
    >>> choose_layout(config, Options(devices=1, chunk="2"), build_data(config)).chunk
    2
    """
    cohort = config.cohort or clients.size
    devices = hardware.choose_devices(options.devices, cohort)
    mesh = client_mesh(devices) if devices > 1 else None
    if options.chunk == "auto":
        limit = device_bytes(options)
        if limit is not None:
            chunk = fit_chunk(config, options, clients, -(-cohort // devices), limit)
            return Layout(mesh=mesh, chunk=hardware.agreed(chunk))
        # under vmap all clients of a chunk take as many steps as the largest of them
        ragged = clients.train.count.max() > 2 * clients.train.count.mean()
        return Layout(mesh=mesh, chunk=1 if ragged and jax.default_backend() == "cpu" else None)
    if options.chunk != "measure":
        return Layout(mesh=mesh, chunk=int(options.chunk))
    per_device = -(-cohort // devices)
    sizes = sorted({1, min(8, per_device), per_device})
    method = config.methods[options.method or next(iter(config.methods))]
    times = {}
    for chunk in sizes:
        algorithm = build_algorithm(config, method, clients, layout := Layout(mesh=mesh, chunk=chunk))
        times[layout] = min(seconds_per_round(algorithm, clients, config.cohort))
    for layout, seconds in times.items():
        console.print(f"  chunk {layout.chunk}: {1e3 * seconds:.1f} ms a round")
    return min(times, key=lambda layout: times[layout])


def device_bytes(options: Options) -> float | None:
    """What a device may take: as asked for, or what an accelerator has; a CPU's is None, the machine's memory.

    >>> device_bytes(Options(memory=2.0))
    2000000000.0
    """
    if options.memory is not None:
        return 1e9 * options.memory
    return None if jax.default_backend() == "cpu" else hardware.memory_bytes() / jax.local_device_count()


def fit_chunk(config: Experiment, options: Options, clients: Clients, most: int, limit: float) -> int | None:
    """How many clients train at once on a device so that what they need beside their states is half of `limit` bytes; None
    where that is `most`, all. Compiles a round of two clients and of three, to see what each needs; one is not under `vmap`.
    """
    method = config.methods[options.method or next(iter(config.methods))]

    def needed(chunk: int) -> int:
        algorithm = build_algorithm(config, method, clients, Layout(chunk=chunk))
        ids, key = jnp.arange(chunk), jax.random.key(0)
        data = clients.train if clients.source is None else clients.source.take(np.arange(chunk))
        args = (algorithm.init_server, algorithm.init_clients)
        server, states = jax.eval_shape(lambda k: (args[0](k), args[1](k, ids)), key)
        lowered = jax.jit(algorithm.round).lower(server, states, take_clients(data, np.arange(chunk)), ids, key)
        analysis: Any = lowered.compile().memory_analysis()
        return analysis.temp_size_in_bytes

    if min(most, clients.size) < 3:
        return None
    return fitting(needed(2), needed(3), limit / 2, most)


def fitting(two: int, three: int, limit: float, most: int) -> int | None:
    """How many clients fit into `limit` bytes, where two need so many and three so many; at least one, None for `most`.

    >>> [fitting(100, 130, limit, 20) for limit in (90, 100, 190, 10_000)]
    [1, 2, 5, None]
    """
    many = 2 + int((limit - two) / max(three - two, 1)) if two <= limit else 1
    return None if many >= most else many


def choose_group(options: Options, algorithm: Algorithm, cohort: int) -> int | None:
    """With a store, how many of a cohort's states are on the devices at a time, None for all: as asked for, or so many that
    what is trained, read ahead and written back takes half of the devices' memory, which on a CPU is half of the machine's.
    Also all of a method whose round is not in two parts.

    >>> from fedkd_jax import local_only, mlp
    >>> import optax
    >>> algorithm = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2)
    >>> choose_group(Options(memory=1e-6), algorithm, 64), choose_group(Options(), algorithm, 64)
    (4, None)
    """
    if not isinstance(algorithm.round, Round):
        return None
    if options.group != "auto":
        return min(int(options.group), cohort)
    devices = (algorithm.layout or Layout()).devices
    limit = device_bytes(options)
    there = hardware.host_memory_bytes() / 2 if limit is None else limit * devices
    each = limits.nbytes(jax.eval_shape(algorithm.init_clients, jax.random.key(0), jnp.arange(1)))
    group = max(devices, int(there / 2 / max(3 * each, 1)))
    return hardware.agreed(None if group >= cohort else group)


def choose_stores(
    config: Experiment, options: Options, algorithms: Mapping[str, Algorithm], clients: Clients
) -> dict[str, str]:
    """Where each method's client states are to live, "device", "host" or "disk": as asked for, or the first that holds them.

    The devices' memory must hold all N clients' states, half of the machine's or the disk those of clients that rounds sample.

    Raises:
        ValueError: naming the method and the bytes, where they do not fit.

    >>> from fedkd_jax.build import build_data
    >>> config, clients = Experiment(), build_data(Experiment())
    >>> algorithms = {"FedKD": build_algorithm(config, config.methods["FedKD"], clients)}
    >>> choose_stores(config, Options(), algorithms, clients)
    {'FedKD': 'device'}
    """
    size = clients.size
    touched = min(size, config.rounds * (config.cohort or size))
    out = pathlib.Path(options.resume or options.out or "runs").absolute()
    folder = next(p for p in (out, *out.parents) if p.exists())
    there = sum(path.stat().st_size for path in out.glob("checkpoint/clients*.bin")) if options.resume else 0
    limits = {
        "device": (hardware.memory_bytes(), "the devices' memory"),
        "host": (hardware.host_memory_bytes() // 2, "half of the memory"),
        "disk": (shutil.disk_usage(folder).free + there, "what is free on the disk"),
    }
    chosen = {}
    for name, algorithm in algorithms.items():
        every = _state_bytes(algorithm, clients)
        held = {
            "device": every,
            "host": every * touched // size // jax.process_count(),
            "disk": every * touched // size,
        }
        places = list(limits) if options.store == "auto" else [options.store]
        several = (
            jax.process_count() > 1
        )  # rounds with all states on the device want all examples there, and one process
        if (clients.source is not None or several) and "device" in places:
            places.remove("device")
            if not places:
                why = "several processes" if several else "clients who are made when their turn comes"
                raise ValueError(f"store is 'device' for {why}; allowed: 'auto', 'host', 'disk'")
        fits = [place for place in places if held[place] <= limits[place][0]]
        if not fits:
            limit, what = limits[places[-1]]
            raise ValueError(
                f"methods.{name} keeps states of {size if places == ['device'] else touched:,} clients, "
                f"{report.human_bytes(held[places[-1]])}; allowed: at most {what}, {report.human_bytes(limit)} "
                "(fewer clients, smaller models, sgd, reset_optimizer, --store auto)"
            )
        chosen[name] = fits[0]
    return chosen


@contextlib.contextmanager
def open_store(where: str, folder: pathlib.Path, *, stays: bool = False) -> Iterator[Store | None]:
    """The store of a run, None for "device"; what "disk" keeps is deleted at the end, unless it `stays`.

    >>> with open_store("host", pathlib.Path()) as store: len(store)
    0
    """
    if where != "disk":
        yield HostStore() if where == "host" else None
        return
    temporary = contextlib.nullcontext(folder) if stays else tempfile.TemporaryDirectory(prefix="states-", dir=folder)
    with temporary as states, contextlib.closing(DiskStore(states, resume=stays)) as store:
        yield store


def _state_bytes(algorithm: Algorithm, clients: Clients) -> int:
    return limits.nbytes(state_shapes(algorithm, clients.size))


def seeds_layout(
    options: Options,
    seeds: int,
    algorithm: Algorithm,
    clients: Clients,
    layout: Layout,
    participation: ParticipationConfig = ParticipationConfig(),
) -> Layout | None:
    """How so many seeds of a method run at once; None where one runs after another, its clients split over the devices.

    Seeds are split over the devices, if that gives more than half of them one. On an accelerator those of a device run under
    `vmap`, on a CPU one after another. Only if asked to: on a CPU what devices wait less for each other was no more, in 30
    rounds of a small model, than the larger program took longer to compile, and it was not measured elsewhere.

    >>> from fedkd_jax.build import build_data
    >>> config, clients = Experiment(), build_data(Experiment())
    >>> algorithm = build_algorithm(config, config.methods["FedKD"], clients)
    >>> seeds_layout(Options(seeds_at_once=False), 3, algorithm, clients, Layout()) is None
    True
    """
    devices, on_cpu = min(layout.devices, seeds), jax.default_backend() == "cpu"
    if not options.seeds_at_once or seeds < 2 or 2 * seeds <= layout.devices:
        return None
    if clients.eval_ids is not None:  # `simulate_seeds` has everybody's examples and states on the device
        return None
    if participation != ParticipationConfig():  # and everybody takes part with all of it
        return None
    states = -(-seeds // devices) * devices * _state_bytes(algorithm, clients)
    one = hardware.memory_bytes() / (1 if on_cpu else jax.device_count())  # they are made on one device, and held twice
    if 2 * states > one:
        return None
    return Layout(mesh=client_mesh(devices) if devices > 1 else None, chunk=1 if on_cpu else None)


def seconds_per_round(algorithm, clients: Clients, cohort: int | None, repeats: int = 3) -> list[float]:
    """Wall time of compiled rounds, the compilation left out."""
    fits = clients.source is None and _state_bytes(algorithm, clients) <= hardware.memory_bytes()
    store, data = None if fits else HostStore(), clients.source or clients.train
    state, _ = simulate(algorithm, clients.size, data, jax.random.key(0), rounds=2, cohort=cohort, store=store)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        state, _ = simulate(algorithm, state, data, jax.random.key(0), rounds=2, cohort=cohort)
        times.append((time.perf_counter() - start) / 2)
    return times
