"""Rows of any length in one forward pass, without padding: the cache and the attention that this takes.

The tokens of all rows stand in one sequence [1, N]; every layer but attention works on N tokens and no more.
The cache keeps each row's keys and values from column 0 on, so that a column is a position, and the attention
function gives each row's queries their own columns. A row may be given guesses (`modeling/lookup.py`): those
that turn out wrong are overwritten by what comes next.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from regrow.modeling.buffers import BufferLayer

_NAME = "regrow_packed"
# Model types whose attention is nothing but softmax over keys and values of one head size, as their own code
# in transformers has it; the tests compare each with one-by-one generation. Others may build masks, biases or
# sinks inside their layers, which packing would silently leave out.
PLAIN = (
    *("gemma", "glm", "glm4", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
)
_GROWTH_COLUMNS = 256
_GROUP_ROWS = 8


class _Group:
    """Neighbouring rows whose attention is computed together.

    Args:
        rows: which rows of the cache.
        tokens: which tokens of the pass.
        starts: positions of the rows' first new tokens.
        counts: how many new tokens each has.
        device: where the pass runs.

    Attributes:
        width: the most new tokens of a row.
        num_columns: columns that the longest row fills after this pass.
        is_fresh: all rows begin in this pass.
        slots: for each token its row and its place among the row's new tokens, or None where all rows have
            equally many.
    """

    def __init__(
        self, rows: slice, tokens: slice, starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
        self.rows, self.tokens = rows, tokens
        self.num_rows, self.width, self.is_fresh = len(counts), max(counts), not any(starts)
        self.num_columns = max(start + count for start, count in zip(starts, counts, strict=True))
        self.slots: tuple[Tensor, Tensor] | None = None
        if len(set(counts)) > 1:
            rows_N, places_N = _rows_and_places(counts)
            self.slots = rows_N.to(device), places_N.to(device)
        self._starts, self._device = starts, device
        self._visible: dict[int, Tensor] = {}

    def visible(self, repeats: int) -> Tensor:
        """Columns that a query sees, bool [rows, 1, width * repeats, columns]; each query `repeats` times."""
        if repeats not in self._visible:
            starts_R1 = torch.tensor(self._starts, device=self._device)[:, None]
            places_S = torch.arange(self.width, device=self._device).repeat_interleave(repeats)
            columns_W = torch.arange(self.num_columns, device=self._device)
            self._visible[repeats] = columns_W <= (starts_R1 + places_S)[:, None, :, None]
        return self._visible[repeats]


class Packing:
    """Where the tokens of one forward pass belong.

    Args:
        starts: tokens that the cache holds of each row that takes part.
        counts: new tokens of each.
        first: the first of these rows; the others follow it.
        device: where the pass runs.

    Attributes:
        rows: row of every token, [N].
        columns: its column in the cache, which is its position, [N].
        last: each row's last token, [rows].
        groups: rows whose attention is computed together; all of them on a GPU.
    """

    def __init__(
        self, starts: Sequence[int], counts: Sequence[int], first: int, device: torch.device
    ) -> None:
        size = _GROUP_ROWS if device.type == "cpu" else len(counts)
        self.groups: list[_Group] = []
        token = 0
        for begin in range(0, len(counts), size):
            some = counts[begin : begin + size]
            rows = slice(first + begin, first + begin + len(some))
            tokens = slice(token, token + sum(some))
            self.groups.append(_Group(rows, tokens, starts[begin : begin + size], some, device))
            token = tokens.stop
        rows_N, places_N = _rows_and_places(counts)
        self.rows = (first + rows_N).to(device)
        self.columns = (torch.tensor(starts)[rows_N] + places_N).to(device)
        self.last = (torch.tensor(counts).cumsum(0) - 1).to(device)


class _PackedLayer(BufferLayer):
    """A layer whose rows write columns of their own."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        device, dtype = key_states.device, key_states.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)  # attention would cast all of it in every step
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self._owner.max_rows, states.shape[1], self._owner.num_columns, states.shape[3])
            setattr(self, name, torch.zeros(shape, dtype=dtype, device=device))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        packing = self._owner.packing
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[packing.rows, :, packing.columns] = states[0].transpose(0, 1).to(buffer.dtype)
        return self.keys, self.values

    def grow(self, num_columns: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], num_columns, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def clear(self, row: int) -> None:
        """Whatever a row's predecessor left there must not meet a weight of zero (0 x NaN)."""
        if self.is_initialized:
            self.keys[row].zero_()
            self.values[row].zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # nobody asks for a mask

    def get_seq_length(self) -> int:
        return 0  # positions are always given


