"""Where clients and seeds run, and whether they fit: the layout asked for, or the one that suits the hardware."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping

import jax

from fedkd_jax import DiskStore, HostStore, Layout, client_mesh, init_state, report, simulate
from fedkd_jax.build import build_algorithm
from fedkd_jax.config import Experiment
from fedkd_jax.population import Store
from fedkd_jax.tasks import Clients
from fedkd_jax.types import Algorithm
from sims import hardware
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
    out = pathlib.Path(options.out or "runs").absolute()
    folder = next(p for p in (out, *out.parents) if p.exists())
    limits = {
        "device": (hardware.memory_bytes(), "the devices' memory"),
        "host": (hardware.host_memory_bytes() // 2, "half of the memory"),
        "disk": (shutil.disk_usage(folder).free, "what is free on the disk"),
    }
    chosen = {}
    for name, algorithm in algorithms.items():
        every = _state_bytes(algorithm, clients)
        held = {"device": every, "host": every * touched // size, "disk": every * touched // size}
        places = list(limits) if options.store == "auto" else [options.store]
        if clients.source is not None and "device" in places:  # rounds with all states there want all examples there
            places.remove("device")
            if not places:
                raise ValueError(
                    "store is 'device' for clients who are made when their turn comes; allowed: 'auto', 'host', 'disk'"
                )
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
def open_store(where: str, folder: pathlib.Path) -> Iterator[Store | None]:
    """The store of a run, None for "device"; what "disk" keeps is deleted at the end.

    >>> with open_store("host", pathlib.Path()) as store: len(store)
    0
    """
    if where != "disk":
        yield HostStore() if where == "host" else None
        return
    with tempfile.TemporaryDirectory(prefix="states-", dir=folder) as states:
        store = DiskStore(states)
        try:
            yield store
        finally:
            store.close()


def _state_bytes(algorithm: Algorithm, clients: Clients) -> int:
    state = jax.eval_shape(lambda: init_state(algorithm, clients.size, jax.random.key(0)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def seeds_layout(options: Options, seeds: int, algorithm: Algorithm, clients: Clients, layout: Layout) -> Layout | None:
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
