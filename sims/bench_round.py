"""`python -m sims.bench round`: what a round of FedKD takes its time for, part by part, and the least each part could take.

Every part is a compiled program of its own on the data of one round. All run in turns, their limits among them. The population
is on the device, ten times the cohort. Parts need not add up to the whole round, an own program, in which the compiler sees
them together: it also counts messages, averages losses and looks for numbers that are not finite, and what one part leaves in a
cache the next one finds there. "batches" is local work whose steps only add their examples up; it is taken off the steps of
each model alone. "loss and W_h" is what of all local work is then left.

The limit of local steps is the longer of their matrix products alone and of reading and writing parameters and gradients; that
of compression the products that no method of ours does without (see bench_svd.py); that of the rest their bytes, at the speed
with which as many are read and written: by the device, by the host for a store in its memory, or into a file, as the system
buffers it, for one on disk, in the folder that the program runs in. All limits are measured; above 1, "of limit" is noise.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedkd_jax import DiskStore, HostStore, mutual_distillation
from fedkd_jax.aggregate import weighted_mean, weighted_sum
from fedkd_jax.algorithms.fedavg import task_step
from fedkd_jax.algorithms.fedkd import mutual_step
from fedkd_jax.codecs.base import named
from fedkd_jax.codecs.low_rank import max_factored_rank, view_by_shape
from fedkd_jax.cohort import put, sample_cohort, take
from fedkd_jax.data import take_clients
from fedkd_jax.local import local_steps
from fedkd_jax.losses import cross_entropy
from fedkd_jax.parallel import Layout, map_clients, place_rows
from fedkd_jax.population import init_state, place_data
from fedkd_jax.svd import sketch_columns
from fedkd_jax.types import Batch, FederatedData, Key, Model, PyTree, State
from sims import bench_svd, limits
from sims.workload import BATCH, CODEC, EXAMPLES, MODELS, SGD, interleave, make_algorithm, make_data, make_layout

STEPS = EXAMPLES // BATCH
THRESHOLD = 0.95  # the codec's in round 0
FOLD = 10  # clients of the population for each of the cohort
WHOLE = "whole round"


def task(model: Model, params: PyTree, batch: Batch) -> PyTree:
    """One step of one model alone.

    >>> model, (features,) = MODELS["mlp"]
    >>> batch = Batch(inputs=jnp.ones((2, features)), labels=jnp.arange(2), mask=jnp.ones(2, bool))
    >>> task(model, model.init(jax.random.key(0)), batch)["dense_1"]["bias"].shape
    (10,)
    """
    carry = params, SGD.init(params)
    return task_step(model, SGD, cross_entropy, {}, carry, batch, jax.random.key(0))[0][0]


def mutual(model: Model, params: tuple, batch: Batch) -> PyTree:
    """One step of FedKD, of `(teacher, W_h, student)`.

    >>> model, (features,) = MODELS["mlp"]
    >>> batch = Batch(inputs=jnp.ones((2, features)), labels=jnp.arange(2), mask=jnp.ones(2, bool))
    >>> student = model.init(jax.random.key(0))
    >>> mutual(model, (student, (jnp.eye(128),), student), batch)[1][0].shape
    (128, 128)
    """
    apply = lambda p: model.apply(p, batch.inputs)  # noqa: E731
    gradients, _ = mutual_step(apply, apply, mutual_distillation, params, batch)
    return optax.apply_updates(params, SGD.update(gradients, SGD.init(params), params)[0])


def train(
    step: Callable, layout: Layout, made: tuple, shared: PyTree, data: FederatedData, key: Key
) -> tuple[PyTree, PyTree]:
    """The local steps of a cohort: `step((own, shared), batch) -> (own, shared)` is one of one client. `made` is what this gave
    before, `(own [K], update [K])`; it goes on from its own and anew from the shared.

    >>> step = lambda params, batch: (params[0] + batch.mask.sum(), params[1] + 1)
    >>> made = jnp.zeros(2, int), jnp.zeros(2)
    >>> own, update = train(step, Layout(), made, jnp.float32(7), make_data("mlp", 2), jax.random.key(0))
    >>> own.tolist(), update.tolist()
    ([100, 100], [10.0, 10.0])
    """

    def one(own, start, count, shared, data):
        each = lambda carry, batch, _: (step(carry, batch), ())  # noqa: E731
        of_client = dataclasses.replace(data, start=start, count=count)
        (own, new), _ = local_steps(each, (own, shared), of_client, key, batch=BATCH)
        return (own, optax.tree.sub(new, shared)), ()

    return map_clients(one, (made[0], data.start, data.count), (shared, data), layout=layout)[0]


def factor_products(updates: PyTree, layout: Layout) -> Callable[[], PyTree]:
    """A program of the matrix products that no method of ours does without to factorise the updates `[K]`.

    >>> rng = np.random.default_rng(0)
    >>> updates = {"kernel": rng.normal(size=(2, 30, 20)).astype(np.float32), "bias": np.ones((2, 9))}
    >>> jax.tree.map(jnp.shape, factor_products(updates, Layout())())
    {'kernel': (2, 1, 20, 20)}
    """
    matrices, products = {}, {}
    for name, leaf in named(updates).items():
        if leaf.ndim < 3:
            continue  # travels raw
        stack = np.asarray(jax.vmap(view_by_shape(name, leaf[0]).matrices)(leaf))
        m, n = sorted(stack.shape[2:], reverse=True)
        if most := max_factored_rank(m, n):
            matrices[name] = stack if stack.shape[2:] == (m, n) else np.swapaxes(stack, 2, 3)
            columns, ranks = sketch_columns(n), bench_svd.exact_ranks(matrices[name][: bench_svd.STACK, 0], THRESHOLD)
            found = {"K": np.median(ranks), "raw": np.sum(ranks > most), "matrices": len(ranks)}
            which = bench_svd.limit(found, columns)
            products[name] = bench_svd.products(columns, most)[which]
    run = bench_svd.split(lambda own: {name: jax.vmap(products[name])(x) for name, x in own.items()}, layout)
    placed = place_rows(matrices, layout)
    return lambda: jax.block_until_ready(run(placed))


class Part(NamedTuple):
    """A program to call, and programs no shorter than which it could be: the longest of their times, each times a factor."""

    run: Callable[[], Any]
    limits: tuple[tuple[Callable[[], Any], float], ...]


def make_parts(kind: str, cohort: int, layout: Layout, repeats: int, folder: str) -> dict[str, Part]:
    """The parts of a round, all of local work as one; each may be called `repeats` times, and once before. The disk store is
    in `folder`.
    """
    (model, shape), algorithm, key = MODELS[kind], make_algorithm("FedKD", kind, layout), jax.random.key(0)
    state, data = init_state(algorithm, FOLD * cohort, key), place_data(make_data(kind, FOLD * cohort), layout)
    ids = sample_cohort(key, 0, FOLD * cohort, cohort)
    get = jax.jit(lambda population: take(population, ids))
    own, student, clients = take_clients(data, ids), state.server.params, place_rows(get(state.clients), layout)
    nothing = place_rows(jax.tree.map(lambda x: jnp.zeros((cohort, *x.shape)), student), layout)
    copy = functools.partial(jax.tree.map, jnp.copy)  # of what is consumed
    split = lambda fn: jax.jit(lambda stack: map_clients(lambda x: (fn(x), ()), (stack,), layout=layout)[0])  # noqa: E731

    def local(step, own_states, shared):
        made = copy((own_states, nothing if shared else ()))
        run = jax.jit(functools.partial(train, step, layout), donate_argnums=0)
        return limits.renewing(run, made, shared, own, key)

    def idle(params, batch):
        return params[0] + batch.inputs.sum() + batch.labels.sum() + batch.mask.sum(), ()

    def teach(params, batch):
        return task(model, params[0], batch), ()

    def study(params, batch):
        return (), task(model, params[1], batch)

    def distil(params, batch):
        *private, shared = mutual(model, (*params[0], params[1]), batch)
        return tuple(private), shared

    @jax.jit
    def aggregate(payloads):
        each = lambda payload: ((), (payload, jnp.float32(EXAMPLES)))  # noqa: E731
        add_up = lambda sent: ((CODEC.decode_sum or weighted_sum)(*sent), sent[1].sum())  # noqa: E731
        return weighted_mean(map_clients(each, (payloads,), layout=layout, sum_fn=add_up)[1])

    def put_back(population, made):
        written = put(population, ids, made)
        whole = layout.sharding("clients")
        return written if whole is None else jax.lax.with_sharding_constraint(written, whole)

    def one_round(state):
        server, made, _ = algorithm.round(state.server, take(state.clients, ids), own, ids, key)
        return State(server=server, clients=put_back(state.clients, made))

    work = local(distil, (clients.teacher, clients.projection), student)
    updates = copy(work()[1])
    encode, down = split(lambda x: CODEC.encode(x, 0, key)), jax.jit(lambda x: CODEC.decode(CODEC.encode(x, 0, key)))
    payloads = encode(updates)
    mean = aggregate(payloads)

    # what bounds them
    one = Batch(inputs=jnp.ones((BATCH, *shape)), labels=jnp.zeros(BATCH, int), mask=jnp.ones(BATCH, bool))
    projection = jax.tree.map(lambda x: x[0], clients.projection)
    alone = limits.products_of(lambda p: task(model, p, one), student)
    both = limits.products_of(lambda *p: mutual(model, p, one), student, projection, student)

    def steps_limits(products, params):
        size = limits.nbytes(params)
        sweep = limits.sweep(size, cohort, STEPS, layout)
        factor = limits.step_bytes(params, ()) / (2 * size)
        return ((limits.multiply(products, cohort, STEPS, layout), 1.0), (sweep, factor))

    rows = limits.nbytes(clients)
    moved = limits.stream(rows, layout)
    messages = (int(payloads.nbytes.sum()) + limits.nbytes(mean)) / (2 * rows)
    source, target = b"1" * rows, np.ones(rows, np.uint8)
    file = os.open(pathlib.Path(folder) / "limit.bin", os.O_RDWR | os.O_CREAT)
    own_data = EXAMPLES * limits.nbytes((one.inputs[0], one.labels[0])) * cohort
    parts = {
        "batches": Part(
            local(idle, place_rows(jnp.zeros(cohort), layout), ()), ((limits.stream(own_data, layout), 1.0),)
        ),
        "teacher steps": Part(local(teach, clients.teacher, ()), steps_limits(alone, student)),
        "student steps": Part(local(study, (), student), steps_limits(alone, student)),
        "local work": Part(work, steps_limits(both - alone - alone, projection)),
        "compression up": Part(lambda: encode(updates), ((factor_products(updates, layout), 1.0),)),
        "aggregation": Part(lambda: aggregate(payloads), ((moved, messages),)),
        "compression down": Part(lambda: down(mean), ((factor_products(stacked(mean), Layout()), 1.0),)),
        "read the cohort": Part(lambda: get(state.clients), ((moved, 1.0),)),
        "write-back": Part(
            limits.renewing(jax.jit(put_back, donate_argnums=0), copy(state.clients), clients),
            ((moved, 1.0),),
        ),
        WHOLE: Part(limits.renewing(jax.jit(one_round, donate_argnums=0), copy(state)), ()),
    }
    for name, store, limit in (
        ("host", HostStore(), lambda: np.copyto(target, np.frombuffer(source, np.uint8))),
        ("disk", DiskStore(folder), lambda: os.pwrite(file, source, 0)),
    ):
        store.open(algorithm, key)
        # a copy for each call: JAX keeps what it has fetched from an accelerator
        copies = iter([copy(clients) for _ in range(repeats + 1)])
        write = lambda store=store, copies=copies: store.write(np.asarray(ids), next(copies))  # noqa: E731
        parts[f"write-back, {name} store"] = Part(write, ((limit, 1.0),))
    return parts


def stacked(tree: PyTree) -> PyTree:
    """As of one client `[1, ...]`.

    >>> stacked(np.ones(3)).shape
    (1, 3)
    """
    return jax.tree.map(lambda x: x[None], tree)


def bench_round(devices: int, quick: bool) -> Iterator[dict]:
    """A row per part, then their sum, the whole round, and writing back to stores."""
    for kind, cohort, repeats in (("mlp", 10, 3),) if quick else (("mlp", 100, 15), ("cnn", 20, 5)):
        with tempfile.TemporaryDirectory(dir=".", prefix="bench-round-") as folder:
            parts = make_parts(kind, cohort, make_layout(devices), repeats, folder)
            programs: dict = {name: part.run for name, part in parts.items()}
            programs |= {(name, i): fn for name, part in parts.items() for i, (fn, _) in enumerate(part.limits)}
            times = interleave(
                {name: lambda fn=fn: jax.block_until_ready(fn()) for name, fn in programs.items()}, repeats
            )
        ms = {name: 1e3 * t["wall"] for name, t in times.items()}
        least = {
            name: max((ms[name, i] * factor for i, (_, factor) in enumerate(part.limits)), default=0.0)
            for name, part in parts.items()
        }
        yield from table(f"FedKD {kind}", {name: ms[name] for name in parts}, least)


def table(method: str, ms: dict[str, float], least: dict[str, float]) -> list[dict]:
    """Rows of what was measured and its limits, in milliseconds.

    >>> ms = {"batches": 1.0, "teacher steps": 4.0, "student steps": 3.0, "local work": 8.0}
    >>> ms |= {"whole round": 10.0, "write-back, disk store": 4.0}
    >>> for row in table("FedKD", ms, dict.fromkeys(ms, 1.0)): print(row["part"], row["ms"], row["limit ms"])
    batches 1.0 1.0
    teacher steps 3.0 1.0
    student steps 2.0 1.0
    loss and W_h 2.0 1.0
    sum of the parts 8.0 4.0
    whole round 10.0 4.0
    write-back, disk store 4.0 1.0
    """
    teacher, student = (ms[f"{name} steps"] - ms["batches"] for name in ("teacher", "student"))
    rest = ms["local work"] - ms["batches"] - teacher - student
    ms = ms | {"teacher steps": teacher, "student steps": student, "local work": rest}
    stores = [name for name in ms if name.endswith("store")]
    inside = [name for name in ms if name not in (*stores, WHOLE)]
    total = sum(least[name] for name in inside)
    shown = [("loss and W_h" if name == "local work" else name, ms[name], least[name]) for name in inside]
    shown += [("sum of the parts", sum(ms[name] for name in inside), total), (WHOLE, ms[WHOLE], total)]
    shown += [(name, ms[name], least[name]) for name in stores]
    return [{"method": method, "part": p, "ms": t, "limit ms": limit, "of limit": limit / t} for p, t, limit in shown]
