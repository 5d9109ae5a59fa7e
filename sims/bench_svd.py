"""`sims.bench svd`: every factorisation on matrices of real training and of known spectra, against `jnp.linalg.svd`.

Times are per matrix of a stack, and interleaved. "vmap" is `jax.vmap(jnp.linalg.svd)` of the whole stack; the others go over
the stack as a round does over its clients, split over the devices, "split" with `jnp.linalg.svd` too. "x vmap" and "x split"
are what `method="auto"` gains over the two. Every factorisation may give up where the cost rule sends the matrix raw ("raw").

K is the float64 rank (median of the stack's matrices), "excess" how much above it the rank that `auto` found is, at most;
"energy" the least energy it kept, less T; "orthogonal" the largest entry of V^T V - 1.
"""

import functools
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

SHAPES = (*updates.TEXT, *updates.IMAGE)
SPECTRA = {"noise": 0.0, "i^-0.5": 0.5, "i^-1": 1.0, "i^-1.5": 1.5}
STACK = 8  # different matrices of one kind
COLUMNS = ("shape", "kind", "T", "stack", "vmap ms", "split ms", "auto ms", "x vmap", "x split", "K", "excess", "raw")


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
    """`fn` of one matrix, over a stack as in a round."""
    return jax.jit(lambda stack: map_clients(lambda x: (fn(x), ()), (stack,), layout=layout)[0])


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


def square_products(most: int, matrix):
    """The products of the Gram route alone: M^T M and M V."""
    return contract(matrix, contract(matrix, matrix, 0, 0)[:, :most], 1, 0)


def cases(quick: bool) -> Iterator[tuple]:
    """`(shape, kind, matrices [b, m, n])`."""
    if quick:
        for shape in ((256, 128), (576, 64)):
            yield shape, "i^-1", power_law(shape, 1.0, 2)
        return
    folder = os.environ.get("FEDKD_DATA_DIR")
    if not folder:
        raise ValueError("FEDKD_DATA_DIR is not set; allowed: the folder that holds news20 and fashion_mnist")
    real = updates.real_matrices(pathlib.Path(folder), STACK)
    for shape in SHAPES:
        for kind in updates.KINDS:
            yield shape, kind, real[shape, kind]
        for kind, exponent in SPECTRA.items():
            yield shape, kind, power_law(shape, exponent, STACK)


def bench_svd(interleave: Callable, devices: int, quick: bool) -> Iterator[dict]:
    """Stacks of 8 of every kind of matrix, and of 1 and 64 of two kinds."""
    on_cpu = jax.default_backend() == "cpu"
    for shape, kind, matrices in cases(quick):
        m, n = shape
        most, columns = max_factored_rank(m, n), sketch_columns(n)
        for threshold in (0.95, 0.98):
            found = quality(matrices, threshold, most)
            others = [method for method in ("gram", "randomized") if method != choose_method(m, n)]
            for method in others:
                other = quality(matrices, threshold, most, method)
                found |= {f"{method} {key}": other[key] for key in ("wrong", "excess", "energy", "orthogonal")}
            few = threshold == 0.98 or kind not in ("gradient", "Adam 5")
            for count in (2,) if quick else (STACK,) if few else (1, STACK, 64):
                stack = np.resize(matrices, (count, m, n))
                d = min(devices, count)
                layout = Layout(mesh=client_mesh(d) if d > 1 else None, chunk=1 if on_cpu else None)
                whole, cut = place(stack, Layout()), place(stack, layout, "clients")
                svd = functools.partial(jnp.linalg.svd, full_matrices=False)
                programs: dict[str, tuple] = {
                    "vmap": (jax.jit(jax.vmap(svd)), whole),
                    "split": (split(svd, layout), cut),
                }
                for method in (*others, "auto"):
                    run = functools.partial(factorise, threshold=threshold, method=method, max_rank=most)
                    programs[method] = (split(run, layout), cut)
                programs["thin products"] = (split(functools.partial(thin_products, columns), layout), cut)
                programs["square products"] = (split(functools.partial(square_products, most), layout), cut)
                calls = {
                    name: lambda fn=fn, arg=arg: jax.block_until_ready(fn(arg)) for name, (fn, arg) in programs.items()
                }
                repeats = 15 if stack.size < 2**20 else 3  # milliseconds, or seconds
                times = interleave(calls, 1 if quick or count == 64 else repeats)
                each = {f"{name} ms": 1e3 * t["wall"] / count for name, t in times.items()}
                each[f"{choose_method(m, n)} ms"] = each["auto ms"]
                gains = {f"x {name}": each[f"{name} ms"] / each["auto ms"] for name in ("vmap", "split")}
                yield {"shape": f"{m} x {n}", "kind": kind, "T": threshold, "stack": count, **each, **gains, **found}


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
