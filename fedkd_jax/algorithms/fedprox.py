"""FedProx: Li et al., "Federated optimization in heterogeneous networks", MLSys 2020.

FedAvg whose clients minimise h_i(w) = F_i(w) + (mu / 2) |w - w^t|^2, w^t being the shared model at the start of the round, so
that none drifts far from it: every local gradient gains mu (w - w^t). mu = 0 is FedAvg. What travels is FedAvg's.
"""

from typing import Any

import jax
import optax

from fedkd_jax.algorithms.fedavg import fedavg
from fedkd_jax.check import check_number, check_type
from fedkd_jax.types import Algorithm, Model, Number


def proximal(mu: Number) -> optax.GradientTransformation:
    """Adds mu (w - w^t) to the gradient, w^t being the parameters that the state was made from.

    >>> import jax.numpy as jnp
    >>> pull = proximal(0.5)
    >>> gradient, _ = pull.update(jnp.float32(1.0), pull.init(jnp.float32(2.0)), jnp.float32(4.0))
    >>> float(gradient)
    2.0
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params is None; allowed: the parameters that the gradient belongs to")
        return jax.tree.map(lambda g, w, start: g + mu * (w - start), updates, params, state), state

    return optax.GradientTransformation(lambda params: params, update)


def fedprox(model: Model, *, mu: Number, optimizer: optax.GradientTransformation, **options: Any) -> Algorithm:
    """FedProx of any model.

    Args:
        model: the shared model.
        mu: weight of the proximal term, 0 or more.
        optimizer: optax, of the clients; it sees the gradient of h_i, and starts anew each round.
        **options: those of `fedavg` but `reset_optimizer`.

    Raises:
        ValueError: a negative mu, or `reset_optimizer`, whose state would remember another round's w^t.

    >>> from fedkd_jax import mlp
    >>> algorithm = fedprox(mlp((64, 32, 10)), mu=0.1, optimizer=optax.sgd(0.1), batch=10)
    >>> sorted(algorithm.predict)
    ['model']
    """
    check_number("mu", mu, "[0, inf)")
    check_type("optimizer", optimizer, optax.GradientTransformation)
    if not options.pop("reset_optimizer", True):
        raise ValueError("reset_optimizer is False; allowed: True, as the proximal term is that of one round")
    return fedavg(model, optimizer=optax.chain(proximal(mu), optimizer), **options)
