"""The seams for hostile clients and aggregators, in every algorithm that averages, in groups and over devices."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import strategies
from strategies import FEATURES, TARGETS

from fedkd_jax import (
    Aggregator,
    HostStore,
    Layout,
    attacked,
    client_mesh,
    clip_update,
    coordinate_median,
    fedavg,
    feddropout,
    fedpaq,
    fedprox,
    fetchsgd,
    fixed_mean,
    fml,
    init_state,
    keep_units,
    mlp,
    private_mean,
    scaffold,
    sign_flip,
    simulate,
    trimmed_mean,
    uniform_weight,
)
from fedkd_jax.types import Turn

KEY = jax.random.key(29)
MODEL, SGD = mlp((FEATURES, 10, TARGETS)), optax.sgd(0.3)
SEAMS = {  # those that are not other ones with other options
    "fedavg": lambda **o: fedavg(MODEL, optimizer=SGD, batch=4, **o),
    "scaffold": lambda **o: scaffold(MODEL, learning_rate=0.2, batch=4, **o),
    "fetchsgd": lambda **o: fetchsgd(MODEL, columns=80, share=0.5, optimizer=SGD, batch=4, **o),
    "feddropout": lambda **o: feddropout(MODEL, sub_model=keep_units(0.6), optimizer=SGD, batch=4, **o),
}
every = pytest.mark.parametrize("name", SEAMS)
DATA, HONEST, ATTACKED = strategies.small_data(), np.arange(5), np.array([0, 101, 2, 3, 4])
hostile = lambda i: i > 100  # noqa: E731
LOST = np.array([True, True, False, True, True])
TURN = Turn(work=np.ones(5, np.float32), sends=LOST, seconds=np.ones(5, np.float32), present=LOST | True, counted=LOST)


def plain_mean(updates, weights):
    """The mean of all K at once, of each number by itself."""

    def leaf(x, w):
        w = w.reshape(w.shape + (1,) * (x.ndim - w.ndim))
        total = jnp.where(w > 0, w, 0).sum(axis=0)
        return jnp.where(w > 0, w * x, 0).sum(axis=0) / jnp.where(total > 0, total, 1)

    if isinstance(weights, jax.Array):
        weights = jax.tree.map(lambda _: weights, updates)
    return jax.tree.map(leaf, updates, weights)


AGGREGATORS = {
    "mean": None,
    "mean at once": Aggregator(combine=plain_mean),
    "median": Aggregator(combine=coordinate_median),
    "bound": Aggregator(bound=clip_update(0.5)),
    "noise 0": private_mean(0.5, 0.0),
    "noise 0, no bound": fixed_mean(),
    "noise": private_mean(0.5, 4.0),
}


@functools.cache
def setting(name, aggregator):
    """The round, in which ids above 100 send their updates times -1000, and the state it starts from."""
    options = {"aggregator": AGGREGATORS[aggregator], "send_fn": attacked(sign_flip(1000.0), hostile)}
    if "noise" in aggregator and name != "scaffold":
        options["weight_fn"] = uniform_weight
    algorithm = SEAMS[name](**options)
    return jax.jit(algorithm.round), init_state(algorithm, 5, KEY)


def params(name, aggregator, ids=HONEST, turn=None, rounds=1):
    run, state = setting(name, aggregator)
    server, clients = state.server, state.clients
    turn = turn or dataclasses.replace(TURN, sends=LOST | True, counted=LOST | True)
    for _ in range(rounds):
        server, clients, info = run(server, clients, DATA, ids, KEY, turn)
    assert info.finite.all()
    return server.params


def distance(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


@every
def test_a_mean_of_all_at_once_is_the_one_that_is_added_up(name):
    """Where a client is lost; also SCAFFOLD's variates and FedDropout's means of those who have a weight."""
    one, other = (params(name, aggregator, turn=TURN, rounds=2) for aggregator in ("mean", "mean at once"))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


@every
def test_a_median_withstands_what_a_mean_does_not(name):
    """As distances from where a round without hostile clients goes; sketches included. Of FedDropout, some weights have
    two clients only, and their median is their mean."""
    mean, median = (distance(params(name, a), params(name, a, ATTACKED)) for a in ("mean", "median"))
    assert mean > (1 if name == "feddropout" else 10) * median


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "feddropout"])
def test_a_hostile_client_moves_a_mean_of_bounded_updates_by_no_more_than_its_share(name):
    """Of a weight 3 of 22, or 1 of 5, or of FedDropout's weights that few have more."""
    moved = distance(params(name, "bound"), params(name, "bound", ATTACKED))
    assert moved < 2 * 0.5 * {"fedavg": 3 / 22, "scaffold": 1 / 5, "feddropout": 1}[name] * 1.5
    assert distance(params(name, "mean"), params(name, "mean", ATTACKED)) > 20 * moved


