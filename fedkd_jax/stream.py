"""Rounds of clients whose states are in a store: while a cohort trains, the next one is read and the last one written.

One thread moves states, and reads or makes examples where those are not on the device, too; in its order of work, and in the
device's:

    thread   ... read cohort t+1   write what round t-1 made   read cohort t+2   write what round t made ...
    device   ... round t                                       round t+1 ...

so that a round takes as long as the longer of the two. Those of cohort t+1 who are in cohort t, too, are not read but taken
from what round t made, on the device; those who were in an earlier one have been written by then.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.cohort import sample_cohort
from fedkd_jax.data import take_clients
from fedkd_jax.data.federated import population_size
from fedkd_jax.population import Store, place_clients, place_data, select_clients
from fedkd_jax.types import Algorithm, ClientSource, ClientState, FederatedData, Key, PyTree, RoundInfo, State

BLOCK = 64  # rounds whose cohorts are drawn at a time


class Stream:
    """Runs rounds one after another; a context manager, at whose end all that rounds made is in the store.

    Args:
        algorithm: any `Algorithm`.
        store: where the states are; open.
        data: the N clients' training examples, on the device or a `ClientSource`.
        key: the run's key.
        cohort: clients per round K.
        last: the number of the last round, plus one; nothing is read ahead for it.

    The store's `waited` grows by the seconds in which the device had nothing to do for want of states.

    >>> import optax
    >>> from fedkd_jax import HostStore, local_only, mlp
    >>> from fedkd_jax.data import synthetic
    >>> from fedkd_jax.population import init_server
    >>> algorithm, store, key = local_only(mlp((60, 10)), optimizer=optax.sgd(0.1), batch=10), HostStore(), jax.random.key(0)
    >>> store.open(algorithm, key)
    >>> with Stream(algorithm, store, synthetic(10**6), key, cohort=4, last=2) as stream:
    ...     state, (info,) = stream.run(State(server=init_server(algorithm, key), clients=store), 2)
    >>> info.ids.shape, len(store)
    ((2, 4), 8)
    """

    def __init__(
        self,
        algorithm: Algorithm,
        store: Store,
        data: FederatedData | ClientSource,
        key: Key,
        *,
        cohort: int,
        last: int,
    ):
        self.store, self.data, self.key, self.last = store, data, key, last
        self._round = functools.partial(_one_round, round_fn=algorithm.round)
        self._draw = functools.partial(_draw_cohorts, clients=population_size(data), cohort=cohort)
        self._cohorts: dict[int, np.ndarray] = {}
        self._worker = ThreadPoolExecutor(1)
        self._ahead: Future | None = None  # of the next cohort
        self._made: tuple[np.ndarray, ClientState] | None = None  # by the last round
        self._written: Future | None = None  # that
        # before jax 0.12, collectives of two programs in flight can wait for each other for ever
        self._one_at_a_time = store.layout.devices > 1

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        try:
            self.flush()
        finally:
            self._worker.shutdown(cancel_futures=True)

    def run(self, state: State, count: int) -> tuple[State, list[RoundInfo]]:
        """`count` rounds; the server is consumed. The infos are in NumPy, `[count, K]`, of the one seed there is."""
        server, infos = state.server, []
        first = int(server.round)
        for t in range(first, first + count):
            ids = self._ids(t)
            clients, data = self._states(ids)
            server, made, info = self._round(server, clients, data, jnp.asarray(ids), self.key)
            self._made = (ids, made)
            self._ahead = self._worker.submit(self._fetch, self._ids(t + 1), ids) if t + 1 < self.last else None
            self.flush()  # of the round before, which comes before that in the thread's order
            self._written = self._worker.submit(self.store.write, ids, made)
            infos.append(info)
            if self._one_at_a_time:
                jax.block_until_ready(server)
        state = State(server=server, clients=self.store)
        return state, [jax.tree.map(lambda *x: np.stack(x), *jax.device_get(infos))]

    def flush(self) -> None:
        """Waits until the store has all that rounds made."""
        if self._written is not None:
            self._written.result()

    def flushed(self, fn: Callable[[State], Any]) -> Callable[[State], Any]:
        """`fn`, but of a store that has all that rounds made."""

        def after(state: State):
            self.flush()
            return fn(state)

        return after

    def _ids(self, t: int) -> np.ndarray:
        if t not in self._cohorts:  # a program of its own, for which the device has to be free: not at every round
            rounds = range(t, min(t + BLOCK, self.last))
            self._cohorts = dict(zip(rounds, np.asarray(self._draw(self.key, np.array(rounds))), strict=True))
        return self._cohorts[t]

    def _fetch(self, ids: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, ClientState | None, FederatedData]:
        """Which of `ids` begin in this round, the states of the others, but of those training now, and the examples."""
        now, layout, data = np.isin(ids, training), self.store.layout, self.data
        fresh = self.store.missing(ids) & ~now
        clients = None if fresh.all() else place_clients(self.store.read(ids, ~fresh & ~now), layout)
        if isinstance(data, ClientSource):
            data = place_data(data.take(ids), layout)
            if data.start.shape != ids.shape:
                raise ValueError(f"data.take gave {data.start.shape} clients for ids {ids.shape}; allowed: as many")
        return jax.block_until_ready((fresh, clients, data))

    def _states(self, ids: np.ndarray) -> tuple[ClientState, FederatedData]:
        """The states and the data of the next cohort."""
        last_ids, last = self._made or (np.zeros(0, np.int32), None)
        future = self._ahead or self._worker.submit(self._fetch, ids, last_ids)
        if not future.done():
            jax.block_until_ready(last)
            start = time.perf_counter()
            future.result()
            self.store.waited += time.perf_counter() - start
        fresh, clients, data = future.result()
        if clients is None:
            clients = place_clients(self.store.init(ids), self.store.layout)
        elif fresh.any():
            clients = select_clients(fresh, place_clients(self.store.init(ids), self.store.layout), clients)
        common, into, source = np.intersect1d(ids, last_ids, assume_unique=True, return_indices=True)
        if len(common):
            padding = (0, len(ids) - len(common))
            into = np.pad(into, padding, constant_values=len(ids))  # past the end: dropped
            clients = _carry_over(clients, last, into, np.pad(source, padding), layout=self.store.layout)
        if self._one_at_a_time:
            jax.block_until_ready(clients)
        return clients, data


@functools.partial(jax.jit, static_argnames=("clients", "cohort"))
def _draw_cohorts(key, rounds, *, clients: int, cohort: int):
    return jax.lax.map(lambda t: sample_cohort(key, t, clients, cohort), rounds)


@functools.partial(jax.jit, static_argnames=("round_fn",), donate_argnames=("server", "clients"))
def _one_round(server, clients, data: FederatedData, ids, key, *, round_fn):
    of_all = data.start.shape[0] != ids.shape[0]  # and not of the cohort; where these are the same, ids count from 0
    return jax.jit(round_fn)(server, clients, take_clients(data, ids) if of_all else data, ids, key)


@functools.partial(jax.jit, static_argnames=("layout",), donate_argnames=("clients",))
def _carry_over(clients: PyTree, last: PyTree, into, source, *, layout) -> PyTree:
    """`clients[into] = last[source]`."""
    new = jax.tree.map(lambda x, y: x.at[into].set(y.at[source].get(mode="clip"), mode="drop"), clients, last)
    if layout.mesh is not None and into.shape[0] % layout.devices == 0:
        new = jax.lax.with_sharding_constraint(new, layout.sharding("clients"))
    return new
