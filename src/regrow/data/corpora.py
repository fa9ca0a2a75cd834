"""Reading text to train, calibrate or evaluate on: local files, folders, Hub datasets, shipped corpora.

Every row becomes an `Example`: a conversation or a plain text. Unusable rows are counted and named.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.files import sha256_json

Message = dict[str, str]
_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".raw")
_TEXT_DOCUMENT_CHARS = 4_000
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One row of a corpus: a conversation, or a plain text.

    Attributes:
        messages: `{"role", "content"}` turns; empty for plain text.
        text: the plain text; None for a conversation.
        provenance: where the row comes from and what its file says besides the text.
    """

    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """The usable rows of one source.

    Attributes:
        source: as the user named it.
        examples: usable rows, in the source's order.
        hash: SHA-256 of the rows' content.
        notes: sentences about rows that were left out.
    """

    source: str
    examples: list[Example]
    hash: str
    notes: list[str]


class _BadRowError(ValueError):
    """Why a row cannot be used."""


def open_corpus(source: str, *, split: str = "train", limit: int | None = None) -> Corpus:
    """Read a corpus.

    Args:
        source: a json, jsonl, parquet, txt or raw file (.gz allowed); a folder of them; `builtin:<name>`; or
            a Hub dataset id, `owner/name` or `owner/name:config`.
        split: split of a Hub dataset; in a folder, files whose names start with it where there are any.
        limit: use the first `limit` usable rows.

    Raises:
        UserError: the source does not exist, cannot be read, or has no usable rows.
    """
    examples: list[Example] = []
    bad: dict[str, list[str]] = {}
    for where, row in _rows(source, split):
        if limit is not None and len(examples) >= limit:
            break
        try:
            if isinstance(row, _BadRowError):
                raise row
            examples.append(_example(row, where))
        except _BadRowError as reason:
            bad.setdefault(str(reason), []).append(where)
    notes = [
        f"{source}: {len(rows)} row{'s' if len(rows) > 1 else ''} left out ({reason}): "
        f"{', '.join(rows[:3])}{' ...' if len(rows) > 3 else ''}."
        for reason, rows in bad.items()
    ]
    if not examples:
        why = f" ({notes[0].removeprefix(source + ': ').rstrip('.')})" if notes else " (it is empty)"
        raise UserError(
            f"The corpus {source} has no usable rows{why}; rows need instruction/output, messages or text."
        )
    return Corpus(source, examples, _hash(examples), notes)


def read_corpus(source: str, *, split: str = "train", limit: int | None = None) -> list[Example]:
    """The usable rows of a corpus; see `open_corpus`."""
    return open_corpus(source, split=split, limit=limit).examples


def corpus_hash(source: str, *, split: str = "train", limit: int | None = None) -> str:
    """SHA-256 of the content of the rows that are used."""
    return open_corpus(source, split=split, limit=limit).hash


def is_local(source: str) -> bool:
    """Whether a corpus needs no Hub: shipped, an existing path, or what can only be meant as a path."""
    path = Path(source).expanduser()
    looks_like_a_path = source.startswith((".", "/", "~")) or _suffix(path) in _SUFFIXES
    return source.startswith("builtin:") or path.exists() or looks_like_a_path


def _hash(examples: list[Example]) -> str:
    return sha256_json([[example.messages, example.text] for example in examples])


# --- rows -> examples -------------------------------------------------------------------------------------


def _from_messages(row: dict[str, Any]) -> list[Message]:
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise _BadRowError("no messages")
    return [_turn(turn) for turn in turns]


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise _BadRowError("a message is no object")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES:
        raise _BadRowError(f"unknown role {role!r:.30}")
    if isinstance(content, list):  # a list of parts, of which only text can be used
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise _BadRowError("a message with parts that are no text")
        content = "".join(texts)
    if not isinstance(content, str) or not content.strip():
        raise _BadRowError("an empty message")
    message = {"role": _ROLES[role], "content": content}
    if isinstance(turn.get("reasoning_content"), str):
        message["reasoning_content"] = turn["reasoning_content"]
    return message


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    instruction, context, answer = (row.get(key) or "" for key in ("instruction", "input", "output"))
    if not all(isinstance(value, str) for value in (instruction, context, answer)):
        raise _BadRowError("instruction, input or output is no text")
    if not instruction.strip():
        raise _BadRowError("an empty instruction")
    if not answer.strip():
        raise _BadRowError("an empty output")
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return _with_system(row, [("user", question), ("assistant", answer)])


