"""Laws of `fedkd_jax.wire` and `fedkd_jax.transport`: what is opened is what was sealed, and nothing else is."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import random
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax import (
    Channel,
    HostStore,
    Layout,
    Participation,
    Payload,
    Transport,
    WireError,
    chain,
    client_mesh,
    error_feedback,
    fedavg,
    feddropout,
    fetchsgd,
    identity_codec,
    keep_units,
    mlp,
    payload_bytes,
    quantise,
    scaffold,
    simulate,
    svd_codec,
    top_k,
    unreliable,
)
from fedkd_jax.codecs.low_rank import Factored
from fedkd_jax.codecs.sparse import Sparse
from fedkd_jax.types import Factors
from fedkd_jax.wire import deserialise, overhead, serialise, template
from sims import compare, fuzz, fuzz_messages, run

KEY = jax.random.key(5)
SECRET, RUN = bytes(range(32)), b"a run's own name"


def ends(client=7, run=RUN, secret=SECRET):
    return [Channel(secret, run=run, client=client, side=side) for side in ("client", "server")]


@functools.cache
def sender(name):
    own = fuzz_messages.SENDERS[name]()
    return jax.jit(own.encode), jax.jit(own.decode)


def assert_same_bits(one, other):
    for (path, x), y in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), jax.tree_util.keystr(path)


# ---- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fuzz_messages.SENDERS)
def test_what_arrives_is_what_was_sent_bit_for_bit_in_the_bytes_that_are_counted(name):
    encode, decode = sender(name)
    client, server = ends()

    @settings(max_examples=10)
    @given(seed=strategies.seeds, round=st.integers(0, 2**40))
    def law(seed, round):
        payload = encode(fuzz_messages.make_update(seed), jax.random.key(seed))
        like, message = template(payload), serialise(payload)
        sealed = client.seal(message, round)
        assert len(sealed) - overhead(like) == payload_bytes(payload)
        arrived = deserialise(server.open(sealed, round), like)
        assert arrived.nbytes == payload.nbytes
        assert_same_bits(payload.content, arrived.content)
        assert serialise(arrived) == message
        assert_same_bits(decode(payload), decode(dataclasses.replace(payload, content=arrived.content)))

    law()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -0.0])
@pytest.mark.parametrize("name", ["svd, stacked, warm", "8 bits", "svd, 8 bits", "top"])
def test_numbers_that_are_not_finite_arrive_too(name, poison):
    encode, _ = sender(name)
    update = fuzz_messages.make_update(3)
    for x in update.values():
        x.reshape(-1)[:1] = poison
    payload = encode(update, KEY)
    assert_same_bits(payload.content, deserialise(serialise(payload), template(payload)).content)


def test_a_template_may_be_abstract_and_is_of_names_shapes_dtypes_and_widths():
    update = {"w": np.ones((24, 20), np.float32), "b": np.ones(20, np.float32)}

    def of(codec, update=update):
        return jax.eval_shape(lambda u: codec.encode(u, 0, KEY), update)

    base = identity_codec().encode(update, 0, KEY)
    message = serialise(base)
    assert_same_bits(base.content, deserialise(message, of(identity_codec())).content)
    narrow = {"w": update["w"], "b": update["b"].astype(np.float16)}
    renamed = {"w": update["w"], "c": update["b"]}
    turned = {"w": update["w"].T, "b": update["b"]}
    others = [of(identity_codec(), u) for u in (narrow, renamed, turned)] + [of(quantise(8)), of(svd_codec(0.9))]
    others += [of(top_k(0.1)), of(top_k(0.1), renamed)]
    for like in others:
        with pytest.raises(WireError, match=r"message has template .*; allowed: .* of the same model"):
            deserialise(message, like)
    five, six = (quantise(bits).encode(update, 0, KEY) for bits in (5, 6))
    with pytest.raises(WireError, match="template"):
        deserialise(serialise(five), template(six))
    few = {"w": np.ones(100, np.float32)}, {"w": np.ones(101, np.float32)}  # as many largest of more numbers
    one, other = (top_k(0.1).encode(few[0], 0, KEY), of(top_k(10 / 101), few[1]))
    with pytest.raises(WireError, match="template"):
        deserialise(serialise(one), other)


def factored(b=9, r=4):
    """A payload of b matrices of 12 x 10, the first of rank 2, the second of rank 0, the third raw and so on."""
    rng, as_factors = np.random.default_rng(0), np.arange(b) % 3 != 2
    rank = np.where(as_factors, np.where(np.arange(b) % 3 == 0, 2, 0), r + 1).astype(np.int32)
    used = np.arange(r) < np.where(as_factors, rank, 0)[:, None]
    left = np.where(used[:, None, :], rng.normal(size=(b, 12, r)), 0).astype(np.float32)
    right = np.where(used[:, :, None], rng.normal(size=(b, r, 10)), 0).astype(np.float32)
    raw = np.where(as_factors[:, None, None], 0, rng.normal(size=(b, 12, 10))).astype(np.float32)
    content = {"w": Factored(factors=Factors(left, right, rank), raw=raw, as_factors=as_factors)}
    return Payload(content=content, floats=(), nbytes=(), ranks={})


def test_hostile_counts_are_refused_before_anything_is_made_of_them():
    payload = factored()
    message, like = serialise(payload), template(payload)
    assert_same_bits(payload.content, deserialise(message, like).content)
    flags, ranks = 17, 19  # of 9 matrices; 6 ranks
    for rank in (5, -1, 2**31 - 1, -(2**31)):
        bad = message[:ranks] + np.int32(rank).tobytes() + message[ranks + 4 :]
        with pytest.raises(WireError, match=rf"message has ranks \[{rank}, .*\] in w; allowed: 0 to 4"):
            deserialise(bad, like)
    with pytest.raises(WireError, match=r"message has set bits past the last in w; allowed: none"):
        deserialise(message[: flags + 1] + bytes([message[flags + 1] | 1]) + message[flags + 2 :], like)
    with pytest.raises(WireError, match=rf"message has {len(message)} bytes, in w; allowed: \d+ more at least"):
        deserialise(message[:ranks] + np.int32(4).tobytes() + message[ranks + 4 :], like)
    with pytest.raises(WireError, match=rf"message has {len(message) + 1} bytes; allowed: {len(message)}"):
        deserialise(message + b"\0", like)
    with pytest.raises(WireError, match="message has version 02; allowed: 01"):
        deserialise(b"\2" + message[1:], like)
    with pytest.raises(WireError, match="message has version none; allowed: 01"):
        deserialise(b"", like)

    largest = Sparse(values=np.ones(2, np.float32), indices=np.array([3, 8], np.int32), like=(None, 9, np.float32))
    sparse = Payload(content={"it": largest}, floats=(), nbytes=(), ranks={})
    with pytest.raises(WireError, match=r"message has places 3 to 9 in it; allowed: 0 to 8"):
        deserialise(serialise(sparse)[:-4] + np.int32(9).tobytes(), template(sparse))
    with pytest.raises(WireError, match=r"message has a place twice in it; allowed: each once"):
        deserialise(serialise(sparse)[:-4] + np.int32(3).tobytes(), template(sparse))
    truth = Payload(content=np.array([True, False]), floats=(), nbytes=(), ranks={})
    with pytest.raises(WireError, match=r"message has 2 in its content; allowed: 0 or 1"):
        deserialise(serialise(truth)[:-1] + b"\2", template(truth))
    dropout = sender("dropout")[0](fuzz_messages.make_update(0), KEY)
    with pytest.raises(ValueError, match="like has shapes for kept; allowed: arrays"):
        deserialise(serialise(dropout), jax.eval_shape(lambda x: x, dropout))


HOSTILE = ("svd, 8 bits", "svd, bfloat16", "3 bits", "top", "power, 5 bits", "dropout")


@functools.cache
def target():
    return fuzz_messages.wire(pathlib.Path(), list(HOSTILE))


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_are_read_as_they_are_written_or_refused_in_bounded_memory(data):
    which = data.draw(st.integers(0, len(HOSTILE) - 1))
    valid = target().valid[which]
    keep = data.draw(st.sampled_from([0, 17, len(valid) // 2, len(valid)]))
    made = bytearray(valid[:keep] + data.draw(st.binary(max_size=200)))
    for at in data.draw(st.lists(st.integers(0, max(len(made) - 1, 0)), max_size=4)):
        made[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    tracemalloc.start()
    with contextlib.suppress(WireError):
        target().read(which, bytes(made))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000  # templates here have up to 10 kB; a rank of 2^31 would be 10^11


def test_the_fuzzer_finds_what_a_careless_reader_does():
    careless = fuzz.Target([b"\1\2\3\4"], lambda i, data: data[3], (WireError,))
    found = fuzz.fuzz("careless", careless, 100)
    assert found.others and {type(error) for _, _, error, _ in found.others} == {IndexError}
    counts = fuzz.fuzz("wire", target(), 700)
    assert counts.others == [] and counts.read + counts.refused == 700
    assert counts.read > 50 and counts.refused > 300  # a number may be any; a length may not


# ---- sealed ------------------------------------------------------------------------------------------------------------


def test_ten_thousand_messages_that_are_not_the_next_are_refused():
    """Any bit of it changed, cut, longer, replayed, overtaken, or of another client, round, direction, run or secret."""
    rng, refused = random.Random(1), 0
    client, server = ends()
    strangers = [ends(client=8), ends(run=RUN[::-1]), ends(secret=SECRET[::-1])]
    message = serialise(sender("8 bits")[0](fuzz_messages.make_update(0), KEY))
    used: list[tuple[bytes, int]] = []

    def refuse(sealed, round, end=server):
        nonlocal refused
        with pytest.raises(WireError):
            end.open(sealed, round)
        refused += 1

    for t in range(1250):
        overtaken, sealed = client.seal(message, t), client.seal(message, t)
        at, bit = rng.randrange(len(sealed)), rng.randrange(8)
        changed = sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :]
        for bad in (changed, sealed[: rng.randrange(len(sealed))], sealed + rng.randbytes(rng.randint(1, 40))):
            refuse(bad, t)
        refuse(sealed, t + rng.choice((-1, 1, 2**32)) if t else 1)  # of another round
        refuse(sealed, t, client)  # its own, sent back
        refuse(rng.choice(strangers)[0].seal(message, t), t)
        assert server.open(sealed, t) == message  # none of these has made the channel deaf
        refuse(overtaken, t)
        used.append((sealed, t))
        refuse(*rng.choice(used))
    assert refused == 10_000
    sealed = client.seal(b"short", 0)
    for i in range(8 * len(sealed)):
        refuse(sealed[: i // 8] + bytes([sealed[i // 8] ^ 1 << i % 8]) + sealed[i // 8 + 1 :], 0)
    assert server.open(sealed, 0) == b"short"


def test_no_nonce_comes_twice_and_no_two_channels_have_a_key():
    client, server = ends()
    nonces = [end.seal(b"", round)[:12] for round in range(3) for _ in range(100) for end in (client, server)]
    assert len(set(nonces)) == 600
    others = [ends(), ends(client=8), ends(run=RUN[::-1]), ends(secret=SECRET[::-1])]
    first = [channel[0].seal(b"the same in all of these", 0) for channel in others]
    assert len({sealed[:12] for sealed in first}) == 1
    assert len({sealed[12:] for sealed in first}) == len(others)


def test_a_lost_message_does_not_stop_the_next():
    client, server = ends()
    client.seal(b"lost", 0)
    assert server.open(client.seal(b"next", 1), 1) == b"next"
    assert client.open(server.seal(b"answer", 1), 1) == b"answer"


def test_a_channel_of_something_else_is_refused():
    for change, match in (
        (dict(secret=b"short"), r"secret has 5 bytes; allowed: at least 16"),
        (dict(run=b"x"), r"run has 1 bytes; allowed: 16"),
        (dict(client=-1), r"client is -1; allowed: 0 to"),
        (dict(side="both"), r"side is 'both'; allowed: 'client', 'server'"),
    ):
        options = dict(secret=SECRET, run=RUN, client=0, side="client") | change
        with pytest.raises(ValueError, match=match):
            Channel(options.pop("secret"), **options)


# ---- in a round --------------------------------------------------------------------------------------------------------

MODEL, SGD = (strategies.FEATURES, 10, strategies.TARGETS), optax.sgd(0.3)
EIGHT = chain(svd_codec(0.8), quantise(8))
OF = dict(optimizer=SGD, batch=4)
ALGORITHMS = {
    "fedkd": lambda **more: strategies.small_fedkd(uplink=EIGHT, downlink=quantise(8), **more),
    "fedavg": lambda **more: fedavg(
        mlp(MODEL), uplink=error_feedback(top_k(0.3)), downlink=chain(top_k(0.6), quantise(5)), **OF, **more
    ),
    "fetchsgd": lambda **more: fetchsgd(mlp(MODEL), columns=80, share=0.2, **OF, **more),
    "feddropout": lambda **more: feddropout(mlp(MODEL), sub_model=keep_units(0.6), **OF, **more),
    "scaffold": lambda **more: scaffold(mlp(MODEL), learning_rate=0.2, batch=4, **more),
}


def both(name, *, layout=None, rounds=3, cohort=4, store=None, **options):
    """A run without a wire and one with it, and the transport."""
    data, key, transport, runs = strategies.small_data(), jax.random.key(2), Transport(), []
    for more in ({}, {"wire": transport}):
        own = dict(options) if store is None else dict(options, store=store())
        state, history = simulate(
            ALGORITHMS[name](layout=layout, **more), 5, data, key, rounds=rounds, cohort=cohort, **own
        )
        server, rounds_of = jax.device_get((state.server, history.rounds))
        runs.append((server, () if store else jax.device_get(state.clients), rounds_of))
    return *runs, transport


def check_bytes(info, transport):
    for direction, counted in (("up", info.uplink_bytes), ("down", info.downlink_bytes)):
        assert transport.messages[direction] == np.count_nonzero(counted)
        spare = transport.nbytes[direction] - int(counted.sum())
        assert spare % transport.messages[direction] == 0
        assert 45 <= spare // transport.messages[direction] <= 47


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "feddropout"])  # see the next
def test_a_run_is_the_same_bit_for_bit_and_measures_what_it_counts(name):
    plain, wired, transport = both(name)
    assert_same_bits(plain, wired)
    assert transport.messages == {"up": 12, "down": 12}
    check_bytes(wired[2], transport)


def test_lost_and_late_messages_are_not_opened_and_absent_clients_get_none():
    shaky = Participation(first=2, turn=unreliable(dropout=0.3, stragglers=0.3, least=0.2, spread=0.5))
    plain, wired, transport = both("feddropout", rounds=6, cohort=5, participation=shaky)
    assert_same_bits(plain, wired)
    turn = wired[2].turn
    assert turn.counted.sum() < turn.sends.sum() < turn.present.sum()
    assert transport.messages == {"up": turn.sends.sum(), "down": turn.present.sum()}
    check_bytes(wired[2], transport)


def test_chunks_devices_groups_and_stores_send_every_message_once(eight_devices):
    for options in (
        dict(layout=Layout(mesh=client_mesh(3), chunk=2)),  # 4 clients in 3 groups of 2: two places are filled up
        dict(store=HostStore, group=3),
    ):
        plain, wired, transport = both("fedavg", **options)
        assert_same_bits(plain, wired)
        assert transport.messages == {"up": 12, "down": 12}
        check_bytes(wired[2], transport)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "axes", [[(0, 0)], [(None, 0)], [(0, None)], [(0, None), (0, 0)], [(None, 0), (0, None)]], ids=str
)
def test_whatever_vmap_splits_is_sent_once_and_arrives(axes, jit):
    """Payloads, clients, or both, once or twice; also in a compiled function, whose constants are numbers of Python's."""
    transport, sizes = Transport(), (2, 3)[-len(axes) :]

    @jit
    def send(x, client):
        return transport(identity_codec().encode(x, 0, KEY), direction="up", round=4, client=client).content

    same = lambda x, client: x  # noqa: E731
    for own in reversed(axes):
        send, same = jax.vmap(send, in_axes=own), jax.vmap(same, in_axes=own)
    x_shape, client_shape = ([n for n, own in zip(sizes, axes, strict=True) if own[i] == 0] for i in range(2))
    x = jnp.arange(5.0 * math.prod(x_shape)).reshape(*x_shape, 5)
    clients = jnp.arange(math.prod(client_shape)).reshape(client_shape)
    np.testing.assert_array_equal(jit(send)(x, clients), same(x, clients))
    assert transport.messages == {"up": math.prod(sizes), "down": 0}
    assert transport.nbytes["up"] == math.prod(sizes) * (5 * 4 + 45)


