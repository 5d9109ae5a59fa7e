"""What is refused, by which error and before anything compiles; what looks bad but is legal, and works; files that are broken.

`GOOD` has a call that works of every public function, `BAD` what its arguments may not be. A public name without an entry
fails the last test of the table.
"""

import contextlib
import dataclasses
import inspect
import types
import typing
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import strategies
import tokenizers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkd_jax as fk
from fedkd_jax import data as fd
from fedkd_jax import tasks
from fedkd_jax.check import check_fn, check_int, check_number, check_type
from fedkd_jax.config import ConfigError, Experiment, load_config
from fedkd_jax.data import news, readers
from fedkd_jax.models.mlp import MLP
from sims.fuzz import KINDS, fuzz
from sims.fuzz_readers import TARGETS

KEY, NAN, INF = jax.random.key(0), float("nan"), float("inf")
SGD, MODEL, CODEC = optax.sgd(0.1), fk.mlp((4, 3, 2)), fk.identity_codec()
ALGORITHM = fk.fedavg(MODEL, optimizer=SGD, batch=2)
ALONE = fk.local_only(MODEL, optimizer=SGD, batch=2)
STATE = fk.State(server=fk.ServerState(params={}, opt_state=(), frozen={}, round=0), clients=fk.ClientState())
DATA = fd.federate(np.ones((7, 4), np.float32), np.arange(7) % 2, [np.arange(3), np.arange(3, 7)])
SIZES = fk.TransformerConfig(vocab=9, width=8, layers=1, heads=2, inner=16, positions=6)
LOGITS, LABELS, MASK = np.zeros((2, 3), np.float32), np.zeros(2, np.int32), np.ones(2, bool)
OUTPUTS = fk.Outputs(LOGITS, (np.zeros((2, 4), np.float32),))
MATRIX = np.eye(4, 3, dtype=np.float32)
FACTORS = fk.Factors(np.ones((2, 4, 1)), np.ones((2, 1, 3)), np.ones(2, np.int32))
WORDS = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "rash": 3}, "[PAD]"))
ODD_WORDS = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "rash": 3}, unk_token="[UNK]")
)
SHOWN = fd.Impressions(
    user=np.array(["ann"]),
    history=np.array([5, 2]),
    history_offset=np.array([0, 2]),
    candidates=np.array([3, 4, 1]),
    clicked=np.array([0, 1, 0]),
    candidate_offset=np.array([0, 3]),
)
IDS = jnp.arange(2)


def local(server, client, data, key):
    raise AssertionError


