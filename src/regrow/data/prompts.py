"""Prompts with checkable constraints (IFEval's form) and given responses to them: files, or the Hub."""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from regrow.data.constraints import require_checkers, validate_constraints
from regrow.errors import UserError
from regrow.files import sha256_json

Key = int | str
_BUILTIN = {"builtin:dev": "dev_ifeval.jsonl"}


@dataclass(frozen=True)
class Prompt:
    """One row of IFEval: a prompt and the constraints that its answer must follow.

    Attributes:
        key: identity of the row.
        text: the prompt.
        instruction_ids: kinds of constraint.
        kwargs: their arguments, in the same order, absent ones left out.
        where: how messages name the row.
    """

    key: Key
    text: str
    instruction_ids: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]
    where: str


def read_prompts(source: str | Path, *, limit: int | None = None) -> list[Prompt]:
    """Read and check prompts.

    Args:
        source: a jsonl file (.gz allowed) of `{"key", "prompt", "instruction_id_list", "kwargs"}`, a Hub
            dataset id such as `google/IFEval`, or `builtin:dev` for the development set shipped with regrow.
        limit: use the first `limit` prompts.

    Raises:
        UserError: the source cannot be read, a row is malformed (named by line), a key or a prompt occurs
            twice, or the checkers' data is missing.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for where, row in _prompt_rows(str(source)):
        if limit is not None and len(prompts) >= limit:
            break
        prompt = _prompt(row, where, len(prompts))
        for name, value in (("prompt", prompt.text), ("key", repr(prompt.key))):
            if (first := seen.setdefault(f"{name} {value}", where)) != where:
                raise UserError(f"{where} has the same {name} as {first}; keep one of them.")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source} holds no prompts; it needs one JSON object a line.")
    require_checkers([kind for prompt in prompts for kind in prompt.instruction_ids])
    return prompts


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of keys, texts and constraints: two results are comparable only where it is equal."""
    return sha256_json([[p.key, p.text, list(p.instruction_ids), list(p.kwargs)] for p in prompts])


def read_responses(path: str | Path, prompts: Sequence[Prompt]) -> tuple[dict[Key, dict[str, Any]], int]:
    """Responses by the key of their prompt, and the number of rows that answer none of the prompts.

    Rows are `{"prompt", "response"}`, or `{"key", "response"}` where they have no prompt; further fields
    (`num_tokens`, `finished`) are kept.

    Raises:
        UserError: a malformed line or a second response to one prompt, named by line.
    """
    by_text = {prompt.text: prompt.key for prompt in prompts}
    keys = {prompt.key for prompt in prompts}
    found: dict[Key, dict[str, Any]] = {}
    first_at: dict[Key, str] = {}
    unmatched = 0
    for where, row in read_jsonl(path):
        if not isinstance(row.get("response"), str):
            raise UserError(f"{where} has no text under 'response'; mend the line.")
        if not isinstance(row.get("prompt"), str) and not isinstance(row.get("key"), int | str):
            raise UserError(f"{where} has neither 'prompt' nor 'key'; add the prompt that it answers.")
        key = by_text.get(row["prompt"]) if isinstance(row.get("prompt"), str) else row["key"]
        if key is None or key not in keys:
            unmatched += 1
            continue
        if key in found:
            raise UserError(f"{where} answers the same prompt as {first_at[key]}; keep one of them.")
        found[key], first_at[key] = row, where
    return found, unmatched


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and object of every line that is not blank.

    Raises:
        UserError: the file cannot be read, or a line holds no JSON object (named).
    """
    path = Path(path)
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8-sig") as file
        ):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name} line {number}", _object(line, f"{path.name} line {number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8 text: {type(error).__name__}"
        raise UserError(f"{path} cannot be read ({reason}); check the path or fetch it again.") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{where} is not valid JSON; mend or remove the line.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object; mend or remove the line.")
    return value


def _prompt(row: dict[str, Any], where: str, position: int) -> Prompt:
    text, kinds, kwargs = row.get("prompt"), row.get("instruction_id_list"), row.get("kwargs")
    key = row.get("key", position)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no text under 'prompt'; mend the line.")
    if not isinstance(kinds, list) or not kinds or not isinstance(kwargs, list):
        raise UserError(f"{where} needs lists under 'instruction_id_list' and 'kwargs'; mend the line.")
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise UserError(f"{where} has a key that is neither number nor text; mend the line.")
    return Prompt(key, text, tuple(kinds), tuple(validate_constraints(kinds, kwargs, row=where)), where)


def _prompt_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if source in _BUILTIN:
        yield from read_jsonl(Path(str(resources.files("regrow"))) / "assets" / _BUILTIN[source])
        return
    path = Path(source).expanduser()
    if path.exists():
        yield from read_jsonl(path)
        return
    if source.startswith(("builtin:", ".", "/", "~")) or path.suffix in (".jsonl", ".json", ".gz"):
        known = ", ".join(_BUILTIN)
        raise UserError(f"The prompts {source} do not exist; name a jsonl file, a Hub dataset, or {known}.")
    import datasets

    try:
        rows = datasets.load_dataset(source, split="train")
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec all raise their own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The prompts {source} are no local file and the Hub did not give them ({reason}); name a local "
            "jsonl file, or builtin:dev."
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source} row {number}", dict(row)
