"""`python -m sims.bench text`: how fast transformers train, against the matrix products in them alone, and what clients hold.

The model has MiniLM's size (6 layers, width 384, 12 heads), its embeddings are frozen; tokens are random, as the time does not
depend on them. A step is forward, backward and Adam, several in one compiled loop, as in a round; FedKD's is a teacher's and a
student's with all losses, in a round of one client without compression. The limit is the matrix products of a step, of the same
shapes, one after the other and nothing else, in the same process.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedkd_jax import cross_entropy, fedkd, init_state
from fedkd_jax.algorithms.fedavg import task_step
from fedkd_jax.data import federate
from fedkd_jax.models import TransformerConfig, freeze, is_fixed, split_params, text_classifier
from fedkd_jax.types import Batch, Model, PyTree
from sims.workload import interleave

STEPS = 3
CLIENTS = 64


def model_of(layers: int) -> Model:
    """MiniLM's first layers as a classifier, not pretrained.

    >>> sorted(split_params(model_of(1), jax.eval_shape(model_of(1).init, jax.random.key(0)))[1])
    ['embeddings']
    """
    return freeze(text_classifier(TransformerConfig(layers=layers), 2), is_fixed)


def products(layers: int, batch: int, length: int) -> tuple[list[tuple[Callable, tuple, int]], float]:
    """Every matrix product of a step as `(function, arguments, how often)`, and their floating point operations.

    Forward, and backward with respect to both factors; the lowest layer's input needs no gradient and counts all the same.

    >>> round(products(6, 16, 64)[1] / 1e9)
    67
    """
    config = TransformerConfig()
    width, inner, heads, rows = config.width, config.inner, config.heads, batch * length
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    x, y = normal(rows, width), normal(rows, inner)
    square, up, down = normal(width, width), normal(width, inner), normal(inner, width)
    each, maps = normal(batch, heads, length, config.head_width), normal(batch, heads, length, length)
    forward = jax.jit(lambda a, b: a @ b)
    weight = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((0,), (0,)), ((), ()))))
    scores = jax.jit(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b))
    mix = jax.jit(lambda a, b: jnp.einsum("bhqk,bhkd->bhqd", a, b))
    once = [
        (forward, (x, square), 8),  # four projections, and their gradients with respect to the input
        (forward, (x, up), 2),
        (forward, (y, down), 2),
        (weight, (x, x), 4),
        (weight, (x, y), 1),
        (weight, (y, x), 1),
        (scores, (each, each), 2),
        (mix, (maps, each), 4),
    ]
    per_layer = 3 * 2 * rows * (4 * width**2 + 2 * width * inner) + 6 * 2 * rows * length * width
    return [(fn, args, n * layers) for fn, args, n in once], float(layers * per_layer)


def bench_text(devices: int, quick: bool) -> Iterator[dict]:
    """Training steps against their products, then the bytes of a population."""
    del devices  # a product uses all cores
    sizes = ((6, 16, 64), (6, 32, 48), (2, 16, 64), (6, 8, 40), ((6, 2), 8, 40), ((6, 2), 16, 64))
    for layers, batch, length in ((2, 2, 8), ((2, 1), 2, 8)) if quick else sizes:
        both = isinstance(layers, tuple)
        steps = mutual_steps(*layers, batch, length) if both else task_steps(layers, batch, length)
        parts = [products(n, batch, length) for n in (layers if both else (layers,))]
        flops = sum(part[1] for part in parts)

        def multiply(parts=parts):
            for fn, args, n in (product for work, _ in parts for product in work):
                jax.block_until_ready([fn(*args) for _ in range(n)])

        times = interleave(
            {"step": lambda f=steps: jax.block_until_ready(f()), "products": multiply}, 2 if quick else 7
        )
        step, limit = times["step"]["wall"] / STEPS, times["products"]["wall"]
        model = "FedKD of {} and {}".format(*layers) if both else layers
        yield {
            "what": f"step of {model} layers, {batch} x {length} tokens",
            "ms": 1e3 * step,
            "products ms": 1e3 * limit,
            "share": limit / step,
            "tokens/s": batch * length / step,
            "GFLOP/s": flops / step / 1e9,
            "MB": None,
        }
    for name, size in population_bytes(CLIENTS).items():
        empty = dict.fromkeys(("ms", "products ms", "share", "tokens/s", "GFLOP/s"))
        yield {"what": f"{CLIENTS} clients: {name}", **empty, "MB": size / 1e6}


def task_steps(layers: int, batch: int, length: int) -> Callable[[], PyTree]:
    """`STEPS` steps of one model on one batch, compiled.

    >>> callable(task_steps(1, 2, 8))
    True
    """
    model, optimizer = model_of(layers), optax.adam(1e-5)
    params, frozen = split_params(model, jax.jit(model.init)(jax.random.key(0)))
    mini = Batch(inputs=_tokens(batch, length), labels=jnp.arange(batch) % 2, mask=jnp.ones(batch, bool))

    @jax.jit
    def train(carry):
        one = lambda i, c: task_step(model, optimizer, cross_entropy, frozen, c, mini, jax.random.key(i))[0]  # noqa: E731
        return jax.lax.fori_loop(0, STEPS, one, carry)

    carry = (params, optimizer.init(params))
    return lambda: train(carry)


def mutual_steps(teacher: int, student: int, batch: int, length: int) -> Callable[[], PyTree]:
    """A round of FedKD of one client that makes `STEPS` steps, compiled.

    >>> callable(mutual_steps(2, 1, 2, 8))
    True
    """
    algorithm = _fedkd(teacher, student, batch, reset_student_optimizer=True)
    state = init_state(algorithm, 1, jax.random.key(0))
    tokens = _tokens(STEPS * batch, length)
    data = federate(np.asarray(tokens), np.arange(len(tokens)) % 2, [np.arange(len(tokens))])
    round_of = jax.jit(algorithm.round)
    return lambda: round_of(state.server, state.clients, data, jnp.arange(1), jax.random.key(2))


def _tokens(batch, length):
    return jax.random.randint(jax.random.key(1), (batch, length), 1, 30522)


def _fedkd(teacher, student, batch, **options):
    optimizers = {"teacher_optimizer": optax.adam(1e-5), "student_optimizer": optax.adam(1e-5)}
    example = jnp.ones((1, 8), jnp.int32)
    models = model_of(teacher), model_of(student)
    return fedkd(*models, example=example, batch=batch, share_frozen=True, **optimizers, **options)


def population_bytes(clients: int) -> dict[str, int]:
    """What FedKD's state holds for so many clients, without making it.

    >>> population_bytes(2)["embeddings, held once"] == 4 * 384 * (30522 + 512 + 2 + 2)  # words, places, segments, a norm
    True
    """
    algorithm = _fedkd(6, 2, 16, reset_student_optimizer=False)
    state = jax.eval_shape(lambda: init_state(algorithm, clients, jax.random.key(0)))
    nbytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    embeddings = nbytes(state.server.frozen)
    return {
        "embeddings, held once": embeddings,
        "embeddings, were they stacked": clients * embeddings,
        "teachers, stacked": nbytes(state.clients.teacher),
        "teachers' Adam states": nbytes(state.clients.teacher_opt),
        "W_h and its Adam states": nbytes((state.clients.projection, state.clients.projection_opt)),
        "student, held once": nbytes(state.server.params),
        "students' Adam states, unless they start anew each round": nbytes(state.clients.student_opt),
    }
