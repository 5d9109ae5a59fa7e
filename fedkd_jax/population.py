"""Where the clients' states live. Here: on the device, stacked; over several devices, split along the client axis."""

import functools

import jax
import jax.numpy as jnp

from fedkd_jax.parallel import Layout, place
from fedkd_jax.types import Algorithm, FederatedData, Key, State


def init_state(algorithm: Algorithm, population: int, key: Key) -> State:
    """The state before the first round: the server, and every client made from `fold_in(key, id)`.

    Over D devices the population is padded to a multiple of D; the surplus clients are never sampled.

    Raises:
        ValueError: `population` below 1.

    >>> import optax
    >>> from fedkd_jax import local_only, mlp
    >>> state = init_state(local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), 5, jax.random.key(0))
    >>> state.clients.teacher["dense_0"]["kernel"].shape
    (5, 4, 2)
    """
    if population < 1:
        raise ValueError(f"population is {population}; allowed: at least 1")
    layout = algorithm.layout or Layout()
    size = -(-population // layout.devices) * layout.devices
    server_key, client_key = jax.random.split(key)
    server, clients = _init(server_key, client_key, algorithm.init_server, algorithm.init_clients, size)
    return State(server=place(server, layout), clients=place(clients, layout, "clients"))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # one compilation for all runs of an algorithm
def _init(server_key, client_key, init_server, init_clients, size):
    return init_server(server_key), init_clients(client_key, jnp.arange(size))


def place_data(data: FederatedData, layout: Layout | None) -> FederatedData:
    """The examples on every device of the layout.

    >>> import numpy as np
    >>> data = FederatedData(inputs=np.zeros((2, 1)), labels=np.zeros(2, int), start=np.array([0]),
    ...                      count=np.array([2]), max_count=2)
    >>> type(place_data(data, None).labels).__name__
    'ArrayImpl'
    """
    return place(data, layout or Layout())
