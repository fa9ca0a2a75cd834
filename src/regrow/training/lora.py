"""Low-rank adapters with PEFT, and their merge into a checkpoint, one matrix at a time in fp32.

Source: Hu et al., arXiv 2106.09685: W' = W + (alpha / rank) B A.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import Values
from regrow.errors import RunError, UserError
from regrow.training.result import Take, places

DEFAULT_TARGETS = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")


_LINEAR_ATTENTION = ".linear_attn."
_PREFIX = "base_model.model."
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str],
    linear_attention: bool,
    seed: int,
    fp32_adapters: bool,
) -> tuple[PeftModel, list[str]]:
    """Put LoRA adapters on a model's projections (in place); all else is frozen.

    Args:
        model: the causal language model.
        rank, alpha, dropout: LoRA's; the update is scaled by alpha / rank.
        targets: last names of linear layers, e.g. `"gate_proj"`.
        linear_attention: every linear layer of the linear-attention blocks too.
        seed: of the adapters' initial values.
        fp32_adapters: adapters in fp32 whatever the model's dtype.

    Returns:
        the wrapped model, and sentences about targets that matched nothing.

    Raises:
        UserError: no target matches, or one is the embedding or the output layer.
    """
    names, notes = adapted_layers(model, targets, linear_attention)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and fp32_adapters:
            parameter.data = parameter.data.float()
    return wrapped, notes


def adapted_layers(
    model: PreTrainedModel, targets: Sequence[str], linear_attention: bool
) -> tuple[list[str], list[str]]:
    """Full names of the linear layers that get adapters, and sentences about targets without a match."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen: dict[str, None] = {}
    notes = []
    for target in targets:
        found = [
            name
            for name in linear
            if name.rpartition(".")[2] == target and (linear_attention or _LINEAR_ATTENTION not in name)
        ]
        if any(id(linear[name]) in ends for name in found):
            raise UserError(f"The LoRA target {target} is the output layer, which stays as it is; remove it.")
        if not found:
            notes.append(f"The LoRA target {target} matches no linear layer of this model.")
        chosen |= dict.fromkeys(found)
    if linear_attention:
        found = [name for name in linear if _LINEAR_ATTENTION in name]
        if not found:
            notes.append("linear_attention is on, but this model has no linear-attention layers.")
        chosen |= dict.fromkeys(found)
    if not chosen:
        present = sorted({name.rpartition(".")[2] for name, m in linear.items() if id(m) not in ends})
        raise UserError(f"No LoRA target matches; this model's linear layers are {', '.join(present)}.")
    return list(chosen), notes


def merged_tensors(
    reader: CheckpointReader, adapters: Mapping[str, Tensor], *, rank: int, alpha: int
) -> dict[str, Values]:
    """New values of the checkpoint's tensors: W + (alpha / rank) B A, each made when it is written.

    Args:
        reader: the student's checkpoint; W is read from it in fp32.
        adapters: `trained_state` of a PEFT model: names of A and B -> values.
        rank, alpha: as in training.

    Raises:
        RunError: an adapter has no tensor in the checkpoint.
    """
    merged: dict[str, Values] = {}
    where = {inner: (name, take) for name, (inner, take) in places(reader).items()}
    for key, a_RD in adapters.items():
        if not key.endswith(_A):
            continue
        stem = key.removesuffix(_A)
        inner = f"{stem.removeprefix(_PREFIX)}.weight"
        if inner not in where:
            raise RunError(
                f"{reader.folder} has no tensor for the adapter on {inner}; leave that target out."
            )
        name, take = where[inner]
        merged[name] = partial(_merge, reader, name, take, a_RD, adapters[stem + _B], alpha / rank)
    return merged


def _merge(
    reader: CheckpointReader, name: str, take: Take, a_RD: Tensor, b_OR: Tensor, scaling: float
) -> NDArray[Any]:
    update_OD = take((b_OR.float() @ a_RD.float()) * scaling)
    return torch.from_numpy(reader.read_float32(name)).add_(update_OD).numpy()
