"""One client, one round: a compiled loop of local steps over its own examples."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from fedkd_jax.check import check_fn, check_int, check_type
from fedkd_jax.types import Array, Batch, FederatedData, Key, Leaf, PyTree

StepFn = Callable[[Any, Batch, Key], tuple[Any, PyTree]]


def permutation(key: Key, count: Int[Array, ""] | int, size: int) -> Int[Array, "size"]:
    """A random permutation of 0..count-1 in the first `count` of `size` entries, `count` traced and `size` static.

    >>> sorted(permutation(jax.random.key(0), 3, 5)[:3].tolist())
    [0, 1, 2]
    """
    index = jnp.arange(size, dtype=jnp.uint32)
    # 23 random bits, ones past the count; where they tie, the index decides, so padding comes last
    draws = jnp.where(index < count, jax.random.bits(key, (size,), jnp.uint32) >> 9, jnp.uint32(2**23 - 1))
    if size <= 512:  # draw and index fit one word, and one array sorts three times as fast as two: the same permutation
        return (jnp.sort(draws << 9 | index) & 511).astype(jnp.int32)
    return jnp.argsort(draws).astype(jnp.int32)


def own_rows(data: FederatedData) -> FederatedData:
    """One client's data without the others': `max_count` rows of the flat arrays, all of its own among them.

    >>> import numpy as np
    >>> data = FederatedData(inputs=np.arange(10.0)[:, None], labels=np.arange(10), start=np.int32(8),
    ...                      count=np.int32(2), max_count=4)
    >>> own = own_rows(data)
    >>> own.labels.tolist(), int(own.start)
    ([6, 7, 8, 9], 2)
    """
    size = min(data.max_count, data.labels.shape[0])
    first = jnp.clip(data.start, 0, data.labels.shape[0] - size)
    read = lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), first, size)  # noqa: E731
    return dataclasses.replace(
        data, inputs=jax.tree.map(read, data.inputs), labels=read(data.labels), start=data.start - first
    )


def gather_batch(data: FederatedData, order: Int[Array, "n"], step: Int[Array, ""] | int, batch: int) -> Batch:
    """Batch number `step` of one client's examples in the given order; rows past its count are masked.

    >>> import numpy as np
    >>> data = FederatedData(inputs=np.arange(10.0)[:, None], labels=np.arange(10), start=np.int32(4),
    ...                      count=np.int32(3), max_count=4)
    >>> b = gather_batch(data, jnp.arange(4), 1, batch=2)
    >>> b.labels.tolist(), b.mask.tolist()
    ([6, 4], [True, False])
    """
    positions = step * batch + jnp.arange(batch)
    mask = positions < data.count
    rows = data.start + jnp.where(mask, jnp.asarray(order).at[positions].get(mode="clip"), 0)
    read = lambda x: jnp.asarray(x).at[rows].get(mode="clip")  # noqa: E731
    return Batch(inputs=jax.tree.map(read, data.inputs), labels=read(data.labels), mask=mask)


def check_local(*, batch: int, epochs: int, steps: int | None, loss_fn: Callable, **optimizers: Any) -> None:
    """Refuses local work that cannot be, where an algorithm is made.

    Raises:
        TypeError: sizes that are no integers, a loss that is no function, an optimiser that is not optax's.
        ValueError: sizes below 1.

    >>> try: check_local(batch=0, epochs=1, steps=None, loss_fn=len)
    ... except ValueError as error: print(error)
    batch is 0; allowed: at least 1
    """
    check_int("batch", batch)
    check_int("epochs", epochs)
    if steps is not None:
        check_int("steps", steps)
    check_fn("loss_fn", loss_fn, "of outputs, labels and mask")
    for name, optimizer in optimizers.items():
        check_type(
            name, optimizer, optax.GradientTransformation, "an optax.GradientTransformation, optax.adam(1e-3) say"
        )


def count_steps(
    count: Int[Array, ""] | int, work: Leaf = (), *, batch: int, epochs: int = 1, steps: int | None = None
) -> Int[jax.Array, ""]:
    """How many local steps a client with so many examples makes: `epochs` of ceil(count / batch), or `steps` if it has any;
    of these the share `work`, rounded up.

    >>> [int(count_steps(n, batch=4, epochs=2)) for n in (0, 3, 9)], int(count_steps(9, batch=4, steps=5))
    ([0, 2, 6], 5)
    >>> [int(count_steps(9, share, batch=4, epochs=2)) for share in (0.0, 0.1, 0.5, 1.0)]
    [0, 1, 3, 6]
    """
    count = jnp.asarray(count, jnp.int32)
    whole = epochs * ((count + batch - 1) // batch) if steps is None else jnp.where(count > 0, steps, 0)
    if isinstance(work, tuple):
        return whole
    # less by a little, or 0.3 of ten steps, which is more than 3 in float32, would be four
    return jnp.where(work < 1, jnp.ceil(whole * work * (1 - 1e-6)).astype(jnp.int32), whole)


def local_steps(
    step_fn: StepFn,
    carry: Any,
    data: FederatedData,
    key: Key,
    *,
    batch: int,
    epochs: int = 1,
    steps: int | None = None,
) -> tuple[Any, PyTree]:
    """Runs `carry, terms = step_fn(carry, batch, key)` over one client's mini-batches.

    Epochs are permutations without replacement; the last batch of an epoch is padded and masked. The number of steps
    follows the client's own count, so no step is ever all padding, and a client without examples makes none. Of these a
    client makes the share `data.work`.

    Args:
        step_fn: one step; `terms` is a PyTree of float scalars.
        carry: what the steps change (parameters, optimiser states).
        data: one client's, scalar `start` and `count`.
        key: the client's key of this round.
        batch: rows of a batch.
        epochs: passes over the client's examples, where `steps` is None.
        steps: this many steps instead, over as many epochs as they need.

    Returns:
        The last carry, and the mean of `terms` over the steps (zeros where there was none).

    Raises:
        TypeError: something else than data or a function.
        TypeError, ValueError: `batch`, `epochs` or `steps` that are no integers from 1 up.

    >>> import numpy as np
    >>> data = FederatedData(inputs=np.ones((10, 1)), labels=np.arange(10), start=np.int32(4),
    ...                      count=np.int32(3), max_count=4)
    >>> total, terms = local_steps(lambda c, b, key: (c + (b.labels * b.mask).sum(), b.mask.mean()), 0, data,
    ...                            jax.random.key(0), batch=2, epochs=2)
    >>> int(total), float(terms)
    (30, 0.75)
    """
    check_type("data", data, FederatedData)
    check_fn("step_fn", step_fn, "(carry, batch, key) -> (carry, terms)")
    check_local(batch=batch, epochs=epochs, steps=steps, loss_fn=step_fn)
    size = -(-data.max_count // batch) * batch
    rows = size if steps is None else min(size, steps * batch)
    count = jnp.asarray(data.count, jnp.int32)
    per_epoch = count_steps(count, batch=batch)
    total = count_steps(count, data.work, batch=batch, epochs=epochs, steps=steps)
    order_key, step_key = jax.random.split(key)
    if rows >= data.max_count:
        data = own_rows(data)  # a gather out of a small array is cheaper

    def epoch(e, state):
        order = permutation(jax.random.fold_in(order_key, e), count, size)
        # the rows of all its batches at once: a gather out of the flat arrays is too dear to do at every step
        shuffled = gather_batch(data, order, 0, rows)

        def one(i, state):
            carry, sums = state
            current = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * batch, batch), shuffled)
            carry, terms = step_fn(carry, current, jax.random.fold_in(step_key, e * per_epoch + i))
            return carry, optax.tree.add(sums, terms)

        return jax.lax.fori_loop(0, jnp.minimum(per_epoch, total - e * per_epoch), one, state)

    first = jax.eval_shape(lambda: gather_batch(data, jnp.arange(size), 0, batch))
    _, terms = jax.eval_shape(step_fn, carry, first, step_key)
    epochs_needed = (total + per_epoch - 1) // jnp.maximum(per_epoch, 1)
    carry, sums = jax.lax.fori_loop(0, epochs_needed, epoch, (carry, optax.tree.zeros_like(terms)))
    return carry, optax.tree.scale(1.0 / jnp.maximum(total, 1), sums)
