"""Batched generation: finished sequences leave the batch, and text equals one-by-one generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regrow.data.templates import render_prompt, turn_end_ids
from regrow.errors import UserError
from regrow.progress import Progress

Conversation = Sequence[dict[str, str]] | str


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


@torch.no_grad()
def generate_responses(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    enable_thinking: bool | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
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
        do_sample, temperature, top_p, seed: sampling; the random numbers of a conversation depend on the seed
            and its index only, not on who shares its batch. Otherwise greedy, without any penalty.
        on_result: called with (index, response) as soon as an answer is finished, in any order.
        progress: title of the progress line, or None for silence.

    Raises:
        UserError: no chat template, or a prompt that does not fit the model's context.
    """
    prompts = [encode_prompt(tokenizer, item, enable_thinking) for item in conversations]
    end_ids = end_token_ids(tokenizer, model)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    responses: dict[int, Response] = {}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with Progress(progress or "", len(prompts), "answers") as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                length = max(len(prompts[index]) for index in batch)
                ids = torch.zeros(len(batch), length, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, index in enumerate(batch):
                    ids[row, length - len(prompts[index]) :] = torch.tensor(prompts[index])
                    mask[row, length - len(prompts[index]) :] = 1
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=do_sample,
                    eos_token_id=end_ids,
                    pad_token_id=end_ids[0],
                    **({"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}),
                )
                for row, index in enumerate(batch):
                    tokens = output[row, length:].tolist()
                    stop = next((i for i, token in enumerate(tokens) if token in end_ids), None)
                    kept = tokens if stop is None else tokens[:stop]
                    text = tokenizer.decode(kept, skip_special_tokens=True)
                    responses[index] = Response(text, kept, len(kept) + (stop is not None), stop is not None)
                    if on_result:
                        on_result(index, responses[index])
                    bar.advance(1)
    finally:
        model.train(was_training)
    return [responses[index] for index in range(len(prompts))]


def encode_prompt(tokenizer: Any, conversation: Conversation, enable_thinking: bool | None) -> list[int]:
    """Token ids of a prompt, ready for the answer."""
    text = (
        conversation
        if isinstance(conversation, str)
        else render_prompt(tokenizer, conversation, enable_thinking)
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("A prompt is empty after the chat template; leave it out.")
    return ids
