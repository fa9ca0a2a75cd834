"""Which of the teacher's answers become the corpus."""

from collections.abc import Sequence
from typing import Any, Literal

from regrow.synthesis.decontaminate import drop_repeats, near_duplicates
from regrow.synthesis.prompts import normalise

Row = dict[str, Any]
CutOff = Literal["keep", "drop"]
Violations = Literal["keep", "balance", "drop"]
_REPEATED_ANSWER_WORDS = 8  # shorter answers ("Canberra.") may rightly occur twice


def select_rows(
    rows: Sequence[Row], *, cut_off: CutOff, violations: Violations
) -> tuple[list[Row], dict[str, int]]:
    """The rows to keep, in order, and how many were left out for which reason.

    `violations="balance"` keeps, per split, no more answers that miss a constraint than answers that meet
    all: those that meet most come first. A weak teacher misses most, and where it stands then is where its
    student will stand too, so they are worth learning from, but should not set the tone.
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
    if violations == "balance":
        leave_out("violating", _beyond_balance(kept))
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


def _beyond_balance(rows: Sequence[Row]) -> list[bool]:
    """Which rows to leave out so that in each split at most half of the checked rows miss a constraint."""
    beyond = [False] * len(rows)
    for split in ("train", "held_out"):
        checked = {
            i: row["meta"]["follow_strict"]
            for i, row in enumerate(rows)
            if row["meta"]["split"] == split and row["meta"].get("follow_strict")
        }
        violating = [i for i, verdicts in checked.items() if not all(verdicts)]
        violating.sort(key=lambda i: -sum(checked[i]) / len(checked[i]))  # stable: else in the rows' order
        for i in violating[len(checked) - len(violating) :]:
            beyond[i] = True
    return beyond


def user_turns(row: Row) -> list[str]:
    """What the user says in a row."""
    return [message["content"] for message in row["messages"] if message["role"] == "user"]


def _prompt_key(row: Row) -> str:
    return "\n".join(normalise(turn) for turn in user_turns(row))


def _answer_key(row: Row) -> str | None:
    answer = normalise(row["messages"][-1]["content"])
    return answer if len(answer.split()) >= _REPEATED_ANSWER_WORDS else None
