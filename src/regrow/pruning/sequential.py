"""Calibration of each layer behind layers that are pruned already.

The statistics of a layer are those of its inputs in the pruned model, and beside them stands what the refit
has to make up for: d = (parent's output of the layer - the student's) / scale, so that W x + d at the output
of down_proj would put the student's residual stream back on the parent's. As soon as they are complete the
layer is pruned and refitted with them, by the same functions that `prune` calls later on the file, and the
student's hidden states go through the pruned layer.

Source: layer after layer behind compressed ones, as in GPTQ (arXiv 2210.17323) and SparseGPT (arXiv
2301.00774). What the parent's residual stream as the target adds is measured in docs/experiments.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow.errors import UserError
from regrow.pruning.accumulate import Batch, Fields, hooked, projection
from regrow.pruning.activations import Activations
from regrow.pruning.criteria import Criterion
from regrow.pruning.passes import Job
from regrow.pruning.prune import choose_site, refit_site
from regrow.pruning.skeleton import Skeleton
from regrow.types import MlpSite

# Of the change that the MLP's output makes behind the layer, the share that may not be a multiple of it.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Cut:
    """How layers are pruned on the way.

    Attributes:
        width, criterion: as of `prune`.
        seed: for criteria that draw.
        gradients: fields of the statistics that a backward pass of the parent has gathered before, by site.
    """

    width: int
    criterion: Criterion
    seed: int
    gradients: Fields


class Gathered:
    """The finished statistics of one site, in memory; read like a file of them."""

    def __init__(self, fields: Mapping[str, NDArray[Any]]) -> None:
        self._fields = fields

    def has(self, site: str, field: str) -> bool:
        """Whether that was counted."""
        return field in self._fields

    def read(self, site: str, field: str) -> NDArray[Any]:
        """One tensor."""
        return self._fields[field]

    def num_tokens(self, site: str) -> tuple[int, int]:
        """Tokens that reached the site: calibration, held out."""
        calibration, held_out = self._fields["num_tokens"]
        return int(calibration), int(held_out)


class Shifts:
    """Sums of d x^T and ||d||^2 over the tokens of either share."""

    def __init__(self, hidden: int, width: int, device: torch.device) -> None:
        self._cross = [torch.zeros(hidden, width, device=device) for _ in range(2)]
        self._power = 0.0

    def add(self, d_BSD: Tensor, x_BSF: Tensor, batch: Batch) -> None:
        """Count a batch."""
        d_TD, x_TF = d_BSD.flatten(0, -2), x_BSF.reshape(-1, x_BSF.shape[-1])
        for cross_DF, tokens_T in zip(self._cross, (batch.calibration_T, batch.held_out_T), strict=True):
            cross_DF.addmm_(d_TD[tokens_T].T, x_TF[tokens_T].float())
        self._power += float(d_TD[batch.held_out_T].square().sum(dtype=torch.float64))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Field -> array."""
        shift, held_out_shift = (cross_DF.cpu().numpy() for cross_DF in self._cross)
        power = np.array([self._power])
        return {"shift": shift, "held_out_shift": held_out_shift, "held_out_shift_power": power}


