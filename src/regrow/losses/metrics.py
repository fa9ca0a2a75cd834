"""Per-token comparison of two models over the full vocabulary, without gradients, for evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.losses.fused import _agreement, default_chunk_tokens
from regrow.losses.logits import LinearHead, finish_logits, product_into


@dataclass(frozen=True)
class TokenMetrics:
    """One value per token [T]; nats.

    Attributes:
        kl: forward KL(teacher, student), fp32.
        top1: both argmaxes are equal (bool).
        top5: the teacher's argmax is among the student's five best (bool).
        entropy_student, entropy_teacher: entropies, fp32.
        nll_student, nll_teacher: -log p(label), fp32, NaN where the label is ignored; None without labels.
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
) -> TokenMetrics:
    """Compare student and teacher token by token; memory as in `fused_linear_divergence`.

    Args are those of `fused_linear_divergence`; `labels_T` are the ids that actually follow.
    """
    student = LinearHead(student_head_VD, student_bias, student_softcap, student_scale)
    teacher = LinearHead(teacher_head_VD, teacher_bias, teacher_softcap, teacher_scale)
    size = chunk_tokens or default_chunk_tokens(student_head_VD)
    columns: list[list[Tensor]] = [[] for _ in range(7)]
    for begin in range(0, student_hidden_TD.shape[0], size):
        rows = slice(begin, begin + size)
        student_NV = _log_probs(student_hidden_TD[rows], student)
        teacher_NV = _log_probs(teacher_hidden_TD[rows], teacher)
        top1_N, top5_N = _agreement(student_NV, teacher_NV)
        values = [top1_N.bool(), top5_N.bool()]
        if labels_T is not None:
            labels_N = labels_T[rows]
            has_label = labels_N != ignore_index
            index = torch.where(has_label, labels_N, 0)[:, None]
            for log_NV in (student_NV, teacher_NV):
                values.append(torch.where(has_label, -log_NV.gather(1, index)[:, 0], torch.nan))
        else:
            values += [top1_N, top1_N]
        teacher_p = teacher_NV.exp()
        values.append(-torch.linalg.vecdot(teacher_p, teacher_NV))
        values.append(torch.linalg.vecdot(teacher_p, teacher_NV.sub_(student_NV)))
        values.append(-torch.linalg.vecdot(student_NV.exp(), student_NV))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    empty = student_hidden_TD.new_zeros(0, dtype=torch.float32)
    top1, top5, nll_s, nll_t, entropy_t, kl, entropy_s = (
        torch.cat(column) if column else empty for column in columns
    )
    with_labels = labels_T is not None
    return TokenMetrics(
        kl=kl,
        top1=top1.bool(),
        top5=top5.bool(),
        entropy_student=entropy_s,
        entropy_teacher=entropy_t,
        nll_student=nll_s if with_labels else None,
        nll_teacher=nll_t if with_labels else None,
    )


def _log_probs(hidden_ND: Tensor, head: LinearHead) -> Tensor:
    product_NV = torch.empty(hidden_ND.shape[0], head.weight_VD.shape[0], device=hidden_ND.device)
    product_into(product_NV, hidden_ND, head.weight_VD)
    return finish_logits(product_NV, head, 1.0).log_softmax(-1)
