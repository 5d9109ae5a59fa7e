"""Rounds of clients whose states are in a store: while some clients train, the next are read and the last are written.

A cohort is trained at once, or in groups, one after another, where the devices cannot hold the states of all. One thread moves
states, and reads or makes examples where those are not on the device, too; in its order of work, and in the device's:

    thread   ... read group t+1   write what group t-1 made   read group t+2   write what group t made ...
    device   ... group t                                      group t+1 ...

so that a round takes as long as the longer of the two. Clients of group t+1 who are in group t, too, are not read but taken
from what group t made, on the device; those who were in an earlier one have been written by then.

Of several processes each reads, trains and writes the clients of its own range of ids, of which every cohort has the same
share; all draw the same cohorts, and run the same programs over all devices.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.data import stack_clients, take_clients
from fedkd_jax.data.federated import population_size
from fedkd_jax.parallel import carry_over, known_to_all, local_rows, pair_places, place, place_rows, split_over
from fedkd_jax.participation import Participation
from fedkd_jax.rounds import Round
from fedkd_jax.stores import Store, select_clients
from fedkd_jax.types import Algorithm, ClientSource, ClientState, FederatedData, Key, PyTree, RoundInfo, State, Turn

BLOCK = 64  # rounds whose cohorts are drawn at a time


class Stream:
    """Runs rounds one after another; a context manager, at whose end all that rounds made is in the store.

    Args:
        algorithm: any `Algorithm`; one whose round is a `Round` where a cohort is trained in groups.
        store: where the states are; open.
        data: the N clients' training examples, on the device or a `ClientSource`.
        key: the run's key.
        cohort: clients per round K.
        last: the number of the last round, plus one; nothing is read ahead for it.
        participation: who takes part, and how.
        group: so many clients at a time, or fewer, that groups be of sizes that differ by one at most; all by default.

    Raises:
        ValueError: groups of an algorithm whose round is no `Round`.

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
        participation: Participation | None = None,
        group: int | None = None,
    ):
        self.store, self.data, self.last, self.layout = store, data, last, store.layout
        self.key = place(key, store.layout)
        self.places = make_groups(cohort, cohort if group is None else group, store.layout.devices)
        if len(self.places) > 1 and not isinstance(algorithm.round, Round):
            raise ValueError(f"group is {group} with a round that is not in two parts; allowed: None, see Round")
        strata = 1 if participation is None else participation.strata
        self._by_device = strata % store.layout.devices == 0 and cohort % strata == 0
        if jax.process_count() > 1 and not self._by_device:
            raise ValueError(
                f"participation.strata is {strata} with several processes; allowed: multiples of {store.layout.devices} devices"
            )
        self._round: Any = algorithm.round
        self._draw = functools.partial(
            _draw_cohorts,
            key,
            participation=participation or Participation(),
            clients=population_size(data),
            cohort=cohort,
        )
        self._cohorts: dict[int, tuple[np.ndarray, Turn | None]] = {}
        self._worker = ThreadPoolExecutor(1)
        self._ahead: Future | None = None  # of the next group
        self._made: tuple[np.ndarray, ClientState] | None = None  # by the last group
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
        one_round = self._whole if len(self.places) == 1 else self._in_groups
        for t in range(int(server.round), int(server.round) + count):
            server, info = one_round(server, t)
            infos.append(info)
        state = State(server=server, clients=self.store)
        return state, [jax.tree.map(lambda *x: np.stack(x), *jax.device_get(infos))]

    def _whole(self, server, t: int):
        def train(clients, data, ids, turn):
            new, made, info = _one_round(
                server, clients, data, ids, self.key, turn, round_fn=self._round, layout=self.layout
            )
            return made, (new, info)

        return self._between(t, 0, train)

    def _in_groups(self, server, t: int):
        def train(clients, data, ids, turn):
            made, *rest = _train_group(
                server, clients, data, ids, self.key, turn, train_fn=self._round.train, layout=self.layout
            )
            return made, rest

        (ids, turn), reports, summed = self._cohort(t), [], None
        for g in range(len(self.places)):
            report, some = self._between(t, g, train)
            reports.append(report)
            summed = some if summed is None else _add(summed, some)
        places = np.argsort(np.concatenate(self.places))
        return self._waited_for(
            _finish_round(
                server,
                reports,
                summed,
                ids,
                self.key,
                turn,
                places,
                finish_fn=self._round.finish,
                layout=self.layout,
            )
        )

    def _between(self, t: int, g: int, train: Callable) -> Any:
        """`made, rest = train(clients, data, ids, turn)` of a group, beside what the thread reads and writes; gives `rest`."""
        ids, turn = self._group(t, g)
        clients, data = self._states(ids)
        made, rest = train(clients, data, ids, turn)
        self._made = (ids, made)
        last = g + 1 == len(self.places)
        following = (t + 1, 0) if last else (t, g + 1)
        self._ahead = (
            self._worker.submit(self._fetch, self._group(*following)[0], ids) if following[0] < self.last else None
        )
        self.flush()  # of the group before, which comes before that in the thread's order
        self._written = self._worker.submit(self._write, ids, made, turn)
        return self._waited_for(rest)

    def _waited_for(self, tree: PyTree) -> PyTree:
        return jax.block_until_ready(tree) if self._one_at_a_time else tree

    def flush(self) -> None:
        """Waits until the store has all that rounds made."""
        if self._written is not None:
            self._written.result()

    def _cohort(self, t: int) -> tuple[np.ndarray, Turn | None]:
        if t not in self._cohorts:  # a program of its own, for which the device has to be free: not at every round
            rounds = range(t, min(t + BLOCK, self.last))
            drawn = jax.device_get(self._draw(np.array(rounds)))
            self._cohorts = {s: jax.tree.map(lambda x: x[i], drawn) for i, s in enumerate(rounds)}  # noqa: B023
        return self._cohorts[t]

    def _group(self, t: int, g: int) -> tuple[np.ndarray, Turn | None]:
        return jax.tree.map(lambda x: x[self.places[g]], self._cohort(t))

    def _fetch(self, ids: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, ClientState | None, FederatedData]:
        """Which of `ids` begin in this round, the states of the others, but of those training now, and the examples."""
        now, own, data = np.isin(ids, training), self.layout.own(len(ids)), self.data
        fresh = self.store.missing(ids) & ~now
        read = ~fresh & ~now
        clients = None if fresh.all() else place_rows(self.store.read(ids[own], read[own]), self.layout)
        if isinstance(data, ClientSource):
            data = data.take(ids[own])
            if data.start.shape != ids[own].shape:
                raise ValueError(
                    f"data.take gave {data.start.shape} clients for ids {ids[own].shape}; allowed: as many"
                )
            data = place_rows(stack_clients(data), self.layout)
        return jax.block_until_ready((fresh, clients, data))

    def _write(self, ids: np.ndarray, made: ClientState, turn: Turn | None) -> None:
        """Keeps what those who were there made."""
        own = self.layout.own(len(ids))
        rows, present = local_rows(made), np.ones(len(ids), bool) if turn is None else turn.present
        if not present.all():
            rows = jax.tree.map(lambda x: x[present[own]], rows)
        self.store.write(ids[own][present[own]], rows)
        self.store.note(ids[present])

    def _states(self, ids: np.ndarray) -> tuple[ClientState, FederatedData]:
        """The states and the data of the next group."""
        last_ids, last = self._made or (np.zeros(0, np.int32), None)
        future = self._ahead or self._worker.submit(self._fetch, ids, last_ids)
        if not future.done():
            jax.block_until_ready(last)
            start = time.perf_counter()
            future.result()
            self.store.waited += time.perf_counter() - start
        fresh, clients, data = future.result()
        if clients is None:
            clients = self._begin(ids)
        elif fresh.any():
            clients = select_clients(fresh, self._begin(ids), clients)
        common, into, source = np.intersect1d(ids, last_ids, assume_unique=True, return_indices=True)
        if len(common):
            pairs = pair_places(into, source, len(ids), len(last_ids), self.layout.devices if self._by_device else 1)
            clients = _carry_over(clients, last, *pairs, layout=self.layout, by_device=self._by_device)
        return self._waited_for(clients), data

    def _begin(self, ids: np.ndarray) -> ClientState:
        clients = self.store.init(ids)
        return clients if jax.process_count() > 1 else place_rows(clients, self.layout)