WORK = dict(optimizer=SGD, batch=2, epochs=1, steps=None)
FEDKD = dict(
    teacher=MODEL, student=MODEL, example=np.ones((1, 4)), teacher_optimizer=SGD, student_optimizer=SGD, batch=2
)
RUN = dict(algorithm=ALGORITHM, population=2, data=DATA, key=KEY, rounds=1)
GOOD = {
    # losses, svd
    "cross_entropy": dict(logits=LOGITS, labels=LABELS, mask=MASK),
    "kl_divergence": dict(p_logits=LOGITS, q_logits=LOGITS, mask=MASK),
    "hidden_loss": dict(teacher=OUTPUTS, student=OUTPUTS, mask=MASK),
    "mutual_distillation": dict(teacher=OUTPUTS, student=OUTPUTS, labels=LABELS, mask=MASK),
    "mutual_learning": dict(teacher=OUTPUTS, student=OUTPUTS, labels=LABELS, mask=MASK),
    "per_example": dict(loss_fn=fk.mutual_distillation),
    "layer_map": dict(teacher_layers=4, student_layers=2),
    "energy_threshold": dict(start=0.9, end=0.95, rounds=3),
    "retained_rank": dict(singular_values=np.ones(3, np.float32), threshold=0.9),
    "truncated_svd": dict(matrix=MATRIX, threshold=0.9),
    "factorise": dict(matrix=MATRIX, threshold=0.9),
    "reconstruct": dict(low_rank=fk.LowRank(np.ones((2, 1)), np.ones(1), np.ones((1, 2)), np.int32(1))),
    "weighted_product": dict(factors=FACTORS, weights=np.ones(2)),
    "matrix_view": dict(shape=(4, 3)),
    # codecs
    "payload_bytes": dict(payload=fk.Payload(content=(), floats=0, nbytes=0, ranks={})),
    "payload_floats": dict(payload=fk.Payload(content=(), floats=0, nbytes=0, ranks={})),
    "chain": dict(first=CODEC),
    "error_feedback": dict(codec=CODEC),
    "power_codec": dict(rank=2),
    "quantise": dict(bits=8),
    "sketch_codec": dict(rows=3, columns=9),
    "server_sketch_codec": dict(rows=3, columns=9, share=0.5),
    "spectrum_codec": dict(codec=CODEC),
    "svd_codec": dict(threshold=0.9),
    "top_k": dict(share=0.5),
    # one client, cohorts, layouts
    "local_steps": dict(
        step_fn=lambda c, b, k: (c, 0.0), carry=0.0, data=fd.take_clients(DATA, IDS[0]), key=KEY, batch=2
    ),
    "sample_cohort": dict(key=KEY, round=0, population=9, cohort=3),
    "put": dict(population={"w": jnp.zeros((3, 2))}, ids=IDS, cohort={"w": jnp.ones((2, 2))}),
    "Participation": {},
    "available_by": dict(trace=np.ones((2, 3), bool)),
    "available_with": dict(probability=0.5),
    "unreliable": dict(dropout=0.1, stragglers=0.1, least=0.5, spread=1.0),
    "Layout": {},
    "client_mesh": dict(devices=1),
    "map_clients": dict(fn=lambda x: (x, ()), stacked=(jnp.zeros(3),)),
    "stochastic_round": dict(x=np.ones(2, np.float32), key=KEY),
    "federated_round": dict(local_fn=local),
    # who is not trusted, and messages
    "clip_update": dict(max_norm=1.0),
    "trimmed_mean": dict(share=0.2),
    "hostile_share": dict(share=0.2, population=10, seed=0),
    "attacked": dict(attack_fn=fk.sign_flip(), hostile=lambda i: i == 0),
    "sign_flip": dict(scale=2.0),
    "scaled": dict(factor=-2.0),
    "label_flip": dict(data=DATA, hostile=lambda i: i == 0, classes=2),
    "private_mean": dict(max_norm=1.0, noise_multiplier=2.0),
    "private_send": dict(max_norm=1.0, noise_multiplier=2.0, cohort=3),
    "privacy_spent": dict(noise_multiplier=2.0, cohort=3, population=9, rounds=1, delta=0.1),
    "Channel": dict(secret=bytes(32), run=bytes(16), client=0, side="client"),
    # algorithms
    "fedavg": dict(model=MODEL, **WORK),
    "centralised": dict(model=MODEL, **WORK),
    "local_only": dict(model=MODEL, **WORK),
    "feddropout": dict(model=MODEL, sub_model=fk.keep_units(0.5), **WORK),
    "fedpaq": dict(model=MODEL, bits=8, **WORK),
    "fedprox": dict(model=MODEL, mu=0.1, **WORK),
    "fetchsgd": dict(model=MODEL, columns=9, share=0.5, **WORK),
    "scaffold": dict(model=MODEL, learning_rate=0.1, batch=2),
    "fedkd": FEDKD,
    "fml": {name: value for name, value in FEDKD.items() if name != "example"},
    "keep_units": dict(share=0.5),
    # runs
    "init_state": dict(algorithm=ALGORITHM, population=2, key=KEY),
    "simulate": RUN,
    "simulate_seeds": {name: value for name, value in RUN.items() if name != "key"}
    | dict(keys=jax.random.split(KEY, 2)),
    "evaluate": dict(algorithm=ALGORITHM, state=STATE, data=DATA),
    "evaluate_seeds": dict(algorithm=ALGORITHM, state=STATE, data=DATA),
    "Checkpoints": dict(folder="nowhere"),
    "load_state": dict(folder="nowhere", algorithm=ALGORITHM, population=2, key=KEY),
    "DiskStore": dict(folder="nowhere"),
    # metrics, models
    "accuracy": dict(logits=LOGITS, labels=LABELS, mask=MASK),
    "binary_f1": dict(positive=1),
    "entity_f1": dict(names=("O", "B-X")),
    "TransformerConfig": dict(vocab=9, width=8, heads=2),
    "cnn": dict(image=(9, 9, 1), channels=(2,), dense=(3,), classes=2, size=3),
    "compute_in": dict(model=MODEL, dtype=jnp.bfloat16),
    "freeze": dict(model=MODEL, frozen=lambda path, leaf: False),
    "from_nnx": dict(build=lambda rngs: MLP((4, 2), rngs=rngs)),
    "language_model": dict(config=dataclasses.replace(SIZES, causal=True)),
    "load_bert": dict(folder="nowhere"),
    "mlp": dict(widths=(4, 2)),
    "recommender": dict(config=SIZES, news=np.zeros((2, 3), np.int32)),
    "rematerialise": dict(model=MODEL),
    "tagger": dict(config=SIZES, classes=3),
    "text_classifier": dict(config=SIZES, classes=3),
    "with_pretrained": dict(model=MODEL, params={}),
    # data
    "Examples": dict(inputs=np.zeros((2, 3)), labels=np.array([0, 1]), classes=("a", "b")),
    "Tagged": dict(words=[["a"]], tags=[np.array([0])], names=("O",)),
    "by_key": dict(keys=np.array(["a", "b"])),
    "characters": dict(texts=["abc"], length=2),
    "check_data": dict(name="data", data=DATA),
    "check_ids": dict(ids=np.array([0]), clients=2),
    "dirichlet": dict(labels=np.arange(9) % 2, clients=2, alpha=1.0, seed=0),
    "encode_texts": dict(texts=["other"], tokenizer=WORDS, length=4),
    "encode_words": dict(words=[["rash"]], tags=[[1]], tokenizer=WORDS, length=4),
    "evaluation_rows": dict(impressions=SHOWN),
    "training_rows": dict(impressions=SHOWN, seed=0),
    "federate": dict(inputs=np.zeros((2, 3)), labels=np.array([0, 1]), clients=[np.array([0])]),
    "from_arrays": dict(data=DATA),
    "from_records": dict(records=[1, 2], clients=[np.array([0])], example_fn=lambda r: (r, r)),
    "iid": dict(labels=np.zeros(9), clients=2, seed=0),
    "load": dict(name="nowhere"),
    "load_news": dict(name_or_folder="nowhere"),
    "load_speeches": dict(data_dir="nowhere"),
    "load_tagged": dict(name="psytar", data_dir="nowhere"),
    "load_tokenizer": dict(folder="nowhere"),
    "population_size": dict(data=DATA),
    "shards": dict(labels=np.arange(9) % 2, clients=2, shards_per_client=1, seed=0),
    "synthetic": dict(clients=3),
    "train_test_split": dict(clients=[np.arange(4)], test_fraction=0.5, seed=0),
}
# these make nothing of their arguments that could be wrong, or they say what they do with any
ANYTHING = {
    "identity_codec": "no arguments",
    "ranking": "no arguments",
    "HostStore": "no arguments",
    "Metric": "two functions, checked where they are used",
    "Round": "two functions, checked where they are used",
    "token_accuracy": "no function",
    "example_weight": "a traced count",
    "uniform_weight": "a traced count",
    "fixed_weight": "a traced count",
    "client_key": "traced numbers; JAX names what is no key",
    "take": "ids past the end are clamped",
    "take_clients": "ids past the end are clamped",
    "task_terms": "traced losses",
    "save_state": "see test_checkpoint",
    "Stopped": "what simulate raises",
    "WireError": "what a channel raises",
    "Transport": "no arguments",
    "fixed_mean": "no arguments",
    "coordinate_median": "traced updates",
    "Impressions": "what load_news makes",
    "News": "what load_news makes",
    "Characters": "what characters makes",
    "cached_texts": "as encode_texts",
    "cached_words": "as encode_words",
    "lost_words": "what encode_words takes and gives",
    "client_parts": "within a round",
    "join_parts": "within a round",
    "stack_clients": "data that simulate has checked",
}

