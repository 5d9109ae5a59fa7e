"""Methods that FedKD is compared with, against NumPy loops, and what makes one of them another."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import COUNTS, FEATURES, TARGETS, one

from fedkd_jax import (
    cross_entropy,
    fedavg,
    feddropout,
    fedpaq,
    fedprox,
    fetchsgd,
    fml,
    init_state,
    keep_units,
    kl_divergence,
    mlp,
    mutual_learning,
    put,
    scaffold,
    take,
    uniform_weight,
)
from fedkd_jax.algorithms.feddropout import UNITS_STREAM
from fedkd_jax.cohort import client_key
from fedkd_jax.data import take_clients
from fedkd_jax.models import layer_compressible, layer_view

KEY = jax.random.key(17)
IDS = np.array([3, 0, 4], np.int32)
MODEL = mlp((FEATURES, 10, TARGETS))
SIZE = FEATURES * 10 + 10 + 10 * TARGETS + TARGETS
close = dict(rtol=1e-3, atol=1e-5)
f32 = lambda tree: jax.tree.map(np.float32, tree)  # noqa: E731
add = lambda *trees: jax.tree.map(lambda *xs: sum(xs), *trees)  # noqa: E731
scale = lambda factor, tree: jax.tree.map(lambda x: factor * x, tree)  # noqa: E731


def rounds_of(algorithm, count=2):
    """(t, ids, server before, clients of the cohort before, server, clients after, info) of each round."""
    state, run, data = init_state(algorithm, 5, KEY), jax.jit(algorithm.round), strategies.small_data()
    server, clients = state.server, state.clients
    for t in range(count):
        ids = np.roll(IDS, t)
        before, own = server, take(clients, ids)
        server, after, info = run(server, own, take_clients(data, ids), ids, KEY)
        clients = put(clients, ids, after)
        yield t, ids, before, own, server, after, info


@pytest.mark.parametrize("work", [dict(epochs=2), dict(steps=3)])
def test_fedprox_equals_numpy(work):
    algorithm, data = fedprox(MODEL, mu=0.7, optimizer=optax.sgd(0.3), batch=4, **work), strategies.small_data()
    for t, ids, before, _, server, _, info in rounds_of(algorithm):
        start, ends = reference.to64(before.params), []
        pull = lambda grads, params, start=start: add(grads, scale(0.7, params), scale(-0.7, start))  # noqa: E731
        for i in ids:
            end, _ = reference.plain_training(start, data, int(i), KEY, t, batch=4, rate=0.3, change=pull, **work)
            ends.append(end)
        mean = reference.weighted_average(ends, [COUNTS[i] for i in ids])
        chex.assert_trees_all_close(server.params, f32(mean), **close)
        assert set(info.uplink_bytes.tolist()) == set(info.downlink_bytes.tolist()) == {4 * SIZE}


@pytest.mark.parametrize("work", [dict(epochs=2), dict(steps=3)])
def test_scaffold_equals_numpy(work):
    rate, share, data = 0.2, 3 / 5, strategies.small_data()
    algorithm = scaffold(MODEL, learning_rate=rate, participation=share, batch=4, **work)
    for t, ids, before, own, server, after, info in rounds_of(algorithm, 3):
        start, control = (reference.to64(before.params[name]) for name in ("model", "control"))
        updates, changes = [], []
        for k, i in enumerate(ids):
            mine = reference.to64(one(own.control, k))
            correct = lambda grads, _, mine=mine, control=control: add(grads, control, scale(-1, mine))  # noqa: E731
            end, _ = reference.plain_training(start, data, int(i), KEY, t, batch=4, rate=rate, change=correct, **work)
            steps = work.get("steps") or 2 * -(-COUNTS[i] // 4)
            new = add(mine, scale(-1, control), scale(1 / (steps * rate), add(start, scale(-1, end))))
            chex.assert_trees_all_close(one(after.control, k), f32(new), rtol=1e-3, atol=1e-4)
            updates.append(add(end, scale(-1, start)))
            changes.append(add(new, scale(-1, mine)))
        expected = add(start, scale(1 / 3, add(*updates))), add(control, scale(share / 3, add(*changes)))
        chex.assert_trees_all_close(
            (server.params["model"], server.params["control"]), f32(expected), rtol=1e-3, atol=1e-4
        )
        assert set(info.uplink_bytes.tolist()) == set(info.downlink_bytes.tolist()) == {8 * SIZE}


@pytest.mark.parametrize("counts", [COUNTS, (7, 3, 0, 1, 5)])
def test_the_variate_of_scaffolds_server_is_the_mean_of_its_clients(counts):
    """Also with three of five clients a round, of unequal sizes, one of them empty."""
    algorithm, data = scaffold(MODEL, learning_rate=0.2, participation=3 / 5, batch=4), strategies.small_data(0, counts)
    state, run = init_state(algorithm, 5, KEY), jax.jit(algorithm.round)
    server, clients = state.server, state.clients
    for t in range(4):
        ids = np.roll(np.arange(5, dtype=np.int32), t)[:3]
        server, own, _ = run(server, take(clients, ids), take_clients(data, ids), ids, KEY)
        clients = put(clients, ids, own)
    mean = jax.tree.map(lambda x: x.mean(0), clients.control)
    chex.assert_trees_all_close(server.params["control"], mean, rtol=1e-3, atol=1e-5)


def test_scaffold_sees_the_layers_of_a_stack():
    """Its message holds the model one level down."""
    assert layer_view("model/layers/up/kernel", jnp.zeros((6, 8, 16))).stack == 1
    assert not layer_compressible("control/layers/up/bias", jnp.zeros((6, 16)))
    assert layer_compressible("model/head/kernel", jnp.zeros((8, 16)))


@functools.cache
def plain_update():
    return update_of(fedavg(MODEL, **PLAIN))[0]


def update_of(algorithm, ids=IDS):
    """What one round adds to the model, and its info."""
    state, data = init_state(algorithm, 5, KEY), strategies.small_data()
    server, _, info = jax.jit(algorithm.round)(
        state.server, take(state.clients, ids), take_clients(data, ids), ids, KEY
    )
    return jax.tree.map(np.subtract, server.params, state.server.params), info


PLAIN = dict(optimizer=optax.sgd(0.3), batch=4)


def test_what_a_method_is_without_its_idea_is_fedavg():
    expected = plain_update()
    same = {
        "mu 0": fedprox(MODEL, mu=0.0, **PLAIN),
        "everything kept": feddropout(MODEL, sub_model=keep_units(1.0), **PLAIN),
        "a sketch without collisions": fetchsgd(MODEL, columns=10**6, share=1.0, momentum=0.0, **PLAIN),
    }
    for name, algorithm in same.items():
        chex.assert_trees_all_close(update_of(algorithm)[0], expected, rtol=1e-4, atol=1e-6, custom_message=name)
    first_round = update_of(scaffold(MODEL, learning_rate=0.3, batch=4))[0]["model"]  # all variates are zero
    uniform, _ = update_of(fedavg(MODEL, weight_fn=uniform_weight, **PLAIN))
    chex.assert_trees_all_close(first_round, uniform, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_fedpaq_is_fedavg_up_to_its_grid_at_its_price(bits):
    expected = plain_update()
    update, info = update_of(fedpaq(MODEL, bits=bits, **PLAIN))
    sizes = [x.size for x in jax.tree.leaves(expected)]
    cost = sum(-(-size * bits // 8) + 4 for size in sizes)
    assert set(info.uplink_bytes.tolist()) == set(info.downlink_bytes.tolist()) == {cost}
    assert set(info.uplink_floats.tolist()) == {sum(sizes)}
    # a client's step is at most twice its largest number over 2^(bits-1) - 1, which is some few times the mean's
    for got, want in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        assert np.abs(got - want).max() <= 10 * np.abs(want).max() / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_federated_dropout_equals_numpy(share):
    algorithm, data = feddropout(MODEL, sub_model=keep_units(share), **PLAIN), strategies.small_data()
    for t, ids, before, _, server, _, info in rounds_of(algorithm):
        params = reference.to64(before.params)
        total, weight = scale(0.0, params), scale(0.0, params)
        for k, i in enumerate(ids):
            local_key, _ = jax.random.split(client_key(KEY, t, int(i)))
            kept = keep_units(share)(jax.random.fold_in(local_key, UNITS_STREAM), before.params)
            kept = jax.tree.map(lambda x: np.asarray(x, np.float64), kept)
            units = kept["dense_0"]["bias"]
            assert units.sum() == np.ceil(share * 10)
            np.testing.assert_array_equal(kept["dense_0"]["kernel"], np.tile(units, (FEATURES, 1)))
            np.testing.assert_array_equal(kept["dense_1"]["kernel"], np.tile(units[:, None], TARGETS))
            assert kept["dense_1"]["bias"].all()
            start = jax.tree.map(np.multiply, params, kept)
            end, _ = reference.plain_training(start, data, int(i), KEY, t, batch=4, rate=0.3)
            # what is left out stays zero by itself: nothing reaches a unit that is not there
            chex.assert_trees_all_close(end, jax.tree.map(np.multiply, end, kept))
            total = add(total, scale(COUNTS[i], add(end, scale(-1, start))))
            weight = add(weight, scale(COUNTS[i], kept))
            numbers = sum(int(x.sum()) for x in jax.tree.leaves(kept))
            assert info.uplink_floats[k] == info.downlink_floats[k] == numbers
            assert info.uplink_bytes[k] == info.downlink_bytes[k] == 4 * numbers
        step = jax.tree.map(lambda a, b: a / np.maximum(b, 1), total, weight)
        chex.assert_trees_all_close(server.params, f32(add(params, step)), **close)


def test_fedpaqs_server_may_send_floats():
    _, info = update_of(fedpaq(MODEL, bits=4, downlink_bits=32, **PLAIN))
    assert set(info.downlink_bytes.tolist()) == {4 * SIZE}
    assert (info.uplink_bytes < SIZE).all()


def test_sub_models_differ_between_clients():
    keys = jax.random.split(KEY, 50)
    units = jax.vmap(lambda key: keep_units(0.4)(key, MODEL.init(KEY))["dense_0"]["bias"])(keys)
    assert (units.sum(1) == 4).all()
    assert len({tuple(row) for row in units.tolist()}) > 30


def test_sub_models_of_a_transformer_lack_inner_units_of_each_layer():
    params = {
        "layers": {
            "up": {"kernel": jnp.ones((3, 4, 8)), "bias": jnp.ones((3, 8))},
            "down": {"kernel": jnp.ones((3, 8, 4)), "bias": jnp.ones((3, 4))},
        }
    }
    kept = keep_units(0.5)(KEY, params)["layers"]
    assert (kept["up"]["bias"].sum(1) == 4).all()
    assert len({tuple(row) for row in kept["up"]["bias"].tolist()}) > 1
    np.testing.assert_array_equal(kept["up"]["kernel"][:, 0], kept["up"]["bias"])
    np.testing.assert_array_equal(kept["down"]["kernel"][:, :, 0], kept["up"]["bias"])
    assert kept["down"]["bias"].all()


@settings(max_examples=20)
@given(
    strategies.outputs((), (4,)),
    strategies.outputs((), (4,)),
    strategies.labels((4,), strategies.CLASSES),
    st.floats(0, 1),
)
def test_fml_is_two_mixtures_of_labels_and_each_other(teacher, student, labels, alpha):
    mask = np.ones(4, bool)
    terms = mutual_learning(teacher, student, labels, mask, alpha=alpha, beta=1 - alpha)
    private, shared = (cross_entropy(x.logits, labels, mask) for x in (teacher, student))
    towards_s = kl_divergence(student.logits, teacher.logits, mask)
    towards_t = kl_divergence(teacher.logits, student.logits, mask)
    np.testing.assert_allclose(terms.teacher_total, alpha * private + (1 - alpha) * towards_s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(terms.student_total, (1 - alpha) * shared + alpha * towards_t, rtol=1e-4, atol=1e-5)
    assert terms.hidden == 0


def test_fml_without_each_other_is_fedavg_beside_local_training():
    sgd = optax.sgd(0.3)
    algorithm = fml(
        mlp((FEATURES, 8, TARGETS)), MODEL, alpha=1.0, beta=1.0, teacher_optimizer=sgd, student_optimizer=sgd, batch=4
    )
    data = strategies.small_data()
    for t, ids, before, own, server, after, info in rounds_of(algorithm):
        ends = [
            reference.plain_training(reference.to64(before.params), data, int(i), KEY, t, batch=4, rate=0.3)[0]
            for i in ids
        ]
        mean = reference.weighted_average(ends, [COUNTS[i] for i in ids])
        chex.assert_trees_all_close(server.params, f32(mean), **close)
        for k, i in enumerate(ids):
            start = reference.to64(one(own.teacher, k))
            end, _ = reference.plain_training(start, data, int(i), KEY, t, batch=4, rate=0.3)
            chex.assert_trees_all_close(one(after.teacher, k), f32(end), **close)
        assert set(info.uplink_bytes.tolist()) == {4 * SIZE}


def test_arguments_out_of_range_are_told():
    sgd = optax.sgd(0.1)
    cases = [
        (r"mu is -1; allowed: a number in \[0, inf\)", lambda: fedprox(MODEL, mu=-1, optimizer=sgd, batch=4)),
        (r"reset_optimizer is False", lambda: fedprox(MODEL, mu=1, optimizer=sgd, batch=4, reset_optimizer=False)),
        (r"learning_rate is 0; allowed", lambda: scaffold(MODEL, learning_rate=0, batch=4)),
        (r"participation is 2; allowed", lambda: scaffold(MODEL, learning_rate=0.1, participation=2, batch=4)),
        (r"bits is 1; allowed: 2 to 16", lambda: fedpaq(MODEL, bits=1, optimizer=sgd, batch=4)),
        (r"columns is 0; allowed", lambda: fetchsgd(MODEL, columns=0, share=0.1, optimizer=sgd, batch=4)),
        (r"share is 0; allowed", lambda: fetchsgd(MODEL, columns=9, share=0, optimizer=sgd, batch=4)),
        (r"momentum is 1; allowed", lambda: fetchsgd(MODEL, columns=9, share=0.1, momentum=1, optimizer=sgd, batch=4)),
        (r"share is 1.5; allowed", lambda: keep_units(1.5)),
        (
            r"alpha is 2; allowed",
            lambda: fml(MODEL, MODEL, alpha=2, teacher_optimizer=sgd, student_optimizer=sgd, batch=4),
        ),
        (r"params has w; allowed: dense_0", lambda: keep_units(0.5)(KEY, {"w": jnp.zeros((2, 2))})),
        (r"params has dense_0; allowed", lambda: feddropout(mlp((4, 2)), sub_model=keep_units(0.5), **PLAIN)),
    ]
    for match, make in cases:
        with pytest.raises(ValueError, match=match):
            make()
