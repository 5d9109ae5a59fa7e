"""Every message of a run as bytes: a `wire` for `federated_round` that serialises, seals, opens, deserialises and measures.

Within a compiled round it is an `io_callback`, not a `pure_callback`, which XLA may leave out, repeat or share: sealing counts
messages. It is not an ordered one, which neither `vmap` nor a program over several devices allows; a message is sealed and
opened in one call, which keeps the order that a channel needs. On a GPU XLA copies a call into a fusion with the slice that it
is given or the place that its result goes to, and makes both calls (jax 0.11.2): so there is an operation in between.
"""

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback

from fedkd_jax.rounds import kept_apart
from fedkd_jax.types import Number, Payload, PyTree
from fedkd_jax.wire import DIRECTIONS, Channel, deserialise, serialise, template

PIECE_BYTES = 2**16
STAGES = ("serialise", "seal", "open", "deserialise")


class Transport:
    """Both ends of all channels of one run; what arrives is what was sent, bit for bit.

    An empty message is not sent. One that leaves but is not heard, as it comes too late, is sealed and not opened. The way
    down the server serialises once and seals for each client of the cohort, and each opens its own.

    It has both ends of a client's channel from the first message on, 5 kB a client. It does not go over several processes.

    >>> import optax
    >>> from fedkd_jax import fedavg, mlp, simulate
    >>> from fedkd_jax.data import synthetic
    >>> transport, data = Transport(), synthetic(4).take(np.arange(4))
    >>> algorithm = fedavg(mlp((60, 10)), optimizer=optax.sgd(0.1), batch=10, wire=transport)
    >>> _, history = simulate(algorithm, 4, data, jax.random.key(0), rounds=2, cohort=3)
    >>> transport.messages, transport.nbytes["up"] - int(history.rounds.uplink_bytes.sum()) == 6 * 45
    ({'up': 6, 'down': 6}, True)
    """

    def __init__(self):
        self._secret, self._run = os.urandom(32), os.urandom(16)
        self._ends: dict[int, tuple[Channel, Channel]] = {}  # the client's and the server's
        self._lock = threading.Lock()  # devices of one process call at the same time
        self.messages = dict.fromkeys(DIRECTIONS, 0)  # sealed
        self.nbytes = dict.fromkeys(DIRECTIONS, 0)  # of these
        self.seconds = dict.fromkeys(STAGES, 0.0)  # in all

    def __call__(self, payload: Payload, *, direction: str, round, client, sends=True, heard=True) -> Payload:
        """As `federated_round` has it; to be traced.

        >>> from fedkd_jax import identity_codec
        >>> payload = identity_codec().encode(jnp.arange(3.0), 0, jax.random.key(0))
        >>> Transport()(payload, direction="down", round=0, client=jnp.arange(2)).content.tolist()
        [0.0, 1.0, 2.0]
        """
        if jax.process_count() > 1:
            raise ValueError(f"wire is a Transport in {jax.process_count()} processes; allowed: in one")
        if not jax.tree.leaves(payload.content):
            return payload
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), payload.content)

        @custom_vmap
        def carry(content: PyTree, round, *fate) -> PyTree:
            pieces, fate = kept_apart(([_cut(x) for x in jax.tree.leaves(content)], (round, *fate)), round)
            arrived = io_callback(functools.partial(self._carry, direction, shapes), shapes, pieces, *fate)
            return kept_apart(arrived, round)

        @carry.def_vmap
        def one_by_one(size: int, batched, *args):
            def batch(x, is_batched):
                return x if is_batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))

            args = jax.tree.map(batch, args, tuple(batched))
            return jax.lax.map(lambda one: carry(*one), args), jax.tree.map(lambda _: True, shapes)

        fate = (jnp.asarray(x) for x in (round, client, sends, heard))
        return dataclasses.replace(payload, content=carry(payload.content, *fate))

    def measured(self, clients: int) -> dict[str, Number]:
        """Of all messages so far: for a record, beside the bytes that are counted.

        >>> Transport().measured(clients=3)
        {'messages': 0, 'sealed_uplink_bytes_per_client': 0.0, 'sealed_bytes_per_client': 0.0}
        """
        up, both = self.nbytes["up"] / clients, sum(self.nbytes.values()) / clients
        sealed = {"sealed_uplink_bytes_per_client": up, "sealed_bytes_per_client": both}
        return {"messages": sum(self.messages.values()), **sealed}

    def summary(self, counted: Number) -> str:
        """What a person wants to know of the messages, of which so many bytes were counted.

        >>> Transport().summary(counted=0)
        'no message was sent'
        """
        count, sealed = sum(self.messages.values()), sum(self.nbytes.values())
        if not count:
            return "no message was sent"
        each = {stage: 1e6 * seconds / count for stage, seconds in self.seconds.items()}
        sizes = f"{sealed:,} bytes sealed, {counted:,.0f} counted and {(sealed - counted) / count:.1f} more a message"
        times = ", ".join(f"{stage} {value:.0f}" for stage, value in each.items())
        return f"{count:,} messages, {sizes}; {sum(each.values()):.0f} us a message: {times}"

    def _carry(self, direction: str, shapes: PyTree, pieces: list, round, client, sends, heard) -> PyTree:
        leaves, structure = jax.tree.flatten(shapes)
        whole = [
            np.concatenate([np.ravel(x) for x in cut]).reshape(y.shape) for cut, y in zip(pieces, leaves, strict=True)
        ]
        content = arrived = jax.tree.unflatten(structure, whole)
        clients, sends, heard = (x.reshape(-1) for x in np.broadcast_arrays(*map(np.asarray, (client, sends, heard))))
        if not sends.any():
            return content
        payload = Payload(content=content, floats=(), nbytes=(), ranks={})
        like, t = template(payload), int(round)
        with self._lock:
            with self._timed("serialise"):
                message = serialise(payload)
            for client, is_heard in zip(clients[sends].tolist(), heard[sends].tolist(), strict=True):
                sender, receiver = self._channel(client)[:: 1 if direction == "up" else -1]
                with self._timed("seal"):
                    sealed = sender.seal(message, t)
                self.messages[direction] += 1
                self.nbytes[direction] += len(sealed)
                if is_heard:
                    with self._timed("open"):
                        opened = receiver.open(sealed, t)
                    with self._timed("deserialise"):
                        arrived = deserialise(opened, like).content
        return arrived

    def _channel(self, client: int) -> tuple[Channel, Channel]:
        if client not in self._ends:
            end = functools.partial(Channel, self._secret, run=self._run, client=client)
            self._ends[client] = end(side="client"), end(side="server")
        return self._ends[client]

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def _cut(x) -> list:
    """Pieces of an array, in a row.

    JAX copies what a callback is given, above 100 kB in a thread of its pool. On a CPU every one of these may run a device's
    program that waits for its callback: then all wait for ever (jax 0.10.2). Small pieces are copied at once.
    """
    each = PIECE_BYTES // x.dtype.itemsize
    return [x.reshape(-1)[i : i + each] for i in range(0, max(x.size, 1), each)]
