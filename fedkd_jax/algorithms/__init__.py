"""Federated methods, each an `Algorithm` in its own file; read `fedkd.py` first."""

from fedkd_jax.algorithms.centralised import centralised
from fedkd_jax.algorithms.fedavg import fedavg
from fedkd_jax.algorithms.feddropout import feddropout, keep_units
from fedkd_jax.algorithms.fedkd import fedkd
from fedkd_jax.algorithms.fedpaq import fedpaq
from fedkd_jax.algorithms.fedprox import fedprox, proximal
from fedkd_jax.algorithms.fetchsgd import fetchsgd
from fedkd_jax.algorithms.fml import fml, mutual_learning
from fedkd_jax.algorithms.local_only import local_only
from fedkd_jax.algorithms.scaffold import scaffold

__all__ = [
    "centralised",
    "fedavg",
    "feddropout",
    "fedkd",
    "fedpaq",
    "fedprox",
    "fetchsgd",
    "fml",
    "keep_units",
    "local_only",
    "mutual_learning",
    "proximal",
    "scaffold",
]
