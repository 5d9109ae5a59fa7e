"""News recommendation as in the paper: a news encoder, a user encoder, a click score.

Reference: Wu et al., "Empowering news recommendation with pre-trained language models", SIGIR 2021, whose design the paper
follows. The news themselves are a table of tokens among the frozen parameters: impressions refer to them by number, and the
table is held once for all clients and models, whatever their number.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedkd_jax.models.base import from_nnx
from fedkd_jax.models.transformer import HIDDEN, AttentionPooling, Transformer, TransformerConfig
from fedkd_jax.types import Array, Model, Outputs


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
        history, candidates = (jnp.asarray(inputs[name]) for name in ("history", "candidates"))
        numbers = jnp.maximum(jnp.concatenate([history, candidates], axis=1), 0)
        batch, n = numbers.shape
        encoded = self.encode(self.news.get_value()[numbers.reshape(-1)])
        each = lambda x: x.reshape(batch, n, *x.shape[1:])  # noqa: E731
        vectors = each(self.pooling(encoded.last, encoded.mask))
        clicked, offered = vectors[:, : history.shape[1]], vectors[:, history.shape[1] :]
        user = self.user_pooling(clicked, history > 0)
        scores = jnp.einsum("bd,bcd->bc", user, offered) / self.config.width**0.5
        hidden, attention = (tuple(map(each, x)) for x in (encoded.hidden, encoded.attention))
        scores = jnp.where(candidates >= 0, scores, HIDDEN)
        return Outputs(scores, hidden, attention, each(encoded.mask) & (numbers > 0)[..., None])


def recommender(config: TransformerConfig, news: np.ndarray) -> Model:
    """A `Model` that scores candidate news for a reader, see `Recommender`.

    The table is no weight: train it as `freeze(recommender(config, news), is_table)`, or with embeddings frozen, `is_fixed`.

    Args:
        config: of the news encoder.
        news: `[m, L]` int32, the tokens of every news; row 0 stands for no news.

    >>> import jax
    >>> config = TransformerConfig(vocab=9, width=8, layers=1, heads=2, inner=16)
    >>> model = recommender(config, np.array([[0, 0], [1, 2]], np.int32))
    >>> sorted(model.init(jax.random.key(0)))
    ['embeddings', 'layers', 'news', 'pooling', 'user_pooling']
    """
    return from_nnx(lambda rngs: Recommender(config, news, rngs=rngs))
