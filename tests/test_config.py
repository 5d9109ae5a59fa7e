"""Laws of configs: strict, one-line errors before anything compiles, and a round trip through YAML."""

import dataclasses
import functools
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from hypothesis import given

import fedkd_jax.config
from fedkd_jax.config import (
    ConfigError,
    DataConfig,
    Experiment,
    MethodConfig,
    OptimizerConfig,
    build_algorithm,
    build_data,
    build_optimizer,
    build_schedule,
    from_dict,
    load_config,
    local_steps_of,
    to_yaml,
    validate,
)
from fedkd_jax.data import federate

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.yaml"))

IMPOSSIBLE = {
    "roundz: 3": ("roundz", "rounds"),
    "data: {alhpa: 0.1}": ("data.alhpa", "alpha"),
    "methods: {a: {tstart: 0.1}}": ("methods.a.tstart", "t_start"),
    "rounds: three": ("rounds", "int"),
    "rounds: 2.5": ("rounds", "int"),
    "rounds: true": ("rounds", "int"),
    "data: {name: 3}": ("data.name", "str"),
    "teacher: {hidden: 64}": ("teacher.hidden", "list"),
    "teacher: {hidden: [64, x]}": ("teacher.hidden[1]", "int"),
    "data: digits": ("data", "mapping"),
    "methods: {a: {algorithm: fedsgd}}": ("methods.a.algorithm", "fedavg"),
    "rounds: 0": ("rounds", "at least 1"),
    "batch: 0": ("batch", "at least 1"),
    "steps: 0": ("steps", "at least 1"),
    "eval_every: 0": ("eval_every", "at least 1"),
    "seeds: []": ("seeds", "one seed"),
    "seeds: [1, 1]": ("seeds", "different"),
    "cohort: 0": ("cohort", "1 to"),
    "{cohort: 11, data: {clients: 10}}": ("cohort", "10"),
    "data: {clients: 0}": ("data.clients", "at least 1"),
    "data: {alpha: 0}": ("data.alpha", "above 0"),
    "data: {alpha: .inf}": ("data.alpha", "above 0"),
    "data: {alpha: .nan}": ("data.alpha", "above 0"),
    "data: {partition: natural}": ("data.natural", "a feature"),
    "data: {natural: writer}": ("data.natural", "null where"),
    "data: {history: 5}": ("data.history", "only recommendation reads it"),
    "{data: {task: tagging, clients: 3}, checkpoint: x}": ("data.clients", "only classification and recommendation"),
    "data: {test_length: 9}": ("data.test_length", "only tagging"),
    "{data: {task: recommendation, partition: iid, natural: user}}": ("data.natural", "None for recommendation, iid"),
    "student_optimizer: {schedule: step}": ("student_optimizer.schedule", "'linear'"),
    "teacher_optimizer: {warmup: 1}": ("teacher_optimizer.warmup", "1 excluded"),
    "{data: {task: characters, name: tiny_shakespeare}, teacher: {kind: transformer, positions: 9}, "
    "student: {kind: transformer}}": ("teacher.positions", "at least data.length, 64"),
    "data: {task: characters, name: hamlet}": ("data.name", "'tiny_shakespeare'"),
    "{data: {task: characters, name: tiny_shakespeare}, checkpoint: minilm}": ("checkpoint", "null for characters"),
    "data: {task: tagging, name: bc5cdr+bc5cdr}": ("data.name", "different corpora"),
    "data: {test_fraction: 1.0}": ("data.test_fraction", "between 0 and 1"),
    "methods: {a: {t_start: 1.01}}": ("methods.a.t_start", "(0, 1]"),
    "methods: {a: {t_end: 0}}": ("methods.a.t_end", "(0, 1]"),
    "methods: {a: {message: gradient}}": ("methods.a.message", "steps: 1"),
    "methods: {}": ("methods", "one method"),
    "{teacher: {hidden: [8]}, student: {hidden: [8, 8]}}": ("student", "at most teacher's, 1"),
    "teacher: {hidden: [0]}": ("teacher", "at least 1"),
    "teacher: {channels: [8]}": ("teacher.channels", "cnn"),
    "student: {kind: cnn}": ("student.channels", "cnn"),
    "student_optimizer: {learning_rate: 1e-4}": ("student_optimizer.learning_rate", "1.0e-4"),
    "student_optimizer: {learning_rate: 0}": ("student_optimizer.learning_rate", "above 0"),
    "baseline: nobody": ("baseline", "FedKD"),
    "data: {task: tagging}": ("teacher.kind", "'transformer' for tagging"),
    "teacher: {kind: transformer}": ("teacher.kind", "both models or for none"),
    "{teacher: {kind: transformer}, student: {kind: transformer}}": ("checkpoint", "minilm"),
    "{data: {task: characters, name: tiny_shakespeare}, teacher: {kind: transformer, width: 10}, "
    "student: {kind: transformer}}": (
        "teacher.heads",
        "divisor of the width, 10",
    ),
    "{checkpoint: x, teacher: {kind: transformer, depth: 1}, student: {kind: transformer}}": (
        "student",
        "teacher's, 1",
    ),
    "{data: {task: recommendation, partition: iid, candidates: 1}}": ("data.candidates", "at least 2"),
    "methods: {a: {depth: 1}}": ("methods.a.depth", "for a transformer"),
    "data: {task: recommendation}": ("data.partition", "'iid' or 'natural'"),
    "data: {length: 0}": ("data.length", "at least 1"),
    "data: {examples: 0}": ("data.examples", "null for all"),
    "[1, 2]": ("config", "mapping"),
    "{a: [": (".yaml", "YAML"),
}


@pytest.mark.parametrize(("text", "said"), IMPOSSIBLE.items(), ids=IMPOSSIBLE)
def test_impossible_configs_are_told_in_one_line(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message
    assert "allowed" in message
    for part in said:
        assert part in message


def test_sizes_that_a_checkpoint_decides_are_not_checked():
    text = "{checkpoint: minilm, teacher: {kind: transformer, heads: 12}, student: {kind: transformer, width: 10}}"
    validate(from_dict(Experiment, yaml.safe_load(text)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_files_load_and_come_back(path, tmp_path):
    config = load_config(path)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


@hypothesis.given(
    rounds=st.integers(1, 10**6),
    alpha=st.floats(1e-3, 1e3),
    hidden=st.lists(st.integers(1, 512), min_size=1, max_size=3),
    seeds=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True),
    rate=st.floats(1e-6, 10),
)
def test_yaml_round_trip(rounds, alpha, hidden, seeds, rate):
    config = Experiment(rounds=rounds, seeds=tuple(seeds))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, alpha=alpha),
        teacher=dataclasses.replace(config.teacher, hidden=tuple(hidden)),
        student=dataclasses.replace(config.student, hidden=tuple(hidden[:1])),
        teacher_optimizer=dataclasses.replace(config.teacher_optimizer, learning_rate=rate),
    )
    validate(config)
    assert from_dict(Experiment, yaml.safe_load(to_yaml(config))) == config


def test_missing_file_is_told():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_config("nowhere.yaml")


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
    monkeypatch.setattr(fedkd_jax.config, "build_optimizer", lambda own, steps: seen.append(steps) or real(own, steps))
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