# ---- values ----------------------------------------------------------------------------------------------------------------

T, V = TypeError, ValueError
COUNT = [(0, V), (-1, V), (2**40, V), (1.0, T), (NAN, T), ("1", T), (True, T), ([1], T)]
NATURAL = [(-1, V), (0.0, T), ("1", T), (None, T)]
SHARE = [(0, V), (-0.5, V), (1.5, V), (NAN, V), (INF, V), ("1", T), (True, T)]
POSITIVE = [(-0.5, V), (NAN, V), (INF, V), ("1", T), (None, T)]
FN, KIND, OPTIMIZER = [(None, T), ("f", T), (3, T)], [(None, T), ("x", T), (3, T)], [(None, T), ("adam", T), (0.1, T)]
OPTIONAL = [("x", T), (3, T)]
KEYS = [(0, T), (None, T), (np.zeros(2, np.uint32), T), (jax.random.split(KEY, 2), T)]


def of_work(*optimizers):
    out = {"batch": COUNT, "epochs": COUNT, "steps": COUNT[:-1], "loss_fn": FN, "layout": OPTIONAL}
    return out | dict.fromkeys(optimizers or ("optimizer",), OPTIMIZER)


SHARED = of_work() | {
    "model": KIND,
    "uplink": OPTIONAL,
    "downlink": OPTIONAL,
    "weight_fn": FN,
    "server_optimizer": OPTIONAL,
}
BOTH = {"teacher": KIND, "student": KIND, "uplink": OPTIONAL, "downlink": OPTIONAL, "server_optimizer": OPTIONAL}
BOTH |= of_work("teacher_optimizer", "student_optimizer") | {"weight_fn": FN}


def changed(**changes):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return dataclasses.replace(DATA, **changes)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


