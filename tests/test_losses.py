"""Laws of `fedkd_jax.losses`, under jit and without, against float64 NumPy and its central differences."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax import (
    Outputs,
    cross_entropy,
    hidden_loss,
    kl_divergence,
    layer_map,
    mutual_distillation,
    per_example,
    task_terms,
)
from fedkd_jax.losses import _expand

B, C = strategies.BATCH, strategies.CLASSES
both = chex.variants(with_jit=True, without_jit=True)
FLAGS = {
    "paper": {},
    "not adaptive": dict(adaptive=False),
    "no distillation": dict(distill=False),
    "no hidden": dict(hidden=False),
    "stopped weight": dict(stop_weight_gradient=True),
}
logits = strategies.floats((B, C))
tokens = strategies.distillation(leading=(2, 3), heads=2)


@functools.cache
def jitted(**flags):
    return jax.jit(functools.partial(mutual_distillation, **flags))


@functools.cache
def gradients(**flags):
    """Gradients of both totals with respect to everything: `[total][teacher, student, projection]`."""

    def total(name, teacher, student, labels, mask, projection):
        return getattr(mutual_distillation(teacher, student, labels, mask, projection, **flags), name)

    return jax.jit(
        lambda *args: [
            jax.grad(functools.partial(total, n), (0, 1, 4))(*args) for n in ("teacher_total", "student_total")
        ]
    )


def close(a, b, rtol=2e-4, atol=2e-5):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


class LossLaws(chex.TestCase):
    @both
    @given(logits, logits, strategies.masks(B))
    def test_kl_is_zero_only_at_equal_logits_and_equals_numpy(self, p, q, mask):
        kl = self.variant(kl_divergence)
        assert float(kl(p, p, mask)) == 0.0
        assert float(kl(p, q, mask)) >= 0.0
        close(float(kl(p, q, mask)), reference.kl(p.astype(np.float64), q.astype(np.float64), mask))

    @both
    @given(strategies.floats((2, 3, C), 80.0), strategies.labels((2, 3), C), strategies.masks((2, 3)))
    def test_cross_entropy_of_tokens_equals_numpy_whatever_the_scale(self, z, y, mask):
        close(float(self.variant(cross_entropy)(z, y, mask)), reference.ce(z.astype(np.float64), y, mask))

    @both
    @given(strategies.distillation())
    def test_terms_equal_numpy_in_float64(self, args):
        terms = self.variant(mutual_distillation)(*args)
        expected = oracle(args)
        close(strategies.fields(terms), expected)
        chex.assert_tree_shape_prefix(terms, ())
        chex.assert_type(jax.tree.leaves(terms), np.float32)

    @both
    @given(tokens)
    def test_token_masks_hide_tokens_and_attention_pairs(self, args):
        close(strategies.fields(self.variant(mutual_distillation)(*args)), oracle(args))

    @both
    @given(tokens, strategies.masks(2))
    def test_an_example_mask_over_tokens_hides_whole_examples(self, args, mask):
        teacher, student, y, _, projection = args
        expected = oracle((teacher, student, y, np.repeat(mask[:, None], 3, 1), projection))
        close(strategies.fields(self.variant(mutual_distillation)(teacher, student, y, mask, projection)), expected)


def triple(outputs):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (outputs.logits, outputs.hidden, outputs.attention))


def oracle(args, **flags):
    teacher, student, y, mask, projection = args
    if projection is not None:
        projection = [w.astype(np.float64) for w in projection]
    return reference.losses(triple(teacher), triple(student), y, mask, projection, **flags)


@pytest.mark.parametrize("name", [n for n in FLAGS if n != "paper"])
@given(args=strategies.distillation(any_mask=False))
def test_flags_equal_numpy(name, args):
    flags = {k: v for k, v in FLAGS[name].items() if k != "stop_weight_gradient"}
    close(strategies.fields(jitted(**FLAGS[name])(*args)), oracle(args, **flags))


# ---- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAGS)
@given(args=strategies.distillation(any_mask=False), seed=strategies.seeds)
def test_gradients_equal_central_differences(name, args, seed):
    flags = dict(FLAGS[name])
    teacher, student, y, mask, projection = args
    point = (triple(teacher)[:2], triple(student)[:2], tuple(np.asarray(w, np.float64) for w in projection))
    weight = None
    if flags.pop("stop_weight_gradient", False):  # the frozen weight is the one at this point
        terms = oracle(args)
        weight = 1.0 / (terms["teacher_task"] + terms["student_task"])

    def totals(point):
        (zt, ht), (zs, hs), w = point
        terms = reference.losses((zt, ht, ()), (zs, hs, ()), y, mask, w, weight=weight, **flags)
        return np.array([terms["teacher_total"], terms["student_total"]])

    rng, step = np.random.default_rng(seed), 1e-5
    grads = gradients(**FLAGS[name])(*args)
    for part in range(3):  # a random direction in the teacher's outputs, the student's, W_h
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), point[part])
        move = lambda s: tuple(  # noqa: E731
            jax.tree.map(lambda x, d: x + s * d, p, direction) if i == part else p  # noqa: B023
            for i, p in enumerate(point)
        )
        difference = (totals(move(step)) - totals(move(-step))) / (2 * step)
        for total in range(2):
            g = grads[total][part]
            g = g if part == 2 else (g.logits, g.hidden)
            slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(np.asarray(a, np.float64), b), g, direction)))
            np.testing.assert_allclose(
                slope, difference[total], rtol=5e-3, atol=2e-3 * (1 + np.abs(difference).max()) / 10
            )


@given(strategies.distillation(any_mask=False))
def test_the_weight_is_differentiated_unless_it_is_stopped(args):
    """Stopped minus full gradient of the teacher's total is d(1/(L_t+L_s)): (KL + MSE) / (L_t + L_s)^2 times dL_t."""
    teacher, _student, y, mask, _projection = args
    full, stopped = gradients()(*args)[0][0], gradients(stop_weight_gradient=True)(*args)[0][0]
    terms = oracle(args)
    weight = 1 / (terms["teacher_task"] + terms["student_task"])
    task = jax.grad(lambda z: cross_entropy(z, y, mask))(jnp.asarray(teacher.logits))
    expected = weight * (terms["teacher_distill"] + terms["hidden"]) * np.asarray(task, np.float64)
    scale = np.abs(stopped.logits).max() + np.abs(expected).max() + 1
    np.testing.assert_allclose(np.asarray(stopped.logits - full.logits) / scale, expected / scale, atol=5e-5)


