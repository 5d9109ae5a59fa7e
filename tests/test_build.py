"""Laws of what a config is built into: the steps over which learning rates fall, and the schedules."""

import dataclasses
import functools

import chex
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

import fedkd_jax.build
from fedkd_jax import init_state, privacy_spent
from fedkd_jax.build import (
    build_algorithm,
    build_data,
    build_epsilon,
    build_hostile,
    build_models,
    build_optimizer,
    build_schedule,
    build_trust,
    local_steps_of,
    poison,
)
from fedkd_jax.config import DataConfig, Experiment, MethodConfig, ModelConfig, OptimizerConfig, validate
from fedkd_jax.data import federate

ONE = MethodConfig()


@functools.cache
def two_clients():
    """With 30 and 6 examples."""
    whole = build_data(Experiment(data=DataConfig(clients=2, partition="iid")))
    parts = [np.arange(30), np.arange(30, 36)]
    return dataclasses.replace(whole, train=federate(whole.train.inputs, whole.train.labels, parts))


@pytest.fixture
def steps_seen(monkeypatch):
    seen, real = [], build_optimizer
    monkeypatch.setattr(fedkd_jax.build, "build_optimizer", lambda own, steps: seen.append(steps) or real(own, steps))
    return seen


@pytest.mark.parametrize(
    ("method", "steps"),
    [  # batch 4, 2 epochs, 5 rounds: the larger client makes 16 steps a round
        (ONE, [80, 16]),
        (dataclasses.replace(ONE, reset_optimizer=False), [80, 80]),
        (dataclasses.replace(ONE, algorithm="fedavg"), [16]),
        (dataclasses.replace(ONE, algorithm="fedavg", reset_optimizer=False), [80]),
        (dataclasses.replace(ONE, algorithm="local_only"), [80]),
        (dataclasses.replace(ONE, algorithm="centralised"), [90]),
    ],
)
def test_a_learning_rate_falls_over_the_life_of_its_optimiser(steps_seen, method, steps):
    build_algorithm(Experiment(rounds=5, batch=4, epochs=2), method, two_clients())
    assert steps_seen == steps


def test_the_server_of_gradients_steps_once_a_round(steps_seen):
    build_algorithm(Experiment(rounds=5, steps=1), dataclasses.replace(ONE, message="gradient"), two_clients())
    assert steps_seen == [5, 5]


@given(st.integers(1, 40), st.integers(1, 2))
def test_cohorts_come_to_the_end_of_a_run_at_most_by_chance(rounds, cohort):
    in_round, in_run = local_steps_of(Experiment(rounds=rounds, batch=4, cohort=cohort), ONE, two_clients())
    assert in_round == 8
    assert in_round <= in_run <= in_round * rounds
    turns = np.random.default_rng(0).binomial(rounds, cohort / 2, 1000)
    assert (turns * in_round <= in_run).mean() > 0.99


