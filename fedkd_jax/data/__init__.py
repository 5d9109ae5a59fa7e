"""Data of many clients: read a set, deal it to clients, store it flat. Read `sources`, `partition`, `federated`."""

from fedkd_jax.data.federated import Examples, federate, take_clients, train_test_split
from fedkd_jax.data.partition import by_key, dirichlet, iid, shards
from fedkd_jax.data.sources import load

__all__ = [
    "Examples",
    "by_key",
    "dirichlet",
    "federate",
    "iid",
    "load",
    "shards",
    "take_clients",
    "train_test_split",
]
