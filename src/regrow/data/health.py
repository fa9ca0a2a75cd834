"""Looks at a corpus before training: lengths, cut-off answers, refusals, missed constraints."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from regrow.data.corpora import Corpus

Row = dict[str, Any]

_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately)\b.{0,80}"
    r"\b(can'?t|cannot|can not|unable|not able)"
    r"|\b(i|we) (can'?t|cannot|am unable to|am not able to) (assist|help|provide|fulfil|comply|answer)"
    r"|\bas an ai\b.{0,80}\b(can'?t|cannot|unable|don'?t have|do not have|not able)",
    flags=re.IGNORECASE | re.DOTALL,
)
_MOST = 0.5
_REFUSALS_TOLERATED = 0.2
_REFUSAL_CHARS = 400  # a refusal stands at the beginning


def is_refusal(text: str) -> bool:
    """Whether an answer begins by declining (a pattern for English; an estimate, not a judgement)."""
    return bool(_REFUSAL.search(text[:_REFUSAL_CHARS].replace("’", "'")))


def corpus_statistics(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and shares of teacher-written rows; a share over nothing is None."""
    answers = [message["content"] for row in rows for message in _answers(row)]
    checked = [row["meta"] for row in rows if row.get("meta", {}).get("follow_strict")]
    known = [row["meta"]["finished"] for row in rows if "finished" in row.get("meta", {})]
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for meta in checked:
        for kind, followed in zip(meta["instruction_id_list"], meta["follow_strict"], strict=True):
            by_kind[kind].append(followed)
    verdicts = [followed for kind in by_kind.values() for followed in kind]
    return {
        "num_rows": len(rows),
        "num_answers": len(answers),
        "num_multi_turn": sum(len(_answers(row)) > 1 for row in rows),
        "num_with_system": sum(row["messages"][0]["role"] == "system" for row in rows if row["messages"]),
        "answer_words": _quantiles([len(answer.split()) for answer in answers]),
        "response_tokens": sum(row.get("meta", {}).get("num_tokens", 0) for row in rows),
        "cut_off_share": _share([not finished for finished in known]),
        "refusal_share": _share([is_refusal(answer) for answer in answers]),
        "num_constrained": len(checked),
        "prompt_level_strict": _share([all(meta["follow_strict"]) for meta in checked]),
        "inst_level_strict": _share(verdicts),
        "inst_level_strict_by_type": {kind: _share(by_kind[kind]) for kind in sorted(by_kind)},
    }


def corpus_health(rows: Iterable[Row]) -> dict[str, Any]:
    """Statistics of a corpus with `problems`: one sentence for each reason to look before training.

    Rows are `{"messages": [...], "meta": {...}}`; rows without `meta` count as text only. Nothing is judged
    that the rows do not record.
    """
    statistics = corpus_statistics(list(rows))
    problems = []
    if not statistics["num_answers"]:
        problems.append("The corpus holds no answers; check its files.")
    if _above(statistics["cut_off_share"], _MOST):
        problems.append(
            f"{statistics['cut_off_share']:.0%} of the answers are cut off at the token limit; "
            "write the corpus again with a larger max_new_tokens."
        )
    violating = statistics["prompt_level_strict"]
    if violating is not None and 1 - violating > _MOST:
        problems.append(
            f"{1 - violating:.0%} of the answers to prompts with constraints violate one; "
            "raise attempts, or leave more of them out (violations)."
        )
    if _above(statistics["refusal_share"], _REFUSALS_TOLERATED):
        problems.append(
            f"{statistics['refusal_share']:.0%} of the answers look like refusals; look at the prompts."
        )
    return {**statistics, "problems": problems}


def corpus_problems(corpus: Corpus) -> list[str]:
    """What `corpus_health` finds wrong with a corpus that records how its answers came about.

    Only conversations whose `meta` is like that of `regrow synthesize` are judged.
    """
    rows = [
        {"messages": example.messages, "meta": meta}
        for example in corpus.examples
        if example.messages and (meta := _known_meta(example.provenance.get("meta")))
    ]
    return [f"{corpus.source}: {problem}" for problem in corpus_health(rows)["problems"]] if rows else []


def _known_meta(meta: Any) -> Row:
    """What is understood of a row's own notes; other people's rows use the same names for other things."""
    if not isinstance(meta, dict):
        return {}
    known: Row = {}
    if isinstance(meta.get("finished"), bool):
        known["finished"] = meta["finished"]
    if isinstance(meta.get("num_tokens"), int):
        known["num_tokens"] = meta["num_tokens"]
    kinds, verdicts = meta.get("instruction_id_list"), meta.get("follow_strict")
    if isinstance(kinds, list) and isinstance(verdicts, list) and len(kinds) == len(verdicts):
        known |= {"instruction_id_list": kinds, "follow_strict": verdicts}
    return known


def _answers(row: Row) -> list[dict[str, str]]:
    return [message for message in row["messages"] if message["role"] == "assistant"]


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _above(share: float | None, limit: float) -> bool:
    return share is not None and share > limit


def _quantiles(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "mean": sum(values) / len(values),
        **{f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (5, 50, 95)},
    }
