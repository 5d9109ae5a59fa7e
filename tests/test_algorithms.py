"""One protocol for all algorithms, NumPy loops for the simple ones, and what is FedKD's own."""

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
from strategies import ALGORITHMS, COUNTS, FEATURES, TARGETS, one

from fedkd_jax import (
    Algorithm,
    Batch,
    ClientState,
    LossTerms,
    Outputs,
    RoundInfo,
    ServerState,
    centralised,
    client_key,
    fedavg,
    fedkd,
    init_state,
    local_only,
    mlp,
    mutual_distillation,
    put,
    take,
)
from fedkd_jax.algorithms.centralised import pool
from fedkd_jax.algorithms.fedkd import init_projection, mutual_step
from fedkd_jax.data import take_clients

KEY = jax.random.key(13)
IDS = np.array([3, 0, 4], np.int32)
every = pytest.mark.parametrize("name", ALGORITHMS)


@functools.cache
def setting(name):
    """`(algorithm, its jitted round, server, clients [5])`; a second trace of the round is an error."""
    algorithm, traces = ALGORITHMS[name](), []

    def round(*args):
        traces.append(name)  # chex.assert_max_traces would count the rounds of all algorithms as one function
        assert traces == [name]
        return algorithm.round(*args)

    state = init_state(algorithm, 5, KEY)
    return algorithm, jax.jit(round), state.server, state.clients


def play(name, ids=IDS, seed=0, rounds=1, key=KEY):
    _algorithm, run, server, clients = setting(name)
    data, info = strategies.small_data(seed), None
    for _ in range(rounds):
        server, own, info = run(server, take(clients, ids), take_clients(data, ids), ids, key)
        clients = put(clients, ids, own)
    return server, clients, info


# ---- the protocol ------------------------------------------------------------------------------------------------------


@every
def test_a_round_reports_each_client_of_the_cohort(name):
    algorithm, _, before, _ = setting(name)
    server, clients, info = play(name)
    assert isinstance(algorithm, Algorithm)
    assert (type(server), type(clients), type(info)) == (ServerState, ClientState, RoundInfo)
    assert isinstance(info.terms, LossTerms)
    assert info.ids.tolist() == IDS.tolist()
    chex.assert_shape(jax.tree.leaves(info), (3,))
    chex.assert_type(jax.tree.leaves((info.terms, info.weight)), jnp.float32)
    counts = (info.uplink_bytes, info.downlink_bytes, info.uplink_floats, info.downlink_floats, *info.ranks.values())
    chex.assert_type([info.ids, *counts], jnp.int32)
    assert info.finite.dtype == bool
    assert info.finite.all()
    assert info.weight.tolist() == [1 if name == "scaffold" else COUNTS[i] for i in IDS]
    assert all((x >= 0).all() for x in counts)
    assert (int(before.round), int(server.round)) == (0, 1)
    chex.assert_tree_all_finite((server, clients, info))


@every
def test_state_keeps_its_structure_and_rounds_are_not_traced_again(name):
    _, _, server, clients = setting(name)
    for rounds in (1, 2):
        after, own, _ = play(name, ids=np.roll(IDS, rounds), rounds=rounds)
        chex.assert_trees_all_equal_shapes_and_dtypes((after, own), (server, clients))
        assert int(after.round) == rounds


@every
def test_a_round_is_pure(name):
    _, _, server, clients = setting(name)
    before = jax.tree.map(np.array, (server, clients))
    chex.assert_trees_all_equal(play(name), play(name))
    chex.assert_trees_all_equal(before, (server, clients))


@every
def test_training_moves_what_it_should_and_depends_on_the_key(name):
    """On clients with more than a batch of examples, whose order the key decides."""
    _, _, server, clients = setting(name)
    one_key, other_key = play(name), play(name, key=jax.random.key(14))
    shared, private = server.params != (), clients.teacher != ()
    differs = lambda a, b: any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    assert shared or private
    for other in ((server, clients), other_key[:2]):
        if shared:
            assert differs(one_key[0].params, other[0].params)
        if private:
            moved = [differs(one(one_key[1].teacher, i), one(other[1].teacher, i)) for i in range(5)]
            assert moved[0]
            assert not moved[1]  # not of the cohort
            assert not moved[2]


@every
def test_losses_fall_over_rounds(name):
    """Four rounds on the same few examples: the total of whichever model is trained falls, in the mean over five data sets
    (of one, with steps this long and five clients, it need not)."""
    first, last = ([play(name, seed=seed, rounds=r)[2].terms for seed in range(5)] for r in (1, 4))
    for total in ("teacher_total", "student_total"):
        before, after = (np.mean([getattr(terms, total) for terms in runs]) for runs in (first, last))
        assert after < before or before == after == 0


