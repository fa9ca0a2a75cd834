"""Logits of two models from their hidden states, accurate enough that a small KL is not drowned by rounding.

A CPU multiplies bf16 matrices fast, accumulates in fp32, and then rounds each product to bf16. Rounding
both models' logits adds about the variance of the rounding error to the KL: 1e-3 nats at logits near 20,
which hides a student whose true KL is 1e-3. Three remedies, all exactly zero where teacher and student
agree:

- *Difference.* With a shared head the student's logits are z_t + W (h_s - h_t). The rounding of the second
  product is relative to that difference, so that KL and gradient keep their leading digits.
- *Refinement.* The teacher's largest logits carry most of the probability; they are recomputed in fp32 from
  the few rows of the head that they need.
- *Residual.* A second product whose accumulator starts at minus the rounded first one returns what rounding
  dropped; both together have 16 significant bits. Costs one more product; used by `precision="exact"`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.losses.scratch import Scratch

_CAST_ELEMENTS = 4_194_304  # rows of a head that are cast to fp32 at a time: 16 MB
_GROUP = 64  # columns whose maximum stands for them when the largest logits are looked for


@dataclass(frozen=True)
class LinearHead:
    """The map from final hidden states to logits: softcap(scale (W h + bias)).

    Attributes:
        weight: W, [V, D].
        bias: [V] or None.
        softcap: c of c tanh(z / c), applied last, or None.
        scale: factor of the logits (1 / logits_scaling for Granite, logit_scale for Cohere).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def finish(self, product_NV: Tensor, temperature: float) -> None:
        """Turn W h into logits / temperature, in place."""
        if self.bias is not None:
            product_NV.add_(self.bias)
        if self.softcap is not None:
            product_NV.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        elif self.slope(temperature) != 1.0:
            product_NV.mul_(self.slope(temperature))

    def slope(self, temperature: float) -> float:
        """Derivative of the finished logits with respect to W h, up to the factor of the soft-capping."""
        return self.scale / temperature

    def backward_softcap(self, gradient_NV: Tensor, logits_NV: Tensor, temperature: float) -> None:
        """Multiply the gradient by the derivative of the soft-capping, in place; overwrites the logits."""
        if self.softcap is not None:
            gradient_NV.mul_(logits_NV.mul_(temperature / self.softcap).square_().neg_().add_(1.0))


@dataclass(frozen=True)
class Products:
    """W h of a chunk for both models, each as a sum of terms [N, V] of any float dtype.

    Attributes:
        teacher: terms of the teacher's products.
        student: terms of the student's products, or of student minus teacher if `is_difference`.
        is_difference: see `student`.
        refine: whether the teacher's largest products are still to be recomputed (`recompute`).
    """

    teacher: tuple[Tensor, ...]
    student: tuple[Tensor, ...]
    is_difference: bool
    refine: bool = False