# ---- masks and order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["examples", "tokens"])
@given(data=st.data(), label=st.sampled_from([-7, C, 10**6]), poison=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_a_masked_entry_changes_neither_value_nor_gradient(kind, data, label, poison):
    leading, heads = ((B,), 0) if kind == "examples" else ((2, 3), 2)
    args = data.draw(strategies.distillation(leading, heads))
    teacher, student, y, mask, projection = args

    def spoil(outputs):
        hide = lambda x: np.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, np.float32(poison))  # noqa: E731
        attention = outputs.attention
        if heads:
            pairs = np.broadcast_to((mask[:, :, None] & mask[:, None, :])[:, None], attention[0].shape)
            attention = tuple(np.where(pairs, a, np.float32(poison)) for a in attention)
        return Outputs(hide(outputs.logits), tuple(hide(h) for h in outputs.hidden), attention)

    spoiled = (spoil(teacher), spoil(student), np.where(mask, y, label).astype(np.int32), mask, projection)
    chex.assert_trees_all_equal(jitted()(*spoiled), jitted()(*args))
    grads = gradients()(*spoiled)
    chex.assert_trees_all_equal(grads, gradients()(*args))
    for teacher_grad, student_grad, _ in grads:
        for g in (teacher_grad, student_grad):
            for x in (g.logits, *g.hidden):
                assert not np.asarray(x)[~mask].any()
    if not mask.any():
        chex.assert_trees_all_equal(jitted()(*args), jax.tree.map(jnp.zeros_like, jitted()(*args)))


@given(strategies.distillation(any_mask=False))
def test_masking_equals_leaving_out(args):
    teacher, student, y, mask, projection = args
    keep = lambda tree: jax.tree.map(lambda x: x[mask], tree)  # noqa: E731
    short = (keep(teacher), keep(student), y[mask], np.ones(mask.sum(), bool), projection)
    close(strategies.fields(jitted()(*args)), strategies.fields(jitted()(*short)), rtol=1e-5, atol=1e-6)


@given(strategies.distillation(), st.permutations(range(B)))
def test_the_order_of_a_batch_changes_nothing(args, order):
    order = np.array(order)
    shuffled = (*jax.tree.map(lambda x: x[order], args[:4]), args[4])
    close(jitted()(*args), jitted()(*shuffled), rtol=1e-5, atol=1e-6)
    a, b = gradients()(*args), gradients()(*shuffled)
    for g, h in zip(a, b, strict=True):
        close(jax.tree.map(lambda x: x[order], g[:2]), h[:2], rtol=1e-4, atol=1e-5)
        close(g[2], h[2], rtol=1e-4, atol=1e-5)