def send_large(layout, clients):
    """Leaves above 100 kB, of whole pages."""
    transport = Transport()
    wide = mlp((strategies.FEATURES, 4096, strategies.TARGETS))
    algorithm = fedavg(wide, layout=layout, wire=transport, **OF)
    _, history = simulate(algorithm, 5, strategies.small_data(), KEY, rounds=2, cohort=clients)
    assert transport.messages == {"up": 2 * clients, "down": 2 * clients}
    check_bytes(history.rounds, transport)


def test_large_messages_of_all_devices_do_not_wait_for_each_other(eight_devices):
    """Of as many devices as JAX has threads, which copies above 100 kB in a thread of its own."""
    send_large(Layout(mesh=client_mesh(8)), 5)


def test_large_messages_are_sent_once_under_vmap():
    """A GPU made calls twice that take a slice of whole pages."""
    send_large(Layout(chunk=2), 4)


def test_nothing_is_sent_where_nothing_travels():
    transport = Transport()
    empty = identity_codec().encode((), 0, KEY)
    assert transport(empty, direction="up", round=0, client=0) is empty
    assert transport.summary(0) == "no message was sent"


def test_sims_run_shows_measured_bytes_beside_counted_ones(tmp_path, capsys):
    config = str(pathlib.Path(__file__).parent.parent / "configs" / "digits.yaml")
    flags = [
        "--method",
        "FedAvg of the student",
        "--rounds",
        "2",
        "--eval-every",
        "1",
        "--seeds",
        "0",
        "--steps",
        "1",
        "--epochs",
        "1",
    ]
    flags += ["--devices", "1", "--data.clients", "4"]
    records = {}
    for wire in ("False", "True"):
        folder = run.main([config, *flags, "--wire", wire, "--out", str(tmp_path / wire)])
        records[wire] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = {"messages", "sealed_uplink_bytes_per_client", "sealed_bytes_per_client", "seconds"}
    for plain, wired in zip(records["False"], records["True"], strict=True):
        assert {key: value for key, value in wired.items() if key not in measured} == {
            key: value for key, value in plain.items() if key != "seconds"
        }
    last = records["True"][-1]
    assert last["messages"] == 16
    assert 45 * 4 <= last["sealed_bytes_per_client"] - last["bytes_per_client"] <= 50 * 4
    out = " ".join(capsys.readouterr().out.split())
    assert "16 messages, " in out and " us a message: serialise " in out
    assert "sealed/client" in (folder / "table.md").read_text()
    for bad in (["--processes", "auto", "--out", str(tmp_path / "x")], []):
        program = run.main if bad else compare.main
        with pytest.raises(SystemExit, match=r"wire is True; allowed: False, or for sims\.run in one process"):
            program([config, *bad, "--wire", "True"])
