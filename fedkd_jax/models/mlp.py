"""A multilayer perceptron."""

from collections.abc import Sequence

import jax
from flax import nnx

from fedkd_jax.check import check_int
from fedkd_jax.models.base import from_nnx
from fedkd_jax.types import Array, Model, Outputs


class MLP(nnx.Module):
    """Dense layers with ReLU between them; inputs `[B, ...]` are flattened.

    >>> MLP((64, 32, 10), rngs=nnx.Rngs(0)).depth
    2
    """

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.depth, self.size = len(widths) - 1, widths[0]
        for i in range(self.depth):
            setattr(self, f"dense_{i}", nnx.Linear(widths[i], widths[i + 1], rngs=rngs))

    def __call__(self, inputs: Array) -> Outputs:
        x, hidden = inputs.reshape(inputs.shape[0], -1), []
        if x.shape[1] != self.size:
            raise ValueError(f"inputs has shape {inputs.shape}; allowed: [B, ...] with {self.size} numbers in a row")
        for i in range(self.depth - 1):
            x = jax.nn.relu(getattr(self, f"dense_{i}")(x))
            hidden.append(x)
        return Outputs(getattr(self, f"dense_{self.depth - 1}")(x), tuple(hidden))


def mlp(widths: Sequence[int]) -> Model:
    """An MLP; hidden states are the activations after each ReLU, lowest first.

    Args:
        widths: input size, hidden widths, classes: `(64, 128, 10)` is one hidden layer of 128.

    Raises:
        TypeError: a width that is no integer.
        ValueError: fewer than two widths, or one below 1; when used, inputs of another size.

    >>> import jax, jax.numpy as jnp
    >>> model = mlp((64, 128, 10))
    >>> out = model.apply(model.init(jax.random.key(0)), jnp.ones((3, 8, 8, 1)))
    >>> out.logits.shape, [h.shape for h in out.hidden]
    ((3, 10), [(3, 128)])
    """
    widths = tuple(widths)
    for i, width in enumerate(widths):
        check_int(f"widths[{i}]", width)
    if len(widths) < 2:
        raise ValueError(f"widths is {widths}; allowed: two or more")
    return from_nnx(lambda rngs: MLP(widths, rngs=rngs))