@given(strategies.distillation(any_mask=False))
def test_totals_are_the_sums_and_the_two_models_are_symmetric(args):
    teacher, student, y, mask, _projection = args
    terms = jitted()(*args)
    close(terms.teacher_total, terms.teacher_task + terms.teacher_distill + terms.hidden, rtol=1e-6)
    close(terms.student_total, terms.student_task + terms.student_distill + terms.hidden, rtol=1e-6)
    small, other = Outputs(teacher.logits), Outputs(student.logits)
    one, two = jitted()(small, other, y, mask), jitted()(other, small, y, mask)
    close((one.teacher_total, one.student_total), (two.student_total, two.teacher_total), rtol=1e-6)


# ---- layers ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 24), st.integers(0, 24))
def test_the_layer_map_counts_from_the_top_in_equal_steps(teachers, students):
    if students > teachers:
        with pytest.raises(ValueError, match=f"student_layers is {students}; allowed.*{teachers}"):
            layer_map(teachers, students)
        return
    pairs = layer_map(teachers, students)
    assert pairs == tuple(i for _, i in sorted(reference.matched(teachers, students).items()))
    assert len(pairs) == students
    if students:
        assert pairs[-1] == teachers - 1
        assert pairs[0] >= 0
        assert set(np.diff(pairs)) <= {teachers // students}


@given(tokens)
def test_without_projection_hidden_states_are_compared_as_they_are(args):
    teacher, student, _, mask, _ = args
    narrow = Outputs(teacher.logits, tuple(h[..., :4] for h in teacher.hidden), teacher.attention)
    identity = tuple(np.eye(4, dtype=np.float32) for _ in range(2))
    bare = hidden_loss(narrow, student, mask)
    close(bare, hidden_loss(narrow, student, mask, identity), rtol=1e-5)
    hidden = reference.mse_hidden(triple(narrow)[1], triple(student)[1], mask, None)
    close(float(bare), hidden + reference.mse_attention(triple(teacher)[2], triple(student)[2], mask))
    assert float(hidden_loss(student, student, mask)) == 0.0


def test_feature_maps_of_images_are_averaged_over_positions_and_channels():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 3, 3, 4)).astype(np.float32) for _ in range(2))
    mask = np.array([True, False])
    loss = hidden_loss(Outputs(np.zeros((2, C)), (a,)), Outputs(np.zeros((2, C)), (b,)), mask)
    close(float(loss), np.mean((a[0] - b[0]) ** 2), rtol=1e-5)


@given(strategies.masks((2, 3)))
def test_a_surplus_mask_axis_is_reduced_by_any(mask):
    np.testing.assert_array_equal(_expand(mask, (2,)), mask.any(1))
    np.testing.assert_array_equal(_expand(mask, (2, 3, 2)), np.repeat(mask[..., None], 2, -1))


@given(st.floats(0, 9, width=32), st.floats(0, 9, width=32))
def test_task_terms_are_totals_without_distillation(t, s):
    terms = strategies.fields(task_terms(teacher=jnp.float32(t), student=jnp.float32(s)))
    assert {k: float(v) for k, v in terms.items() if v != 0} == {
        k: v for k, v in dict(teacher_task=t, teacher_total=t, student_task=s, student_total=s).items() if v != 0
    }


