"""The oracle: FedKD as a naive NumPy loop in float64, written from the paper (PAPER.md 2, 3, 4) and from nothing else.

It shares no code with the library; only the random draws (who trains on which rows in which order) are made again with
`jax.random`, from the rule the library documents.
"""

import jax
import numpy as np

# ---- section 2: losses -------------------------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def ce(logits, labels, mask):
    rows = [-log_softmax(logits[i])[labels[i]] for i in np.ndindex(labels.shape) if mask[i]]
    return np.sum(rows) / max(len(rows), 1)


def kl(p, q, mask):
    rows = [
        (softmax(p[i]) * (log_softmax(p[i]) - log_softmax(q[i]))).sum() for i in np.ndindex(p.shape[:-1]) if mask[i]
    ]
    return np.sum(rows) / max(len(rows), 1)


def matched(teacher_layers, student_layers):
    """Student layer -> teacher layer, counting both from the top in steps of L_t // L_s."""
    step = teacher_layers // max(student_layers, 1)
    return {student_layers - 1 - k: teacher_layers - 1 - k * step for k in range(student_layers)}


def mse_hidden(hidden_t, hidden_s, mask, projection):
    total = 0.0
    for j, i in matched(len(hidden_t), len(hidden_s)).items():
        own = hidden_s[j] if projection is None else hidden_s[j] @ projection[j]
        rows = [np.mean((hidden_t[i][k] - own[k]) ** 2) for k in np.ndindex(own.shape[:-1]) if mask[k]]
        total += np.sum(rows) / max(len(rows), 1)
    return total


def mse_attention(attention_t, attention_s, mask):
    """`mask [B]` hides examples, `mask [B, L]` tokens: a pair counts when its query and its key do."""
    total = 0.0
    for j, i in matched(len(attention_t), len(attention_s)).items():
        entries = []
        for b, h, q, k in np.ndindex(attention_s[j].shape):
            if (mask[b, q] and mask[b, k]) if mask.ndim == 2 else mask[b]:
                entries.append((attention_t[i][b, h, q, k] - attention_s[j][b, h, q, k]) ** 2)
        total += np.sum(entries) / max(len(entries), 1)
    return total


def losses(teacher, student, labels, mask, projection, *, adaptive=True, distill=True, hidden=True, weight=None):
    """`teacher`, `student`: `(logits, hidden, attention)`. `weight` fixes 1 / (L_t + L_s), for its stopped gradient."""
    (zt, ht, at), (zs, hs, as_) = teacher, student
    lt, ls = ce(zt, labels, mask), ce(zs, labels, mask)
    if weight is None:
        weight = 1.0 / (lt + ls) if adaptive and lt + ls > 0 else 1.0
    dt = weight * kl(zs, zt, mask) if distill else 0.0
    ds = weight * kl(zt, zs, mask) if distill else 0.0
    hid = weight * (mse_hidden(ht, hs, mask, projection) + mse_attention(at, as_, mask)) if hidden else 0.0
    return dict(
        teacher_task=lt,
        student_task=ls,
        teacher_distill=dt,
        student_distill=ds,
        hidden=hid,
        teacher_total=dt + hid + lt,
        student_total=ds + hid + ls,
    )


# ---- a multilayer perceptron, forward and backward ---------------------------------------------------------------------


