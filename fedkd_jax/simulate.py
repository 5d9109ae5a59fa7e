"""Many rounds: compiled loops over rounds between evaluations, states donated, one trace; with one seed, or many at once.

Where clients' states are in a store, a compiled round at a time, see `stream.py`.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.check import check_fn, check_int, check_type
from fedkd_jax.checkpoint import Checkpoints
from fedkd_jax.cohort import put, take
from fedkd_jax.data import check_data, population_size, take_clients
from fedkd_jax.evaluate import METRICS, evaluate, evaluate_seeds
from fedkd_jax.metrics import AnyMetric
from fedkd_jax.parallel import Layout, map_clients, place
from fedkd_jax.participation import Participation
from fedkd_jax.population import check_key, init_server, init_state, place_data
from fedkd_jax.recorder import record
from fedkd_jax.stores import Store
from fedkd_jax.stream import Stream
from fedkd_jax.types import Algorithm, ClientSource, FederatedData, History, Key, Leaf, RoundInfo, State

SECONDS_PER_CALL = 1.0


def simulate(
    algorithm: Algorithm,
    population: int | State,
    data: FederatedData | ClientSource,
    key: Key,
    *,
    rounds: int,
    cohort: int | None = None,
    test: FederatedData | ClientSource | None = None,
    eval_ids: np.ndarray | None = None,
    eval_every: int | None = None,
    eval_batch: int = 256,
    metrics: Mapping[str, AnyMetric] = METRICS,
    on_rounds: Callable[[int, RoundInfo], None] | None = None,
    on_evaluation: Callable[[History], None] | None = None,
    store: Store | None = None,
    group: int | None = None,
    participation: Participation | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[State, History]:
    """Runs `rounds` rounds, each on a fresh cohort, a uniform one unless `participation` says otherwise.

    The rounds between two evaluations are one compiled loop (cut at about a second each where `on_rounds` wants to show
    progress), whose bound is not static: one trace however they fall. Randomness depends on `key`, the round number and
    the client id only, so 5 rounds, then 5 more from the returned state, are 10.

    Args:
        algorithm: any `Algorithm`.
        population: the number of clients N, for a new run; or the `State` to go on from (it is copied, not consumed, but for
            a store).
        data: the N clients' training examples; a `ClientSource` where they are not to be in memory, which needs a store.
        key: the run's key; the same one when going on.
        rounds: rounds to run now.
        cohort: clients per round K; all by default.
        test: the N clients' test examples; without them nothing is evaluated.
        eval_ids: `[n]` int, where `test` is of these n clients only, in this order, or a `ClientSource` from which theirs are
            taken.
        eval_every: rounds between evaluations, counted from the run's first round; there is always one after the last.
        eval_batch, metrics: as in `evaluate`.
        on_rounds: called as `(rounds done in all, RoundInfo [r, K] of the newest)`, for progress.
        on_evaluation: called after each evaluation with the history so far.
        store: where the clients' states are to be, an empty `HostStore` or `DiskStore`; by default on the device, all N. The
            bits are the same. The state's `clients` is then the store, and its `waited` how many seconds rounds waited for it.
        group: of states in a store, at most so many clients are on the devices at a time, where a cohort's do not fit; while
            they train, so many more are read, and so many written. The result is the same, but for the order of a sum.
        participation: who is there, and what becomes of them.
        checkpoints: what is saved when, to go on from. Where there is something already, the run goes on from it, until
            `rounds` are done in all; history and results are those of a run in one piece.

    Returns:
        The state, and the history: `rounds` a RoundInfo `[R, K]` in NumPy, `evaluations` a tuple of `evaluate`'s dicts, each
        with its "round".

    Raises:
        TypeError: an argument of another type.
        ValueError: data that cannot be, see `check_data`; zero rounds, `cohort` not in 1..N, `eval_every` below 1, a population
            that is not the data's, a store that is not empty, `eval_ids` that are not the test's or not in 0..N-1, a `group`
            below 1 or without a store, a participation that does not suit the numbers of clients, several processes without a
            store or a mesh; `checkpoints` of another run, of more rounds, or with a State.
        Stopped: `checkpoints` was asked to stop.
        OSError: a checkpoint cannot be written; the message says which there is.

    >>> import optax
    >>> from fedkd_jax import fedavg, mlp
    >>> data = FederatedData(inputs=np.eye(6, dtype=np.float32), labels=np.arange(6) % 2, start=np.array([0, 2, 5]),
    ...                      count=np.array([2, 3, 1]), max_count=3)
    >>> algorithm = fedavg(mlp((6, 2)), optimizer=optax.sgd(0.5), batch=2)
    >>> state, history = simulate(algorithm, 3, data, jax.random.key(0), rounds=4, cohort=2, test=data)
    >>> history.rounds.ids.shape, int(state.server.round), history.evaluations[-1]["round"]
    ((4, 2), 4, 4)
    """
    check_key("key", key)
    check_type("store", store, (Store, type(None)))
    check_type("participation", participation, (Participation, type(None)))
    check_type("checkpoints", checkpoints, (Checkpoints, type(None)))
    clients = _check(algorithm, population, data, rounds, cohort, test, eval_every, eval_batch, metrics, eval_ids)
    _check_fns(on_rounds, on_evaluation)
    stored = store is not None or (isinstance(population, State) and isinstance(population.clients, Store))
    if group is not None:
        check_int("group", group)
        if not stored:
            raise ValueError(f"group is {group} without a store; allowed: None, or with one")
    if isinstance(test, ClientSource):
        test = test.take(np.asarray(eval_ids))
    init_key, run_key = jax.random.split(key)
    layout, participation = algorithm.layout or Layout(), participation or Participation()
    participation.check(clients, cohort or clients)
    if jax.process_count() > 1 and (layout.mesh is None or (store is None and not isinstance(population, State))):
        raise ValueError(
            f"store is {store} and layout.mesh {layout.mesh} in several processes; allowed: a store and a mesh over all devices"
        )
    earlier = None
    if checkpoints is not None:
        if isinstance(population, State):
            raise ValueError("population is a State, with checkpoints; allowed: the number of clients")
        if store is not None and (len(store) or store.round != 0):
            raise ValueError(f"store holds {len(store)} clients; allowed: a new one")
        found = checkpoints.open(algorithm, clients, key, store, rounds=rounds, cohort=cohort or clients)
        if found is not None:
            (population, earlier), store = found, None
    with contextlib.nullcontext() if checkpoints is None else checkpoints:
        store, state = _begin(algorithm, population, data, store, init_key)
        data, evaluate_fn = data if isinstance(data, ClientSource) else place_data(data, layout), None
        if test is not None:
            over = dict(data=place_data(test, layout), metrics=metrics, batch=eval_batch, ids=eval_ids)
            evaluate_fn = lambda s: [evaluate(algorithm, s, **over)]  # noqa: E731
        first = int(state.server.round)
        last = rounds if earlier is not None else first + rounds
        if earlier is not None and first == last:
            return state, earlier
        loop = functools.partial(
            _loop,
            state,
            first=first,
            last=last,
            eval_every=eval_every,
            on_rounds=None if on_rounds is None else lambda done, infos: on_rounds(done, *infos),
            on_evaluation=None if on_evaluation is None else lambda histories: on_evaluation(*histories),
            earlier=earlier,
            checkpoints=checkpoints,
        )
        if store is not None:
            more: dict[str, Any] = dict(cohort=cohort or clients, last=last, participation=participation, group=group)
            with Stream(algorithm, store, data, run_key, **more) as stream:
                store.round = None
                state, (history,) = loop(stream.run, evaluate_fn, flush=stream.flush)
            store.round = last
            return state, history
        options = _options(algorithm, cohort or clients, rounds, eval_every) | dict(participation=participation)
        recorder = (
            None if checkpoints is None else checkpoints.recorder(state, layout, cohort or clients, last, eval_every)
        )

        def run(state: State, count: int) -> tuple[State, list[RoundInfo]]:
            state, info = _run_rounds(state, data, run_key, jnp.int32(count), recorder, **options)
            # before jax 0.12, collectives of two programs in flight can wait for each other for ever
            return state, [jax.tree.map(lambda x: x[:count], jax.device_get(info))]

        state, (history,) = loop(run, evaluate_fn)
        return state, history


def _begin(
    algorithm: Algorithm, population: int | State, data: FederatedData | ClientSource, store: Store | None, key: Key
) -> tuple[Store | None, State]:
    """Where clients' states are if not on the device, and the state to begin from."""
    going_on = isinstance(population, State)
    if going_on and store is not None:
        raise ValueError("store is given with a State to go on from; allowed: None, its clients stay where they are")
    if going_on and isinstance(population.clients, Store):
        store = population.clients
    if store is None:
        if isinstance(data, ClientSource):
            raise ValueError("data is a ClientSource and the clients' states are on the device; allowed: with a store")
        own = jax.tree.map(jnp.copy, population) if going_on else init_state(algorithm, population_size(data), key)
        return None, own
    if not going_on and (len(store) or store.round != 0):
        raise ValueError(f"store holds {len(store)} clients; allowed: a new one, or a State to go on from")
    if going_on and store.round != int(population.server.round):
        left = "was left within a run" if store.round is None else f"is at round {store.round}"
        raise ValueError(
            f"population is a State of round {population.server.round} whose store {left}; allowed: the newest"
        )
    server = jax.tree.map(jnp.copy, population.server) if going_on else init_server(algorithm, key)
    store.open(algorithm, key, population_size(data))
    return store, State(server=server, clients=store)


