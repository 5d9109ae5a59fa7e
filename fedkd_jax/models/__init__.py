"""Models: `Model(init, apply)` over plain dicts, built from Flax modules."""

from fedkd_jax.models.base import Predictor, compute_in, freeze, from_nnx, merge_params, rematerialise, split_params
from fedkd_jax.models.cnn import cnn, conv2d, max_pool
from fedkd_jax.models.mlp import mlp
from fedkd_jax.models.pretrained import load_bert, minilm_folder, with_pretrained
from fedkd_jax.models.recommender import recommender
from fedkd_jax.models.transformer import (
    TransformerConfig,
    is_fixed,
    is_table,
    language_model,
    layer_compressible,
    layer_view,
    tagger,
    text_classifier,
)

__all__ = [
    "Predictor",
    "TransformerConfig",
    "cnn",
    "compute_in",
    "conv2d",
    "freeze",
    "from_nnx",
    "is_fixed",
    "is_table",
    "language_model",
    "layer_compressible",
    "layer_view",
    "load_bert",
    "max_pool",
    "merge_params",
    "minilm_folder",
    "mlp",
    "recommender",
    "rematerialise",
    "split_params",
    "tagger",
    "text_classifier",
    "with_pretrained",
]
