"""The fused losses against the naive fp64 oracle: values, gradients, options, odd shapes, any chunk size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import naive_linear_divergence
from regrow.losses import LOSSES, fused_linear_kl

SHAPES = [(1, 8, 33), (7, 8, 1), (7, 16, 1000), (13, 24, 333), (3, 5, 4133)]


def make_case(num_tokens, width, vocab_size, *, distance=0.3, scale=1.0, dtype=torch.float32, seed=0):
    """Hidden states [T, D] of a student and a teacher, and one head [V, D]."""
    rng = torch.Generator().manual_seed(seed)
    head = torch.randn(vocab_size, width, generator=rng).to(dtype)
    teacher = torch.randn(num_tokens, width, generator=rng) * scale / width**0.5
    student = teacher + distance * torch.randn(num_tokens, width, generator=rng) / width**0.5
    return student.to(dtype), teacher.to(dtype), head


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(name, student, teacher, student_head, teacher_head, tolerance, *, kwargs=None, naive=None):
    """Compare loss and hidden gradient with the oracle; returns the output."""
    student = student.clone().requires_grad_()
    output = LOSSES[name](student, teacher, student_head, teacher_head, **(kwargs or {}))
    output.loss.backward()
    loss, gradient, *_ = naive_linear_divergence(
        name, student.detach(), teacher, student_head.detach(), teacher_head.detach(), **(naive or {})
    )
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(float(loss), rel=tolerance, abs=3e-7)
    if float(gradient.norm()) > 1e-12:
        assert relative(student.grad, gradient) < tolerance
    else:
        assert student.grad.norm().item() < 1e-6
    return output


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_value_and_gradient_equal_the_oracle(name, shape, shared):
    student, teacher, head = make_case(*shape, scale=2.0)
    other = head if shared else head + 0.1 * torch.randn(head.shape)
    check(name, student, teacher, head, other, 2e-5, kwargs={"beta": 0.3}, naive={"beta": 0.3})


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shared", [True, False])
def test_bias_scale_softcap_temperature(name, shared):
    student, teacher, head = make_case(9, 16, 301, scale=3.0)
    other = head if shared else torch.randn(head.shape)
    bias_s, bias_t = torch.randn(301), torch.randn(301)
    kwargs = {
        "beta": 0.7,
        "temperature": 1.7,
        "student_bias": bias_s,
        "teacher_bias": bias_t,
        "student_softcap": 2.5,
        "teacher_softcap": 3.0,
        "student_scale": 0.5,
        "teacher_scale": 1.5,
        "chunk_tokens": 4,
    }
    naive = {
        "beta": 0.7,
        "temperature": 1.7,
        "student_options": {"bias": bias_s, "softcap": 2.5, "scale": 0.5},
        "teacher_options": {"bias": bias_t, "softcap": 3.0, "scale": 1.5},
    }
    check(name, student, teacher, head, other, 2e-5, kwargs=kwargs, naive=naive)


@pytest.mark.parametrize("option", ["bias", "softcap", "scale"])
def test_each_option_alone_and_on_one_side_only(option):
    student, teacher, head = make_case(5, 16, 100)
    value = {"bias": torch.randn(100), "softcap": 0.8, "scale": 2.0}[option]
    for side in ("student", "teacher"):
        check(
            "forward_kl",
            student,
            teacher,
            head,
            head,
            2e-5,
            kwargs={f"{side}_{option}": value},
            naive={f"{side}_options": {option: value}},
        )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_weights_and_ignored_tokens(name, temperature):
    student, teacher, head = make_case(8, 16, 120)
    labels = torch.randint(0, 120, (8,))
    labels[2] = -100
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.0])
    kwargs = {"labels_T": labels, "label_weight": 0.4, "token_weights_T": weights, "chunk_tokens": 3}
    naive = {"labels": labels, "label_weight": 0.4, "weights": weights}
    output = check(
        name,
        student,
        teacher,
        head,
        head,
        2e-5,
        kwargs=kwargs | {"temperature": temperature},
        naive=naive | {"temperature": temperature},
    )
    log_q = torch.log_softmax(student @ head.T, -1)
    kept = (weights != 0) & (labels != -100)
    expected = -log_q[torch.arange(8), labels.clamp_min(0)][kept].sum()
    assert float(output.metrics["label_nll"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(output.metrics["num_labels"]) == 5
    assert float(output.metrics["num_tokens"]) == 6
    assert float(output.metrics["weight"]) == 8.5


def test_labels_with_soft_capping_and_scale():
    student, teacher, head = make_case(6, 16, 120)
    labels = torch.randint(0, 120, (6,))
    options = {"softcap": 1.2, "scale": 1.5}
    check(
        "forward_kl",
        student,
        teacher,
        head,
        head,
        2e-5,
        kwargs={
            "labels_T": labels,
            "label_weight": 1.0,
            "temperature": 3.0,
            "student_softcap": 1.2,
            "student_scale": 1.5,
        },
        naive={"labels": labels, "label_weight": 1.0, "temperature": 3.0, "student_options": options},
    )


def test_tokens_of_weight_zero_may_hold_anything():
    student, teacher, head = make_case(6, 16, 50)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    clean = fused_linear_kl(student, teacher, head, head, token_weights_T=weights)
    student[1], teacher[4] = torch.nan, torch.inf
    student.requires_grad_()
    output = fused_linear_kl(student, teacher, head, head, token_weights_T=weights)
    output.loss.backward()
    assert output.loss.item() == clean.loss.item()
    assert torch.all(student.grad[[1, 4]] == 0)
    assert torch.isfinite(student.grad).all()


def test_all_tokens_ignored_gives_zero():
    student, teacher, head = make_case(4, 8, 20)
    student.requires_grad_()
    output = fused_linear_kl(
        student, teacher, head, head, token_weights_T=torch.zeros(4), return_metrics=True
    )
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert torch.all(student.grad == 0)
    assert float(output.metrics["num_tokens"]) == 0.0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("precision", ["exact", "bf16_products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_equal_models_give_exactly_zero(name, precision, dtype, temperature):
    _, teacher, head = make_case(9, 24, 2500, dtype=dtype, scale=5.0)
    for other in (head, head.clone()):
        student = teacher.clone().requires_grad_()
        output = LOSSES[name](
            student,
            teacher,
            other,
            head,
            precision=precision,
            temperature=temperature,
            return_metrics=True,
        )
        output.loss.backward()
        assert output.loss.item() == 0.0
        assert torch.count_nonzero(student.grad) == 0
        assert float(output.metrics["top1_agreement"]) == 9
        assert float(output.metrics["kl"]) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 12),
    vocab_size=st.integers(1, 200),
    extra=st.integers(0, 3),
    chunk_vocab=st.one_of(st.none(), st.integers(1, 250)),
    name=st.sampled_from(sorted(LOSSES)),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_shape_and_chunk_size(num_tokens, vocab_size, extra, chunk_vocab, name, seed, data):
    chunk = data.draw(st.integers(1, num_tokens + extra))
    student, teacher, head = make_case(num_tokens, 8, vocab_size, seed=seed)
    weights = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) + 0.1
    kwargs = {"chunk_tokens": chunk, "chunk_vocab": chunk_vocab, "token_weights_T": weights}
    check(name, student, teacher, head, head, 3e-5, kwargs=kwargs, naive={"weights": weights})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_size_does_not_change_the_result(dtype):
    student, teacher, head = make_case(11, 32, 5000, dtype=dtype, scale=3.0)
    results = []
    for chunk_tokens in range(1, 15):
        hidden = student.clone().requires_grad_()
        output = fused_linear_kl(hidden, teacher, head, head, chunk_tokens=chunk_tokens)
        output.loss.backward()
        results.append((output.loss.detach(), hidden.grad))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    for loss, gradient in results[1:]:
        assert float(loss) == pytest.approx(float(results[0][0]), rel=tolerance)
        assert relative(gradient, results[0][1].double()) < tolerance * 10


@pytest.mark.parametrize("name", LOSSES)
def test_trainable_head_and_bias_get_their_gradients(name):
    student, teacher, head = make_case(10, 16, 70)
    for shared in (True, False):
        weight = head.clone().requires_grad_()
        bias = torch.randn(70, requires_grad=True)
        hidden = student.clone().requires_grad_()
        teacher_head = weight if shared else head.roll(1, 0)
        output = LOSSES[name](
            hidden, teacher, weight, teacher_head, student_bias=bias, student_scale=0.7, chunk_tokens=3
        )
        (output.loss * 2.0).backward()
        _, hidden_grad, head_grad, bias_grad = naive_linear_divergence(
            name,
            student,
            teacher,
            weight.detach(),
            teacher_head.detach(),
            student_options={"bias": bias.detach(), "scale": 0.7},
        )
        assert relative(hidden.grad, 2 * hidden_grad) < 2e-5
        assert relative(weight.grad, 2 * head_grad) < 2e-5
        assert relative(bias.grad, 2 * bias_grad) < 2e-5


def test_trainable_head_alone_and_frozen_head():
    student, teacher, head = make_case(6, 16, 70)
    weight = head.clone().requires_grad_()
    fused_linear_kl(student, teacher, weight, head).loss.backward()
    expected = naive_linear_divergence("forward_kl", student, teacher, head, head)[2]
    assert relative(weight.grad, expected) < 2e-5
    hidden = student.clone().requires_grad_()
    output = fused_linear_kl(hidden, teacher, head, head)
    output.loss.backward()
    assert head.grad is None
    with torch.no_grad():
        assert not fused_linear_kl(hidden, teacher, head, head).loss.requires_grad


def test_trainable_bf16_head():
    student, teacher, head = make_case(40, 64, 900, dtype=torch.bfloat16, scale=2.0)
    weight = head.clone().requires_grad_()
    fused_linear_kl(student, teacher, weight, head, chunk_tokens=16).loss.backward()
    expected = naive_linear_divergence("forward_kl", student, teacher, head, head)[2]
    assert relative(weight.grad, expected) < 1e-2


def test_normalizer_replaces_the_sum_of_weights():
    student, teacher, head = make_case(6, 16, 70)
    mean = fused_linear_kl(student, teacher, head, head).loss
    total = fused_linear_kl(student, teacher, head, head, normalizer=3.0).loss
    assert float(total) == pytest.approx(float(mean) * 6 / 3, rel=1e-6)


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_hidden_states_make_the_loss_nan(where):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, head = make_case(6, 16, 3000, dtype=dtype)
        (student if where == "student" else teacher)[3, 2] = torch.nan
        student.requires_grad_()
        output = fused_linear_kl(student, teacher, head, head, return_metrics=True)
        output.loss.backward()
        assert torch.isnan(output.loss)
        assert torch.isnan(student.grad[3]).any()


def test_far_student_stays_finite_and_right():
    student, teacher, head = make_case(5, 16, 200, scale=15.0, distance=25.0)
    for name in LOSSES:
        check(name, student, teacher, head, head, 1e-4)
        check(name, student, teacher, head, head.clone(), 1e-4)


def test_autocast_does_not_lower_the_precision():
    student, teacher, head = make_case(6, 32, 400, distance=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check("forward_kl", student, teacher, head, head, 2e-4)


def test_metrics_are_sums_over_kept_tokens():
    student, teacher, head = make_case(30, 16, 4500, distance=2.0, scale=3.0)
    weights = torch.ones(30)
    weights[::4] = 0
    metrics = fused_linear_kl(
        student, teacher, head, head, token_weights_T=weights, return_metrics=True, chunk_tokens=7
    ).metrics
    z_s, z_t = (student @ head.T)[weights != 0], (teacher @ head.T)[weights != 0]
    assert float(metrics["top1_agreement"]) == float((z_s.argmax(-1) == z_t.argmax(-1)).sum())
    in_five = (z_s.topk(5).indices == z_t.argmax(-1, keepdim=True)).any(-1)
    assert float(metrics["top5_agreement"]) == float(in_five.sum())
    assert 0 < float(metrics["top1_agreement"]) < float(metrics["top5_agreement"]) < 22
    p, q = z_t.double().log_softmax(-1), z_s.double().log_softmax(-1)
    assert float(metrics["kl"]) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
    reverse = LOSSES["reverse_kl"](
        student, teacher, head, head, token_weights_T=weights, return_metrics=True
    ).metrics
    assert float(reverse["kl"]) == pytest.approx(float(metrics["kl"]), rel=1e-5)


def test_arguments_that_do_not_fit_are_named():
    student, teacher, head = make_case(4, 8, 20)
    with pytest.raises(ValueError, match="vocabularies differ"):
        fused_linear_kl(student, teacher, head, head[:10])
    with pytest.raises(ValueError, match="equally many tokens"):
        fused_linear_kl(student, teacher[:2], head, head)
    with pytest.raises(ValueError, match="student's head"):
        fused_linear_kl(student, teacher, head[:, :4], head)
    with pytest.raises(ValueError, match="temperature"):
        fused_linear_kl(student, teacher, head, head, temperature=0.0)
    with pytest.raises(ValueError, match="beta"):
        LOSSES["jsd"](student, teacher, head, head, beta=1.0)
    with pytest.raises(ValueError, match="precision"):
        fused_linear_kl(student, teacher, head, head, precision="half")
    with pytest.raises(ValueError, match="chunk_tokens"):
        fused_linear_kl(student, teacher, head, head, chunk_tokens=0)
    with pytest.raises(ValueError, match="impl"):
        fused_linear_kl(student, teacher, head, head, impl="magic")
