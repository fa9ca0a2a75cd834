"""Prompts that the project did not write: a user's file or dataset, or a chat model's own user turns."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regrow.data.constraints import validate_constraints
from regrow.data.corpora import open_corpus
from regrow.errors import UserError
from regrow.synthesis.decontaminate import drop_repeats, near_duplicates
from regrow.synthesis.prompts import Prompt, make_prompt, normalise

_MARK = "\u2042regrow\u2042"
_MIN_WORDS, _MAX_WORDS = 3, 300


def read_prompts(source: str | Path, *, split: str = "train") -> list[Prompt]:
    """The distinct prompts of a file or Hub dataset, in order.

    Args:
        source: a text file with one prompt a line; jsonl rows with `prompt` (and, for checkable ones,
            `instruction_id_list` and `kwargs`, as IFEval's file has them); or whatever `read_corpus` reads,
            whose user turns and system prompts are taken and whose answers are not.
        split: split of a Hub dataset.

    Raises:
        UserError: the source is missing, holds no prompts, or a row's constraints are malformed.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".txt", ".jsonl"):
        prompts = _from_lines(path)
    else:
        prompts = []
        for example in open_corpus(str(source), split=split).examples:
            turns = tuple(m["content"] for m in example.messages if m["role"] == "user")
            system = next((m["content"] for m in example.messages if m["role"] == "system"), None)
            if turns:
                prompts.append(make_prompt(turns, split="train", kind="file", system=system))
    prompts, _ = drop_repeats(prompts, lambda prompt: "\n".join(map(normalise, prompt.turns)))
    if not prompts:
        raise UserError(f"{source} holds no prompts; give one a line, or jsonl rows with prompt or messages.")
    return prompts


def _from_lines(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} cannot be read as UTF-8 text; check the file.") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row: Any = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                raise UserError(f"{path} line {number} is not JSON; mend or remove it.") from None
        prompts.append(_from_row(row, f"{path} line {number}"))
    return prompts


def _from_row(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object; give it a prompt or messages.")
    messages = row.get("messages")
    if isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
    ):
        turns = tuple(m["content"] for m in messages if m.get("role") == "user")
        system = next((m["content"] for m in messages if m.get("role") == "system"), None)
    else:
        text = row.get("prompt", row.get("instruction"))
        if isinstance(text, str) and isinstance(row.get("input"), str) and row["input"].strip():
            text = f"{text}\n\n{row['input']}"
        turns, system = ((text,) if isinstance(text, str) else ()), row.get("system")
    if not turns or not all(turn.strip() for turn in turns) or not isinstance(system, str | None):
        raise UserError(f"{where} has no text under prompt, instruction or messages; mend or remove it.")
    ids, kwargs = row.get("instruction_id_list") or [], row.get("kwargs") or []
    cleaned = validate_constraints(ids, kwargs, row=where)
    return make_prompt(
        turns,
        split="train",
        kind="file",
        system=system,
        instruction_ids=tuple(ids),
        kwargs=tuple(cleaned),
    )


def hold_out(prompts: Sequence[Prompt], num_held_out: int, *, seed: int) -> list[Prompt]:
    """Assign prompts from elsewhere to splits, so that near duplicates stay on one side.

    A random sample becomes the held-out split; a training prompt any of whose user turns equals or nearly
    equals one of a held-out prompt moves there too, until none is left.
    """
    rng = random.Random(f"hold out {seed}")
    held_out = set(rng.sample(range(len(prompts)), min(num_held_out, len(prompts))))
    frontier = sorted(held_out)
    while frontier:
        rest = [i for i in range(len(prompts)) if i not in held_out]
        turns = [(i, turn) for i in rest for turn in prompts[i].turns]
        against = [turn for i in frontier for turn in prompts[i].turns]
        found = near_duplicates([turn for _, turn in turns], against)
        frontier = sorted({turns[position][0] for position, _ in found})
        held_out.update(frontier)
    return [
        make_prompt(
            prompt.turns,
            split="held_out" if i in held_out else "train",
            kind=prompt.kind,
            system=prompt.system,
            instruction_ids=prompt.instruction_ids,
            kwargs=prompt.kwargs,
        )
        for i, prompt in enumerate(prompts)
    ]


def user_header(tokenizer: Any) -> str:
    """What the chat template puts before a user's text: the prompt after which a model writes user turns.

    Raises:
        UserError: there is no chat template, or it does not show the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("The tokenizer has no chat template, so the model cannot write user turns.")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before, mark, _ = text.partition(_MARK)
    if not mark:
        raise UserError(
            "The chat template does not show the user's text, so the model cannot write user turns."
        )
    return before


def self_prompts(generated: Sequence[Any]) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts from user turns that a model wrote after `user_header`; also how many were left out and why.

    Args:
        generated: responses with `text` and `finished`.

    The method is Magpie's (Xu et al., arXiv 2406.08464): an aligned model, shown only the header of a user's
    turn, writes what users ask.
    """
    counts = {"cut_off": 0, "length": 0, "repeated": 0}
    prompts = []
    for response in generated:
        text = response.text.strip()
        if not response.finished:
            counts["cut_off"] += 1
        elif not _MIN_WORDS <= len(text.split()) <= _MAX_WORDS:
            counts["length"] += 1
        else:
            prompts.append(make_prompt((text,), split="train", kind="self"))
    prompts, counts["repeated"] = drop_repeats(prompts, lambda prompt: normalise(prompt.turns[0]))
    return prompts, counts
