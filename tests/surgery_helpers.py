"""What several tests of checkpoint surgery share: random plans and an independent in-memory pruning."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from regrow.checkpoint import CheckpointReader
from regrow.families import mlp_sites
from regrow.types import PruningPlan


def random_plan(
    reader: CheckpointReader, seed: int = 0, widths: Mapping[str, int] | None = None
) -> PruningPlan:
    """A plan that cuts every kind of site to about two thirds, or to the widths given."""
    rng = np.random.default_rng(seed)
    sites = mlp_sites(reader.config, reader.tensors)
    by_kind = {site.kind: site.width * 2 // 3 for site in sites} if widths is None else dict(widths)
    if "dense" in by_kind and "mtp" in {site.kind for site in sites}:
        by_kind["mtp"] = by_kind["dense"]
    kept = {
        site.name: tuple(np.sort(rng.choice(site.width, by_kind[site.kind], replace=False)).tolist())
        for site in sites
        if site.kind in by_kind
    }
    return PruningPlan(reader.fingerprint(), by_kind, kept, {"criterion": "random", "seed": seed})


def load(folder: Path, causal: bool = True) -> torch.nn.Module:
    """Load in fp32; every key must be there and fit."""
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for parameter in model.parameters():
        # Out of the mapped file: some kernels sum in another order where memory is not aligned.
        parameter.data = parameter.data.clone()
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.tensor([[3, 141, 59, 26, 53, 58, 97, 93, 238, 46]])
    with torch.no_grad():
        return model(tokens).logits


def prune_in_memory(model: torch.nn.Module, kept: Mapping[str, tuple[int, ...]]) -> None:
    """Cut the MLP modules of a transformers model, found by their attributes and not by regrow's specs."""
    for path, module in model.named_modules():
        match = re.search(r"(?<!\w)layers\.(\d+)\.mlp(\.shared_expert)?$", path)
        if match and hasattr(module, "down_proj"):
            suffix = ".shared_expert" if match.group(2) else ""
            _cut_linears(module, torch.tensor(kept[f"layers.{match.group(1)}{suffix}"]))
        match = re.search(r"(?<!\w)layers\.(\d+)\.mlp\.experts$", path)
        if match:
            number = module.down_proj.shape[0]
            channels = [torch.tensor(kept[f"layers.{match.group(1)}.experts.{e}"]) for e in range(number)]
            gate, up = module.gate_up_proj.data.chunk(2, dim=1)
            module.gate_up_proj = torch.nn.Parameter(
                torch.stack([torch.cat([gate[e][k], up[e][k]]) for e, k in enumerate(channels)])
            )
            module.down_proj = torch.nn.Parameter(
                torch.stack([module.down_proj.data[e][:, k] for e, k in enumerate(channels)])
            )


def _cut_linears(module: Any, kept: torch.Tensor) -> None:
    rows = {"gate_proj": kept, "up_proj": kept}
    if hasattr(module, "gate_up_proj"):
        rows = {"gate_up_proj": torch.cat([kept, kept + module.down_proj.weight.shape[1]])}
    for name, index in rows.items():
        linear = getattr(module, name)
        linear.weight = torch.nn.Parameter(linear.weight.data[index])
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(linear.bias.data[index])
    module.down_proj.weight = torch.nn.Parameter(module.down_proj.weight.data[:, kept].contiguous())


def tensor_bytes(reader: CheckpointReader) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (t.dtype, t.shape, reader.read_bytes(n)) for n, t in reader.tensors.items()}
