"""From products with the heads to the divergence, its gradient and per-token figures, a few rows at a time.

Rows are handled in blocks whose fp32 buffers stay in the processor's cache, so that the passes over the
vocabulary cost little beside the matrix products.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.losses.divergences import DIVERGENCES, Block
from regrow.losses.logits import LinearHead, Products, largest_entries, recompute
from regrow.losses.scratch import Scratch

_CACHE_BLOCK_BYTES = 2 * 2**20
_NUM_LARGEST = 16  # logits of the teacher that are refined


@dataclass(frozen=True)
class BlockOptions:
    """What is computed of each token.

    Attributes:
        divergence: key of `DIVERGENCES`, or None for the figures alone.
        beta: mixture weight of `jsd` and `skewed_kl`.
        temperature: divisor of both models' logits.
        label_weight: weight of the cross-entropy in the gradient.
        ignore_index: label that stands for none.
        need_grad: form the gradient.
        agreement: find top-1 and top-5 agreement and the forward KL.
        entropies: find both entropies and, with labels, the teacher's negative log-likelihood too.
    """

    divergence: str | None
    beta: float = 0.5
    temperature: float = 1.0
    label_weight: float = 0.0
    ignore_index: int = -100
    need_grad: bool = False
    agreement: bool = False
    entropies: bool = False


@dataclass
class Rows:
    """Per-token results of a block, and the gradient with respect to W h + bias over scale / temperature."""

    figures: dict[str, Tensor]
    gradient: Tensor | None


def row_blocks(num_tokens: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Rows whose fp32 logits fit a share of the cache; all at once on a GPU."""
    size = max(1, _CACHE_BLOCK_BYTES // (4 * vocab_size)) if device.type == "cpu" else num_tokens
    for begin in range(0, num_tokens, size):
        yield slice(begin, min(begin + size, num_tokens))


class BlockWorker:
    """Computes a block's results, overwriting the rows of the products where these are fp32."""

    def __init__(
        self, student: LinearHead, teacher: LinearHead, options: BlockOptions, scratch: Scratch
    ) -> None:
        self._student, self._teacher, self._options, self._scratch = student, teacher, options, scratch

    def run(self, products: Products, rows: slice, teacher_ND: Tensor, labels_N: Tensor | None) -> Rows:
        """Results for `rows` of the products; `teacher_ND` and `labels_N` are the whole chunk's."""
        options, student = self._options, self._student
        teacher_NV, student_NV, difference_NV, top_NK = self._logits(products, rows, teacher_ND)
        figures: dict[str, Tensor] = {}
        if options.agreement:
            figures["top1_agreement"], figures["top5_agreement"] = agreement(student_NV, teacher_NV, top_NK)
        kept_NV = student_NV.clone() if options.need_grad and student.softcap is not None else None
        label_grad_NV = None
        if labels_N is not None:
            label_grad_NV = self._labels(student_NV, teacher_NV, labels_N[rows], figures)

        block = _normalise(teacher_NV, student_NV, difference_NV, top_NK)
        if options.entropies:
            figures |= {"entropy_student": entropy(student_NV), "entropy_teacher": entropy(teacher_NV)}
        if options.agreement and options.divergence != "forward_kl":
            figures["kl"] = block.kl()
        gradient_NV = None
        if options.divergence is not None:
            divergence = DIVERGENCES[options.divergence]
            figures["divergence"], gradient_NV = divergence(block, options.beta, options.need_grad)
        if options.divergence == "forward_kl":
            figures["kl"] = figures["divergence"]
        if gradient_NV is not None:
            if label_grad_NV is not None:
                gradient_NV.add_(label_grad_NV)
            if kept_NV is not None:
                student.backward_softcap(gradient_NV, kept_NV, options.temperature)
        return Rows(figures, gradient_NV)

    def _logits(
        self, products: Products, rows: slice, teacher_ND: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """fp32 logits of teacher and student, student minus teacher, and the teacher's largest columns."""
        student, teacher, temperature = self._student, self._teacher, self._options.temperature
        teacher_NV = self._sum("p", products.teacher, rows)
        top_NK = largest_entries(teacher_NV, _NUM_LARGEST)
        if products.refine:
            recompute(teacher_NV, top_NK, teacher_ND[rows], teacher.weight)
        if products.is_difference:
            difference_NV = self._sum("difference", products.student, rows)
            student_NV = self._scratch.take("q", teacher_NV.shape, torch.float32)
            torch.add(teacher_NV, difference_NV, out=student_NV)
            if _is_unchanged(student, temperature) and _is_unchanged(teacher, temperature):
                return teacher_NV, student_NV, difference_NV, top_NK
        else:
            student_NV = self._sum("q", products.student, rows)
            difference_NV = self._scratch.take("difference", teacher_NV.shape, torch.float32)
        student.finish(student_NV, temperature)
        teacher.finish(teacher_NV, temperature)
        torch.sub(student_NV, teacher_NV, out=difference_NV)
        if teacher.bias is not None or teacher.scale < 0:  # nothing else moves the order
            top_NK = largest_entries(teacher_NV, _NUM_LARGEST)
        return teacher_NV, student_NV, difference_NV, top_NK

    def _sum(self, name: str, terms: tuple[Tensor, ...], rows: slice) -> Tensor:
        """fp32 sum of the terms' rows; takes the place of the first term where that is fp32."""
        total_NV = terms[0][rows]
        if total_NV.dtype != torch.float32:
            total_NV = self._scratch.take(name, total_NV.shape, torch.float32).copy_(total_NV)
        for term_NV in terms[1:]:
            spare_NV = self._scratch.take("spare", total_NV.shape, torch.float32)
            total_NV.add_(spare_NV.copy_(term_NV[rows]))
        return total_NV

    def _labels(
        self, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, figures: dict[str, Tensor]
    ) -> Tensor | None:
        """Negative log-likelihoods at temperature 1 (NaN without a label) and the student's gradient."""
        options = self._options
        has_label = labels_N != options.ignore_index
        figures["has_label"] = has_label
        index_N1 = torch.where(has_label, labels_N, 0)[:, None]
        sides = {"nll_student": student_NV}
        if options.entropies:
            sides["nll_teacher"] = teacher_NV
        for name, logits_NV in sides.items():
            logits_NV = logits_NV if options.temperature == 1.0 else logits_NV * options.temperature
            nll_N = logits_NV.logsumexp(-1) - logits_NV.gather(1, index_N1)[:, 0]
            figures[name] = torch.where(has_label, nll_N, torch.nan)
        if not options.need_grad:
            return None
        # d nll / d (logits / temperature) is the temperature times softmax minus one-hot.
        slope_N1 = (has_label * options.label_weight * options.temperature)[:, None]
        gradient_NV = torch.softmax(student_NV * options.temperature, -1).mul_(slope_N1)
        return gradient_NV.scatter_add_(1, index_N1, -slope_N1.to(gradient_NV.dtype))


def agreement(student_NV: Tensor, teacher_NV: Tensor, top_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Per token: are the argmaxes equal; is the teacher's argmax among the student's five largest logits."""
    teacher_best_N = _best(teacher_NV, top_NK)
    five_N5 = largest_entries(student_NV, 5)
    return _best(student_NV, five_N5) == teacher_best_N, (five_N5 == teacher_best_N[:, None]).any(1)


def entropy(probabilities_NV: Tensor) -> Tensor:
    """Entropy of each row, in nats."""
    return torch.special.entr(probabilities_NV).sum(-1)


def _normalise(teacher_NV: Tensor, student_NV: Tensor, difference_NV: Tensor, top_NK: Tensor) -> Block:
    """Turn logits into probabilities, in place.

    The largest probability of a softmax is exp(0) over its partition function, so that both partition
    functions' ratio comes from the largest logits and probabilities. The teacher's are among `top_NK`.
    """
    shift_N = student_NV.amax(-1) - teacher_NV.gather(1, top_NK).amax(-1)
    torch.softmax(teacher_NV, -1, out=teacher_NV)
    torch.softmax(student_NV, -1, out=student_NV)
    shift_N += torch.log(teacher_NV.gather(1, top_NK).amax(-1) / student_NV.amax(-1))
    return Block(teacher_NV, student_NV, difference_NV, shift_N)


def _best(values_NV: Tensor, candidates_NK: Tensor) -> Tensor:
    """Column of each row's largest value; the first one of equals, so that equal models agree."""
    values_NK = values_NV.gather(1, candidates_NK)
    is_best_NK = values_NK == values_NK.amax(1, keepdim=True)
    return torch.where(is_best_NK, candidates_NK, values_NV.shape[1]).amin(1)


def _is_unchanged(head: LinearHead, temperature: float) -> bool:
    return head.bias is None and head.softcap is None and head.slope(temperature) == 1.0
