"""What `sims.bench` times, and how: 100 random examples a client, one epoch of batch 10, SGD, and programs in turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from fedkd_jax import cnn, energy_threshold, fedavg, fedkd, mlp, svd_codec
from fedkd_jax.parallel import Layout, client_mesh
from fedkd_jax.types import Algorithm, FederatedData

EXAMPLES, BATCH = 100, 10
MODELS = {"mlp": (mlp((64, 128, 10)), (64,)), "cnn": (cnn(), (28, 28, 1))}
SGD = optax.sgd(0.05)
CODEC = svd_codec(energy_threshold(0.95, 0.98, rounds=100))


def make_data(kind: str, clients: int) -> FederatedData:
    """Random examples of the model's input shape.

    >>> make_data("mlp", 3).inputs.shape
    (300, 64)
    """
    rng, n = np.random.default_rng(0), clients * EXAMPLES
    return FederatedData(
        inputs=rng.random((n, *MODELS[kind][1]), np.float32),
        labels=rng.integers(0, 10, n).astype(np.int32),
        start=np.arange(clients, dtype=np.int32) * EXAMPLES,
        count=np.full(clients, EXAMPLES, np.int32),
        max_count=EXAMPLES,
    )


def make_algorithm(method: str, kind: str, layout: Layout) -> Algorithm:
    """The method on the model of that kind.

    >>> sorted(make_algorithm("FedKD", "mlp", Layout()).predict)
    ['student', 'teacher']
    """
    model, shape = MODELS[kind]
    if method == "FedAvg":
        return fedavg(model, optimizer=SGD, batch=BATCH, layout=layout)
    codec = CODEC if method == "FedKD" else None
    example = np.ones((1, *shape), np.float32)
    optimizers = {"teacher_optimizer": SGD, "student_optimizer": SGD}
    return fedkd(model, model, example=example, batch=BATCH, uplink=codec, downlink=codec, layout=layout, **optimizers)


def make_layout(devices: int, chunk: int | None = None) -> Layout:
    """
    >>> make_layout(1, 4).groups(8)
    (2, 4)
    """
    return Layout(mesh=client_mesh(devices) if devices > 1 else None, chunk=chunk)


def interleave(programs: dict[Any, Callable], repeats: int) -> dict[Any, dict[str, float]]:
    """Median wall and processor seconds of each program, run in turns after one call to warm up.

    >>> sorted(interleave({"nothing": lambda: None}, 3)["nothing"])
    ['cpu', 'wall']
    """
    for program in programs.values():
        program()
    times = {name: {"wall": [], "cpu": []} for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            program()
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return {name: {clock: statistics.median(t) for clock, t in both.items()} for name, both in times.items()}
