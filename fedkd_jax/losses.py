"""The paper's losses (eqs. 1-7): task loss, mutual distillation, hidden and attention loss, adaptive weight.

Pure functions of one client's model outputs; no client axis, no parameters. A masked example contributes exactly zero to
every value and gradient, whatever its logits or label hold.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int, Shaped

from fedkd_jax.check import check_fn, check_int, check_type
from fedkd_jax.types import Array, LossTerms, Outputs


def _expand(mask: Array, shape: tuple[int, ...]) -> jax.Array:
    """A mask over leading axes, brought to `shape`: missing axes are broadcast, surplus ones reduced by any."""
    mask = jnp.asarray(mask, bool)
    if mask.ndim > len(shape):
        mask = mask.any(axis=tuple(range(len(shape), mask.ndim)))
    if mask.shape != shape[: mask.ndim]:
        raise ValueError(f"mask has shape {mask.shape}; allowed: the leading axes of {shape}")
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    count = mask.sum()
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(count, 1).astype(values.dtype)


def _hide(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeros where masked, before anything non-linear, so that not even a NaN there reaches value or gradient."""
    return jnp.where(mask[..., None], values, 0.0)


def check_labels(logits: Array, labels: Array) -> None:
    """Refuses labels that are not an integer for each row of logits.

    Raises:
        ValueError: another shape or type.

    >>> try: check_labels(jnp.zeros((4, 3)), jnp.zeros((4, 1), int))
    ... except ValueError as error: print(error)
    labels is int32[4, 1] with logits float32[4, 3]; allowed: integers [4] with floating-point logits
    """
    rows, kinds = jnp.shape(logits)[:-1], [jnp.result_type(x) for x in (logits, labels)]
    whole = jnp.issubdtype(kinds[1], jnp.integer) and jnp.issubdtype(kinds[0], jnp.floating)
    if jnp.ndim(logits) == 0 or jnp.shape(labels) != rows or not whole:
        given, wanted = (f"{kind}{list(jnp.shape(x))}" for kind, x in zip(kinds, (logits, labels), strict=True))
        raise ValueError(
            f"labels is {wanted} with logits {given}; allowed: integers {list(rows)} with floating-point logits"
        )


def answered(labels: Int[Array, "..."], mask: Shaped[Array, "..."]) -> Bool[jax.Array, "..."]:
    """The mask over labels of what is to be predicted: not masked, and a label that is not below 0.

    >>> answered(jnp.array([[3, -1], [1, 1]]), jnp.array([True, False])).tolist()
    [[True, False], [False, False]]
    """
    return _expand(mask, labels.shape) & (jnp.asarray(labels) >= 0)


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], mask: Shaped[Array, "..."]
) -> Float[Array, ""]:
    """Task loss L = CE(y, p), eqs. 1-2: the mean over unmasked entries of -log p_y.

    Args:
        logits: `[B, ..., C]` float32.
        labels: `[B, ...]` int, in 0..C-1; below 0 where there is nothing to predict, which masks the entry. Of C or more the
            value is NaN and the gradient that of no class at all; of logits with a NaN both are NaN.
        mask: bool or 0/1 over the leading axes: `[B]`, or `[B, L]` for tokens; False entries do not count.

    Returns:
        `[]` in nats; 0 when all entries are masked.

    Raises:
        ValueError: labels that are no integer for each row of logits, or a mask whose shape is not a prefix of theirs.

    >>> import jax.numpy as jnp
    >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 9.0]]), jnp.array([0, 0])
    >>> float(cross_entropy(logits, labels, jnp.array([True, False]))).__round__(4)
    0.1269
    """
    check_labels(logits, labels)
    mask = answered(labels, mask)
    logits, labels = _hide(jnp.asarray(logits), mask), jnp.where(mask, labels, 0)
    return _masked_mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), mask)


