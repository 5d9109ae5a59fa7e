"""Differential privacy of clients: what hides whose data a run has seen, and what has been spent of it.

DP-FedAvg (McMahan et al., "Learning differentially private recurrent language models", ICLR 2018) with cohorts of a fixed size
K. Of no update more than C = max_norm is counted, all weigh the same, and the sum is divided by K, whoever is counted:

    release = (sum_k u_k min(1, C / |u_k|) + N(0, (z C)^2)) / K,          z = noise_multiplier.

What holds: neighbours differ in all the data of one client, who is replaced by another (cohorts have a fixed size, so nobody
can be left out); that moves the sum by 2 C at most. All that follows from releases is as private as they are: the server's
steps, the downlink's codec with its ranks, what the shared model says of anybody else's data. What is not covered: the
messages, their ranks and sizes, and the losses that a `RoundInfo` reports, all of which the server, who is trusted, sees in the
clear; scores on clients' own test examples; and a client's own teacher, which has learned from its data without noise, and
never leaves it. Noise and cohorts follow from the run's key: who has it, or the config with its seed, can take the noise away.

- Clipping is where it counts, on what the server has decoded, after compression. A truncated SVD is a projection, so it does
  not lengthen an update, but rounding to few bits may, and hostile clients need not clip.
- The rank that keeps a share T of an update's energy is a function of the client's data and travels in the open: whoever sees
  single messages, or how long they are, learns it. Noise at the server does not hide it.
- Noise has full rank: a noised mean is sent down raw, or nearly so, as no few factors have most of its energy.
- Secure aggregation, by which a server sees only the sum of messages, adds up numbers place by place. Factors cannot be added
  so: U_1 V_1' + U_2 V_2' is not (U_1 + U_2)(V_1 + V_2)'. For it FedKD's clients would have to send dense updates, or first
  agree on one of the factors as PowerSGD's workers do, and on one rank. It is not simulated: the server sees single messages.
- Noise at the clients (`private_send`) comes before the encoding, so that all of a message, its rank included, is made of the
  noised update. For raw messages, of which only the sum is seen, it is the formula above. A codec that is not linear leaves
  no such sum; then each message is as private as its own noise alone, z / sqrt(K).
- It is a simulation: noise is float32 from JAX's generator, whose last bits would give a real release away.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from fedkd_jax.aggregate import all_finite, clip_update
from fedkd_jax.check import check_int, check_number
from fedkd_jax.types import Aggregator, Key, Leaf, Number, PyTree, SendFn


def add_noise(tree: PyTree, std: Number, key: Key) -> PyTree:
    """Every number with independent Gaussian noise; for std 0 the tree as it is.

    >>> import jax.numpy as jnp
    >>> float(add_noise(jnp.zeros(1000), 2.0, jax.random.key(0)).std().round())
    2.0
    """
    if std == 0:
        return tree
    return optax.tree.add_scale(tree, float(std), optax.tree.random_like(key, tree, jax.random.normal))


def private_mean(max_norm: Number, noise_multiplier: Number) -> Aggregator:
    """DP-FedAvg with noise at the server, see above; the round needs `weight_fn=uniform_weight` or another that is 1.

    Args:
        max_norm: C.
        noise_multiplier: z; 0 adds nothing and promises nothing.

    Raises:
        ValueError: C not above 0, z below 0.

    >>> import jax.numpy as jnp
    >>> aggregator = private_mean(5.0, 0.0)
    >>> aggregator.bound(jnp.array([6.0, 8.0])).tolist(), float(aggregator.noise(jnp.float32(3.0), jax.random.key(0)))
    ([3.0, 4.0], 3.0)
    """
    _check_noise(noise_multiplier)
    clip, std = clip_update(max_norm), noise_multiplier * max_norm
    return Aggregator(bound=clip, noise=lambda total, key: add_noise(total, std, key))


def private_send(max_norm: Number, noise_multiplier: Number, cohort: int) -> SendFn:
    """`send_fn` of clients who clip and add their part of the noise themselves, N(0, (z C)^2 / K), before a message is encoded.

    The K parts add up to `private_mean`'s noise, for whoever sees the sum only. Give the round `aggregator=fixed_mean()` and
    `weight_fn=fixed_weight`, by which clients without examples send noise, too; of a message that is not finite only noise is
    sent. A message that is lost takes its noise with it, and so does one of a client whose new state is not finite: n of K
    have that of z sqrt(n / K).

    Raises:
        ValueError: C not above 0, z below 0, K below 1.

    >>> import jax.numpy as jnp
    >>> private_send(5.0, 0.0, cohort=8)(jnp.array([6.0, 8.0]), 3, jax.random.key(0)).tolist()
    [3.0, 4.0]
    """
    _check_noise(noise_multiplier)
    check_int("cohort", cohort)
    clip, std = clip_update(max_norm), noise_multiplier * max_norm / math.sqrt(cohort)

    def send(message: PyTree, client_id: Leaf, key: Key) -> PyTree:
        finite = all_finite(message)
        return add_noise(clip(jax.tree.map(lambda x: jnp.where(finite, x, 0), message)), std, key)

    return send


def fixed_mean() -> Aggregator:
    """The sum divided by K, whoever is counted, without bound or noise of its own: for updates that are noised already.

    >>> fixed_mean().noise(3.0, None)
    3.0
    """
    return Aggregator(noise=lambda total, key: total)


def privacy_spent(noise_multiplier: Number, cohort: int, population: int, rounds: int, delta: Number = 1e-5) -> float:
    """Epsilon after so many rounds with noise multiplier z, by the accountant dp-accounting; infinite without noise.

    Every round's cohort is a uniform sample of K out of N clients without replacement, which nobody is told: the bound for
    that and the relation "replace one" is Wang, Balle and Kasiviswanathan's (AISTATS 2019), in Renyi divergence. It is loose
    where there is little noise, so the smaller is taken of it and of what no sampling at all would cost, which is exact (Balle
    and Wang, ICML 2018) and, as sampling does no harm, a bound. One client replaced moves a sum of clipped updates by 2 C, so
    the accountant is told z / 2: what its `GaussianDpEvent` is given, for this relation, is the deviation over the sensitivity.

    The bound for samples is that of clients who keep nothing from round to round. What a client keeps (FedKD's teacher, a
    codec's state) tells in which rounds it took part, so the rounds are no longer sampled independently. For these, and where
    cohorts are known, let population be K, and rounds the largest number of rounds that any client took part in.

    Args:
        noise_multiplier: z, the noise's deviation on the sum over C.
        cohort, population: K and N.
        rounds: how many.
        delta: the probability of epsilon not holding, in (0, 1); well below 1 / N.

    Raises:
        ValueError: an argument out of range.
        ModuleNotFoundError: dp-accounting is not installed.

    >>> [round(privacy_spent(z, 100, 100, rounds=1), 2) for z in (2.0, 20.0)]
    [4.38, 0.34]
    """
    _check_noise(noise_multiplier)
    check_int("population", population)
    check_int("cohort", cohort, 1, population)
    check_int("rounds", rounds, 0)
    check_number("delta", delta, "(0, 1)")
    if rounds == 0 or noise_multiplier == 0:
        return 0.0 if rounds == 0 else math.inf
    return _epsilon(float(noise_multiplier) / 2, cohort, population, rounds, float(delta))


@functools.lru_cache(maxsize=4096)
def _epsilon(sigma: float, cohort: int, population: int, rounds: int, delta: float) -> float:
    """`sigma` is the deviation over the sensitivity."""
    try:
        import dp_accounting  # not at the top: it is an extra
    except ModuleNotFoundError as error:
        allowed = "pip install dp-accounting, or this package with its extra 'privacy'"
        raise ModuleNotFoundError(f"dp_accounting is not there for epsilon; allowed: {allowed}") from error
    plain = float(dp_accounting.get_epsilon_gaussian(sigma / math.sqrt(rounds), delta))
    if cohort == population:
        return plain
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    sampled = dp_accounting.SampledWithoutReplacementDpEvent(population, cohort, dp_accounting.GaussianDpEvent(sigma))
    return min(plain, float(accountant.compose(sampled, rounds).get_epsilon(delta)))


def _check_noise(noise_multiplier: Number) -> None:
    check_number("noise_multiplier", noise_multiplier, "[0, inf)")
