"""Corpus rows with verifiable constraints: prompt, answer, and what the answer had to follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regrow.data.blend import CorpusSpec
from regrow.data.constraints import answer_of, check_response, validate_constraints
from regrow.data.corpora import Example, Message, open_corpus
from regrow.files import sha256_json


@dataclass(frozen=True)
class ConstrainedRow:
    """One conversation whose last answer can be checked by a program.

    Attributes:
        where: how messages name the row, e.g. `"train.jsonl line 7"`.
        prompt: the turns before the last answer; the last of them is the user's.
        answer: the corpus' own (the teacher's) last answer.
        finished: the answer was not cut off.
        instruction_ids, kwargs: kinds of constraint and the arguments of each, in the same order.
    """

    where: str
    prompt: list[Message]
    answer: str
    finished: bool
    instruction_ids: list[str]
    kwargs: list[dict[str, Any]]


def constrained_rows(corpora: Sequence[CorpusSpec]) -> list[ConstrainedRow]:
    """The rows of all corpora, in order, whose `meta` names constraints and that end in an answer to a user.

    `meta` is what `regrow synthesize` writes: `instruction_id_list`, `kwargs`, `finished` (true where a row
    does not say). A corpus' weight says nothing here; its limit does.

    Raises:
        UserError: a corpus cannot be read, or a row's constraints are malformed (the row is named).
    """
    return [
        row
        for source, split, _, limit in corpora
        for example in open_corpus(source, split=split, limit=limit).examples
        if (row := _constrained(example)) is not None
    ]


def judge(row: ConstrainedRow, answer: str, *, thinking: bool) -> list[bool]:
    """Which of a row's constraints an answer follows (strict); see `answer_of`."""
    text = answer_of(answer, thinking=thinking)
    return check_response(
        row.prompt[-1]["content"], text, row.instruction_ids, row.kwargs, row=row.where
    ).strict


def is_followed(example: Example) -> bool:
    """Whether a corpus row has constraints, its last answer ended by itself and follows all of them.

    Raises:
        UserError: its constraints are malformed, or the checkers are not installed.
    """
    row = _constrained(example)
    return row is not None and row.finished and all(judge(row, row.answer, thinking=False))


def constraints_hash(corpora: Sequence[CorpusSpec]) -> str:
    """SHA-256 of the rows' prompts, answers and constraints (a corpus' own hash leaves `meta` out)."""
    return hash_rows(constrained_rows(corpora))


def hash_rows(rows: Sequence[ConstrainedRow]) -> str:
    """SHA-256 of rows, in order; where they were read from does not count."""
    return sha256_json(
        [[row.prompt, row.answer, row.finished, row.instruction_ids, row.kwargs] for row in rows]
    )


def _constrained(example: Example) -> ConstrainedRow | None:
    meta = example.provenance.get("meta")
    if not isinstance(meta, dict) or not (kinds := meta.get("instruction_id_list")):
        return None
    if [message["role"] for message in example.messages[-2:]] != ["user", "assistant"]:
        return None
    where = str(example.provenance["row"])
    kwargs = validate_constraints(kinds, meta.get("kwargs") or [], row=where)
    return ConstrainedRow(
        where=where,
        prompt=example.messages[:-1],
        answer=example.messages[-1]["content"],
        finished=meta.get("finished") is not False,
        instruction_ids=list(kinds),
        kwargs=kwargs,
    )
