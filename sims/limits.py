"""What a machine allows at most: the matrix products of a program and nothing else, and memory that is read and written.

Both are measured in the process that is to be judged, for as many clients and local steps as its round has, laid out over the
hardware as that is. No program is shorter than the longer of the two.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

from fedkd_jax.parallel import Layout, map_clients, place
from fedkd_jax.types import PyTree


class Product(NamedTuple):
    """A matrix product by its shapes, of which axes are summed over and which are alike."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    axes: Any  # `dimension_numbers` of `jax.lax.dot_general`

    @property
    def flops(self) -> int:
        """
        >>> Product((2, 3), (3, 4), (((1,), (0,)), ((), ()))).flops
        48
        """
        (_, summed), (_, alike) = self.axes
        return 2 * math.prod(self.left) * math.prod(self.right) // math.prod(self.right[i] for i in (*summed, *alike))


def products_of(fn: Callable, *args: PyTree) -> collections.Counter[Product]:
    """The products that `fn(*args)` makes, and how often; of a loop's body and of every branch once. `args` may be shapes.

    >>> gradient = jax.grad(lambda w, x: jnp.sum((x @ w) ** 2))  # of the weights alone: forward, and once backward
    >>> sorted(products_of(gradient, jnp.ones((3, 4)), jnp.ones((2, 3))).values())
    [1, 1]
    """
    return _products(jax.make_jaxpr(fn)(*args).jaxpr)


def _products(jaxpr: Jaxpr) -> collections.Counter[Product]:
    found, used = collections.Counter(), {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not used.intersection(eqn.outvars):
            continue  # the compiler leaves it out, too
        used.update(v for v in eqn.invars if not isinstance(v, Literal))
        if eqn.primitive is jax.lax.dot_general_p:
            factors: Any = [v.aval for v in eqn.invars]
            left, right = (tuple(x.shape) for x in factors)
            found[Product(left, right, eqn.params["dimension_numbers"])] += 1
        for inner in jaxprs_in_params(eqn.params):
            found += _products(inner)
    return found


def multiply(products: collections.Counter[Product], clients: int, steps: int, layout: Layout) -> Callable[[], PyTree]:
    """A program that makes the products `steps` times for each client, who has factors of his own, and nothing else.

    >>> product = Product((2, 3), (3, 4), (((1,), (0,)), ((), ())))
    >>> multiply(collections.Counter({product: 2}), 3, 5, Layout())().tolist()
    [6.0, 6.0, 6.0]
    """
    # factors of one shape are one array, but that no product is made twice: the second would be left out
    calls = [((p.left, i), (p.right, 0), p.axes) for p, often in products.items() for i in range(often)]
    names = {name for call in calls for name in call[:2]}
    changed: set = set()
    for left, right, _ in calls:
        if not changed & {left, right}:
            changed.add(min(left, right, key=lambda name: math.prod(name[0])))

    def one(value, steps):
        factors = {name: jnp.full(name[0], value) for name in names}
        product = lambda f: [jax.lax.dot_general(f[left], f[right], axes) for left, right, axes in calls]  # noqa: E731

        def again(_, state):
            factors, outs = state
            # one number of a factor of each product comes from the step before, or they would be made once, before the loop
            new = jnp.where(outs[0].reshape(-1)[0] > 0, value, 1.0)
            factors = factors | {name: factors[name].at[(0,) * len(name[0])].set(new) for name in changed}
            return factors, product(factors)

        zeros = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(product, factors)]
        _, outs = jax.lax.fori_loop(0, steps, again, (factors, zeros))
        return sum(x.reshape(-1)[0] for x in outs), ()

    return _over_clients(one, clients, steps, 4 * sum(math.prod(shape) for shape, _ in names), layout)


def sweep(size: int, clients: int, steps: int, layout: Layout) -> Callable[[], PyTree]:
    """A program that reads `size` bytes of each client and writes as many, `steps` times.

    What fits a cache stays there from step to step, as parameters in training do.

    >>> sweep(20, 2, 3, Layout())().tolist()
    [-1.0, -1.0]
    """
    again = lambda _, x: -x  # noqa: E731
    one = lambda value, steps: (jax.lax.fori_loop(0, steps, again, jnp.full(size // 4, value))[0], ())  # noqa: E731
    return _over_clients(one, clients, steps, size, layout)


def _over_clients(fn: Callable, clients: int, steps: int, size: int, layout: Layout) -> Callable[[], PyTree]:
    """`fn(1.0, steps)` for every client, in chunks as a round's are whose clients move `size` bytes."""
    layout = dataclasses.replace(layout, chunk=layout.groups(clients, size)[1])
    args = place((np.ones(clients, np.float32), np.int32(steps)), layout)  # traced, or loops would be unrolled
    run = jax.jit(lambda ones, steps: map_clients(fn, (ones,), (steps,), layout=layout)[0])
    return lambda: jax.block_until_ready(run(*args))


def stream(size: int, layout: Layout) -> Callable[[], PyTree]:
    """A program that reads `size` bytes of memory and writes as many, split over the devices.

    >>> stream(12, Layout())().tolist()
    [-1.0, -1.0, -1.0]
    """
    rows = np.ones(-(-size // 4 // layout.devices) * layout.devices, np.float32)
    return renewing(jax.jit(jnp.negative, donate_argnums=0), place(rows, layout, "clients"))


def renewing(fn: Callable, own: PyTree, *rest: PyTree) -> Callable[[], PyTree]:
    """`own = fn(own, *rest)`, again at each call, for programs that consume what they renew.

    >>> count = renewing(jax.jit(lambda x, by: x + by, donate_argnums=0), jnp.int32(0), 2)
    >>> [int(count()) for _ in range(3)]
    [2, 4, 6]
    """
    held = [own]

    def call():
        held[0] = jax.block_until_ready(fn(held[0], *rest))
        return held[0]

    return call


def nbytes(tree: PyTree) -> int:
    """Of all arrays of a PyTree, or of shapes.

    >>> nbytes({"w": np.zeros((3, 2), np.float32)})
    24
    """
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def step_bytes(params: PyTree, opt_state: PyTree) -> int:
    """What a local step reads and writes of parameters, their gradient and the optimiser's state, each of it once.

    >>> import optax
    >>> params = {"w": jnp.zeros(10)}
    >>> step_bytes(params, optax.sgd(0.1).init(params)), step_bytes(params, optax.adam(0.1).init(params))
    (160, 328)
    """
    return 2 * nbytes((params, params, opt_state))
