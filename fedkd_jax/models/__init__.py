"""Models: `Model(init, apply)` over plain dicts, built from Flax modules."""

from fedkd_jax.models.base import freeze, from_nnx, merge_params, split_params
from fedkd_jax.models.cnn import cnn, conv2d, max_pool
from fedkd_jax.models.mlp import mlp

__all__ = ["cnn", "conv2d", "freeze", "from_nnx", "max_pool", "merge_params", "mlp", "split_params"]
