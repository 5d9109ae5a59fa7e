"""FedKD, Algorithm 1 of Wu et al., Nature Communications 13, 2032 (2022). The file to read first.

on every client of the cohort                                                              here
  for each local step, on a mini-batch
    L_t, L_s, D_t, D_s, Hid                                  (eqs. 1-7)                      losses.mutual_distillation
    teacher  <- teacher - eta_t d(D_t + Hid + L_t) / d teacher                               mutual_step
    W_h      <- W_h     - eta_t d Hid / d W_h                                                mutual_step
    student  <- student - eta_s d(D_s + Hid + L_s) / d student                               mutual_step
  g_i = student after - student before   (or its gradient)                                   local
  U_i, S_i, V_i of each matrix of g_i, keeping T(t) of its energy (eqs. 8-9), uploaded       codecs.svd_codec
on the server
  g = weighted mean of the decoded g_i, factorised the same way, sent down                   rounds.federated_round
on every client
  student <- student + decoded g         (or - eta_s g)                                      rounds.federated_round
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedkd_jax.aggregate import example_weight
from fedkd_jax.check import check_type
from fedkd_jax.codecs import init_codec
from fedkd_jax.cohort import client_key
from fedkd_jax.local import check_local, local_steps
from fedkd_jax.losses import layer_map, mutual_distillation
from fedkd_jax.models import Predictor, merge_params, split_params
from fedkd_jax.parallel import Layout, map_clients
from fedkd_jax.rest import check_rest, from_rest, to_rest
from fedkd_jax.rounds import federated_round
from fedkd_jax.types import (
    Aggregator,
    Algorithm,
    Array,
    Batch,
    ClientState,
    Codec,
    Key,
    LocalResult,
    LossTerms,
    Model,
    PyTree,
    SendFn,
    ServerState,
    Wire,
)


def mutual_step(teacher_fn, student_fn, loss_fn, params, batch: Batch) -> tuple[tuple, LossTerms]:
    """Both models' gradients on one batch, each of its own total: `(teacher, projection, student)` gradients and the terms.

    Each model runs forward and backward once: the totals are differentiated with respect to the outputs first.

    Args:
        teacher_fn, student_fn: `params -> Outputs` on this batch.
        loss_fn: `(teacher, student, labels, mask, projection) -> LossTerms`.
        params: `(teacher, projection, student)`.

    >>> from fedkd_jax import mutual_distillation, Outputs
    >>> batch = Batch(inputs=jnp.ones((2, 3)), labels=jnp.array([0, 1]), mask=jnp.array([True, True]))
    >>> linear = lambda w: Outputs(batch.inputs @ w)
    >>> grads, terms = mutual_step(linear, linear, mutual_distillation, (jnp.ones((3, 2)), (), jnp.zeros((3, 2))), batch)
    >>> [g.shape for g in jax.tree.leaves(grads)]
    [(3, 2), (3, 2)]
    """
    teacher, projection, student = params
    teacher_out, teacher_vjp = jax.vjp(teacher_fn, teacher)
    student_out, student_vjp = jax.vjp(student_fn, student)

    def totals(teacher_out, student_out, projection):
        terms = loss_fn(teacher_out, student_out, batch.labels, batch.mask, projection or None)
        return (terms.teacher_total, terms.student_total), terms

    _, terms_vjp, terms = jax.vjp(totals, teacher_out, student_out, projection, has_aux=True)
    one, zero = jnp.ones_like(terms.teacher_total), jnp.zeros_like(terms.teacher_total)
    teacher_cotangent, _, _ = terms_vjp((one, zero))
    # Hid is the same in both totals, and W_h is in nothing else
    _, student_cotangent, projection_grad = terms_vjp((zero, one))
    (teacher_grad,), (student_grad,) = teacher_vjp(teacher_cotangent), student_vjp(student_cotangent)
    return (teacher_grad, projection_grad, student_grad), terms


def init_projection(teacher: Model, student: Model, example: PyTree, key: Key) -> tuple[Array, ...]:
    """One W_h `[d_student, d_teacher]` per student layer: the identity where the widths agree, otherwise Glorot-uniform.

    Glorot-uniform is the reference code's, which never uses it. A student made of the teacher's first layers would be drawn
    towards a random image of the teacher, and the teacher towards one of the student: pretrained teachers of two layers'
    students had an F of 14 after three rounds with it and of 41 with the identity (ADR, validation split, other rates).

    >>> from fedkd_jax import mlp
    >>> [w.shape for w in init_projection(mlp((4, 8, 9, 2)), mlp((4, 5, 2)), jnp.ones((1, 4)), jax.random.key(0))]
    [(5, 9)]
    """
    outs = [jax.eval_shape(lambda m=m: m.apply(m.init(key), example)) for m in (teacher, student)]
    widths = [
        (outs[1].hidden[j].shape[-1], outs[0].hidden[i].shape[-1])
        for j, i in enumerate(layer_map(len(outs[0].hidden), len(outs[1].hidden)))
    ]
    init = jax.nn.initializers.glorot_uniform()
    return tuple(
        jnp.eye(own) if own == target else init(jax.random.fold_in(key, j), (own, target))
        for j, (own, target) in enumerate(widths)
    )


def fedkd(
    teacher: Model,
    student: Model,
    *,
    example: PyTree = None,
    teacher_optimizer: optax.GradientTransformation,
    student_optimizer: optax.GradientTransformation,
    projection_optimizer: optax.GradientTransformation | None = None,
    batch: int,
    epochs: int = 1,
    steps: int | None = None,
    uplink: Codec | None = None,
    downlink: Codec | None = None,
    loss_fn: Callable[..., LossTerms] = mutual_distillation,
    project: bool = True,
    share_frozen: bool = False,
    message: str = "update",
    teacher_dtype: Any = jnp.float32,
    moments_dtype: Any = jnp.float32,
    reset_student_optimizer: bool = True,
    weight_fn: Callable[[Array], Array] = example_weight,
    server_optimizer: optax.GradientTransformation | None = None,
    send_fn: SendFn | None = None,
    aggregator: Aggregator | None = None,
    layout: Layout | None = None,
    wire: Wire | None = None,
) -> Algorithm:
    """FedKD: private teachers, one shared student, adaptive mutual distillation, low-rank messages.

    With `steps=1`, `optax.sgd` and `message="gradient"` this is Algorithm 1 to the letter; the default is the reference
    code's form, several local steps whose message is the student's update. All teachers start from the same initial
    values only if `teacher.init` ignores its key (pretrained weights); otherwise each client draws its own.

    Args:
        teacher, student: models; every client has its own teacher, all share the student. Their hidden states may differ
            in width, not in their leading axes.
        example: an input batch `[1, ...]`, for the shapes of the projection; not needed with `project=False`.
        teacher_optimizer, student_optimizer, projection_optimizer: optax; the projection's is the teacher's by default.
            The teacher's and the projection's states stay with the client.
        batch: rows of a mini-batch.
        epochs, steps: local work a round: passes over the client's examples, or a number of steps.
        uplink, downlink: codecs, `svd_codec(...)` for FedKD proper; the default sends everything raw.
        loss_fn: `(teacher, student, labels, mask, projection) -> LossTerms`; for ablations
            `functools.partial(mutual_distillation, adaptive=False)` and the like.
        project: whether there is a learnable W_h per matched layer, kept by the client and never sent. False compares
            hidden states as they are.
        share_frozen: whether the frozen parameters of both models are the same, such as pretrained embeddings, and are kept
            once, the teacher's. Only their shapes are compared: that the values agree is the caller's word.
        message: "update", or "gradient" (needs `steps=1`): the server then steps with `student_optimizer` unless
            `server_optimizer` is given.
        teacher_dtype, moments_dtype: in which a client's teacher and its teacher's optimiser state are between rounds, float32
            or bfloat16 (half the bytes, rounded at random with the client's key, see `rest.py`); local work is in float32.
        reset_student_optimizer: whether the student's optimiser starts anew each round, or stays with the client.
        weight_fn: `example_weight` (FedAvg) or `uniform_weight`, or any `count -> weight`.
        server_optimizer, send_fn, aggregator: see `federated_round`.
        layout: how clients are mapped over the hardware.
        wire: what messages go through, see `federated_round`.

    Returns:
        An `Algorithm` that predicts with "teacher" (the client's own) and "student" (shared).

    Raises:
        TypeError: no model, optimiser, codec or function where there should be one.
        ValueError: `batch`, `epochs` or `steps` below 1, a student with more layers than the teacher, `message="gradient"`
            with `steps` other than 1, an unknown `message`, `teacher_dtype` or `moments_dtype`, no `example` where it is
            needed, `share_frozen` of models whose frozen parameters differ in structure or shape, hidden shapes that cannot
            be compared (when the round is traced).

    Reference: https://doi.org/10.1038/s41467-022-29763-x. Differences: README.

    >>> from fedkd_jax import energy_threshold, mlp, svd_codec
    >>> codec = svd_codec(energy_threshold(0.95, 0.98, rounds=10))
    >>> algorithm = fedkd(mlp((64, 32, 10)), mlp((64, 16, 10)), example=jnp.ones((1, 64)), batch=8, uplink=codec,
    ...                   downlink=codec, teacher_optimizer=optax.adam(1e-3), student_optimizer=optax.sgd(0.1))
    >>> clients = algorithm.init_clients(jax.random.key(0), jnp.arange(3))
    >>> clients.teacher["dense_0"]["kernel"].shape, clients.projection[0].shape
    ((3, 64, 32), (3, 16, 32))
    """
    for name, model in (("teacher", teacher), ("student", student)):
        check_type(name, model, Model, "a Model, mlp((64, 10)) say")
    projection_optimizer = teacher_optimizer if projection_optimizer is None else projection_optimizer
    check_local(
        batch=batch,
        epochs=epochs,
        steps=steps,
        loss_fn=loss_fn,
        teacher_optimizer=teacher_optimizer,
        student_optimizer=student_optimizer,
        projection_optimizer=projection_optimizer,
    )
    if message == "gradient" and steps != 1:
        raise ValueError(
            f"steps is {steps} with message='gradient'; allowed: 1 (Algorithm 1 sends one step's gradient)"
        )
    check_rest(teacher_dtype=teacher_dtype, moments_dtype=moments_dtype)
    if message == "gradient":
        server_optimizer = server_optimizer or student_optimizer
    server_optimizer = server_optimizer or optax.sgd(1.0)
    if project and example is None:
        raise ValueError("example is None; allowed: an input batch [1, ...], which the projection's shapes come from")

    def projection_of(key: Key) -> tuple[Array, ...]:
        return () if example is None or not project else init_projection(teacher, student, example, key)

    jax.eval_shape(projection_of, jax.random.key(0))  # a student too deep is told here, not when the round is traced

    student_frozen = "teacher" if share_frozen else "student"
    if share_frozen:
        shapes = [jax.eval_shape(lambda m=m: split_params(m, m.init(jax.random.key(0)))[1]) for m in (teacher, student)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"share_frozen is True with frozen parameters {shapes[0]} and {shapes[1]}; allowed: equal shapes"
            )

    def init_server(key: Key) -> ServerState:
        teacher_key, student_key = jax.random.split(key)
        params, frozen = split_params(student, student.init(student_key))
        _, teacher_frozen = split_params(teacher, teacher.init(teacher_key))
        return ServerState(
            params=params,
            opt_state=server_optimizer.init(params),
            frozen={"teacher": teacher_frozen} | ({} if share_frozen else {"student": frozen}),
            round=jnp.int32(0),
            codec=init_codec(downlink, params),
        )

    def init_client(key: Key) -> ClientState:
        teacher_key, projection_key, student_key = jax.random.split(key, 3)
        own, _ = split_params(teacher, teacher.init(teacher_key))
        projection = projection_of(projection_key)
        student_params, _ = split_params(student, student.init(student_key))
        return ClientState(
            teacher=to_rest(own, teacher_dtype),
            projection=projection,
            teacher_opt=to_rest(teacher_optimizer.init(own), moments_dtype),
            projection_opt=projection_optimizer.init(projection),
            student_opt=() if reset_student_optimizer else student_optimizer.init(student_params),
            codec=init_codec(uplink, student_params),
        )

    def init_clients(key: Key, ids: Array) -> ClientState:
        return map_clients(lambda i: (init_client(client_key(key, 0, i)), ()), (ids,), layout=layout)[0]

    def local(server: ServerState, client: ClientState, data, key: Key) -> LocalResult:
        def step(carry, mini: Batch, key: Key):
            params, (teacher_opt, projection_opt, student_opt), _ = carry
            teacher_key, student_key = jax.random.split(key)
            (teacher_grad, projection_grad, student_grad), terms = mutual_step(
                lambda p: teacher.apply(merge_params(p, server.frozen["teacher"]), mini.inputs, key=teacher_key),
                lambda p: student.apply(merge_params(p, server.frozen[student_frozen]), mini.inputs, key=student_key),
                loss_fn,
                params,
                mini,
            )
            own, projection, shared = params
            own, teacher_opt = _update(teacher_optimizer, teacher_grad, teacher_opt, own)
            projection, projection_opt = _update(projection_optimizer, projection_grad, projection_opt, projection)
            shared, student_opt = _update(student_optimizer, student_grad, student_opt, shared)
            gradient = student_grad if message == "gradient" else ()
            return ((own, projection, shared), (teacher_opt, projection_opt, student_opt), gradient), terms

        student_opt = student_optimizer.init(server.params) if reset_student_optimizer else client.student_opt
        carry = (
            (from_rest(client.teacher, teacher_dtype), client.projection, server.params),
            (from_rest(client.teacher_opt, moments_dtype), client.projection_opt, student_opt),
            optax.tree.zeros_like(server.params) if message == "gradient" else (),
        )
        carry, terms = local_steps(step, carry, data, key, batch=batch, epochs=epochs, steps=steps)
        (own, projection, shared), (teacher_opt, projection_opt, student_opt), gradient = carry
        rest_keys = jax.random.split(jax.random.fold_in(key, 2))  # a stream beside the two of `local_steps`
        new = ClientState(
            teacher=to_rest(own, teacher_dtype, rest_keys[0]),
            projection=projection,
            teacher_opt=to_rest(teacher_opt, moments_dtype, rest_keys[1]),
            projection_opt=projection_opt,
            student_opt=() if reset_student_optimizer else student_opt,
        )
        sent = gradient if message == "gradient" else optax.tree.sub(shared, server.params)
        return LocalResult(client=new, message=sent, terms=terms)

    return Algorithm(
        init_server=init_server,
        init_clients=init_clients,
        round=federated_round(
            local,
            uplink=uplink,
            downlink=downlink,
            weight_fn=weight_fn,
            server_optimizer=server_optimizer,
            send_fn=send_fn,
            aggregator=aggregator,
            message=message,
            layout=layout,
            wire=wire,
        ),
        predict={
            "teacher": Predictor(
                teacher,
                lambda server, client: merge_params(from_rest(client.teacher, teacher_dtype), server.frozen["teacher"]),
            ),
            "student": Predictor(
                student, lambda server, client: merge_params(server.params, server.frozen[student_frozen])
            ),
        },
        layout=layout,
    )


def _update(optimizer, gradient, state, params):
    step, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, step), state
