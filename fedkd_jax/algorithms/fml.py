"""FML: Shen et al., "Federated mutual learning", 2020 (arXiv 2006.16765): FedKD's nearest ancestor.

A private model and a shared one ("meme") on each client learn from the labels and from each other; the shared one is averaged:
    private total = alpha L_t + (1 - alpha) KL(p_s || p_t),    shared total = beta L_s + (1 - beta) KL(p_t || p_s).
No adaptive weight, no hidden loss, no compression: those are FedKD's. What travels is FedAvg's of the shared model.
"""

import functools
from typing import Any

import jax.numpy as jnp

from fedkd_jax.algorithms.fedkd import fedkd
from fedkd_jax.check import check_number
from fedkd_jax.losses import answered, cross_entropy, kl_divergence
from fedkd_jax.types import Algorithm, LossTerms, Model, Number, Outputs


def mutual_learning(
    teacher: Outputs, student: Outputs, labels, mask, projection=None, *, alpha: Number = 0.5, beta: Number = 0.5
) -> LossTerms:
    """FML's losses on one batch, for `fedkd(loss_fn=...)`; the distillation terms are those of the totals, weighted.

    >>> import jax.numpy as jnp
    >>> one = Outputs(jnp.array([[2.0, 0.0]]))
    >>> terms = mutual_learning(one, one, jnp.array([0]), jnp.array([True]), alpha=0.25)
    >>> bool(jnp.isclose(terms.teacher_total, 0.25 * terms.teacher_task)), float(terms.student_distill)
    (True, 0.0)
    """
    del projection
    teacher_task, student_task = (cross_entropy(x.logits, labels, mask) for x in (teacher, student))
    entries = answered(labels, mask)
    teacher_distill = (1 - alpha) * kl_divergence(student.logits, teacher.logits, entries)
    student_distill = (1 - beta) * kl_divergence(teacher.logits, student.logits, entries)
    return LossTerms(
        teacher_task=teacher_task,
        student_task=student_task,
        teacher_distill=teacher_distill,
        student_distill=student_distill,
        hidden=jnp.zeros_like(teacher_task),
        teacher_total=alpha * teacher_task + teacher_distill,
        student_total=beta * student_task + student_distill,
    )


def fml(teacher: Model, student: Model, *, alpha: Number = 0.5, beta: Number = 0.5, **options: Any) -> Algorithm:
    """FML: private `teacher`s, one shared `student`.

    Args:
        teacher, student: models.
        alpha, beta: weights of the labels in the private and in the shared model's loss, in [0, 1].
        **options: those of `fedkd` but `loss_fn` and `project`.

    Raises:
        ValueError: a weight outside [0, 1].

    >>> import optax
    >>> from fedkd_jax import mlp
    >>> sgd = optax.sgd(0.1)
    >>> algorithm = fml(mlp((64, 32, 10)), mlp((64, 10)), teacher_optimizer=sgd, student_optimizer=sgd, batch=10)
    >>> sorted(algorithm.predict)
    ['student', 'teacher']
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        check_number(name, value, "[0, 1]")
    loss_fn = functools.partial(mutual_learning, alpha=alpha, beta=beta)
    return fedkd(teacher, student, loss_fn=loss_fn, project=False, **options)
