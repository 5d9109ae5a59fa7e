"""`sims.bench svd`: every factorisation on matrices of real training and of known spectra, against `jnp.linalg.svd`.

Times are per matrix of a stack, and interleaved. "vmap" is `jax.vmap(jnp.linalg.svd)` of the whole stack; the others go over
the stack as a round does over its clients, split over the devices, "split" with `jnp.linalg.svd` too. "x vmap" and "x split"
are what `method="auto"` gains over the two, "limit" the time of the matrix products alone that no method of ours does without.
Every factorisation may give up where the cost rule sends the matrix raw ("raw"). results.json holds the times of all.

K is the float64 rank (median of the 8 matrices of a kind; a stack of 1 holds the first, one of 64 each eight times), "excess"
how much above it the rank that `auto` found is, at most; "energy" the least energy it kept, less T; "orthogonal" the largest
entry of V^T V - 1.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from fedkd_jax.codecs import max_factored_rank
from fedkd_jax.parallel import Layout, client_mesh, map_clients, place
from fedkd_jax.subspace import contract
from fedkd_jax.svd import choose_method, factorise, sketch_columns
from sims import updates
from sims.workload import interleave

SHAPES = (*updates.TEXT, *updates.IMAGE)
SPECTRA = {"noise": 0.0, "i^-0.5": 0.5, "i^-1": 1.0, "i^-1.5": 1.5}
THRESHOLDS = (0.95, 0.98)
STACK = 8  # different matrices of one kind
STACKS = (1, STACK, 64)
COLUMNS = ("shape", "stack", "kind", "T", "auto ms", "limit ms", "x vmap", "x split")
COLUMNS += ("K", "excess", "energy", "orthogonal", "raw")


def power_law(shape: tuple[int, int], exponent: float, count: int) -> np.ndarray:
    """Matrices `[count, m, n]` with singular values i^-exponent, or of independent normal entries where that is 0.

    >>> [f"{s:.3f}" for s in np.linalg.svd(power_law((5, 3), 1.0, 2), compute_uv=False)[1]]
    ['1.000', '0.500', '0.333']
    """
    (m, n), rng = shape, np.random.default_rng(0)
    if exponent == 0.0:
        return rng.normal(size=(count, m, n)).astype(np.float32)
    u, _ = np.linalg.qr(rng.normal(size=(m, n)))
    v, _ = np.linalg.qr(rng.normal(size=(count, n, n)))
    return ((u * np.arange(1, n + 1) ** -exponent) @ v).astype(np.float32)


def split(fn: Callable, layout: Layout) -> Callable:
    """`fn` of one matrix, over a stack as in a round; what else it takes is the same for all."""
    return jax.jit(
        lambda stack, *shared: map_clients(lambda x, *a: (fn(x, *a), ()), (stack,), shared, layout=layout)[0]
    )


def exact_ranks(stack: np.ndarray, threshold: float) -> np.ndarray:
    """The smallest ranks that keep more than the threshold, `[b]`, from float64.

    >>> exact_ranks(np.diag([3.0, 2.0, 1.0])[None], 0.95).tolist()
    [3]
    """
    ranks = []
    for matrix in stack.astype(np.float64):
        values = np.maximum(np.linalg.eigvalsh(matrix.T @ matrix)[::-1], 0.0)
        ranks.append(1 + int(np.sum(np.cumsum(values) <= np.float32(threshold) * values.sum())))
    return np.array(ranks)


def quality(stack: np.ndarray, threshold: float, most: int, method: str = "auto") -> dict:
    """What a method found in every matrix: ranks, and how good the factors are, in float64.

    >>> quality(power_law((9, 5), 1.0, 2), 0.9, 5)["excess"]
    0
    """
    exact, excess, energy, orthogonal, raw = exact_ranks(stack, threshold), [], [], [], 0
    run = jax.jit(functools.partial(factorise, method=method, max_rank=most))
    for matrix, k in zip(stack, exact, strict=True):
        factors = jax.device_get(run(matrix, threshold))
        found = int(factors.rank)
        raw += found > most
        excess.append(found - min(int(k), most + 1))
        if found <= most:
            left, right = (np.asarray(x, np.float64) for x in (factors.left, factors.right))
            lost = np.sum((matrix - left @ right) ** 2) / np.sum(matrix.astype(np.float64) ** 2)
            energy.append(1 - lost - threshold)
            orthogonal.append(np.abs(right[:found] @ right[:found].T - np.eye(found)).max())
    return {
        "K": int(np.median(exact)),
        "most": most,
        "raw": raw,
        "matrices": len(stack),
        "wrong": int(np.count_nonzero(excess)),
        "excess": max(excess, key=abs),
        "energy": float(min(energy)) if energy else None,
        "orthogonal": float(max(orthogonal)) if orthogonal else None,
    }


def thin_products(columns: int, matrix):
    """The products of subspace iteration alone, up to the first certificate: twice M X and M^T Y, or M^T M, four times G X and
    M V."""
    x = matrix[:columns]
    if matrix.shape[1] <= 4 * columns:
        g = contract(matrix, matrix, 0, 0)
        for _ in range(4):
            x = contract(x, g, 1, 0)
        return contract(matrix, x, 1, 1)
    for _ in range(2):
        x = contract(contract(matrix, x, 1, 1), matrix, 0, 0)
    return x


def gram_product(matrix):
    """The product that shows that a flat spectrum goes raw: M^T M."""
    return contract(matrix, matrix, 0, 0)


def square_products(most: int, matrix):
    """The products of the Gram route alone: M^T M and M V."""
    return contract(matrix, contract(matrix, matrix, 0, 0)[:, :most], 1, 0)


def products(columns: int, most: int) -> dict[str, Callable]:
    """The products of each route by name, for `sketch_columns` and `max_factored_rank` of the shape.

    >>> [fn(jnp.ones((9, 5))).shape for fn in products(2, 3).values()]
    [(9, 2), (5, 5), (9, 3)]
    """
    return {
        "thin products": functools.partial(thin_products, columns),
        "gram product": gram_product,
        "square products": functools.partial(square_products, most),
    }


def limit(found: dict, columns: int) -> str:
    """Which products no method of ours does without, for matrices of that quality.

    >>> limit({"K": 9, "most": 30, "raw": 0, "matrices": 8}, 16), limit({"K": 31, "most": 30, "raw": 8, "matrices": 8}, 16)
    ('thin products', 'gram product')
    """
    if found["raw"] > found["matrices"] / 2:
        return "gram product"
    return "thin products" if found["K"] <= columns else "square products"


def cases(shape: tuple[int, int], real: dict | None) -> Iterator[tuple[str, np.ndarray]]:
    """`(kind, matrices [b, m, n])`.

    >>> [(kind, matrices.shape) for kind, matrices in cases((9, 5), None)]
    [('i^-1', (2, 9, 5))]
    """
    if real is None:
        yield "i^-1", power_law(shape, SPECTRA["i^-1"], 2)
        return
    for kind in updates.KINDS:
        yield kind, real[shape, kind]
    for kind, exponent in SPECTRA.items():
        yield kind, power_law(shape, exponent, STACK)


def bench_svd(devices: int, quick: bool) -> Iterator[dict]:
    """Stacks of 1, 8 and 64 of every kind of matrix."""
    folder, real = os.environ.get("FEDKD_DATA_DIR"), None
    if not quick:
        if not folder:
            raise ValueError("FEDKD_DATA_DIR is not set; allowed: the folder that holds news20 and fashion_mnist")
        real = updates.real_matrices(pathlib.Path(folder), STACK)
    for shape in ((256, 128), (576, 64)) if quick else SHAPES:
        (m, n), most, columns = shape, max_factored_rank(*shape), sketch_columns(min(shape))
        kinds = dict(cases(shape, real))
        methods = [method for method in ("gram", "randomized") if method != choose_method(m, n)] + ["auto"]
        found = {}
        for kind, threshold, method in itertools.product(kinds, THRESHOLDS, methods):
            found[kind, threshold, method] = quality(kinds[kind], threshold, most, method)
        for count in (2,) if quick else STACKS:
            d = min(devices, count)
            chunk = 1 if jax.default_backend() == "cpu" else None
            layout = Layout(mesh=client_mesh(d) if d > 1 else None, chunk=chunk)
            svd = functools.partial(jnp.linalg.svd, full_matrices=False)
            whole = {"vmap": jax.jit(jax.vmap(svd))}
            bare = {
                "split": split(svd, layout),
            } | {name: split(fn, layout) for name, fn in products(columns, most).items()}
            ours = {name: split(functools.partial(factorise, method=name, max_rank=most), layout) for name in methods}
            for kind, matrices in kinds.items():
                stack = np.resize(matrices, (count, m, n))
                unsplit, parts = place(stack, Layout()), place(stack, layout, "clients")
                calls: dict = {name: functools.partial(fn, unsplit) for name, fn in whole.items()}
                calls |= {name: functools.partial(fn, parts) for name, fn in bare.items()}
                for threshold in THRESHOLDS:
                    for name, fn in ours.items():
                        calls[name, threshold] = functools.partial(fn, parts, threshold)
                times = interleave(
                    {name: lambda call=call: jax.block_until_ready(call()) for name, call in calls.items()},
                    1 if quick else 15 if stack.size < 2**22 else 3 if count < 64 else 1,  # milliseconds to a minute
                )
                each = {name: 1e3 * t["wall"] / count for name, t in times.items()}
                for threshold in THRESHOLDS:
                    result = found[kind, threshold, "auto"]
                    ms = {name: each[name] for name in (*whole, *bare)} | {name: each[name, threshold] for name in ours}
                    ms |= {choose_method(m, n): ms["auto"], "limit": ms[limit(result, columns)]}
                    row = {"shape": f"{m} x {n}", "stack": count, "kind": kind, "T": threshold}
                    row |= {f"{name} ms": t for name, t in ms.items()}
                    row |= {f"x {name}": ms[name] / ms["auto"] for name in ("vmap", "split")}
                    for name in methods[:-1]:
                        row |= {f"{name} {key}": value for key, value in found[kind, threshold, name].items()}
                    yield row | result


def plot(rows: list[dict]) -> Figure:
    """What `auto` gains over both ways to run `jnp.linalg.svd`, for the largest stack up to 8 at the lowest threshold.

    >>> row = {"shape": "9 x 5", "kind": "noise", "T": 0.95, "stack": 8, "x vmap": 3.0, "x split": 2.0}
    >>> plot([row]).axes[0].get_xlabel()[:4]
    'time'
    """
    stack = max(row["stack"] for row in rows if row["stack"] <= STACK)
    shown = [row for row in rows if row["stack"] == stack and row["T"] == min(r["T"] for r in rows)]
    shapes, kinds = ([*dict.fromkeys(row[key] for row in shown)] for key in ("shape", "kind"))
    figure = Figure(figsize=(7.5, 1.8 + 1.0 * len(shapes)), layout="constrained")
    ax = figure.add_subplot()
    marks = "os^DvP*X"
    for i, kind in enumerate(kinds):
        own = [row for row in shown if row["kind"] == kind]
        height = np.array([shapes.index(row["shape"]) for row in own]) + 0.3 - 0.6 * i / max(len(kinds) - 1, 1)
        color, marker = f"C{i}", marks[i % len(marks)]
        ax.hlines(height, [r["x split"] for r in own], [r["x vmap"] for r in own], color=color, lw=1)
        ax.plot([r["x vmap"] for r in own], height, ls="", marker=marker, color=color, label=kind)
        ax.plot([r["x split"] for r in own], height, ls="", marker=marker, color=color, mfc="white")
    ax.set(xscale="log", yticks=range(len(shapes)), yticklabels=shapes, ylim=(-0.6, len(shapes) - 0.4))
    ax.set_xlabel(
        "time of jnp.linalg.svd / time of method='auto'\nfilled: vmap of the stack, hollow: split over the devices"
    )
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.axvline(1, color="0.3", lw=1)
    ax.grid(axis="x", which="both", alpha=0.25)
    ax.invert_yaxis()
    figure.legend(title=f"stack of {stack}, T = {shown[0]['T']}", fontsize=8, ncols=4, loc="outside upper center")
    return figure
