"""Squared gradients of a factor on each channel, and of the MLP's output, by one backward pass per batch.

The loss of a sequence is the negative log-likelihood of tokens drawn from the model itself, one per position,
so the squares estimate the diagonal Hessian of KL(teacher, student) at the unpruned model (see
`criteria.fisher`). Gradients with respect to the hidden states come in closed form, head^T (p - drawn), so
logits are held for a chunk only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.errors import UserError
from regrow.modeling.hidden import Head, final_hidden, head_of
from regrow.pruning.accumulate import Batch, SiteSums

_CHUNK_TOKENS = 256
_DRAW_BLOCK = 256


def add_fisher(
    model: nn.Module,
    sums: Sequence[SiteSums],
    input_ids_BS: Tensor,
    mask_BS: Tensor,
    batch: Batch,
    seed: int,
) -> Tensor:
    """Add the squared gradients of each calibration sequence to `sums`; returns hidden states.

    `fisher_F` takes (sum over a sequence's tokens of x_j * dL/dx_j)^2, x_j the input of down_proj: m_j scales
    it, so that sum is dL/dm_j at m = 1. `output_fisher_DD` takes dL/dy (dL/dy)^T of every token, y the output
    of down_proj.
    """
    head = head_of(model)
    if head.softcap is not None:
        raise UserError("fisher does not know soft-capped logits; use another criterion.")
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    handles: list[Any] = []
    for index, entry in enumerate(sums):
        down = model.get_submodule(f"{entry.site.module}.{_last(entry.site.down.name)}")

        def keep(module: nn.Module, arguments: tuple[Any, ...], index: int = index) -> Any:
            x = arguments[0] if arguments[0].requires_grad else arguments[0].detach().requires_grad_()
            x.retain_grad()
            inputs[index] = x
            return (x, *arguments[1:])

        def keep_output(module: nn.Module, arguments: Any, y: Tensor, index: int = index) -> None:
            y.retain_grad()
            outputs[index] = y

        handles.append(down.register_forward_pre_hook(keep))
        handles.append(down.register_forward_hook(keep_output))
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.enable_grad():
            hidden_BSD = final_hidden(model, input_ids_BS, mask_BS)
            hidden_BSD.backward(_drawn_gradient(hidden_BSD.detach(), head, batch, seed))
    finally:
        for handle in handles:
            handle.remove()
    calibration_BS = torch.zeros(batch.real_BS.numel(), dtype=torch.bool, device=mask_BS.device)
    calibration_BS[batch.calibration_T] = True
    calibration_BS = calibration_BS.view_as(batch.real_BS)
    for index, entry in enumerate(sums):
        x_BSF, y_BSD = inputs[index], outputs[index]
        assert entry.fisher_F is not None
        assert entry.output_fisher_DD is not None
        if x_BSF.grad is None or y_BSD.grad is None:
            continue
        gradient_TD = y_BSD.grad.flatten(0, -2)[batch.calibration_T].float()
        entry.output_fisher_DD.addmm_(gradient_TD.T, gradient_TD)
        product_BSF = x_BSF.detach().float() * x_BSF.grad.float() * calibration_BS[..., None]
        entry.fisher_F += product_BSF.sum(1).double().square().sum(0)
        x_BSF.grad = y_BSD.grad = None
    return hidden_BSD.detach()


@torch.no_grad()
def _drawn_gradient(hidden_BSD: Tensor, head: Head, batch: Batch, seed: int) -> Tensor:
    """dL/dhidden, zero at pad positions; draws depend on the seed, the sequence and the position only."""
    gradient_BSD = torch.zeros_like(hidden_BSD)
    for row, sequence in enumerate(batch.sequences):
        length = int(batch.real_BS[row].sum())
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sequence)
        uniform_S = torch.rand(length, generator=generator, dtype=torch.float64).to(hidden_BSD.device)
        for begin in range(0, length, _CHUNK_TOKENS):
            rows = slice(begin, min(begin + _CHUNK_TOKENS, length))
            p_NV = (head.logits(hidden_BSD[row, rows]).float()).softmax(-1)
            p_NV[torch.arange(len(p_NV)), draw(p_NV, uniform_S[rows])] -= 1
            gradient_BSD[row, rows] = ((p_NV.to(head.weight_VD.dtype) @ head.weight_VD) * head.scale).to(
                gradient_BSD.dtype
            )
    return gradient_BSD


def draw(p_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """One index [N] per distribution: where its distribution function passes `uniform_N` (float64).

    The function is summed in two steps, blocks and then one block, in float64: a whole sum of that kind over
    a large vocabulary takes longer than the forward pass.
    """
    N, V = p_NV.shape
    blocks_NBW = torch.nn.functional.pad(p_NV, (0, -V % _DRAW_BLOCK)).view(N, -1, _DRAW_BLOCK)
    sums_NB = blocks_NBW.sum(-1, dtype=torch.float64)
    ends_NB = sums_NB.cumsum(-1)
    target_N1 = uniform_N[:, None] * ends_NB[:, -1:]
    block_N1 = torch.searchsorted(ends_NB, target_N1).clamp(max=sums_NB.shape[1] - 1)
    before_N1 = ends_NB.gather(1, block_N1) - sums_NB.gather(1, block_N1)
    inside_NW = blocks_NBW[torch.arange(N, device=p_NV.device), block_N1[:, 0]].double().cumsum(-1)
    within_N = torch.searchsorted(inside_NW, target_N1 - before_N1)[:, 0].clamp(max=_DRAW_BLOCK - 1)
    return (block_N1[:, 0] * _DRAW_BLOCK + within_N).clamp(max=V - 1)


def _last(tensor_name: str) -> str:
    return tensor_name.removesuffix(".weight").rpartition(".")[2]
