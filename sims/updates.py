"""Matrices that training really makes, for `sims.bench svd`: gradients and Adam updates of a small transformer and a CNN.

The transformer predicts the next word of the posts in `news20` and has three blocks, of width 128, 384 and 768, so that one
training run holds all the shapes; the CNN has a 3 x 3 x 64 x 64 kernel and classifies Fashion-MNIST. Every matrix comes
from a client of its own, that is, from its own part of the data, and starts from the same weights.
"""

import collections
import csv
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax
from flax import nnx

from fedkd_jax import from_nnx
from fedkd_jax.data import load

WORDS, ROWS, LENGTH, IMAGES = 30_522, 8, 32, 32  # the vocabulary; a batch of text is ROWS x LENGTH words
KINDS = ("gradient", "Adam 1", "Adam 5", "Adam 50")
# name of the shape -> the leaves that have it, as paths, and the shape
TEXT = {
    (256, 128): [("blocks", 0, "down", "kernel")],
    (1536, 384): [("blocks", 1, "down", "kernel")],
    (768, 768): [("blocks", 2, "attention", name, "kernel") for name in ("query", "key", "value", "out")],
    (3072, 768): [("blocks", 2, "down", "kernel")],
    (WORDS, 128): [("embed", "embedding")],
}
IMAGE = {(3 * 3 * 64, 64): [("inner", "kernel")]}


class Block(nnx.Module):
    """A transformer block, pre-norm, causal."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(width // 64, width, decode=False, rngs=rngs)
        self.before, self.after = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.before(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.after(x))))


class Transformer(nnx.Module):
    """Next-word logits `[B, L, WORDS]` of words `[B, L]`; the table is used at both ends."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(WORDS, 128, rngs=rngs)
        self.blocks = nnx.List([Block(128, 256, rngs), Block(384, 1536, rngs), Block(768, 3072, rngs)])
        widths = (128, 384, 768, 128)
        self.widen = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.norm = nnx.LayerNorm(128, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words)
        for block, widen in zip(self.blocks, self.widen, strict=True):
            x = widen(block(x))
        return self.embed.attend(self.norm(x))


class Convolutions(nnx.Module):
    """Logits `[B, 10]` of images `[B, 28, 28, 1]`."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 64, (3, 3), strides=2, rngs=rngs)
        self.inner = nnx.Conv(64, 64, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(7 * 7 * 64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.inner(nnx.relu(self.first(images))))
        return self.head(x.reshape(len(x), -1))


def read_words(folder: pathlib.Path) -> np.ndarray:
    """The posts of news20 as one row of word numbers; words beyond the WORDS - 1 commonest are number 0."""
    csv.field_size_limit(sys.maxsize)
    with (folder / "news20" / "train" / "news.tsv").open(encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        words = [word for row in rows for word in re.findall(r"\w+|[^\w\s]", " ".join(row[3:5]).lower())]
    number = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common(WORDS - 1), start=1)}
    return np.array([number.get(word, 0) for word in words], np.int32)


def train(build: Callable, batches: Callable[[int], tuple], wanted: dict, steps: int) -> Iterator[tuple]:
    """`((shape, kind), matrix)` of one client: the first batch's gradient and the updates after 1, 5 and 50 steps.

    Args:
        build: `rngs -> nnx.Module`.
        batches: step -> (inputs, labels).
        wanted: {shape: paths of leaves}.
        steps: how many Adam steps (learning rate 1e-3) are made.
    """
    model, optimizer = from_nnx(build), optax.adam(1e-3)
    start = params = model.init(jax.random.key(0))
    state = optimizer.init(params)

    def loss(params, inputs, labels):
        logits = model.apply(params, inputs).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, inputs, labels):
        gradient = jax.grad(loss)(params, inputs, labels)
        change, state = optimizer.update(gradient, state)
        return gradient, optax.apply_updates(params, change), state

    for i in range(steps):
        gradient, params, state = step(params, state, *batches(i))
        if i == 0:
            yield from pick(gradient, wanted, "gradient")
        if f"Adam {i + 1}" in KINDS:
            yield from pick(optax.tree.sub(params, start), wanted, f"Adam {i + 1}")


def pick(tree, wanted: dict, kind: str) -> Iterator[tuple]:
    for shape, paths in wanted.items():
        for path in paths:
            leaf = tree
            for name in path:
                leaf = leaf[name]
            yield (shape, kind), np.asarray(leaf).reshape(shape)


def real_matrices(folder: pathlib.Path, clients: int = 8, steps: int = 50) -> dict[tuple, np.ndarray]:
    """{((m, n), kind): matrices `[clients, m, n]` float32}; takes a few minutes on two cores.

    Raises:
        FileNotFoundError: `news20` or `fashion_mnist` is not in `folder`.
    """
    words, (images, _) = read_words(folder), load("fashion_mnist", data_dir=folder)
    rng, out = np.random.default_rng(0), collections.defaultdict(list)
    pieces, pictures = np.array_split(words, clients), np.array_split(rng.permutation(len(images)), clients)
    for piece, picture in zip(pieces, pictures, strict=True):

        def text_batch(i, piece=piece):
            rows = np.random.default_rng(i).integers(0, len(piece) - LENGTH - 1, ROWS)[:, None] + np.arange(LENGTH + 1)
            return piece[rows][:, :-1], piece[rows][:, 1:]

        def image_batch(i, picture=picture):
            rows = picture[i * IMAGES : (i + 1) * IMAGES]
            return images.inputs[rows], images.labels[rows]

        for build, batches, wanted in ((Transformer, text_batch, TEXT), (Convolutions, image_batch, IMAGE)):
            for key, matrix in train(build, batches, wanted, steps):
                out[key].append(matrix)
    return {key: np.stack(matrices) for key, matrices in out.items()}
