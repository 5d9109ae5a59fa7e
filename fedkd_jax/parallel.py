"""The only file that knows there are many clients: one function that runs a per-client function over a cohort.

A `Layout` says how. Over the mesh's axis "clients" the cohort is split between devices; on each device `chunk` clients are
trained at once under `vmap`, one chunk after the other in a scan that adds up what is to be averaged, so that memory is
bounded by the chunk. `chunk=1` is no `vmap` at all: on a CPU that is fastest, and equal to a Python loop bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedkd_jax.check import check_fn, check_int, check_type
from fedkd_jax.types import PyTree

AXIS = "clients"
CACHE_BYTES = 2**18  # where 38 kB a client move, chunks pay (1.2x at 5); where 1.2 MB, a chunk of 2 costs 30 %


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a cohort is laid out on the hardware; results do not depend on it, except for rounding.

    Args:
        mesh: a mesh with the one axis "clients" (`client_mesh`), or None for the default device.
        chunk: at most so many clients are trained at once on each device. None chooses: the whole cohort on an accelerator;
            on a CPU as many as fit the cache with all they read and write, which is 1 for all but tiny models.

    Raises:
        TypeError: a `chunk` that is no integer, something else than a mesh.
        ValueError: `chunk` below 1, or a mesh with other axes.

    >>> Layout(chunk=4).devices
    1
    """

    mesh: Mesh | None = None
    chunk: int | None = None

    def __post_init__(self):
        if self.chunk is not None:
            check_int("chunk", self.chunk)
        check_type("mesh", self.mesh, (Mesh, type(None)), "a mesh, see client_mesh, or None")
        if self.mesh is not None and self.mesh.axis_names != (AXIS,):
            raise ValueError(f"mesh has axes {self.mesh.axis_names}; allowed: {(AXIS,)}, see client_mesh")

    @property
    def devices(self) -> int:
        """Number of devices the client axis is split over."""
        return 1 if self.mesh is None else self.mesh.size

    def groups(self, clients: int, client_bytes: int = CACHE_BYTES) -> tuple[int, int]:
        """`(groups, chunk)` per device for a cohort whose clients move `client_bytes` each: of the chunks that are allowed
        and not below half the largest, the one with the least padding.

        >>> Layout(chunk=64).groups(100), Layout(chunk=1).groups(5)
        ((2, 50), (5, 1))
        """
        per_device = -(-clients // self.devices)
        on_cpu = jax.default_backend() == "cpu"
        most = self.chunk or (max(1, CACHE_BYTES // client_bytes) if on_cpu else per_device)
        most = min(most, per_device)
        chunk = min(range(most, most // 2, -1), key=lambda c: -(-per_device // c) * c)
        return -(-per_device // chunk), chunk

    def own(self, clients: int) -> slice:
        """Which places of a cohort the devices of this process have: all of them, but of several processes.

        Raises:
            ValueError: several processes, and a cohort that does not split evenly over the devices, or devices that do not
                split evenly over the processes.

        >>> Layout().own(5)
        slice(0, 5, None)
        """
        if self.mesh is None or jax.process_count() == 1:
            return slice(0, clients)
        if clients % self.devices:
            raise ValueError(
                f"a cohort of {clients} is on several machines; allowed: multiples of {self.devices} devices"
            )
        each = clients // self.devices
        mine = [i for i, d in enumerate(self.mesh.devices.flat) if d.process_index == jax.process_index()]
        if len(mine) * jax.process_count() != self.devices or mine[-1] - mine[0] + 1 != len(mine):
            raise ValueError(f"mesh has devices {mine} in this process; allowed: as many in each, see client_mesh")
        return slice(mine[0] * each, (mine[-1] + 1) * each)

    def sharding(self, *spec: str | None) -> NamedSharding | None:
        """The sharding of an array: `sharding("clients")` splits the first axis, `sharding()` replicates."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*spec))


def client_mesh(devices: int | None = None) -> Mesh:
    """A mesh with the axis "clients" over the first `devices` devices, all by default.

    Raises:
        ValueError: more devices than there are.

    >>> client_mesh(1).axis_names
    ('clients',)
    """
    available = jax.devices()
    devices = len(available) if devices is None else devices
    check_int("devices", devices, 1, len(available))
    if jax.process_count() > 1:  # each process's devices one after another: its clients' places
        available = sorted(available, key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(available[:devices]), (AXIS,), axis_types=(AxisType.Auto,))
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=available[:devices])


def sum_clients(summands: PyTree) -> PyTree:
    """The sum of every leaf over its client axis.

    >>> sum_clients({"a": jnp.arange(4)})["a"].tolist()
    6
    """
    return jax.tree.map(lambda x: x.sum(axis=0), summands)


def map_clients(
    fn: Callable[..., tuple[PyTree, PyTree]],
    stacked: tuple[PyTree, ...],
    shared: tuple[PyTree, ...] = (),
    *,
    layout: Layout | None = None,
    sum_fn: Callable[[PyTree], PyTree] = sum_clients,
    tell: bool = False,
) -> tuple[PyTree, PyTree]:
    """Runs `out, summand = fn(*one_client, *shared)` for every client, and adds the summands up.

    Args:
        fn: sees one client, no client axis.
        stacked: PyTrees whose leaves have a leading client axis `[K]`.
        shared: PyTrees that all clients see whole.
        layout: where and in which groups they run.
        sum_fn: adds up the summands `[k]` of a group; the sums of the groups are added leaf by leaf. A summand that is zero
            in every leaf must add nothing.
        tell: whether `fn` has a last argument, [] bool: False where it runs for a client once more, only to fill a group up.

    Returns:
        `out` stacked `[K]` in the order given, and the sum of the summands. Where `out` is a tuple that begins with what the
        first of `stacked` is like, such as states, the new ones are written in the place of the old: no buffer but theirs.

    Raises:
        TypeError: no function.
        ValueError: leaves of `stacked` that do not all have the same K clients, one at least.

    >>> out, total = map_clients(lambda x, y: (x * y, {"sum": x}), (jnp.arange(5.0),), (2.0,), layout=Layout(chunk=2))
    >>> out.tolist(), float(total["sum"])
    ([0.0, 2.0, 4.0, 6.0, 8.0], 10.0)
    """
    layout = layout or Layout()
    check_fn("fn", fn, "(*client, *shared) -> (out, summand)")
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(stacked)}
    if len(counts) != 1 or not all(counts.copy().pop() or (0,)):
        raise ValueError(
            f"stacked has leading axes {sorted(counts)}; allowed: one of at least 1 client, the same for all"
        )
    ((clients,),) = counts
    one = jax.eval_shape(lambda s: jax.tree.map(lambda x: jnp.asarray(x)[0], s), stacked)
    out_shape, summand_shape = jax.eval_shape(fn, *one, *shared, *([jnp.bool_(True)] if tell else []))
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((one, out_shape, summand_shape)))
    groups, chunk = layout.groups(clients, max(moved, 1))
    size = groups * chunk * layout.devices
    # padding repeats the last client: its result is cut off and its summand is not added
    rows = jnp.minimum(jnp.arange(size), clients - 1)
    padded = stacked if size == clients else jax.tree.map(lambda x: jnp.asarray(x)[rows], stacked)
    valid = jnp.arange(size) < clients

    summed_shape = jax.eval_shape(lambda s: sum_fn(jax.tree.map(lambda x: x[None], s)), summand_shape)
    in_place = type(out_shape) is tuple and out_shape[:1] != () and _alike(out_shape[0], one[0])
    run = functools.partial(_map_on_device, fn, sum_fn, groups, chunk, summed_shape, size > clients, tell, in_place)
    if layout.mesh is not None:
        on_device, split, whole = run, PartitionSpec(AXIS), PartitionSpec()

        def all_devices(*args):
            out, total = on_device(*args)
            return out, jax.lax.psum(total, AXIS)

        run = jax.shard_map(
            all_devices,
            mesh=layout.mesh,
            in_specs=(split, split, whole),
            out_specs=(split, whole),
            check_vma=False,  # or every constant that fn starts a loop from would need a pcast
        )
    out, total = run(padded, valid, shared)
    return (out if size == clients else jax.tree.map(lambda x: x[:clients], out)), total


def _alike(a: PyTree, b: PyTree) -> bool:
    of = lambda tree: (jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)])  # noqa: E731
    return of(a) == of(b)


def _map_on_device(
    fn, sum_fn, groups: int, chunk: int, summed_shape, padding: bool, tell: bool, in_place: bool, stacked, valid, shared
):
    def one(args, valid):
        out, summand = fn(*args, *shared, *([valid] if tell else []))
        return out, jax.tree.map(lambda x: jnp.where(valid, x, jnp.zeros_like(x)), summand) if padding else summand

    def group(carry, xs):
        total, held = carry
        i, args, valid = xs
        if in_place:
            args = (jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), held), *args)
        if chunk == 1:
            out, summand = one(args, valid)
            summands = jax.tree.map(lambda x: jnp.asarray(x)[None], summand)
        else:
            out, summands = jax.vmap(one)(args, valid)
        if in_place:
            new, *out = out
            held = jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), held, new)
        return (jax.tree.map(jnp.add, total, sum_fn(summands)), held), out

    # without an axis for chunks of 1, for which XLA would choose another layout, and copy all states into it and back
    split = lambda x: jnp.asarray(x).reshape(*((groups,) if chunk == 1 else (groups, chunk)), *x.shape[1:])  # noqa: E731
    xs, valid = jax.tree.map(split, (stacked, valid))
    held, xs = (xs[0], xs[1:]) if in_place else ((), xs)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), summed_shape)
    (total, held), out = jax.lax.scan(group, (zeros, held), (jnp.arange(groups), xs, valid))
    out = (held, *out) if in_place else out
    return jax.tree.map(lambda x: x.reshape(groups * chunk, *x.shape[1 if chunk == 1 else 2 :]), out), total


def place(tree: Any, layout: Layout, *spec: str | None) -> Any:
    """Puts a PyTree on the layout's devices: `place(tree, layout, "clients")` splits the first axis, without a
    spec every device gets the whole.

    >>> place(jnp.arange(3), Layout()).tolist()
    [0, 1, 2]
    """
    sharding = layout.sharding(*spec)
    if sharding is not None and jax.process_count() > 1:
        return jax.tree.map(lambda x: _place_everywhere(x, sharding), tree)
    return jax.device_put(tree) if sharding is None else jax.device_put(tree, sharding)


def _place_everywhere(x, sharding: NamedSharding):
    """An array that every process has, over the devices of all; `device_put` does not take random keys there."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda y: y, out_shardings=sharding)(x)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _place_everywhere(jax.random.key_data(x), sharding)
        return jax.jit(lambda d: jax.random.wrap_key_data(d, impl=jax.random.key_impl(x)))(data)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def place_rows(tree: Any, layout: Layout) -> Any:
    """A cohort's rows `[K, ...]` on the layout's devices, split over them if they can be; of several processes each gives its
    own, `layout.own(K)`.

    >>> place_rows({"w": np.zeros((3, 2))}, Layout())["w"].shape
    (3, 2)
    """
    sharding = layout.sharding(AXIS)
    if sharding is not None and jax.process_count() > 1:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
    leaves = jax.tree.leaves(tree)
    even = not leaves or leaves[0].shape[0] % layout.devices == 0
    return place(tree, layout, *([AXIS] if even else []))


def local_rows(tree: Any) -> Any:
    """What `place_rows` was given, in NumPy.

    >>> local_rows(place_rows({"w": np.zeros((3, 2))}, Layout()))["w"].shape
    (3, 2)
    """

    def rows(x):
        if jax.process_count() == 1 or x.is_fully_addressable:
            return np.asarray(x)
        # not multihost_utils, which may run a program of all processes: this is called beside others
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(rows, tree)


def split_over(tree: Any, layout: Layout) -> Any:
    """Within a compiled program of several processes: each is to have its own rows, which `local_rows` reads.

    >>> split_over(jnp.arange(3), Layout()).tolist()
    [0, 1, 2]
    """
    several = layout.mesh is not None and jax.process_count() > 1
    return jax.lax.with_sharding_constraint(tree, layout.sharding(AXIS)) if several else tree


def known_to_all(tree: Any, layout: Layout) -> Any:
    """Within a compiled program: every process is to have all of it; nothing to do where there is one.

    >>> known_to_all(jnp.arange(3), Layout()).tolist()
    [0, 1, 2]
    """
    several = layout.mesh is not None and jax.process_count() > 1
    return jax.lax.with_sharding_constraint(tree, layout.sharding()) if several else tree


def each_device(fn: Callable[[Any, PyTree, PyTree], None], own: PyTree, shared: PyTree, *, layout: Layout) -> None:
    """Within a compiled program: every device runs `fn(device, own, shared)` for its effects, with its number, [] int32, its
    rows of `own`, which split evenly, and all of `shared`.

    >>> each_device(lambda device, own, shared: print(device, own, shared), jnp.arange(3), jnp.int32(7), layout=Layout())
    0 [0 1 2] 7
    """

    def on_device(own, shared):
        fn(jnp.int32(0) if layout.mesh is None else jax.lax.axis_index(AXIS), own, shared)

    if layout.mesh is not None:
        specs = (PartitionSpec(AXIS), PartitionSpec())
        on_device = jax.shard_map(on_device, mesh=layout.mesh, in_specs=specs, out_specs=None, check_vma=False)
    on_device(own, shared)


def pair_places(
    into: np.ndarray, source: np.ndarray, new: int, old: int, devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `carry_over` takes, of clients who are in the places `into` of a cohort of `new`, in increasing order, and were in
    the places `source` of one of `old`: places as each device counts its own, `[new]`, filled up with some past the end.

    >>> [places.tolist() for places in pair_places(np.array([1, 2]), np.array([0, 3]), 4, 4, devices=2)]
    [[1, 2, 0, 2], [0, 0, 1, 0]]
    """
    each, was = new // devices, old // devices
    device = into // each
    at = device * each + np.arange(len(into)) - np.searchsorted(device, device)
    to, of = np.full(new, each, np.int32), np.zeros(new, np.int32)
    to[at], of[at] = into - device * each, source - device * was
    return to, of


def carry_over(clients: PyTree, last: PyTree, into, source, *, layout: Layout, by_device: bool) -> PyTree:
    """`clients[into] = last[source]`, places of `pair_places`; with `by_device` nobody goes from one device to another.

    >>> pairs = pair_places(np.array([2]), np.array([0]), 3, 3, devices=1)
    >>> carry_over(jnp.zeros(3), jnp.arange(7.0, 10.0), *pairs, layout=Layout(), by_device=True).tolist()
    [0.0, 0.0, 7.0]
    """

    def put(clients, last, into, source):
        return jax.tree.map(lambda x, y: x.at[into].set(y.at[source].get(mode="clip"), mode="drop"), clients, last)

    if layout.mesh is None:
        return put(clients, last, into, source)
    if by_device:
        split = PartitionSpec(AXIS)
        put = jax.shard_map(put, mesh=layout.mesh, in_specs=split, out_specs=split, check_vma=False)
        return put(clients, last, into, source)
    new = put(clients, last, into, source)
    even = into.shape[0] % layout.devices == 0
    return jax.lax.with_sharding_constraint(new, layout.sharding(AXIS)) if even else new
