"""The loop over chunks of tokens that every loss shares; no [tokens, vocabulary] is ever held.

Each chunk's products with the head are formed, then the loss and its gradient with respect to the logits, a
few rows at a time, and at once that gradient's product with the head; only the resulting [T, D] outlives the
chunk.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.losses.blocks import Worker, row_blocks
from regrow.losses.logits import LinearHead, gradient_dtype, multiply_back

_CPU_LEAST_BYTES, _CPU_MOST_BYTES = 16 * 2**20, 128 * 2**20
_GPU_CHUNK_BYTES = 192 * 2**20  # of one [N, V] fp32 buffer; three to four are held


@dataclass
class LossOutput:
    """A loss and what the same forward pass measured.

    Attributes:
        loss: fp32 scalar, differentiable with respect to the student's hidden states (and head and bias,
            where they require a gradient).
        metrics: detached fp32 scalars, *sums* over the tokens of non-zero weight: `num_tokens`, `weight` (sum
            of token weights), with labels `label_nll` and `num_labels`, and with `return_metrics`
            `top1_agreement` (both argmaxes equal), `top5_agreement` (the teacher's argmax is among the
            student's five best) and `kl` (forward KL, unweighted). Divide by `num_tokens` for means.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Student:
    """The side that gradients flow to; head and bias may require them.

    Attributes:
        hidden_TD: final hidden states.
        head_VD: output embedding.
        bias_V: bias of the head, or None.
        softcap: final soft-capping, or None.
        scale: factor of the logits.
    """

    hidden_TD: Tensor  # noqa: N815
    head_VD: Tensor  # noqa: N815
    bias_V: Tensor | None  # noqa: N815
    softcap: float | None
    scale: float

    @property
    def need_grad(self) -> bool:
        """Whether anything asks for a gradient."""
        tensors = (self.hidden_TD, self.head_VD, self.bias_V)
        wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
        return torch.is_grad_enabled() and wanted

    @property
    def head(self) -> LinearHead:
        """The output layer, without gradient."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return LinearHead(self.head_VD.detach(), bias_V, self.softcap, self.scale)


def chunked_loss(
    worker: Worker,
    student: Student,
    target_T: Any,
    *,
    token_weights_T: Tensor | None,
    normalizer: float | Tensor | None,
    labels_T: Tensor | None,
    chunk_tokens: int | None,
) -> LossOutput:
    """sum_t w_t (divergence_t + label_weight * nll_t) / normalizer of the student's tokens.

    Args:
        worker: compares a chunk of the student's tokens with a chunk of the target.
        student: hidden states and output layer.
        target_T: what the worker takes, indexed by token.
        token_weights_T: weights [T]; tokens of weight zero are removed before anything is computed.
        normalizer: what the weighted sum is divided by; None is the sum of weights.
        labels_T: token ids [T], read where the worker's `label_weight` is not 0.
        chunk_tokens: tokens per chunk; None: `default_chunk_tokens`.
    """
    options, hidden_TD, weights_T = worker.options, student.hidden_TD, token_weights_T
    if options.label_weight == 0.0:
        labels_T = None
    if weights_T is None:
        weights_T = torch.ones(hidden_TD.shape[0], device=hidden_TD.device)
    else:
        weights_T = weights_T.detach().float()
        kept = weights_T.nonzero().squeeze(1)
        if kept.numel() < weights_T.numel():
            hidden_TD, target_T, weights_T = hidden_TD[kept], target_T[kept], weights_T[kept]
            labels_T = None if labels_T is None else labels_T[kept]
    weight = weights_T.sum()
    total = weight if normalizer is None else torch.as_tensor(normalizer, device=weight.device).float()
    # An empty batch divides by one: loss and gradients are zero, not NaN.
    scaled_T = weights_T / (total if weights_T.numel() else torch.ones_like(total))
    size = chunk_tokens or default_chunk_tokens(student.head_VD, weights_T.numel())
    loss, sums = _ChunkedLoss.apply(
        hidden_TD, student.head_VD, student.bias_V, target_T, scaled_T, labels_T, worker, size
    )
    metrics = {"num_tokens": torch.tensor(float(weights_T.numel()), device=weight.device), "weight": weight}
    if labels_T is not None:
        metrics |= {"label_nll": sums[1], "num_labels": sums[2]}
    if options.agreement:
        metrics |= {"top1_agreement": sums[3], "top5_agreement": sums[4], "kl": sums[5]}
    return LossOutput(loss, metrics)


def default_chunk_tokens(head_VD: Tensor, num_tokens: int) -> int:
    """Tokens per chunk, in chunks of about equal size.

    On a CPU 256, where products run at full speed, unless a [N, V] buffer passes 128 MB; more at small
    vocabularies. Fixed, so that results repeat. On a GPU one fp32 buffer takes at most a sixteenth of what is
    free.
    """
    row_bytes = max(1, head_VD.shape[0]) * (4 if head_VD.is_cuda else gradient_dtype(head_VD).itemsize)
    if head_VD.is_cuda:
        most = min(_GPU_CHUNK_BYTES, torch.cuda.mem_get_info(head_VD.device)[0] // 16) // row_bytes
    else:
        most = max(min(256, _CPU_MOST_BYTES // row_bytes), _CPU_LEAST_BYTES // row_bytes)
    num_chunks = -(-num_tokens // max(1, most))
    return max(1, -(-num_tokens // max(1, num_chunks)))


def check_sizes(temperature: float, **sizes: int | None) -> None:
    """Raise ValueError for a temperature that is not above 0 or a size (by its name) below 1."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


class _ChunkedLoss(torch.autograd.Function):
    """Forms the gradient in the forward pass; saves nothing of size [T, V]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Any,
        weights_T: Tensor,
        labels_T: Tensor | None,
        worker: Worker,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        wanted = tuple(need and worker.options.need_grad for need in ctx.needs_input_grad[:3])
        # Under autocast the fp32 parts of the loss would silently be done in bf16.
        with torch.autocast(hidden_TD.device.type, enabled=False):
            loss, sums, grads = _run(
                hidden_TD.detach(), target_T, weights_T, labels_T, worker, chunk_tokens, wanted
            )
        ctx.grads = tuple(
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, (hidden_TD, head_VD, bias_V), strict=True)
        )
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        grads = (None if grad is None else grad * outputs[0].to(grad.dtype) for grad in ctx.grads)
        return (*grads, None, None, None, None, None)


def _run(
    hidden_TD: Tensor,
    target_T: Any,
    weights_T: Tensor,
    labels_T: Tensor | None,
    worker: Worker,
    chunk_tokens: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Loss, sums of figures, and the wanted gradients of hidden states, head and bias."""
    options, weight_VD = worker.options, worker.student.weight
    hidden_grad = torch.empty_like(hidden_TD) if wanted[0] else None
    head_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
    bias_grad = torch.zeros(weight_VD.shape[0], device=weight_VD.device) if wanted[2] else None
    loss = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
    sums = torch.zeros(6, dtype=torch.float64, device=hidden_TD.device)
    for begin in range(0, hidden_TD.shape[0], chunk_tokens):
        chunk = slice(begin, begin + chunk_tokens)
        hidden_ND, weights_N = hidden_TD[chunk], weights_T[chunk]
        labels_N = None if labels_T is None else labels_T[chunk]
        # Rows of the first product are spent once their block is done: the gradient takes their place.
        gradient_NV = worker.start(hidden_ND, target_T[chunk])
        slopes_N = weights_N * worker.student.slope(options.temperature)
        if gradient_NV.dtype != gradient_dtype(weight_VD):
            gradient_NV = worker.scratch.take("gradient", gradient_NV.shape, gradient_dtype(weight_VD))
        parts: list[dict[str, Tensor]] = []
        for rows in row_blocks(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device):
            result = worker.run(rows, labels_N)
            parts.append(result.figures)
            if result.gradient is not None:
                gradient_NV[rows] = result.gradient
                if bias_grad is not None:
                    bias_grad += slopes_N[rows] @ result.gradient
        figures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss += _weighted_loss(figures, weights_N, options.label_weight)
        _add_figures(sums, figures)
        if hidden_grad is not None:
            hidden_grad[chunk] = multiply_back(gradient_NV, weight_VD).float() * slopes_N[:, None]
        if head_grad is not None:
            scaled_ND = (hidden_ND.float() * slopes_N[:, None]).to(gradient_NV.dtype)
            head_grad += gradient_NV.T @ scaled_ND
    return loss.float(), sums.float(), (hidden_grad, head_grad, bias_grad)


def _weighted_loss(figures: dict[str, Tensor], weights_N: Tensor, label_weight: float) -> Tensor:
    value_N = figures["divergence"].double()
    if "nll_student" in figures:
        nll_N = figures["nll_student"].double()
        value_N = value_N + label_weight * torch.where(figures["has_label"], nll_N, 0.0)
    return value_N @ weights_N.double()


def _add_figures(sums: Tensor, figures: dict[str, Tensor]) -> None:
    if "nll_student" in figures:
        sums[1] += torch.where(figures["has_label"], figures["nll_student"], 0.0).sum()
        sums[2] += figures["has_label"].sum()
    if "top1_agreement" in figures:
        sums[3] += figures["top1_agreement"].sum()
        sums[4] += figures["top5_agreement"].sum()
        sums[5] += figures["kl"].double().sum()
