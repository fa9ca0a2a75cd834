"""Divergences of student from teacher and their gradients, on a block of fp32 logits.

Every function takes a `Block` (fp32 log-probabilities of both models for a few tokens over the whole
vocabulary) and returns the divergence per token [N] and, if asked, its gradient with respect to the student's
logits [N, V].
Each is exactly zero, value and gradient, where the two models' log-probabilities are equal.

With p the teacher, q the student, d = log p - log q and m = beta p + (1 - beta) q:

| name | value | gradient | source |
| --- | --- | --- | --- |
| forward KL | E_p[d] | q - p | Hinton et al. 2015, arXiv 1503.02531 |
| reverse KL | -E_q[d] | q (-d - E_q[-d]) | Gu et al. 2023, arXiv 2306.08543 |
| JSD(beta) | beta KL(p, m) + (1 - beta) KL(q, m) | q (a - E_q[a]), a = (1 - beta) log(q / m) | arXiv 2306.13649 |
| skewed KL | KL(p, m) | q (a - E_q[a]), a = (1 - beta) (1 - p / m) | DistiLLM, arXiv 2402.03898 |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(80) is finite in fp32; beyond it log(m / q) is d + log(beta), and q is too small for that to matter.
_MAX_RATIO = 80.0


@dataclass
class Block:
    """Log-probabilities of a block of tokens; the divergence may overwrite both.

    Attributes:
        student_NV, teacher_NV: fp32 log-probabilities.
    """

    student_NV: Tensor
    teacher_NV: Tensor


Divergence = Callable[[Block, float, bool], tuple[Tensor, Tensor | None]]


def forward_kl(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(teacher, student); `beta` is not used."""
    difference = block.teacher_NV - block.student_NV
    teacher = block.teacher_NV.exp_()
    value_N = _dot(teacher, difference)
    if not need_grad:
        return value_N, None
    return value_N, block.student_NV.exp_().sub_(teacher)


def reverse_kl(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(student, teacher); `beta` is not used."""
    difference = block.teacher_NV.neg_().add_(block.student_NV)
    student = block.student_NV.exp_()
    value_N = _dot(student, difference)
    if not need_grad:
        return value_N, None
    return value_N, difference.sub_(value_N[:, None]).mul_(student)


def jsd(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Generalised Jensen-Shannon divergence, beta KL(p, m) + (1 - beta) KL(q, m)."""
    ratio, log_mixture = _log_mixture_over_student(block, beta)
    teacher, student = block.teacher_NV.exp_(), block.student_NV.exp_()
    from_student_N = -_dot(student, log_mixture)
    value_N = beta * _dot(teacher, ratio.sub_(log_mixture)) + (1 - beta) * from_student_N
    if not need_grad:
        return value_N, None
    gradient = log_mixture.neg_().sub_(from_student_N[:, None]).mul_(student).mul_(1 - beta)
    return value_N, gradient


def skewed_kl(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p, beta p + (1 - beta) q)."""
    ratio, log_mixture = _log_mixture_over_student(block, beta)
    log_ratio = ratio.sub_(log_mixture)  # log p - log m
    value_N = _dot(block.teacher_NV.exp_(), log_ratio)
    if not need_grad:
        return value_N, None
    student = block.student_NV.exp_()
    slope = log_ratio.expm1_().mul_(beta - 1)
    return value_N, slope.sub_(_dot(student, slope)[:, None]).mul_(student)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
}


def _log_mixture_over_student(block: Block, beta: float) -> tuple[Tensor, Tensor]:
    """d = log p - log q (bounded above) and log(m / q) = log1p(beta expm1(d))."""
    ratio = (block.teacher_NV - block.student_NV).clamp_(max=_MAX_RATIO)
    return ratio, torch.expm1(ratio).mul_(beta).log1p_()


def _dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    """Row-wise inner products [N], without a temporary of [N, V]."""
    return torch.linalg.vecdot(left_NV, right_NV)
