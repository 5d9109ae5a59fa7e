"""Laws of `fedkd_jax.privacy`: what a release is made of, what one client can change of it, and what that costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax import (
    Aggregator,
    ClientState,
    FederatedData,
    Layout,
    ServerState,
    chain,
    client_mesh,
    clip_update,
    coordinate_median,
    federated_round,
    fixed_mean,
    fixed_weight,
    privacy_spent,
    private_mean,
    private_send,
    quantise,
    svd_codec,
    task_terms,
    uniform_weight,
)
from fedkd_jax.types import LocalResult, Turn

KEY = jax.random.key(31)

# ---- the accountant ----------------------------------------------------------------------------------------------------

norm = scipy.stats.norm
multipliers, deltas = st.floats(0.5, 50), st.sampled_from([1e-2, 1e-5, 1e-8])


@given(multipliers, st.integers(1, 200), deltas)
def test_without_sampling_epsilon_is_the_closed_form(z, rounds, delta):
    """Balle and Wang 2018, theorem 8, of a sum that one client moves by 2 C."""
    epsilon, mu = privacy_spent(z, 10, 10, rounds, delta), 2 * np.sqrt(rounds) / z
    tail = lambda sign: norm.logcdf(sign * mu / 2 - epsilon / mu)  # noqa: E731
    spent = np.exp(tail(1)) - np.exp(epsilon + tail(-1))
    if epsilon > 0:
        np.testing.assert_allclose(spent, delta, rtol=1e-4)
    else:
        assert spent <= delta


@settings(max_examples=15)
@given(st.floats(0.5, 8), st.integers(1, 19), st.sampled_from([1e-3, 1e-5]))
def test_with_sampling_epsilon_covers_a_client_who_turns_his_update_round(z, cohort, delta):
    """One round on the worst data we know: nobody sends anything but one client, with u or with -u, |u| = C."""
    epsilon, q = privacy_spent(z, cohort, 20, 1, delta), cohort / 20

    x = np.linspace(-12 * z - 1, 12 * z + 1, 200_001)
    out, one, other = (norm.pdf(x, mean, z) for mean in (0.0, 1.0, -1.0))
    excess = np.maximum(0, (1 - q) * out + q * one - np.exp(epsilon) * ((1 - q) * out + q * other))
    assert np.trapezoid(excess, x) <= delta * (1 + 1e-4)


@settings(max_examples=3)
@given(multipliers, st.integers(1, 19), st.integers(1, 50))
def test_noise_and_sampling_save_and_rounds_cost(z, cohort, rounds):
    spent = functools.partial(privacy_spent, population=20)
    here = spent(z, cohort, rounds=rounds)
    assert 0 <= spent(2 * z, cohort, rounds=rounds) <= here <= spent(z, cohort + 1, rounds=rounds) * (1 + 1e-9)
    assert here <= spent(z, cohort, rounds=rounds + 1)
    assert here <= privacy_spent(z, cohort, cohort, rounds) * (1 + 1e-9)


def test_no_round_costs_nothing_and_no_noise_everything():
    assert privacy_spent(1.0, 2, 10, rounds=0) == 0
    assert privacy_spent(0.0, 2, 10, rounds=1) == np.inf


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-1.0, 2, 10, 1), "noise_multiplier is -1.0"),
        ((float("nan"), 2, 10, 1), "noise_multiplier is nan"),
        ((1.0, 11, 10, 1), "cohort is 11; allowed: 1 to 10"),
        ((1.0, 2, 10, -1), "rounds is -1"),
        ((1.0, 2, 10, 1, 0.0), "delta is 0.0"),
    ],
)
def test_what_cannot_be_accounted_is_told(arguments, said):
    with pytest.raises(ValueError, match=said):
        privacy_spent(*arguments)


# ---- the release -------------------------------------------------------------------------------------------------------

SHAPE = (12, 8)


def release_round(layout=None, weight_fn=uniform_weight, **options):
    """Clients send their one input."""
    local = lambda server, client, data, key: LocalResult(  # noqa: E731
        client=client, message={"w": jnp.asarray(data.inputs)[data.start]}, terms=task_terms()
    )
    return jax.jit(federated_round(local, weight_fn=weight_fn, layout=layout, **options))


def release(run, messages, ids=None, turn=None, round=0, count=None):
    k = len(messages)
    ids = np.arange(k) if ids is None else np.array(ids)
    server = ServerState(
        params={"w": jnp.zeros(messages.shape[1:])},
        opt_state=optax.sgd(1.0).init(0.0),
        frozen={},
        round=jnp.int32(round),
    )
    data = FederatedData(
        inputs=messages,
        labels=np.zeros(k, np.int32),
        start=np.arange(k),
        count=np.ones(k, np.int32) if count is None else count,
        max_count=1,
    )
    server, _, info = run(server, ClientState(teacher=jnp.zeros(k)), data, jnp.asarray(ids), KEY, turn)
    return np.asarray(server.params["w"]), info


def clipped_mean(messages, bound):
    norms = np.sqrt((messages.astype(np.float64) ** 2).sum((1, 2)))
    return (messages * np.minimum(1, bound / np.maximum(norms, 1e-30))[:, None, None]).sum(0) / len(messages)


CODECS = {"raw": None, "svd": svd_codec(0.8), "svd, 3 bits": chain(svd_codec(0.8), quantise(3))}


@pytest.mark.parametrize("codec", CODECS)
def test_one_client_moves_a_release_by_no_more_than_its_sensitivity(codec):
    """Whatever is sent in place of its message: the noise being the same, by 2 C / K."""
    run = release_round(uplink=CODECS[codec], aggregator=private_mean(1.5, 0.25))

    @settings(max_examples=15)
    @given(strategies.floats((3, *SHAPE)), strategies.floats(SHAPE), st.sampled_from([1.0, 1e3, 1e30]), st.booleans())
    def law(messages, other, scale, broken):
        neighbour = messages.copy()
        neighbour[1] = np.nan if broken else other * np.float32(scale)
        a, b = (release(run, x)[0] for x in (messages, neighbour))
        assert np.linalg.norm((a - b).astype(np.float64)) <= 2 * 1.5 / 3 * (1 + 1e-4) + 1e-5

    law()


@given(strategies.floats((4, *SHAPE)))
def test_without_noise_it_is_the_mean_of_clipped_updates_to_the_bit(messages):
    got, _ = release(NO_NOISE, messages)
    np.testing.assert_array_equal(got, release(BOUND_ONLY, messages)[0])
    np.testing.assert_allclose(got, clipped_mean(messages, 1.5), rtol=1e-5, atol=1e-6)


NO_NOISE = release_round(aggregator=private_mean(1.5, 0.0))
BOUND_ONLY = release_round(aggregator=Aggregator(bound=clip_update(1.5)))


@pytest.mark.parametrize("at", ["server", "client"])
def test_the_noise_has_the_deviation_it_should(at):
    """Of 40,000 numbers: the deviation of a sample's is 0.35 %. Clients send theirs without an example, and for a NaN."""
    z, bound, k = 3.0, 2.0, 4
    options = {
        "server": dict(aggregator=private_mean(bound, z)),
        "client": dict(aggregator=fixed_mean(), send_fn=private_send(bound, z, cohort=k), weight_fn=fixed_weight),
    }[at]
    run, zeros = release_round(**options), np.zeros((k, 200, 200), np.float32)
    zeros[2] = np.nan
    one, other = (release(run, zeros, round=t, count=np.array([1, 0, 1, 1], np.int32))[0] for t in (0, 1))
    for noise in (one, other):
        assert abs(noise.std() / (z * bound / k) - 1) < 0.03
        assert abs(noise.mean()) < 0.05 * z * bound / k
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("at", ["server", "client"])
def test_noise_does_not_depend_on_order_chunks_or_devices(eight_devices, at):
    options = {
        "server": dict(aggregator=private_mean(2.0, 3.0)),
        "client": dict(aggregator=fixed_mean(), send_fn=private_send(2.0, 3.0, cohort=5)),
    }[at]
    messages = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    layouts = [None, Layout(chunk=2), Layout(mesh=client_mesh(4), chunk=1)]
    runs = [release_round(layout, **options) for layout in layouts]
    whole = [release(run, messages)[0] for run in runs]
    order = [3, 1, 4, 0, 2]
    whole.append(release(runs[0], messages[order], order)[0])
    for other in whole[1:]:
        np.testing.assert_allclose(other, whole[0], rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(whole[0] - release(runs[0], messages, round=1)[0]) > 1


def test_who_is_not_counted_leaves_his_place_in_the_divisor():
    messages = np.full((4, *SHAPE), 0.01, np.float32)
    counted = np.array([True, False, True, True])
    turn = Turn(work=np.ones(4), sends=counted, seconds=np.ones(4), present=counted | True, counted=counted)
    got, info = release(NO_NOISE, messages, turn=turn)
    np.testing.assert_allclose(got, 0.0075, rtol=1e-5)
    assert info.weight.tolist() == [1, 0, 1, 1]


def test_noise_without_a_bound_on_what_a_client_weighs_is_refused():
    with pytest.raises(ValueError, match=r"weight_fn\(1000\) is 1000.0 with noise; allowed: 1"):
        federated_round(lambda *_: None, aggregator=private_mean(1.0, 1.0))
    aggregator = private_mean(1.0, 1.0)._replace(combine=coordinate_median)
    with pytest.raises(ValueError, match=r"combine is .* with noise; allowed: None"):
        federated_round(lambda *_: None, aggregator=aggregator, weight_fn=uniform_weight)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: private_mean(0.0, 1.0), "max_norm is 0.0"),
        (lambda: private_mean(1.0, -1.0), "noise_multiplier is -1.0"),
        (lambda: private_send(1.0, 1.0, cohort=0), "cohort is 0"),
        (lambda: private_send(1.0, float("inf"), cohort=2), "noise_multiplier is inf"),
    ],
)
def test_impossible_noise_is_an_error(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def test_noise_is_another_for_every_leaf():
    send = private_send(1.0, 1.0, cohort=1)
    message = {"w": jnp.zeros(50), "v": jnp.zeros(50)}
    noised = send(message, 0, KEY)
    assert abs(np.corrcoef(noised["w"], noised["v"])[0, 1]) < 0.5
