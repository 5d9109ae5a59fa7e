"""What hostile clients do, to see what an aggregator withstands: to the update that they send, or to their own labels.

Who is hostile is a function of the client's id, the same in every round. `attacked` makes of an attack on updates what
`federated_round` takes as `send_fn`; an attack on data is made before the run.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedkd_jax.check import check_fn, check_int, check_number
from fedkd_jax.data.federated import check_data
from fedkd_jax.types import Array, ClientSource, FederatedData, Key, Leaf, Number, PyTree, SendFn

HostileFn = Callable[[Leaf], Leaf]  # client id -> [] bool
AttackFn = Callable[[PyTree, Key], PyTree]  # (message, key) -> what is sent instead


def hostile_share(share: Number, population: int, *, seed: int = 0) -> HostileFn:
    """Which clients are hostile: floor(share N) of them, drawn once for a seed.

    Args:
        share: of the population, in [0, 1).
        population: N; a table of N bool is made.
        seed: of the draw.

    Raises:
        ValueError: a share outside [0, 1), no population.

    >>> hostile = hostile_share(0.2, 10)
    >>> sum(bool(hostile(i)) for i in range(10))
    2
    """
    check_number("share", share, "[0, 1)")
    check_int("population", population)
    check_int("seed", seed, 0, 2**63 - 1)
    drawn = np.random.default_rng(seed).permutation(population)[: int(round(share * population, 6))]
    table = np.isin(np.arange(population), drawn)
    return lambda client_id: jnp.asarray(table)[client_id]


def attacked(attack_fn: AttackFn, hostile: HostileFn) -> SendFn:
    """`send_fn` of a round in which those who are hostile send what the attack makes of their message.

    Raises:
        TypeError: no functions.

    >>> send = attacked(sign_flip(10.0), hostile=lambda i: i == 3)
    >>> [float(send(jnp.float32(2.0), client_id, jax.random.key(0))) for client_id in (3, 4)]
    [-20.0, 2.0]
    """

    check_fn("attack_fn", attack_fn, "(message, key) -> message, sign_flip(10.0) say")
    check_fn("hostile", hostile, "client id -> bool")

    def send(message: PyTree, client_id: Leaf, key: Key) -> PyTree:
        bad = hostile(client_id)
        return jax.tree.map(lambda x, y: jnp.where(bad, x, y), attack_fn(message, key), message)

    return send


def sign_flip(scale: Number = 1.0) -> AttackFn:
    """`update -> -scale update`: away from where the client's own data point.

    Raises:
        ValueError: a scale that is not above 0.

    >>> sign_flip(10.0)({"w": jnp.float32(2.0)}, jax.random.key(0))["w"].item()
    -20.0
    """
    check_number("scale", scale, "(0, inf)")
    return scaled(-scale)


def scaled(factor: Number) -> AttackFn:
    """`update -> factor update`: the model that the client has, in place of the mean (Bagdasaryan et al., "How to backdoor
    federated learning", AISTATS 2020).

    Raises:
        ValueError: a factor that is not finite.

    >>> scaled(10.0)({"w": jnp.float32(2.0)}, jax.random.key(0))["w"].item()
    20.0
    """
    check_number("factor", factor, "(-inf, inf)")
    return lambda update, key: optax.tree.scale(float(factor), update)


def label_flip(data: FederatedData | ClientSource, hostile: HostileFn, classes: int) -> FederatedData | ClientSource:
    """The same examples, those of hostile clients with class `classes - 1 - y` for y; labels below 0, for no answer, stay.

    Args:
        data: of all N clients, or where they come from; flat arrays in memory are copied.
        hostile: which clients.
        classes: number of classes.

    Raises:
        TypeError: no data.
        ValueError: data that cannot be (`check_data`), a label beyond the classes.

    >>> from fedkd_jax.data import federate
    >>> data = federate(np.zeros((5, 1)), np.array([0, 1, 2, 0, 1]), [np.arange(3), np.arange(3, 5)])
    >>> label_flip(data, lambda i: i == 0, classes=3).labels.tolist()
    [2, 1, 0, 0, 1]
    """
    check_data("data", data)
    check_fn("hostile", hostile, "client id -> bool")
    check_int("classes", classes)
    if isinstance(data, ClientSource):
        return data._replace(take=lambda ids: _flipped(data.take(ids), np.asarray(ids), hostile, classes))
    return _flipped(data, np.arange(len(data.start)), hostile, classes)


def _flipped(data: FederatedData, ids: Array, hostile: HostileFn, classes: int) -> FederatedData:
    labels = np.array(data.labels)
    for i in np.flatnonzero(np.asarray(jax.vmap(hostile)(ids))):
        rows = (i,) if data.stacked else slice(data.start[i], data.start[i] + data.count[i])
        if (most := labels[rows][: data.count[i]].max(initial=0)) >= classes:
            raise ValueError(f"classes is {classes}; allowed: {most + 1} and more, for the labels of client {i}")
        labels[rows] = np.where(labels[rows] >= 0, classes - 1 - labels[rows], labels[rows])
    return dataclasses.replace(data, labels=labels)
