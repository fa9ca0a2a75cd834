"""The output layer taken apart: the hidden state that the head multiplies, and everything the head does.

The losses need both so that logits [T, V] are never held.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.errors import RunError, UserError

# What families do to the logits besides the matrix product, by the name their configs give it.
_MULTIPLIERS = {"logit_scale": False, "lm_head_multiplier": False, "logits_scaling": True}  # True: divides
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * (hidden @ weight_VD.T + bias_V)), cap(x) = softcap * tanh(x / softcap).

    Attributes:
        weight_VD: the head's matrix, shared with the embedding where the model ties them.
        bias_V: the head's bias, or None.
        softcap: final soft-capping (Gemma 2), or None.
        scale: factor on the logits (Granite's 1 / logits_scaling, Cohere's logit_scale).
    """

    weight_VD: Tensor  # noqa: N815
    bias_V: Tensor | None  # noqa: N815
    softcap: float | None
    scale: float

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """The logits [..., V] in the weights' dtype; for small T only."""
        logits = nn.functional.linear(hidden_TD, self.weight_VD, self.bias_V) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: nn.Module) -> Head:
    """The output layer of a causal language model (or of a PEFT model around one).

    Raises:
        UserError: the model has no linear output layer.
    """
    causal = causal_model(model)
    layer = causal.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2:
        raise UserError(f"{type(causal).__name__} has no linear output layer; regrow cannot distil it.")
    config = causal.config.get_text_config()
    scale = 1.0
    for name, divides in _MULTIPLIERS.items():
        if value := getattr(config, name, None):
            scale = scale / float(value) if divides else scale * float(value)
    softcap = next((float(value) for name in _SOFTCAPS if (value := getattr(config, name, None))), None)
    return Head(weight, getattr(layer, "bias", None), softcap, scale)


def final_hidden(model: nn.Module, input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None) -> Tensor:
    """Hidden states [B, S, D] after the final norm: what `head_of(model)` is applied to.

    Pad on the right and pass the mask: linear-attention layers carry their state along the row. Pad positions
    hold values without meaning.
    """
    decoder = causal_model(model).get_decoder()
    return decoder(
        input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare `head_of` and `final_hidden` with the model's own logits on a few tokens.

    Raises:
        UserError: they differ, so the architecture does something to its logits that regrow does not know.
        RunError: the logits are not finite.
    """
    causal = causal_model(model)
    head = head_of(model)
    size = min(head.weight_VD.shape[0], causal.config.get_text_config().vocab_size)
    input_ids = (torch.arange(1, 9, device=head.weight_VD.device) * 7919 % size)[None]
    mask = torch.ones_like(input_ids)
    expected = causal(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
    actual = head.logits(final_hidden(model, input_ids, mask)).float()
    if not expected.isfinite().all():
        raise RunError(f"{type(causal).__name__} gives logits that are not finite; its weights are damaged.")
    tolerance = 0.02 if head.weight_VD.dtype != torch.float32 else 1e-4
    if not torch.allclose(actual, expected, atol=tolerance * float(expected.abs().max()), rtol=0):
        raise UserError(
            f"{type(causal).__name__} changes its logits after the output layer in a way regrow does not "
            "know; it cannot be distilled."
        )


def causal_model(model: Any) -> Any:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
