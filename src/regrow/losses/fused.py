"""Full-vocabulary distillation losses from hidden states, without ever holding [tokens, vocabulary].

The loss walks over chunks of tokens. In each it forms both models' logits in fp32, the divergence, the
gradient with respect to the student's logits and, at once, its product with the head; only that [T, D]
gradient outlives the chunk. With a frozen shared head this is three matrix products per token, the floor.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.losses.divergences import DIVERGENCES, Block
from regrow.losses.logits import LinearHead, backward_through_finish, finish_logits, product_into

_CPU_CHUNK_BYTES = 64 * 2**20


@dataclass
class LossOutput:
    """A loss and what the same forward pass measured.

    Attributes:
        loss: fp32 scalar, differentiable with respect to the student's hidden states (and head and bias,
            where they require a gradient).
        metrics: detached fp32 scalars, *sums* over the tokens of non-zero weight: `num_tokens`,
            `top1_agreement` (both argmaxes equal), `top5_agreement` (teacher's argmax among the student's
            five best), `kl` (forward KL, unweighted), `weight` (sum of token weights), and with labels
            `label_nll` and `num_labels`. Only `weight` and `num_tokens` unless `return_metrics`.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Settings:
    divergence: str
    beta: float
    temperature: float
    student: LinearHead
    teacher: LinearHead
    label_weight: float
    ignore_index: int
    chunk_tokens: int
    return_metrics: bool
    need_grad: bool


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
    return_metrics: bool = False,
) -> LossOutput:
    """Divergence of the student from the teacher over the full vocabulary, averaged over weighted tokens.

    loss = sum_t w_t (divergence_t + label_weight * nll_t) / normalizer. Both models' logits are divided by
    `temperature`; the loss is *not* multiplied by temperature^2. The cross-entropy on labels is taken at
    temperature 1. Nothing flows to the teacher, even where its head is the student's own tensor.

    Args:
        student_hidden_TD, teacher_hidden_TD: final hidden states [T, D] (D may differ between the models).
        student_head_VD, teacher_head_VD: output embeddings [V, D].
        divergence: a key of `DIVERGENCES`.
        beta: weight of the teacher in the mixture of `jsd` and `skewed_kl`.
        temperature: divisor of the logits, > 0.
        token_weights_T: weights [T]; tokens of weight zero are removed before anything is computed.
        normalizer: what the weighted sum is divided by; None is the sum of weights.
        labels_T: token ids [T] for the cross-entropy, `ignore_index` where there is none.
        label_weight: weight of the cross-entropy.
        ignore_index: label that stands for none.
        student_bias, teacher_bias: head biases [V].
        student_softcap, teacher_softcap: final soft-capping c tanh(z / c).
        student_scale, teacher_scale: factors of the logits.
        chunk_tokens: tokens per chunk; None chooses (a fixed budget on a CPU, free memory on a GPU).
        chunk_vocab: vocabulary rows per matrix product; None chooses.
        impl: `"chunked"`.
        return_metrics: also measure agreement and forward KL.

    Raises:
        ValueError: shapes or arguments that do not fit together.
    """
    _check(
        student_hidden_TD, teacher_hidden_TD, student_head_VD, teacher_head_VD, divergence, temperature, impl
    )
    student_TD, teacher_TD = student_hidden_TD, teacher_hidden_TD.detach()
    weights_T = token_weights_T
    if weights_T is None:
        weights_T = torch.ones(student_TD.shape[0], device=student_TD.device)
    else:
        weights_T = weights_T.detach().float()
        kept = weights_T.nonzero().squeeze(1)
        if kept.numel() < weights_T.numel():
            student_TD, teacher_TD, weights_T = student_TD[kept], teacher_TD[kept], weights_T[kept]
            labels_T = None if labels_T is None else labels_T[kept]
    if label_weight == 0.0:
        labels_T = None
    weight = weights_T.sum()
    total = weight if normalizer is None else torch.as_tensor(normalizer, device=weight.device).float()
    need_grad = torch.is_grad_enabled() and (
        student_TD.requires_grad
        or student_head_VD.requires_grad
        or (student_bias is not None and student_bias.requires_grad)
    )
    settings = _Settings(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        student=LinearHead(student_head_VD.detach(), _detach(student_bias), student_softcap, student_scale),
        teacher=LinearHead(teacher_head_VD.detach(), _detach(teacher_bias), teacher_softcap, teacher_scale),
        label_weight=label_weight,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens or default_chunk_tokens(student_head_VD),
        return_metrics=return_metrics,
        need_grad=need_grad,
    )
    # An empty batch divides by one: loss and gradients are zero, not NaN.
    scaled_T = weights_T / (total if weights_T.numel() else torch.ones_like(total))
    loss, sums = _FusedDivergence.apply(
        student_TD, student_head_VD, student_bias, teacher_TD, scaled_T, labels_T, settings
    )
    metrics = {"num_tokens": torch.tensor(float(weights_T.numel()), device=weight.device), "weight": weight}
    if return_metrics:
        metrics |= dict(zip(("top1_agreement", "top5_agreement", "kl"), sums[:3].unbind(), strict=True))
    if labels_T is not None:
        metrics |= {"label_nll": sums[3], "num_labels": sums[4]}
    return LossOutput(loss, metrics)


