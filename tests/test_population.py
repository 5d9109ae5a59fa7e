"""Laws of `fedkd_jax.population`, `stores` and `stream`: where states live changes no bit; space follows who was sampled."""

import collections
import functools
import math
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax import ClientState, DiskStore, HostStore, Layout, State, client_mesh, evaluate, put, simulate, take
from fedkd_jax.data import from_arrays, take_clients
from fedkd_jax.parallel import place_rows
from fedkd_jax.population import init_server, init_state, place_data
from fedkd_jax.stream import _one_round
from fedkd_jax.types import Algorithm, ClientSource

rounds_fn = sys.modules["fedkd_jax.simulate"]._run_rounds  # the function simulate hides its module
KEY = jax.random.key(23)
DATA, TEST = strategies.small_data(), strategies.small_data(1)
FEDKD = "fedkd, optimiser kept"


@functools.cache
def algorithm(name=FEDKD, devices=None):
    return strategies.ALGORITHMS[name](Layout(mesh=None if devices is None else client_mesh(devices), chunk=1))


def run(name, cohort, devices=None, *, rounds=7, population=5, data=DATA, **options):
    options = dict(test=TEST, eval_every=3) | options
    return simulate(algorithm(name, devices), population, data, KEY, rounds=rounds, cohort=cohort, **options)


on_device = functools.cache(run)


@pytest.mark.parametrize(
    ("where", "name", "cohort", "devices", "data"),
    [
        ("host", FEDKD, 2, None, DATA),
        ("disk", FEDKD, 2, None, from_arrays(DATA)),
        ("host", "local_only, bfloat16 at rest", 2, None, DATA),
        ("host", FEDKD, 4, 2, DATA),
        ("disk", "local_only", 3, 2, from_arrays(DATA)),  # three do not split over two
        ("host", "fedavg", 5, None, from_arrays(DATA)),  # nothing to keep, and everybody in every round
    ],
)
def test_where_states_and_examples_are_changes_no_bit(tmp_path, eight_devices, where, name, cohort, devices, data):
    state, history = on_device(name, cohort, devices)
    store = HostStore() if where == "host" else DiskStore(tmp_path / "states")
    other, rows = run(name, cohort, devices, data=data, store=store)
    chex.assert_trees_all_equal(rows.rounds, history.rounds)
    chex.assert_trees_all_equal(rows.evaluations, history.evaluations)
    chex.assert_trees_all_equal(other.server, state.server)
    assert other.clients is store
    everybody = jax.device_get(store.take(np.arange(5)))
    chex.assert_trees_all_equal(everybody, jax.tree.map(lambda x: np.asarray(x)[:5], state.clients))
    assert len(store) == len(np.unique(history.rounds.ids))
    if where == "disk":
        assert store.path.stat().st_size == store.nbytes > 0


def test_a_run_goes_on_from_its_store_and_some_clients_are_evaluated():
    state, history = on_device(FEDKD, 2)
    ids = np.array([4, 1])
    half, _ = run(FEDKD, 2, rounds=3, store=HostStore())
    whole, rows = run(FEDKD, 2, rounds=4, population=half, test=from_arrays(TEST), eval_ids=ids)
    chex.assert_trees_all_equal(whole.server, state.server)
    chex.assert_trees_all_equal(rows.rounds, jax.tree.map(lambda x: x[3:], history.rounds))
    (last,) = rows.evaluations[-1:]
    for model in ("teacher", "student"):
        np.testing.assert_array_equal(last[model]["accuracy"], history.evaluations[-1][model]["accuracy"][ids])
    some = from_arrays(TEST).take(ids)
    chex.assert_trees_all_equal(
        evaluate(algorithm(), whole, some, ids=ids), evaluate(algorithm(), state, some, ids=ids)
    )


def told(compiled) -> dict[str, int]:
    """`{collective: numbers it moves}`, in a compiled program."""
    sizes = collections.Counter()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        sizes[kind] += sum(
            math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", shapes)
        )
    return dict(sizes)