def make_groups(cohort: int, group: int, devices: int) -> list[np.ndarray]:
    """Which places of a cohort are trained at once: at most `group` of them, but at least one on each device, and of each
    device's places, which lie one after another, the same share in every group.

    >>> [places.tolist() for places in make_groups(8, group=4, devices=2)]
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    devices = 1 if cohort % devices else devices
    share = cohort // devices
    places = np.arange(cohort).reshape(devices, share)
    parts = np.array_split(np.arange(share), -(-share // max(1, group // devices)))
    return [places[:, part].reshape(-1) for part in parts]


@functools.partial(jax.jit, static_argnames=("participation", "clients", "cohort"))
def _draw_cohorts(key, rounds, *, participation: Participation, clients: int, cohort: int):
    return jax.lax.map(lambda t: participation.draw(key, t, clients, cohort), rounds)


def _of_cohort(data: FederatedData, ids) -> FederatedData:
    # where there are as many clients as in the cohort, these are the same: ids count from 0
    return data if data.start.shape[0] == ids.shape[0] else take_clients(data, ids)


@functools.partial(jax.jit, static_argnames=("round_fn", "layout"), donate_argnames=("server", "clients"))
def _one_round(server, clients, data: FederatedData, ids, key, turn=None, *, round_fn, layout):
    more = () if turn is None else (turn,)
    server, clients, info = jax.jit(round_fn)(server, clients, _of_cohort(data, ids), ids, key, *more)
    return known_to_all(server, layout), split_over(clients, layout), known_to_all(info, layout)


@functools.partial(jax.jit, static_argnames=("train_fn", "layout"), donate_argnames=("clients",))
def _train_group(server, clients, data: FederatedData, ids, key, turn=None, *, train_fn, layout):
    clients, reports, summed = train_fn(server, clients, _of_cohort(data, ids), ids, key, turn)
    return split_over(clients, layout), known_to_all(reports, layout), known_to_all(summed, layout)


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("finish_fn", "layout"), donate_argnames=("server",))
def _finish_round(server, reports: list, summed, ids, key, turn, places, *, finish_fn, layout):
    """`reports` of the groups; `places[k]` is where in all of them the report of client k is."""
    reports = jax.tree.map(lambda *x: jnp.concatenate(x)[places], *reports)
    return known_to_all(finish_fn(server, reports, summed, ids, key, turn), layout)


_carry_over = jax.jit(carry_over, static_argnames=("layout", "by_device"), donate_argnames=("clients",))