def kl_divergence(
    p_logits: Float[Array, "*batch classes"], q_logits: Float[Array, "*batch classes"], mask: Shaped[Array, "..."]
) -> Float[Array, ""]:
    """KL(p || q) = sum_c p_c log(p_c / q_c), p = softmax(p_logits), q = softmax(q_logits): the mean over unmasked entries.

    The reference code takes the mean over classes too (`KLDivLoss`'s default), which divides by C; we follow the paper.

    Args:
        p_logits, q_logits: `[B, ..., C]` float32.
        mask: bool or 0/1 over the leading axes; False entries do not count.

    Returns:
        `[]` in nats, never negative; 0 for equal logits and when all entries are masked.

    Raises:
        ValueError: logits of two shapes, or a mask that is not over their leading axes.

    >>> import jax.numpy as jnp
    >>> p, mask = jnp.array([[1.0, 2.0, 3.0]]), jnp.ones(1, bool)
    >>> float(kl_divergence(p, p, mask)), float(kl_divergence(p, -p, mask)).__round__(4)
    (0.0, 1.1504)
    """
    if jnp.shape(p_logits) != jnp.shape(q_logits) or jnp.ndim(p_logits) == 0:
        raise ValueError(f"q_logits has shape {jnp.shape(q_logits)}; allowed: {jnp.shape(p_logits)}, that of p_logits")
    mask = _expand(mask, p_logits.shape[:-1])
    log_p, log_q = (jax.nn.log_softmax(_hide(jnp.asarray(x), mask)) for x in (p_logits, q_logits))
    # rounding can leave -1e-8 at the minimum, where value and gradient are 0
    divergence = jnp.maximum(optax.losses.kl_divergence_with_log_targets(log_q, log_p), 0.0)
    return _masked_mean(divergence, mask)


