"""The model that is trained: which weights move, in which precision, and what it shares with its teacher."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.checkpoint import CheckpointReader
from regrow.errors import UserError
from regrow.families import causal_lm_name, mlp_sites
from regrow.modeling.hidden import Head, final_hidden, head_of

DTYPES = {"bf16_mixed": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class HiddenStates(nn.Module):
    """A causal language model that stops before its output layer.

    Its forward returns the final hidden states [B, S, D]. It is a module of its own so that DDP and FSDP wrap
    exactly what the loss uses.

    Args:
        model: the causal language model (or a PEFT model around one).
        autocast: run matrix products in bf16 over fp32 weights.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self._head: Head | None = None
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Final hidden states [B, S, D] of rows that are padded on the right.

        Without a mask: in a causal model nothing that follows a token changes its state, so pads on the right
        matter only where they stand. Attention then runs its causal kernels, which skip half of the work.
        """
        with bf16_products(input_ids.device, self.autocast):
            return final_hidden(self.model, input_ids)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their name in the causal language model."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters() if p.requires_grad}

    def keep_head(self, device: torch.device) -> None:
        """Hold on to the frozen output layer as it is now, so that sharding the model leaves it whole."""
        head = head_of(self.model)
        bias = None if head.bias_V is None else head.bias_V.detach().to(device)
        self._head = Head(head.weight_VD.detach().to(device), bias, head.softcap, head.scale)

    @property
    def head(self) -> Head:
        """The frozen output layer, without gradient (call `keep_head` first)."""
        assert self._head is not None
        return self._head


@contextlib.contextmanager
def bf16_products(device: torch.device, enabled: bool) -> Iterator[None]:
    """Autocast to bf16 on a device, or nothing."""
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield


def stored_dtypes(reader: CheckpointReader) -> dict[str, str]:
    """Parameter of the causal language model -> safetensors dtype of the checkpoint."""
    names = ((causal_lm_name(reader.config, name), tensor.dtype) for name, tensor in reader.tensors.items())
    return {name: dtype for name, dtype in names if name is not None}


def trained_names(reader: CheckpointReader, model: nn.Module, train: str) -> list[str]:
    """Names of the parameters that `train` lets move; the embedding and the output layer never do.

    Args:
        reader: the student's checkpoint.
        model: the causal language model.
        train: `"mlp"` (every gated MLP's own tensors) or `"all_but_embeddings"`.
    """
    frozen = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        frozen |= {id(parameter) for parameter in module.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) not in frozen]
    if train == "all_but_embeddings":
        return names
    if train != "mlp":
        raise UserError(f"train is {train!r}; use mlp or all_but_embeddings.")
    modules = tuple(
        f"{site.module}." for site in mlp_sites(reader.config, reader.tensors) if site.module is not None
    )
    return [name for name in names if name.startswith(modules)]


def set_precision(model: nn.Module, trained: list[str], stored: Mapping[str, str], precision: str) -> None:
    """Freeze all but the trained parameters and give each its dtype.

    In mixed precision the trained ones are fp32 and the frozen ones as they are stored, so that the
    embedding, output layer and whatever else stays is bit for bit the checkpoint's, and can be shared.

    Args:
        model: loaded in `DTYPES[precision]`.
        trained: parameters that move.
        stored: parameter -> safetensors dtype in the checkpoint.
        precision: as in the recipe.
    """
    moving = set(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in moving)
        if precision == "bf16_mixed" and name not in moving and stored.get(name) == "BF16":
            parameter.data = parameter.data.to(torch.bfloat16)


def share_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """Let the student's frozen parameters be the teacher's where they are equal; returns the bytes saved."""
    theirs = dict(teacher.named_parameters())
    saved = 0
    for name, parameter in student.named_parameters():
        other = theirs.get(name.replace(".base_layer.", "."))  # PEFT's name for what an adapter wraps
        if other is None or parameter.requires_grad or parameter.data_ptr() == other.data_ptr():
            continue
        alike = (parameter.shape, parameter.dtype) == (other.shape, other.dtype)
        if alike and parameter.device == other.device and torch.equal(parameter, other):
            saved += parameter.nbytes
            parameter.data = other.data
    return saved


def load_dtype(precision: str) -> str:
    """The name of the dtype in which the student is loaded."""
    return _DTYPE_NAMES[DTYPES[precision]]


def product_dtype(precision: str) -> str:
    """The name of the dtype of matrix products, in which a model that is not trained is loaded."""
    return "float32" if precision == "fp32" else "bfloat16"


def head_arguments(**sides: Head | None) -> dict[str, Any]:
    """The output layers of `student` and `teacher`, where there are, as the keyword arguments of a loss."""
    arguments: dict[str, Any] = {}
    for side, head in sides.items():
        if head is not None:
            arguments |= {
                f"{side}_head_VD": head.weight_VD,
                f"{side}_bias": head.bias_V,
                f"{side}_softcap": head.softcap,
                f"{side}_scale": head.scale,
            }
    return arguments
