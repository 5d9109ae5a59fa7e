"""Looking at messages: a codec that remembers the singular values of what it encoded, and curves of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedkd_jax.check import check_fn, check_type
from fedkd_jax.codecs.base import encode, init_codec, named
from fedkd_jax.codecs.low_rank import compressible_by_rank, view_by_shape
from fedkd_jax.svd import MatrixView, truncated_svd
from fedkd_jax.types import Array, Codec, PyTree


def spectrum_codec(
    codec: Codec,
    *,
    compressible: Callable[[str, Array], bool] = compressible_by_rank,
    view: Callable[[str, Array], MatrixView] = view_by_shape,
) -> Codec:
    """`codec`, which also remembers the singular values of the last update it was given, before anything of it is lost.

    What travels, and what it costs, is as without it. As an uplink's it is in each client's state after a round,
    `state.clients.codec["spectrum"]`, `{path: [N, b, min(m, n)]}` float32, not increasing; as a downlink's in the server's. A
    client that was not in the cohort has those of its last round, at first zeros; a matrix that is not finite has zeros.

    Args:
        codec: what makes the message.
        compressible, view: as in `svd_codec`: of which leaves, and as which matrices.

    Raises:
        TypeError: no codec, or no functions.

    >>> from fedkd_jax import identity_codec
    >>> codec, update = spectrum_codec(identity_codec()), {"w": jnp.diag(jnp.array([1.0, 3.0])), "b": jnp.ones(2)}
    >>> payload, state = codec.encode(update, 0, jax.random.key(0), codec.init(update))
    >>> {path: values.round(4).tolist() for path, values in state["spectrum"].items()}
    {'w': [[3.0, 1.0]]}
    """
    check_type("codec", codec, Codec)
    check_fn("compressible", compressible, "(path, leaf) -> bool")
    check_fn("view", view, "(path, leaf) -> MatrixView")

    def singular_values(matrix: Array) -> Array:
        return truncated_svd(matrix, 1.0, method="svd").s  # no share exceeds 1: all of them

    def matrices(update: PyTree) -> dict[str, Array]:
        leaves = {name: leaf for name, leaf in named(update).items() if compressible(name, leaf)}
        return {name: view(name, leaf).matrices(leaf) for name, leaf in leaves.items()}

    def init(update: PyTree) -> dict[str, PyTree]:
        empty = {name: jnp.zeros((x.shape[0], min(x.shape[1:])), jnp.float32) for name, x in matrices(update).items()}
        return {"spectrum": empty, "codec": init_codec(codec, update)}

    def compress(update: PyTree, round, key, state):
        payload, own = encode(codec, update, round, key, state["codec"])
        values = {name: jax.vmap(singular_values)(stack) for name, stack in matrices(update).items()}
        return payload, {"spectrum": values, "codec": own}

    return Codec(compress, codec.decode, codec.decode_sum, init)


def cumulative_energy(singular_values: Array) -> np.ndarray:
    """The share of a matrix's energy in its first k values, sum_{i<=k} s_i^2 / sum_i s_i^2, for k = 1..r; NaN of zeros.

    Args:
        singular_values: `[..., r]`, not increasing.

    >>> cumulative_energy(np.array([2.0, 1.0, 0.0])).tolist()
    [0.8, 1.0, 1.0]
    """
    energy = np.cumsum(np.asarray(singular_values, np.float64) ** 2, axis=-1)
    total = energy[..., -1:]
    return np.divide(energy, total, out=np.full_like(energy, np.nan), where=total > 0)