@every
def test_every_model_predicts_for_one_client(name):
    algorithm, _, _, _ = setting(name)
    server, clients, _ = play(name)
    x = np.random.default_rng(0).normal(size=(4, FEATURES)).astype(np.float32)
    assert set(algorithm.predict) == ({"teacher", "student"} if name.startswith(("fedkd", "fml")) else {"model"})
    for predict in algorithm.predict.values():
        out = predict(server, one(clients, 0), x)
        assert isinstance(out, Outputs)
        chex.assert_shape(out.logits, (4, TARGETS))
        chex.assert_tree_all_finite(out)
    if "teacher" in algorithm.predict:  # teachers are private, the student is shared
        a, b = (algorithm.predict["teacher"](server, one(clients, i), x).logits for i in (0, 1))
        assert (a != b).any()
        a, b = (algorithm.predict["student"](server, one(clients, i), x).logits for i in (0, 1))
        assert (a == b).all()


@every
def test_a_client_starts_from_its_id_alone(name):
    algorithm, _, _, _ = setting(name)
    init = jax.jit(algorithm.init_clients)
    chex.assert_trees_all_equal(init(KEY, IDS), take(init(KEY, np.arange(6)), IDS))


def test_methods_start_from_the_same_models():
    """The same key gives local training and FedKD the same teachers, so that they differ by the method only."""
    teacher, student = mlp((FEATURES, 8, TARGETS)), mlp((FEATURES, 10, TARGETS))
    sgd, x = optax.sgd(0.1), jnp.ones((1, FEATURES))
    ours = fedkd(teacher, student, example=x, batch=4, teacher_optimizer=sgd, student_optimizer=sgd)
    alone = local_only(teacher, batch=4, optimizer=sgd)
    ids = np.arange(3)
    a, b = ours.init_clients(KEY, ids), alone.init_clients(KEY, ids)
    chex.assert_trees_all_equal(a.teacher, b.teacher)
    assert (np.asarray(a.teacher["dense_0"]["kernel"][0]) != np.asarray(a.teacher["dense_0"]["kernel"][1])).any()


class WithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_round_is_the_same_with_jit_and_without(self):
        algorithm, _, server, clients = setting("fedavg")
        data = take_clients(strategies.small_data(), IDS)
        after, _, info = self.variant(algorithm.round)(server, clients, data, IDS, KEY)
        expected, _, expected_info = play("fedavg")
        chex.assert_trees_all_close((after, info), (expected, expected_info), rtol=1e-4, atol=1e-5)


