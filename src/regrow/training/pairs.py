"""Preference pairs that programs decide: of several answers to a prompt, the one that follows more of its
verifiable constraints is chosen over the one that follows fewer.

The candidates are the teacher's answer from the corpus and answers that the student writes itself. Pairs lie
in a folder of their own as `pairs.jsonl`, one object a line, so that a killed stage goes on from them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from regrow.data.constrained import ConstrainedRow, judge
from regrow.data.constraints import require_checkers
from regrow.data.corpora import Example
from regrow.data.templates import Encoded, tokenize_example, turn_end_ids
from regrow.errors import UserError
from regrow.files import disk_errors, read_json, write_json
from regrow.modeling.generate import closing_ids, encode_prompt
from regrow.progress import say
from regrow.training.rollouts import prompt_length
from regrow.training.student import HiddenStates
from regrow.training.writing import Answer

PAIRS, COUNTS = "pairs.jsonl", "pairs.json"
Source = Literal["student", "teacher"]


@dataclass(frozen=True)
class Candidate:
    """One answer to a prompt and its verdict.

    Attributes:
        source: who wrote it.
        text: the answer.
        token_ids: its tokens, the end of the turn included where it is finished.
        finished: it ended by itself.
        follows: per constraint of the prompt, whether it is followed (strict).
    """

    source: Source
    text: str
    token_ids: list[int]
    finished: bool
    follows: list[bool]


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer.

    Attributes:
        where: the prompt's row in its corpus.
        prompt_ids: the rendered prompt's tokens, header of the assistant's turn included.
        chosen, rejected: the answers.
    """

    where: str
    prompt_ids: list[int]
    chosen: Candidate
    rejected: Candidate


def choose_pair(candidates: Sequence[Candidate]) -> tuple[Candidate, Candidate] | None:
    """(chosen, rejected) among the answers to one prompt, or None where none is better than another.

    Chosen is the finished answer that follows most constraints, rejected the answer that follows fewest;
    a pair needs a difference. Among equals the student's own come first (they are what it is likely to
    write), then the order given.
    """
    own_first = sorted(candidates, key=lambda candidate: candidate.source != "student")
    finished = [candidate for candidate in own_first if candidate.finished]
    if not finished:
        return None
    chosen = max(finished, key=_score)
    rejected = min(own_first, key=_score)
    return (chosen, rejected) if _score(chosen) > _score(rejected) else None


def _score(candidate: Candidate) -> int:
    return sum(candidate.follows)


