"""Laws of `fedkd_jax.data.lazy`: a client's examples are its own, whoever else is in the cohort."""

import functools

import grain
import jax
import numpy as np
import pytest
import sklearn.linear_model
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fedkd_jax.data import from_arrays, from_records, load, synthetic
from fedkd_jax.types import FederatedData

ids_of_five = st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True).map(np.array)


def examples(data: FederatedData, k: int) -> list[tuple]:
    rows = slice(int(data.start[k]), int(data.start[k]) + int(data.count[k]))
    return [(np.asarray(x).tolist(), int(y)) for x, y in zip(data.inputs[rows], data.labels[rows], strict=True)]


@given(ids=ids_of_five)
def test_a_cohort_has_its_clients_examples(tmp_path_factory, ids):
    data = strategies.small_data()
    folder = tmp_path_factory.mktemp("arrays")
    np.save(folder / "x.npy", data.inputs)
    mapped = FederatedData(**{**vars(data), "inputs": np.load(folder / "x.npy", mmap_mode="r")})
    order = [np.arange(s, s + c) for s, c in zip(data.start, data.count, strict=True)]
    pairs = list(zip(data.inputs, data.labels, strict=True))
    records = grain.MapDataset.source(pairs)
    for source in (from_arrays(mapped), from_records(pairs, order, lambda r: r), from_records(records, order, tuple)):
        assert source.clients == 5
        cohort = source.take(ids)
        assert cohort.max_count == data.max_count
        for k, i in enumerate(ids):
            assert examples(cohort, k) == examples(data, i)
        assert len(cohort.labels) == len(ids) * data.max_count
        outside = np.ones(len(cohort.labels), bool)
        for start, count in zip(cohort.start, cohort.count, strict=True):
            outside[start : start + count] = False
        assert not cohort.inputs[outside].any()
        assert not cohort.labels[outside].any()


def test_records_are_read_through_tfds(tmp_path):
    from fedkd_jax.data import builders

    builder = builders.Digits(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = from_records(
        builder.as_data_source(split="train"),
        [np.array([5, 3]), np.array([], int), np.arange(1797)[::-1]],
        lambda record: (record["image"].astype(np.float32) / 16, record["label"]),
    )
    whole, _ = load("digits")
    cohort = source.take(np.array([2, 0, 1]))
    np.testing.assert_array_equal(cohort.inputs[:1797], whole.inputs[::-1])
    np.testing.assert_array_equal(cohort.labels[1797:1799], whole.labels[[5, 3]])
    assert cohort.count.tolist() == [1797, 2, 0]


@functools.cache
def billion(seed, part=0):
    return synthetic(10**9, features=7, classes=3, counts=(2, 5), seed=seed, part=part)


@given(
    ids=st.lists(st.integers(0, 10**9 - 1), min_size=3, max_size=3, unique=True).map(np.array), seed=st.integers(0, 1)
)
def test_a_synthetic_client_does_not_depend_on_its_cohort(ids, seed):
    def take(order, seed=seed, part=0):
        return jax.device_get(billion(seed, part).take(order))

    cohort, back, other = take(ids), take(ids[::-1]), take(ids, part=1)
    for k in range(3):
        assert examples(cohort, k) == examples(back, 2 - k)
        assert 2 <= cohort.count[k] <= 5
    np.testing.assert_array_equal(other.count, cohort.count)
    for another in (other, take(ids, seed=1 - seed)):
        assert not np.array_equal(another.inputs, cohort.inputs)


def test_alpha_and_beta_say_how_much_clients_differ():
    def clients(alpha, beta):
        return jax.device_get(
            synthetic(10**6, alpha=alpha, beta=beta, features=9, counts=(40, 40)).take(np.arange(200))
        )

    def drift(beta):  # of the clients' mean inputs
        return np.asarray(clients(0, beta).inputs).reshape(200, 40, 9).mean(axis=1).var()

    assert drift(0) < 0.03 < 1 < drift(4) < 8

    # one linear model for everybody: how many labels it gives right
    def fit(alpha):
        data = clients(alpha, 0)
        model = sklearn.linear_model.LogisticRegression(C=1e3, max_iter=1000).fit(data.inputs, data.labels)
        return model.score(data.inputs, data.labels)

    assert fit(0) > 0.95 > fit(0.25) > fit(25)
    assert fit(25) < 0.3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clients": 0}, "clients is 0; allowed: 1 to 2147483645"),
        ({"clients": 2**31}, "clients is 2147483648; allowed: 1 to 2147483645"),
        ({"alpha": -1.0}, r"alpha is -1.0; allowed: a number in \[0, inf\)"),
        ({"beta": -0.5}, r"beta is -0.5; allowed: a number in \[0, inf\)"),
        ({"counts": (0, 4)}, r"counts is \(0, 4\); allowed"),
        ({"counts": (5, 4)}, r"counts is \(5, 4\); allowed"),
    ],
)
def test_a_synthetic_population_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        synthetic(**{"clients": 3} | options)


def test_a_population_without_examples_is_refused():
    with pytest.raises(ValueError, match="clients holds 2 clients without any example"):
        from_records([1], [np.array([], int)] * 2, lambda record: (record, record))
