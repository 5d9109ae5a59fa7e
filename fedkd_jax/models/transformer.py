"""A BERT-architecture encoder whose layers are stacked and scanned, and the models for text that are built on it.

Parameters are `{"embeddings": ..., "layers": ..., ...}`: every leaf of "layers" has a leading axis `[layers]`, so that compile
time does not grow with depth and the first k layers are a slice; "embeddings" is what a pretrained model freezes. A position
is padding where its token is `pad`; padding is hidden from attention and, through `Outputs.mask`, from the losses.

Reference: Devlin et al., "BERT", NAACL 2019. Layers are post-norm as there; `causal=True` hides what comes later.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from fedkd_jax.check import check_int, check_number, check_type
from fedkd_jax.models.base import from_nnx
from fedkd_jax.svd import MatrixView, matrix_view
from fedkd_jax.types import Array, Model, Outputs

_EXACT, _TANH = (functools.partial(jax.nn.gelu, approximate=approximate) for approximate in (False, True))
ACTIVATIONS = {  # by Hugging Face's names, several of which are one function
    **dict.fromkeys(("gelu", "gelu_python"), _EXACT),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _TANH),
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
HIDDEN = -1e9  # what is added to the score of a position that must not be seen


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a transformer.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1, a width that the heads do not divide, a negative epsilon, an unknown activation or dtype.

    >>> TransformerConfig(vocab=100, width=64, heads=4).head_width
    16
    """

    vocab: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    inner: int = 1536  # of the feed-forward layers
    positions: int = 512  # the longest text
    types: int = 2  # token types; only the first is used
    epsilon: float = 1e-12  # of layer normalisation
    activation: str = "gelu"
    pad: int = 0  # the token that is no token
    causal: bool = False
    dtype: str = "float32"  # of the computation, or bfloat16; parameters and outputs are float32
    # compute what is inside a layer again when it is differentiated, instead of keeping it: less memory, a forward pass more.
    # Hidden states and attention maps are outputs, and kept
    remat: bool = False

    def __post_init__(self):
        for name in ("vocab", "width", "layers", "heads", "inner", "positions", "types"):
            check_int(name, getattr(self, name))
        check_int("pad", self.pad, -(2**31))  # of no token where nothing is padding
        check_number("epsilon", self.epsilon, "[0, inf)")
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}; allowed: a divisor of width, {self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; allowed: float32, bfloat16")

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


class Encoded(NamedTuple):
    """What the layers make of a text.

    >>> Encoded._fields
    ('last', 'hidden', 'attention', 'mask')
    """

    last: jax.Array  # [B, L, d]
    hidden: tuple[jax.Array, ...]  # of each layer, lowest first, [B, L, d] float32
    attention: tuple[jax.Array, ...]  # of each layer, [B, heads, L, L] float32, rows sum to 1
    mask: jax.Array  # [B, L] bool, False where padding


class Layer(nnx.Module):
    """Self-attention and a feed-forward network, each with a residual connection and layer normalisation after it.

    >>> layer = Layer(TransformerConfig(width=8, heads=2, inner=16), rngs=nnx.Rngs(0))
    >>> [x.shape for x in layer(jnp.ones((1, 3, 8)), jnp.zeros((1, 1, 3, 3)))]
    [(1, 3, 8), (1, 2, 3, 3)]
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.width, config.inner
        linear = functools.partial(
            nnx.Linear, dtype=jnp.dtype(config.dtype), kernel_init=jax.nn.initializers.normal(0.02), rngs=rngs
        )
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.output = linear(width, width)
        self.attention_norm = nnx.LayerNorm(width, epsilon=config.epsilon, rngs=rngs)
        self.up, self.down = linear(width, inner), linear(inner, width)
        self.norm = nnx.LayerNorm(width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, x: Float[jax.Array, "b l d"], bias: Float[jax.Array, "b 1 l l"]) -> tuple[Array, Array]:
        split = lambda y: y.reshape(*y.shape[:2], self.config.heads, self.config.head_width)  # noqa: E731
        query, key, value = (split(f(x)) for f in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * self.config.head_width**-0.5, key)
        attention = jax.nn.softmax(scores.astype(jnp.float32) + bias)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention.astype(value.dtype), value)
        middle = self.attention_norm(x + self.output(mixed.reshape(x.shape)))  # float32, like all normalisation
        inner = ACTIVATIONS[self.config.activation](self.up(middle))
        return self.norm(middle + self.down(inner)).astype(x.dtype), attention


class Embeddings(nnx.Module):
    """Of words, positions and the first token type, added up and normalised.

    >>> Embeddings(TransformerConfig(vocab=9, width=8, heads=2), rngs=nnx.Rngs(0))(jnp.array([[1, 2, 0]])).shape
    (1, 3, 8)
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, embedding_init=jax.nn.initializers.normal(0.02), rngs=rngs)
        self.word, self.position = embed(config.vocab, config.width), embed(config.positions, config.width)
        self.type = embed(config.types, config.width)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, tokens: Int[jax.Array, "b l"]) -> Float[jax.Array, "b l d"]:
        length = tokens.shape[1]
        return self.norm(self.word(tokens) + (self.position.embedding[:length] + self.type.embedding[:1])[None])


