"""Laws of configs: strict, one-line errors before anything compiles, and a round trip through YAML."""

import dataclasses
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml

from fedkd_jax.config import ConfigError, Experiment, from_dict, load_config, to_yaml, validate

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
    "participation: {dropout: 1.5}": ("participation.dropout", "[0, 1]"),
    "participation: {available: 0.0}": ("participation.available", "(0, 1]"),
    "participation: {available: 0.5, trace: t.npy}": ("participation.trace", "null"),
    "{cohort: 4, participation: {first: 5}}": ("participation.first", "up to the cohort, 4"),
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
    "data: {min_examples: -1}": ("data.min_examples", "0 or more"),
    "data: {task: characters, name: tiny_shakespeare, min_examples: 1}": ("data.min_examples", "2 or more"),
    "{data: {task: tagging, min_examples: 9}, checkpoint: x}": (
        "data.min_examples",
        "only classification and characters",
    ),
    "data: {task: characters, name: hamlet}": ("data.name", "'tiny_shakespeare'"),
    "{data: {task: characters, name: tiny_shakespeare}, checkpoint: minilm}": ("checkpoint", "null for characters"),
    "data: {task: tagging, name: bc5cdr+bc5cdr}": ("data.name", "different corpora"),
    "data: {test_fraction: 1.0}": ("data.test_fraction", "between 0 and 1"),
    "methods: {a: {codec: svd, t_start: 1.01}}": ("methods.a.t_start", "(0, 1]"),
    "methods: {a: {codec: svd, t_end: 0}}": ("methods.a.t_end", "(0, 1]"),
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
    "methods: {a: {mu: 0.5}}": ("methods.a.mu", "fedprox"),
    "methods: {a: {algorithm: fedavg, alpha: 0.1}}": ("methods.a.alpha", "fml"),
    "methods: {a: {algorithm: fedavg, adaptive: false}}": ("methods.a.adaptive", "fedkd"),
    "methods: {a: {algorithm: fedavg, t_start: 0.9}}": ("methods.a.t_start", "codec 'svd'"),
    "methods: {a: {algorithm: fedavg, share: 0.5}}": ("methods.a.share", "codec 'top_k' and fetchsgd and feddropout"),
    "methods: {a: {algorithm: fetchsgd, codec: svd}}": ("methods.a.codec", "left out"),
    "methods: {a: {algorithm: feddropout, share: 1.5}}": ("methods.a.share", "(0, 1]"),
    "methods: {a: {algorithm: fedavg, codec: power, rank: 0}}": ("methods.a.rank", "at least 1"),
    "methods: {a: {algorithm: fedavg, bits: 1}}": ("methods.a.bits", "2 to 16"),
    "methods: {a: {algorithm: fedpaq}}": ("methods.a.bits", "for fedpaq"),
    "methods: {a: {algorithm: fedpaq, bits: 8, directions: downlink}}": ("methods.a.directions", "uplink"),
    "methods: {a: {algorithm: fedprox, mu: -1}}": ("methods.a.mu", "0 or more"),
    "methods: {a: {algorithm: fedprox, reset_optimizer: false}}": ("methods.a.reset_optimizer", "left out"),
    "methods: {a: {algorithm: fetchsgd, sketch: 0}}": ("methods.a.sketch", "above 0"),
    "methods: {a: {algorithm: fetchsgd, momentum: 1}}": ("methods.a.momentum", "1 excluded"),
    "methods: {a: {algorithm: fml, beta: 2}}": ("methods.a.beta", "0 to 1"),
    "methods: {a: {algorithm: scaffold}}": ("methods.a.optimizer", "sgd"),
    "methods: {a: {algorithm: local_only, weighting: uniform}}": ("methods.a.weighting", "left out"),
    "methods: {a: {algorithm: fedavg, feedback: true}}": ("methods.a.feedback", "without a codec"),
    "methods: {a: {algorithm: fedavg, directions: uplink}}": ("methods.a.directions", "without a codec"),
    "methods: {a: {algorithm: fedavg, bits: 2, feedback: true}}": ("methods.a.bits", "3 or more"),
    "methods: {a: {algorithm: fedavg, teacher_dtype: bfloat16}}": ("methods.a.teacher_dtype", "fedkd, fml, local_only"),
    "methods: {a: {moments_dtype: float16}}": ("methods.a.moments_dtype", "'bfloat16'"),
    "methods: {a: {hidden: false, project: false}}": ("methods.a.project", "hidden is false"),
    "methods: {a: {adaptive: false, stop_weight_gradient: true}}": (
        "methods.a.stop_weight_gradient",
        "adaptive is false",
    ),
    "methods: {a: {algorithm: scaffold, weighting: uniform}}": ("methods.a.weighting", "left out"),
    "methods: {a: {algorithm: scaffold, codec: svd, optimizer: {name: sgd}}}": ("methods.a.feedback", "drift"),
    "{teacher: {hidden: []}, student: {hidden: []}, methods: {a: {algorithm: feddropout}}}": ("algorithm", "units"),
    "methods: {a: {server_optimizer: {learning_rate: 0}}}": ("methods.a.server_optimizer.learning_rate", "above 0"),
    "hostile: 1.0": ("hostile", "[0, 1)"),
    "methods: {a: {attack: sign_flip}}": ("methods.a.attack", "see hostile"),
    "{hostile: 0.2, methods: {a: {attack: backdoor}}}": ("methods.a.attack", "'label_flip'"),
    "{hostile: 0.2, methods: {a: {attack: label_flip, attack_scale: 2}}}": ("methods.a.attack_scale", "'scale'"),
    "{hostile: 0.2, methods: {a: {attack: scale, attack_scale: 0}}}": ("methods.a.attack_scale", "above 0"),
    "{hostile: 0.2, data: {task: characters, name: tiny_shakespeare}, teacher: {kind: transformer}, student: "
    "{kind: transformer}, methods: {a: {attack: label_flip}}}": ("methods.a.attack", "but for classification"),
    "methods: {a: {aggregation: krum}}": ("methods.a.aggregation", "'median'"),
    "methods: {a: {trim: 0.1}}": ("methods.a.trim", "'trimmed_mean'"),
    "methods: {a: {aggregation: trimmed_mean, trim: 0.5}}": ("methods.a.trim", "[0, 0.5)"),
    "methods: {a: {clip: 0}}": ("methods.a.clip", "above 0"),
    "methods: {a: {algorithm: local_only, clip: 1}}": ("methods.a.clip", "left out"),
    "methods: {a: {noise: -1}}": ("methods.a.noise", "0 or more"),
    "methods: {a: {noise: 1, weighting: uniform}}": ("methods.a.clip", "with noise"),
    "methods: {a: {noise: 1, clip: 1}}": ("methods.a.weighting", "'uniform' with noise"),
    "methods: {a: {noise: 1, clip: 1, weighting: uniform, aggregation: median}}": ("methods.a.aggregation", "'mean'"),
    "methods: {a: {noise: 1, clip: 1, weighting: uniform, delta: 1}}": ("methods.a.delta", "both excluded"),
    "methods: {a: {noise_at: client}}": ("methods.a.noise_at", "there is noise"),
    "methods: {a: {delta: 0.1}}": ("methods.a.delta", "there is noise"),
    "methods: {a: {noise: 1, clip: 1, weighting: uniform, noise_at: client, codec: svd}}": (
        "methods.a.noise_at",
        "have no sum",
    ),
    "{hostile: 0.2, methods: {a: {noise: 1, clip: 1, weighting: uniform, noise_at: client, attack: scale}}}": (
        "methods.a.attack",
        "null with noise at the client",
    ),
    "{cohort: 4, methods: {a: {aggregation: trimmed_mean, trim: 0.2}}}": ("methods.a.trim", "nothing to trim"),
    "{participation: {dropout: 0.1}, methods: {a: {noise: 1, clip: 1, weighting: uniform, noise_at: client}}}": (
        "methods.a.noise_at",
        "noise gets lost",
    ),
    "{participation: {available: 0.5}, methods: {a: {noise: 1, clip: 1, weighting: uniform}}}": (
        "methods.a.noise",
        "no uniform samples",
    ),
    "methods: {a: {algorithm: feddropout, noise: 1, clip: 1, weighting: uniform}}": ("methods.a.noise", "left out"),
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
