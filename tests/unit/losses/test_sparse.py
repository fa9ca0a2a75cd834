"""Sparse targets and their KL against naive fp64 oracles: values, gradients, odd shapes, statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import (
    naive_linear_divergence,
    naive_logits,
    naive_sparse_linear_kl,
    naive_sparse_targets,
)
from regrow.losses import SparseTargets, divergence_metrics, fused_linear_kl, sparse_linear_kl, sparse_targets

KINDS = ["top_k", "sampled"]


def make_case(num_tokens, width, vocab_size, *, distance=0.3, scale=2.0, dtype=torch.float32, seed=0):
    """Hidden states [T, D] of a student and a teacher, and the head [V, D] of each."""
    rng = torch.Generator().manual_seed(seed)
    head, other = (torch.randn(vocab_size, width, generator=rng).to(dtype) for _ in range(2))
    teacher = torch.randn(num_tokens, width, generator=rng) * scale / width**0.5
    student = teacher + distance * torch.randn(num_tokens, width, generator=rng) / width**0.5
    return student.to(dtype), teacher.to(dtype), (head.float() + 0.1 * other.float()).to(dtype), head


def make_targets(kind, teacher, head, num_entries, seed=0, **options):
    """Targets with random numbers from a seed."""
    shape = (len(teacher), num_entries)
    uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sparse_targets(teacher, head, kind=kind, num_entries=num_entries, uniforms_TK=uniforms, **options)


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(student, head, targets, tolerance=2e-5, *, kwargs=None, naive=None):
    """Compare loss and all gradients with the oracle; returns the output."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (student, head))
    kwargs = dict(kwargs or {})
    if (bias := kwargs.get("student_bias")) is not None:
        bias = kwargs["student_bias"] = bias.clone().requires_grad_()
    output = sparse_linear_kl(hidden, weight, targets, **kwargs)
    output.loss.backward()
    loss, *gradients = naive_sparse_linear_kl(
        targets.kind, student, head, targets.token_ids_TK, targets.log_probs_TK, **(naive or {})
    )
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(float(loss), rel=tolerance, abs=3e-7)
    for tensor, gradient in zip((hidden, weight, bias), gradients, strict=True):
        if tensor is not None:
            assert (tensor.grad - gradient).norm() <= tolerance * gradient.norm() + 1e-6
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 33), (7, 8, 1), (7, 16, 1000), (3, 5, 4133)])
@pytest.mark.parametrize("num_entries", [1, 5, 40])
def test_value_and_gradients_equal_the_oracle(kind, shape, num_entries):
    student, teacher, head, teacher_head = make_case(*shape)
    check(student, head, make_targets(kind, teacher, teacher_head, num_entries))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_bias_scale_softcap_temperature(kind, softcap):
    student, teacher, head, teacher_head = make_case(9, 16, 301, scale=3.0)
    bias, teacher_bias = torch.randn(301), torch.randn(301)
    targets = make_targets(
        kind, teacher, teacher_head, 7, temperature=1.7, teacher_bias=teacher_bias,
        teacher_softcap=3.0, teacher_scale=1.5, chunk_tokens=2,
    )  # fmt: skip
    logits = naive_logits(teacher, teacher_head, bias=teacher_bias, softcap=3.0, scale=1.5)
    log_p = torch.log_softmax(logits / 1.7, -1).gather(1, targets.token_ids_TK.long())
    torch.testing.assert_close(targets.log_probs_TK.double(), log_p, rtol=0, atol=1e-5)
    options = {"bias": bias, "softcap": softcap, "scale": 0.5}
    kwargs = {f"student_{name}": value for name, value in options.items()}
    check(
        student,
        head,
        targets,
        kwargs=kwargs | {"temperature": 1.7, "chunk_tokens": 4},
        naive=options | {"temperature": 1.7},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_labels_weights_and_ignored_tokens(kind, temperature, softcap):
    student, teacher, head, teacher_head = make_case(8, 16, 120)
    labels = torch.randint(0, 120, (8,))
    labels[2] = -100
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.0])
    targets = make_targets(kind, teacher, teacher_head, 9, temperature=temperature)
    both = {"label_weight": 0.4, "normalizer": 7.0, "temperature": temperature}
    output = check(
        student,
        head,
        targets,
        kwargs=both
        | {"labels_T": labels, "token_weights_T": weights, "chunk_tokens": 3, "student_softcap": softcap},
        naive=both | {"labels": labels, "weights": weights, "softcap": softcap},
    )
    metrics = {name: float(value) for name, value in output.metrics.items()}
    assert (metrics["num_labels"], metrics["num_tokens"], metrics["weight"]) == (5, 6, 8.5)
    student[1], targets.log_probs_TK[4] = torch.nan, torch.nan
    again = sparse_linear_kl(
        student, head, targets, labels_T=labels, token_weights_T=weights, student_softcap=softcap, **both
    )
    assert again.loss.item() == pytest.approx(output.loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_zero(kind):
    student, teacher, head, teacher_head = make_case(4, 8, 20)
    targets = make_targets(kind, teacher, teacher_head, 3)
    empty = make_targets(kind, teacher[:0], teacher_head, 3)
    assert empty.token_ids_TK.shape == empty.log_probs_TK.shape == (0, 3)
    for rows, some, weights in ((0, empty, None), (4, targets, torch.zeros(4))):
        hidden = student[:rows].clone().requires_grad_()
        output = sparse_linear_kl(hidden, head, some, token_weights_T=weights)
        output.loss.backward()
        assert output.loss.item() == 0.0
        assert torch.all(hidden.grad == 0)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_all_entries_give_the_full_kl(temperature):
    student, teacher, head, teacher_head = make_case(9, 16, 200)
    hidden, again = student.clone().requires_grad_(), student.clone().requires_grad_()
    targets = make_targets("top_k", teacher, teacher_head, 300, temperature=temperature)
    assert targets.token_ids_TK.shape == (9, 200)
    sparse = sparse_linear_kl(hidden, head, targets, temperature=temperature)
    dense = fused_linear_kl(again, teacher, head, teacher_head, temperature=temperature)
    for output in (sparse, dense):
        output.loss.backward()
    assert sparse.loss.item() == pytest.approx(dense.loss.item(), rel=1e-5)
    assert relative(hidden.grad, again.grad.double()) < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.integers(2, 150),
    distance=st.floats(0, 3),
    scale=st.floats(0.1, 20),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_top_k_is_a_lower_bound_that_grows_with_k(vocab_size, distance, scale, seed, data):
    student, teacher, head, teacher_head = make_case(
        4, 8, vocab_size, distance=distance, scale=scale, seed=seed
    )
    sizes = sorted(data.draw(st.lists(st.integers(1, vocab_size + 3), min_size=2, max_size=5)))
    values = [
        sparse_linear_kl(student, head, make_targets("top_k", teacher, teacher_head, size)).loss.item()
        for size in sizes
    ]
    full = fused_linear_kl(student, teacher, head, teacher_head).loss.item()
    for smaller, larger in zip([0.0, *values], [*values, full], strict=True):
        assert smaller <= larger * (1 + 1e-5) + 2e-6


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 12),
    vocab_size=st.integers(1, 200),
    num_entries=st.integers(1, 30),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_shape_and_chunk_size(num_tokens, vocab_size, num_entries, kind, seed, data):
    chunks = st.integers(1, num_tokens + 3)
    student, teacher, head, teacher_head = make_case(num_tokens, 8, vocab_size, seed=seed)
    targets, whole = (
        make_targets(kind, teacher, teacher_head, num_entries, seed, chunk_tokens=chunk)
        for chunk in (data.draw(chunks), None)
    )
    torch.testing.assert_close(targets.log_probs_TK, whole.log_probs_TK, rtol=0, atol=1e-5)
    check(student, head, targets, 3e-5, kwargs={"chunk_tokens": data.draw(chunks)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_entries", [1, 30, 4000])
def test_equal_models_give_zero(dtype, num_entries):
    _, teacher, head, _ = make_case(9, 24, 2500, dtype=dtype, scale=5.0)
    for kind in KINDS:
        targets = make_targets(kind, teacher, head, num_entries, temperature=1.3)
        student = teacher.clone().requires_grad_()
        output = sparse_linear_kl(student, head, targets, temperature=1.3)
        output.loss.backward()
        assert abs(output.loss.item()) < 1e-6
        if kind == "top_k":
            assert float(student.grad.norm()) < 1e-5


def test_mass_that_is_all_kept_or_nearly_leaves_no_noise():
    """Logits are the hidden states; the rest is 0, or so small that 1 - sum of fp32 values would miss it."""
    head = torch.eye(6)
    none, little = torch.full((1, 6), -1e4), torch.full((1, 6), -30.0)
    none[:, :3], little[:, :3] = torch.tensor([0.0, 0.1, 0.2]), torch.tensor([30.0, -3.0, -3.1])
    for teacher in (none, little):
        targets = sparse_targets(teacher, head, kind="top_k", num_entries=3)
        for student in (none, none.flip(0) * 0.5, little, none.clamp_min(-5.0)):
            hidden = student.clone().requires_grad_()
            loss = sparse_linear_kl(hidden, head, targets).loss
            loss.backward()
            log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (teacher, student))
            p_rest, q_rest = (torch.logsumexp(log[:, 3:], 1) for log in (log_p, log_q))
            expected = (log_p.exp() * (log_p - log_q))[:, :3].sum() + (p_rest.exp() * (p_rest - q_rest)).sum()
            assert loss.item() == pytest.approx(float(expected), rel=1e-6, abs=2e-7)
            slope = log_q.exp() - log_p.exp()
            slope[:, 3:] = (log_q[:, 3:] - q_rest).exp() * (q_rest.exp() - p_rest.exp())
            torch.testing.assert_close(hidden.grad.double(), slope, rtol=1e-5, atol=2e-7)


def test_repeated_draws_count_as_often_as_they_were_drawn():
    student, _, head, _ = make_case(2, 8, 12)
    ids = torch.tensor([[3, 3, 3, 5], [0, 11, 0, 0]], dtype=torch.int32)
    log_probs = torch.log(torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.3, 0.2, 0.3, 0.3]]))
    output = check(student, head, SparseTargets(ids, log_probs, "sampled"))
    hidden = student.clone().requires_grad_()
    sparse_linear_kl(hidden, head, SparseTargets(ids, log_probs, "sampled"), normalizer=1.0).loss.backward()
    slope = torch.softmax(student @ head.T, -1)
    slope[0, 3] -= 0.75
    slope[0, 5] -= 0.25
    slope[1, 0] -= 0.75
    slope[1, 11] -= 0.25
    torch.testing.assert_close(hidden.grad, slope @ head)
    assert output.loss.item() != 0