def test_over_devices_a_round_adds_up_and_gathers_no_states(eight_devices):
    """What devices tell each other, in the compiled program: the weighted sum of the updates, and of the weights."""
    own, layout = algorithm("fedkd, optimiser kept", 2), Layout(mesh=client_mesh(2))
    clients = place_rows(jax.device_get(own.init_clients(KEY, np.arange(4))), layout)
    server = init_server(own, KEY)
    state = (server, clients, place_data(DATA, layout), jnp.arange(4), KEY)
    numbers = sum(x.size for x in jax.tree.leaves(server.params))
    assert told(_one_round.lower(*state, round_fn=own.round, layout=layout).compile()) == {"all-reduce": numbers + 1}
    # out of states that are split over the devices, a cohort's are not to be had without
    assert sum(told(jax.jit(take).lower(clients, jnp.array([3, 0])).compile()).values()) > 2 * numbers


def test_over_devices_rounds_of_everybody_move_no_states(eight_devices):
    """And give the bits that they would have if states were taken out and put back."""
    own, layout = algorithm("fedavg, optimiser kept", 2), Layout(mesh=client_mesh(2))
    four = take_clients(place_data(DATA, layout), jnp.arange(4))
    options = dict(round_fn=own.round, length=3, layout=layout)
    state = init_state(own, 4, KEY)
    numbers = sum(x.size for x in jax.tree.leaves(state.server.params))
    compiled = rounds_fn.lower(state, four, KEY, jnp.int32(3), cohort=4, **options).compile()
    assert told(compiled) == {"all-reduce": numbers + 1}
    moved = jax.jit(lambda s, ids: own.round(s.server, take(s.clients, ids), take_clients(four, ids), ids, KEY))
    expected = state
    for _ in range(3):
        server, clients, _ = moved(expected, jnp.arange(4))
        expected = State(server=server, clients=put(expected.clients, jnp.arange(4), clients))
    expected = jax.device_get(expected)
    chex.assert_trees_all_equal(jax.device_get(compiled(state, four, KEY, jnp.int32(3))[0]), expected)


# ---- stores alone ------------------------------------------------------------------------------------------------------


def made(key, ids):
    """States of many types, from key and id."""
    number = jax.random.uniform(key, ()) + ids.astype(jnp.float32)
    return ClientState(
        teacher={"w": number[:, None, None] * jnp.ones((1, 20, 3)), "half": number[:, None].astype(jnp.bfloat16)},
        teacher_opt=(ids.astype(jnp.int32), jnp.zeros((len(ids), 0)), ids[:, None] % jnp.arange(1, 6)[None] > 0),
    )


MADE = Algorithm(init_server=lambda key: None, init_clients=made, round=lambda *_: None)


@settings(deadline=None)
@given(
    cohorts=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4, unique=True), max_size=6),
    asked=st.lists(st.integers(0, 9), min_size=4, max_size=4, unique=True),
    disk=st.booleans(),
    chunk=st.sampled_from([1, 100, 10_000]),
    page=st.sampled_from([7, 4096]),
)
def test_a_store_is_a_dict_of_clients(tmp_path_factory, cohorts, asked, disk, chunk, page):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkd_jax.stores.CHUNK_BYTES", chunk)
        patch.setattr("fedkd_jax.stores.CALL_BYTES", chunk)
        patch.setattr("fedkd_jax.stores.PAGE_BYTES", page)
        store = DiskStore(tmp_path_factory.mktemp("states")) if disk else HostStore()
        store.open(MADE, KEY)
        oracle = {i: strategies.one(store.init(np.arange(10)), i) for i in range(10)}
        for t, ids in enumerate(cohorts):
            new = jax.tree.map(lambda x: np.asarray(x) * (t + 2), made(KEY, np.array(ids)))  # noqa: B023
            new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, made(KEY, np.array(ids)))
            store.write(np.array(ids), new)
            oracle |= {i: strategies.one(new, k) for k, i in enumerate(ids)}
        got = store.take(np.array(asked))
        for k, i in enumerate(asked):
            chex.assert_trees_all_equal(strategies.one(got, k), oracle[i])
        chex.assert_trees_all_equal_dtypes(got, made(KEY, np.array(asked)))
        touched = len({i for ids in cohorts for i in ids})
        assert (len(store), store.nbytes) == (touched, touched * store.row_bytes)
        store.close()


