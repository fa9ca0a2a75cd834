"""Distillation from K entries of the teacher's distribution per token, without the teacher or its head.

With p the teacher, q the student, and `rest` for everything outside the K entries, the value and its gradient
with respect to the student's logits are:

- `top_k`, the K most likely tokens: sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest); q_k - p_k for
  these tokens, q_v (1 - p_rest / q_rest) for the others.
- `sampled`, K draws from p: mean_k log(p_k / q_k); q - counts / K.

`top_k` is the KL once all other tokens are one outcome: a lower bound of the full KL that grows with K and is
equal to it from K = V on. `sampled` (Anshumann et al., "Sparse Logit Sampling", arXiv 2503.16870) estimates
the full KL and its gradient without bias; it may be negative. Where both models are equal, the values and the
gradient of `top_k` vanish up to the fp32 rounding of the stored log-probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regrow.losses.blocks import BlockOptions, Rows, Slope, agreement, row_blocks
from regrow.losses.chunks import LossOutput, Student, check_sizes, chunked_loss, default_chunk_tokens
from regrow.losses.logits import LinearHead, largest_entries, multiply_one, sum_terms
from regrow.losses.scratch import Scratch

Kind = Literal["top_k", "sampled"]
_SUM_ROUNDING = 1e-12  # of fp64 sums over a vocabulary


@dataclass(frozen=True)
class SparseTargets:
    """What is known of the teacher's distribution.

    Attributes:
        token_ids_TK: int32; of `top_k` each once, the most likely first; of `sampled` as drawn.
        log_probs_TK: their log-probabilities in the teacher's whole distribution, fp32.
        kind: how they were chosen.
    """

    token_ids_TK: Tensor  # noqa: N815
    log_probs_TK: Tensor  # noqa: N815
    kind: Kind

    def __getitem__(self, tokens: slice | Tensor) -> "SparseTargets":
        return SparseTargets(self.token_ids_TK[tokens], self.log_probs_TK[tokens], self.kind)

    def to(self, device: torch.device | str) -> "SparseTargets":
        """The targets on a device."""
        return SparseTargets(self.token_ids_TK.to(device), self.log_probs_TK.to(device), self.kind)


@torch.no_grad()
def sparse_targets(
    teacher_hidden_TD: Tensor,
    teacher_head_VD: Tensor,
    *,
    kind: Kind,
    num_entries: int,
    temperature: float = 1.0,
    uniforms_TK: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> SparseTargets:
    """The K entries of the teacher's distribution at each token; logits in fp32, their softmax in fp64.

    Args:
        teacher_hidden_TD: final hidden states, [T, D].
        teacher_head_VD: output embedding, [V, D].
        kind: `"top_k"` or `"sampled"`.
        num_entries: K; of `top_k` there are at most V.
        temperature: divisor of the logits, > 0.
        uniforms_TK: numbers of [0, 1) that decide the draws of `sampled`, fp64.
        teacher_bias: bias [V] of the head.
        teacher_softcap: final soft-capping.
        teacher_scale: factor of the logits.
        chunk_tokens: as in `fused_linear_divergence`.

    Raises:
        ValueError: shapes or arguments that do not fit together.
    """
    num_tokens, vocab_size = teacher_hidden_TD.shape[0], teacher_head_VD.shape[0]
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    check_sizes(temperature, num_entries=num_entries, chunk_tokens=chunk_tokens)
    if kind == "sampled" and (uniforms_TK is None or uniforms_TK.shape != (num_tokens, num_entries)):
        raise ValueError(f"sampled targets need uniform numbers of shape {(num_tokens, num_entries)}")
    device = teacher_hidden_TD.device
    head = LinearHead(teacher_head_VD, teacher_bias, teacher_softcap, teacher_scale)
    scratch = Scratch(device)
    shape = (num_tokens, min(num_entries, vocab_size) if kind == "top_k" else num_entries)
    token_ids_TK = torch.empty(shape, dtype=torch.int32, device=device)
    log_probs_TK = torch.empty(shape, device=device)
    size = chunk_tokens or default_chunk_tokens(teacher_head_VD, num_tokens)
    with torch.autocast(device.type, enabled=False):
        for begin in range(0, num_tokens, size):
            hidden_ND = teacher_hidden_TD[begin : begin + size]
            terms = multiply_one(hidden_ND, head, scratch)
            for rows in row_blocks(hidden_ND.shape[0], vocab_size, device):
                logits_NV = sum_terms(terms, rows, "logits", scratch)
                head.finish(logits_NV, temperature)
                log_probs_NV = torch.log_softmax(logits_NV.double(), -1)
                chunk = slice(begin + rows.start, begin + rows.stop)
                if uniforms_TK is None or kind == "top_k":
                    ids_NK = _most_likely(log_probs_NV, num_entries)
                else:
                    ids_NK = _draw(log_probs_NV, uniforms_TK[chunk].to(device))
                token_ids_TK[chunk] = ids_NK.int()
                log_probs_TK[chunk] = log_probs_NV.gather(1, ids_NK).float()
    return SparseTargets(token_ids_TK, log_probs_TK, kind)


def sparse_linear_kl(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    targets: SparseTargets,
    *,
    temperature: float = 1.0,
    token_weights_T: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    labels_T: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    chunk_tokens: int | None = None,
    return_metrics: bool = False,
) -> LossOutput:
    """KL of the student from what is known of the teacher (see above), averaged over weighted tokens.

    Arguments and result are those of `fused_linear_divergence`, except that the teacher is `targets`, made at
    the same temperature, and products are always `"exact"`. With `return_metrics`, `kl` is the value above.

    Raises:
        ValueError: shapes or arguments that do not fit together, or metrics of `sampled` targets.
    """
    check_sizes(temperature, chunk_tokens=chunk_tokens)
    _check_targets(student_hidden_TD, student_head_VD, targets)
    if return_metrics and targets.kind == "sampled":
        raise ValueError("sampled targets do not hold the teacher's argmax; use top_k for metrics")
    student = Student(student_hidden_TD, student_head_VD, student_bias, student_softcap, student_scale)
    options = BlockOptions(
        divergence=None,
        temperature=temperature,
        label_weight=label_weight,
        ignore_index=ignore_index,
        need_grad=student.need_grad,
        agreement=return_metrics,
    )
    return chunked_loss(
        _SparseWorker(student.head, options),
        student,
        targets,
        token_weights_T=token_weights_T,
        normalizer=normalizer,
        labels_T=labels_T,
        chunk_tokens=chunk_tokens,
    )


class _SparseWorker:
    """Compares with sparse targets, overwriting the rows of the products where these are fp32."""

    def __init__(self, student: LinearHead, options: BlockOptions) -> None:
        self.student, self.options, self.scratch = student, options, Scratch(student.weight.device)
        self._targets: SparseTargets
        self._terms: tuple[Tensor, ...]

    def start(self, student_ND: Tensor, target_N: SparseTargets) -> Tensor:
        self._targets = target_N
        self._terms = multiply_one(student_ND, self.student, self.scratch)
        return self._terms[0]

    def run(self, rows: slice, labels_N: Tensor | None) -> Rows:
        options, targets = self.options, self._targets[rows]
        student_NV = sum_terms(self._terms, rows, "q", self.scratch)
        self.student.finish(student_NV, options.temperature)
        figures: dict[str, Tensor] = {}
        if options.agreement:
            figures |= agreement(student_NV, targets.token_ids_TK[:, 0].long())
        slope = Slope(self.student, options, student_NV)
        if labels_N is not None:
            figures |= slope.labels({"nll_student": student_NV}, labels_N[rows])
        value_N, gradient_NV = KINDS[targets.kind](
            student_NV, targets.token_ids_TK.long(), targets.log_probs_TK.double()
        )
        figures |= {"divergence": value_N, "kl": value_N}
        return Rows(figures, slope.finish(gradient_NV) if options.need_grad else None)


def _top_k_kl(logits_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor) -> tuple[Tensor, Tensor]:
    """KL per token, fp64, and its gradient in place of the student's logits.

    The student's mass outside the K entries is summed there, not 1 minus theirs, so that it is right near 0.
    """
    logits_NK = logits_NV.gather(1, ids_NK).double()
    logits_NV.scatter_(1, ids_NK, torch.finfo(torch.float32).min)
    log_rest_N = _normalise(logits_NV)
    log_partition_N = torch.logaddexp(logits_NK.logsumexp(-1), log_rest_N)
    log_q_NK = logits_NK - log_partition_N[:, None]
    log_q_rest_N = log_rest_N - log_partition_N
    p_NK = log_p_NK.exp()
    p_rest_N = _rest(p_NK, log_p_NK)
    value_N = (p_NK * (log_p_NK - log_q_NK)).sum(-1)
    value_N += torch.xlogy(p_rest_N, p_rest_N) - p_rest_N * log_q_rest_N
    logits_NV.mul_((log_q_rest_N.exp() - p_rest_N)[:, None].float())
    return value_N, logits_NV.scatter_(1, ids_NK, (log_q_NK.exp() - p_NK).float())


def _sampled_kl(logits_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate of the KL per token, fp64, and of its gradient in place of the student's logits."""
    logits_NK = logits_NV.gather(1, ids_NK).double()
    value_N = (log_p_NK - logits_NK).mean(-1) + _normalise(logits_NV)
    share_NK = (0 * log_p_NK - 1 / ids_NK.shape[1]).float()  # NaN stays NaN
    return value_N, logits_NV.scatter_add_(1, ids_NK, share_NK)


