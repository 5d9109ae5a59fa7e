"""One round of FedKD against the naive NumPy loop, and the laws of a round."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import strategies
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedkd_jax import (
    ClientState,
    FederatedData,
    Layout,
    Model,
    ServerState,
    client_key,
    cross_entropy,
    energy_threshold,
    federated_round,
    fedkd,
    freeze,
    init_state,
    mlp,
    mutual_distillation,
    put,
    svd_codec,
    take,
    task_terms,
    uniform_weight,
)
from fedkd_jax.data import take_clients
from fedkd_jax.models import merge_params, split_params
from fedkd_jax.rounds import kept_apart
from fedkd_jax.types import LocalResult

KEY = jax.random.key(11)
COUNTS = (7, 3, 12, 1, 5)
RATES = (0.2, 0.3, 0.25)  # teacher, projection, student


# ---- the oracle --------------------------------------------------------------------------------------------------------

ORACLE = {
    "updates, 3 of 5, epochs": dict(
        widths=((24, 30, 28, 4), (24, 20, 4)), cohort=3, thresholds=((0.6, 0.9), (0.5, 0.85)), batch=4, epochs=2
    ),
    "gradients, 5 of 5, one step": dict(
        widths=((24, 30, 28, 26, 4), (24, 20, 18, 4)),
        cohort=5,
        thresholds=((0.7, 0.8), (0.7, 0.8)),
        batch=6,
        steps=1,
        message="gradient",
        uniform=True,
    ),
    "steps, frozen weight, dense downlink": dict(
        widths=((24, 16, 4), (24, 20, 4)),
        cohort=3,
        thresholds=((0.8, 0.6), None),
        batch=3,
        steps=3,
        flags=dict(stop=True),
    ),
}


@functools.cache
def compiled(name):
    """The algorithm, its jitted round, and jitted initialisation."""
    c = ORACLE[name]
    teacher, student = map(mlp, c["widths"])
    up, down = (None if t is None else svd_codec(energy_threshold(*t, rounds=2)) for t in c["thresholds"])
    flags = dict(c.get("flags", {}))
    if "stop" in flags:
        flags["stop_weight_gradient"] = flags.pop("stop")
    algorithm = fedkd(
        teacher,
        student,
        example=jnp.ones((1, 24)),
        teacher_optimizer=optax.sgd(RATES[0]),
        projection_optimizer=optax.sgd(RATES[1]),
        student_optimizer=optax.sgd(RATES[2]),
        batch=c["batch"],
        epochs=c.get("epochs", 1),
        steps=c.get("steps"),
        uplink=up,
        downlink=down,
        loss_fn=functools.partial(mutual_distillation, **flags),
        message=c.get("message", "update"),
        **(dict(weight_fn=uniform_weight) if c.get("uniform") else {}),
    )
    return algorithm, jax.jit(algorithm.round)


@pytest.mark.parametrize("name", ORACLE)
def test_two_rounds_equal_the_naive_numpy_loop(name):
    c, (algorithm, run) = ORACLE[name], compiled(name)
    sent = set()

    @settings(max_examples=5)
    @given(seed=strategies.seeds, orders=st.tuples(st.permutations(range(5)), st.permutations(range(5))))
    def law(seed, orders):
        data, key = strategies.ragged_data(COUNTS, 24, 4, seed), jax.random.key(seed)
        state = init_state(algorithm, 5, jax.random.fold_in(key, 9))
        server, clients = state.server, state.clients
        student = reference.to64(server.params)
        teachers = [reference.to64(strategies.one(clients.teacher, i)) for i in range(5)]
        projections = [reference.to64(strategies.one(clients.projection, i)) for i in range(5)]
        for t in range(2):
            ids = np.array(orders[t][: c["cohort"]], np.int32)
            server, own, info = run(server, take(clients, ids), take_clients(data, ids), ids, key)
            clients = put(clients, ids, own)
            student, reports, down = reference.fedkd_round(
                student,
                teachers,
                projections,
                data,
                ids,
                key,
                t,
                batch=c["batch"],
                epochs=c.get("epochs", 1),
                steps=c.get("steps"),
                rates=RATES,
                uplink=np.float32(c["thresholds"][0][t]),
                downlink=None if c["thresholds"][1] is None else np.float32(c["thresholds"][1][t]),
                message=c.get("message", "update"),
                weigh=(lambda count: 1.0) if c.get("uniform") else (lambda count: count),
                **c.get("flags", {}),
            )
            assume(min(r["margin"] for r in (*reports, down)) > 1e-4)  # ranks that float32 can decide
            close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
            jax.tree.map(close, server.params, student)
            jax.tree.map(close, [strategies.one(clients.teacher, i) for i in range(5)], teachers)
            jax.tree.map(close, [strategies.one(clients.projection, i) for i in range(5)], projections)
            assert info.ids.tolist() == ids.tolist()
            assert info.finite.all()
            assert info.weight.tolist() == [1.0 if c.get("uniform") else COUNTS[i] for i in ids]
            assert int(server.round) == t + 1
            for k, report in enumerate(reports):
                for term, value in report["terms"].items():
                    close(getattr(info.terms, term)[k], value)
                assert int(info.uplink_floats[k]) == report["floats"]
                assert int(info.uplink_bytes[k]) == report["bytes"]
                for path, rank in report["ranks"].items():
                    full = min(24 if "0" in path else 20, student[path.split("/")[0]]["kernel"].shape[-1])
                    assert int(info.ranks[path][k]) == (full if rank is None else rank)
                    sent.add("raw" if rank is None else "factors")
            assert set(info.downlink_floats.tolist()) == {down["floats"]}
            assert set(info.downlink_bytes.tolist()) == {down["bytes"]}

    law()
    if name == "updates, 3 of 5, epochs":
        assert sent == {"raw", "factors"}  # or the message would not have been tested
    assert "factors" in sent


# ---- laws, on a small FedKD --------------------------------------------------------------------------------------------


@functools.cache
def small():
    algorithm = strategies.small_fedkd()
    return algorithm, jax.jit(algorithm.round)


def start(algorithm, clients=5, seed=0):
    state = init_state(algorithm, clients, jax.random.key(seed))
    return state.server, state.clients


@settings(max_examples=8)
@given(st.permutations(range(5)), strategies.seeds)
def test_permuting_the_cohort_permutes_the_info_and_leaves_the_server(order, seed):
    algorithm, run = small()
    data, (server, clients) = strategies.small_data(seed), start(algorithm)
    one, other = jnp.arange(4), jnp.array([i for i in order if i < 4])
    a = run(server, take(clients, one), take_clients(data, one), one, KEY)
    b = run(server, take(clients, other), take_clients(data, other), other, KEY)
    chex.assert_trees_all_close(a[0], b[0], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(take((a[1], a[2]), other), (b[1], b[2]))


@settings(max_examples=8)
@given(broken=st.integers(0, 3), poison=st.sampled_from([np.nan, np.inf]), seed=strategies.seeds)
def test_a_client_that_is_not_finite_has_no_weight_and_keeps_its_state(broken, poison, seed):
    algorithm, run = small()
    (server, clients), ids = start(algorithm), jnp.arange(4)
    whole = strategies.small_data(seed)
    hurt = dataclasses.replace(whole, inputs=whole.inputs.copy())
    hurt.inputs[whole.start[broken]] = poison
    clients = take(clients, ids)
    after, own, info = run(server, clients, take_clients(hurt, ids), ids, KEY)
    assert info.finite.tolist() == [i != broken for i in range(4)]
    assert info.weight.tolist() == [0.0 if i == broken else strategies.COUNTS[i] for i in range(4)]
    chex.assert_tree_all_finite((after.params, own))
    chex.assert_trees_all_equal(strategies.one(own, broken), strategies.one(clients, broken))
    # the others are as they would be, and the server as if its examples were none
    clean_server, clean, _ = run(server, clients, take_clients(whole, ids), ids, KEY)
    rest = jnp.array([i for i in range(4) if i != broken])
    chex.assert_trees_all_equal(take(own, rest), take(clean, rest))
    without = dataclasses.replace(take_clients(whole, ids), count=np.where(np.arange(4) == broken, 0, whole.count[:4]))
    expected, _, _ = run(server, clients, without, ids, KEY)
    chex.assert_trees_all_close(after, expected, rtol=1e-5, atol=1e-6)
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (after.params, clean_server.params)), strict=True))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (30, 20), (270, 264)])
def test_a_client_at_the_end_of_float32_harms_nobody(shape):
    """Its entries are finite, a factor of its update would not be."""
    messages = np.stack([np.full(shape, 2.0), np.full(shape, 3e37), np.full(shape, 4.0)]).astype(np.float32)
    local = lambda server, client, data, key: LocalResult(  # noqa: E731
        client=client, message={"w": jnp.asarray(data.inputs)[data.start]}, terms=task_terms()
    )
    first, one = np.arange(3, dtype=np.int32), np.ones(3, np.int32)
    data = FederatedData(inputs=messages, labels=0 * one, start=first, count=one, max_count=1)
    server = ServerState(
        params={"w": jnp.zeros(shape)}, opt_state=optax.sgd(1.0).init(0.0), frozen={}, round=jnp.int32(0)
    )
    for chosen, expected in (([0, 2], 3.0), ([0, 1, 2], 1e37)):
        ids = jnp.array(chosen)
        run = jax.jit(federated_round(local, uplink=svd_codec(0.9)))
        clients = ClientState(teacher=jnp.zeros(len(chosen)))
        after, _, info = run(server, clients, take_clients(data, ids), ids, KEY)
        assert info.finite.all()
        np.testing.assert_allclose(after.params["w"], np.full(shape, expected), rtol=1e-4)


def test_if_nobody_is_finite_the_shared_model_stays():
    algorithm, run = small()
    (server, clients), ids, data = start(algorithm), jnp.arange(4), strategies.small_data()
    data = dataclasses.replace(data, inputs=np.full_like(data.inputs, np.nan))
    after, own, info = run(server, take(clients, ids), take_clients(data, ids), ids, KEY)
    chex.assert_trees_all_equal((after.params, own), (server.params, take(clients, ids)))
    assert not info.finite.any()
    assert int(after.round) == 1


def test_a_client_without_examples_changes_nothing():
    algorithm, run = small()
    (server, clients), ids = start(algorithm), jnp.arange(4)
    data = take_clients(strategies.small_data(counts=(7, 0, 6, 1)), ids)
    after, own, info = run(server, take(clients, ids), data, ids, KEY)
    chex.assert_trees_all_equal(strategies.one(own, 1), strategies.one(clients, 1))
    assert (bool(info.finite[1]), float(info.weight[1])) == (True, 0.0)
    assert not any(float(x[1]) for x in jax.tree.leaves(info.terms))
    chex.assert_tree_all_finite(after.params)


def test_one_client_without_distillation_or_compression_is_plain_optax_training():
    widths = ((24, 16, 4), (24, 20, 4))
    models, data = [mlp(w) for w in widths], strategies.ragged_data((10,), 24, 4, seed=2)
    optimizers = [optax.adam(0.03), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.2, momentum=0.9))]
    loss_fn = functools.partial(mutual_distillation, adaptive=False, distill=False, hidden=False)
    algorithm = fedkd(
        *models,
        project=False,
        teacher_optimizer=optimizers[0],
        student_optimizer=optimizers[1],
        reset_student_optimizer=False,
        batch=4,
        epochs=2,
        loss_fn=loss_fn,
    )
    server, clients = start(algorithm, 1)
    plain = [strategies.one(clients.teacher, 0), server.params]
    states = [o.init(p) for o, p in zip(optimizers, plain, strict=True)]
    run = jax.jit(algorithm.round)
    gradients = [
        jax.jit(jax.grad(lambda p, x, y, m=m: cross_entropy(m.apply(p, x).logits, y, jnp.ones(len(y), bool))))
        for m in models
    ]
    ids = jnp.array([0])
    for t in range(2):
        for rows in reference.batches(KEY, t, 0, 0, 10, 10, batch=4, epochs=2):
            for i in range(2):
                g = gradients[i](plain[i], data.inputs[rows], data.labels[rows])
                step, states[i] = optimizers[i].update(g, states[i], plain[i])
                plain[i] = optax.apply_updates(plain[i], step)
        server, clients, info = run(server, clients, data, ids, KEY)
        chex.assert_trees_all_close([strategies.one(clients.teacher, 0), server.params], plain, rtol=2e-4, atol=2e-5)
    assert info.uplink_bytes.tolist() == [4 * (24 * 20 + 20 + 20 * 4 + 4)]
    assert (clients.projection, info.ranks) == ((), {})


# ---- frozen parameters -------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_with_the_server_and_are_never_sent():
    """Freezing equals a model that closes over the frozen values, and whose parameters are the rest."""
    first = lambda path, leaf: path[0] == "dense_0"  # noqa: E731
    bases = [mlp((12, 8, 3)), mlp((12, 10, 3))]
    frozen = [freeze(m, first) for m in bases]
    options = dict(
        example=jnp.ones((1, 12)), teacher_optimizer=optax.adam(0.05), student_optimizer=optax.sgd(0.2), batch=4
    )
    algorithm, ids = fedkd(*frozen, **options), jnp.arange(5)
    server, clients = start(algorithm)
    assert [set(server.frozen[n]) for n in ("teacher", "student")] == [{"dense_0"}] * 2
    assert set(server.params) == set(clients.teacher) == {"dense_1"}

    def by_hand(base, kept):
        return Model(
            init=lambda key: split_params(freeze(base, first), base.init(key))[0],
            apply=lambda params, x, *, key=None: base.apply(merge_params(params, kept), x, key=key),
        )

    other = fedkd(
        *(by_hand(m, server.frozen[n]) for m, n in zip(bases, ("teacher", "student"), strict=True)), **options
    )
    data = strategies.small_data()
    after, own, info = jax.jit(algorithm.round)(server, clients, data, ids, KEY)
    expected, expected_own, expected_info = jax.jit(other.round)(
        dataclasses.replace(server, frozen={"teacher": {}, "student": {}}), clients, data, ids, KEY
    )
    chex.assert_trees_all_equal(after.frozen, server.frozen)
    chex.assert_trees_all_close(
        (after.params, own, info), (expected.params, expected_own, expected_info), rtol=1e-5, atol=1e-6
    )
    assert set(info.uplink_bytes.tolist()) == set(info.downlink_bytes.tolist()) == {4 * (10 * 3 + 3)}
    one = strategies.one(own, 0)
    for name, base in zip(("teacher", "student"), bases, strict=True):
        params = merge_params(one.teacher if name == "teacher" else after.params, server.frozen[name])
        out = algorithm.predict[name](after, one, data.inputs[:3])
        chex.assert_trees_all_close(out, base.apply(params, data.inputs[:3]), rtol=1e-5, atol=1e-6)


# ---- federated_round by itself -----------------------------------------------------------------------------------------


def mean_round(message="update", **options):
    """Clients send their first input row."""
    local = lambda server, client, data, key: LocalResult(  # noqa: E731
        client=client, message=jnp.asarray(data.inputs)[data.start], terms=task_terms()
    )
    return federated_round(local, message=message, **options)


class Aggregation(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_server_optimiser_is_fed_the_gradient_or_minus_the_update(self):
        cases = [("update", None, 1.0), ("update", optax.sgd(0.5), 0.5), ("gradient", optax.sgd(0.5), -0.5)]
        server = ServerState(params=jnp.zeros(2), opt_state=optax.sgd(0.5).init(0.0), frozen={}, round=jnp.int32(4))
        runs = [
            (rate, uniform, self.variant(mean_round(message, server_optimizer=optimizer, **options)))
            for message, optimizer, rate in cases
            for uniform, options in ((False, {}), (True, dict(weight_fn=uniform_weight)))
        ]

        @settings(max_examples=5)
        @given(rows=strategies.floats((3, 2)), counts=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any))
        def law(rows, counts):
            data = strategies.FederatedData(
                inputs=rows, labels=np.zeros(3, np.int32), start=jnp.arange(3), count=jnp.array(counts), max_count=9
            )
            for rate, uniform, run in runs:
                mean = np.average(rows, axis=0, weights=np.array(counts) > 0 if uniform else counts)
                after, _, _ = run(server, ClientState(), data, jnp.arange(3), KEY)
                np.testing.assert_allclose(after.params, rate * mean, rtol=1e-4, atol=1e-5)
                assert int(after.round) == 5

        law()


def test_every_client_gets_its_documented_key_in_every_round():
    local = lambda server, client, data, key: LocalResult(  # noqa: E731
        client=ClientState(teacher=jax.random.uniform(key)), message=jnp.zeros(()), terms=task_terms()
    )
    run = jax.jit(federated_round(local))
    data = strategies.small_data()
    for round in (0, 3):
        server = ServerState(
            params=jnp.zeros(()), opt_state=optax.sgd(1.0).init(0.0), frozen={}, round=jnp.int32(round)
        )
        _, clients, _ = run(server, ClientState(teacher=jnp.zeros(5)), data, jnp.arange(5) * 7, KEY)
        keys = [jax.random.split(client_key(KEY, round, i * 7))[0] for i in range(5)]
        assert clients.teacher.tolist() == [float(jax.random.uniform(k)) for k in keys]


def test_what_is_kept_apart_has_the_same_bits_whatever_it_is():
    """Also what a codec of one's own may send: random keys, complex numbers, nothing."""
    bits = np.arange(64, dtype=np.uint32) * 67_108_879  # of every exponent; some are NaN
    kinds = ["float32", "int32", "uint32", "float16", "bfloat16", "int8", "uint8", "float8_e4m3fn"]
    tree = {
        kind: jax.lax.bitcast_convert_type(jnp.asarray(bits.view(f"u{jnp.dtype(kind).itemsize}")), kind)
        for kind in kinds
    }
    tree |= {"bool": bits % 3 == 0, "complex": jnp.asarray(bits).astype(complex), "empty": jnp.zeros((0, 2))}
    kept = jax.jit(kept_apart)(tree | {"key": jax.random.split(KEY)}, 5)
    assert jnp.array_equal(jax.random.key_data(kept.pop("key")), jax.random.key_data(jax.random.split(KEY)))
    for name, x in tree.items():
        assert np.asarray(kept[name]).tobytes() == np.asarray(x).tobytes(), name


def test_an_unknown_message_is_an_error():
    with pytest.raises(ValueError, match=r"message is 'weights'; allowed: 'update', 'gradient'"):
        mean_round("weights")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_whole_round_compiles_for_accelerators_without_one(platform):
    codec = svd_codec(energy_threshold(0.95, 0.98, 10), method="randomized", warm_start=True)
    algorithm = strategies.small_fedkd(Layout(chunk=3), uplink=codec, downlink=codec)
    ids, data = jnp.arange(3), take_clients(strategies.small_data(), jnp.arange(3))
    server, clients = algorithm.init_server(KEY), algorithm.init_clients(KEY, ids)
    exported = jax.export.export(jax.jit(algorithm.round), platforms=[platform])(server, clients, data, ids, KEY)
    assert exported.platforms == (platform,)
    expected = jax.eval_shape(algorithm.round, server, clients, data, ids, KEY)
    assert [x.shape for x in exported.out_avals] == [x.shape for x in jax.tree.leaves(expected)]
    assert "lapack" not in exported.mlir_module()