FEDERATED = [
    (None, T),
    (3, T),
    (changed(labels=DATA.labels.astype(float)), V),
    (changed(labels=DATA.labels[:3]), V),
    (changed(inputs=DATA.inputs[:3]), V),
    (changed(inputs=(DATA.inputs, DATA.inputs[:3])), V),
    (changed(start=np.array([0])), V),
    (changed(start=np.array([], int), count=np.array([], int)), V),
    (changed(start=np.array([0, 5])), V),
    (changed(start=np.array([-1, 3])), V),
    (changed(start=DATA.start.astype(float)), V),
    (changed(count=np.array([-1, 2])), V),
    (changed(count=np.array([3, 5])), V),
    (changed(start=[0, 3]), V),
    (changed(max_count=0), V),
    (changed(max_count=4.0), T),
]
RUNS = {
    "algorithm": KIND,
    "population": [(3, V), ("2", T), (2.0, T), (None, T)],
    "data": FEDERATED,
    "rounds": COUNT,
    "cohort": [(0, V), (3, V), (1.0, T), ("1", T)],
    "test": FEDERATED[1:],
    "eval_every": COUNT[:-1],
    "eval_batch": COUNT,
    "metrics": [("accuracy", T), (None, T)],
    "on_rounds": OPTIONAL,
    "on_evaluation": OPTIONAL,
}
LABELLED = [
    (np.zeros((2, 1), np.int32), V),
    (np.zeros(3, np.int32), V),
    (np.zeros(2, np.float32), V),
    (np.zeros((), int), V),
]
BAD = {
    "cross_entropy": {"labels": LABELLED, "mask": [(np.ones(3, bool), V)], "logits": [(np.zeros((2, 3), int), V)]},
    "accuracy": {"labels": LABELLED},
    "kl_divergence": {"q_logits": [(LOGITS[:, :2], V), (LOGITS[:1], V)], "mask": [(np.ones(3, bool), V)]},
    "hidden_loss": {"teacher": KIND, "student": KIND, "projection": [((MATRIX,), V), ((), V)]},
    "mutual_distillation": {"teacher": KIND, "student": KIND, "labels": LABELLED},
    "mutual_learning": {"labels": LABELLED},
    "per_example": {"loss_fn": FN},
    "layer_map": {"teacher_layers": NATURAL, "student_layers": [(5, V), *NATURAL]},
    "energy_threshold": {"start": SHARE, "end": SHARE, "rounds": COUNT},
    "retained_rank": {"singular_values": [(MATRIX, V), (np.float32(1), V)]},
    "truncated_svd": {
        "matrix": [(MATRIX[0], V), (MATRIX[None], V), (MATRIX * 1j, V)],
        "threshold": SHARE[:5],
        "method": [("qr", V), (None, V)],
        "max_rank": COUNT[:-1],
    },
    "factorise": {"matrix": [(MATRIX[0], V)], "threshold": SHARE[:5], "method": [("qr", V)], "start": [(MATRIX, V)]},
    "reconstruct": {"low_rank": KIND},
    "weighted_product": {"factors": KIND, "weights": [(np.ones(3), V), (np.ones((2, 1)), V)]},
    "matrix_view": {"shape": [((3,), V), ((), V)], "stack": [(1, V), (-1, V)]},
    "payload_bytes": {"payload": KIND},
    "payload_floats": {"payload": KIND},
    "chain": {"first": KIND},
    "error_feedback": {"codec": KIND},
    "power_codec": {"rank": COUNT, "compressible": FN, "view": FN},
    "quantise": {"bits": [(1, V), (17, V), (8.0, T), ("8", T), (None, T)]},
    "sketch_codec": {"rows": COUNT, "columns": COUNT, "seed": NATURAL},
    "server_sketch_codec": {"rows": COUNT, "share": SHARE, "momentum": [(1, V), *POSITIVE]},
    "spectrum_codec": {"codec": KIND, "compressible": FN, "view": FN},
    "svd_codec": {"threshold": SHARE, "method": [("qr", V), (None, V)], "compressible": FN, "view": FN},
    "top_k": {"share": SHARE},
    "local_steps": {"step_fn": FN, "data": KIND, "batch": COUNT, "epochs": COUNT, "steps": COUNT[:-1]},
    "sample_cohort": {"population": [*NATURAL, (0, V)], "cohort": [(0, V), (10, V), (1.0, T)]},
    "put": {"cohort": [({"w": jnp.ones((3, 2))}, V), ({"w": jnp.ones((2, 3))}, V)]},
    "Participation": {"available": OPTIONAL, "turn": OPTIONAL, "first": COUNT[:-1], "strata": COUNT},
    "available_by": {"trace": [(np.ones(3, bool), V), (np.zeros((2, 3), bool), V), (np.ones((2, 3)), V), ("t.npy", V)]},
    "available_with": {"probability": SHARE},
    "unreliable": {"dropout": SHARE[1:], "stragglers": SHARE[1:], "least": SHARE, "spread": POSITIVE},
    "Layout": {"chunk": COUNT[:-1], "mesh": OPTIONAL},
    "client_mesh": {"devices": [(10**6, V), (0, V), (1.0, T), ("1", T)]},
    "map_clients": {
        "fn": FN,
        "stacked": [((jnp.zeros(3), jnp.zeros(2)), V), ((jnp.zeros(0),), V), ((jnp.zeros(()),), V), ((), V)],
    },
    "stochastic_round": {"key": [(0, T), ("x", T)]},
    "clip_update": {"max_norm": [(0, V), *POSITIVE]},
    "trimmed_mean": {"share": [(0.5, V), *POSITIVE]},
    "hostile_share": {"share": [(1, V), *POSITIVE], "population": COUNT, "seed": NATURAL},
    "attacked": {"attack_fn": FN, "hostile": FN},
    "sign_flip": {"scale": [(0, V), *POSITIVE]},
    "scaled": {"factor": POSITIVE[1:]},
    "label_flip": {"data": KIND, "hostile": FN, "classes": COUNT},
    "private_mean": {"max_norm": [(0, V), *POSITIVE], "noise_multiplier": POSITIVE},
    "private_send": {"max_norm": [(0, V), *POSITIVE], "noise_multiplier": POSITIVE, "cohort": COUNT},
    "privacy_spent": {
        "noise_multiplier": POSITIVE,
        "cohort": [(10, V), *COUNT],
        "population": [(2, V), *COUNT],
        "rounds": NATURAL,
        "delta": [(1, V), *SHARE],
    },
    "Channel": {
        "secret": [(bytes(15), V), ("x" * 32, T), (None, T)],
        "run": [(bytes(15), V), ("x" * 16, T), (None, T)],
        "client": NATURAL,
        "side": [("both", V), (None, V)],
    },
    "federated_round": {
        "local_fn": FN,
        "send_fn": OPTIONAL,
        "aggregator": OPTIONAL,
        "wire": OPTIONAL,
        "download": OPTIONAL,
        "uplink": OPTIONAL,
        "downlink": OPTIONAL,
        "weight_fn": FN,
        "server_optimizer": OPTIONAL,
        "layout": OPTIONAL,
        "message": [("weights", V), (None, V)],
    },
    "fedavg": SHARED,
    "centralised": of_work() | {"model": KIND},
    "local_only": of_work() | {"model": KIND, "teacher_dtype": [(jnp.int8, V), ("x", T)]},
    "feddropout": of_work() | {"model": KIND, "sub_model": FN, "weight_fn": FN},
    "fedpaq": {"model": KIND, "bits": [(1, V), (8.0, T)], "downlink_bits": [(33, V), ("8", T)], "batch": COUNT},
    "fedprox": {"model": KIND, "mu": POSITIVE, "optimizer": OPTIMIZER, "reset_optimizer": [(False, V)]},
    "fetchsgd": {"model": KIND, "rows": COUNT, "columns": COUNT, "share": SHARE, "momentum": [(1, V), *POSITIVE]},
    "scaffold": {"model": KIND, "learning_rate": [(0, V), *POSITIVE], "participation": SHARE, "batch": COUNT},
    "fedkd": BOTH
    | {
        "example": [(None, V), (np.ones((1, 5)), V)],
        "projection_optimizer": OPTIMIZER[1:],
        "message": [("weights", V), ("gradient", V)],
        "teacher_dtype": [(jnp.float16, V), ("x", T)],
        "moments_dtype": [(jnp.float16, V)],
    },
    "fml": {"teacher": KIND, "alpha": SHARE[1:], "beta": SHARE[1:], "batch": COUNT},
    "keep_units": {"share": SHARE},
    "init_state": {"algorithm": KIND, "population": COUNT, "key": KEYS},
    "simulate": RUNS
    | {
        "key": KEYS,
        "store": OPTIONAL,
        "participation": OPTIONAL,
        "checkpoints": OPTIONAL,
        "group": [(0, V), (1, V), (1.0, T)],
        "eval_ids": [(np.array([0.5]), V), (np.array([2]), V), (np.array([-1]), V), (np.array([], int), V), (0, V)],
    },
    "simulate_seeds": RUNS | {"keys": [(KEY, T), (None, T), (3, T)], "layout": OPTIONAL},
    "evaluate": {
        "algorithm": KIND,
        "state": KIND,
        "data": FEDERATED,
        "metrics": [("accuracy", T), ({"x": 3}, T)],
        "batch": COUNT,
        "ids": [(np.array([0]), V), (np.array([0, -1]), V), (np.array([0.0, 1.0]), V)],
    },
    "evaluate_seeds": {"algorithm": KIND, "state": KIND, "data": FEDERATED, "batch": COUNT},
    "Checkpoints": {"rounds": COUNT[:-1], "minutes": POSITIVE[:-1], "keep": COUNT},
    "load_state": {"folder": [("nowhere", FileNotFoundError)]},
    "DiskStore": {"folder": [("/proc/none", OSError), (3, T)]},
    "binary_f1": {"positive": NATURAL},
    "entity_f1": {"names": [(("O", "O"), V), (("X",), V), ("O-X", V), ((3,), V)]},
    "TransformerConfig": dict.fromkeys(("vocab", "width", "layers", "heads", "inner", "positions", "types"), COUNT)
    | {"epsilon": POSITIVE, "activation": [("mish", V)], "dtype": [("int8", V)], "pad": [(0.5, T)]},
    "cnn": {
        "image": [((9, 9), V), ((9, 9, 0), V), ((9.0, 9, 1), T), ((2, 2, 1), V)],
        "channels": [((0,), V), (("2",), T), ((2,) * 9, V)],
        "dense": [((0,), V)],
        "classes": COUNT,
        "size": COUNT,
    },
    "compute_in": {"model": KIND, "dtype": [(jnp.int8, V), ("x", T)]},
    "freeze": {"model": KIND, "frozen": FN},
    "from_nnx": {"build": [*FN, (lambda rngs: {"w": 1}, T)]},
    "language_model": {"config": [*KIND, (SIZES, V)]},
    "load_bert": {"folder": [("nowhere", FileNotFoundError), (3, T)]},
    "mlp": {"widths": [((4,), V), ((), V), ((4, 0), V), ((4, 2.5), T), (("4", 2), T)]},
    "recommender": {
        "config": KIND,
        "news": [
            (np.zeros(3, int), V),
            (np.zeros((0, 3), int), V),
            (np.zeros((2, 7), int), V),
            (np.full((2, 3), 9), V),
            (np.full((2, 3), -1), V),
            (np.zeros((2, 3)), V),
        ],
    },
    "rematerialise": {"model": KIND},
    "tagger": {"config": KIND, "classes": COUNT},
    "text_classifier": {"config": KIND, "classes": COUNT},
    "with_pretrained": {"params": [({"x": np.zeros(3)}, V), ({"dense_0": {"bias": np.zeros(9)}}, V)]},
    "Examples": {
        "inputs": [(np.zeros((3, 3)), V)],
        "labels": [
            (np.array([0.0, 1.0]), V),
            (np.array([0, 2]), V),
            (np.array([-1, 0]), V),
            (np.zeros((2, 1), int), V),
        ],
        "natural": [(np.array(["a"]), V)],
    },
    "Tagged": {"tags": [([np.array([0, 0])], V), ([], V), ([np.array([1])], V), ([np.array([-1])], V)]},
    "by_key": {"keys": [(np.zeros((2, 2)), V)], "seed": NATURAL[:-1]},
    "characters": {"texts": [("abc", T)], "length": COUNT, "vocabulary": [("aa", V), ("ab", V)]},
    "check_data": {"data": FEDERATED},
    "check_ids": {"ids": [(np.array([2]), V), (np.array([-1]), V), (np.array([0.0]), V), (0, V)]},
    "dirichlet": {
        "labels": [(np.zeros((2, 2)), V)],
        "clients": COUNT,
        "alpha": [(0, V), *POSITIVE],
        "seed": NATURAL,
        "min_examples": [(-1, V), (5, V), (1.0, T)],
        "max_tries": COUNT,
    },
    "encode_texts": {
        "texts": [("rash", T)],
        "tokenizer": [*KIND, (ODD_WORDS, V)],
        "length": [(2, V), (3.0, T), ("4", T)],
    },
    "encode_words": {
        "tags": [([[1, 2]], V), ([[-1]], V), ([[0.5]], V), ([], V)],
        "tokenizer": KIND,
        "length": [(2, V)],
    },
    "evaluation_rows": {"history": COUNT, "candidates": COUNT[:-1]},
    "training_rows": {"history": COUNT, "negatives": COUNT, "seed": NATURAL},
    "federate": {
        "inputs": [(np.zeros((3, 3)), V)],
        "labels": [(np.array([0.0, 1.0]), V)],
        "clients": [
            ([np.array([2])], V),
            ([np.array([-1])], V),
            ([np.array([0.0])], V),
            ([], V),
            ([np.array([], int)], V),
        ],
    },
    "from_arrays": {"data": FEDERATED},
    "from_records": {
        "clients": [([np.array([2])], V), ([np.array([], int)], V), ([np.array([0.5])], V)],
        "example_fn": FN,
    },
    "iid": {"clients": COUNT, "seed": NATURAL},
    "load": {"name": [("mnist", V), (3, T), ("tfds:", V), ("tfds:a b", V), ("tfds:huggingface:x", FileNotFoundError)]},
    "load_news": {"name_or_folder": [("nowhere", FileNotFoundError), (3, T)]},
    "load_speeches": {"data_dir": [("nowhere", FileNotFoundError), ("~nobody-at-all/x", FileNotFoundError)]},
    "load_tagged": {"name": [("conll", V)], "data_dir": [("nowhere", FileNotFoundError)]},
    "load_tokenizer": {"folder": [("nowhere", FileNotFoundError), ("~nobody-at-all/x", FileNotFoundError), (3, T)]},
    "population_size": {"data": KIND},
    "shards": {"clients": COUNT, "shards_per_client": [(9, V), *COUNT], "seed": NATURAL},
    "synthetic": {
        "clients": [(2**31 - 2, V), *COUNT],
        "alpha": POSITIVE,
        "beta": POSITIVE,
        "features": COUNT,
        "classes": COUNT,
        "counts": [((0, 4), V), ((5, 4), V), ((1, 2, 3), V), ((1, 2.5), T)],
        "seed": NATURAL,
        "part": NATURAL,
    },
    "train_test_split": {"test_fraction": [(1, V), *POSITIVE], "seed": NATURAL, "labels": [(np.zeros(2, int), V)]},
}
# their message is JAX's, NumPy's or the system's, or of another argument, which the value decides with
NOT_OURS = {
    "put",
    "stochastic_round",
    "DiskStore",
    "load_state",
    "load_bert",
    "load_news",
    "load_speeches",
    "load_tagged",
}
NOT_OURS |= {"load_tokenizer", "load", "compute_in", "with_pretrained", "dirichlet", "shards", "matrix_view"}