@pytest.mark.parametrize("name", ["fedavg", "fetchsgd"])
def test_a_release_of_any_method_can_be_noised(name):
    still = params(name, "noise 0")
    if name != "fetchsgd":  # whose server takes the largest numbers of the sum
        assert distance(params(name, "noise 0", ATTACKED), still) <= 2 * 0.5 / 5 * 1.5
    assert distance(params(name, "noise"), still) > 1


def test_what_scaffold_adds_to_its_variate_is_the_same_with_a_fixed_divisor():
    """The sum over |S|, as its equation says, also where a client is lost."""
    one, other = (params("scaffold", a, turn=TURN)["control"] for a in ("mean", "noise 0, no bound"))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda **o: strategies.small_fedkd(downlink=None, **o),
        lambda **o: fml(MODEL, MODEL, teacher_optimizer=SGD, student_optimizer=SGD, batch=4, **o),
        lambda **o: fedprox(MODEL, mu=0.5, optimizer=SGD, batch=4, **o),
        lambda **o: fedpaq(MODEL, bits=8, optimizer=SGD, batch=4, **o),
    ],
    ids=["fedkd", "fml", "fedprox", "fedpaq"],
)
def test_the_others_hand_on_what_they_are_given(build):
    asked = []
    send_fn = lambda message, client_id, key: asked.append("send") or message  # noqa: E731
    combine = lambda updates, weights: asked.append("combine") or plain_mean(updates, weights)  # noqa: E731
    algorithm = build(send_fn=send_fn, aggregator=Aggregator(combine=combine))
    server, clients = jax.eval_shape(lambda: (algorithm.init_server(KEY), algorithm.init_clients(KEY, HONEST)))
    jax.eval_shape(algorithm.round, server, clients, DATA, HONEST, KEY)
    assert set(asked) == {"send", "combine"}


def test_noise_does_not_hide_how_many_have_a_weight():
    with pytest.raises(ValueError, match="aggregator has noise; allowed: one without"):
        SEAMS["feddropout"](aggregator=private_mean(1.0, 1.0), weight_fn=uniform_weight)


def test_groups_chunks_and_devices_put_together_the_same(eight_devices):
    aggregator = Aggregator(bound=clip_update(3.0), combine=trimmed_mean(0.25))
    build = functools.partial(
        SEAMS["fedavg"], aggregator=aggregator, send_fn=attacked(sign_flip(9.0), lambda i: i == 1)
    )
    results = []
    for layout, group in (
        (Layout(chunk=1), None),
        (Layout(chunk=2), None),
        (Layout(mesh=client_mesh(2), chunk=1), None),
        (Layout(mesh=client_mesh(2), chunk=1), 2),
    ):
        store = None if group is None else HostStore()
        algorithm = build(layout=layout)
        state, history = simulate(algorithm, 5, DATA, KEY, rounds=3, cohort=4, store=store, group=group)
        results.append((state.server, history.rounds))
    for other in results[1:]:
        chex.assert_trees_all_close(other, results[0], rtol=1e-4, atol=1e-5)
