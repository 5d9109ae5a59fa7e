"""A multilayer perceptron."""

from collections.abc import Sequence

import jax
from flax import nnx

from fedkd_jax.models.base import from_nnx
from fedkd_jax.types import Array, Model, Outputs


class MLP(nnx.Module):
    """Dense layers with ReLU between them; inputs `[B, ...]` are flattened.

    >>> MLP((64, 32, 10), rngs=nnx.Rngs(0)).depth
    2
    """

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.depth = len(widths) - 1
        for i in range(self.depth):
            setattr(self, f"dense_{i}", nnx.Linear(widths[i], widths[i + 1], rngs=rngs))

    def __call__(self, inputs: Array) -> Outputs:
        x, hidden = inputs.reshape(inputs.shape[0], -1), []
        for i in range(self.depth - 1):
            x = jax.nn.relu(getattr(self, f"dense_{i}")(x))
            hidden.append(x)
        return Outputs(getattr(self, f"dense_{self.depth - 1}")(x), tuple(hidden))


def mlp(widths: Sequence[int]) -> Model:
    """An MLP; hidden states are the activations after each ReLU, lowest first.

    Args:
        widths: input size, hidden widths, classes: `(64, 128, 10)` is one hidden layer of 128.

    Raises:
        ValueError: fewer than two widths, or one below 1.

    >>> import jax, jax.numpy as jnp
    >>> model = mlp((64, 128, 10))
    >>> out = model.apply(model.init(jax.random.key(0)), jnp.ones((3, 8, 8, 1)))
    >>> out.logits.shape, [h.shape for h in out.hidden]
    ((3, 10), [(3, 128)])
    """
    widths = tuple(widths)
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths is {widths}; allowed: two or more positive integers")
    return from_nnx(lambda rngs: MLP(widths, rngs=rngs))