def to64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def forward(params, x):
    x, hidden, depth = x.reshape(len(x), int(np.prod(x.shape[1:]))), [], len(params)
    for i in range(depth - 1):
        x = np.maximum(x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"], 0.0)
        hidden.append(x)
    return x @ params[f"dense_{depth - 1}"]["kernel"] + params[f"dense_{depth - 1}"]["bias"], hidden


def backward(params, x, hidden, d_logits, d_hidden):
    """Gradients of all weights from those of the logits and, added on the way down, of each hidden state."""
    grads, delta = {}, d_logits
    for i in reversed(range(len(params))):
        below = hidden[i - 1] if i else x.reshape(len(x), -1)
        grads[f"dense_{i}"] = {"kernel": below.T @ delta, "bias": delta.sum(0)}
        if i:
            delta = (delta @ params[f"dense_{i}"]["kernel"].T + d_hidden[i - 1]) * (hidden[i - 1] > 0)
    return grads


def sgd(params, grads, rate):
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def mutual_gradients(teacher, student, projection, x, y, *, adaptive=True, distill=True, hidden=True, stop=False):
    """d teacher_total / d teacher, d Hid / d W_h, d student_total / d student, and the terms; derived by hand."""
    (zt, ht), (zs, hs) = forward(teacher, x), forward(student, x)
    n, all_rows = len(x), np.ones(len(x), bool)
    terms = losses(
        (zt, ht, ()), (zs, hs, ()), y, all_rows, projection, adaptive=adaptive, distill=distill, hidden=hidden
    )
    pt, ps, onehot = softmax(zt), softmax(zs), np.eye(zt.shape[1])[y]
    task_t, task_s = (pt - onehot) / n, (ps - onehot) / n  # d L_t / d z_t, d L_s / d z_s
    weight = 1.0 / (terms["teacher_task"] + terms["student_task"]) if adaptive else 1.0
    # d weight / d L = -weight^2, times the undivided KL + MSE = (D + Hid) / weight
    slope = 0.0 if stop or not adaptive else weight
    d_zt = (1 - slope * (terms["teacher_distill"] + terms["hidden"])) * task_t + distill * weight * (pt - ps) / n
    d_zs = (1 - slope * (terms["student_distill"] + terms["hidden"])) * task_s + distill * weight * (ps - pt) / n
    d_ht, d_hs, d_w = [np.zeros_like(h) for h in ht], [np.zeros_like(h) for h in hs], [None] * len(hs)
    for j, i in matched(len(ht), len(hs)).items():
        error = 2 * hidden * weight * (ht[i] - hs[j] @ projection[j]) / ht[i].size
        d_ht[i] += error
        d_hs[j] -= error @ projection[j].T
        d_w[j] = -hs[j].T @ error
    return backward(teacher, x, ht, d_zt, d_ht), tuple(d_w), backward(student, x, hs, d_zs, d_hs), terms


# ---- section 4: dynamic gradient approximation -------------------------------------------------------------------------


def energy_shares(matrix):
    """Cumulative energy shares of the singular values; empty for the zero matrix."""
    energy = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    return np.cumsum(energy) / energy.sum() if energy.sum() > 0 else np.zeros(0)


def exact_rank(matrix, threshold):
    """The smallest K whose share exceeds T; all of them if none does, 0 for the zero matrix."""
    shares = energy_shares(matrix)
    above = np.flatnonzero(shares > threshold)
    return 0 if not len(shares) else int(above[0]) + 1 if len(above) else len(shares)


def margin(matrix, threshold):
    """How far the nearest cumulative share is from T: below the rounding of float32 the rank is anybody's guess."""
    shares = energy_shares(matrix)
    return np.abs(shares[:-1] - threshold).min() if len(shares) > 1 else 1.0


def truncate(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return sum((s[k] * np.outer(u[:, k], vt[k]) for k in range(rank)), np.zeros_like(matrix))


def send(update, threshold):
    """One message: what arrives, and `floats`, `bytes`, `ranks {path: K or None where raw}`, the smallest `margin`."""
    cost = dict(floats=0, bytes=0, ranks={}, margin=1.0)

    def leaf(path, x):
        name = "/".join(str(k.key) for k in path)
        if x.ndim >= 2 and threshold is not None:
            matrix = x.reshape(-1, x.shape[-1])
            (m, n), k = matrix.shape, exact_rank(matrix, threshold)
            if 1 * (m + n) + 1 < m * n:
                cost["margin"] = min(cost["margin"], margin(matrix, threshold))
                cost["ranks"][name] = None
                if k * (m + n) + k**2 < m * n:
                    cost["floats"] += k * (m + n) + k**2
                    cost["bytes"] += 4 * k * (m + n) + 4
                    cost["ranks"][name] = k
                    return truncate(matrix, k).reshape(x.shape)
        cost["floats"] += x.size
        cost["bytes"] += 4 * x.size
        return x

    return jax.tree_util.tree_map_with_path(leaf, update), cost


# ---- section 3: the round ----------------------------------------------------------------------------------------------


def batches(key, round, client_id, start, count, max_count, *, batch, epochs=1, steps=None):
    """Rows of the flat storage, step by step: the library's documented draws, made again."""
    local_key, _ = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, round), client_id))
    order_key, _ = jax.random.split(local_key)
    size, out, epoch = -(-max_count // batch) * batch, [], 0
    while count and (epoch < epochs if steps is None else len(out) < steps):
        draws = np.array(jax.random.uniform(jax.random.fold_in(order_key, epoch), (size,)))[:count]
        order = np.argsort(draws, kind="stable")
        out += [start + order[i : i + batch] for i in range(0, count, batch)]
        epoch += 1
    return out if steps is None else out[:steps]


def mean_terms(rows):
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


def weighted_average(updates, weights):
    total = sum(weights)
    return jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)) / total, *updates)


