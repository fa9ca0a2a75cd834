"""Full-vocabulary distillation losses from both models' hidden states.

With a frozen shared head a token takes three matrix products, which is the floor.
"""

from torch import Tensor

from regrow.losses.blocks import BlockOptions, DenseWorker
from regrow.losses.chunks import LossOutput, Student, check_sizes, chunked_loss
from regrow.losses.divergences import DIVERGENCES
from regrow.losses.logits import LinearHead, same_tensor

PRECISIONS = ("auto", "exact", "bf16_products")


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
    student = Student(student_hidden_TD, student_head_VD, student_bias, student_softcap, student_scale)
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    options = BlockOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        label_weight=label_weight,
        ignore_index=ignore_index,
        need_grad=student.need_grad,
        agreement=return_metrics,
    )
    shared = same_tensor(student_head_VD, teacher_head_VD)
    worker = DenseWorker(
        student.head,
        LinearHead(teacher_head_VD.detach(), teacher_bias, teacher_softcap, teacher_scale),
        options,
        exact=precision == "exact" or (precision == "auto" and not shared),
        chunk_vocab=chunk_vocab,
    )
    return chunked_loss(
        worker,
        student,
        teacher_hidden_TD.detach(),
        token_weights_T=token_weights_T,
        normalizer=normalizer,
        labels_T=labels_T,
        chunk_tokens=chunk_tokens,
    )


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
    check_sizes(temperature, chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab)
    if impl != "chunked":
        raise ValueError(f"impl {impl!r} is unknown; use 'chunked'")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")


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
