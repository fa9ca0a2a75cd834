"""Per-token comparison of two models over the full vocabulary, without gradients, for evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.losses.blocks import BlockOptions, DenseWorker, row_blocks
from regrow.losses.chunks import default_chunk_tokens
from regrow.losses.fused import check_shapes
from regrow.losses.logits import LinearHead


@dataclass(frozen=True)
class TokenMetrics:
    """One value per token [T]; divergences and entropies in nats, fp32.

    Attributes:
        kl: forward KL(teacher, student).
        top1: whether both argmaxes are equal.
        top5: whether the teacher's argmax is among the student's five best.
        entropy_student: entropy of the student's distribution.
        entropy_teacher: that of the teacher's.
        nll_student: -log p(label), NaN where the label is ignored; None without labels.
        nll_teacher: the same of the teacher.
    """

    kl: Tensor
    top1: Tensor
    top5: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    nll_student: Tensor | None
    nll_teacher: Tensor | None


@torch.no_grad()
def divergence_metrics(
    student_hidden_TD: Tensor,
    teacher_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_head_VD: Tensor,
    *,
    labels_T: Tensor | None = None,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    chunk_tokens: int | None = None,
    precision: str = "exact",
) -> TokenMetrics:
    """Compare student and teacher token by token, at temperature 1, without holding [tokens, vocabulary].

    Arguments are those of `fused_linear_divergence`; `labels_T` are the ids that actually follow. The default
    precision is `exact`, since ranks and likelihoods of the teacher need its logits, not only differences.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_shapes(student_hidden_TD, teacher_hidden_TD, student_head_VD, teacher_head_VD)
    student = LinearHead(student_head_VD, student_bias, student_softcap, student_scale)
    teacher = LinearHead(teacher_head_VD, teacher_bias, teacher_softcap, teacher_scale)
    options = BlockOptions(divergence=None, ignore_index=ignore_index, agreement=True, entropies=True)
    worker = DenseWorker(student, teacher, options, exact=precision == "exact")
    num_tokens, vocab_size = student_hidden_TD.shape[0], student_head_VD.shape[0]
    device = student_hidden_TD.device
    names = ["kl", "top1_agreement", "top5_agreement", "entropy_student", "entropy_teacher"]
    names += [] if labels_T is None else ["nll_student", "nll_teacher"]
    columns = {name: torch.empty(num_tokens, device=device) for name in names}
    size = chunk_tokens or default_chunk_tokens(student_head_VD, num_tokens)
    with torch.autocast(device.type, enabled=False):
        for begin in range(0, num_tokens, size):
            chunk = slice(begin, begin + size)
            student_ND = student_hidden_TD[chunk]
            labels_N = None if labels_T is None else labels_T[chunk]
            worker.start(student_ND, teacher_hidden_TD[chunk])
            for rows in row_blocks(student_ND.shape[0], vocab_size, device):
                figures = worker.run(rows, labels_N).figures
                for name in names:
                    columns[name][begin + rows.start : begin + rows.stop] = figures[name]
    return TokenMetrics(
        kl=columns["kl"],
        top1=columns["top1_agreement"].bool(),
        top5=columns["top5_agreement"].bool(),
        entropy_student=columns["entropy_student"],
        entropy_teacher=columns["entropy_teacher"],
        nll_student=columns.get("nll_student"),
        nll_teacher=columns.get("nll_teacher"),
    )