def _from_prompt(row: dict[str, Any]) -> list[Message]:
    answer = row.get("response", row.get("completion"))
    prompt = row["prompt"]
    if isinstance(prompt, list) and isinstance(answer, list):  # conversational prompt-completion rows
        return [_turn(turn) for turn in prompt + answer]
    if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip()):
        raise _BadRowError("an empty prompt or response")
    return _with_system(row, [("user", prompt), ("assistant", answer)])


def _with_system(row: dict[str, Any], turns: list[tuple[str, str]]) -> list[Message]:
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        turns = [("system", system), *turns]
    return [{"role": role, "content": content} for role, content in turns]


# keys that a row must have -> how it becomes a conversation; the first that fits is used
FORMATS: dict[tuple[str, ...], Callable[[dict[str, Any]], list[Message]]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_messages,
    ("instruction", "output"): _from_alpaca,
    ("prompt", "response"): _from_prompt,
    ("prompt", "completion"): _from_prompt,
}


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise _BadRowError("no JSON object")
    for keys, convert in FORMATS.items():
        if all(key in row for key in keys):
            messages = convert(row)
            if not any(turn["role"] == "user" for turn in messages):
                raise _BadRowError("no user turn")
            kept = {key: value for key, value in row.items() if key not in (*keys, "input", "system")}
            return Example(messages=messages, provenance={"row": where, **kept})
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise _BadRowError("an empty text")
        kept = {key: value for key, value in row.items() if key != "text"}
        return Example(text=row["text"], provenance={"row": where, **kept})
    raise _BadRowError(
        "none of the known keys: messages, conversations, instruction and output, prompt and response, text"
    )


# --- sources -> rows --------------------------------------------------------------------------------------


def _rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    if source.startswith("builtin:"):
        yield from _file_rows(_builtin(source.removeprefix("builtin:")))
        return
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file_rows(path)
    elif path.is_dir():
        for file in _folder_files(path, split):
            yield from _file_rows(file)
    elif is_local(source):
        raise UserError(f"The corpus {source} does not exist; check the path.")
    else:
        yield from _hub_rows(source, split)


def _builtin(name: str) -> Path:
    folder = Path(str(resources.files("regrow"))) / "assets" / "corpora"
    for file in sorted(folder.glob("*")) if folder.is_dir() else []:
        if file.name.split(".")[0] == name and _suffix(file) in _SUFFIXES:
            return file
    known = sorted(file.name.split(".")[0] for file in folder.glob("*.json*")) if folder.is_dir() else []
    raise UserError(
        f"builtin:{name} is no corpus shipped with regrow; known are {', '.join(known) or 'none'}."
    )


def _folder_files(folder: Path, split: str) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _suffix(file) in _SUFFIXES]
    of_split = [file for file in files if file.name.startswith(split)]
    if not files:
        raise UserError(f"The corpus folder {folder} holds no {', '.join(_SUFFIXES)} file; name another.")
    return of_split or files


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        raise UserError(f"{path} is none of {', '.join(_SUFFIXES)} (.gz allowed); convert it.")
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8-sig") as file
        ):
            if suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path.name} line {number}", _parse(line)
            elif suffix == ".json":
                yield from _json_rows(path, file.read())
            else:
                yield from _text_rows(path, file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"The corpus {path} cannot be read ({reason}); fetch or convert it again.") from None


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return _BadRowError("no valid JSON")


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{path} is not valid JSON; if it has one object a line, name it .jsonl.") from None
    if isinstance(value, dict):
        value = next(
            (value[key] for key in ("data", "rows", "train") if isinstance(value.get(key), list)), [value]
        )
    if not isinstance(value, list):
        raise UserError(f"{path} holds no list of rows; it needs a JSON list of objects.")
    for number, row in enumerate(value, 1):
        yield f"{path.name} row {number}", row


def _text_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Consecutive lines joined to documents of about 4,000 characters, none of them lost."""
    held: list[str] = []
    first = size = 0
    for number, line in enumerate(lines, 1):
        first = first or number
        held.append(line)
        size += len(line)
        if size >= _TEXT_DOCUMENT_CHARS:
            yield f"{path.name} line {first}", {"text": "".join(held)}
            held, first, size = [], 0, 0
    if "".join(held).strip():
        yield f"{path.name} line {first}", {"text": "".join(held)}


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise UserError(
            f"The corpus {path} is no readable parquet file ({reason}); fetch it again."
        ) from None


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec all raise their own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The corpus {source} is no local file, and the Hub gave no split {split!r} of it ({reason}); "
            "check the name or the network."
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source} row {number}", row
