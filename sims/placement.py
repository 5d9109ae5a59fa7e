"""Where clients and seeds run, and whether they fit: the layout asked for, or the one that suits the hardware."""

import time
from collections.abc import Mapping

import jax

from fedkd_jax import Layout, client_mesh, init_state, report, simulate
from fedkd_jax.build import build_algorithm
from fedkd_jax.config import Experiment
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
    cohort = config.cohort or len(clients.parts)
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


def check_memory(algorithms: Mapping[str, Algorithm], clients: Clients) -> None:
    """Refuses methods whose clients' states do not fit this machine's memory, before anything is made.

    Raises:
        ValueError: naming the method and the bytes.

    >>> from fedkd_jax.build import build_data
    >>> config, clients = Experiment(), build_data(Experiment())
    >>> check_memory({"FedKD": build_algorithm(config, config.methods["FedKD"], clients)}, clients)
    """
    limit, size = hardware.memory_bytes(), len(clients.parts)
    for name, algorithm in algorithms.items():
        if (held := _state_bytes(algorithm, clients)) > limit:
            raise ValueError(
                f"methods.{name} keeps states of {size:,} clients, {report.human_bytes(held)}; allowed: at most this machine's "
                f"memory, {report.human_bytes(limit)} (fewer clients, smaller models, sgd, reset_optimizer)"
            )


def _state_bytes(algorithm: Algorithm, clients: Clients) -> int:
    state = jax.eval_shape(lambda: init_state(algorithm, len(clients.parts), jax.random.key(0)))
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
    states = -(-seeds // devices) * devices * _state_bytes(algorithm, clients)
    one = hardware.memory_bytes() / (1 if on_cpu else jax.device_count())  # they are made on one device, and held twice
    if 2 * states > one:
        return None
    return Layout(mesh=client_mesh(devices) if devices > 1 else None, chunk=1 if on_cpu else None)


def seconds_per_round(algorithm, clients: Clients, cohort: int | None, repeats: int = 3) -> list[float]:
    """Wall time of compiled rounds, the compilation left out."""
    state, _ = simulate(algorithm, len(clients.parts), clients.train, jax.random.key(0), rounds=2, cohort=cohort)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        state, _ = simulate(algorithm, state, clients.train, jax.random.key(0), rounds=2, cohort=cohort)
        times.append((time.perf_counter() - start) / 2)
    return times