def same_tensor(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors are one array in memory, so that one read serves both."""
    if left is right:
        return True
    if left is None or right is None or left.device != right.device or left.dtype != right.dtype:
        return False
    return (
        left.shape == right.shape
        and left.stride() == right.stride()
        and left.data_ptr() == right.data_ptr() != 0
    )


def multiply(
    student_ND: Tensor,
    teacher_ND: Tensor,
    student: LinearHead,
    teacher: LinearHead,
    *,
    exact: bool,
    scratch: Scratch,
    chunk_vocab: int | None = None,
) -> Products:
    """Both models' products with their heads.

    A shared head is read once, for the teacher's hidden states and the difference of both models' together.
    `exact` asks for products that are accurate to fp32 (to 16 bits with bf16 on a CPU) at any cost.
    """
    weight_VD = teacher.weight
    engine = _Engine(scratch, chunk_vocab)
    if not same_tensor(student.weight, weight_VD):
        return Products(
            engine.terms("teacher", teacher_ND, weight_VD, exact),
            engine.terms("student", student_ND, student.weight, exact),
            is_difference=False,
        )
    num_tokens, dtype = teacher_ND.shape[0], operand_dtype(weight_VD)
    difference_ND = student_ND.float() - teacher_ND.float()
    both_NV = engine.product("both", torch.cat((teacher_ND.to(dtype), difference_ND.to(dtype))), weight_VD)
    teacher_NV, difference_NV = both_NV[:num_tokens], both_NV[num_tokens:]
    if exact:
        rest = engine.rest("rest", teacher_NV, teacher_ND, weight_VD)
        return Products((teacher_NV, *rest), (difference_NV,), is_difference=True)
    lossy = both_NV.dtype != torch.float32 or _is_wider(teacher_ND, dtype)
    return Products((teacher_NV,), (difference_NV,), is_difference=True, refine=lossy)


def multiply_one(hidden_ND: Tensor, head: LinearHead, scratch: Scratch) -> tuple[Tensor, ...]:
    """One model's products with its head, as terms; as accurate as those of `multiply` with `exact`."""
    return _Engine(scratch, None).terms("product", hidden_ND, head.weight, exact=True)


def sum_terms(terms: tuple[Tensor, ...], rows: slice, name: str, scratch: Scratch) -> Tensor:
    """fp32 sum of the terms' rows; takes the place of the first term where that is fp32."""
    total_NV = terms[0][rows]
    if total_NV.dtype != torch.float32:
        total_NV = scratch.take(name, total_NV.shape, torch.float32).copy_(total_NV)
    for term_NV in terms[1:]:
        spare_NV = scratch.take("spare", total_NV.shape, torch.float32)
        total_NV.add_(spare_NV.copy_(term_NV[rows]))
    return total_NV


def recompute(product_NV: Tensor, index_NK: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
    """Recompute the products in the given columns in fp32, in place."""
    rows_NKD = weight_VD.index_select(0, index_NK.flatten()).float().view(*index_NK.shape, -1)
    product_NV.scatter_(1, index_NK, rows_NKD.mul_(hidden_ND[:, None].float()).sum(-1))


def largest_entries(values_NV: Tensor, num: int) -> Tensor:
    """Column indices [N, min(num, V)] of each row's largest values, in no particular order.

    Columns are put into groups (every G-th column). The `num` largest values lie in the `num` groups with the
    largest maxima, or in the columns that no group holds, so that only those are sorted.
    """
    num_columns = values_NV.shape[1]
    num_groups = num_columns // _GROUP
    if num_groups <= num:
        return values_NV.topk(min(num, num_columns), sorted=False).indices
    grouped = num_groups * _GROUP
    maxima_NG = values_NV[:, :grouped].unflatten(1, (_GROUP, num_groups)).amax(1)
    groups = maxima_NG.topk(num, sorted=False).indices
    steps = torch.arange(0, grouped, num_groups, device=values_NV.device)
    columns = (groups[:, :, None] + steps).flatten(1)
    if grouped < num_columns:
        rest = torch.arange(grouped, num_columns, device=values_NV.device)
        columns = torch.cat((columns, rest.expand(columns.shape[0], -1)), 1)
    return columns.gather(1, values_NV.gather(1, columns).topk(num, sorted=False).indices)


def operand_dtype(weight_VD: Tensor) -> torch.dtype:
    """Dtype in which a head is multiplied: its own where the device multiplies it fast, else fp32."""
    if weight_VD.dtype == torch.bfloat16 or (weight_VD.is_cuda and weight_VD.dtype == torch.float16):
        return weight_VD.dtype
    return torch.float32


def gradient_dtype(weight_VD: Tensor) -> torch.dtype:
    """Dtype in which the logits' gradient is multiplied with the head; fp16 would underflow."""
    return torch.bfloat16 if weight_VD.dtype == torch.bfloat16 else torch.float32


def multiply_back(gradient_NV: Tensor, weight_VD: Tensor) -> Tensor:
    """The gradient with respect to the hidden states, [N, D]."""
    if gradient_NV.dtype == weight_VD.dtype:
        if gradient_NV.is_cuda and gradient_NV.dtype != torch.float32:
            return torch.mm(gradient_NV, weight_VD, out_dtype=torch.float32)
        return gradient_NV @ weight_VD
    total_ND = torch.zeros(gradient_NV.shape[0], weight_VD.shape[1], device=gradient_NV.device)
    for rows in _vocab_blocks(weight_VD, None):
        total_ND.addmm_(gradient_NV[:, rows], weight_VD[rows].to(gradient_NV.dtype))
    return total_ND


class _Engine:
    """Products with a head, written into scratch buffers."""

    def __init__(self, scratch: Scratch, chunk_vocab: int | None) -> None:
        self._scratch, self._chunk_vocab = scratch, chunk_vocab

    def terms(self, name: str, hidden_ND: Tensor, weight_VD: Tensor, exact: bool) -> tuple[Tensor, ...]:
        """W h, and with `exact` what the first term lacks."""
        first_NV = self.product(name, hidden_ND.to(operand_dtype(weight_VD)), weight_VD)
        rest = self.rest(f"{name} rest", first_NV, hidden_ND, weight_VD) if exact else ()
        return (first_NV, *rest)

    def product(self, name: str, operand_ND: Tensor, weight_VD: Tensor) -> Tensor:
        """W h in fp32, except that bf16 on a CPU comes rounded to bf16."""
        wide = weight_VD.is_cuda and operand_ND.dtype != torch.float32
        out_dtype = torch.float32 if wide else operand_ND.dtype
        out_NV = self._scratch.take(name, (operand_ND.shape[0], weight_VD.shape[0]), out_dtype)
        if self._chunk_vocab is None and weight_VD.dtype == operand_ND.dtype:
            blocks = [slice(0, weight_VD.shape[0])]
        else:
            blocks = _vocab_blocks(weight_VD, self._chunk_vocab)
        for rows in blocks:
            block_DV = weight_VD[rows].to(operand_ND.dtype).T
            options = {"out_dtype": torch.float32} if wide else {}
            torch.mm(operand_ND, block_DV, out=out_NV[:, rows], **options)
        return out_NV

    def rest(self, name: str, first_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        """What `first_NV` lacks of W h: its own rounding, and what bf16 cut off from fp32 hidden states."""
        dtype = operand_dtype(weight_VD)
        high_ND = hidden_ND.to(dtype)
        low_ND = (hidden_ND.float() - high_ND.float()).to(dtype) if _is_wider(hidden_ND, dtype) else None
        if first_NV.dtype == torch.float32:
            return () if low_ND is None else (self.product(name, low_ND, weight_VD),)
        rest_NV = torch.neg(first_NV, out=self._scratch.take(name, first_NV.shape, first_NV.dtype))
        for operand_ND in (high_ND, low_ND):
            if operand_ND is not None:
                torch.addmm(rest_NV, operand_ND, weight_VD.T, out=rest_NV)
        return (rest_NV,)


def _is_wider(hidden_ND: Tensor, dtype: torch.dtype) -> bool:
    return torch.promote_types(hidden_ND.dtype, dtype) != dtype


def _vocab_blocks(weight_VD: Tensor, chunk_vocab: int | None) -> list[slice]:
    num_rows, width = weight_VD.shape
    size = chunk_vocab or max(1, _CAST_ELEMENTS // max(1, width))
    return [slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]