@given(st.integers(2, 60), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 0.9))
def test_a_schedule_rises_then_falls_and_is_never_zero_before_its_end(steps, schedule, warmup):
    rate = build_schedule(OptimizerConfig(learning_rate=0.5, schedule=schedule, warmup=warmup), steps)
    at = rate if callable(rate) else lambda step: rate
    rise, rates = round(warmup * steps), np.array([float(at(step)) for step in range(steps)])
    assert (rates > 0).all()
    np.testing.assert_allclose(rates[:rise], 0.5 * np.arange(1, rise + 1) / max(rise, 1), rtol=1e-5)
    share = np.arange(steps - rise) / max(steps - rise, 1)
    fall = {"constant": np.ones_like(share), "linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2}[schedule]
    np.testing.assert_allclose(rates[rise:], 0.5 * fall, atol=1e-6)


ADAM, SGD = OptimizerConfig(), OptimizerConfig(name="sgd", learning_rate=0.1)
METHODS = {  # what travels each way, in bytes of FedAvg's, for an mlp 64-64-10
    "fedprox": (MethodConfig(algorithm="fedprox", model="student", server_optimizer=ADAM), 1.0, 1.0),
    "scaffold": (MethodConfig(algorithm="scaffold", model="student", optimizer=SGD), 2.0, 2.0),
    "fedpaq up": (MethodConfig(algorithm="fedpaq", model="student", bits=4, directions="uplink"), 0.125, 1.0),
    "fetchsgd": (MethodConfig(algorithm="fetchsgd", model="student", sketch=0.5, share=0.1), 0.5, 0.2),
    "top k, 8 bits": (MethodConfig(algorithm="fedavg", model="student", codec="top_k", share=0.2, bits=8), 0.25, 0.25),
    "power": (
        MethodConfig(algorithm="fedavg", model="student", codec="power", rank=3, directions="downlink"),
        1.0,
        (3 * (64 + 64) + 3 * (64 + 10) + 74) / 4810,
    ),
    "feddropout": (MethodConfig(algorithm="feddropout", model="student", share=0.75), 3610 / 4810, 3610 / 4810),
    "fml": (MethodConfig(algorithm="fml"), 1.0, 1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_a_config_sends_what_its_keys_say(name):
    method, up, down = METHODS[name]
    config = Experiment(methods={"it": method}, student_optimizer=SGD, data=DataConfig(clients=3))
    validate(config)
    clients = build_data(config)
    algorithm = build_algorithm(config, method, clients)
    state = init_state(algorithm, 3, jax.random.key(0))
    ids = np.arange(3)
    server, _, info = jax.jit(algorithm.round)(state.server, state.clients, clients.train, ids, jax.random.key(1))
    full = 4 * (64 * 64 + 64 + 64 * 10 + 10)
    np.testing.assert_allclose(info.uplink_bytes, up * full, rtol=0.01)
    np.testing.assert_allclose(info.downlink_bytes, down * full, rtol=0.01)
    assert info.finite.all()
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (server.params, state.server.params)), strict=True))


# ---- hostile clients and privacy ---------------------------------------------------------------------------------------

HOSTILE = Experiment(hostile=0.4, data=DataConfig(clients=5, partition="iid", examples=200))


def fedavg_with(**keys):
    return MethodConfig(algorithm="fedavg", model="student", **keys)


def test_methods_are_evaluated_on_the_honest_clients():
    bad = np.asarray(jax.vmap(build_hostile(HOSTILE, 5))(np.arange(5)))
    everybody, honest = (build_data(dataclasses.replace(HOSTILE, hostile=share)) for share in (0.0, 0.4))
    assert bad.sum() == 2
    assert everybody.eval_ids is None
    assert honest.eval_ids.tolist() == np.flatnonzero(~bad).tolist()
    assert honest.test.count.tolist() == everybody.test.count[~bad].tolist()
    some = dataclasses.replace(HOSTILE, data=dataclasses.replace(HOSTILE.data, eval_clients=3))
    assert not bad[build_data(some).eval_ids].any()


@pytest.mark.parametrize(
    ("keys", "factor"), [({"attack": "sign_flip", "attack_scale": 3.0}, -3.0), ({"attack": "scale"}, 10.0), ({}, None)]
)
def test_hostile_clients_of_a_config_send_what_its_keys_say(keys, factor):
    send = build_trust(HOSTILE, fedavg_with(**keys), 5)["send_fn"]
    if factor is None:
        assert send is None
        return
    for i in range(5):
        expected = factor if build_hostile(HOSTILE, 5)(i) else 1.0
        assert float(send(np.float32(1.0), i, jax.random.key(0))) == expected


def test_labels_are_flipped_for_the_method_that_says_so():
    clients = build_data(HOSTILE)
    assert poison(HOSTILE, fedavg_with(attack="sign_flip"), clients) is clients
    flipped = poison(HOSTILE, fedavg_with(attack="label_flip"), clients)
    changed = 9 - clients.train.labels == flipped.train.labels
    bad, counts = np.asarray(jax.vmap(build_hostile(HOSTILE, 5))(np.arange(5))), clients.train.count
    assert changed.sum() == counts[bad].sum()  # 9 - y is never y