def test_draws_follow_the_teacher_and_estimate_without_bias():
    """Means over 200,000 draws per token: the bounds are five standard errors of the mean."""
    student, teacher, head, teacher_head = make_case(3, 6, 9, distance=1.0)
    draws = 200_000
    targets = make_targets("sampled", teacher, teacher_head, draws)
    log_p = torch.log_softmax(naive_logits(teacher, teacher_head), -1)
    log_q = torch.log_softmax(naive_logits(student, head), -1)
    counts = torch.stack([ids.bincount(minlength=9) for ids in targets.token_ids_TK]) / draws
    p = log_p.exp()
    assert torch.all((counts - p).abs() <= 5 * (p * (1 - p) / draws).sqrt())
    spread = ((p * (log_p - log_q).square()).sum(-1) - (p * (log_p - log_q)).sum(-1).square()).sqrt()
    dense, gradient, *_ = naive_linear_divergence("forward_kl", student, teacher, head, teacher_head)
    hidden = student.clone().requires_grad_()
    loss = sparse_linear_kl(hidden, head, targets).loss
    loss.backward()
    assert abs(loss.item() - float(dense)) <= 5 * float(spread.square().sum().sqrt()) / 3 / draws**0.5
    assert relative(hidden.grad, gradient) < 0.02