def stack_layers(build: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules as one, whose parameters have a leading axis `[layers]`; to be used with `scan_layers`.

    >>> stack_layers(lambda rngs: nnx.Linear(2, 3, rngs=rngs), 5, nnx.Rngs(0)).kernel.shape
    (5, 2, 3)
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), layers)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(build(nnx.Rngs(key))))(keys))


class Transformer(nnx.Module):
    """Embeddings and layers, what all models for text begin with.

    >>> config = TransformerConfig(vocab=9, width=8, layers=3, heads=2, inner=16)
    >>> encoded = Transformer(config, rngs=nnx.Rngs(0)).encode(jnp.array([[1, 2, 0]]))
    >>> encoded.last.shape, len(encoded.hidden), encoded.attention[0].shape, encoded.mask.tolist()
    ((1, 3, 8), 3, (1, 2, 3, 3), [[True, True, False]])
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = stack_layers(lambda rngs: Layer(config, rngs=rngs), config.layers, rngs)

    def encode(self, tokens: Int[Array, "b l"]) -> Encoded:
        """Tokens through all layers.

        Tokens that are not in the vocabulary are NaN.

        Raises:
            ValueError: tokens that are not integers `[B, L]`, or texts longer than `positions`.
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens is {tokens.dtype}{list(tokens.shape)}; allowed: integers [B, L]")
        length = tokens.shape[1]
        if length > self.config.positions:
            raise ValueError(f"tokens have length {length}; allowed: at most positions, {self.config.positions}")
        mask = tokens != self.config.pad
        seen = mask[:, None, None, :]
        if self.config.causal:
            seen = seen & jnp.tri(length, dtype=bool)[None, None]
        bias = jnp.broadcast_to(jnp.where(seen, 0.0, HIDDEN), (len(tokens), 1, length, length))
        graphdef, layers = nnx.split(self.layers)

        def layer(x, params):
            x, attention = nnx.merge(graphdef, params)(x, bias)
            return x, (x, attention)

        if self.config.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)  # a loop's two passes have nothing in common to be found
        x = self.embeddings(tokens).astype(self.config.dtype)
        last, (hidden, attention) = jax.lax.scan(layer, x, layers)
        each = lambda stacked: tuple(stacked[i].astype(jnp.float32) for i in range(self.config.layers))  # noqa: E731
        return Encoded(last, each(hidden), each(attention), mask)


class AttentionPooling(nnx.Module):
    """A weighted mean over positions, weights softmax_i(q . tanh(W x_i + b)); at first the plain mean, as q starts at zero.

    >>> pool = AttentionPooling(4, rngs=nnx.Rngs(0))
    >>> pool(jnp.array([[[1.0, 2, 3, 4], [9, 9, 9, 9]]]), jnp.array([[True, False]])).tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.query = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[jax.Array, "b l d"], mask: Bool[jax.Array, "b l"]) -> Float[jax.Array, "b d"]:
        x = x.astype(jnp.float32)
        scores = jnp.tanh(self.dense(x)) @ self.query.get_value()
        weights = jax.nn.softmax(jnp.where(mask, scores, HIDDEN))
        return jnp.einsum("bl,bld->bd", weights, x)


class TextClassifier(Transformer):
    """One class per text: attention pooling and a dense layer. Inputs: tokens `[B, L]` int.

    >>> config = TransformerConfig(vocab=9, width=8, layers=1, heads=2, inner=16)
    >>> TextClassifier(config, 2, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 0]])).logits.shape
    (1, 2)
    """

    def __init__(self, config: TransformerConfig, classes: int, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.pooling = AttentionPooling(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, classes, rngs=rngs)

    def __call__(self, inputs: Int[Array, "b l"]) -> Outputs:
        encoded = self.encode(inputs)
        return _outputs(self.head(self.pooling(encoded.last, encoded.mask)), encoded)


class Tagger(Transformer):
    """One class per token, among those that the example's client uses: logits of others are `HIDDEN`, so that they have no
    probability and no gradient. Inputs: `{"tokens": [B, L] int, "classes": [B, C] bool}`.

    >>> config = TransformerConfig(vocab=9, width=8, layers=1, heads=2, inner=16)
    >>> inputs = {"tokens": jnp.array([[1, 2, 0]]), "classes": jnp.array([[True, False, True]])}
    >>> Tagger(config, 3, rngs=nnx.Rngs(0))(inputs).logits[0, 0, 1].item() == HIDDEN
    True
    """

    def __init__(self, config: TransformerConfig, classes: int, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.head = nnx.Linear(config.width, classes, rngs=rngs)

    def __call__(self, inputs: dict[str, Array]) -> Outputs:
        encoded = self.encode(inputs["tokens"])
        logits = self.head(encoded.last.astype(jnp.float32))
        return _outputs(jnp.where(inputs["classes"][:, None, :], logits, HIDDEN), encoded)


class LanguageModel(Transformer):
    """The next token at every position; a causal transformer. Inputs: tokens `[B, L]` int, logits `[B, L, vocab]`.

    >>> config = TransformerConfig(vocab=9, width=8, layers=1, heads=2, inner=16, causal=True)
    >>> LanguageModel(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 0]])).logits.shape
    (1, 3, 9)
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocab, rngs=rngs)

    def __call__(self, inputs: Int[Array, "b l"]) -> Outputs:
        encoded = self.encode(inputs)
        return _outputs(self.head(encoded.last.astype(jnp.float32)), encoded)


