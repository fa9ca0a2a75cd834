"""From conversations to token ids, exactly as the model will see them in use, and which of them it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regrow.data.corpora import Example, Message
from regrow.errors import UserError

_OPEN_THINKING, _CLOSE_THINKING = "<think>", "\n</think>\n\n"


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    Attributes:
        input_ids: token ids, at most `max_length`.
        response_mask: True where the assistant writes the token (its end-of-turn token included); in a plain
            text everywhere.
        truncated: tokens beyond `max_length` were cut off.
    """

    input_ids: list[int]
    response_mask: list[bool]
    truncated: bool = False


def render_prompt(tokenizer: Any, messages: Sequence[Message], enable_thinking: bool | None = None) -> str:
    """The text before the assistant's answer, header of the assistant's turn included.

    Raises:
        UserError: there is no chat template, or it refuses the conversation.
    """
    return _render(tokenizer, messages, enable_thinking, add_generation_prompt=True)


def render_conversation(
    tokenizer: Any, messages: Sequence[Message], enable_thinking: bool | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and the spans (begin, end) that the assistant writes, turn ends included.

    The last answer follows exactly the prompt that generation would use, so a thinking block that the
    template opens or closes there in use is there in training too. An earlier answer counts as written by the
    assistant where the history shows it behind that same prompt (Qwen's templates drop the thinking block
    from the history; such turns are context).

    Raises:
        UserError: there is no chat template, it refuses the conversation, or it changes the answer's text.
    """
    text, last_begin = _end_with_prompt_and_answer(tokenizer, messages, enable_thinking)
    spans: list[tuple[int, int]] = []
    for position, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        begin = len(render_prompt(tokenizer, messages[:position], enable_thinking))
        upto = _render(tokenizer, messages[: position + 1], enable_thinking)
        end = _common_prefix(text, upto)
        if begin < end:
            spans.append((begin, end))
    if last_begin < len(text):
        spans.append((last_begin, len(text)))
    return text, spans


def encode_example(
    tokenizer: Any, example: Example, *, max_length: int, enable_thinking: bool | None = None
) -> Encoded:
    """Tokens and response mask of a row, truncated to `max_length`. Plain text gets no template.

    Raises:
        UserError: as `render_conversation`.
    """
    ids, mask = tokenize_example(tokenizer, example, enable_thinking, set(turn_end_ids(tokenizer)))
    return Encoded(ids[:max_length], mask[:max_length], len(ids) > max_length)


def tokenize_example(
    tokenizer: Any, example: Example, enable_thinking: bool | None, end_ids: set[int]
) -> tuple[list[int], list[bool]]:
    """All tokens of a row and the response mask; `end_ids` are `turn_end_ids(tokenizer)`."""
    if example.text is not None:
        ids = list(tokenizer(example.text, verbose=False)["input_ids"])
        return ids, [True] * len(ids)
    text, spans = render_conversation(tokenizer, example.messages, enable_thinking)
    ids, mask = [], []
    cursor = 0
    for begin, end in [*spans, (len(text), len(text))]:
        # prompt and answer are tokenized apart, as they are when the model generates
        before, inside = _ids(tokenizer, text[cursor:begin]), _ids(tokenizer, text[begin:end])
        last = max((i for i, token in enumerate(inside) if token in end_ids), default=len(inside) - 1)
        ids += before + inside
        mask += [False] * len(before) + [i <= last for i in range(len(inside))]
        cursor = end
    return ids, mask


def turn_end_ids(tokenizer: Any) -> list[int]:
    """The special token with which the chat template ends an assistant's turn; empty where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    answer = "regrow answers"
    messages = [{"role": "user", "content": "regrow asks"}, {"role": "assistant", "content": answer}]
    text = _render(tokenizer, messages, None)
    ids = _ids(tokenizer, text[text.rfind(answer) + len(answer) :])
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {int(i) for i, token in added.items() if token.special}
    return ids[:1] if ids and ids[0] in special else []


def require_chat_template(tokenizer: Any) -> None:
    """Raises:
    UserError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"The tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'the model'} has no chat template; "
            "use plain text, or a model that has one."
        )


def _end_with_prompt_and_answer(
    tokenizer: Any, messages: Sequence[Message], enable_thinking: bool | None
) -> tuple[str, int]:
    """The conversation's text, and where the last answer begins (its length if the user spoke last)."""
    full = _render(tokenizer, messages, enable_thinking)
    if messages[-1]["role"] != "assistant":
        return full, len(full)
    prompt = render_prompt(tokenizer, messages[:-1], enable_thinking)
    if full.startswith(prompt):
        return full, len(prompt)
    content = messages[-1]["content"]
    at = full.rfind(content)
    if at < 0:
        content = content.strip()
        at = full.rfind(content)
    if at < 0:
        raise UserError("The chat template changes the assistant's text, so its tokens cannot be told apart.")
    if prompt.rstrip().endswith(_OPEN_THINKING) and _CLOSE_THINKING.strip() not in content:
        content = _CLOSE_THINKING + content  # an answer without thoughts closes the block at once
    return prompt + content + full[at + len(content.removeprefix(_CLOSE_THINKING)) :], len(prompt)


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    enable_thinking: bool | None,
    add_generation_prompt: bool = False,
) -> str:
    require_chat_template(tokenizer)
    extra = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **extra
        )
    except Exception as error:  # jinja's errors, and whatever the template raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The chat template refuses a conversation ({reason}); check its turns.") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _common_prefix(a: str, b: str) -> int:
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
