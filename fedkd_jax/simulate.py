"""Many rounds: compiled loops over rounds between evaluations, states donated, one trace."""

import functools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.cohort import put, sample_cohort, take
from fedkd_jax.data import take_clients
from fedkd_jax.evaluate import METRICS, evaluate
from fedkd_jax.metrics import AnyMetric
from fedkd_jax.parallel import Layout
from fedkd_jax.population import init_state, place_data
from fedkd_jax.types import Algorithm, FederatedData, History, Key, RoundInfo, State

SECONDS_PER_CALL = 1.0


def simulate(
    algorithm: Algorithm,
    population: int | State,
    data: FederatedData,
    key: Key,
    *,
    rounds: int,
    cohort: int | None = None,
    test: FederatedData | None = None,
    eval_every: int | None = None,
    eval_batch: int = 256,
    metrics: Mapping[str, AnyMetric] = METRICS,
    on_rounds: Callable[[int, RoundInfo], None] | None = None,
    on_evaluation: Callable[[History], None] | None = None,
) -> tuple[State, History]:
    """Runs `rounds` rounds, each on a fresh uniform cohort.

    The rounds between two evaluations are one compiled loop (cut at about a second each where `on_rounds` wants to show
    progress), whose bound is not static: one trace however they fall. Randomness depends on `key`, the round number and
    the client id only, so 5 rounds, then 5 more from the returned state, are 10.

    Args:
        algorithm: any `Algorithm`.
        population: the number of clients N, for a new run; or the `State` to go on from (it is copied, not consumed).
        data: the N clients' training examples.
        key: the run's key; the same one when going on.
        rounds: rounds to run now.
        cohort: clients per round K; all by default.
        test: the N clients' test examples; without them nothing is evaluated.
        eval_every: rounds between evaluations, counted from the run's first round; there is always one after the last.
        eval_batch, metrics: as in `evaluate`.
        on_rounds: called as `(rounds done in all, RoundInfo [r, K] of the newest)`, for progress.
        on_evaluation: called after each evaluation with the history so far.

    Returns:
        The state, and the history: `rounds` a RoundInfo `[R, K]` in NumPy, `evaluations` a tuple of `evaluate`'s dicts, each
        with its "round".

    Raises:
        ValueError: zero rounds, `cohort` not in 1..N, `eval_every` below 1, a population that is not the data's.

    >>> import optax
    >>> from fedkd_jax import fedavg, mlp
    >>> data = FederatedData(inputs=np.eye(6, dtype=np.float32), labels=np.arange(6) % 2, start=np.array([0, 2, 5]),
    ...                      count=np.array([2, 3, 1]), max_count=3)
    >>> algorithm = fedavg(mlp((6, 2)), optimizer=optax.sgd(0.5), batch=2)
    >>> state, history = simulate(algorithm, 3, data, jax.random.key(0), rounds=4, cohort=2, test=data)
    >>> history.rounds.ids.shape, int(state.server.round), history.evaluations[-1]["round"]
    ((4, 2), 4, 4)
    """
    clients = data.start.shape[0]
    cohort = clients if cohort is None else cohort
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; allowed: at least 1")
    if isinstance(population, int) and population != clients:
        raise ValueError(f"population is {population}; allowed: {clients}, the number of clients in data")
    if not 1 <= cohort <= clients:
        raise ValueError(f"cohort is {cohort}; allowed: 1 to the population, {clients}")
    if eval_every is not None and eval_every < 1:
        raise ValueError(f"eval_every is {eval_every}; allowed: at least 1")
    if test is not None and test.start.shape[0] != clients:
        raise ValueError(f"test has {test.start.shape[0]} clients; allowed: {clients}, as in data")

    init_key, run_key = jax.random.split(key)
    layout = algorithm.layout or Layout()
    state = (
        init_state(algorithm, clients, init_key) if isinstance(population, int) else jax.tree.map(jnp.copy, population)
    )
    data = place_data(data, layout)
    test = None if test is None else place_data(test, layout)
    first = int(state.server.round)
    last, length = first + rounds, min(eval_every or rounds, rounds)

    infos, evaluations = [], []
    done, per_call = first, length if on_rounds is None else 1
    while done < last:
        stop = min(last, done + per_call, last if eval_every is None else (done // eval_every + 1) * eval_every)
        start = time.perf_counter()
        state, info = _run_rounds(
            state,
            data,
            run_key,
            jnp.int32(stop - done),
            round_fn=algorithm.round,
            cohort=cohort,
            length=length,
            layout=layout,
        )
        # before jax 0.12, collectives of two programs in flight can wait for each other for ever
        info = jax.tree.map(lambda x: x[: stop - done], jax.device_get(info))  # noqa: B023
        elapsed = time.perf_counter() - start
        infos.append(info)
        if on_rounds is not None:
            if done > first:  # the first call compiles
                per_call = max(1, int(SECONDS_PER_CALL * (stop - done) / elapsed))
            on_rounds(stop, info)
        done = stop
        if test is not None and (done == last or (eval_every and done % eval_every == 0)):
            evaluations.append({"round": done, **evaluate(algorithm, state, test, metrics=metrics, batch=eval_batch)})
            if on_evaluation is not None:
                on_evaluation(_history(infos, evaluations))
    return state, _history(infos, evaluations)


def _history(infos: list[RoundInfo], evaluations: list[dict]) -> History:
    return History(rounds=jax.tree.map(lambda *x: np.concatenate(x), *infos), evaluations=tuple(evaluations))


@functools.partial(jax.jit, static_argnames=("round_fn", "cohort", "length", "layout"), donate_argnames=("state",))
def _run_rounds(
    state: State, data: FederatedData, key: Key, rounds, *, round_fn, cohort: int, length: int, layout: Layout
):
    """`rounds` <= `length` rounds; their infos in the first rows of `[length, K]` buffers."""
    clients = data.start.shape[0]
    round_fn = jax.jit(round_fn)  # is traced once for the shapes of its results and for the loop

    def one_round(state: State) -> tuple[State, RoundInfo]:
        ids = sample_cohort(key, state.server.round, clients, cohort)
        server, own, info = round_fn(state.server, take(state.clients, ids), take_clients(data, ids), ids, key)
        written = put(state.clients, ids, own)
        if layout.mesh is not None:
            written = jax.lax.with_sharding_constraint(written, layout.sharding("clients"))
        return State(server=server, clients=written), info

    def body(i, carry):
        state, infos = carry
        state, info = one_round(state)
        return state, jax.tree.map(lambda rows, x: rows.at[i].set(x), infos, info)

    _, info = jax.eval_shape(one_round, state)
    infos = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), info)
    return jax.lax.fori_loop(0, rounds, body, (state, infos))
