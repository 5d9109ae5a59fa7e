"""Laws of `fedkd_jax.local`: who is visited, how often, in which order, and that padding never counts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax import FederatedData, local_steps, mlp
from fedkd_jax.algorithms.fedavg import task_step
from fedkd_jax.local import gather_batch, permutation
from fedkd_jax.losses import cross_entropy

KEY = jax.random.key(7)
N, MAX = 12, 7  # rows in all, most rows of a client
counts = st.integers(0, MAX)
starts = st.integers(0, N - MAX)


def one_client(start, count):
    return FederatedData(
        inputs={"x": np.arange(N, dtype=np.float32)[:, None]},
        labels=np.arange(N, dtype=np.int32),
        start=jnp.int32(start),
        count=jnp.int32(count),
        max_count=MAX,
    )


def count_visits(visits, batch, key):
    """Adds one to every row the batch holds; the terms tell how many rows that were, and that inputs match labels."""
    same = jnp.where(batch.mask, batch.inputs["x"][:, 0] == batch.labels, True).all()
    return visits.at[batch.labels].add(batch.mask), {
        "rows": batch.mask.sum().astype(jnp.float32),
        "same": same.astype(jnp.float32),
    }


@functools.cache
def visitor(**options):
    return jax.jit(
        lambda start, count, key: local_steps(
            count_visits, jnp.zeros(N, jnp.int32), one_client(start, count), key, **options
        )
    )


@pytest.mark.parametrize(("batch", "epochs"), [(1, 1), (3, 1), (3, 2), (7, 2), (9, 1)])
@given(start=starts, count=counts, seed=strategies.seeds)
def test_an_epoch_visits_every_example_once(batch, epochs, start, count, seed):
    visits, terms = visitor(batch=batch, epochs=epochs)(start, count, jax.random.key(seed))
    expected = np.zeros(N, int)
    expected[start : start + count] = epochs
    np.testing.assert_array_equal(visits, expected)
    steps = -(-count // batch)
    np.testing.assert_allclose(
        terms["rows"], count / steps if count else 0.0, rtol=1e-6
    )  # the mean over real steps only
    np.testing.assert_allclose(terms["same"], float(count > 0), rtol=1e-6)


@pytest.mark.parametrize(("batch", "steps"), [(3, 1), (3, 5), (2, 4)])
@given(start=starts, count=counts, seed=strategies.seeds)
def test_steps_go_on_through_as_many_epochs_as_they_need(batch, steps, start, count, seed):
    key = jax.random.key(seed)
    visits, terms = visitor(batch=batch, steps=steps)(start, count, key)
    rows = oracle_batches(key, start, count, batch=batch, steps=steps)
    assert len(rows) == (steps if count else 0)
    np.testing.assert_array_equal(visits, np.bincount(np.concatenate([np.zeros(0, int), *rows]), minlength=N))
    np.testing.assert_allclose(terms["rows"], sum(map(len, rows)) / steps, rtol=1e-6)
    own = np.asarray(visits)[start : start + count]
    assert np.asarray(visits).sum() == own.sum()
    if count:
        assert own.max() - own.min() <= 1


def oracle_batches(key, start, count, *, batch, **options):
    order_key, _ = jax.random.split(key)
    size, out, epoch = -(-MAX // batch) * batch, [], 0
    epochs, steps = options.get("epochs", 1), options.get("steps")
    while count and (epoch < epochs if steps is None else len(out) < steps):
        draws = np.array(jax.random.uniform(jax.random.fold_in(order_key, epoch), (size,)))[:count]
        order = start + np.argsort(draws, kind="stable")
        out += [order[i : i + batch] for i in range(0, count, batch)]
        epoch += 1
    return out if steps is None else out[:steps]


@given(starts, counts, strategies.seeds)
def test_batches_come_in_the_documented_order(start, count, seed):
    """Every step leaves its number where it has been: the order of batches, not only the set."""
    key = jax.random.key(seed)
    last = np.full(N, -1)
    for step, rows in enumerate(oracle_batches(key, start, count, batch=3, epochs=2)):
        last[rows] = step
    np.testing.assert_array_equal(recorder()(start, count, key), last)


@functools.cache
def recorder():
    def step(carry, batch, key):
        seen, number = carry
        return (seen.at[jnp.where(batch.mask, batch.labels, N)].set(number, mode="drop"), number + 1), jnp.float32(0)

    run = lambda s, c, key: local_steps(step, (jnp.full(N, -1), 0), one_client(s, c), key, batch=3, epochs=2)  # noqa: E731
    return jax.jit(lambda s, c, key: run(s, c, key)[0][0])


@given(st.integers(1, 9), st.lists(st.tuples(starts, counts), min_size=3, max_size=3), strategies.seeds)
def test_ragged_clients_under_vmap_equal_a_loop(seed_of_keys, clients, seed):
    run = visitor(batch=3, epochs=2)
    keys = jax.random.split(jax.random.key(seed + seed_of_keys), 3)
    start, count = jnp.array(clients, jnp.int32).T
    together = stacked()(start, count, keys)
    for i in range(3):
        visits, terms = run(start[i], count[i], keys[i])
        np.testing.assert_array_equal(together[0][i], visits)
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[i], together[1]), terms, rtol=1e-6)  # noqa: B023


@functools.cache
def stacked():
    return jax.jit(jax.vmap(visitor(batch=3, epochs=2)))


class Training(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_training_reads_the_clients_own_rows_only_and_equals_numpy(self):
        """Strangers' rows are NaN with labels out of range; one read would show."""
        data = strategies.ragged_data([5, 2, 7, 0], 4, 3, seed=1)
        model, optimizer = mlp((4, 6, 3)), optax.sgd(0.3)
        params = model.init(KEY)

        def train(start, count):
            own = FederatedData(
                inputs=data.inputs, labels=data.labels, start=start, count=count, max_count=data.max_count
            )
            step = lambda carry, b, key: task_step(model, optimizer, cross_entropy, {}, carry, b, key)  # noqa: E731
            (new, _), loss = local_steps(step, (params, optimizer.init(params)), own, KEY, batch=3, epochs=2)
            return new, loss

        train = self.variant(train)
        for start, count in zip(data.start, data.count, strict=True):
            new, loss = train(jnp.int32(start), jnp.int32(count))
            expected, losses = reference.to64(params), []
            order_key, _ = jax.random.split(KEY)
            for e in range(2):
                draws = np.array(jax.random.uniform(jax.random.fold_in(order_key, e), (9,)))[:count]
                rows = start + np.argsort(draws)
                for i in range(0, count, 3):
                    x, y = np.float64(data.inputs[rows[i : i + 3]]), data.labels[rows[i : i + 3]]
                    z, hidden = reference.forward(expected, x)
                    losses.append(reference.ce(z, y, np.ones(len(y), bool)))
                    d_z = (reference.softmax(z) - np.eye(3)[y]) / len(y)
                    grads = reference.backward(expected, x, hidden, d_z, [np.zeros_like(h) for h in hidden])
                    expected = reference.sgd(expected, grads, 0.3)
            chex.assert_trees_all_close(new, jax.tree.map(np.float32, expected), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(loss, np.mean(losses) if losses else 0.0, rtol=1e-4)


@pytest.mark.parametrize("size", [9, 512, 513])  # one word holds draw and index up to 512
@given(share=st.floats(0, 1), seed=strategies.seeds)
def test_a_permutation_is_the_stable_order_of_its_draws(size, share, seed):
    count, key = int(share * size), jax.random.key(seed)
    order = np.asarray(permute(key, count, size))
    assert order.dtype == np.int32
    assert sorted(order[:count].tolist()) == list(range(count))
    draws = np.asarray(jax.random.uniform(key, (size,)))[:count]
    np.testing.assert_array_equal(order[:count], np.argsort(draws, kind="stable"))


permute = jax.jit(permutation, static_argnums=2)


def test_every_example_comes_first_equally_often():
    first = jax.jit(jax.vmap(lambda k: permutation(k, 5, 8)[0]))(jax.random.split(KEY, 5000))
    share = np.bincount(np.asarray(first), minlength=5) / 5000
    np.testing.assert_allclose(share, 0.2, atol=0.03)  # five standard deviations
    assert len(share) == 5


@given(starts, counts, st.integers(0, 3))
def test_a_batch_is_masked_past_the_count(start, count, step):
    batch = gather(one_client(start, count), jnp.arange(MAX)[::-1] % max(count, 1), step)
    real = max(0, min(count - 3 * step, 3))
    np.testing.assert_array_equal(batch.mask, np.arange(3) < real)
    assert all(start <= label < start + count for label in np.asarray(batch.labels)[:real])


gather = jax.jit(functools.partial(gather_batch, batch=3))


def test_epochs_and_steps_get_different_keys():
    seen = []
    step = lambda c, b, key: (c.at[c[-1].astype(int)].set(jax.random.uniform(key)).at[-1].add(1), 0.0 * c[0])  # noqa: E731
    for seed in (0, 1):
        drawn, _ = local_steps(step, jnp.zeros(7), one_client(0, 6), jax.random.key(seed), batch=2, epochs=2)
        assert int(drawn[-1]) == 6
        seen += drawn[:-1].tolist()
    assert len(set(seen)) == 12
