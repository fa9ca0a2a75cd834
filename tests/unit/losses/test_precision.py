"""bf16 heads on a CPU: how near value and gradient stay to fp64 when the student is close to its teacher."""

import pytest
import torch

from reference import naive_linear_divergence
from regrow.losses import LOSSES, fused_linear_kl
from regrow.losses.logits import largest_entries


def close_models(*, spread, peak, distance, dtype=torch.bfloat16, num_tokens=32, width=576, vocab_size=8192):
    """Logits of standard deviation `spread`, one logit per token raised by about `peak`."""
    torch.manual_seed(0)
    head = torch.randn(vocab_size, width).to(torch.bfloat16)
    teacher = torch.randn(num_tokens, width) * spread / width**0.5
    teacher += head[torch.randint(0, vocab_size, (num_tokens,))].float() * peak / width
    teacher = teacher.to(dtype)
    student = (teacher.float() + torch.randn(num_tokens, width) * distance / width**0.5).to(dtype)
    return student, teacher, head


def errors(student, teacher, student_head, teacher_head, name="forward_kl", **kwargs):
    """Relative errors of value and gradient, and the true value."""
    student = student.clone().requires_grad_()
    output = LOSSES[name](student, teacher, student_head, teacher_head, **kwargs)
    output.loss.backward()
    loss, gradient, *_ = naive_linear_divergence(name, student.detach(), teacher, student_head, teacher_head)
    value_error = abs(output.loss.item() / float(loss) - 1)
    return value_error, float((student.grad.double() - gradient).norm() / gradient.norm()), float(loss)


@pytest.mark.parametrize(("spread", "peak"), [(1, 0), (3, 0), (3, 12), (3, 16), (5, 0)])
@pytest.mark.parametrize("distance", [0.045, 0.0142])
def test_shared_head_is_within_one_percent(spread, peak, distance):
    student, teacher, head = close_models(spread=spread, peak=peak, distance=distance)
    for precision, bound in (("bf16_products", 0.0075), ("exact", 0.005)):
        value_error, gradient_error, kl = errors(student, teacher, head, head, precision=precision)
        assert 1e-5 < kl < 2e-3
        assert value_error < bound
        assert gradient_error < bound


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "skewed_kl"])
def test_other_divergences_with_a_shared_head(name):
    student, teacher, head = close_models(spread=3, peak=12, distance=0.03)
    value_error, gradient_error, _ = errors(student, teacher, head, head, name=name)
    assert value_error < 0.0075
    assert gradient_error < 0.0075


def test_two_heads_need_exact_logits_and_get_them():
    student, teacher, head = close_models(spread=3, peak=12, distance=0.045)
    value_error, gradient_error, _ = errors(student, teacher, head.clone(), head)
    assert value_error < 0.002
    assert gradient_error < 0.005
    rounded, _, _ = errors(student, teacher, head.clone(), head, precision="bf16_products")
    assert rounded > 0.05  # what rounding both models' logits does, and what "auto" avoids


def test_fp32_hidden_states_with_a_bf16_head():
    student, teacher, head = close_models(spread=3, peak=12, distance=0.0142, dtype=torch.float32)
    for other in (head, head.clone()):
        value_error, gradient_error, _ = errors(student, teacher, other, head)
        assert value_error < 0.0075
        assert gradient_error < 0.01


def test_fp16_head():
    student, teacher, head = close_models(spread=3, peak=12, distance=0.0142, dtype=torch.float16)
    value_error, gradient_error, _ = errors(student, teacher, head.half(), head.half())
    assert value_error < 0.001
    assert gradient_error < 0.001


def test_gradient_keeps_the_dtype_of_the_hidden_states():
    student, teacher, head = close_models(spread=1, peak=0, distance=0.1)
    student.requires_grad_()
    fused_linear_kl(student, teacher, head, head).loss.backward()
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("num_columns", [1, 5, 63, 64, 1000, 4096, 4133])
@pytest.mark.parametrize("num", [1, 5, 16])
def test_largest_entries_are_the_largest(num_columns, num):
    torch.manual_seed(num_columns)
    for values in (torch.randn(9, num_columns), -100 - torch.randn(9, num_columns).abs()):
        found = values.gather(1, largest_entries(values, num)).sort(1, descending=True).values
        assert torch.equal(found, values.topk(min(num, num_columns)).values)