def test_shapes_that_do_not_fit_are_told_apart():
    wide, narrow = Outputs(jnp.zeros((B, C)), (jnp.zeros((B, 5)),)), Outputs(jnp.zeros((B, C)), (jnp.zeros((B, 4)),))
    deep = Outputs(jnp.zeros((B, C)), (jnp.zeros((B, 5)),) * 2)
    heads = [Outputs(jnp.zeros((B, 2, C)), (), (jnp.zeros((B, h, 2, 2)),)) for h in (1, 2)]
    mask, y = jnp.ones(B, bool), jnp.zeros(B, jnp.int32)
    for match, call in [
        (r"mask has shape \(3,\); allowed: .*\(4,\)", lambda: cross_entropy(wide.logits, y, jnp.ones(3, bool))),
        (r"mask has shape \(3,\)", lambda: mutual_distillation(wide, wide, y, jnp.ones(3, bool))),
        (r"hidden of student layer 0 has shape \(4, 4\).*\(4, 5\); allowed", lambda: hidden_loss(wide, narrow, mask)),
        (r"projection has 2 matrices; allowed: .*1", lambda: hidden_loss(wide, narrow, mask, (jnp.zeros((4, 5)),) * 2)),
        (
            r"projection\[0\] has shape \(5, 4\); allowed.*\(4, 5\)",
            lambda: hidden_loss(wide, narrow, mask, (jnp.zeros((5, 4)),)),
        ),
        (r"student_layers is 2; allowed: .*1", lambda: hidden_loss(wide, deep, mask)),
        (r"attention of student layer 0 has shape .*allowed", lambda: hidden_loss(*heads, mask)),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


@given(strategies.seeds, st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 1))
def test_padding_and_positions_without_a_label_change_nothing(seed, lengths, leading):
    """A model's own mask over positions `[B, L]` or `[B, N, L]`, labels below 0: as if what they hide held other values."""
    rng = np.random.default_rng(seed)
    lead = (3,) if leading == 0 else (3, 2)
    mask = np.broadcast_to((np.arange(4) < np.array(lengths)[:, None]).reshape(3, *[1] * leading, 4), (*lead, 4))
    labels = np.where(rng.random((*lead, 4)) < 0.5, rng.integers(0, 5, (*lead, 4)), -1)
    rows = np.array([True, True, False])

    def outputs(rng, other):
        hide = lambda x, m: np.where(m, x, other.normal(size=x.shape)).astype(np.float32)  # noqa: E731
        hidden = hide(rng.normal(size=(*lead, 4, 6)), mask[..., None])
        pairs = (mask[..., :, None] & mask[..., None, :])[..., None, :, :]
        attention = hide(rng.normal(size=(*lead, 2, 4, 4)), pairs)
        logits = hide(rng.normal(size=(*lead, 4, 5)), (labels >= 0)[..., None])
        return Outputs(logits, (hidden,), (attention,), mask)

    terms = []
    for other in (1, 2):
        pair = [
            outputs(np.random.default_rng([seed, model]), np.random.default_rng([seed, other, model]))
            for model in (0, 1)
        ]
        terms.append(jitted_mutual(leading)(*pair, labels, rows))
    chex.assert_trees_all_close(*terms, rtol=1e-5)
    teacher, student = pair
    keep = rows.reshape(-1, *[1] * leading, 1) & mask
    expected = np.mean((teacher.hidden[0] - student.hidden[0])[keep] ** 2)
    both = (keep[..., :, None] & keep[..., None, :])[..., None, :, :]
    expected += np.mean((teacher.attention[0] - student.attention[0])[np.broadcast_to(both, (*lead, 2, 4, 4))] ** 2)
    np.testing.assert_allclose(terms[0].hidden, expected, rtol=1e-4)


@functools.cache
def jitted_mutual(leading):
    del leading  # another shape, another compilation
    return jax.jit(functools.partial(mutual_distillation, adaptive=False))


@functools.cache
def distillation_losses(adaptive):
    loss = functools.partial(mutual_distillation, adaptive=adaptive)
    return jax.jit(loss), jax.jit(per_example(loss))


@settings(max_examples=20)
@given(strategies.distillation((4, 3), heads=2), st.booleans())
def test_with_a_weight_for_each_example_a_batch_is_the_mean_of_its_examples(drawn, adaptive):
    teacher, student, labels, mask, projection = drawn
    loss, of_each = distillation_losses(adaptive)
    found = strategies.fields(of_each(teacher, student, labels, mask, projection))
    one = lambda tree, i: jax.tree.map(lambda x: x[i : i + 1], tree)  # noqa: E731
    rows = [
        strategies.fields(loss(one(teacher, i), one(student, i), labels[i : i + 1], mask[i : i + 1], projection))
        for i in np.flatnonzero(mask.any(axis=1))
    ]
    for name, value in found.items():
        np.testing.assert_allclose(value, np.mean([row[name] for row in rows]) if rows else 0.0, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(strategies.distillation())
def test_a_teacher_may_learn_from_the_labels_alone(drawn):
    one_way, both = (strategies.fields(mutual_distillation(*drawn, mutual=mutual)) for mutual in (False, True))
    assert one_way["teacher_total"] == one_way["teacher_task"]
    for name in both.keys() - {"teacher_total"}:
        assert one_way[name] == both[name]


@settings(max_examples=20)
@given(strategies.distillation((4, 3), heads=2))
def test_without_attention_hidden_states_are_all_that_is_compared(drawn):
    teacher, student, labels, mask, projection = drawn
    without = [dataclasses.replace(outputs, attention=()) for outputs in (teacher, student)]
    found = mutual_distillation(*drawn, attention=False)
    chex.assert_trees_all_equal(found, mutual_distillation(*without, labels, mask, projection))
    chex.assert_trees_all_close(
        found.hidden, oracle((*without, labels, mask, projection))["hidden"], rtol=1e-4, atol=1e-5
    )
