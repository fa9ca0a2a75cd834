"""Full-vocabulary distillation losses from hidden states, without ever holding [tokens, vocabulary].

The loss walks over chunks of tokens. In each it forms both models' logits, the divergence, the gradient with
respect to the student's logits and, at once, that gradient's product with the head; only the resulting [T, D]
outlives the chunk. With a frozen shared head this is three matrix products per token, which is the floor.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.losses.blocks import BlockOptions, BlockWorker, row_blocks
from regrow.losses.divergences import DIVERGENCES
from regrow.losses.logits import LinearHead, gradient_dtype, multiply, multiply_back, same_tensor
from regrow.losses.scratch import Scratch

_CPU_LEAST_BYTES, _CPU_MOST_BYTES = 16 * 2**20, 128 * 2**20
_GPU_CHUNK_BYTES = 192 * 2**20  # of one [N, V] fp32 buffer; three to four are held
PRECISIONS = ("auto", "exact", "bf16_products")


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
class _Settings:
    student: LinearHead
    teacher: LinearHead
    options: BlockOptions
    exact: bool
    chunk_tokens: int
    chunk_vocab: int | None


def fused_linear_divergence(
    student_hidden_TD: Tensor,
    teacher_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_head_VD: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    token_weights_T: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    labels_T: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
    impl: str = "chunked",
    precision: str = "auto",
    return_metrics: bool = False,
) -> LossOutput:
    """Divergence of the student from the teacher over the full vocabulary, averaged over weighted tokens.

    loss = sum_t w_t (divergence_t + label_weight * nll_t) / normalizer. Both models' logits are divided by
    `temperature`; the loss is *not* multiplied by temperature^2. The cross-entropy on labels is taken at
    temperature 1. Nothing flows to the teacher, even where its head is the student's own tensor. A NaN in a
    token of non-zero weight makes the loss NaN.

    Precision matters for bf16 heads on a CPU, whose products torch rounds to bf16 (elsewhere products are
    fp32, and `exact` and `bf16_products` agree). `"exact"` recovers the rounded part with more products: 4
    in all with a shared head, 5 with two heads. `"bf16_products"` does not: 3 in all. With a shared head it
    still errs by less than one percent in value and gradient down to a KL of 1e-4 (see `losses/logits.py`);
    with two heads the rounding adds about 1e-3 nats. `"auto"` is `bf16_products` for a shared head, else
    `exact`.

    Args:
        student_hidden_TD: final hidden states of the student, [T, D].
        teacher_hidden_TD: those of the teacher; its D may differ.
        student_head_VD: output embedding of the student, [V, D].
        teacher_head_VD: that of the teacher; read once for both if it is the same tensor.
        divergence: a key of `DIVERGENCES`.
        beta: weight of the teacher in the mixture of `jsd` and `skewed_kl`, in (0, 1).
        temperature: divisor of the logits, > 0.
        token_weights_T: weights [T]; tokens of weight zero are removed before anything is computed.
        normalizer: what the weighted sum is divided by; None is the sum of weights.
        labels_T: token ids [T] for the cross-entropy, `ignore_index` where there is none.
        label_weight: weight of the cross-entropy; 0 leaves the labels unread.
        ignore_index: label that stands for none.
        student_bias: bias [V] of the student's head.
        teacher_bias: bias [V] of the teacher's head.
        student_softcap: final soft-capping c tanh(z / c) of the student.
        teacher_softcap: that of the teacher.
        student_scale: factor of the student's logits.
        teacher_scale: factor of the teacher's logits.
        chunk_tokens: tokens per chunk; None: from a fixed budget on a CPU, from free memory on a GPU.
        chunk_vocab: rows of the head per matrix product; None: all, or few where they have to be cast.
        impl: `"chunked"`, the only one so far.
        precision: see above.
        return_metrics: also measure agreement and forward KL.

    Raises:
        ValueError: shapes or arguments that do not fit together.
    """
    _check_arguments(divergence, beta, temperature, impl, precision, chunk_tokens, chunk_vocab)
    check_shapes(student_hidden_TD, teacher_hidden_TD, student_head_VD, teacher_head_VD)
    shared = same_tensor(student_head_VD, teacher_head_VD)
    need_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (student_hidden_TD, student_head_VD, student_bias)
    )
    student_TD, teacher_TD, weights_T = student_hidden_TD, teacher_hidden_TD.detach(), token_weights_T
    if label_weight == 0.0:
        labels_T = None
    if weights_T is None:
        weights_T = torch.ones(student_TD.shape[0], device=student_TD.device)
    else:
        weights_T = weights_T.detach().float()
        kept = weights_T.nonzero().squeeze(1)
        if kept.numel() < weights_T.numel():
            student_TD, teacher_TD, weights_T = student_TD[kept], teacher_TD[kept], weights_T[kept]
            labels_T = None if labels_T is None else labels_T[kept]
    weight = weights_T.sum()
    total = weight if normalizer is None else torch.as_tensor(normalizer, device=weight.device).float()
    settings = _Settings(
        student=LinearHead(student_head_VD.detach(), _detach(student_bias), student_softcap, student_scale),
        teacher=LinearHead(teacher_head_VD.detach(), _detach(teacher_bias), teacher_softcap, teacher_scale),
        options=BlockOptions(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            label_weight=label_weight,
            ignore_index=ignore_index,
            need_grad=need_grad,
            agreement=return_metrics,
        ),
        exact=precision == "exact" or (precision == "auto" and not shared),
        chunk_tokens=chunk_tokens or default_chunk_tokens(student_head_VD, weights_T.numel()),
        chunk_vocab=chunk_vocab,
    )
    # An empty batch divides by one: loss and gradients are zero, not NaN.
    scaled_T = weights_T / (total if weights_T.numel() else torch.ones_like(total))
    loss, sums = _FusedDivergence.apply(
        student_TD, student_head_VD, student_bias, teacher_TD, scaled_T, labels_T, settings
    )
    metrics = {"num_tokens": torch.tensor(float(weights_T.numel()), device=weight.device), "weight": weight}
    if labels_T is not None:
        metrics |= {"label_nll": sums[1], "num_labels": sums[2]}
    if return_metrics:
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


class _FusedDivergence(torch.autograd.Function):
    """Forms the gradient in the forward pass; saves nothing of size [T, V]."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        teacher_TD: Tensor,
        weights_T: Tensor,
        labels_T: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        wanted = tuple(need and settings.options.need_grad for need in ctx.needs_input_grad[:3])
        # Under autocast the fp32 parts of the loss would silently be done in bf16.
        with torch.autocast(student_TD.device.type, enabled=False):
            loss, sums, grads = _run(student_TD.detach(), teacher_TD, weights_T, labels_T, settings, wanted)
        ctx.grads = tuple(
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, (student_TD, head_VD, bias_V), strict=True)
        )
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        grads = (None if grad is None else grad * outputs[0].to(grad.dtype) for grad in ctx.grads)
        return (*grads, None, None, None, None)