def test_what_a_store_refuses(tmp_path):
    store = DiskStore(tmp_path)
    with pytest.raises(ValueError, match="the store is not open"):
        store.take(np.arange(2))
    with pytest.raises(FileExistsError):
        DiskStore(tmp_path)
    store.open(MADE, KEY)
    store.write(np.arange(4), store.take(np.arange(4)))
    with pytest.raises(ValueError, match="store is of another algorithm's states"):
        store.open(algorithm(), KEY)
    with pytest.raises(ValueError, match="store is of another run's clients"):
        store.open(MADE, jax.random.key(24))
    with pytest.raises(ValueError, match="store holds 4 clients; allowed: a new one"):
        run(FEDKD, 2, store=store)
    with pytest.raises(ValueError, match="store is given with a State"):
        run(FEDKD, 2, population=State(server=None, clients=store), store=HostStore())
    store.path.write_bytes(b"")
    with pytest.raises(OSError, match=r"clients\.bin has 0 bytes; allowed: at least 528"):
        store.take(np.arange(2))
    with pytest.raises(TypeError, match="typed random keys"):
        HostStore().open(MADE._replace(init_clients=lambda key, ids: jax.random.split(key, len(ids))), KEY)
    source = ClientSource(clients=5, take=from_arrays(DATA).take)
    with pytest.raises(ValueError, match="data is a ClientSource and the clients' states are on the device"):
        run(FEDKD, 2, data=source)
    with pytest.raises(ValueError, match="test is a ClientSource and eval_ids is None"):
        run(FEDKD, 2, test=source)
    for ids in ([], [5], [-1]):
        with pytest.raises(ValueError, match=r"eval_ids is \[.*\]; allowed: one id or more of 0 to 4"):
            run(FEDKD, 2, test=source, eval_ids=np.array(ids, int))
        with pytest.raises(ValueError, match=r"eval_ids is \[.*\]; allowed: one id or more of 0 to 4"):
            run(FEDKD, 2, test=TEST, eval_ids=np.array(ids, int))
    with pytest.raises(ValueError, match="test has 6 clients; allowed: 5, as in data"):
        run(FEDKD, 2, test=source._replace(clients=6), eval_ids=np.array([0]))
    one_too_few = source._replace(take=lambda ids: source.take(ids[1:]))
    with pytest.raises(ValueError, match=r"data.take gave \(1,\) clients for ids \(2,\)"):
        run("fedavg", 2, data=one_too_few, store=HostStore())
    state, _ = on_device(FEDKD, 2)
    for ids in ([0, 5], [-1, 0], [0]):
        with pytest.raises(ValueError, match=r"ids is \[.*\]; allowed: 2 of 0 to 4, one for each client of data"):
            evaluate(algorithm(), state, source.take(np.arange(2)), ids=np.array(ids))


def test_a_failed_write_ends_the_run(tmp_path):
    class Full(HostStore):
        def _write(self, rows, slots):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        run("local_only", 2, store=(store := Full()))
    assert len(store) == 0  # nobody who has no state
    with pytest.raises(ValueError, match="a State of round 0 whose store was left within a run; allowed: the newest"):
        run("local_only", 2, population=State(server=init_server(algorithm("local_only"), KEY), clients=store))


def test_a_store_goes_on_from_its_newest_state_only():
    old, _ = run("local_only", 2, rounds=1, store=HostStore())
    run("local_only", 2, rounds=1, population=old)
    with pytest.raises(ValueError, match="a State of round 1 whose store is at round 2; allowed: the newest"):
        run("local_only", 2, population=old)
