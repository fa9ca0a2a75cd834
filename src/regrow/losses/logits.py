"""Logits from hidden states: fp32-accurate products with a head of any dtype, bias, scale, soft-capping."""

from dataclasses import dataclass

import torch
from torch import Tensor

_CAST_ELEMENTS = 4_194_304  # rows of the head cast to fp32 at a time: 16 MB


@dataclass(frozen=True)
class LinearHead:
    """The map from final hidden states to logits: softcap(scale (W h + bias)).

    Attributes:
        weight_VD: W; bias_V: or None.
        softcap: c of c tanh(z / c), applied last, or None.
        scale: factor of the logits (1 / logits_scaling for Granite, logit_scale for Cohere).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


def same_weight(left_VD: Tensor, right_VD: Tensor) -> bool:
    """Whether two tensors are one matrix in memory, so that one read serves both."""
    return left_VD is right_VD or (
        left_VD.data_ptr() == right_VD.data_ptr()
        and left_VD.shape == right_VD.shape
        and left_VD.stride() == right_VD.stride()
        and left_VD.dtype == right_VD.dtype
        and left_VD.device == right_VD.device
        and left_VD.device.type != "meta"
    )


def product_into(out_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
    """Write W h into the fp32 `out_NV`, accurate to fp32 whatever the dtype of the weight.

    In bf16 on a CPU torch rounds products to bf16. The rest that the rounding dropped comes from a second
    product whose accumulator starts at minus the first one, so that the sum of both has 16 significant bits.
    """
    if weight_VD.dtype == torch.float32:
        torch.mm(hidden_ND.float(), weight_VD.T, out=out_NV)
    elif hidden_ND.is_cuda and hidden_ND.dtype == weight_VD.dtype:
        torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32, out=out_NV)
    elif hidden_ND.dtype == weight_VD.dtype == torch.bfloat16:
        rounded_NV = hidden_ND @ weight_VD.T
        out_NV.copy_(rounded_NV)
        rounded_NV.neg_()
        out_NV.add_(torch.addmm(rounded_NV, hidden_ND, weight_VD.T, out=rounded_NV))
    else:
        hidden_ND = hidden_ND.float()
        rows = max(1, _CAST_ELEMENTS // max(1, weight_VD.shape[1]))
        for begin in range(0, weight_VD.shape[0], rows):
            block_VD = weight_VD[begin : begin + rows].float()
            out_NV[:, begin : begin + rows] = hidden_ND @ block_VD.T


def finish_logits(product_NV: Tensor, head: LinearHead, temperature: float) -> Tensor:
    """Turn W h into logits / temperature, in place."""
    if head.bias_V is not None:
        product_NV.add_(head.bias_V)
    if head.softcap is None:
        factor = head.scale / temperature
    else:
        product_NV.mul_(head.scale / head.softcap).tanh_()
        factor = head.softcap / temperature
    return product_NV if factor == 1.0 else product_NV.mul_(factor)


def backward_through_finish(
    gradient_NV: Tensor, logits_NV: Tensor | None, head: LinearHead, temperature: float
) -> Tensor:
    """Turn the gradient of logits / temperature into that of W h + bias, in place.

    Args:
        gradient_NV: gradient of the finished logits.
        logits_NV: the finished logits, needed with soft-capping only; overwritten.
        head: the head.
        temperature: the temperature.
    """
    if head.softcap is not None:
        if logits_NV is None:
            raise ValueError("soft-capping needs the logits in the backward pass")
        tanh_NV = logits_NV.mul_(temperature / head.softcap)
        gradient_NV.mul_(tanh_NV.square_().neg_().add_(1.0))
    factor = head.scale / temperature
    return gradient_NV if factor == 1.0 else gradient_NV.mul_(factor)