KINDS: dict[Kind, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "top_k": _top_k_kl,
    "sampled": _sampled_kl,
}


def _normalise(logits_NV: Tensor) -> Tensor:
    """Turn logits into probabilities, in place; returns the log of the partition function [N], fp64.

    The largest probability of a softmax is exp(0) over its partition function.
    """
    largest_N = logits_NV.amax(-1).double()
    torch.softmax(logits_NV, -1, out=logits_NV)
    return largest_N - logits_NV.amax(-1).double().log()


def _rest(p_NK: Tensor, log_p_NK: Tensor) -> Tensor:
    """The teacher's mass outside the K entries; none where rounding explains it."""
    rest_N = 1 - p_NK.sum(-1)
    rounding_N = -(p_NK * log_p_NK).sum(-1) * torch.finfo(torch.float32).eps + _SUM_ROUNDING
    return torch.where(rest_N <= rounding_N, 0.0, rest_N)


def _most_likely(log_probs_NV: Tensor, num_entries: int) -> Tensor:
    """Columns of the largest values, largest first; of equal ones the first first."""
    ids_NK = largest_entries(log_probs_NV, num_entries).sort(1).values
    order_NK = log_probs_NV.gather(1, ids_NK).argsort(dim=1, descending=True, stable=True)
    return ids_NK.gather(1, order_NK)


def _draw(log_probs_NV: Tensor, uniforms_NK: Tensor) -> Tensor:
    """Columns by inverting the distribution function."""
    cumulative_NV = log_probs_NV.exp().cumsum_(-1)
    targets_NK = uniforms_NK.double() * cumulative_NV[:, -1:]
    last = log_probs_NV.shape[1] - 1
    return torch.searchsorted(cumulative_NV, targets_NK, right=True).clamp_(max=last)


def _check_targets(student_TD: Tensor, head_VD: Tensor, targets: SparseTargets) -> None:
    if student_TD.dim() != 2 or head_VD.dim() != 2 or student_TD.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"the student's head is {tuple(head_VD.shape)} and its hidden states {tuple(student_TD.shape)}; "
            "they must be [vocabulary, hidden] and [tokens, hidden]"
        )
    ids, log_probs = targets.token_ids_TK, targets.log_probs_TK
    if ids.dim() != 2 or ids.shape != log_probs.shape or ids.shape[0] != student_TD.shape[0]:
        raise ValueError(
            f"the targets are {tuple(ids.shape)} ids and {tuple(log_probs.shape)} log-probabilities for "
            f"{student_TD.shape[0]} tokens; both must be [tokens, entries]"
        )