def load_or_make_pairs(
    folder: Path,
    student: HiddenStates,
    tokenizer: Any,
    rows: Sequence[ConstrainedRow],
    *,
    answer: Answer,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    max_length: int,
    enable_thinking: bool | None,
    seed: int,
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs in `folder`, made and written first where they are not there yet.

    Args:
        folder: where pairs with these arguments lie, and no others; made where it is missing.
        student, tokenizer: the student, as it is before preference tuning.
        rows: prompts with constraints and the teacher's answers.
        answer: who writes for the student.
        num_samples: answers that the student writes per prompt, sampled at `temperature`.
        max_new_tokens, batch_size: longest answer in tokens; answers in flight.
        max_length: a candidate is left out where prompt and answer have more tokens.
        enable_thinking: passed to the chat template where given; what is judged follows the thinking block.
        seed: of the sampling; an answer depends on it and the prompt's place only.

    Returns:
        the pairs, at most one per prompt, in the order of the rows; and counts: `num_prompts`, `num_pairs`,
        `prompts_without_pair`, `chosen_from` and `rejected_from` (`{"student", "teacher"}` each),
        `too_long` (candidates left out).

    Raises:
        UserError: the checkers or the chat template are missing, or a prompt exceeds the model's context.
        RunError: the device's memory is too small, or the disk is full.
    """
    if (folder / PAIRS).exists():
        say(f"dpo: the pairs in {folder} are used again.")
        return _read(folder), read_json(folder / COUNTS)
    require_checkers([kind for row in rows for kind in row.instruction_ids])
    prompts = [encode_prompt(tokenizer, row.prompt, enable_thinking) for row in rows]
    responses = answer(
        student,
        [row.prompt for row in rows for _ in range(num_samples)],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        enable_thinking=enable_thinking,
        temperature=temperature,
        seed=seed,
        progress="student answers",
    )
    end = closing_ids(tokenizer)
    pairs: list[Pair] = []
    too_long = 0
    for number, (row, prompt_ids) in enumerate(zip(rows, prompts, strict=True)):
        own = responses[number * num_samples : (number + 1) * num_samples]
        candidates = [
            Candidate(
                "student",
                response.text,
                [*response.token_ids, *(end if response.finished else [])],
                response.finished,
                judge(row, response.text, thinking=bool(enable_thinking)),
            )
            for response in own
        ]
        teacher_ids = _answer_ids(tokenizer, row, enable_thinking)
        verdict = judge(row, row.answer, thinking=False)
        candidates.append(Candidate("teacher", row.answer, teacher_ids, row.finished, verdict))
        fitting = [c for c in candidates if len(prompt_ids) + len(c.token_ids) <= max_length]
        too_long += len(candidates) - len(fitting)
        if found := choose_pair(fitting):
            pairs.append(Pair(row.where, prompt_ids, *found))
    counts = _counts(pairs, len(rows), too_long)
    _write(folder, pairs, counts)
    return pairs, counts


def _answer_ids(tokenizer: Any, row: ConstrainedRow, enable_thinking: bool | None) -> list[int]:
    """The corpus' answer as the template puts it behind the prompt, with the end of its turn if it ended."""
    messages = [*row.prompt, {"role": "assistant", "content": row.answer}]
    ends = set(turn_end_ids(tokenizer))
    ids, mask = tokenize_example(tokenizer, Example(messages=messages), enable_thinking, ends)
    begin = prompt_length(Encoded(ids, mask))
    answer = [token for token, written in zip(ids[begin:], mask[begin:], strict=True) if written]
    return answer[:-1] if answer and answer[-1] in ends and not row.finished else answer


def require_pairs(num_pairs: int, num_prompts: int, min_pairs: int) -> None:
    """Raises:
    UserError: there are fewer pairs than `min_pairs`, or could only be fewer.
    """
    if num_pairs < min_pairs:
        raise UserError(
            f"dpo found {num_pairs} preference pairs in {num_prompts} prompts with constraints and needs "
            f"{min_pairs} (min_pairs); add prompts with constraints (regrow synthesize --constraint-share), "
            "raise num_samples, or lower min_pairs."
        )


def _counts(pairs: Sequence[Pair], num_prompts: int, too_long: int) -> dict[str, Any]:
    def by_source(sources: list[Source]) -> dict[str, int]:
        return {source: sources.count(source) for source in ("student", "teacher")}  # type: ignore[arg-type]

    return {
        "num_prompts": num_prompts,
        "num_pairs": len(pairs),
        "prompts_without_pair": num_prompts - len(pairs),
        "chosen_from": by_source([pair.chosen.source for pair in pairs]),
        "rejected_from": by_source([pair.rejected.source for pair in pairs]),
        "too_long": too_long,
    }


def _write(folder: Path, pairs: Sequence[Pair], counts: dict[str, Any]) -> None:
    """Counts first, then the pairs under their final name: where the pairs are, everything is."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COUNTS, counts)
    partial = folder / f".{PAIRS}.partial"
    with disk_errors(folder):
        partial.write_text(
            "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8"
        )
        os.replace(partial, folder / PAIRS)


def _read(folder: Path) -> list[Pair]:
    try:
        values = [json.loads(line) for line in (folder / PAIRS).read_text(encoding="utf-8").split("\n")[:-1]]
        return [
            Pair(v["where"], v["prompt_ids"], Candidate(**v["chosen"]), Candidate(**v["rejected"]))
            for v in values
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / PAIRS} is damaged; remove {folder} to make the pairs again.") from None
