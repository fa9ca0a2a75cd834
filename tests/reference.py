"""Naive fp64 oracles, written for clarity only; tests and benchmarks compare the product against them."""

import math

import torch

# --- pruning (scores, greedy removal, refit, statistics) -------------------------------------------------


def naive_ridge_refit(down, kept, inputs, ridge):
    """argmin over W' of mean ||W' x_S - W x||^2 + ridge ||W' - W_S||^2, by least squares on stacked rows.

    down [D, F], inputs [T, F], kept a list; all float64. Without normal equations, unlike the product.
    """
    rows = inputs[:, kept] / len(inputs) ** 0.5
    target = inputs @ down.T / len(inputs) ** 0.5
    eye = ridge**0.5 * torch.eye(len(kept), dtype=torch.float64)
    stacked = torch.cat([rows, eye])
    wanted = torch.cat([target, ridge**0.5 * down[:, kept].T])
    return torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution.T


def naive_ridge_objective(down, kept, inputs, ridge):
    """That minimum plus ridge ||W_P||^2: what removing all other channels costs under H = C + ridge I."""
    gone = [j for j in range(down.shape[1]) if j not in kept]
    damped = inputs.T @ inputs / len(inputs) + ridge * torch.eye(down.shape[1], dtype=torch.float64)
    inner = damped[gone][:, gone]
    if kept:
        across = damped[gone][:, kept]
        inner = inner - across @ torch.linalg.solve(damped[kept][:, kept], across.T)
    return float(torch.trace(down[:, gone] @ inner @ down[:, gone].T))


def naive_greedy_removal(down, inputs, count, ridge):
    """Channels in the order in which the objective grows least, every candidate tried from scratch."""
    gone = []
    for _ in range(count):
        alive = [j for j in range(down.shape[1]) if j not in gone]
        costs = {j: naive_ridge_objective(down, [k for k in alive if k != j], inputs, ridge) for j in alive}
        gone.append(min(costs, key=costs.get))
    return gone


# --- evaluation (fidelity, perplexity) --------------------------------------------------------------------


def naive_token_figures(student, teacher, rows, counted):
    """Agreement, KL, p95 and perplexities over the counted predictions; models in float64, one row at a time.

    rows: lists of token ids; counted[i][t] says whether token t of row i counts as a predicted one. Full
    logits, no padding, no batches, sums in Python.
    """
    top1, top5, kls, student_nll, teacher_nll = [], [], [], [], []
    for ids, count in zip(rows, counted, strict=True):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            ours = student(input_ids=tokens).logits[0].double().log_softmax(-1)
            theirs = teacher(input_ids=tokens).logits[0].double().log_softmax(-1)
        for position in range(len(ids) - 1):
            if not count[position + 1]:
                continue
            p, q = theirs[position], ours[position]
            best = int(p.argmax())
            top1.append(best == int(q.argmax()))
            top5.append(best in q.argsort(descending=True)[:5].tolist())
            kls.append(float((p.exp() * (p - q)).sum()))
            student_nll.append(-float(q[ids[position + 1]]))
            teacher_nll.append(-float(p[ids[position + 1]]))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    ordered = sorted(kls)
    place = 0.95 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return {
        "top1_agreement": mean(top1),
        "top5_agreement": mean(top5),
        "kl_mean": mean(kls),
        "kl_p95": ordered[low] + (place - low) * (ordered[high] - ordered[low]),
        "student_perplexity": math.exp(mean(student_nll)),
        "teacher_perplexity": math.exp(mean(teacher_nll)),
        "num_tokens": len(kls),
    }


# --- losses (divergences over the full vocabulary) -------------------------------------------------------


def naive_logits(hidden, head, bias=None, softcap=None, scale=1.0):
    """softcap(scale (W h + b)) in fp64 [T, V], a block of the vocabulary at a time to spare memory."""
    hidden = hidden.double()
    logits = torch.cat([hidden @ block.double().T for block in head.split(4096)], dim=1)
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def naive_divergence(name, student_logits, teacher_logits, beta=0.5, temperature=1.0):
    """Divergence per token [T] by its definition, from fp64 logits."""
    log_q = torch.log_softmax(student_logits / temperature, -1)
    log_p = torch.log_softmax(teacher_logits / temperature, -1)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jsd": lambda: beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
        "skewed_kl": lambda: kl(log_p, log_m),
    }[name]()