def _run(
    student_TD: Tensor,
    teacher_TD: Tensor,
    weights_T: Tensor,
    labels_T: Tensor | None,
    settings: _Settings,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Loss, sums of figures, and the wanted gradients of hidden states, head and bias."""
    student, teacher, options = settings.student, settings.teacher, settings.options
    weight_VD = student.weight
    hidden_grad = torch.empty_like(student_TD) if wanted[0] else None
    head_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
    bias_grad = torch.zeros(weight_VD.shape[0], device=weight_VD.device) if wanted[2] else None
    loss = torch.zeros((), dtype=torch.float64, device=student_TD.device)
    sums = torch.zeros(6, dtype=torch.float64, device=student_TD.device)
    scratch = Scratch(weight_VD.device)
    worker = BlockWorker(student, teacher, options, scratch)
    for begin in range(0, student_TD.shape[0], settings.chunk_tokens):
        chunk = slice(begin, begin + settings.chunk_tokens)
        student_ND, teacher_ND, weights_N = student_TD[chunk], teacher_TD[chunk], weights_T[chunk]
        labels_N = None if labels_T is None else labels_T[chunk]
        products = multiply(
            student_ND,
            teacher_ND,
            student,
            teacher,
            exact=settings.exact,
            scratch=scratch,
            chunk_vocab=settings.chunk_vocab,
        )
        slopes_N = weights_N * student.slope(options.temperature)
        # Rows of the first product are spent once their block is done: the gradient takes their place.
        gradient_NV = products.teacher[0]
        if gradient_NV.dtype != gradient_dtype(weight_VD):
            gradient_NV = scratch.take("gradient", gradient_NV.shape, gradient_dtype(weight_VD))
        parts: list[dict[str, Tensor]] = []
        for rows in row_blocks(student_ND.shape[0], weight_VD.shape[0], student_ND.device):
            result = worker.run(products, rows, teacher_ND, labels_N)
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
            scaled_ND = (student_ND.float() * slopes_N[:, None]).to(gradient_NV.dtype)
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


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_arguments(
    divergence: str,
    beta: float,
    temperature: float,
    impl: str,
    precision: str,
    chunk_tokens: int | None,
    chunk_vocab: int | None,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is unknown; use one of {', '.join(DIVERGENCES)}")
    if divergence in ("jsd", "skewed_kl") and not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; {divergence} needs it between 0 and 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if impl != "chunked":
        raise ValueError(f"impl {impl!r} is unknown; use 'chunked'")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    for name, size in (("chunk_tokens", chunk_tokens), ("chunk_vocab", chunk_vocab)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def check_shapes(
    student_TD: Tensor, teacher_TD: Tensor, student_head_VD: Tensor, teacher_head_VD: Tensor
) -> None:
    """Raise ValueError where hidden states and heads do not fit together."""
    if student_TD.dim() != 2 or teacher_TD.dim() != 2 or student_TD.shape[0] != teacher_TD.shape[0]:
        raise ValueError(
            f"hidden states are {tuple(student_TD.shape)} and {tuple(teacher_TD.shape)}; "
            "both must be [tokens, hidden] with equally many tokens"
        )
    for name, hidden_TD, head_VD in (
        ("student", student_TD, student_head_VD),
        ("teacher", teacher_TD, teacher_head_VD),
    ):
        if head_VD.dim() != 2 or head_VD.shape[1] != hidden_TD.shape[1]:
            raise ValueError(
                f"the {name}'s head is {tuple(head_VD.shape)} "
                f"but its hidden states have width {hidden_TD.shape[1]}"
            )
    if student_head_VD.shape[0] != teacher_head_VD.shape[0]:
        raise ValueError(
            f"vocabularies differ: student {student_head_VD.shape[0]}, teacher {teacher_head_VD.shape[0]}; "
            "distillation needs one tokenizer"
        )