def test_the_mean_over_seeds_is_the_dense_gradient():
    student, teacher, head, teacher_head = make_case(5, 8, 40, distance=1.5)
    total, value, seeds = torch.zeros_like(student), 0.0, 3_000
    for seed in range(seeds):
        hidden = student.clone().requires_grad_()
        loss = sparse_linear_kl(hidden, head, make_targets("sampled", teacher, teacher_head, 4, seed)).loss
        loss.backward()
        total, value = total + hidden.grad / seeds, value + loss.item() / seeds
    dense, gradient, *_ = naive_linear_divergence("forward_kl", student, teacher, head, teacher_head)
    assert value == pytest.approx(float(dense), rel=0.05)
    assert relative(total, gradient) < 0.05


def test_targets_are_the_most_likely_tokens_in_order():
    _, teacher, _, head = make_case(6, 16, 5000)
    teacher[0], head[17], head[4001] = 1.0, 4.0, 4.0  # equal logits: the first one first
    targets = sparse_targets(teacher, head, kind="top_k", num_entries=50)
    ids, log_p = naive_sparse_targets(naive_logits(teacher, head), 50)
    assert torch.equal(targets.token_ids_TK[0, :2], torch.tensor([17, 4001], dtype=torch.int32))
    assert torch.equal(targets.token_ids_TK.sort(1).values, ids.sort(1).values.int())
    torch.testing.assert_close(targets.log_probs_TK.double(), log_p, rtol=0, atol=1e-5)
    assert torch.all(targets.log_probs_TK.diff(dim=1) <= 0)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_heads_on_a_cpu(kind):
    """Rounded products would add 1e-3 nats; sums of two are accurate to 16 bits."""
    student, teacher, head, teacher_head = make_case(
        32, 96, 3000, dtype=torch.bfloat16, scale=3.0, distance=0.2
    )
    exact = sparse_targets(teacher.float(), teacher_head.float(), kind="top_k", num_entries=20)
    rounded = sparse_targets(teacher, teacher_head, kind="top_k", num_entries=20)
    assert torch.equal(exact.token_ids_TK, rounded.token_ids_TK)
    torch.testing.assert_close(rounded.log_probs_TK, exact.log_probs_TK, rtol=0, atol=1e-3)
    hidden = student.clone().requires_grad_()
    targets = make_targets(kind, teacher, teacher_head, 20)
    output = sparse_linear_kl(hidden, head, targets)
    output.loss.backward()
    loss, gradient, *_ = naive_sparse_linear_kl(
        kind, student, head, targets.token_ids_TK, targets.log_probs_TK
    )
    assert output.loss.item() == pytest.approx(float(loss), rel=1e-3)
    assert relative(hidden.grad, gradient) < 1e-2


