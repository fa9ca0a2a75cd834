"""From products with the heads to the divergence, its gradient and per-token figures, a few rows at a time.

Rows are handled in blocks whose fp32 buffers stay in the processor's cache, so that the passes over the
vocabulary cost little beside the matrix products.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from regrow.losses.divergences import DIVERGENCES, Block
from regrow.losses.logits import LinearHead, Products, largest_entries, multiply, recompute, sum_terms
from regrow.losses.scratch import Scratch

_CACHE_BLOCK_BYTES = 2 * 2**20
_NUM_LARGEST = 16  # logits of the teacher that are refined


@dataclass(frozen=True)
class BlockOptions:
    """What is computed of each token.

    Attributes:
        divergence: key of `DIVERGENCES`; None for the figures alone, or where the targets' kind says it.
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


class Worker(Protocol):
    """Compares the student with what it learns from: forms a chunk's products, then handles a few rows."""

    student: LinearHead
    options: BlockOptions
    scratch: Scratch

    def start(self, student_ND: Tensor, target_N: Any) -> Tensor:
        """Form the chunk's products; returns one [N, V] whose rows are spent once they have been run."""

    def run(self, rows: slice, labels_N: Tensor | None) -> Rows:
        """Results for `rows` of the chunk; `labels_N` are the whole chunk's."""


class DenseWorker:
    """Compares with a teacher's hidden states, overwriting the rows of the products where these are fp32.

    Args:
        student, teacher: both output layers.
        options: what is computed.
        exact, chunk_vocab: as `multiply` takes them.
    """

    def __init__(
        self,
        student: LinearHead,
        teacher: LinearHead,
        options: BlockOptions,
        *,
        exact: bool,
        chunk_vocab: int | None = None,
    ) -> None:
        self.student, self.options, self.scratch = student, options, Scratch(student.weight.device)
        self._teacher, self._exact, self._chunk_vocab = teacher, exact, chunk_vocab
        self._teacher_ND: Tensor
        self._products: Products

    def start(self, student_ND: Tensor, target_N: Tensor) -> Tensor:
        """Multiply; `target_N` are the teacher's hidden states [N, D]."""
        self._teacher_ND = target_N
        self._products = multiply(
            student_ND,
            target_N,
            self.student,
            self._teacher,
            exact=self._exact,
            scratch=self.scratch,
            chunk_vocab=self._chunk_vocab,
        )
        return self._products.teacher[0]

    def run(self, rows: slice, labels_N: Tensor | None) -> Rows:
        """Results for `rows` of the chunk; `labels_N` are the whole chunk's."""
        options = self.options
        teacher_NV, student_NV, difference_NV, top_NK = self._logits(rows)
        figures: dict[str, Tensor] = {}
        if options.agreement:
            figures |= agreement(student_NV, best_column(teacher_NV, top_NK))
        slope = Slope(self.student, options, student_NV)
        if labels_N is not None:
            sides = {"nll_teacher": teacher_NV} if options.entropies else {}
            figures |= slope.labels({"nll_student": student_NV, **sides}, labels_N[rows])

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
        return Rows(figures, slope.finish(gradient_NV))

    def _logits(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """fp32 logits of teacher and student, student minus teacher, and the teacher's largest columns."""
        student, teacher, temperature = self.student, self._teacher, self.options.temperature
        products, scratch = self._products, self.scratch
        teacher_NV = sum_terms(products.teacher, rows, "p", scratch)
        top_NK = largest_entries(teacher_NV, _NUM_LARGEST)
        if products.refine:
            recompute(teacher_NV, top_NK, self._teacher_ND[rows], teacher.weight)
        if products.is_difference:
            difference_NV = sum_terms(products.student, rows, "difference", scratch)
            student_NV = scratch.take("q", teacher_NV.shape, torch.float32)
            torch.add(teacher_NV, difference_NV, out=student_NV)
            if _is_unchanged(student, temperature) and _is_unchanged(teacher, temperature):
                return teacher_NV, student_NV, difference_NV, top_NK
        else:
            student_NV = sum_terms(products.student, rows, "q", scratch)
            difference_NV = scratch.take("difference", teacher_NV.shape, torch.float32)
        student.finish(student_NV, temperature)
        teacher.finish(teacher_NV, temperature)
        torch.sub(student_NV, teacher_NV, out=difference_NV)
        if teacher.bias is not None or teacher.scale < 0:  # nothing else moves the order
            top_NK = largest_entries(teacher_NV, _NUM_LARGEST)
        return teacher_NV, student_NV, difference_NV, top_NK


class Slope:
    """What a block's gradient needs of the student's logits besides the divergence, before these are spent.

    Args:
        student: the output layer.
        options: what is computed.
        student_NV: the student's logits / temperature.
    """

    def __init__(self, student: LinearHead, options: BlockOptions, student_NV: Tensor) -> None:
        self._student, self._options = student, options
        self._kept_NV = student_NV.clone() if options.need_grad and student.softcap is not None else None
        self._label_NV: Tensor | None = None

    def labels(self, sides: dict[str, Tensor], labels_N: Tensor) -> dict[str, Tensor]:
        """Negative log-likelihoods at temperature 1, NaN without a label, and whether there is one.

        `sides` are logits / temperature by the name of their figure, the student's as `nll_student`.
        """
        options = self._options
        has_label = labels_N != options.ignore_index
        figures = {"has_label": has_label}
        index_N1 = torch.where(has_label, labels_N, 0)[:, None]
        for name, logits_NV in sides.items():
            logits_NV = logits_NV if options.temperature == 1.0 else logits_NV * options.temperature
            nll_N = logits_NV.logsumexp(-1) - logits_NV.gather(1, index_N1)[:, 0]
            figures[name] = torch.where(has_label, nll_N, torch.nan)
        if options.need_grad:
            # d nll / d (logits / temperature) is the temperature times softmax minus one-hot.
            slope_N1 = (has_label * options.label_weight * options.temperature)[:, None]
            label_NV = torch.softmax(sides["nll_student"] * options.temperature, -1).mul_(slope_N1)
            self._label_NV = label_NV.scatter_add_(1, index_N1, -slope_N1.to(label_NV.dtype))
        return figures

    def finish(self, gradient_NV: Tensor | None) -> Tensor | None:
        """Add the labels' gradient and pass the soft-capping, in place."""
        if gradient_NV is not None:
            if self._label_NV is not None:
                gradient_NV.add_(self._label_NV)
            if self._kept_NV is not None:
                self._student.backward_softcap(gradient_NV, self._kept_NV, self._options.temperature)
        return gradient_NV


def agreement(student_NV: Tensor, teacher_best_N: Tensor) -> dict[str, Tensor]:
    """Per token: are the argmaxes equal; is the teacher's argmax among the student's five largest logits."""
    five_N5 = largest_entries(student_NV, 5)
    return {
        "top1_agreement": best_column(student_NV, five_N5) == teacher_best_N,
        "top5_agreement": (five_N5 == teacher_best_N[:, None]).any(1),
    }


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


def best_column(values_NV: Tensor, candidates_NK: Tensor) -> Tensor:
    """Column of each row's largest candidate; the first one of equals, so that equal models agree."""
    values_NK = values_NV.gather(1, candidates_NK)
    is_best_NK = values_NK == values_NK.amax(1, keepdim=True)
    return torch.where(is_best_NK, candidates_NK, values_NV.shape[1]).amin(1)


def _is_unchanged(head: LinearHead, temperature: float) -> bool:
    return head.bias is None and head.softcap is None and head.slope(temperature) == 1.0
