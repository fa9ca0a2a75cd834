"""Per-token comparison against fp64."""

import pytest
import torch

from reference import naive_divergence, naive_logits
from regrow.losses import divergence_metrics


@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 5), (37, 900), (12, 4133)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_every_column_equals_fp64(num_tokens, vocab_size, dtype, shared):
    torch.manual_seed(1)
    head = torch.randn(vocab_size, 64).to(dtype)
    other = head if shared else torch.randn(vocab_size, 64).to(dtype)
    teacher = (torch.randn(num_tokens, 64) * 0.4).to(dtype)
    student = (teacher.float() + torch.randn(num_tokens, 64) * 0.1).to(dtype)
    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[0] = -100
    options = {"softcap": 20.0, "scale": 0.8}
    metrics = divergence_metrics(
        student,
        teacher,
        other,
        head,
        labels_T=labels,
        chunk_tokens=5,
        student_softcap=20.0,
        student_scale=0.8,
    )
    z_s, z_t = naive_logits(student, other, **options), naive_logits(teacher, head)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 2e-3}
    torch.testing.assert_close(metrics.kl.double(), naive_divergence("forward_kl", z_s, z_t), **tolerance)
    for entropy, logits in ((metrics.entropy_student, z_s), (metrics.entropy_teacher, z_t)):
        log_p = logits.log_softmax(-1)
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), **tolerance)
    for nll, logits in ((metrics.nll_student, z_s), (metrics.nll_teacher, z_t)):
        expected = -logits.log_softmax(-1)[torch.arange(num_tokens), labels.clamp_min(0)]
        torch.testing.assert_close(nll[1:].double(), expected[1:], **tolerance)
        assert torch.isnan(nll[0])
    assert torch.equal(metrics.top1, z_s.argmax(-1) == z_t.argmax(-1))
    if vocab_size > 5:
        in_five = (z_s.topk(5).indices == z_t.argmax(-1, keepdim=True)).any(-1)
        assert torch.equal(metrics.top5, in_five)
    else:
        assert metrics.top5.all()


def test_without_labels_and_without_tokens():
    head = torch.randn(10, 4)
    metrics = divergence_metrics(torch.empty(0, 4), torch.empty(0, 4), head, head)
    assert metrics.kl.shape == (0,)
    assert metrics.nll_student is None


def test_equal_models():
    head, hidden = torch.randn(5000, 16).bfloat16(), torch.randn(9, 16).bfloat16() * 4
    metrics = divergence_metrics(hidden, hidden.clone(), head, head)
    assert torch.all(metrics.kl == 0)
    assert metrics.top1.all()
    assert torch.equal(metrics.entropy_student, metrics.entropy_teacher)
