"""Batched generation in which no step is spent on a finished answer, and few on what can be guessed.

A finished sequence leaves the batch at once and a waiting one takes its place, and prompts of like length are
read together. Where the model allows it (`modeling/packed.py`), a step also judges guesses of the next tokens
(`modeling/lookup.py`). The text equals one-by-one generation up to rounding (in fp32: the same text).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.data.templates import render_prompt, turn_end_ids
from regrow.errors import RunError, UserError
from regrow.modeling.decoders import open_decoder
from regrow.modeling.lookup import Lookup
from regrow.modeling.sampling import greedy_tokens, sample_tokens, uniform_stream
from regrow.progress import Progress

Conversation = Sequence[dict[str, str]] | str

_PREFILL_TOKENS = 4_096


@dataclass(frozen=True)
class Response:
    """What a model wrote.

    Attributes:
        text: the decoded answer, without special tokens.
        token_ids: generated tokens, the end token left out.
        num_tokens: tokens generated, the end token counted.
        finished: an end token was written; otherwise `max_new_tokens` cut the answer off.
    """

    text: str
    token_ids: list[int]
    num_tokens: int
    finished: bool


@dataclass
class _Row:
    """A sequence in flight."""

    index: int
    lookup: Lookup
    uniforms: Tensor | None
    tokens: list[int] = field(default_factory=list)
    guess: list[int] = field(default_factory=list)


def generate_responses(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    enable_thinking: bool | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    on_result: Callable[[int, Response], None] | None = None,
    progress: str | None = "generate",
) -> list[Response]:
    """Answer every conversation.

    Args:
        conversations: lists of `{"role", "content"}` ending in a user turn (the chat template is applied), or
            raw prompts as strings (taken as they are).
        max_new_tokens: longest answer.
        batch_size: sequences in flight.
        enable_thinking: passed to the chat template when given.
        temperature, top_p, seed: of sampling; temperature 0 is greedy. The model's own generation config
            gives end tokens and nothing else: no penalty, no top-k.
        numbers: of the conversations, by default 0, 1, ...; what is drawn for one depends on the seed and its
            number only, not on who shares its batch.
        on_result: called with (index, response) as soon as an answer is finished, in any order.
        progress: title of the progress line, or None for silence.

    Returns:
        one response per conversation, in their order.

    Raises:
        UserError: no chat template, a prompt that does not fit the model's context, or a temperature below 0.
        RunError: the device's memory is too small for the batch.
    """
    if not temperature >= 0:
        raise UserError(f"temperature {temperature} is out of range; use 0 for greedy or a number above.")
    prompts = [encode_prompt(tokenizer, item, enable_thinking) for item in conversations]
    check_lengths(model, prompts, max_new_tokens)
    end_ids = set(end_token_ids(tokenizer, model))
    responses: list[Response | None] = [None] * len(prompts)

    def uniforms(index: int) -> Tensor | None:
        if temperature == 0:
            return None
        return uniform_stream(seed, index if numbers is None else numbers[index], max_new_tokens)

    def choose(logits_NV: Tensor, rows: list[_Row]) -> list[int]:
        """The token that follows each position of each row's new tokens."""
        if temperature == 0:
            return greedy_tokens(logits_NV).tolist()
        drawn = torch.cat(
            [
                row.uniforms[len(row.tokens) : len(row.tokens) + 1 + len(row.guess)]
                for row in rows
                if row.uniforms is not None
            ]
        )
        return sample_tokens(
            logits_NV, drawn.to(logits_NV.device), temperature=temperature, top_p=top_p
        ).tolist()

    def accept(row: _Row, chosen: list[int]) -> int:
        """Append the chosen tokens as far as the guesses before them were right; returns how many."""
        right = 0
        while right < len(row.guess) and chosen[right] == row.guess[right] and chosen[right] not in end_ids:
            right += 1
        row.tokens += chosen[: right + 1]
        row.lookup.extend(chosen[: right + 1])
        return right + 1

    def finish(row: _Row) -> None:
        ended = row.tokens[-1] in end_ids
        kept = row.tokens[:-1] if ended else row.tokens
        text = tokenizer.decode(kept, skip_special_tokens=True)
        response = Response(text, kept, len(row.tokens), ended)
        responses[row.index] = response
        if on_result is not None:
            on_result(row.index, response)
        if bar is not None:
            bar.advance(1)

    title = contextlib.nullcontext() if progress is None else Progress(progress, len(prompts), "answers")
    with _evaluating(model), open_decoder(model, min(batch_size, len(prompts))) as decoder, title as bar:
        waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        rows: list[_Row] = []
        while waiting or rows:
            room = batch_size - len(rows)
            if waiting and (not rows or room >= max(batch_size // 8, 1)):
                group = _next_group(waiting, prompts, room)
                new = [_Row(index, Lookup(prompts[index]), uniforms(index)) for index in group]
                logits = decoder.read([prompts[index] for index in group])
                rows += new
            else:
                new = rows
                for row in rows:
                    most = max_new_tokens - len(row.tokens) - 1
                    row.guess = row.lookup.guess(most) if decoder.takes_guesses else []
                logits = decoder.step([[row.tokens[-1], *row.guess] for row in rows])
            chosen = iter(choose(logits, new))
            counts = [accept(row, [next(chosen) for _ in range(1 + len(row.guess))]) for row in new]
            if new is rows:  # a step; what was read stays whole
                decoder.advance(counts)
            done = [row.tokens[-1] in end_ids or len(row.tokens) >= max_new_tokens for row in rows]
            if any(done):
                kept = [position for position, is_done in enumerate(done) if not is_done]
                for row, is_done in zip(rows, done, strict=True):
                    if is_done:
                        finish(row)
                decoder.keep(kept)
                rows = [rows[position] for position in kept]
    return [response for response in responses if response is not None]


def end_token_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Every token that ends an answer, by the configs, the tokenizer or the chat template."""
    ids: set[int] = set(turn_end_ids(tokenizer))
    holders = [tokenizer]
    if model is not None:
        holders += [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    for holder in holders:
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            ids.update(value if isinstance(value, list | tuple) else [value])
    return sorted(int(token) for token in ids)


def closing_ids(tokenizer: Any) -> list[int]:
    """What stands behind a finished answer: the token that ends a turn, or the text; empty without either."""
    return (turn_end_ids(tokenizer) or end_token_ids(tokenizer))[:1]


def encode_prompt(tokenizer: Any, conversation: Conversation, enable_thinking: bool | None) -> list[int]:
    """Token ids of a prompt, ready for the answer.

    Raises:
        UserError: no chat template, or nothing is left of the prompt.
    """
    text = (
        conversation
        if isinstance(conversation, str)
        else render_prompt(tokenizer, conversation, enable_thinking)
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("A prompt has no tokens; leave it out.")
    return ids


def _next_group(waiting: list[int], prompts: list[list[int]], room: int) -> list[int]:
    """Take the longest waiting prompts, as many as fit into the batch and into one forward pass."""
    group = [waiting.pop()]
    width = len(prompts[group[0]])
    while waiting and len(group) < room and width * (len(group) + 1) <= _PREFILL_TOKENS:
        group.append(waiting.pop())
    return group


def check_lengths(model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Refuse prompts that do not fit the model's context together with their answer.

    Raises:
        UserError: naming the prompt.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"Prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
                f"model's context of {limit}; shorten it or lower max_new_tokens."
            )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradients and no dropout, then the model's mode as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError:
        raise RunError("The device's memory is too small for this batch; lower batch_size.") from None
    finally:
        model.train(was_training)
