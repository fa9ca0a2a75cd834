"""No tensor of [tokens, vocabulary] is ever made, and what is made does not grow with the tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regrow.losses import LOSSES, divergence_metrics, sparse_linear_kl, sparse_targets


class LargestTensor(TorchDispatchMode):
    """Records the largest storage, in bytes, that any operation returns."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


def largest_of_loss(name, num_tokens, vocab_size, dtype, **kwargs):
    torch.manual_seed(0)
    head = torch.randn(vocab_size, 4).to(dtype)
    teacher = torch.randn(num_tokens, 4).to(dtype)
    student = torch.randn(num_tokens, 4).to(dtype).requires_grad_()
    with LargestTensor() as largest:
        LOSSES[name](student, teacher, head, head, **kwargs).loss.backward()
    return largest.nbytes


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["exact", "bf16_products"])
def test_nothing_is_as_large_as_tokens_by_vocabulary(name, dtype, precision):
    options = {"precision": precision, "return_metrics": True, "chunk_tokens": 16}
    nbytes = largest_of_loss(name, 256, 6000, dtype, **options)
    assert nbytes <= 2 * 16 * 6000 * 4  # both products of a chunk
    assert nbytes < 256 * 6000 * dtype.itemsize


def test_default_chunks_do_not_grow_with_the_tokens():
    few, many = (largest_of_loss("forward_kl", tokens, 50_000, torch.bfloat16) for tokens in (512, 2048))
    assert many <= few <= 2 * 256 * 50_000 * 2


def test_labels_and_soft_capping_keep_the_bound():
    labels = torch.randint(0, 6000, (256,))
    options = {"labels_T": labels, "label_weight": 1.0, "student_softcap": 5.0, "temperature": 2.0}
    nbytes = largest_of_loss("jsd", 256, 6000, torch.bfloat16, chunk_tokens=16, **options)
    assert nbytes <= 2 * 16 * 6000 * 4


def test_the_recorder_sees_a_naive_loss():
    with LargestTensor() as largest:
        torch.randn(256, 4) @ torch.randn(4, 6000)
    assert largest.nbytes == 256 * 6000 * 4


def test_divergence_metrics_keep_the_bound():
    torch.manual_seed(0)
    head = torch.randn(6000, 4).bfloat16()
    student, teacher = torch.randn(256, 4).bfloat16(), torch.randn(256, 4).bfloat16()
    with LargestTensor() as largest:
        divergence_metrics(
            student, teacher, head, head, labels_T=torch.zeros(256, dtype=torch.long), chunk_tokens=16
        )
    assert largest.nbytes <= 2 * 16 * 6000 * 4


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_sparse_targets_and_their_loss_keep_the_bound(kind):
    torch.manual_seed(0)
    head = torch.randn(6000, 4).bfloat16()
    teacher, student = torch.randn(256, 4).bfloat16(), torch.randn(256, 4).bfloat16().requires_grad_()
    uniforms = torch.rand(256, 8, dtype=torch.float64)
    with LargestTensor() as largest:
        targets = sparse_targets(
            teacher, head, kind=kind, num_entries=8, uniforms_TK=uniforms, chunk_tokens=16
        )
        sparse_linear_kl(student, head, targets, chunk_tokens=16, student_softcap=5.0).loss.backward()
    assert largest.nbytes <= 2 * 2**21  # a row block of logits in fp64