def layer_map(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """The teacher layer (0 = lowest) each student layer is matched with: every (L_t // L_s)-th from the top.

    Raises:
        ValueError: the student has more layers than the teacher, or one has fewer than none.

    >>> layer_map(12, 4), layer_map(7, 2), layer_map(3, 0)
    ((2, 5, 8, 11), (3, 6), ())
    """
    check_int("teacher_layers", teacher_layers, 0)
    check_int("student_layers", student_layers, 0)
    if student_layers > teacher_layers:
        raise ValueError(f"student_layers is {student_layers}; allowed: at most teacher_layers, {teacher_layers}")
    if student_layers == 0:
        return ()
    step = teacher_layers // student_layers
    return tuple(teacher_layers - 1 - step * (student_layers - 1 - j) for j in range(student_layers))


def hidden_loss(
    teacher: Outputs, student: Outputs, mask: Shaped[Array, "..."], projection: Sequence[Array] | None = None
) -> Float[Array, ""]:
    """Sum over matched layers of MSE(H_t, W_h H_s) + MSE(A_t, A_s), eq. 5 before its division by L_t + L_s.

    Each MSE is the mean over unmasked positions and over features (over heads and unmasked query-key pairs for
    attention maps). The sum over layers is the reference code's; the paper writes one layer only. Pairs that both models
    hide by themselves, as causal ones do, are equal and count as such.

    Args:
        teacher, student: hidden `[B, ..., d_t]` and `[B, ..., d_s]`, attention `[B, ..., heads, L, L]`; either may be `()`.
            Where a model gives a mask of its own (padding), positions hidden by it do not count either.
        mask: bool over leading axes. A token mask `[B, ..., L]` hides an attention pair when it hides its query or its key.
        projection: W_h per student layer, `[d_s, d_t]` (rows times matrix: `H_s @ W_h`); None is the identity.

    Raises:
        ValueError: widths differ and there is no projection, a projection's shape or number is off, head counts differ,
            or the student has more layers than the teacher.

    >>> import jax.numpy as jnp
    >>> teacher = Outputs(jnp.zeros((2, 3)), hidden=(jnp.zeros((2, 4)), jnp.ones((2, 4))))
    >>> student = Outputs(jnp.zeros((2, 3)), hidden=(jnp.ones((2, 5)),))
    >>> float(hidden_loss(teacher, student, jnp.ones(2, bool), (jnp.ones((5, 4)),)))
    16.0
    """
    for name, outputs in (("teacher", teacher), ("student", student)):
        check_type(name, outputs, Outputs)
    if projection is not None and len(projection) != len(student.hidden):
        raise ValueError(
            f"projection has {len(projection)} matrices; allowed: one per student layer, {len(student.hidden)}"
        )
    own_masks = [x.mask for x in (teacher, student) if not isinstance(x.mask, tuple)]

    def entries_of(shape: tuple[int, ...]) -> jax.Array:
        return functools.reduce(jnp.logical_and, [_expand(m, shape) for m in (mask, *own_masks)])

    total = jnp.zeros((), jnp.float32)
    for j, i in enumerate(layer_map(len(teacher.hidden), len(student.hidden))):
        target, own = teacher.hidden[i], student.hidden[j]
        if projection is not None and jnp.shape(projection[j]) != (own.shape[-1], target.shape[-1]):
            raise ValueError(
                f"projection[{j}] has shape {jnp.shape(projection[j])}; "
                f"allowed: (student width, teacher width) = {(own.shape[-1], target.shape[-1])}"
            )
        entries = entries_of(own.shape[:-1])
        target, own = _hide(jnp.asarray(target), entries), _hide(jnp.asarray(own), entries)
        if projection is not None:
            own = own @ projection[j]
        if own.shape != target.shape:
            raise ValueError(
                f"hidden of student layer {j} has shape {own.shape} and of teacher layer {i} {target.shape}; "
                "allowed: equal shapes, or widths that differ together with a projection"
            )
        total += _masked_mean(jnp.mean((target - own) ** 2, axis=-1), entries)
    for j, i in enumerate(layer_map(len(teacher.attention), len(student.attention))):
        target, own = jnp.asarray(teacher.attention[i]), jnp.asarray(student.attention[j])
        if own.shape != target.shape:
            raise ValueError(
                f"attention of student layer {j} has shape {own.shape} and of teacher layer {i} {target.shape}; "
                "allowed: equal shapes [B, ..., heads, L, L]"
            )
        *lead, _, queries, keys = own.shape
        if any(jnp.shape(m)[len(lead) :][:1] == (queries,) == (keys,) for m in (mask, *own_masks)):
            token = entries_of((*lead, queries))
            pairs = token[..., None, :, None] & token[..., None, None, :]
        else:
            pairs = entries_of(tuple(lead))[..., None, None, None]
        pairs = jnp.broadcast_to(pairs, own.shape)
        total += _masked_mean((jnp.where(pairs, target, 0.0) - jnp.where(pairs, own, 0.0)) ** 2, pairs)
    return total


def mutual_distillation(
    teacher: Outputs,
    student: Outputs,
    labels: Int[Array, "..."],
    mask: Shaped[Array, "..."],
    projection: Sequence[Array] | None = None,
    *,
    adaptive: bool = True,
    distill: bool = True,
    hidden: bool = True,
    attention: bool = True,
    mutual: bool = True,
    stop_weight_gradient: bool = False,
) -> LossTerms:
    """All losses of one client on one batch, eqs. 1-7.

    With w = 1 / (L_t + L_s):  D_t = w KL(p_s || p_t),  D_s = w KL(p_t || p_s),  Hid = w sum_layers [MSE(H_t, W_h H_s) +
    MSE(A_t, A_s)],  teacher total = D_t + Hid + L_t,  student total = D_s + Hid + L_s.

    The teacher's gradient is d teacher_total / d teacher parameters, the student's d student_total / d student parameters
    (Algorithm 1); the reference code sums both totals into one loss, so that each also moves the other model. The weight w
    is part of the formula and is differentiated, unless `stop_weight_gradient`. That takes from the task loss:
    d teacher_total / d L_t = 1 - w (D_t + Hid), negative where D_t + Hid > L_t + L_s, and the same with D_s for the
    student. Where L_t + L_s is exactly 0 (a batch that is masked whole), w is 1.

    Args:
        teacher, student: outputs on the same batch, logits `[B, ..., C]`.
        labels: `[B, ...]` int; below 0 where there is nothing to predict: such an entry is in Hid only.
        mask: bool or 0/1 over the leading axes; False entries do not count.
        projection: W_h per student layer, `[d_s, d_t]`; None where widths are equal and no map is wanted.
        adaptive: False divides by 1.
        distill: False drops D_t and D_s.
        hidden: False drops Hid.
        attention: False drops MSE(A_t, A_s) from Hid.
        mutual: False lets the teacher learn from the labels alone; the student still learns from it.
        stop_weight_gradient: True treats w as a constant.

    Returns:
        LossTerms of scalars, the divided values.

    Raises:
        ValueError: shapes that do not fit, see `hidden_loss` and `cross_entropy`.

    >>> import jax.numpy as jnp
    >>> teacher, student = Outputs(jnp.array([[2.0, 0.0]])), Outputs(jnp.array([[0.0, 0.0]]))
    >>> terms = mutual_distillation(teacher, student, jnp.array([0]), jnp.array([True]))
    >>> float(terms.teacher_total).__round__(4), float(terms.student_total).__round__(4)
    (0.6559, 1.0929)
    """
    for name, outputs in (("teacher", teacher), ("student", student)):
        check_type(name, outputs, Outputs)
    if not attention:
        teacher, student = (dataclasses.replace(outputs, attention=()) for outputs in (teacher, student))
    teacher_task = cross_entropy(teacher.logits, labels, mask)
    student_task = cross_entropy(student.logits, labels, mask)
    denominator = teacher_task + student_task if adaptive else jnp.ones_like(teacher_task)
    denominator = jnp.where(denominator > 0, denominator, 1.0)
    if stop_weight_gradient:
        denominator = jax.lax.stop_gradient(denominator)
    zero, entries = jnp.zeros_like(teacher_task), answered(labels, mask)
    teacher_distill = kl_divergence(student.logits, teacher.logits, entries) / denominator if distill else zero
    student_distill = kl_divergence(teacher.logits, student.logits, entries) / denominator if distill else zero
    hid = hidden_loss(teacher, student, mask, projection) / denominator if hidden else zero
    return LossTerms(
        teacher_task=teacher_task,
        student_task=student_task,
        teacher_distill=teacher_distill,
        student_distill=student_distill,
        hidden=hid,
        teacher_total=teacher_distill + hid + teacher_task if mutual else teacher_task,
        student_total=student_distill + hid + student_task,
    )


def per_example(loss_fn: Callable[..., LossTerms]) -> Callable[..., LossTerms]:
    """A loss of a batch as the mean of the losses of its examples, each with an adaptive weight 1 / (L_t + L_s) of its own.

    The paper's weight is one of the whole batch. Examples that are masked whole do not count.

    Args:
        loss_fn: `(teacher, student, labels, mask, projection) -> LossTerms`, such as `mutual_distillation`.

    >>> import jax.numpy as jnp
    >>> teacher, student = Outputs(jnp.array([[2.0, 0.0], [0.0, 0.0]])), Outputs(jnp.array([[0.0, 0.0], [1.0, 0.0]]))
    >>> labels, mask = jnp.array([0, 0]), jnp.array([True, True])
    >>> whole = per_example(mutual_distillation)(teacher, student, labels, mask)
    >>> each = [mutual_distillation(*(Outputs(x.logits[i : i + 1]) for x in (teacher, student)), labels[i : i + 1],
    ...                             mask[i : i + 1]) for i in (0, 1)]
    >>> bool(jnp.isclose(whole.teacher_distill, (each[0].teacher_distill + each[1].teacher_distill) / 2))
    True
    """
    check_fn("loss_fn", loss_fn, "(teacher, student, labels, mask, projection) -> LossTerms")

    def loss(teacher: Outputs, student: Outputs, labels, mask, projection=None) -> LossTerms:
        alone = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
        one = lambda t, s, y, m: loss_fn(alone(t), alone(s), alone(y), alone(m), projection)  # noqa: E731
        terms = jax.vmap(one)(teacher, student, jnp.asarray(labels), jnp.asarray(mask))
        counts = jnp.any(jnp.asarray(mask, bool).reshape(len(labels), -1), axis=1)
        mean = lambda x: jnp.where(counts, x, 0.0).sum() / jnp.maximum(counts.sum(), 1)  # noqa: E731
        return jax.tree.map(mean, terms)

    return loss


def task_terms(*, teacher: Array | None = None, student: Array | None = None) -> LossTerms:
    """LossTerms of a method without distillation: its task loss, and zeros.

    >>> import jax.numpy as jnp
    >>> terms = task_terms(student=jnp.float32(0.5))
    >>> float(terms.student_total), float(terms.teacher_total)
    (0.5, 0.0)
    """
    zero = jnp.zeros((), jnp.float32)
    teacher, student = (zero if x is None else x for x in (teacher, student))
    return LossTerms(
        teacher_task=teacher,
        student_task=student,
        teacher_distill=zero,
        student_distill=zero,
        hidden=zero,
        teacher_total=teacher,
        student_total=student,
    )
