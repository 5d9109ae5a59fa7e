"""FetchSGD: Rothchild et al., "FetchSGD: communication-efficient federated learning with sketching", ICML 2020.

Clients send the count sketch of their update. Sketches are linear, so their mean is the sketch of the mean; the server keeps
momentum and the error of what it has not applied yet as sketches too, finds the k largest numbers in them, applies these and
sends them down (`server_sketch_codec` has the equations). Clients keep no state. As in FedKD's table, and unlike in the paper,
whose clients send the gradient of one large batch, the message is the update of several local steps.
"""

from typing import Any

from fedkd_jax.algorithms.fedavg import fedavg
from fedkd_jax.codecs import server_sketch_codec, sketch_codec
from fedkd_jax.types import Algorithm, Model, Number


def fetchsgd(
    model: Model, *, rows: int = 5, columns: int, share: Number, momentum: Number = 0.9, seed: int = 0, **options: Any
) -> Algorithm:
    """FetchSGD of any model: `rows` x `columns` numbers up, twice `share` of the model's numbers down.

    Args:
        model: the shared model.
        rows, columns: of the sketch. The fewer columns, the more numbers fall together.
        share: of the numbers that are applied each round, in (0, 1].
        momentum: of the server, 0 up to 1; numbers that were sent lose theirs.
        seed: of the hash functions.
        **options: those of `fedavg` but the codecs.

    Raises:
        ValueError: a size, share or momentum out of range.

    >>> import optax
    >>> from fedkd_jax import mlp
    >>> algorithm = fetchsgd(mlp((64, 32, 10)), columns=100, share=0.1, optimizer=optax.sgd(0.1), batch=10)
    >>> sorted(algorithm.predict)
    ['model']
    """
    up = sketch_codec(rows, columns, seed=seed)
    down = server_sketch_codec(rows, columns, share, momentum=momentum, seed=seed)
    return fedavg(model, uplink=up, downlink=down, **options)
