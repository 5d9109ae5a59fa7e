"""What hypothesis draws: logits, masks, matrices of known spectra, ragged clients. Few shapes, so that little is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkd_jax import (
    FederatedData,
    LossTerms,
    Outputs,
    centralised,
    chain,
    energy_threshold,
    error_feedback,
    fedavg,
    feddropout,
    fedkd,
    fedpaq,
    fedprox,
    fetchsgd,
    fml,
    keep_units,
    local_only,
    mlp,
    power_codec,
    quantise,
    scaffold,
    svd_codec,
    top_k,
)

seeds = st.integers(0, 2**31 - 1)


def floats(shape, bound=6.0):
    """float32 arrays of one shape, without subnormals (XLA flushes them to zero)."""
    element = st.floats(-bound, bound, width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, shape, elements=element)


def masks(shape):
    return hnp.arrays(np.bool_, shape)


def labels(shape, classes):
    return hnp.arrays(np.int32, shape, elements=st.integers(0, classes - 1))


# ---- losses ------------------------------------------------------------------------------------------------------------

BATCH, CLASSES = 4, 3


@st.composite
def outputs(draw, widths, leading=(BATCH,), heads=0):
    """Model outputs; with `heads`, an attention map `[B, heads, L, L]` per layer, L = leading[1]."""
    seed = draw(seeds)
    rng = np.random.default_rng(seed)
    attention = ()
    if heads:
        raw = rng.uniform(size=(len(widths), leading[0], heads, leading[1], leading[1])).astype(np.float32)
        attention = tuple(raw / raw.sum(-1, keepdims=True))
    return Outputs(
        # within 2, or L_t + L_s could be so small that 1 / (L_t + L_s) is mostly float32's rounding
        logits=draw(floats((*leading, CLASSES), 2.0)),
        hidden=tuple(rng.normal(size=(*leading, width)).astype(np.float32) for width in widths),
        attention=attention,
    )


@st.composite
def distillation(draw, leading=(BATCH,), heads=0, any_mask=True):
    """`(teacher, student, labels, mask, projection)`: three teacher layers of width 5, two of width 4 in the student."""
    teacher, student = draw(outputs((5, 5, 5), leading, heads)), draw(outputs((4, 4), leading, heads))
    rng = np.random.default_rng(draw(seeds))
    projection = tuple(rng.normal(size=(4, 5)).astype(np.float32) for _ in range(2))
    mask = draw(masks(leading))
    if not any_mask:
        mask = mask | (np.arange(mask.size) == draw(st.integers(0, mask.size - 1))).reshape(mask.shape)
    return teacher, student, draw(labels(leading, CLASSES)), mask, projection


def one(tree, i):
    """Row i of every leaf, in NumPy: one client of many."""
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


def fields(terms: LossTerms) -> dict:
    return {name: getattr(terms, name) for name in LossTerms.__dataclass_fields__}


# ---- matrices ----------------------------------------------------------------------------------------------------------

SHAPES = ((6, 6), (9, 5), (5, 9), (1, 7), (7, 1))


@st.composite
def matrices(draw, shape=None):
    """A float32 matrix: decaying or equal singular values, rank one, zero, integers, or one entry only."""
    m, n = draw(st.sampled_from(SHAPES)) if shape is None else shape
    rng = np.random.default_rng(draw(seeds))
    r = min(m, n)
    spectrum = draw(st.sampled_from(("flat", "power", "steep", "one", "zero", "integers", "single", "gaussian")))
    if spectrum in ("gaussian", "integers", "zero", "single"):
        matrix = rng.normal(size=(m, n))
        if spectrum == "integers":
            matrix = rng.integers(-3, 4, (m, n)).astype(float)
        if spectrum == "zero":
            matrix = np.zeros((m, n))
        if spectrum == "single":
            matrix = np.zeros((m, n))
            matrix[rng.integers(m), rng.integers(n)] = rng.normal()
        return matrix.astype(np.float32)
    u, _ = np.linalg.qr(rng.normal(size=(m, r)))
    v, _ = np.linalg.qr(rng.normal(size=(n, r)))
    k = np.arange(1, r + 1)
    values = {"flat": np.ones(r), "power": 1.0 / k, "steep": 0.2**k, "one": (k == 1) * 3.0}[spectrum]
    return ((u * values) @ v.T).astype(np.float32)


thresholds = st.integers(300, 995).map(lambda thousandths: thousandths / 1000)


# ---- clients -----------------------------------------------------------------------------------------------------------


def ragged_data(counts, features, classes, seed, max_count=None, gap=2) -> FederatedData:
    """Clients in flat storage with strangers' rows (NaN, label out of range) between them, which nobody may read."""
    rng = np.random.default_rng(seed)
    shape = (features,) if isinstance(features, int) else features
    inputs, classes_of, starts, row = [], [], [], 0
    for count in counts:
        starts.append(row)
        inputs += [rng.normal(size=(count, *shape)), np.full((gap, *shape), np.nan)]
        classes_of += [rng.integers(0, classes, count), np.full(gap, 10**6)]
        row += count + gap
    return FederatedData(
        inputs=np.concatenate(inputs).astype(np.float32),
        labels=np.concatenate(classes_of).astype(np.int32),
        start=np.array(starts, np.int32),
        count=np.array(counts, np.int32),
        max_count=max(counts) if max_count is None else max_count,
    )


