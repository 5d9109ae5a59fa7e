"""FedPAQ: Reisizadeh et al., "FedPAQ: a communication-efficient federated learning method with periodic averaging and
quantization", AISTATS 2020.

FedAvg whose clients send Q(w_i - w), every number as a small integer, rounded at random so that E Q(x) = x (`quantise`). The
FedKD paper's table counts the way down at the same width, so it is quantised here too unless told otherwise.
"""

from typing import Any

from fedkd_jax.algorithms.fedavg import fedavg
from fedkd_jax.codecs import quantise
from fedkd_jax.types import Algorithm, Model


def fedpaq(model: Model, *, bits: int, downlink_bits: int | None = None, **options: Any) -> Algorithm:
    """FedPAQ of any model: `bits` a number up and `downlink_bits` down, and 4 bytes a tensor.

    Args:
        model: the shared model.
        bits: of the way up, 2 to 16.
        downlink_bits: of the way down, by default the same; 32 sends it raw, as in FedPAQ's own paper.
        **options: those of `fedavg` but the codecs.

    Raises:
        ValueError: bits out of range.

    >>> import optax
    >>> from fedkd_jax import mlp
    >>> algorithm = fedpaq(mlp((64, 32, 10)), bits=8, optimizer=optax.sgd(0.1), batch=10)
    >>> sorted(algorithm.predict)
    ['model']
    """
    downlink_bits = bits if downlink_bits is None else downlink_bits
    downlink = None if downlink_bits == 32 else quantise(downlink_bits)
    return fedavg(model, uplink=quantise(bits), downlink=downlink, **options)
