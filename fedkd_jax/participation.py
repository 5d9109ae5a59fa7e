"""Who takes part in a round, and what becomes of those who do: availability, dropouts, stragglers, over-selection.

All are pure functions of (key, round, client id), so a run is the same wherever it runs; none costs more where the population
is larger. A server asks, in this order:

1. Who is there? `sample_cohort` draws K of the clients that are available (`available`).
2. What does each manage? A `Turn`: some of its local steps, whether its message gets through, and after how long.
3. Whom does the server wait for? The `first` messages, of all who were asked, where it asked more than it needs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from fedkd_jax.check import check_fn, check_int, check_number
from fedkd_jax.cohort import client_key, sample_cohort
from fedkd_jax.parallel import map_clients
from fedkd_jax.types import Array, Key, Leaf, Number, PyTree, Turn

AvailableFn = Callable[[Key, Leaf, Leaf], Leaf]  # (key, round, client id) -> [] bool
TurnFn = Callable[[Key, Leaf, Leaf], Turn]  # (key, round, client id) -> Turn

ASKED = 64  # times the cohort: at most so many clients are asked whether they are there
# streams of a client in a round beside the two that its training splits its key into
_AVAILABLE, _TURN = 2**31 - 1, 2**31 - 2
_ALWAYS = 2**31 - 1  # a round that is never reached: of what a client has in every round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Participation:
    """How clients take part; the default is that all are there, and do all they should at once.

    Args:
        available: `(key, round, client id) -> bool []`, whether the client can be asked: `available_with`, `available_by`.
        turn: `(key, round, client id) -> Turn`, what it manages: `unreliable`.
        first: the server asks the whole cohort and goes on when so many messages are there; it waits for all if None.
        strata: the population is so many ranges of ids of the same size, and each gives the same share of a cohort, as each of
            several processes trains and keeps its own range.

    Raises:
        TypeError: no functions, or numbers that are no integers.
        ValueError: `first` or `strata` below 1.

    >>> everybody_half = Participation(turn=lambda key, round, client_id: Turn(work=0.5, sends=True, seconds=1.0))
    >>> ids, turn = everybody_half.draw(jax.random.key(0), 0, population=1000, cohort=3)
    >>> ids.shape, turn.work.tolist()
    ((3,), [0.5, 0.5, 0.5])
    """

    available: AvailableFn | None = None
    turn: TurnFn | None = None
    first: int | None = None
    strata: int = 1

    def __post_init__(self):
        for name, value in (("available", self.available), ("turn", self.turn)):
            if value is not None:
                check_fn(name, value, "(key, round, client id) -> bool or Turn")
        if self.first is not None:
            check_int("first", self.first)
        check_int("strata", self.strata)

    def check(self, population: int, cohort: int) -> None:
        """
        Raises:
            ValueError: more than the cohort are waited for, or ids or the cohort cannot be divided into the strata.

        >>> Participation(strata=4).check(population=1000, cohort=8)
        """
        if self.first is not None and self.first > cohort:
            raise ValueError(f"first is {self.first}; allowed: 1 to the cohort, {cohort}")
        if population % self.strata or cohort % self.strata:
            raise ValueError(
                f"strata is {self.strata}; allowed: a divisor of the population, {population}, and of the cohort, {cohort}"
            )

    def draw(
        self, key: Key, round: Int[Array, ""] | int, population: int, cohort: int
    ) -> tuple[Int[Array, "k"], Turn | None]:
        """A round's cohort, in increasing order of ids, and its turns; None where nothing can happen to anybody.

        Where fewer than K are available, or fewer are found among 64 K who are asked, the other places of the cohort are empty:
        any ids, `present` is False.
        """
        ids, present = sample_strata(key, round, population, cohort, self.strata, self.available)
        if self.available is None and self.turn is None and self.first is None:
            return ids, None
        reliable = lambda *_: Turn(work=1.0, sends=True, seconds=1.0)  # noqa: E731
        turn = _of_each(lambda i: _filled((self.turn or reliable)(key, round, i)), ids)
        sends, work, seconds = turn.sends & present, turn.work * present, turn.seconds * present
        counted = sends
        if self.first is not None:
            order = jnp.argsort(
                jnp.where(sends, seconds, jnp.inf)
            )  # the earlier of two at the same time: the smaller id
            counted = sends & (jnp.argsort(order) < self.first)
        return ids, Turn(work=work, sends=sends, seconds=seconds, present=present, counted=counted)


def _of_each(fn: Callable, ids: Array) -> PyTree:
    return map_clients(lambda i: (fn(i), ()), (ids,))[0]


def _filled(turn: Turn) -> Turn:
    """As arrays of the types there should be."""
    return Turn(
        work=jnp.asarray(turn.work, jnp.float32),
        sends=jnp.asarray(turn.sends, bool),
        seconds=jnp.asarray(turn.seconds, jnp.float32),
        present=jnp.bool_(True),
        counted=jnp.bool_(True),
    )


def sample_strata(
    key: Key,
    round: Int[Array, ""] | int,
    population: int,
    cohort: int,
    strata: int = 1,
    available: AvailableFn | None = None,
) -> tuple[Int[Array, "k"], Bool[Array, "k"]]:
    """`(ids [K], present [K])`: K / S distinct ids out of each of S ranges of N / S ids, uniformly among those available, in
    increasing order, and which of them were.

    >>> ids, present = sample_strata(jax.random.key(0), 0, population=1000, cohort=4, strata=2)
    >>> (ids < 500).tolist(), present.tolist()
    ([True, True, False, False], [True, True, True, True])
    """
    size, share = population // strata, cohort // strata

    def of_stratum(s):
        own = key if strata == 1 else client_key(key, _ALWAYS - 1, s)
        if available is None:
            return sample_cohort(own, round, size, share) + s * size, jnp.ones(share, bool)
        asked = lambda i: jnp.asarray(available(key, round, i + s * size), bool)  # noqa: E731
        ids, present = _sample_available(own, round, size, share, lambda ids: _of_each(asked, ids))
        return ids + s * size, present

    if strata == 1:
        return of_stratum(0)
    ids, present = jax.lax.map(of_stratum, jnp.arange(strata, dtype=jnp.int32))
    return ids.reshape(-1), present.reshape(-1)


def _sample_available(key, round, population: int, cohort: int, there: Callable):
    """Of those that are there any K with the same chance: the first of a uniform order of all clients, or of uniform draws."""
    draw_key = jax.random.fold_in(jax.random.fold_in(key, round), _AVAILABLE)
    if population <= ASKED * cohort:
        order = jax.random.permutation(draw_key, population).astype(jnp.int32)
        ids = order[jnp.argsort(~there(order), stable=True)][:cohort]
        n = there(ids).sum()
    else:

        def insert(i, state, draws, ok):
            ids, n = state
            new = ok[i] & (n < cohort) & ~jnp.any(ids == draws[i])
            return ids.at[jnp.where(new, n, cohort)].set(draws[i], mode="drop"), n + new

        def ask(state):
            asked, ids, n = state
            draws = jax.random.randint(jax.random.fold_in(draw_key, asked), (cohort,), 0, population, jnp.int32)
            ok = there(draws)
            ids, n = jax.lax.fori_loop(0, cohort, lambda i, s: insert(i, s, draws, ok), (ids, n))
            return asked + 1, ids, n

        more = lambda state: (state[2] < cohort) & (state[0] < ASKED)  # noqa: E731
        _, ids, n = jax.lax.while_loop(more, ask, (0, jnp.full(cohort, -1, jnp.int32), jnp.int32(0)))
        # for the empty places, whoever is not among them
        others = sample_cohort(key, round, population, cohort)
        taken = jnp.any(others[:, None] == jnp.where(jnp.arange(cohort) < n, ids, -1)[None], axis=1)
        others = others[jnp.argsort(taken, stable=True)]
        ids = jnp.where(jnp.arange(cohort) < n, ids, jnp.roll(others, n))
    present = jnp.arange(cohort) < n
    order = jnp.argsort(ids)
    return ids[order], present[order]


# ---- who is there ----------------------------------------------------------------------------------------------------


def available_with(probability: Number) -> AvailableFn:
    """Each client in each round with the same probability.

    Raises:
        ValueError: not in (0, 1].

    >>> there = jax.vmap(lambda i: available_with(0.25)(jax.random.key(0), 3, i))(jnp.arange(1000))
    >>> 200 < int(there.sum()) < 300
    True
    """
    check_number("probability", probability, "(0, 1]")

    def available(key, round, client_id):
        return jax.random.bernoulli(
            jax.random.fold_in(client_key(key, round, client_id), _AVAILABLE), float(probability)
        )

    return available


def available_by(trace: Array) -> AvailableFn:
    """A record of who was there when, such as from phones: in round t who `trace[t mod T]` says.

    Args:
        trace: `[T, G]` bool; client i is of group `i mod G`, so a column for each client, or for each time zone.

    Raises:
        ValueError: not two axes of bool, no rows or no columns, or nobody is ever there.

    >>> night_and_day = available_by(np.array([[True, False], [False, True]]))
    >>> [[bool(night_and_day(None, t, i)) for i in range(4)] for t in (0, 3)]
    [[True, False, True, False], [False, True, False, True]]
    """
    trace = np.asarray(trace)
    if trace.ndim != 2 or trace.dtype != bool or not trace.any():
        some = f", {np.count_nonzero(trace)} true" if trace.dtype == bool else ""
        raise ValueError(f"trace is {trace.dtype}{list(trace.shape)}{some}; allowed: bool[T, G], some true")
    rows = jnp.asarray(trace)

    def available(key, round, client_id):
        return rows[round % rows.shape[0], client_id % rows.shape[1]]

    return available


# ---- what they manage ------------------------------------------------------------------------------------------------


def unreliable(*, dropout: Number = 0.0, stragglers: Number = 0.0, least: Number = 0.1, spread: Number = 0.0) -> TurnFn:
    """Clients that drop out, that do not get through their work, and that are not equally fast.

    Args:
        dropout: the probability that a client does its local work and then is lost, in each round.
        stragglers: the probability that it makes only a share of its local steps, uniform in [least, 1), in each round.
        least: see there.
        spread: a client's time for all of its local steps is exp(spread z) seconds, z ~ N(0, 1) the client's own, the same in
            all rounds; a share of the steps takes that share of it. The median client takes a second.

    Raises:
        ValueError: a probability outside [0, 1], a `least` outside (0, 1], a negative spread.

    >>> turn = unreliable(dropout=1.0, stragglers=1.0, least=0.5)(jax.random.key(0), 0, 7)
    >>> bool(turn.sends), bool(turn.work >= 0.5), bool(turn.seconds == turn.work)
    (False, True, True)
    """
    check_number("dropout", dropout, "[0, 1]")
    check_number("stragglers", stragglers, "[0, 1]")
    check_number("least", least, "(0, 1]")
    check_number("spread", spread, "[0, inf)")

    def turn(key, round, client_id) -> Turn:
        lost, slow, share = jax.random.split(jax.random.fold_in(client_key(key, round, client_id), _TURN), 3)
        part = jax.random.uniform(share, minval=float(least), maxval=1.0)
        work = jnp.where(jax.random.bernoulli(slow, float(stragglers)), part, 1.0)
        own = jax.random.normal(client_key(key, _ALWAYS, client_id))
        return Turn(work=work, sends=~jax.random.bernoulli(lost, float(dropout)), seconds=work * jnp.exp(spread * own))

    return turn