def _outputs(logits: Array, encoded: Encoded) -> Outputs:
    return Outputs(logits, encoded.hidden, encoded.attention, encoded.mask)


def text_classifier(config: TransformerConfig, classes: int) -> Model:
    """A `Model` that gives a text one of `classes` classes.

    Raises:
        TypeError: no `TransformerConfig`, or `classes` that is no integer.
        ValueError: `classes` below 1.

    >>> config = TransformerConfig(vocab=9, width=8, layers=2, heads=2, inner=16)
    >>> model = text_classifier(config, 2)
    >>> params = model.init(jax.random.key(0))
    >>> params["layers"]["up"]["kernel"].shape, model.apply(params, jnp.array([[1, 2, 0]])).hidden[1].shape
    ((2, 8, 16), (1, 3, 8))
    """
    check_type("config", config, TransformerConfig)
    check_int("classes", classes)
    return from_nnx(lambda rngs: TextClassifier(config, classes, rngs=rngs))


def tagger(config: TransformerConfig, classes: int) -> Model:
    """A `Model` that gives every token one of `classes` classes, see `Tagger`.

    Raises:
        TypeError, ValueError: as `text_classifier`.

    >>> sorted(tagger(TransformerConfig(vocab=9, width=8, layers=2, heads=2), 5).init(jax.random.key(0)))
    ['embeddings', 'head', 'layers']
    """
    check_type("config", config, TransformerConfig)
    check_int("classes", classes)
    return from_nnx(lambda rngs: Tagger(config, classes, rngs=rngs))


def language_model(config: TransformerConfig) -> Model:
    """A `Model` that predicts the next token, see `LanguageModel`.

    Raises:
        TypeError: no `TransformerConfig`.
        ValueError: a config that is not causal.

    >>> model = language_model(TransformerConfig(vocab=9, width=8, layers=2, heads=2, causal=True))
    >>> sorted(model.init(jax.random.key(0)))
    ['embeddings', 'head', 'layers']
    """
    check_type("config", config, TransformerConfig)
    if not config.causal:
        raise ValueError(f"causal is {config.causal}; allowed: True for a language model")
    return from_nnx(lambda rngs: LanguageModel(config, rngs=rngs))


# ---- what a federated method has to know of such parameters --------------------------------------------------------------


def is_fixed(path: tuple[str, ...], leaf: Array | jax.ShapeDtypeStruct) -> bool:
    """For `freeze`: the embeddings, and tables that are data, such as a recommender's news.

    >>> is_fixed(("embeddings", "word", "embedding"), jnp.zeros((9, 8))), is_fixed(("head", "bias"), jnp.zeros(2))
    (True, False)
    """
    return path[0] == "embeddings" or is_table(path, leaf)


def is_table(path: tuple[str, ...], leaf: Array | jax.ShapeDtypeStruct) -> bool:
    """For `freeze`: tables that are data only.

    >>> is_table(("news",), jnp.zeros((9, 8), jnp.int32)), is_table(("embeddings", "word", "embedding"), jnp.zeros((9, 8)))
    (True, False)
    """
    del path
    return not jnp.issubdtype(leaf.dtype, jnp.inexact)


def layer_view(path: str, leaf: Array) -> MatrixView:
    """For `svd_codec(view=...)`: of what is under "layers", the first axis counts matrices.

    >>> layer_view("layers/up/kernel", jnp.zeros((6, 8, 16))).stack, layer_view("head/kernel", jnp.zeros((8, 2))).stack
    (1, 0)
    """
    return matrix_view(leaf.shape, stack=int(_is_stacked(path)))


def layer_compressible(path: str, leaf: Array) -> bool:
    """For `svd_codec(compressible=...)`: what has two axes or more, that of the layers not counted.

    >>> layer_compressible("layers/up/bias", jnp.zeros((6, 16))), layer_compressible("layers/up/kernel", jnp.zeros((6, 8, 16)))
    (False, True)
    """
    return leaf.ndim - int(_is_stacked(path)) >= 2


def _is_stacked(path: str) -> bool:
    return "layers" in path.split("/")[:-1]  # SCAFFOLD has "model/layers/up/kernel"
