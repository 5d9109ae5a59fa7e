"""Which clients take part, their random keys, and moving their states in and out of the population.

All randomness of client i in round t comes from `fold_in(fold_in(key, t), i)`: a result does not depend on the cohort's
order, on chunks or devices, or on whether the run was interrupted.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Int

from fedkd_jax.check import check_int
from fedkd_jax.types import Array, Key, PyTree


def client_key(key: Key, round: Int[Array, ""] | int, client_id: Int[Array, ""] | int) -> Key:
    """The key of one client in one round.

    >>> key = jax.random.key(0)
    >>> bool(client_key(key, 1, 2) == client_key(key, 2, 1))
    False
    """
    return jax.random.fold_in(jax.random.fold_in(key, round), client_id)


def sample_cohort(key: Key, round: Int[Array, ""] | int, population: int, cohort: int) -> Int[Array, "k"]:
    """`cohort` distinct client ids out of `population`, uniformly, in increasing order; `[K]` int32.

    A full cohort is 0..N-1. A small one is drawn by Floyd's method in O(K^2), so that a round's cost does not grow with
    the population.

    Raises:
        TypeError: a `population` or `cohort` that is no integer.
        ValueError: `cohort` not in 1..population.

    >>> ids = sample_cohort(jax.random.key(0), 3, population=1000, cohort=4)
    >>> len(set(ids.tolist())), sample_cohort(jax.random.key(0), 3, 3, 3).tolist()
    (4, [0, 1, 2])
    """
    check_int("population", population)
    check_int("cohort", cohort, 1, population, "the population")
    if cohort == population:
        return jnp.arange(population, dtype=jnp.int32)
    # a stream of its own: client ids count from 0 and never reach 2^31 - 1
    key = jax.random.fold_in(jax.random.fold_in(key, round), 2**31 - 1)
    if population <= 8 * cohort:
        return jnp.sort(jax.random.permutation(key, population)[:cohort].astype(jnp.int32))

    first = population - cohort
    draws = jax.random.randint(key, (cohort,), 0, first + 1 + jnp.arange(cohort), jnp.int32)

    def insert(i, ids):
        taken = jnp.any(ids == draws[i])
        return ids.at[i].set(jnp.where(taken, first + i, draws[i]))

    return jnp.sort(jax.lax.fori_loop(0, cohort, insert, jnp.full(cohort, -1, jnp.int32)))


def take(population: PyTree, ids: Int[Array, "k"]) -> PyTree:
    """The states of a cohort, `[N, ...] -> [K, ...]`; an id may occur twice, one past the end is clamped to the last.

    >>> take({"w": jnp.arange(5.0)}, jnp.array([3, 1]))["w"].tolist()
    [3.0, 1.0]
    """
    return jax.tree.map(lambda x: x.at[ids].get(mode="clip"), population)


def put(population: PyTree, ids: Int[Array, "k"], cohort: PyTree) -> PyTree:
    """The population with a cohort's states written back; every other client stays bit-identical.

    Ids must differ: of one that occurs twice some state is kept. One past the end is written nowhere. Cohorts that `simulate`
    draws have neither.

    Raises:
        ValueError: states of another shape than the population's have.

    >>> put({"w": jnp.arange(5.0)}, jnp.array([3, 1]), {"w": jnp.array([7.0, 8.0])})["w"].tolist()
    [0.0, 8.0, 2.0, 7.0, 4.0]
    """

    def leaf(x, new):
        if jnp.shape(new) != (*jnp.shape(ids), *x.shape[1:]):
            raise ValueError(
                f"cohort has shape {jnp.shape(new)}; allowed: {(*jnp.shape(ids), *x.shape[1:])}, a row for each id"
            )
        return x.at[ids].set(new)

    return jax.tree.map(leaf, population, cohort)