def public(name):
    return getattr(fk, name, None) or getattr(fd, name)


@pytest.fixture
def unchecked():
    """Without the suite's own type checks, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def compilations():
    """Seconds of each compilation since."""
    seen = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1.5)(jnp.ones(3))
    assert seen  # or the event has another name now
    jnp.zeros((), jnp.float32)  # which hidden_loss begins with
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_told_before_anything_compiles(name, unchecked, compilations):
    for argument, values in BAD[name].items():
        for value, error in values:
            compilations.clear()
            with pytest.raises(error) as raised:
                public(name)(**{**GOOD[name], argument: value})
            message = str(raised.value)
            assert not compilations, (argument, value)
            if name not in NOT_OURS:
                assert "allowed" in message, (argument, value, message)
                assert "\n" not in message.split("allowed")[-1], message


FILES = [name for name, call in GOOD.items() if "nowhere" in map(str, call.values())]
RUNS_ALONE = ["simulate", "simulate_seeds", "evaluate", "evaluate_seeds"]


@pytest.mark.parametrize("name", [name for name in GOOD if name not in (*FILES, *RUNS_ALONE)])
def test_the_call_that_is_changed_works(name, unchecked):
    public(name)(**GOOD[name])


def test_every_public_name_is_in_the_table():
    names = {name for name, value in vars(fk).items() if callable(value) and not name.startswith("_")} | set(fd.__all__)
    records = {name for name in names if getattr(public(name), "__module__", "") == "fedkd_jax.types"}
    assert sorted(names - records - set(BAD) - set(ANYTHING)) == []
    assert set(GOOD) == set(BAD)
    for name, of in BAD.items():
        parameters = inspect.signature(public(name)).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert open_ended or of.keys() <= parameters.keys(), name


def test_what_functions_refuse_where_they_are_used(unchecked):
    for match, call in {
        "update has a leaf 3; allowed: arrays": lambda: CODEC.encode({"w": 3}, 0, KEY),
        "codec 1 of the chain is 8; allowed": lambda: fk.chain(CODEC, 8),
        "payload holds integers of another quantise; allowed: one": lambda: fk.chain(
            CODEC, fk.quantise(16), fk.quantise(3)
        ).encode({"w": np.ones(3, np.float32)}, 0, KEY),
        "inputs has shape .*allowed": lambda: MODEL.apply(MODEL.init(KEY), np.ones((2, 5))),
        "tokens is float.*allowed": lambda: fk.text_classifier(SIZES, 2).apply(TEXT_PARAMS, np.ones((2, 3))),
        r"tokens is int.*\[3\]; allowed": lambda: fk.text_classifier(SIZES, 2).apply(TEXT_PARAMS, np.ones(3, int)),
        "labels has shape .*allowed": lambda: fk.ranking()["auc"].counts(LOGITS, LABELS, MASK),
        "labels is .*allowed": lambda: fk.token_accuracy.counts(LOGITS, LABELS[:1], MASK[:1]),
        "ids is .*allowed": lambda: fd.synthetic(3).take(np.array([3])),
        "ids .*allowed": lambda: fd.from_arrays(DATA).take(np.array([-1])),
        "population has the states of 1 clients; allowed: 2": lambda: fk.simulate(
            ALONE, fk.init_state(ALONE, 1, KEY), DATA, KEY, rounds=1
        ),
        "stacked has": lambda: fk.evaluate(ALONE, fk.init_state(ALONE, 1, KEY), DATA),
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            call()


TEXT_PARAMS = jax.eval_shape(fk.text_classifier(SIZES, 2).init, KEY)


@given(value=st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none(), st.booleans()))
def test_checks_let_through_what_they_say(value):
    number, within = type(value) in (int, float), lambda low, high: low <= value <= high
    for check, right_type, fits in (
        (lambda: check_int("x", value, 2, 9), type(value) is int, lambda: within(2, 9)),
        (lambda: check_number("x", value, "(0, 1]"), number, lambda: within(0, 1) and value != 0),
        (lambda: check_number("x", value, "[-1, inf)"), number, lambda: within(-1, INF) and value != INF),
        (lambda: check_type("x", value, (str, type(None))), value is None or isinstance(value, str), lambda: True),
        (lambda: check_fn("x", value, "()"), False, None),
    ):
        if right_type and fits():
            check()
        else:
            with pytest.raises(ValueError if right_type else TypeError, match=r"^x is (.|\n)*; allowed: "):
                check()


# ---- every key of a config -------------------------------------------------------------------------------------------------


def keys_of(kind, prefix=()):
    """(path, type) of every key below."""
    for name, hint in typing.get_type_hints(kind).items():
        of = [a for a in typing.get_args(hint) if a is not type(None)]
        inner = of[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) else hint
        if typing.get_origin(inner) is dict:
            yield (*prefix, name), dict
            yield from keys_of(of[-1], (*prefix, name, "a"))
        elif dataclasses.is_dataclass(inner):
            yield (*prefix, name), inner
            yield from keys_of(inner, (*prefix, name))
        else:
            yield (*prefix, name), inner


CONFIG_KEYS = dict(keys_of(Experiment))
WRONG = {
    int: ["x", 2.5, True, [1], {}, 2**31, -(2**31) - 1],
    float: ["x", True, [1.0], {}, NAN, INF, -INF, 10**400],
    str: [3, True, [], {}, "a\0b", "a\nb", "\ud800"],
    bool: [0, 1, "yes", 2.0, []],
    dict: [3, "x", [], {}, {"": {}}, {"a": 3}],
    tuple: [3, "x", {}, ["x"], [2.5], [True], [2**31], [None]],
}


def told(tmp_path, key, value):
    """The one line that a config with this value at this path is refused with."""
    inner = value
    for name in reversed(key):
        more = {"algorithm": "fedavg"} if name == "optimizer" else {}  # whose own fedkd has not
        inner = {name: inner} | more
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(inner), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    message = str(raised.value)
    assert "; allowed: " in message and "\n" not in message
    return message


def test_there_are_keys_of_every_kind():
    assert len(CONFIG_KEYS) > 90
    assert {("rounds",), ("data", "alpha"), ("methods", "a", "optimizer", "clip_norm")} <= CONFIG_KEYS.keys()


@pytest.mark.parametrize("key", CONFIG_KEYS, ids=".".join)
def test_every_key_refuses_what_it_cannot_be(tmp_path, unchecked, key):
    kind, name = CONFIG_KEYS[key], ".".join(key)
    if dataclasses.is_dataclass(kind):
        valid = [field.name for field in dataclasses.fields(kind)]
        for value in (3, "x", [], True):
            assert told(tmp_path, key, value).startswith(f"{name} is ")
        message = told(tmp_path, (*key, "nonsense"), 3)
        assert message.startswith(f"{name}.nonsense is 3; ") and all(field in message for field in valid)
    elif typing.get_origin(kind) is Literal:
        for value in (3, "nonsense", [], True) + ((None,) if key != ("methods", "a", "attack") else ()):
            message = told(tmp_path, key, value)
            assert message.startswith(f"{name} is {value!r}; ")
            assert all(repr(one) in message for one in typing.get_args(kind))
    else:
        for value in WRONG[typing.get_origin(kind) or kind]:
            assert name in told(tmp_path, key, value).split("; allowed: ")[0] or "YAML" in told(tmp_path, key, value)


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "rounds: 3\nrounds: 4": "rounds occurs twice",
        "methods: {a: {codec: svd, codec: svd}}": "codec occurs twice",
        "&x [*x]": "an alias within what it stands for",
        "a: &a {<<: *a}": "an alias within what it stands for",
        "[" * 5000: "RecursionError",
        "rounds: !!python/object:os.system 3": "could not determine a constructor",
        "rounds: !!bool x": "KeyError",
        "rounds: !!timestamp x": "AttributeError",
        "rounds: !!int ''": "a YAML file",
        "\x00": "a YAML file",
        "- " * 40_000: "allowed: a YAML file of at most 65536",
        "nonsense: 3": "the keys here are name, rounds",
        "x: &a0 [1, 1]\n"
        + "\n".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)): "more than 10000",
    }.items(),
)
def test_strange_yaml_is_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_aliases_and_merge_keys_are_legal(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "methods:\n  a: &a {codec: svd, t_start: 0.9}\n  b: &b {<<: *a, t_end: 0.95}\n  c: {<<: *b, t_start: 0.8}"
    )
    methods = load_config(path).methods
    assert [(m.t_start, m.t_end) for m in methods.values()] == [(0.9, 0.98), (0.9, 0.95), (0.8, 0.95)]


# ---- what looks bad but is legal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedkd", "fedavg"])
def test_odd_clients_are_legal_through_a_round_and_evaluation(name):
    """Empty, of one class, of one example, with a NaN among its inputs, with a label that is none: the first does nothing, the
    fourth has no weight and nothing of it reaches anybody else, of the fifth the loss says it."""
    counts = (0, 5, 1, 4, 4, 6)
    data = strategies.ragged_data(counts, strategies.FEATURES, strategies.TARGETS, 3)
    inputs, labels = data.inputs.copy(), data.labels.copy()
    labels[data.start[1] : data.start[1] + 5] = 2
    inputs[data.start[3] + 1, 0] = np.nan
    labels[data.start[4]] = strategies.TARGETS
    odd = dataclasses.replace(data, inputs=inputs, labels=labels)
    algorithm = strategies.ALGORITHMS[name]()
    state, history = fk.simulate(algorithm, 6, odd, KEY, rounds=2, test=odd)
    assert history.rounds.finite[0].tolist() == [True, True, True, False, True, True]
    assert history.rounds.weight[0].tolist() == [0.0, 5.0, 1.0, 0.0, 4.0, 6.0]
    loss = history.rounds.terms.teacher_task + history.rounds.terms.student_task
    assert np.isnan(loss[0]).tolist() == [False, False, False, True, True, False]
    chex.assert_tree_all_finite(state.server.params)
    chex.assert_tree_all_finite(state.clients)
    without = dataclasses.replace(odd, count=np.array([0, 5, 1, 0, 4, 6], np.int32))
    same, _ = fk.simulate(algorithm, 6, without, KEY, rounds=2)
    chex.assert_trees_all_close(state.server.params, same.server.params, rtol=1e-5, atol=1e-6)
    scores = history.evaluations[-1][next(iter(algorithm.predict))]["accuracy"]
    assert np.isnan(scores).tolist() == [True] + [False] * 5


def test_texts_of_no_length_are_legal_through_a_round_and_evaluation():
    """Only padding, which attention and pooling have nothing to look at."""
    tokens = np.array([[0] * 4, [1, 2, 0, 0], [0] * 4, [3, 0, 0, 0]], np.int32)
    data = fd.federate(tokens, np.array([0, 1, 1, 0]), [np.array([0]), np.array([1, 2]), np.array([3])])
    model = fk.text_classifier(SIZES, 2)
    state, history = fk.simulate(fk.fedavg(model, optimizer=SGD, batch=2), 3, data, KEY, rounds=1, test=data)
    assert history.rounds.finite.all()
    chex.assert_tree_all_finite(state.server.params)
    assert np.isfinite(history.evaluations[-1]["model"]["accuracy"]).all()


def test_texts_speeches_and_sentences_of_no_length_are_read():
    assert fd.encode_texts(["", "rash"], WORDS, 4).tolist() == [[1, 2, 0, 0], [1, 3, 2, 0]]
    tokens, labels = fd.encode_words([[], ["rash"]], [[], [1]], WORDS, 4)
    assert tokens[0].tolist() == [1, 2, 0, 0] and (labels[0] == -1).all()
    clients = tasks.next_character([("A", ""), ("A", "to be or not"), ("B", "x"), ("A", "to be")], 0.5, 0, length=4)
    assert clients.names == ("A",)
    nobody = dataclasses.replace(SHOWN, history=SHOWN.history[:0], history_offset=np.array([0, 0]))
    inputs, _, _ = fd.training_rows(nobody, history=2, seed=0)
    assert inputs["history"].tolist() == [[0, 0]]
    assert [len(part) for part in fd.iid(np.zeros(2), 3, 0)] == [1, 1, 0]


def test_a_matrix_that_is_not_finite_says_so_and_others_do_not_notice():
    stack = jnp.stack(
        [jnp.eye(4), jnp.eye(4).at[0, 0].set(jnp.nan), jnp.eye(4).at[1, 1].set(jnp.inf), jnp.zeros((4, 4))]
    )
    found = jax.vmap(lambda m: fk.factorise(m, 0.9))(stack)
    assert found.rank.tolist() == [4, 5, 5, 0]
    chex.assert_tree_all_finite(found)


# ---- files -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(request, tmp_path_factory):
    return TARGETS[request.param](tmp_path_factory.mktemp("fuzz") / "now")


@pytest.mark.parametrize(("reader", "target"), [(reader, reader) for reader in TARGETS], indirect=["target"])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), raw=st.binary(max_size=64))
def test_readers_read_or_refuse_whatever_they_are_given(reader, target, unchecked, seed, raw):
    """An input of every kind of change twice for each seed, and bytes that hypothesis makes up."""
    for i, valid in enumerate(target.valid):
        target.read(i, valid)
    counts = fuzz(reader, target, 2 * len(KINDS | dict(target.kinds)), seed)
    assert [f"{kind}: {error!r}" for kind, _, error, _ in counts.others] == []
    assert counts.slowest < 20
    with contextlib.suppress(*target.errors):
        target.read(0, raw)


def test_lines_that_would_take_long_are_refused(tmp_path):
    path, most = tmp_path / "file", readers.LONGEST
    path.write_bytes(b"a" * (most + 1) + b"\tO\n")
    with pytest.raises(ValueError, match=r"file, line 1: .* bytes; allowed: at most"):
        readers.read_tagged(path, ["X"])
    path.write_bytes(b"rash\tO\n\0\tO\n")
    with pytest.raises(ValueError, match=r"file, line 2: .* no NUL"):
        readers.read_tagged(path, ["X"])
    path.write_text("7" * 300 + " NEG A case.\n")
    (tmp_path / "good").write_text("7|Lithium coma.|coma|18|22|Lithium|10|17")
    with pytest.raises(ValueError, match=r"file, line 1: document .* has 300 characters"):
        readers.read_ade(tmp_path / "good", path)


def test_a_line_of_news_has_a_length(tmp_path):
    path = tmp_path / "news.tsv"
    path.write_bytes(b"N1\ta\tb\t" + b"x" * news.LONGEST + b"\n")
    with pytest.raises(ValueError, match=r"news\.tsv, line 1: has more than \d+ bytes; allowed: at most"):
        list(news.read_news(path))


def test_corpora_without_an_example_are_refused(tmp_path):
    for name in ("train", "devel", "test"):
        (tmp_path / f"{name}.tsv").write_text("\n")
    with pytest.raises(ValueError, match=r"train\.tsv holds no example; allowed: one or more"):
        fd.load_tagged("bc5cdr", data_dir=tmp_path, cache_dir=tmp_path)


def test_a_damaged_prepared_set_is_told(tmp_path):
    (tmp_path / "input.txt").write_text("All:\nSpeak, speak.\n")
    assert fd.load_speeches(data_dir=tmp_path, cache_dir=tmp_path / "cache") == [("All", "Speak, speak.")]
    for pattern in ("*.array_record-*", "dataset_info.json"):
        (path,) = (tmp_path / "cache").rglob(pattern)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"is damaged, .*; allowed: files as they were prepared"):
            fd.load_speeches(data_dir=tmp_path, cache_dir=tmp_path / "cache")
        path.write_bytes(whole)
