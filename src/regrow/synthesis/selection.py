"""Which of the teacher's answers become the corpus."""

from collections.abc import Sequence
from typing import Any, Literal

from regrow.synthesis.decontaminate import drop_repeats, near_duplicates
from regrow.synthesis.prompts import normalise

Row = dict[str, Any]
_REPEATED_ANSWER_WORDS = 8  # shorter answers ("Canberra.") may rightly occur twice


def select_rows(
    rows: Sequence[Row], *, cut_off: Literal["keep", "drop"], violations: Literal["keep", "drop"]
) -> tuple[list[Row], dict[str, int]]:
    """The rows to keep, in order, and how many were left out for which reason.

    Held-out rows come first when repeats are removed, and a training row any of whose user turns equals or
    nearly equals a held-out one goes, so that nothing held out is trained on.
    """
    counts: dict[str, int] = {}
    kept = list(rows)

    def leave_out(reason: str, bad: Sequence[bool]) -> None:
        nonlocal kept
        counts[reason] = sum(bad)
        kept = [row for row, is_bad in zip(kept, bad, strict=True) if not is_bad]

    leave_out("empty", [not all(m["content"].strip() for m in row["messages"]) for row in kept])
    if cut_off == "drop":
        leave_out("cut_off", [not row["meta"]["finished"] for row in kept])
    if violations == "drop":
        leave_out("violating", [not all(row["meta"].get("follow_strict", [])) for row in kept])
    kept.sort(key=lambda row: row["meta"]["split"] == "train")  # stable: held-out rows first
    kept, counts["repeated_prompts"] = drop_repeats(kept, _prompt_key)
    kept, counts["repeated_answers"] = drop_repeats(kept, _answer_key)
    turns = [
        (i, turn) for i, row in enumerate(kept) if row["meta"]["split"] == "train" for turn in user_turns(row)
    ]
    held_out = [turn for row in kept if row["meta"]["split"] == "held_out" for turn in user_turns(row)]
    close = {turns[i][0] for i, _ in near_duplicates([turn for _, turn in turns], held_out)}
    leave_out("near_held_out", [i in close for i in range(len(kept))])
    return kept, counts


def user_turns(row: Row) -> list[str]:
    """What the user says in a row."""
    return [message["content"] for message in row["messages"] if message["role"] == "user"]


def _prompt_key(row: Row) -> str:
    return "\n".join(normalise(turn) for turn in user_turns(row))


def _answer_key(row: Row) -> str | None:
    answer = normalise(row["messages"][-1]["content"])
    return answer if len(answer.split()) >= _REPEATED_ANSWER_WORDS else None