def simulate_seeds(
    algorithm: Algorithm,
    population: int | State,
    data: FederatedData,
    keys: Key,
    *,
    rounds: int,
    cohort: int | None = None,
    test: FederatedData | None = None,
    eval_every: int | None = None,
    eval_batch: int = 256,
    metrics: Mapping[str, AnyMetric] = METRICS,
    on_rounds: Callable[[int, list[RoundInfo]], None] | None = None,
    on_evaluation: Callable[[list[History]], None] | None = None,
    layout: Layout | None = None,
) -> tuple[State, list[History]]:
    """`simulate` for S keys at once, in one program: seeds are to it what clients are to a round.

    A seed's results are those of `simulate` with its key: to the bit with `Layout(chunk=1)`, else to rounding.

    Args:
        algorithm: as in `simulate`, but for one device: what is split over several is the seeds.
        population: the number of clients, or the `State [S]` to go on from (it is copied, not consumed).
        data, rounds, cohort, test, eval_every, eval_batch, metrics: as in `simulate`, the same for all seeds.
        keys: `[S]`, a run's key each.
        on_rounds, on_evaluation: as in `simulate`, but called with a list, an entry per seed.
        layout: where the seeds run, and how many of them at once on each device. The S states are held twice.

    Returns:
        The states, `[S, ...]`, and a history per seed.

    Raises:
        TypeError: as `simulate`.
        ValueError: as `simulate`; an algorithm whose layout has several devices; not as many states as keys, or none; clients
            in a store.

    >>> import optax
    >>> from fedkd_jax import fedavg, mlp
    >>> data = FederatedData(inputs=np.eye(6, dtype=np.float32), labels=np.arange(6) % 2, start=np.array([0, 2, 5]),
    ...                      count=np.array([2, 3, 1]), max_count=3)
    >>> algorithm = fedavg(mlp((6, 2)), optimizer=optax.sgd(0.5), batch=2)
    >>> state, histories = simulate_seeds(algorithm, 3, data, jax.random.split(jax.random.key(0), 4), rounds=2, test=data)
    >>> state.server.round.tolist(), [history.evaluations[-1]["round"] for history in histories]
    ([2, 2, 2, 2], [2, 2, 2, 2])
    """
    check_key("keys", keys, 1)
    check_type("data", data, FederatedData)
    check_type("layout", layout, (Layout, type(None)))
    clients = _check(algorithm, population, data, rounds, cohort, test, eval_every, eval_batch, metrics)
    _check_fns(on_rounds, on_evaluation)
    seeds = len(keys)
    if isinstance(population, State) and isinstance(population.clients, Store):
        raise ValueError("population has its clients in a store; allowed: on the device, as several seeds run at once")
    states = len(population.server.round) if isinstance(population, State) else seeds
    if states != seeds or not seeds:
        raise ValueError(f"population has {states} states; allowed: one for each of keys, {seeds}, at least 1")
    if algorithm.layout is not None and algorithm.layout.devices > 1:
        raise ValueError(
            f"algorithm.layout has {algorithm.layout.devices} devices; allowed: 1, layout splits the seeds"
        )
    layout = layout or Layout()
    # a device without a seed of its own gets the last one, for which it does nothing
    rows = np.minimum(np.arange(-(-seeds // layout.devices) * layout.devices), seeds - 1)
    init_keys, run_keys = jax.vmap(jax.random.split, out_axes=1)(keys[rows])
    state = place(_init_seeds(algorithm, population, clients, init_keys, rows), layout, "clients")
    run_keys, data, evaluate_fn = place(run_keys, layout, "clients"), place_data(data, layout), None
    if test is not None:
        over = functools.partial(evaluate_seeds, data=place_data(test, layout), metrics=metrics, batch=eval_batch)
        evaluate_fn = lambda s: over(algorithm, s, layout=layout)[:seeds]  # noqa: E731
    options = _options(algorithm, cohort or clients, rounds, eval_every)

    def run(state: State, count: int) -> tuple[State, list[RoundInfo]]:
        # under vmap, bounds that differ would have all that a round writes written again
        counts = jnp.where(jnp.arange(len(rows)) < seeds, count, 0) if layout.chunk == 1 else jnp.int32(count)
        state, info = _run_seeds(state, data, run_keys, counts, seeds=layout, **options)
        info = jax.device_get(info)
        return state, [jax.tree.map(lambda x: x[i, :count], info) for i in range(seeds)]  # noqa: B023

    state, histories = _loop(
        state,
        run,
        evaluate_fn,
        first=int(state.server.round[0]),
        last=int(state.server.round[0]) + rounds,
        eval_every=eval_every,
        on_rounds=on_rounds,
        on_evaluation=on_evaluation,
    )
    return state if len(rows) == seeds else jax.jit(take)(state, np.arange(seeds)), histories


def _check_fns(on_rounds, on_evaluation) -> None:
    for name, value in (("on_rounds", on_rounds), ("on_evaluation", on_evaluation)):
        if value is not None:
            check_fn(name, value, "to call, or None")


def _check(algorithm, population, data, rounds, cohort, test, eval_every, eval_batch, metrics, eval_ids=None) -> int:
    """The number of clients, if everything fits."""
    check_type("algorithm", algorithm, Algorithm, "an Algorithm, fedavg(...) say")
    check_data("data", data)
    clients = population_size(data)
    check_int("rounds", rounds)
    check_int("eval_batch", eval_batch)
    check_type("metrics", metrics, Mapping, "{name: metric}")
    if not isinstance(population, State):
        check_int("population", population)
        if population != clients:
            raise ValueError(f"population is {population}; allowed: {clients}, the number of clients in data")
    elif not isinstance(population.clients, Store):  # states are padded to a multiple of the devices
        axis = np.ndim(population.server.round)  # after that of seeds
        held = min((x.shape[axis] for x in jax.tree.leaves(population.clients)), default=clients)
        if not clients <= held < clients + jax.device_count():
            raise ValueError(f"population has the states of {held} clients; allowed: {clients}, the number in data")
    if cohort is not None:
        check_int("cohort", cohort, 1, clients, "the population")
    if eval_every is not None:
        check_int("eval_every", eval_every)
    ids = np.zeros(1, int) if eval_ids is None else np.asarray(eval_ids)
    whole = ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids)
    if not whole or ids.min() < 0 or ids.max() >= clients:
        raise ValueError(f"eval_ids is {eval_ids}; allowed: one id or more of 0 to {clients - 1}")
    if test is not None:
        check_data("test", test)
    if isinstance(test, ClientSource):
        if eval_ids is None:
            raise ValueError("test is a ClientSource and eval_ids is None; allowed: with ids, of clients to evaluate")
        if test.clients != clients:
            raise ValueError(f"test has {test.clients} clients; allowed: {clients}, as in data")
        return clients
    evaluated, which = (clients, "data") if eval_ids is None else (len(eval_ids), "eval_ids")
    if test is not None and test.start.shape[0] != evaluated:
        raise ValueError(f"test has {test.start.shape[0]} clients; allowed: {evaluated}, as in {which}")
    return clients


def _options(algorithm: Algorithm, cohort: int, rounds: int, eval_every: int | None) -> dict[str, Any]:
    """What `_run_rounds` is compiled for."""
    length = min(eval_every or rounds, rounds)
    return dict(round_fn=algorithm.round, cohort=cohort, length=length, layout=algorithm.layout or Layout())


def _init_seeds(algorithm: Algorithm, population: int | State, clients: int, keys: Key, rows: np.ndarray) -> State:
    if isinstance(population, State):
        return jax.jit(take)(population, rows)
    stack = jax.jit(lambda states: jax.tree.map(lambda *x: jnp.stack(x), *states))  # not a compilation for every leaf
    return stack([init_state(algorithm, clients, key) for key in keys])


def _loop(
    state: State,
    run: Callable[[State, int], tuple[State, list[RoundInfo]]],
    evaluate_fn: Callable[[State], list[dict]] | None,
    *,
    first: int,
    last: int,
    eval_every: int | None,
    on_rounds: Callable[[int, list[RoundInfo]], None] | None,
    on_evaluation: Callable[[list[History]], None] | None,
    flush: Callable[[], None] = lambda: None,
    earlier: History | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[State, list[History]]:
    """The host's part: how many rounds are run next, what is reported and saved when. Lists have an entry per seed.

    After `flush`, a store has all that rounds made.
    """
    infos = [] if earlier is None else [[earlier.rounds]]
    evaluations = [] if earlier is None else [[evaluation] for evaluation in earlier.evaluations]
    in_one_go = on_rounds is None and checkpoints is None
    done, per_call = first, min(eval_every or last, last - first) if in_one_go else 1
    while done < last:
        stop = min(last, done + per_call, last if eval_every is None else (done // eval_every + 1) * eval_every)
        stop = stop if checkpoints is None else checkpoints.bound(done, stop)
        start = time.perf_counter()
        state, info = run(state, stop - done)
        elapsed = time.perf_counter() - start
        infos.append(info)
        if not in_one_go and done > first:  # the first call compiles
            per_call = max(1, int(SECONDS_PER_CALL * (stop - done) / elapsed))
        if on_rounds is not None:
            on_rounds(stop, info)
        if checkpoints is not None:
            checkpoints.note(done, info[0])
        if evaluate_fn is not None and (stop == last or (eval_every and stop % eval_every == 0)):
            flush()
            evaluations.append([{"round": stop, **evaluation} for evaluation in evaluate_fn(state)])
            if on_evaluation is not None:
                on_evaluation(_histories(infos, evaluations))
            if checkpoints is not None:
                checkpoints.note_evaluation(evaluations[-1][0])
        if checkpoints is not None and checkpoints.due(stop, last):
            flush()
            checkpoints.save(state, last)
        done = stop
    return state, _histories(infos, evaluations)


def _histories(infos: list[list[RoundInfo]], evaluations: list[list[dict]]) -> list[History]:
    rounds = [jax.tree.map(lambda *x: np.concatenate(x), *of_seed) for of_seed in zip(*infos, strict=True)]
    of_seeds = list(zip(*evaluations, strict=True)) or [()] * len(rounds)
    return [History(rounds=r, evaluations=e) for r, e in zip(rounds, of_seeds, strict=True)]


@functools.partial(
    jax.jit, static_argnames=("round_fn", "cohort", "length", "layout", "participation"), donate_argnames=("state",)
)
def _run_rounds(
    state: State,
    data: FederatedData,
    key: Key,
    rounds,
    recorder: Leaf | None = None,
    *,
    round_fn,
    cohort: int,
    length: int,
    layout: Layout,
    participation: Participation = Participation(),
):
    """`rounds` <= `length` rounds; their infos in the first rows of `[length, K]` buffers. A recorder is told of each."""
    clients = data.start.shape[0]
    held = min((x.shape[0] for x in jax.tree.leaves(state.clients)), default=clients)
    # then nothing is moved: with take and put each device would get the states of all others
    everybody = cohort == clients == held and participation.available is None
    round_fn = jax.jit(round_fn)  # is traced once for the shapes of its results and for the loop

    def one_round(state: State) -> tuple[State, RoundInfo]:
        ids, turn = participation.draw(key, state.server.round, clients, cohort)
        more = () if turn is None else (turn,)
        if everybody:
            server, written, info = round_fn(state.server, state.clients, data, ids, key, *more)
        else:
            cohorts = take(state.clients, ids), take_clients(data, ids)
            server, own, info = round_fn(state.server, *cohorts, ids, key, *more)
            written = put(state.clients, ids, own)
        if layout.mesh is not None:
            written = jax.lax.with_sharding_constraint(written, layout.sharding("clients"))
        return State(server=server, clients=written), info

    def body(i, carry):
        state, infos = carry
        state, info = one_round(state)
        if recorder is not None:
            record(recorder, state, info, layout)
        return state, jax.tree.map(lambda rows, x: rows.at[i].set(x), infos, info)

    _, info = jax.eval_shape(one_round, state)
    infos = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), info)
    return jax.lax.fori_loop(0, rounds, body, (state, infos))


@functools.partial(
    jax.jit, static_argnames=("seeds", "round_fn", "cohort", "length", "layout"), donate_argnames=("state",)
)
def _run_seeds(state: State, data: FederatedData, keys: Key, rounds, *, seeds: Layout, **options):
    """`_run_rounds` of every seed, all it returns `[S, ...]`; `rounds` `[S]`, or one number for all."""

    def one_seed(state, key, rounds, data):
        return _run_rounds(state, data, key, rounds, **options), ()

    own, shared = ((state, keys, rounds), (data,)) if rounds.ndim else ((state, keys), (rounds, data))
    return map_clients(one_seed, own, shared, layout=seeds)[0]