# ---- against NumPy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [dict(epochs=2), dict(steps=3)])
def test_fedavg_equals_numpy(work):
    algorithm = fedavg(
        mlp((FEATURES, 10, TARGETS)), optimizer=optax.sgd(0.3), batch=4, server_optimizer=optax.sgd(0.5), **work
    )
    state, run, data = init_state(algorithm, 5, KEY), jax.jit(algorithm.round), strategies.small_data()
    server, expected = state.server, reference.to64(state.server.params)
    for t in range(2):
        ids = np.roll(IDS, t)
        server, _clients, info = run(server, ClientState(), take_clients(data, ids), ids, KEY)
        trained = [reference.plain_training(expected, data, int(i), KEY, t, batch=4, rate=0.3, **work) for i in ids]
        mean = reference.weighted_average([p for p, _ in trained], [COUNTS[i] for i in ids])
        expected = jax.tree.map(lambda old, new: old + 0.5 * (new - old), expected, mean)
        chex.assert_trees_all_close(server.params, jax.tree.map(np.float32, expected), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(info.terms.student_task, [loss for _, loss in trained], rtol=1e-4)
        np.testing.assert_array_equal(info.terms.student_total, info.terms.student_task)
        assert not any(x.any() for x in (info.terms.teacher_total, info.terms.hidden, info.terms.student_distill))
        floats = FEATURES * 10 + 10 + 10 * TARGETS + TARGETS
        assert set(info.uplink_floats.tolist()) == set(info.downlink_floats.tolist()) == {floats}
        assert set(info.uplink_bytes.tolist()) == set(info.downlink_bytes.tolist()) == {4 * floats}


def test_local_training_equals_numpy_and_costs_nothing():
    algorithm = local_only(mlp((FEATURES, 8, TARGETS)), optimizer=optax.sgd(0.3), batch=4, epochs=2)
    state, run, data = init_state(algorithm, 5, KEY), jax.jit(algorithm.round), strategies.small_data()
    server, clients = state.server, state.clients
    expected = [reference.to64(one(clients.teacher, i)) for i in range(5)]
    for t in range(2):
        ids = np.roll(IDS, t)
        server, own, info = run(server, take(clients, ids), take_clients(data, ids), ids, KEY)
        clients = put(clients, ids, own)
        for k, i in enumerate(ids):
            expected[i], loss = reference.plain_training(expected[i], data, int(i), KEY, t, batch=4, epochs=2, rate=0.3)
            np.testing.assert_allclose(info.terms.teacher_total[k], loss, rtol=1e-4)
        for i in range(5):
            chex.assert_trees_all_close(
                one(clients.teacher, i), jax.tree.map(np.float32, expected[i]), rtol=1e-3, atol=1e-5
            )
        for cost in (info.uplink_bytes, info.downlink_bytes, info.uplink_floats, info.downlink_floats):
            assert cost.tolist() == [0, 0, 0]


def test_centralised_training_equals_numpy_on_the_pooled_examples():
    algorithm = centralised(mlp((FEATURES, 8, TARGETS)), optimizer=optax.sgd(0.3), batch=4, epochs=2)
    data, run = strategies.small_data(), jax.jit(algorithm.round)
    server = algorithm.init_server(KEY)
    expected, rows = reference.to64(server.params), np.concatenate([data.start[i] + np.arange(COUNTS[i]) for i in IDS])
    size = -(-min(data.max_count * 3, len(data.labels)) // 4) * 4
    for t in range(2):
        server, _, info = run(server, ClientState(), take_clients(data, IDS), IDS, KEY)
        losses, order_key = [], jax.random.split(client_key(KEY, t, 0))[0]
        for e in range(2):
            draws = np.array(jax.random.uniform(jax.random.fold_in(order_key, e), (size,)))[: len(rows)]
            order = rows[np.argsort(draws, kind="stable")]
            for i in range(0, len(order), 4):
                x, y = np.float64(data.inputs[order[i : i + 4]]), data.labels[order[i : i + 4]]
                z, hidden = reference.forward(expected, x)
                losses.append(reference.ce(z, y, np.ones(len(y), bool)))
                d_z = (reference.softmax(z) - np.eye(TARGETS)[y]) / len(y)
                expected = reference.sgd(
                    expected, reference.backward(expected, x, hidden, d_z, [0.0 * h for h in hidden]), 0.3
                )
        chex.assert_trees_all_close(server.params, jax.tree.map(np.float32, expected), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(info.terms.teacher_task, [np.mean(losses)] * 3, rtol=1e-4)
        assert info.uplink_bytes.tolist() == info.downlink_floats.tolist() == [0, 0, 0]


def test_a_centralised_round_that_is_not_finite_changes_nothing():
    _algorithm, run, server, clients = setting("centralised")
    data = strategies.small_data()
    data.inputs[data.start[0]] = np.inf
    after, _, info = run(server, take(clients, IDS), take_clients(data, IDS), IDS, KEY)
    chex.assert_trees_all_equal((after.params, after.opt_state), (server.params, server.opt_state))
    assert not info.finite.any()


@settings(max_examples=10)
@given(strategies.seeds)
def test_pooling_joins_the_cohorts_examples_in_order(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 8, 5)
    counts[0] += 1
    data, ids = strategies.small_data(seed, tuple(map(int, counts))), rng.permutation(5)[:3]
    pooled = pool(take_clients(data, jnp.asarray(ids)))
    rows = np.concatenate([data.start[i] + np.arange(counts[i]) for i in ids])
    assert (int(pooled.start), int(pooled.count)) == (0, len(rows))
    assert pooled.max_count >= len(rows)
    np.testing.assert_array_equal(pooled.inputs[: len(rows)], data.inputs[rows])
    np.testing.assert_array_equal(pooled.labels[: len(rows)], data.labels[rows])


# ---- FedKD's own -------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(strategies.seeds, strategies.masks(4))
def test_each_model_moves_by_its_own_total_only(seed, mask):
    """Neither total differentiates the other model; W_h moves by Hid."""
    rng = np.random.default_rng(seed)
    params = [initialise(width)(jax.random.key(seed)) for width in (8, 10)]
    projection = (jnp.asarray(rng.normal(size=(10, 8)).astype(np.float32)),)
    batch = Batch(
        inputs=rng.normal(size=(4, FEATURES)).astype(np.float32),
        labels=rng.integers(0, TARGETS, 4).astype(np.int32),
        mask=mask,
    )
    got, expected = step_and_gradients()((params[0], projection, params[1]), batch)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)
    assert mask.any() or not any(x.any() for x in jax.tree.leaves(got[0]))


@functools.cache
def initialise(width):
    return jax.jit(mlp((FEATURES, width, TARGETS)).init)


@functools.cache
def step_and_gradients():
    teacher, student = mlp((FEATURES, 8, TARGETS)), mlp((FEATURES, 10, TARGETS))

    def terms(t, w, s, batch):
        outs = teacher.apply(t, batch.inputs), student.apply(s, batch.inputs)
        return mutual_distillation(*outs, batch.labels, batch.mask, w)

    def run(params, batch):
        t, w, s = params
        got = mutual_step(
            lambda p: teacher.apply(p, batch.inputs),
            lambda p: student.apply(p, batch.inputs),
            mutual_distillation,
            params,
            batch,
        )
        grads = (
            jax.grad(lambda p: terms(p, w, s, batch).teacher_total)(t),
            jax.grad(lambda p: terms(t, p, s, batch).hidden)(w),
            jax.grad(lambda p: terms(t, w, p, batch).student_total)(s),
        )
        return got, (grads, terms(t, w, s, batch))

    return jax.jit(run)


def test_the_projection_is_glorot_uniform_and_follows_the_layer_map():
    weights = init_projection(mlp((4, 30, 31, 32, 33, 2)), mlp((4, 50, 60, 2)), jnp.ones((1, 4)), KEY)
    assert [w.shape for w in weights] == [(50, 31), (60, 33)]
    for w in weights:
        bound = np.sqrt(6 / sum(w.shape))
        assert 0.9 * bound < np.abs(w).max() <= bound
    assert init_projection(mlp((4, 2)), mlp((4, 2)), jnp.ones((1, 4)), KEY) == ()


def test_the_projection_of_equal_widths_is_the_identity():
    (weight,) = init_projection(mlp((4, 30, 31, 2)), mlp((4, 31, 2)), jnp.ones((1, 4)), KEY)
    np.testing.assert_array_equal(weight, np.eye(31))


def test_an_optimiser_that_is_kept_makes_a_difference_only_from_the_second_round_on():
    ids, data, after = np.arange(5), strategies.small_data(), {}
    for reset in (True, False):
        algorithm = fedavg(mlp((FEATURES, TARGETS)), optimizer=optax.adam(0.05), batch=4, reset_optimizer=reset)
        run, server, clients = jax.jit(algorithm.round), algorithm.init_server(KEY), algorithm.init_clients(KEY, ids)
        assert (clients.student_opt == ()) is reset
        after[reset] = []
        for _ in range(2):
            server, clients, _ = run(server, clients, data, ids, KEY)
            after[reset].append(server.params["dense_0"]["kernel"])
    np.testing.assert_allclose(after[True][0], after[False][0], rtol=1e-5, atol=1e-6)
    assert np.abs(after[True][1] - after[False][1]).max() > 1e-3


def test_errors_name_the_argument_its_value_and_what_is_allowed():
    teacher, student, sgd = mlp((4, 3, 2)), mlp((4, 5, 2)), optax.sgd(0.1)
    options = dict(example=jnp.ones((1, 4)), teacher_optimizer=sgd, student_optimizer=sgd, batch=2)
    for match, change in [
        (r"steps is None with message='gradient'; allowed: 1", dict(message="gradient")),
        (r"steps is 2 with message='gradient'; allowed: 1", dict(message="gradient", steps=2)),
        (r"message is 'weights'; allowed: 'update', 'gradient'", dict(message="weights")),
        (r"example is None; allowed: an input batch", dict(example=None)),
    ]:
        with pytest.raises(ValueError, match=match):
            fedkd(teacher, student, **{**options, **change})
    with pytest.raises(ValueError, match=r"student_layers is 2; allowed: at most teacher_layers, 1"):
        fedkd(teacher, mlp((4, 5, 5, 2)), **options)
    algorithm = fedkd(teacher, student, project=False, **{**options, "example": None})
    data, ids = strategies.ragged_data((2, 2), 4, 2, 0), np.arange(2)
    with pytest.raises(ValueError, match=r"hidden of student layer 0 has shape \(2, 5\).*allowed: equal shapes"):
        jax.eval_shape(algorithm.round, algorithm.init_server(KEY), algorithm.init_clients(KEY, ids), data, ids, KEY)
