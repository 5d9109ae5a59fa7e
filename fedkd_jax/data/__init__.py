"""Data of many clients: read a set, deal it to clients, store it flat. Read `sources`, `partition`, `federated`.

Text first becomes words (`corpora`) and then integers (`tokens`).
"""

from fedkd_jax.data.corpora import Tagged, load_speeches, load_tagged
from fedkd_jax.data.federated import (
    Examples,
    check_data,
    check_ids,
    client_parts,
    federate,
    join_parts,
    population_size,
    stack_clients,
    take_clients,
    train_test_split,
)
from fedkd_jax.data.lazy import from_arrays, from_records, synthetic
from fedkd_jax.data.news import Impressions, News, evaluation_rows, load_news, training_rows
from fedkd_jax.data.partition import by_key, dirichlet, iid, shards
from fedkd_jax.data.sources import load
from fedkd_jax.data.tokens import (
    Characters,
    cached_texts,
    cached_words,
    characters,
    encode_texts,
    encode_words,
    load_tokenizer,
    lost_words,
)

__all__ = [
    "Characters",
    "Examples",
    "Impressions",
    "News",
    "Tagged",
    "by_key",
    "cached_texts",
    "cached_words",
    "characters",
    "check_data",
    "check_ids",
    "client_parts",
    "dirichlet",
    "encode_texts",
    "encode_words",
    "evaluation_rows",
    "federate",
    "from_arrays",
    "from_records",
    "iid",
    "join_parts",
    "load",
    "load_news",
    "load_speeches",
    "load_tagged",
    "load_tokenizer",
    "lost_words",
    "population_size",
    "shards",
    "stack_clients",
    "synthetic",
    "take_clients",
    "train_test_split",
    "training_rows",
]