def fedkd_round(
    student,
    teachers,
    projections,
    data,
    ids,
    key,
    round,
    *,
    batch,
    epochs=1,
    steps=None,
    rates,
    uplink,
    downlink,
    message="update",
    weigh=lambda count: count,
    **flags,
):
    """One round. `teachers`, `projections`: lists over the population, changed in place. Returns student and reports."""
    rate_t, rate_p, rate_s = rates
    arrived, weights, reports = [], [], []
    for i in ids:
        start, count, local, rows = int(data.start[i]), int(data.count[i]), student, []
        gradient = None
        for picked in batches(key, round, i, start, count, data.max_count, batch=batch, epochs=epochs, steps=steps):
            x, y = np.asarray(data.inputs, np.float64)[picked], np.asarray(data.labels)[picked]
            g_t, g_p, gradient, terms = mutual_gradients(teachers[i], local, projections[i], x, y, **flags)
            teachers[i] = sgd(teachers[i], g_t, rate_t)
            projections[i] = tuple(w - rate_p * g for w, g in zip(projections[i], g_p, strict=True))
            local = sgd(local, gradient, rate_s)
            rows.append(terms)
        own = gradient if message == "gradient" else jax.tree.map(lambda a, b: a - b, local, student)
        decoded, cost = send(own, uplink)
        arrived.append(decoded)
        weights.append(weigh(count))
        reports.append(dict(cost, terms=mean_terms(rows)))
    average, down = send(weighted_average(arrived, weights), downlink)
    student = sgd(student, average, rate_s) if message == "gradient" else jax.tree.map(np.add, student, average)
    return student, reports, down


def plain_training(
    params, data, i, key, round, *, batch, epochs=1, steps=None, rate, change=lambda grads, params: grads
):
    """One client's SGD on its task loss: what FedAvg's clients and local training do; `change` is made to each gradient."""
    rows = batches(
        key, round, i, int(data.start[i]), int(data.count[i]), data.max_count, batch=batch, epochs=epochs, steps=steps
    )
    seen = []
    for picked in rows:
        x, y = np.asarray(data.inputs, np.float64)[picked], np.asarray(data.labels)[picked]
        logits, hidden = forward(params, x)
        seen.append(ce(logits, y, np.ones(len(y), bool)))
        d_logits = (softmax(logits) - np.eye(logits.shape[1])[y]) / len(y)
        grads = backward(params, x, hidden, d_logits, [np.zeros_like(h) for h in hidden])
        params = sgd(params, change(grads, params), rate)
    return params, float(np.mean(seen)) if seen else 0.0
