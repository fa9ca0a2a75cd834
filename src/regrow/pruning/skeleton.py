"""A model without weights whose layers are filled and run one at a time.

The model's own forward pass makes masks, positions and per-layer arguments, so that every architecture is
served without knowing its signatures: all decoder layers but one pass their input on, and that one gets the
hidden states that were stored for it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from regrow.checkpoint import CheckpointReader
from regrow.errors import UserError
from regrow.families import causal_lm_name
from regrow.modeling.load import load_config

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class _Captured(Exception):  # noqa: N818
    """Ends a forward pass once the one layer has run."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class Skeleton:
    """`AutoModelForCausalLM` of a checkpoint on the meta device, its buffers real.

    Attributes:
        model: the causal language model.
        decoder: its text decoder.
        config: the decoder's config.
        dtype: what weights are converted to.
        device: where they are put.
    """

    def __init__(
        self,
        folder: Path,
        reader: CheckpointReader,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        config = load_config(folder, trust_remote_code)
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        self.model.eval()
        self.decoder: Any = self.model.get_decoder()
        self.config: Any = self.decoder.config
        self.dtype, self.device, self._reader = dtype, device, reader
        for buffer_owner in self.model.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    buffer_owner._buffers[name] = buffer.to(device)
        self._stored = {
            name: stored
            for stored in reader.tensors
            if (name := causal_lm_name(reader.config, stored)) is not None
        }

    @property
    def layers(self) -> list[Any]:
        """The decoder layers."""
        return list(self.decoder.layers)

    def full_attention_index(self) -> int:
        """A layer of the kind that multi-token prediction uses."""
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"]
        return kinds.index("full_attention") if "full_attention" in kinds else 0

    def new_layer(self, index: int) -> Any:
        """A further decoder layer of the kind of layer `index`, without weights."""
        with init_empty_weights(include_buffers=False):
            return type(self.layers[index])(self.config, index).to(self.dtype).eval()

    def read(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """The weights of a module of the model, on the CPU; `prefix` is its path with a dot."""
        names = {}
        for name, _ in module.named_parameters():
            stored = self._stored.get(prefix + name)
            if stored is None:
                raise UserError(
                    f"The checkpoint does not hold {prefix}{name} under one name, so it cannot be calibrated "
                    "layer by layer; use method: in_memory."
                )
            names[name] = stored
        return read_parameters(self._reader, names, self._dtypes(names, prefix))

    def _dtypes(self, names: Mapping[str, str], prefix: str) -> dict[str, torch.dtype]:
        """As `from_pretrained` does: one dtype for all, but for those that a class wants in float32."""
        strict = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        half = tuple(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        wide = strict + (half if self.dtype == torch.float16 else ())
        return {
            name: torch.float32 if any(part in (prefix + name).split(".") for part in wide) else self.dtype
            for name in names
        }

    def embed(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """What enters layer 0 [B, S, D]; the embedding must be filled."""
        with _Patched(self.layers, 0, None):
            return self._forward(input_ids=input_ids_BS, attention_mask=attention_mask_BS)

    def run_layer(
        self, index: int, hidden_BSD: Tensor, attention_mask_BS: Tensor, layer: nn.Module | None = None
    ) -> Tensor:
        """The output [B, S, D] of layer `index` (or of another one in its place)."""

        def run(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = inner(hidden_BSD, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        inner: Callable[..., Any] = layer if layer is not None else self.layers[index].forward
        with _Patched(self.layers, index, run):
            return self._forward(inputs_embeds=hidden_BSD, attention_mask=attention_mask_BS)

    def _forward(self, **inputs: Tensor) -> Tensor:
        try:
            self.decoder(**inputs, use_cache=False)
        except _Captured as captured:
            return captured.output
        raise UserError(
            f"{type(self.decoder).__name__} does not run its layers in a way that calibration knows; use "
            "method: in_memory."
        )


class _Patched:
    """Layers pass their input on, but layer `index`, whose replacement ends the forward pass."""

    def __init__(self, layers: list[Any], index: int, run: Callable[..., Tensor] | None) -> None:
        self._layers, self._index, self._run = layers, index, run

    def __enter__(self) -> None:
        def stop(hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            raise _Captured(self._run(hidden_BSD, *args, **kwargs) if self._run else hidden_BSD)

        for index, layer in enumerate(self._layers):
            layer.forward = stop if index == self._index else _pass_on

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            del layer.forward


def _pass_on(hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_BSD


def read_parameters(
    reader: CheckpointReader, names: Mapping[str, str], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Parameter name -> tensor on the CPU; `names` maps to the checkpoint's names."""
    return {name: to_torch(reader, stored).to(dtypes[name]) for name, stored in names.items()}


def to_torch(reader: CheckpointReader, name: str) -> Tensor:
    """A tensor of the checkpoint in its stored dtype."""
    tensor = reader.tensors[name]
    raw = reader.read(name)
    if tensor.dtype == "BF16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(raw)


def load_parameters(
    module: nn.Module,
    reader: CheckpointReader,
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Fill a module's parameters from the checkpoint."""
    fill(module, read_parameters(reader, names, dict.fromkeys(names, dtype)), device)


def fill(module: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a module its weights."""
    for name, value in weights.items():
        owner, _, leaf = name.rpartition(".")
        moved = value.to(device, non_blocking=True)
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(moved, requires_grad=False)


def empty(module: nn.Module) -> None:
    """Take a module's weights away again."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