def run_layer_cut(
    job: Job, skeleton: Skeleton, index: int, parent: Activations, student: Activations, cut: Cut
) -> Fields:
    """Gather one layer's statistics behind pruned layers, prune it, and move both models past it.

    Args:
        job: the pass.
        skeleton: its layer `index` holds the parent's weights; afterwards down_proj is the pruned one, with
            zeros in the removed columns.
        parent, student: hidden states before the layer; those behind it replace them.
        cut: how it is pruned.

    Raises:
        UserError: a kind of layer whose residual stream cannot be made up for.
    """
    sites = [site for site in job.sites if site.module is not None and site.layer == index]
    site = _only_dense(sites, index)
    down = projection(skeleton.model.get_submodule(site.module or ""), site.down.name)
    scale = residual_scale(job, skeleton, index, down, student)
    shifts = Shifts(site.hidden_size, site.width, job.device)
    seen: dict[str, Tensor] = {}
    handle = down.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    with hooked(skeleton.model, job.sums([site])) as hooks:
        for position, (_, _, mask_BS, batch) in enumerate(job.loaded()):
            hooks.batch = None
            wanted_BSD = skeleton.run_layer(index, parent.get(position, job.device), mask_BS)
            parent.put(position, wanted_BSD)
            hooks.batch = batch
            found_BSD = skeleton.run_layer(index, student.get(position, job.device), mask_BS)
            shifts.add((wanted_BSD.float() - found_BSD.float()) / scale, seen["x"], batch)
        fields = hooks.sums[0].tensors() | shifts.tensors() | cut.gradients.get(site.name, {})
    handle.remove()

    measured = Gathered(fields)
    kept_K = choose_site(job.reader, site, cut.width, cut.criterion, measured, cut.seed)
    refitted = refit_site(job.reader, site, kept_K, measured)
    pruned_DF = torch.zeros(site.hidden_size, site.width)
    pruned_DF[:, kept_K] = refitted.weight_DK
    _set_weight(down, pruned_DF.to(job.dtype).to(job.device))
    for position, (_, _, mask_BS, _) in enumerate(job.loaded()):
        hidden_BSD = student.get(position, job.device)
        student.put(position, skeleton.run_layer(index, hidden_BSD, mask_BS))
    return {site.name: fields}


def residual_scale(job: Job, skeleton: Skeleton, index: int, down: nn.Module, student: Activations) -> float:
    """What down_proj's output is multiplied with before it is added to the residual stream, measured.

    Runs the first batch in float32 with down_proj and without it.

    Raises:
        UserError: what the layer adds is not a multiple of that output (a norm follows the MLP).
    """
    layer = skeleton.layers[index]
    _, _, mask_BS, batch = next(iter(job.loaded()))
    hidden_BSD = student.get(0, job.device).float()
    weight_DF = down.get_parameter("weight").detach().clone()  # `float()` changes the module's own in place
    seen: dict[str, Tensor] = {}
    handle = down.register_forward_hook(lambda module, inputs, output: seen.update(y=output))
    layer.float()
    with_BSD = skeleton.run_layer(index, hidden_BSD, mask_BS)
    y_BSD = seen["y"].view_as(with_BSD)
    bias = getattr(down, "bias", None)
    if bias is not None:
        y_BSD = y_BSD - bias
    _set_weight(down, torch.zeros_like(down.get_parameter("weight")))
    added_BSD = with_BSD - skeleton.run_layer(index, hidden_BSD, mask_BS)
    handle.remove()
    layer.to(job.dtype)
    _set_weight(down, weight_DF)
    y_TD, added_TD = (value.flatten(0, -2)[batch.real_BS.flatten()] for value in (y_BSD, added_BSD))
    scale = float((added_TD * y_TD).sum() / y_TD.square().sum().clamp(min=1e-30))
    rest = float((added_TD - scale * y_TD).norm() / added_TD.norm().clamp(min=1e-30))
    if not (scale > 0 and rest < _TOLERANCE):
        raise UserError(
            f"{type(layer).__name__} does not add its MLP's output to the residual stream as it is, so "
            "nothing can be made up for there; use method: layerwise or in_memory."
        )
    return scale


def _only_dense(sites: list[MlpSite], index: int) -> MlpSite:
    if len(sites) != 1 or sites[0].kind != "dense":
        raise UserError(
            f"Layer {index} has not exactly one dense MLP, which method: sequential needs; use method: "
            "layerwise or in_memory."
        )
    return sites[0]


def _set_weight(down: nn.Module, weight_DF: Tensor) -> None:
    down._parameters["weight"] = nn.Parameter(weight_DF, requires_grad=False)