# ---- algorithms --------------------------------------------------------------------------------------------------------

FEATURES, TARGETS = 12, 3
COUNTS = (7, 3, 6, 1, 5)  # five clients


def small_fedkd(layout=None, **options):
    codec = svd_codec(energy_threshold(0.6, 0.9, 4))
    options = (
        dict(teacher_optimizer=optax.adam(0.05), student_optimizer=optax.sgd(0.2), uplink=codec, downlink=codec)
        | options
    )
    teacher, student, example = mlp((FEATURES, 8, TARGETS)), mlp((FEATURES, 10, TARGETS)), jnp.ones((1, FEATURES))
    return fedkd(teacher, student, example=example, batch=4, layout=layout, **options)


WARM = {"method": "randomized", "warm_start": True}
ALGORITHMS = {
    "fedkd": small_fedkd,
    "fedkd, Algorithm 1": lambda layout=None: small_fedkd(
        layout, message="gradient", steps=1, teacher_optimizer=optax.sgd(0.2)
    ),
    "fedkd, warm start": lambda layout=None: small_fedkd(
        layout, uplink=svd_codec(0.8, **WARM), downlink=svd_codec(0.8, **WARM)
    ),
    "fedkd, optimiser kept": lambda layout=None: small_fedkd(
        layout, student_optimizer=optax.adam(0.05), reset_student_optimizer=False, uplink=None, downlink=None
    ),
    "fedavg": lambda layout=None: fedavg(
        mlp((FEATURES, 10, TARGETS)), optimizer=optax.adam(0.05), batch=4, uplink=svd_codec(0.8), layout=layout
    ),
    "fedavg, optimiser kept": lambda layout=None: fedavg(
        mlp((FEATURES, 10, TARGETS)), optimizer=optax.adam(0.05), batch=4, reset_optimizer=False, layout=layout
    ),
    "fedprox": lambda layout=None: fedprox(
        mlp((FEATURES, 10, TARGETS)), mu=0.5, optimizer=optax.sgd(0.3), batch=4, layout=layout
    ),
    "scaffold": lambda layout=None: scaffold(mlp((FEATURES, 10, TARGETS)), learning_rate=0.2, batch=4, layout=layout),
    "fedpaq": lambda layout=None: fedpaq(
        mlp((FEATURES, 10, TARGETS)), bits=8, optimizer=optax.adam(0.05), batch=4, layout=layout
    ),
    "fetchsgd": lambda layout=None: fetchsgd(
        mlp((FEATURES, 10, TARGETS)),
        columns=80,
        share=0.5,
        momentum=0.3,
        optimizer=optax.sgd(0.3),
        batch=4,
        layout=layout,
    ),
    "feddropout": lambda layout=None: feddropout(
        mlp((FEATURES, 10, TARGETS)), sub_model=keep_units(0.6), optimizer=optax.sgd(0.3), batch=4, layout=layout
    ),
    "fedavg, top k": lambda layout=None: fedavg(
        mlp((FEATURES, 10, TARGETS)),
        optimizer=optax.sgd(0.3),
        batch=4,
        uplink=error_feedback(top_k(0.3)),
        downlink=error_feedback(chain(top_k(0.6), quantise(8))),
        layout=layout,
    ),
    "fedavg, PowerSGD": lambda layout=None: fedavg(
        mlp((FEATURES, 10, TARGETS)),
        optimizer=optax.sgd(0.3),
        batch=4,
        uplink=error_feedback(power_codec(2)),
        layout=layout,
    ),
    "fml": lambda layout=None: fml(
        mlp((FEATURES, 8, TARGETS)),
        mlp((FEATURES, 10, TARGETS)),
        teacher_optimizer=optax.adam(0.05),
        student_optimizer=optax.sgd(0.2),
        batch=4,
        layout=layout,
    ),
    "fedkd, quantised factors": lambda layout=None: small_fedkd(
        layout, uplink=chain(svd_codec(0.8), quantise(8)), downlink=chain(svd_codec(0.8), quantise(8))
    ),
    "local_only": lambda layout=None: local_only(
        mlp((FEATURES, 8, TARGETS)), optimizer=optax.adam(0.05), batch=4, layout=layout
    ),
    "local_only, bfloat16 at rest": lambda layout=None: local_only(
        mlp((FEATURES, 8, TARGETS)),
        optimizer=optax.adam(0.05),
        batch=4,
        teacher_dtype=jnp.bfloat16,
        moments_dtype=jnp.bfloat16,
        layout=layout,
    ),
    "centralised": lambda layout=None: centralised(
        mlp((FEATURES, 8, TARGETS)), optimizer=optax.adam(0.05), batch=4, layout=layout
    ),
}


def small_data(seed=0, counts=COUNTS):
    return ragged_data(counts, FEATURES, TARGETS, seed)