def default_chunk_tokens(head_VD: Tensor) -> int:
    """Tokens per chunk such that one fp32 [N, V] buffer fits the budget."""
    budget = _CPU_CHUNK_BYTES
    if head_VD.is_cuda:
        budget = min(512 * 2**20, torch.cuda.mem_get_info(head_VD.device)[0] // 16)
    return max(1, budget // (4 * head_VD.shape[0]))


class _FusedDivergence(torch.autograd.Function):
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
        student_TD = student_TD.detach()
        wants = [need and settings.need_grad for need in ctx.needs_input_grad[:3]]
        hidden_grad = torch.empty_like(student_TD) if wants[0] else None
        head_grad = torch.zeros_like(settings.student.weight_VD, dtype=torch.float32) if wants[1] else None
        bias_grad = (
            torch.zeros_like(settings.student.weight_VD[:, 0], dtype=torch.float32) if wants[2] else None
        )
        sums = torch.zeros(6, dtype=torch.float64, device=student_TD.device)
        for begin in range(0, student_TD.shape[0], settings.chunk_tokens):
            rows = slice(begin, begin + settings.chunk_tokens)
            gradient_NV = _chunk(
                student_TD[rows],
                teacher_TD[rows],
                weights_T[rows],
                None if labels_T is None else labels_T[rows],
                settings,
                sums,
            )
            if gradient_NV is None:
                continue
            if bias_grad is not None:
                bias_grad += gradient_NV.sum(0)
            weight_VD = settings.student.weight_VD
            gradient_NV = gradient_NV.to(weight_VD.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = gradient_NV @ weight_VD
            if head_grad is not None:
                head_grad += gradient_NV.T @ student_TD[rows].to(weight_VD.dtype)
        ctx.grads = (
            hidden_grad,
            None if head_grad is None else head_grad.to(head_VD.dtype),
            None if bias_grad is None or bias_V is None else bias_grad.to(bias_V.dtype),
        )
        loss, sums = sums[5].float(), sums[:5].float()
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        scale = outputs[0]
        grads = [None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.grads]
        return (*grads, None, None, None, None)


def _chunk(
    student_ND: Tensor,
    teacher_ND: Tensor,
    weights_N: Tensor,
    labels_N: Tensor | None,
    settings: _Settings,
    sums: Tensor,
) -> Tensor | None:
    """Loss and metrics of one chunk, added to `sums`; returns the gradient with respect to W h [N, V]."""
    student, teacher, temperature = settings.student, settings.teacher, settings.temperature
    student_NV = torch.empty(student_ND.shape[0], student.weight_VD.shape[0], device=student_ND.device)
    teacher_NV = torch.empty_like(student_NV)
    product_into(student_NV, student_ND, student.weight_VD)
    product_into(teacher_NV, teacher_ND, teacher.weight_VD)
    finish_logits(student_NV, student, temperature)
    finish_logits(teacher_NV, teacher, temperature)
    logits_NV = student_NV.clone() if student.softcap is not None or labels_N is not None else None
    if settings.return_metrics:
        sums[:2] += torch.stack(_agreement(student_NV, teacher_NV)).sum(1)
    block = Block(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
    if settings.return_metrics:
        sums[2] += torch.linalg.vecdot(block.teacher_NV.exp(), block.teacher_NV - block.student_NV).sum()
    value_N, gradient_NV = DIVERGENCES[settings.divergence](block, settings.beta, settings.need_grad)
    if gradient_NV is not None:
        gradient_NV.mul_(weights_N[:, None])
    if labels_N is not None and logits_NV is not None:
        scaled_NV = logits_NV * temperature
        has_label = labels_N != settings.ignore_index
        labels = torch.where(has_label, labels_N, 0)[:, None]
        log_NV = scaled_NV.log_softmax(-1)
        nll_N = torch.where(has_label, -log_NV.gather(1, labels)[:, 0], 0.0)
        sums[3] += nll_N.sum()
        sums[4] += has_label.sum()
        value_N = value_N + settings.label_weight * nll_N
        if gradient_NV is not None:
            slope_N = weights_N * settings.label_weight * has_label * temperature
            label_grad = log_NV.exp_().scatter_add_(1, labels, torch.full_like(log_NV[:, :1], -1.0))
            gradient_NV.addcmul_(label_grad, slope_N[:, None])
    sums[5] += (value_N.double() * weights_N.double()).sum()
    if gradient_NV is None:
        return None
    return backward_through_finish(gradient_NV, logits_NV, student, temperature)


def _agreement(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Per token: are the argmaxes equal; is the teacher's argmax among the student's five best."""
    best = teacher_NV.argmax(-1, keepdim=True)
    rank_N = (student_NV > student_NV.gather(1, best)).sum(-1)
    return (student_NV.argmax(-1) == best[:, 0]).double(), (rank_N < 5).double()


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check(
    student_TD: Tensor,
    teacher_TD: Tensor,
    student_head_VD: Tensor,
    teacher_head_VD: Tensor,
    divergence: str,
    temperature: float,
    impl: str,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is unknown; use one of {', '.join(DIVERGENCES)}")
    if impl != "chunked":
        raise ValueError(f"impl {impl!r} is unknown; use 'chunked'")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if student_TD.dim() != 2 or teacher_TD.dim() != 2 or student_TD.shape[0] != teacher_TD.shape[0]:
        raise ValueError(
            f"hidden states are {tuple(student_TD.shape)} and {tuple(teacher_TD.shape)}; "
            "both must be [tokens, hidden] with equally many tokens"
        )
    for name, hidden, head in (
        ("student", student_TD, student_head_VD),
        ("teacher", teacher_TD, teacher_head_VD),
    ):
        if head.dim() != 2 or head.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"the {name}'s head is {tuple(head.shape)} but its hidden states have width {hidden.shape[1]}"
            )
    if student_head_VD.shape[0] != teacher_head_VD.shape[0]:
        raise ValueError(
            f"vocabularies differ: student {student_head_VD.shape[0]}, teacher {teacher_head_VD.shape[0]}; "
            "distillation needs one tokenizer"
        )
