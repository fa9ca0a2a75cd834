"""The multi-token-prediction layer, which transformers does not load, run for its statistics.

At position t it sees the trunk's last hidden state (after the final norm, as the engines pass it on) and the
embedding of token t + 1: fc(concat(norm(embedding), norm(hidden))), then one full-attention decoder layer.
The order of the two halves and the place of the hidden state are those of vLLM's `qwen3_next_mtp.py` (read),
which serves Qwen3-Next and Qwen3.5.
"""

from typing import Any

import torch
from torch import Tensor, nn

from regrow.checkpoint import CheckpointReader
from regrow.errors import UserError
from regrow.pruning.skeleton import Skeleton, load_parameters
from regrow.types import MlpSite


class MtpLayer:
    """One multi-token-prediction layer of a checkpoint.

    Attributes:
        layer: the decoder layer; hooks go on its MLP.
    """

    def __init__(self, skeleton: Skeleton, reader: CheckpointReader, site: MlpSite) -> None:
        prefix = site.down.name.partition("layers.")[0]
        self._skeleton = skeleton
        self._index = skeleton.full_attention_index()
        self.layer = skeleton.new_layer(self._index)
        hidden = site.hidden_size
        norm_class: Any = type(skeleton.decoder.norm)
        eps = skeleton.config.rms_norm_eps
        extra = nn.ModuleDict(
            {
                "pre_fc_norm_embedding": norm_class(hidden, eps=eps),
                "pre_fc_norm_hidden": norm_class(hidden, eps=eps),
                "fc": nn.Linear(2 * hidden, hidden, bias=False),
            }
        )
        for module, base in ((self.layer, f"{prefix}layers.{site.layer}."), (extra, prefix)):
            names = {name: f"{base}{name}" for name, _ in module.named_parameters()}
            missing = next((name for name in names.values() if name not in reader.tensors), None)
            if missing:
                raise UserError(
                    f"The checkpoint lacks {missing}; fetch it again, or drop the layer: mtp: drop."
                )
            load_parameters(module, reader, names, skeleton.dtype, skeleton.device)
        self._extra = extra

    def mlp(self, site: MlpSite) -> nn.Module:
        """The module of the layer's MLP."""
        path = site.down.name.rpartition("layers.")[2].split(".")[1:-2]
        return self.layer.get_submodule(".".join(path))

    @torch.no_grad()
    def run(self, hidden_BSD: Tensor, next_embedding_BSD: Tensor, attention_mask_BS: Tensor) -> None:
        """Run the layer; its output is not needed.

        Args:
            hidden_BSD: the trunk's hidden states after the final norm.
            next_embedding_BSD: embedding of the token after each position.
            attention_mask_BS: 1 where the position and the one after it are real.
        """
        both = (
            self._extra["pre_fc_norm_embedding"](next_embedding_BSD),
            self._extra["pre_fc_norm_hidden"](hidden_BSD),
        )
        mixed_BSD = self._extra["fc"](torch.cat(both, dim=-1))
        self._skeleton.run_layer(self._index, mixed_BSD, attention_mask_BS, layer=self.layer)


def next_tokens(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Ids shifted by one to the left, and the mask of positions that have a next token."""
    ids_BS, mask_BS = torch.zeros_like(input_ids_BS), torch.zeros_like(attention_mask_BS)
    ids_BS[:, :-1] = input_ids_BS[:, 1:]
    mask_BS[:, :-1] = attention_mask_BS[:, 1:]
    return ids_BS, mask_BS
