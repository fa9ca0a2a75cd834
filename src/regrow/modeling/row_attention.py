"""Attention of one new token per row on a CPU, without reading the columns that a row does not have.

Rows of a `RowCache` begin at different columns: an old row fills the window, a new one its end. Attention of
the whole batch reads the full window for every row, about twice what is needed, and on a CPU that is most of
a decoding step. Rows are ordered by age, so groups of neighbours, each with its own first column, save it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

RowGroup = tuple[int, int, int]  # first row, last row + 1, first column

_NAME = "regrow_rows"


@contextlib.contextmanager
def row_attention(causal: Any) -> Iterator[bool]:
    """Let a model on the CPU use `grouped_attention` inside the block; yields whether it does.

    Models elsewhere, or with another attention than PyTorch's own, keep theirs.
    """
    on_cpu = next(causal.parameters()).device.type == "cpu"
    if not on_cpu or causal.config._attn_implementation != "sdpa":
        yield False
        return
    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    causal.set_attn_implementation(_NAME)
    try:
        yield True
    finally:
        causal.set_attn_implementation("sdpa")


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_groups: list[RowGroup] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """PyTorch's attention, group by group: the attention function that transformers calls in every layer.

    Args:
        query: [B, heads, S, head size]; key and value: [B, key/value heads, W, head size].
        attention_mask: [B, 1, S, W], or None.
        row_groups: which rows may leave out which first columns; None for all rows at once.

    Returns:
        [B, S, heads, head size], and None for the attention weights.
    """
    if row_groups is None or attention_mask is None or len(attention_mask) != len(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    outputs = [
        sdpa_attention_forward(
            module,
            query[first:last],
            key[first:last, :, column:],
            value[first:last, :, column:],
            attention_mask[first:last, :, :, column:],
            **options,
        )[0]
        for first, last, column in row_groups
    ]
    return torch.cat(outputs), None
