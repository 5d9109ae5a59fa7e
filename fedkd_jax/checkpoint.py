"""A run on disk, to go on from: the server by Orbax, the clients with it or, where they are in a store, in the store's files.

A checkpoint is there when Orbax has renamed its folder; until then the one before is, and nothing that it needs is written
over.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from fedkd_jax.parallel import Layout
from fedkd_jax.population import state_shapes
from fedkd_jax.stores import Store
from fedkd_jax.types import Algorithm, Key, PyTree, State


def save_state(folder: str | pathlib.Path, state: State) -> None:
    """Writes a state, of which `load_state` makes the same; the one that was there before is deleted then.

    Of several processes all call it, with a folder that all of them see. Clients on disk must be in this folder: nothing is
    copied then, but what the next rounds write takes new space, once.

    Raises:
        ValueError: a store that has gone on since, or is in another folder; a checkpoint of this round or a later.

    >>> import optax, tempfile
    >>> from fedkd_jax import init_state, local_only, mlp
    >>> algorithm, folder = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), tempfile.mkdtemp()
    >>> save_state(folder, init_state(algorithm, 5, jax.random.key(0)))
    >>> load_state(folder, algorithm, 5, jax.random.key(0)).clients.teacher["dense_0"]["kernel"].shape
    (5, 4, 2)
    """
    folder, round = pathlib.Path(folder), int(state.server.round)
    folder.mkdir(parents=True, exist_ok=True)
    store = state.clients if isinstance(state.clients, Store) else None
    carried = state if store is None else state.server
    if store is not None and store.round != round:
        raise ValueError(f"state is of round {round}, its store at {store.round}; allowed: the newest state")
    meta = {"store": store is not None, "processes": jax.process_count(), "shapes": _shapes(carried)}
    with _manager(folder) as manager:
        there = manager.latest_step()
        if there is not None and there >= round:
            raise ValueError(
                f"{folder} has a checkpoint of round {there}; allowed: one of a round before {round}, or none"
            )
        if store is not None:
            store.save(folder, round)
        args = ocp.args.Composite(state=ocp.args.StandardSave(carried), meta=ocp.args.JsonSave(meta))
        manager.save(round, args=args)
        manager.wait_until_finished()
    if store is not None:
        store.forget(folder, round)


def load_state(
    folder: str | pathlib.Path, algorithm: Algorithm, population: int, key: Key, *, store: Store | None = None
) -> State:
    """The newest state that `save_state` wrote, to give to `simulate`, which goes on to the same bits; the number of processes
    may be another one.

    Args:
        folder: where it was saved.
        algorithm, population, key: as they were given to `simulate`.
        store: for clients that were in one: a new `HostStore`, or `DiskStore(folder, resume=True)` if they were on disk.

    Raises:
        FileNotFoundError: there is no checkpoint, or a file of it is gone.
        ValueError: it is of another run, as far as shapes tell, and of clients in a store the key; clients were in a store and
            none is given, or the other way round; the store is not a new one.

    >>> import optax, tempfile
    >>> from fedkd_jax import local_only, mlp
    >>> try: load_state(tempfile.mkdtemp(), local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), 5, jax.random.key(0))
    ... except FileNotFoundError as error: print(str(error).split()[-2:])
    ['no', 'checkpoint']
    """
    folder = pathlib.Path(folder)
    if not (folder / "server").is_dir():
        raise FileNotFoundError(f"{folder} has no checkpoint")
    with _manager(folder) as manager:
        round = manager.latest_step()
        if round is None:
            raise FileNotFoundError(f"{folder} has no checkpoint")
        meta = manager.restore(round, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["store"] != (store is not None):
            allowed = (
                "a new HostStore, or DiskStore(folder, resume=True) if they were on disk" if meta["store"] else "None"
            )
            raise ValueError(
                f"store is {store}; allowed: {allowed}, as clients were {'' if meta['store'] else 'not '}in a store"
            )
        whole = state_shapes(algorithm, population)
        abstract = whole if store is None else whole.server
        if _shapes(abstract) != meta["shapes"]:
            pairs = zip(meta["shapes"], _shapes(abstract), strict=False)
            saved, own = next((p for p in pairs if p[0] != p[1]), ("other leaves", "these"))
            raise ValueError(f"{folder} has {saved}; allowed: {own}, as the algorithm has")
        layout = algorithm.layout or Layout()
        restored = manager.restore(
            round, args=ocp.args.Composite(state=ocp.args.StandardRestore(_placed(abstract, layout)))
        )["state"]
    if store is None:
        return restored
    store.open(algorithm, jax.random.split(key)[0], population)  # as `simulate` does
    store.load(folder, round, meta["processes"])
    return State(server=restored, clients=store)


@contextlib.contextmanager
def _manager(folder: pathlib.Path) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    with ocp.CheckpointManager(folder.absolute() / "server", options=options, item_names=("state", "meta")) as manager:
        yield manager


def _shapes(tree: PyTree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    each = [f"{jax.tree_util.keystr(path)} {jax.numpy.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves]
    return [*each, str(jax.tree.structure(tree))]


def _placed(abstract: Any, layout: Layout) -> Any:
    """Where what is restored goes: a server to every device, clients split over them."""

    def placed(tree, *spec):
        sharding = layout.sharding(*spec) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    if not isinstance(abstract, State):
        return placed(abstract)
    return State(server=placed(abstract.server), clients=placed(abstract.clients, "clients"))
