"""News recommendation as in the paper: a news encoder, a user encoder, a click score.

Reference: Wu et al., "Empowering news recommendation with pre-trained language models", SIGIR 2021, whose design the paper
follows. The news themselves are a table of tokens among the frozen parameters: impressions refer to them by number, and the
table is held once for all clients and models, whatever their number.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedkd_jax.check import check_type
from fedkd_jax.models.base import from_nnx
from fedkd_jax.models.transformer import HIDDEN, AttentionPooling, Transformer, TransformerConfig
from fedkd_jax.types import Array, Model, Outputs

ENCODED_TOKENS = 8_192  # at a time, of the news that are encoded for evaluation


class Recommender(Transformer):
    """Scores of candidate news: a news vector is attention pooling over its tokens, a user vector attention pooling over the
    vectors of clicked news, the score their inner product over sqrt(width). News 0 is one that nobody knows; candidate -1 is
    none, and its score is `HIDDEN`.

    Hidden states and attention maps of all news of an impression, history first, are what it returns: `[B, N, L, d]` and
    `[B, N, heads, L, L]`. Inputs: `{"history": [B, H] int, "candidates": [B, C] int}`, rows of the table.

    >>> config = TransformerConfig(vocab=9, width=8, layers=1, heads=2, inner=16)
    >>> model = Recommender(config, np.array([[0, 0], [1, 2], [3, 0]], np.int32), rngs=nnx.Rngs(0))
    >>> out = model({"history": jnp.array([[1, 0]]), "candidates": jnp.array([[2, 1, 0]])})
    >>> out.logits.shape, out.hidden[0].shape, out.mask[0, 1:3].tolist()
    ((1, 3), (1, 5, 2, 8), [[False, False], [True, False]])
    """

    def __init__(self, config: TransformerConfig, news: np.ndarray, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.news = nnx.Param(jnp.asarray(news))
        self.pooling = AttentionPooling(config.width, rngs=rngs)
        self.user_pooling = AttentionPooling(config.width, rngs=rngs)

    def __call__(self, inputs: dict[str, Array]) -> Outputs:
        numbers = _numbers(inputs)
        encoded = self.encode(self.news.get_value()[numbers.reshape(-1)])
        each = lambda x: x.reshape(*numbers.shape, *x.shape[1:])  # noqa: E731
        scores = self._score(inputs, each(self.pooling(encoded.last, encoded.mask)))
        hidden, attention = (tuple(map(each, x)) for x in (encoded.hidden, encoded.attention))
        return Outputs(scores, hidden, attention, each(encoded.mask) & (numbers > 0)[..., None])

    def _score(self, inputs: dict[str, Array], vectors: Array) -> Array:
        history, candidates = (jnp.asarray(inputs[name]) for name in ("history", "candidates"))
        clicked, offered = jnp.split(vectors, [history.shape[1]], axis=1)
        user = self.user_pooling(clicked, history > 0)
        scores = jnp.einsum("bd,bcd->bc", user, offered) / self.config.width**0.5
        return jnp.where(candidates >= 0, scores, HIDDEN)

    def scorer(self, inputs: dict[str, Array]) -> Callable[[dict[str, Array]], Array]:
        """Encodes every news of these inputs once; the function returned scores any rows of them. The work is that of the
        different news, not of the impressions; in a row of other inputs a news not among these makes the score NaN.
        """
        news, numbers = self.news.get_value(), _numbers(inputs).reshape(-1)
        there = jnp.zeros(len(news), bool).at[numbers].set(True)
        size = min(len(news), numbers.size)
        chunk = max(1, min(size, ENCODED_TOKENS // news.shape[1]))
        size = -(-size // chunk) * chunk
        which, row = jnp.nonzero(there, size=size, fill_value=0)[0], jnp.where(there, jnp.cumsum(there) - 1, size)

        def encode(i, vectors):
            encoded = self.encode(news[jax.lax.dynamic_slice_in_dim(which, i * chunk, chunk)])
            pooled = self.pooling(encoded.last, encoded.mask)
            return jax.lax.dynamic_update_slice_in_dim(vectors, pooled, i * chunk, axis=0)

        chunks = (there.sum() + chunk - 1) // chunk
        vectors = jax.lax.fori_loop(0, chunks, encode, jnp.zeros((size, self.config.width)))
        return lambda rows: self._score(rows, vectors.at[row[_numbers(rows)]].get(mode="fill", fill_value=jnp.nan))


def _numbers(inputs: dict[str, Array]) -> Array:
    """All news of every impression, history first, `[B, N]`."""
    return jnp.maximum(jnp.concatenate([jnp.asarray(inputs[name]) for name in ("history", "candidates")], axis=1), 0)


def recommender(config: TransformerConfig, news: np.ndarray) -> Model:
    """A `Model` that scores candidate news for a reader, see `Recommender`.

    The table is no weight: train it as `freeze(recommender(config, news), is_table)`, or with embeddings frozen, `is_fixed`.

    Args:
        config: of the news encoder.
        news: `[m, L]` int32, the tokens of every news; row 0 stands for no news.

    Raises:
        TypeError: no `TransformerConfig`.
        ValueError: news that are not integers `[m, L]` of the vocabulary, or none, or longer than `positions`.

    >>> config = TransformerConfig(vocab=9, width=8, layers=1, heads=2, inner=16)
    >>> model = recommender(config, np.array([[0, 0], [1, 2]], np.int32))
    >>> sorted(model.init(jax.random.key(0)))
    ['embeddings', 'layers', 'news', 'pooling', 'user_pooling']
    """
    check_type("config", config, TransformerConfig)
    news = np.asarray(news)
    fits = news.ndim == 2 and news.size and news.dtype.kind in "iu" and news.shape[1] <= config.positions
    if not fits or news.min() < 0 or news.max() >= config.vocab:
        allowed = f"integers [m, L] of 0 to {config.vocab - 1}, L at most {config.positions}"
        held = f", {news.min()} to {news.max()}" if fits else ""
        raise ValueError(f"news is {news.dtype}{list(news.shape)}{held}; allowed: {allowed}")
    return from_nnx(lambda rngs: Recommender(config, news, rngs=rngs))