def naive_linear_divergence(
    name,
    student_hidden,
    teacher_hidden,
    student_head,
    teacher_head,
    *,
    beta=0.5,
    temperature=1.0,
    weights=None,
    normalizer=None,
    labels=None,
    label_weight=0.0,
    ignore_index=-100,
    student_options=None,
    teacher_options=None,
):
    """Loss and its gradients with respect to student's hidden states, head and bias, all fp64.

    `student_options` and `teacher_options` are keyword arguments of `naive_logits`. Autograd differentiates
    with respect to W h; two plain products do the rest.
    """
    student_options, teacher_options = dict(student_options or {}), dict(teacher_options or {})
    bias = student_options.pop("bias", None)
    product = naive_logits(student_hidden, student_head, bias=bias).requires_grad_()
    logits = product * student_options.get("scale", 1.0)
    if (cap := student_options.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    teacher_logits = naive_logits(teacher_hidden, teacher_head, **teacher_options)
    per_token = naive_divergence(name, logits, teacher_logits, beta, temperature)
    if labels is not None:
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        per_token = per_token + label_weight * nll
    weights = torch.ones(len(per_token)) if weights is None else weights
    weights = weights.double()
    used = weights != 0
    total = weights.sum() if normalizer is None else normalizer
    loss = (weights[used] * per_token[used]).sum() / total
    (slope,) = torch.autograd.grad(loss, product)
    blocks = zip(slope.split(4096, dim=1), student_head.split(4096), strict=True)
    hidden_grad = sum(part @ block.double() for part, block in blocks)
    return loss.detach(), hidden_grad, slope.T @ student_hidden.double(), slope.sum(0)


def naive_sparse_targets(logits, num_entries, temperature=1.0):
    """Ids and log-probabilities of each token's most likely entries, from fp64 logits"""
    log_p = torch.log_softmax(logits / temperature, -1)
    ids = torch.sort(log_p, descending=True, stable=True, dim=-1).indices[:, :num_entries]
    return ids, log_p.gather(1, ids)


def naive_sparse_kl(kind, log_q, ids, log_p):
    """Value per token [T], one token at a time; log_q [T, V] all of the student, ids and log_p [T, K]."""
    values = []
    for row, kept, known in zip(log_q, ids.long(), log_p.double(), strict=True):
        distance = known - row[kept]
        if kind == "sampled":
            values.append(distance.mean())
            continue
        others = [v for v in range(len(row)) if v not in set(kept.tolist())]
        value = (known.exp() * distance).sum()
        if others and (rest := 1 - known.exp().sum()) > 0:
            value = value + rest * (rest.log() - torch.logsumexp(row[others], 0))
        values.append(value)
    return torch.stack(values) if values else log_q.sum(-1)


def naive_sparse_linear_kl(
    kind,
    hidden,
    head,
    ids,
    log_p,
    *,
    temperature=1.0,
    weights=None,
    normalizer=None,
    labels=None,
    label_weight=0.0,
    ignore_index=-100,
    **options,
):
    """Loss and its gradients with respect to student's hidden states, head and bias, all by fp64 autograd.

    `options` are keyword arguments of `naive_logits`.
    """
    bias = options.pop("bias", None)
    bias = (torch.zeros(len(head)) if bias is None else bias).detach().double().requires_grad_()
    hidden, head = (tensor.detach().double().requires_grad_() for tensor in (hidden, head))
    logits = naive_logits(hidden, head, bias=bias, **options)
    per_token = naive_sparse_kl(kind, torch.log_softmax(logits / temperature, -1), ids, log_p)
    if labels is not None:
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        per_token = per_token + label_weight * nll
    weights = torch.ones(len(per_token)) if weights is None else weights
    total = weights.double().sum() if normalizer is None else normalizer
    loss = (weights.double() * per_token).sum() / total
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head, bias))
