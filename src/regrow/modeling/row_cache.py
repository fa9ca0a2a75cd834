"""A key/value cache whose rows come and go while the others keep decoding.

transformers' DynamicCache concatenates the whole cache for every token (about half of a decoding step on a
CPU) and can only drop rows by copying all the others. Here keys and values lie in buffers with room to grow:
a step writes one column, later rows close the gap of a finished one, new rows are written behind.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

from regrow.errors import UserError
from regrow.modeling.buffers import BufferLayer

_GROWTH_COLUMNS = 256


class _RowLayer(BufferLayer):
    """A layer all of whose rows write the same column."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first forward's tensors become the buffers as they are; `RowCache.absorb` copies from them."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        rows, begin, end = self._owner.num_rows, self._owner.begin, self._owner.end
        stop = end + key_states.shape[-2]
        self.keys[:rows, :, end:stop] = key_states
        self.values[:rows, :, end:stop] = value_states
        return self.keys[:rows, :, begin:stop], self.values[:rows, :, begin:stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        length: int = self._owner.end - self._owner.begin
        return length


class RowCache(Cache):
    """The cache of a batch of sequences that end at the same column and begin at different ones.

    All rows write the same column at each step, so a row's tokens occupy `[start, end)` and its distances,
    which sliding windows depend on, are true. Linear-attention layers keep one state per row.

    Attributes:
        num_rows: sequences held; buffers may have room for more.
        begin, end: columns in use, `[begin, end)`.
        starts: first column of every row.
    """

    def __init__(self, config: Any, max_rows: int) -> None:
        layers: list[Any] = []
        for layer in DynamicCache(config=config).layers:
            linear, attention = (
                isinstance(layer, kind) for kind in (LinearAttentionCacheLayerMixin, CacheLayerMixin)
            )
            if (linear and attention) or type(layer).__name__ not in _KNOWN_LAYERS:
                raise UserError(
                    f"The architecture {config.model_type} keeps its context in {type(layer).__name__}, "
                    "which regrow cannot generate with; use a model with plain or linear attention."
                )
            layers.append(_RowLayer(self) if attention else layer)
        super().__init__(layers=layers)
        self._max_rows = max_rows
        self.num_rows = self.begin = self.end = 0
        self.starts: list[int] = []

    def next_inputs(self) -> tuple[Tensor, Tensor]:
        """Mask [rows, columns in use + 1] and position [rows, 1] of the next token of every row."""
        starts = torch.tensor(self.starts)[:, None]
        return torch.arange(self.begin, self.end + 1) >= starts, self.end - starts

    def advance(self) -> None:
        """Count the column that the forward pass has just written."""
        self.end += 1

    def reserve(self) -> None:
        """Make room for one more column."""
        if any(layer.keys.shape[2] <= self.end for layer in self._buffers()):
            self._lay_out(self.end - self.begin)

    def filled(self, lengths: list[int]) -> "RowCache":
        """Say what a first forward pass over left-padded prompts of these lengths has written."""
        self.num_rows, self.begin, self.end = len(lengths), 0, max(lengths)
        self.starts = [self.end - length for length in lengths]
        return self

    def absorb(self, other: "RowCache") -> None:
        """Append the rows of a cache that holds freshly read prompts."""
        if not self.num_rows:
            self.begin = self.end = 0
        width = self.end - self.begin
        if other.end > self.end or not any(layer.is_initialized for layer in self._buffers()):
            for layer, source in zip(self._buffers(), other._buffers(), strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(source.keys[:0], source.values[:0])
            self._lay_out(max(width, other.end))
        first = self.num_rows
        for layer, source in zip(self._buffers(), other._buffers(), strict=True):
            for row, start in enumerate(other.starts):
                # pads stay out: whatever they hold must not meet a weight of zero (0 x NaN)
                length = other.end - start
                layer.keys[first + row, :, self.end - length : self.end] = source.keys[
                    row, :, start : other.end
                ]
                layer.values[first + row, :, self.end - length : self.end] = source.values[
                    row, :, start : other.end
                ]
        for layer, source in zip(self._states(), other._states(), strict=True):
            _append_states(layer, source, keep=first)
        self.num_rows += other.num_rows
        self.starts += [self.end - (other.end - start) for start in other.starts]
        self.begin = min(self.starts)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows (ascending positions), in their order: old rows first, the newest last."""
        for layer in self._buffers():
            for target, source in enumerate(rows):
                if target != source:
                    layer.move(source, target, slice(self.starts[source], self.end))
        for layer in self._states():
            _select_states(layer, rows)
        self.starts = [self.starts[row] for row in rows]
        self.num_rows = len(rows)
        self.begin = min(self.starts, default=self.end)

    def _buffers(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, _RowLayer)]

    def _states(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    def _lay_out(self, end: int) -> None:
        """Move the columns in use so that they end at `end`, in larger buffers."""
        width, columns = self.end - self.begin, end + _GROWTH_COLUMNS
        for layer in self._buffers():
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(self._max_rows, old.shape[1], columns, old.shape[3])
                new[: self.num_rows, :, end - width : end] = old[: self.num_rows, :, self.begin : self.end]
                setattr(layer, name, new)
        self.starts = [start + end - self.end for start in self.starts]
        self.begin, self.end = end - width, end


_KNOWN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")


def _append_states(layer: Any, source: Any, keep: int) -> None:
    for name in ("conv_states", "recurrent_states"):
        held, added = getattr(layer, name), getattr(source, name)
        for key, tensor in added.items():
            if tensor is not None:
                held[key] = tensor if not keep else torch.cat([held[key], tensor])
    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
        setattr(layer, name, dict(getattr(source, name)))
    layer.conv_kernel_size = dict(source.conv_kernel_size)
    layer.dtype, layer.device = source.dtype, source.device


def _select_states(layer: Any, rows: Sequence[int]) -> None:
    for states in (layer.conv_states, layer.recurrent_states):
        for key, tensor in states.items():
            if tensor is not None:
                states[key] = tensor[torch.tensor(rows, dtype=torch.long, device=tensor.device)]
