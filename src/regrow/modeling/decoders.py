"""A model with its cache: prompts and tokens in, logits of what follows out."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from regrow.modeling.hidden import causal_model
from regrow.modeling.packed import PackedCache, can_pack, packed_rows
from regrow.modeling.row_cache import RowCache


class Decoder(Protocol):
    """Rows in flight, in the order in which they were read.

    Attributes:
        takes_guesses: whether a step may hold more than one token of a row.
    """

    takes_guesses: bool

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin rows behind the others; logits [prompts, V] of their first answer token."""

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Give every row its next tokens; logits [N, V] of what follows each of them, row after row."""

    def advance(self, counts: Sequence[int]) -> None:
        """Say how many of each row's tokens in the last step stay."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row that is not in the list (ascending positions)."""


@contextlib.contextmanager
def open_decoder(model: Any, max_rows: int) -> Iterator[Decoder]:
    """The decoder that suits the model: packed rows where its layers allow it, else rows in lockstep."""
    causal = causal_model(model)
    if can_pack(causal):
        with packed_rows(causal):
            yield PackedDecoder(model, max_rows)
    else:
        yield LockstepDecoder(model, max_rows)


class PackedDecoder:
    """For layers that attend to everything before: no pads, any number of a row's tokens at a time."""

    takes_guesses = True

    def __init__(self, model: Any, max_rows: int) -> None:
        self._forward = _Forward(model)
        self._cache = PackedCache(self._forward.config, max_rows)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts in one pass; none of their tokens is computed for nothing."""
        first = len(self._cache.lengths)
        logits = self._pass(prompts, first, only_last=True)
        self._cache.advance([len(prompt) for prompt in prompts], first)
        return logits

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Judge each row's last token and the guesses behind it."""
        return self._pass(tokens, 0, only_last=False)

    def advance(self, counts: Sequence[int]) -> None:
        """Forget the guesses that were wrong."""
        self._cache.advance(counts, 0)

    def keep(self, rows: Sequence[int]) -> None:
        """Close the gaps."""
        self._cache.keep(rows)

    def _pass(self, tokens: Sequence[Sequence[int]], first: int, only_last: bool) -> Tensor:
        packing = self._cache.pack([len(some) for some in tokens], first, self._forward.device)
        return self._forward(
            torch.tensor([[token for some in tokens for token in some]]),
            packing.columns[None],
            self._cache,
            logits_to_keep=packing.last if only_last else 0,
            packing=packing,
        )[0]


class LockstepDecoder:
    """For linear attention, sliding windows and other kinds: one token of every row at a time."""

    takes_guesses = False

    def __init__(self, model: Any, max_rows: int) -> None:
        self._forward = _Forward(model)
        self._cache = RowCache(self._forward.config, max_rows)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts padded on the left."""
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        # left padding: linear-attention states must not decay over pads after the prompt
        input_ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        starts = torch.tensor([width - length for length in lengths])[:, None]
        columns = torch.arange(width)
        fresh = RowCache(self._forward.config, len(prompts))
        logits = self._forward(
            input_ids, (columns - starts).clamp(min=0), fresh, attention_mask=columns >= starts
        )
        self._cache.absorb(fresh.filled(lengths))
        return logits[:, -1]

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """One token a row."""
        self._cache.reserve()
        mask, positions = self._cache.next_inputs()
        logits = self._forward(torch.tensor(tokens), positions, self._cache, attention_mask=mask)
        self._cache.advance()
        return logits[:, -1]

    def advance(self, counts: Sequence[int]) -> None:
        """Every token stays."""

    def keep(self, rows: Sequence[int]) -> None:
        """Close the gaps."""
        self._cache.keep(rows)


class _Forward:
    """The model's forward pass with a cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = next(model.parameters()).device
        self.config = causal_model(model).config
        # transformers 5.24 renamed the argument
        parameters = inspect.signature(causal_model(model).forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 1,
        **options: Any,
    ) -> Tensor:
        mask = None if attention_mask is None else attention_mask.to(self.device, torch.long)
        logits: Tensor = self._model(
            input_ids=input_ids.to(self.device),
            attention_mask=mask,
            position_ids=position_ids.to(self.device),
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **{self._cache_name: cache},
            **options,
        ).logits
        return logits