class PackedCache(Cache):
    """Keys and values of a batch whose rows come, grow by any number of tokens, and go.

    Attributes:
        lengths: tokens held of each row.
        packing: the forward pass that is being made.
        max_rows, num_columns: room of the buffers.
    """

    packing: Packing

    def __init__(self, config: Any, max_rows: int) -> None:
        self._buffers = [_PackedLayer(self) for _ in DynamicCache(config=config).layers]
        super().__init__(layers=list(self._buffers))
        self.max_rows, self.num_columns = max_rows, 0
        self.lengths: list[int] = []

    def pack(self, counts: Sequence[int], first: int, device: torch.device) -> Packing:
        """Make room for a pass that gives so many tokens to each row from `first` on; new rows begin."""
        self.lengths += [0] * (first + len(counts) - len(self.lengths))
        starts = self.lengths[first:]
        needed = max(start + count for start, count in zip(starts, counts, strict=True))
        if needed > self.num_columns:
            self.num_columns = needed + _GROWTH_COLUMNS
            for layer in self._buffers:
                if layer.is_initialized:
                    layer.grow(self.num_columns)
        for row, start in enumerate(starts, first):
            if not start:
                for layer in self._buffers:
                    layer.clear(row)
        self.packing = Packing(starts, counts, first, device)
        return self.packing

    def advance(self, counts: Sequence[int], first: int) -> None:
        """Keep so many new tokens of each row from `first` on; the next pass overwrites the rest."""
        for row, count in enumerate(counts, first):
            self.lengths[row] += count

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows (ascending positions), in their order."""
        for layer in self._buffers:
            for target, source in enumerate(rows):
                if target != source:
                    layer.move(source, target, slice(self.lengths[source]))
        self.lengths = [self.lengths[row] for row in rows]


def can_pack(causal: Any) -> bool:
    """Whether a model is known to attend to everything before, plainly, through PyTorch's own attention."""
    config = causal.config
    if config.model_type not in PLAIN or not type(causal).__module__.startswith("transformers."):
        return False
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    return config._attn_implementation == "sdpa" and layers <= {"DynamicLayer"}


@contextlib.contextmanager
def packed_rows(causal: Any) -> Iterator[None]:
    """Let a model for which `can_pack` holds use `packed_attention` inside the block."""
    AttentionInterface.register(_NAME, packed_attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    causal.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        causal.set_attn_implementation("sdpa")


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of every row's new tokens to the row: the function that transformers calls in every layer.

    Args:
        query: [1, heads, N, head size].
        key, value: the cache's buffers, [rows, key/value heads, columns, head size].
        attention_mask: not used; `packing` says who sees what.
        packing: where the N tokens belong.
        scaling: factor of the products of queries and keys; None is one over the root of the head size.

    Returns:
        [1, N, heads, head size], and None for the attention weights.
    """
    query_NHD = query[0].transpose(0, 1)
    parts = [
        _attend(
            query_NHD[group.tokens],
            key[group.rows, :, : group.num_columns],
            value[group.rows, :, : group.num_columns],
            group,
            scaling,
        )
        for group in packing.groups
    ]
    return torch.cat(parts)[None], None


def _attend(
    query_NHD: Tensor, key_RKWD: Tensor, value_RKWD: Tensor, group: _Group, scaling: float | None
) -> Tensor:
    """Attention of one group, [N, heads, head size]; rows with fewer new tokens are padded behind them."""
    num_heads, size = query_NHD.shape[1:]
    num_shared = key_RKWD.shape[1]
    shape = (group.num_rows, group.width, num_heads, size)
    if group.slots is None:
        padded = query_NHD.view(shape)
    else:
        padded = query_NHD.new_zeros(shape)
        padded[group.slots] = query_NHD
    if group.is_fresh:
        # Pads stand behind what counts, so plain causal attention keeps them out.
        output = scaled_dot_product_attention(
            padded.transpose(1, 2),
            key_RKWD,
            value_RKWD,
            is_causal=True,
            scale=scaling,
            enable_gqa=num_heads != num_shared,
        ).transpose(1, 2)
    else:
        # Heads that share keys are rows of one product: on a CPU single rows are several times slower.
        each = num_heads // num_shared
        folded = padded.view(*shape[:2], num_shared, each, size).transpose(1, 2).flatten(2, 3)
        output = scaled_dot_product_attention(
            folded, key_RKWD, value_RKWD, attn_mask=group.visible(each), scale=scaling
        )
        output = output.view(group.num_rows, num_shared, group.width, each, size).transpose(1, 2)
    output = output.reshape(shape)
    return output.flatten(0, 1) if group.slots is None else output[group.slots]


def _rows_and_places(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each token its row and its place among the row's tokens, [N] each."""
    count_R = torch.tensor(counts)
    rows_N = torch.repeat_interleave(torch.arange(len(counts)), count_R)
    return rows_N, torch.arange(len(rows_N)) - (count_R.cumsum(0) - count_R)[rows_N]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
