"""Federated methods, each an `Algorithm` in its own file; read `fedkd.py` first."""

from fedkd_jax.algorithms.centralised import centralised
from fedkd_jax.algorithms.fedavg import fedavg
from fedkd_jax.algorithms.fedkd import fedkd
from fedkd_jax.algorithms.local_only import local_only

__all__ = ["centralised", "fedavg", "fedkd", "local_only"]
