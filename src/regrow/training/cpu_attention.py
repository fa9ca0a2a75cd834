"""Attention for training on a CPU: torch's forward kernel, and a backward pass made of batched products.

torch's own backward kernel for the CPU is three times slower than the matrix products it stands for. This one
recomputes the probabilities block by block, so it keeps nothing but its inputs and its output, as a flash
kernel does (Dao et al., arXiv 2205.14135).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "regrow_cpu"
_QUERY_BLOCK = 128  # small enough for the caches, and for causal attention to skip nearly half of the keys


def use_cpu_attention(model: PreTrainedModel) -> bool:
    """Let a model on a CPU train with this attention; False where it does not run torch's own now."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, S, D], key and value [B, H / groups, S, D].

    Where gradients are not wanted, or dropout or a bias of positions is, torch's own attention runs.
    """
    plain = dropout == 0.0 and not any(value is not None for value in map(kwargs.get, _UNKNOWN))
    if not (torch.is_grad_enabled() and plain and query.shape[2] == key.shape[2]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _Attention.apply(query, key, value, attention_mask, causal, scale)
    return output.transpose(1, 2).contiguous(), None


_UNKNOWN = ("position_bias", "softcap", "s_aux")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            output = scaled_dot_product_attention(
                query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        ctx.save_for_backward(query, key, value, output, mask)
        ctx.causal, ctx.scale = causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query, key, value, output, mask = ctx.saved_tensors
        (grad,) = grad_outputs
        length = query.shape[2]
        query_grad = torch.empty_like(query)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        with torch.autocast("cpu", enabled=False):
            for item in range(query.shape[0]):
                item_mask = None if mask is None else mask[min(item, mask.shape[0] - 1)]
                for begin in range(0, length, _QUERY_BLOCK):
                    rows = slice(begin, min(begin + _QUERY_BLOCK, length))
                    seen = slice(0, rows.stop if ctx.causal else length)
                    _block_backward(
                        query[item, :, rows],
                        output[item, :, rows],
                        grad[item, :, rows],
                        key[item, :, seen],
                        value[item, :, seen],
                        query_grad[item, :, rows],
                        key_grad[item, :, seen],
                        value_grad[item, :, seen],
                        bias=_causal_bias(rows, query.dtype) if ctx.causal else None,
                        mask=None if item_mask is None else item_mask[:, rows],
                        scale=ctx.scale,
                    )
        return query_grad, key_grad, value_grad, None, None, None


def _block_backward(
    query_HQD: Tensor,
    output_HQD: Tensor,
    grad_HQD: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    query_grad_HQD: Tensor,
    key_grad_GKD: Tensor,
    value_grad_GKD: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    """The gradients of one block of queries Q over the keys K that it sees; heads H share key heads G."""
    num_heads, num_queries, _ = query_HQD.shape
    num_groups = key_GKD.shape[0]
    query_GRD, output_GRD, grad_GRD = (
        tensor.reshape(num_groups, -1, tensor.shape[-1]) for tensor in (query_HQD, output_HQD, grad_HQD)
    )
    scores_GRK = torch.bmm(query_GRD, key_GKD.transpose(1, 2)).mul_(scale)
    scores_HQK = scores_GRK.view(num_heads, num_queries, -1)
    if bias is not None:
        scores_HQK += bias
    elif mask is not None and mask.dtype == torch.bool:
        scores_HQK.masked_fill_(~mask, torch.finfo(scores_HQK.dtype).min)
    elif mask is not None:
        scores_HQK += mask
    p_GRK = scores_GRK.softmax(-1)
    value_grad_GKD.baddbmm_(p_GRK.transpose(1, 2), grad_GRD)
    # The gradient of softmax is P (dP - sum(P dP)), and that sum is the product of dO and O.
    sum_GR1 = torch.linalg.vecdot(grad_GRD.float(), output_GRD.float()).unsqueeze(-1)
    scores_grad_GRK = torch.bmm(grad_GRD, value_GKD.transpose(1, 2)).sub_(sum_GR1.to(p_GRK.dtype))
    scores_grad_GRK.mul_(p_GRK).mul_(scale)
    key_grad_GKD.baddbmm_(scores_grad_GRK.transpose(1, 2), query_GRD)
    query_grad_HQD.copy_(torch.bmm(scores_grad_GRK, key_GKD).view_as(query_grad_HQD))


def _causal_bias(rows: slice, dtype: torch.dtype) -> Tensor:
    """Minus infinity [Q, K] where a key lies after the query."""
    future = torch.arange(rows.stop)[None] > torch.arange(rows.start, rows.stop)[:, None]
    return torch.zeros(future.shape, dtype=dtype).masked_fill_(future, -torch.inf)
