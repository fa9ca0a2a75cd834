"""From conversations to token ids, exactly as the model will see them in use, and back to who wrote what."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regrow.data.corpora import Example, Message, open_corpus
from regrow.errors import UserError
from regrow.files import sha256_json

CorpusSpec = tuple[str, str, float, int | None]


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


@dataclass(frozen=True)
class EncodedCorpus:
    """A blend of corpora as tokens.

    Attributes:
        rows: encoded rows, in the blend's (seeded) order.
        sources: per corpus: source, split, weight, hash, rows read and used, tokens used.
        hash: hash of the blend: rows' tokens and masks.
        notes: sentences about rows that were left out or truncated.
    """

    rows: list[Encoded]
    sources: list[dict[str, Any]]
    hash: str
    notes: list[str]


def render_prompt(tokenizer: Any, messages: Sequence[Message], enable_thinking: bool | None = None) -> str:
    """The text before the assistant's answer, header of the assistant's turn included."""
    return _render(tokenizer, messages, enable_thinking, add_generation_prompt=True)


def render_conversation(
    tokenizer: Any, messages: Sequence[Message], enable_thinking: bool | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and the spans (begin, end) that the assistant writes, turn ends included.

    The last answer follows exactly the prompt that generation would use, so a thinking block that the
    template puts there in use is there in training too.
    """
    full = _render(tokenizer, messages, enable_thinking)
    spans: list[tuple[int, int]] = []
    if messages[-1]["role"] == "assistant":
        prompt = render_prompt(tokenizer, messages[:-1], enable_thinking)
        if full.startswith(prompt):
            text = full
        else:
            content, tail = _content_and_tail(full, messages[-1]["content"])
            text = prompt + content + tail
        last_begin = len(prompt)
    else:
        text, last_begin = full, len(full)
    cursor = 0
    for position, message in enumerate(messages[:-1]):
        at, content = _find(text, message["content"], cursor)
        if message["role"] == "assistant":
            before = render_prompt(tokenizer, messages[:position], enable_thinking)
            begin = len(before) if text.startswith(before) and cursor <= len(before) <= at else at
            following = _find(text, messages[position + 1]["content"], at + len(content))[0]
            spans.append((begin, min(following, last_begin)))
        cursor = at + len(content)
    if messages[-1]["role"] == "assistant":
        spans.append((last_begin, len(text)))
    return text, spans


def encode_example(
    tokenizer: Any, example: Example, *, max_length: int, enable_thinking: bool | None = None
) -> Encoded:
    """Tokens and response mask of a row, truncated to `max_length`.

    Raises:
        UserError: a conversation meets a tokenizer without a chat template.
    """
    if example.text is not None:
        ids = list(tokenizer(example.text)["input_ids"])
        mask = [True] * len(ids)
    else:
        text, spans = render_conversation(tokenizer, example.messages, enable_thinking)
        ids, mask = _encode_spans(tokenizer, text, spans)
    return Encoded(ids[:max_length], mask[:max_length], len(ids) > max_length)


