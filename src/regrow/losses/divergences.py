"""Divergences of student from teacher and their gradients, on a block of tokens over the whole vocabulary.

Every function takes a `Block`, whose buffers it may overwrite, and returns the divergence per token [N] and,
if asked, its gradient with respect to the student's logits [N, V]. Both are exactly zero where both models'
logits are equal. With p the teacher, q the student, d = log p - log q and m = beta p + (1 - beta) q:

| name       | value                         | gradient                                   | source           |
| ---------- | ----------------------------- | ------------------------------------------ | ---------------- |
| forward KL | E_p[d]                        | q - p                                      | arXiv 1503.02531 |
| reverse KL | -E_q[d]                       | q (E_q[d] - d)                             | arXiv 2306.08543 |
| JSD(beta)  | beta KL(p,m) + (1-beta) KL(q,m) | q (a - E_q[a]), a = (1-beta) log(q / m)  | arXiv 2306.13649 |
| skewed KL  | KL(p,m)                       | q (a - E_q[a]), a = (1-beta) (1 - p / m)   | arXiv 2402.03898 |

d is never formed by subtracting log-probabilities: near 10 nats their fp32 spacing is 1e-6, a percent of a KL
of 1e-4. It is shift - difference, with the difference of the logits known before any normalisation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(80) is finite in fp32; beyond it log(m / q) is d + log(beta), and q is too small for that to matter.
_MAX_RATIO = 80.0


@dataclass
class Block:
    """Both models on a few tokens.

    Attributes:
        teacher: fp32 probabilities p, [N, V].
        student: fp32 probabilities q, [N, V].
        difference: fp32 logits of the student minus those of the teacher, [N, V].
        shift: log of the student's partition function minus that of the teacher, [N], so
            that d = shift - difference.
    """

    teacher: Tensor
    student: Tensor
    difference: Tensor
    shift: Tensor

    def excess(self) -> Tensor:
        """Sum of q - p per token: 0 but for fp32 rounding of the partition functions.

        Added to a KL it cancels that rounding, which enters `shift` with the opposite sign.
        """
        return (self.student - self.teacher).sum(-1)

    def kl(self) -> Tensor:
        """KL(teacher, student) per token; overwrites nothing."""
        return self.shift - row_dot(self.teacher, self.difference) + self.excess()


Divergence = Callable[[Block, float, bool], tuple[Tensor, Tensor | None]]


def forward_kl(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(teacher, student); `beta` is not used."""
    mean_N = block.difference.mul_(block.teacher).sum(-1)
    excess_NV = block.student.sub_(block.teacher)
    return block.shift - mean_N + excess_NV.sum(-1), excess_NV if need_grad else None


def reverse_kl(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(student, teacher); `beta` is not used."""
    mean_N = row_dot(block.student, block.difference)
    value_N = mean_N - block.shift - block.excess()
    if not need_grad:
        return value_N, None
    return value_N, block.difference.sub_(mean_N[:, None]).mul_(block.student)


def jsd(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Generalised Jensen-Shannon divergence, beta KL(p, m) + (1 - beta) KL(q, m)."""
    ratio_NV, log_mixture_NV = _log_mixture_over_student(block, beta)
    student_N = row_dot(block.student, log_mixture_NV)  # -KL(q, m)
    teacher_N = row_dot(block.teacher, ratio_NV.sub_(log_mixture_NV))
    value_N = beta * teacher_N - (1 - beta) * student_N
    if not need_grad:
        return value_N, None
    slope_NV = log_mixture_NV.sub_(student_N[:, None]).mul_(beta - 1)
    return value_N, slope_NV.mul_(block.student)


def skewed_kl(block: Block, beta: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p, beta p + (1 - beta) q)."""
    ratio_NV, log_mixture_NV = _log_mixture_over_student(block, beta)
    log_ratio_NV = ratio_NV.sub_(log_mixture_NV)  # log p - log m
    value_N = row_dot(block.teacher, log_ratio_NV) + (1 - beta) * block.excess()
    if not need_grad:
        return value_N, None
    slope_NV = log_ratio_NV.expm1_().mul_(beta - 1)
    mean_N = row_dot(block.student, slope_NV)
    return value_N, slope_NV.sub_(mean_N[:, None]).mul_(block.student)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
}


def row_dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    """Inner product of each pair of rows, [N]."""
    return torch.linalg.vecdot(left_NV, right_NV)


def _log_mixture_over_student(block: Block, beta: float) -> tuple[Tensor, Tensor]:
    """d (bounded above; overwrites the difference) and log(m / q) = log1p(beta expm1(d))."""
    ratio_NV = block.difference.neg_().add_(block.shift[:, None]).clamp_(max=_MAX_RATIO)
    return ratio_NV, torch.expm1(ratio_NV).mul_(beta).log1p_()