@pytest.mark.parametrize(
    ("keys", "functions"),
    [
        ({}, ""),
        ({"aggregation": "median"}, "combine"),
        ({"aggregation": "trimmed_mean", "trim": 0.1, "clip": 2.0}, "bound combine"),
        ({"clip": 2.0}, "bound"),
        ({"clip": 2.0, "noise": 1.0, "weighting": "uniform"}, "bound noise"),
        ({"clip": 2.0, "noise": 1.0, "weighting": "uniform", "noise_at": "client"}, "noise"),
    ],
)
def test_aggregators_of_a_config_have_the_functions_that_its_keys_ask_for(keys, functions):
    method = fedavg_with(**keys)
    config = dataclasses.replace(HOSTILE, methods={"it": method}, student_optimizer=SGD)
    validate(config)
    trust = build_trust(config, method, 5)
    given = () if trust["aggregator"] is None else trust["aggregator"]
    assert " ".join(n for n, f in zip(("bound", "combine", "noise"), given, strict=False) if f) == functions
    assert (trust["send_fn"] is None) == ("noise_at" not in keys)
    clients = build_data(config)
    algorithm = build_algorithm(config, method, clients)
    state, ids = init_state(algorithm, 5, jax.random.key(0)), np.arange(5)
    server, _, info = jax.jit(algorithm.round)(state.server, state.clients, clients.train, ids, jax.random.key(1))
    assert info.finite.all()
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (server.params, state.server.params)), strict=True))


def test_epsilon_counts_samples_only_of_clients_who_keep_nothing():
    method = fedavg_with(clip=2.0, noise=4.0, weighting="uniform", delta=1e-4)
    clients = two_clients()
    for keys, sampled in (({}, True), ({"reset_optimizer": False}, False)):
        own = dataclasses.replace(method, **keys)
        config = Experiment(cohort=1, methods={"it": own}, rounds=9)
        spent = build_epsilon(config, own, build_algorithm(config, own, clients), 2)
        expected = privacy_spent(4.0, 1, 2, 9, 1e-4) if sampled else privacy_spent(4.0, 1, 1, 6, 1e-4)
        assert spent(9, 6) == expected
    assert build_epsilon(config, fedavg_with(), build_algorithm(config, own, clients), 2) is None


def test_what_saves_memory_is_a_key_and_a_round_stays_finite():
    model = ModelConfig(hidden=(16,), dtype="bfloat16", remat=True)
    cnn = ModelConfig(kind="cnn", channels=(4,), hidden=(16,), kernel=3, dtype="bfloat16", remat=True)
    method = MethodConfig(codec="svd", teacher_dtype="bfloat16", moments_dtype="bfloat16")
    data = DataConfig(clients=3, examples=200)
    config = Experiment(teacher=cnn, student=model, steps=2, methods={"it": method}, data=data)
    validate(config)
    clients = build_data(config)
    program = str(jax.make_jaxpr(build_models(config, clients)["teacher"].apply)(*abstract(config, clients)))
    assert "remat" in program or "checkpoint" in program
    assert "bf16" in program
    algorithm = build_algorithm(config, method, clients)
    state, ids = init_state(algorithm, 3, jax.random.key(0)), np.arange(3)
    assert {str(x.dtype) for x in jax.tree.leaves(state.clients.teacher)} == {"bfloat16"}
    server, own, info = jax.jit(algorithm.round)(state.server, state.clients, clients.train, ids, jax.random.key(1))
    assert info.finite.all()
    assert {x.dtype for x in jax.tree.leaves(server.params)} == {np.dtype("float32")}
    chex.assert_trees_all_equal_shapes_and_dtypes(own, state.clients)


def abstract(config, clients):
    model = build_models(config, clients)["teacher"]
    return jax.eval_shape(model.init, jax.random.key(0)), clients.train.inputs[:2]
