"""Who holds what: partitions of n examples over N clients.

A partition is a list of N sorted int64 index arrays which are disjoint and together cover all n examples. It is a
function of its arguments and the seed alone. A setting that cannot be met is an error at once or after a fixed number
of tries.
"""

import numpy as np

from fedkd_jax.check import check_int, check_number
from fedkd_jax.types import Number


def iid(labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """Deal shuffled examples out evenly: sizes differ by at most one, with more clients than examples some are empty.

    Args:
      labels: `[n]`; only its length is used.
      clients: N >= 1.
      seed: any non-negative int.

    Raises:
      ValueError: clients < 1, a negative seed.

    >>> [len(ids) for ids in iid(np.zeros(10, int), clients=3, seed=0)]
    [4, 3, 3]
    """
    check_int("clients", clients)
    check_int("seed", seed, 0, 2**63 - 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(ids) for ids in np.array_split(order, clients)]


def dirichlet(
    labels: np.ndarray, clients: int, alpha: Number, seed: int, *, min_examples: int = 0, max_tries: int = 100
) -> list[np.ndarray]:
    """Label skew: the examples of each class are divided over clients in proportions drawn from Dirichlet(alpha).

    For each class c, `p_c ~ Dir(alpha, ..., alpha)` over the N clients, and client i gets a share `p_c[i]` of the class
    (Yurochkin et al. 2019, arXiv:1905.12022, and most of the literature since; Hsu et al. 2019, arXiv:1909.06335, draw
    a class mixture per client instead and so fix the clients' sizes). A large alpha tends to equal shares of each
    class, a small one to clients of few classes and very different sizes, some of them empty.

    Args:
      labels: `[n]` int.
      clients: N >= 1.
      alpha: concentration, > 0.
      seed: any non-negative int.
      min_examples: draw again until each client has this many.
      max_tries: draws before giving up, >= 1.

    Raises:
      ValueError: an argument is out of range, min_examples * clients > n, or no draw reached min_examples.

    >>> labels = np.repeat([0, 1], 50)
    >>> [np.bincount(labels[ids], minlength=2).tolist() for ids in dirichlet(labels, clients=2, alpha=1e9, seed=0)]
    [[25, 25], [25, 25]]
    """
    check_int("clients", clients)
    check_int("max_tries", max_tries)
    check_int("min_examples", min_examples, 0)
    check_int("seed", seed, 0, 2**63 - 1)
    check_number("alpha", alpha, "(0, inf)")
    labels = _flat_labels(labels)
    n = len(labels)
    if min_examples * clients > n:
        raise ValueError(
            f"min_examples={min_examples} for clients={clients} needs {min_examples * clients} examples of the {n} "
            f"there are; min_examples must be in 0..{n // clients}, or clients smaller"
        )
    rng = np.random.default_rng(seed)
    classes, class_sizes = np.unique(labels, return_counts=True)
    smallest = 0
    for _ in range(max_tries):
        shares = rng.dirichlet(np.full(clients, float(alpha)), size=len(classes))
        ends = np.rint(np.cumsum(shares, axis=1) * class_sizes[:, None]).astype(np.int64)  # [classes, N]
        ends[:, -1] = class_sizes
        counts = np.diff(ends, axis=1, prepend=0)
        smallest = max(smallest, int(counts.sum(0).min()))
        if smallest >= min_examples:
            break
    else:
        raise ValueError(
            f"dirichlet with clients={clients}, alpha={alpha} gave some client fewer than min_examples={min_examples} "
            f"of the {n} examples in each of max_tries={max_tries} draws (the best left one with {smallest}); lower "
            f"min_examples or clients, or raise alpha"
        )
    owner = np.empty(n, np.int64)
    for c, row in zip(classes, counts, strict=True):
        owner[rng.permutation(np.flatnonzero(labels == c))] = np.repeat(np.arange(clients), row)
    return _by_owner(owner, clients)


def shards(labels: np.ndarray, clients: int, shards_per_client: int, seed: int) -> list[np.ndarray]:
    """Label skew as in McMahan et al. 2017 (arXiv:1602.05629): sort by label, cut into shards, deal each client a few.

    Args:
      labels: `[n]` int. Examples of a class are shuffled before the cut.
      clients: N >= 1.
      shards_per_client: >= 1; a client sees at most about this many classes (a shard may straddle a border). There are
        clients * shards_per_client shards, whose sizes differ by at most one.
      seed: any non-negative int.

    Raises:
      ValueError: an argument is below 1, or there are more shards than examples.

    >>> labels = np.repeat(np.arange(4), 6)
    >>> [len(ids) for ids in shards(labels, clients=3, shards_per_client=2, seed=0)]
    [8, 8, 8]
    """
    check_int("clients", clients)
    check_int("shards_per_client", shards_per_client)
    check_int("seed", seed, 0, 2**63 - 1)
    labels = _flat_labels(labels)
    total = clients * shards_per_client
    if total > len(labels):
        raise ValueError(
            f"clients={clients} times shards_per_client={shards_per_client} is {total} shards, but there are only "
            f"{len(labels)} examples; lower one of the two"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    cut = np.array_split(order, total)
    deal = rng.permutation(total).reshape(clients, shards_per_client)
    return [np.sort(np.concatenate([cut[i] for i in hand])) for hand in deal]


def by_key(keys: np.ndarray, seed: int | None = None) -> list[np.ndarray]:
    """One client per distinct natural key: a user, a hospital, a document.

    Args:
      keys: `[n]`, ints or strings.
      seed: None numbers the clients in the sorted order of their keys, `np.unique(keys)`; an int shuffles that order,
        for keys whose order means something (time, say) where the first clients should be a fair sample.

    Raises:
      ValueError: keys is not flat.

    >>> by_key(np.array(["bob", "ann", "bob"]))
    [array([1]), array([0, 2])]
    """
    if seed is not None:
        check_int("seed", seed, 0, 2**63 - 1)
    names, owner = np.unique(_flat_labels(keys, "keys"), return_inverse=True)
    if seed is not None:
        owner = np.random.default_rng(seed).permutation(len(names))[owner]
    return _by_owner(owner, len(names))


def _by_owner(owner, clients):
    """The indices of each client, ascending, from `owner [n]`."""
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    return np.split(np.argsort(owner, kind="stable"), ends)[:-1]


def _flat_labels(labels, name="labels"):
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"{name} has shape {labels.shape}; allowed: [n], one entry per example")
    return labels
