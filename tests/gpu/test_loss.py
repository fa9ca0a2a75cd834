"""The losses on a GPU, whose products are fp32 whatever the head's dtype."""

import pytest
import torch

from reference import naive_linear_divergence, naive_logits, naive_sparse_linear_kl
from regrow.losses import LOSSES, divergence_metrics, sparse_linear_kl, sparse_targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk_vocab", [None, 1000])
def test_value_and_gradient_equal_the_oracle(name, dtype, shared, chunk_vocab):
    torch.manual_seed(0)
    head = torch.randn(5003, 64).to(dtype)
    other = head if shared else head.roll(1, 0)
    teacher = (torch.randn(37, 64) * 0.3).to(dtype)
    student = (teacher.float() + 0.02 * torch.randn(37, 64)).to(dtype)
    hidden = student.cuda().requires_grad_()
    on_gpu = head.cuda()
    student_head = on_gpu if shared else other.cuda()
    output = LOSSES[name](
        hidden, teacher.cuda(), student_head, on_gpu, chunk_tokens=10, chunk_vocab=chunk_vocab
    )
    output.loss.backward()
    loss, gradient, *_ = naive_linear_divergence(name, student, teacher, other, head)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    assert output.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert ((hidden.grad.double().cpu() - gradient).norm() / gradient.norm()).item() < tolerance


def test_memory_does_not_grow_with_the_tokens():
    head = torch.randn(100_000, 64, device="cuda").bfloat16()
    peaks = []
    for num_tokens in (1024, 8192):
        teacher = torch.randn(num_tokens, 64, device="cuda").bfloat16()
        student = teacher.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        LOSSES["forward_kl"](student, teacher, head, head).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - held - 3 * student.nbytes)
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[0] < 1e9


def test_metrics_equal_those_of_the_cpu():
    torch.manual_seed(0)
    head = torch.randn(5003, 64)
    student, teacher = torch.randn(20, 64) * 0.3, torch.randn(20, 64) * 0.3
    expected = divergence_metrics(student, teacher, head, head)
    found = divergence_metrics(student.cuda(), teacher.cuda(), head.cuda(), head.cuda())
    torch.testing.assert_close(found.kl.cpu(), expected.kl, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.top1.cpu(), expected.top1)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_targets_and_their_loss_equal_the_oracle(kind, dtype):
    torch.manual_seed(0)
    head = torch.randn(5003, 64).to(dtype)
    teacher = (torch.randn(37, 64) * 0.3).to(dtype)
    student = (teacher.float() + 0.05 * torch.randn(37, 64)).to(dtype)
    uniforms = torch.rand(37, 20, dtype=torch.float64)
    targets = sparse_targets(
        teacher.cuda(), head.cuda(), kind=kind, num_entries=20, uniforms_TK=uniforms, chunk_tokens=10
    ).to("cpu")
    log_p = torch.log_softmax(naive_logits(teacher, head), -1).gather(1, targets.token_ids_TK.long())
    torch.testing.assert_close(targets.log_probs_TK.double(), log_p, rtol=0, atol=1e-2)
    hidden = student.cuda().requires_grad_()
    output = sparse_linear_kl(hidden, head.cuda(), targets.to("cuda"), chunk_tokens=10)
    output.loss.backward()
    loss, gradient, *_ = naive_sparse_linear_kl(
        kind, student, head, targets.token_ids_TK, targets.log_probs_TK
    )
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    assert output.loss.item() == pytest.approx(loss.item(), rel=tolerance, abs=1e-4)
    assert ((hidden.grad.double().cpu() - gradient).norm() / gradient.norm()).item() < tolerance