def test_a_frozen_head_gets_no_gradient():
    student, teacher, head, teacher_head = make_case(6, 16, 70)
    hidden = student.clone().requires_grad_()
    targets = make_targets("top_k", teacher, teacher_head, 5)
    sparse_linear_kl(hidden, head, targets).loss.backward()
    assert head.grad is None
    with torch.no_grad():
        assert not sparse_linear_kl(hidden, head, targets).loss.requires_grad
    weight = head.clone().requires_grad_()
    sparse_linear_kl(student, weight, targets).loss.backward()
    assert weight.grad.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["student", "teacher", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_makes_the_loss_nan(kind, where, dtype):
    student, teacher, head, teacher_head = make_case(6, 16, 3000, dtype=dtype)
    if where == "teacher":
        teacher[3, 2] = torch.nan
    targets = make_targets(kind, teacher, teacher_head, 4)
    if where == "student":
        student[3, 2] = torch.nan
    if where == "head":  # outside the entries
        head[next(v for v in range(3000) if v not in targets.token_ids_TK[3]), 1] = torch.nan
    student.requires_grad_()
    output = sparse_linear_kl(student, head, targets)
    output.loss.backward()
    assert torch.isnan(output.loss)
    assert torch.isnan(student.grad[3]).any()


def test_far_student_stays_finite_and_right():
    student, teacher, head, teacher_head = make_case(5, 16, 200, scale=15.0, distance=25.0)
    for kind in KINDS:
        check(student, head, make_targets(kind, teacher, teacher_head, 6), 1e-4)


def test_agreement_is_that_of_the_whole_distributions():
    student, teacher, head, teacher_head = make_case(60, 16, 4500, distance=2.0, scale=3.0)
    dense = divergence_metrics(student, teacher, head, teacher_head)
    targets = make_targets("top_k", teacher, teacher_head, 2)
    with torch.no_grad():
        output = sparse_linear_kl(student, head, targets, return_metrics=True, chunk_tokens=7)
    assert float(output.metrics["top1_agreement"]) == float(dense.top1.sum())
    assert float(output.metrics["top5_agreement"]) == float(dense.top5.sum())
    assert 0 < float(dense.top1.sum()) < float(dense.top5.sum()) < 60
    assert float(output.metrics["kl"]) == pytest.approx(60 * output.loss.item(), rel=1e-6)
    assert 0 < float(output.metrics["kl"]) < float(dense.kl.sum())


def test_autocast_does_not_lower_the_precision():
    student, teacher, head, teacher_head = make_case(6, 32, 400, distance=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(student, head, make_targets("top_k", teacher, teacher_head, 9), 2e-4)


def test_arguments_that_do_not_fit_are_named():
    student, teacher, head, teacher_head = make_case(4, 8, 20)
    targets = make_targets("sampled", teacher, teacher_head, 3)
    with pytest.raises(ValueError, match="student's head"):
        sparse_linear_kl(student[:, :4], head, targets)
    with pytest.raises(ValueError, match="for 2 tokens"):
        sparse_linear_kl(student[:2], head, targets)
    with pytest.raises(ValueError, match="teacher's argmax"):
        sparse_linear_kl(student, head, targets, return_metrics=True)
    with pytest.raises(ValueError, match="temperature"):
        sparse_linear_kl(student, head, targets, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_tokens"):
        sparse_linear_kl(student, head, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match="num_entries"):
        sparse_targets(teacher, teacher_head, kind="top_k", num_entries=0)
    with pytest.raises(ValueError, match=r"uniform numbers of shape \(4, 3\)"):
        sparse_targets(teacher, teacher_head, kind="sampled", num_entries=3)
    with pytest.raises(ValueError, match="kind 'best'"):
        sparse_targets(teacher, teacher_head, kind="best", num_entries=3)