def encode_corpora(
    tokenizer: Any,
    corpora: Sequence[CorpusSpec],
    *,
    max_length: int,
    enable_thinking: bool | None = None,
    seed: int = 0,
) -> EncodedCorpus:
    """Read, encode and blend corpora.

    Args:
        corpora: (source, split, weight, limit) each. Weights are shares of the blend's tokens; the blend is
            the largest one with these shares that repeats no row.
        max_length: rows are cut off there.
        seed: order of the rows, and which are used.

    Raises:
        UserError: a corpus cannot be read or has no usable rows.
    """
    read: list[list[Encoded]] = []
    sources: list[dict[str, Any]] = []
    notes: list[str] = []
    for position, (source, split, weight, limit) in enumerate(corpora):
        corpus = open_corpus(source, split=split, limit=limit)
        notes += corpus.notes
        rows = [
            encode_example(tokenizer, example, max_length=max_length, enable_thinking=enable_thinking)
            for example in corpus.examples
        ]
        usable = [row for row in rows if len(row.input_ids) > 1]
        if len(usable) < len(rows):
            notes.append(f"{source}: {len(rows) - len(usable)} rows left out (fewer than two tokens).")
        if not usable:
            raise UserError(f"The corpus {source} has no rows of two tokens or more; use another.")
        if truncated := sum(row.truncated for row in usable):
            notes.append(f"{source}: {truncated} of {len(usable)} rows cut off at {max_length} tokens.")
        random.Random(f"{seed}-{position}").shuffle(usable)
        read.append(usable)
        sources.append(
            {
                "source": source,
                "split": split,
                "weight": weight,
                "hash": corpus.hash,
                "rows_read": len(usable),
            }
        )
    blend: list[Encoded] = []
    for rows, entry in zip(_shares(read, [spec[2] for spec in corpora]), sources, strict=True):
        entry["num_rows"] = len(rows)
        entry["num_tokens"] = sum(len(row.input_ids) for row in rows)
        if len(rows) < entry["rows_read"]:
            notes.append(
                f"{entry['source']}: {len(rows)} of {entry['rows_read']} rows used, as its weight asks."
            )
        blend += rows
    random.Random(f"{seed}-blend").shuffle(blend)
    digest = sha256_json([[row.input_ids, "".join("01"[bit] for bit in row.response_mask)] for row in blend])
    return EncodedCorpus(blend, sources, digest, notes)


def turn_end_ids(tokenizer: Any) -> list[int]:
    """Special tokens with which the chat template ends an assistant's turn; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    answer = "regrow answers"
    messages = [{"role": "user", "content": "regrow asks"}, {"role": "assistant", "content": answer}]
    text = _render(tokenizer, messages, None)
    tail = text[text.rfind(answer) + len(answer) :]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | _special_added(tokenizer)
    return ids[:1] if ids and ids[0] in special else []


def _special_added(tokenizer: Any) -> set[int]:
    return {int(i) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    enable_thinking: bool | None,
    add_generation_prompt: bool = False,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"The tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'the model'} has no chat template; "
            "use plain text, or a model that has one."
        )
    extra = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **extra
        )
    except Exception as error:  # jinja's errors, and whatever the template raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The chat template refuses a conversation ({reason}); check its turns.") from None


def _find(text: str, content: str, cursor: int) -> tuple[int, str]:
    """Where a message's content stands in the rendered text; templates may strip it."""
    for candidate in (content, content.strip()):
        at = text.find(candidate, cursor)
        if at >= 0:
            return at, candidate
    return cursor, ""


def _content_and_tail(full: str, content: str) -> tuple[str, str]:
    for candidate in (content, content.strip()):
        at = full.rfind(candidate)
        if at >= 0:
            return candidate, full[at + len(candidate) :]
    raise UserError("The chat template changes the assistant's text; regrow cannot tell its tokens apart.")


def _encode_spans(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Token ids of the text and which of them lie in the spans, up to and including the end-of-turn token."""
    ends = set(turn_end_ids(tokenizer))
    ids: list[int] = []
    mask: list[bool] = []
    cursor = 0
    for begin, end in [*spans, (len(text), len(text))]:
        before = (
            tokenizer(text[cursor:begin], add_special_tokens=False)["input_ids"] if begin > cursor else []
        )
        ids += before
        mask += [False] * len(before)
        inside = tokenizer(text[begin:end], add_special_tokens=False)["input_ids"] if end > begin else []
        last = max((i for i, token in enumerate(inside) if token in ends), default=len(inside) - 1)
        ids += inside
        mask += [i <= last for i in range(len(inside))]
        cursor = end
    return ids, mask


def _shares(read: list[list[Encoded]], weights: list[float]) -> list[list[Encoded]]:
    """The first rows of each corpus such that token counts are in proportion to the weights."""
    if len(read) == 1:
        return read
    tokens = [sum(len(row.input_ids) for row in rows) for rows in read]
    unit = min(count / weight for count, weight in zip(tokens, weights, strict=True))
    chosen: list[list[Encoded]] = []
    for rows, weight in zip(read, weights, strict=True):
        kept: list[Encoded] = []
        total = 0
        for row in rows:
            if total >= unit * weight:
                break
            kept.append(row)
            total += len(row.input_ids)
        chosen.append(kept)
    return chosen
