"""Where the clients' states live: on the device, stacked, or in a store (`stores.py`); and what a run begins with.

On the device every client has a state from the start. A store makes a client's state from `fold_in(key, id)` when it is first
asked for and keeps it once the client has taken part, so that space follows the clients that were sampled, not the
population. A run has the same bits with any of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedkd_jax.check import check_int, check_type
from fedkd_jax.parallel import Layout, place
from fedkd_jax.types import Algorithm, FederatedData, Key, ServerState, State


def init_state(algorithm: Algorithm, population: int, key: Key) -> State:
    """The state before the first round: the server, and every client made from `fold_in(key, id)`.

    Over D devices the population is padded to a multiple of D; the surplus clients are never sampled.

    Raises:
        TypeError: no `Algorithm`, no key, or a population that is no integer.
        ValueError: `population` below 1.

    >>> import optax
    >>> from fedkd_jax import local_only, mlp
    >>> state = init_state(local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), 5, jax.random.key(0))
    >>> state.clients.teacher["dense_0"]["kernel"].shape
    (5, 4, 2)
    """
    check_type("algorithm", algorithm, Algorithm)
    check_int("population", population)
    check_key("key", key)
    layout = algorithm.layout or Layout()
    _, clients_key = halves(key)
    clients = make_clients(algorithm.init_clients, clients_key, jnp.arange(_padded(algorithm, population)))
    return State(server=init_server(algorithm, key), clients=place(clients, layout, "clients"))


def check_key(name: str, key: Any, axes: int = 0) -> None:
    """Refuses what is no random key of JAX's new kind, or as many axes of them.

    Raises:
        TypeError: something else.

    >>> try: check_key("key", 0)
    ... except TypeError as error: print(error)
    key is 0; allowed: a key, jax.random.key(0) say
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == axes):
        allowed = "keys [S], jax.random.split(jax.random.key(0), 3) say" if axes else "a key, jax.random.key(0) say"
        raise TypeError(f"{name} is {key!r}; allowed: {allowed}")


def halves(key: Key) -> tuple[Key, Key]:
    """The keys that a key is split in, wherever one of them is wanted: JAX's check of keys does not call it used twice.

    >>> bool((halves(jax.random.key(0))[1] == jax.random.split(jax.random.key(0))[1]).all())
    True
    """
    one, other = jax.random.split(jax.random.clone(key))
    return one, other


def state_shapes(algorithm: Algorithm, population: int) -> State:
    """What `init_state` gives, shapes and types only.

    >>> import optax
    >>> from fedkd_jax import local_only, mlp
    >>> algorithm = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2)
    >>> state_shapes(algorithm, 10**9).clients.teacher["dense_0"]["bias"].shape
    (1000000000, 2)
    """
    key, ids = jax.random.key(0), jax.ShapeDtypeStruct((_padded(algorithm, population),), jnp.int32)
    return State(
        server=jax.eval_shape(algorithm.init_server, key), clients=jax.eval_shape(algorithm.init_clients, key, ids)
    )


def _padded(algorithm: Algorithm, population: int) -> int:
    devices = (algorithm.layout or Layout()).devices
    return -(-population // devices) * devices


def init_server(algorithm: Algorithm, key: Key) -> ServerState:
    """The server of `init_state`, alone.

    >>> import optax
    >>> from fedkd_jax import local_only, mlp
    >>> algorithm = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2)
    >>> int(init_server(algorithm, jax.random.key(0)).round)
    0
    """
    server_key, _ = halves(key)
    return place(_init_server(algorithm.init_server, server_key), algorithm.layout or Layout())


# one compilation for all runs of an algorithm: `make_clients(algorithm.init_clients, key, ids)`
_init_server = jax.jit(lambda init, key: init(key), static_argnums=0)
make_clients = jax.jit(lambda init, key, ids: init(key, ids), static_argnums=0)


def place_data(data: FederatedData, layout: Layout | None) -> FederatedData:
    """The examples on every device of the layout.

    >>> import numpy as np
    >>> data = FederatedData(inputs=np.zeros((2, 1)), labels=np.zeros(2, int), start=np.array([0]),
    ...                      count=np.array([2]), max_count=2)
    >>> type(place_data(data, None).labels).__name__
    'ArrayImpl'
    """
    return place(data, layout or Layout())
