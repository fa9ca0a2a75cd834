# ruff: noqa: N815  (shape suffixes on attributes)
"""Sums over the tokens that flow through the MLPs, gathered by forward hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow.errors import RunError, UserError
from regrow.types import MlpSite

Fields = dict[str, dict[str, NDArray[Any]]]  # site -> field -> finished statistics

# A gram is symmetric: only blocks on and above the diagonal are computed, which saves 3/8 of the work.
_GRAM_BLOCKS = 4
_BLOCK_TOKENS = 256


@dataclass
class Batch:
    """The batch in flight, as the hooks see it.

    Attributes:
        sequences: index of the calibration sequence in every row.
        real_BS: True at real tokens.
        calibration_T, held_out_T: positions in the flattened batch of the real tokens of either share.
    """

    sequences: list[int]
    real_BS: Tensor
    calibration_T: Tensor
    held_out_T: Tensor

    @classmethod
    def of(cls, sequences: list[int], real_BS: Tensor, held_out: frozenset[int]) -> "Batch":
        """Split the real tokens of a batch by the share that their sequence belongs to."""
        is_held_out_B = torch.tensor([row in held_out for row in sequences], device=real_BS.device)
        flat = [
            (real_BS & share_B[:, None]).flatten().nonzero()[:, 0]
            for share_B in (~is_held_out_B, is_held_out_B)
        ]
        return cls(sequences, real_BS, flat[0], flat[1])


class SiteSums:
    """The statistics of one site; see `regrow.pruning.statistics` for their meaning."""

    def __init__(self, site: MlpSite, device: torch.device, *, correlations: bool, fisher: bool) -> None:
        self.site, self._device = site, device
        self.num_tokens = [0, 0]
        self._x = torch.zeros(3, site.width, dtype=torch.float64, device=device)
        self._h = torch.zeros(2, site.hidden_size, dtype=torch.float64, device=device)
        self.fisher_F = torch.zeros(site.width, dtype=torch.float64, device=device) if fisher else None
        self.output_fisher_DD = (
            torch.zeros(site.hidden_size, site.hidden_size, device=device) if fisher else None
        )
        # At a site that is never reached (an expert), the matrices stay unallocated.
        self._correlations = correlations
        self._grams: list[Tensor | None] = [None, None]

    def add_input(self, h_BSD: Tensor, batch: Batch) -> None:
        """Count the inputs of gate_proj and up_proj."""
        h_TD = h_BSD.reshape(-1, h_BSD.shape[-1])
        added = channel_sums(_calibration(h_TD, batch))[:2]
        self._check(added, h_BSD, batch, "gate_proj")
        self._h += added

    def add(self, x_BSF: Tensor, batch: Batch) -> None:
        """Count the inputs of down_proj."""
        flat_TF = x_BSF.reshape(-1, x_BSF.shape[-1])
        x_TF = _calibration(flat_TF, batch)
        added = channel_sums(x_TF)
        self._check(added, x_BSF, batch, "down_proj")
        self._x += added
        self.num_tokens[0] += len(batch.calibration_T)
        self.num_tokens[1] += len(batch.held_out_T)
        if self._correlations:
            self._add_gram(0, x_TF.float())
            if len(batch.held_out_T):
                held_out_TF = flat_TF[batch.held_out_T].float()
                self._check(held_out_TF.sum(0), x_BSF, batch, "down_proj")
                self._add_gram(1, held_out_TF)

    def _add_gram(self, share: int, x_TF: Tensor) -> None:
        width = x_TF.shape[1]
        gram_FF = self._grams[share]
        if gram_FF is None:
            gram_FF = self._grams[share] = torch.zeros(width, width, device=self._device)
        if not len(x_TF):
            return
        step = -(-width // _GRAM_BLOCKS)
        for begin in range(0, width, step):
            rows = x_TF[:, begin : begin + step]
            gram_FF[begin : begin + step, begin:].addmm_(rows.T, x_TF[:, begin:])

    def _check(self, added: Tensor, value_BSX: Tensor, batch: Batch, projection: str) -> None:
        if bool(torch.isfinite(added).all()):
            return
        # Values whose squares overflow float32 are as good as infinite here.
        finite_BS = torch.isfinite(value_BSX.reshape(*batch.real_BS.shape, -1).float().square()).all(-1)
        bad_B = (~finite_BS & batch.real_BS).any(1)
        where = (
            f"sequence {batch.sequences[int(bad_B.int().argmax())]}" if bool(bad_B.any()) else "a sequence"
        )
        raise RunError(
            f"{self.site.name}: the input of {projection} is NaN or infinite in {where} of the calibration "
            "corpus (counted from 0); check the model's weights, or leave that row out."
        )

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Field -> array, complete and on the CPU."""
        fields = dict(zip(("sum_squares", "sum_absolute", "sum"), self._x.cpu().numpy(), strict=True))
        fields |= zip(("input_sum_squares", "input_sum_absolute"), self._h.cpu().numpy(), strict=True)
        fields["num_tokens"] = np.array(self.num_tokens, dtype=np.int64)
        if self.fisher_F is not None:
            assert self.output_fisher_DD is not None
            fields["fisher"] = self.fisher_F.cpu().numpy()
            fields["output_fisher"] = self.output_fisher_DD.cpu().numpy()
        if self._correlations:
            for share, field in enumerate(("gram", "held_out_gram")):
                fields[field] = self._mirrored(share)
        return fields

    def _mirrored(self, share: int) -> NDArray[Any]:
        """The whole symmetric matrix, in place; the accumulator is spent afterwards."""
        gram_FF, self._grams[share] = self._grams[share], None
        width = self.site.width
        if gram_FF is None:
            return np.zeros((width, width), np.float32)
        step = -(-width // _GRAM_BLOCKS)
        for begin in range(0, width, step):
            block = gram_FF[begin : begin + step, begin : begin + step]
            block.copy_((block + block.T) / 2)
            gram_FF[begin + step :, begin : begin + step] = gram_FF[begin : begin + step, begin + step :].T
        return gram_FF.cpu().numpy()


class Hooks:
    """Feeds sites from the modules of a model while `batch` says which tokens count."""

    def __init__(self, model: nn.Module, sums: Sequence[SiteSums]) -> None:
        self.batch: Batch | None = None
        self.sums = list(sums)
        self._handles: list[Any] = []
        for entry in sums:
            module = model.get_submodule(entry.site.module or "")
            self.add(module, entry)

    def add(self, mlp: nn.Module, entry: SiteSums) -> None:
        """Feed one site from an MLP module."""
        gate, down = (projection(mlp, ref.name) for ref in (entry.site.gate, entry.site.down))
        self._handles.append(gate.register_forward_pre_hook(self._hook(entry.add_input)))
        self._handles.append(down.register_forward_pre_hook(self._hook(entry.add)))

    def _hook(self, count: Callable[[Tensor, Batch], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self.batch is not None:
                with torch.no_grad():
                    count(arguments[0].detach(), self.batch)

        return hook

    def remove(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def hooked(model: nn.Module, sums: Sequence[SiteSums]) -> Iterator[Hooks]:
    """Hooks that are gone when the block ends."""
    hooks = Hooks(model, sums)
    try:
        yield hooks
    finally:
        hooks.remove()


def projection(mlp: nn.Module, tensor_name: str) -> nn.Module:
    """The linear module of an MLP that holds a tensor of the checkpoint.

    Raises:
        UserError: it has none of its own.
    """
    name = tensor_name.removesuffix(".weight").rpartition(".")[2]
    module = getattr(mlp, name, None)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{type(mlp).__name__} keeps no projection {name} of its own, so its channels cannot be "
            "calibrated; use a criterion that needs no data (magnitude, random) with refit: false."
        )
    return module


def channel_sums(x_TX: Tensor) -> Tensor:
    """Sums over tokens of the squares, the absolute values and the values, fp64 [3, X].

    On a CPU block by block, so that the fp32 copy stays in the cache: a tenth of the time of whole tensors.
    """
    added_3X = torch.zeros(3, x_TX.shape[1], dtype=torch.float64, device=x_TX.device)
    for block_TX in x_TX.split(_BLOCK_TOKENS if x_TX.device.type == "cpu" else max(len(x_TX), 1)):
        values_TX = block_TX.to(torch.float32, copy=True)
        added_3X[2] += values_TX.sum(0)
        added_3X[1] += values_TX.abs_().sum(0)
        added_3X[0] += values_TX.square_().sum(0)
    return added_3X


def _calibration(flat_TX: Tensor, batch: Batch) -> Tensor:
    """The tokens of the calibration share, without a copy where that is all of them."""
    return flat_TX if len(batch.calibration_T) == len(flat_TX) else flat_TX[batch.calibration_T]
