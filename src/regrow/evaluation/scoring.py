"""From responses to IFEval's figures: verdicts per prompt, then totals, intervals, lengths and repetition."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regrow.data.constraints import answer_of, check_response
from regrow.data.prompts import Prompt
from regrow.evaluation.intervals import bootstrap_interval, wilson_interval

METRICS = ("prompt_level_strict", "inst_level_strict", "prompt_level_loose", "inst_level_loose")
_NGRAM = 4
_REPEATS_FROM = 0.5


def score_prompt(prompt: Prompt, row: Mapping[str, Any], *, thinking: bool = False) -> dict[str, Any]:
    """The record of one answered prompt.

    Args:
        prompt: the prompt.
        row: `response`, and where known `num_tokens`, `finished` (an end token was written) and `repeat`.
        thinking: the model was asked to think first.
    """
    answer = answer_of(row["response"], thinking=thinking)
    verdict = check_response(
        prompt.text, answer, prompt.instruction_ids, prompt.kwargs, row=f"{prompt.where} (key {prompt.key})"
    )
    record = {
        "key": prompt.key,
        "repeat": row.get("repeat", 0),
        "prompt": prompt.text,
        "instruction_ids": list(prompt.instruction_ids),
        "response": row["response"],
        "strict": verdict.strict,
        "loose": verdict.loose,
        "repeated_share": round(repeated_share(answer), 6),
    }
    return record | {name: row[name] for name in ("num_tokens", "finished") if row.get(name) is not None}


def repeated_share(text: str) -> float:
    """Share of word 4-grams that occurred before in the text (seq-rep-4, arXiv 1908.04319)."""
    words = text.split()
    grams = [tuple(words[start : start + _NGRAM]) for start in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarise(records: Sequence[Mapping[str, Any]], *, missing: int, seed: int = 0) -> dict[str, Any]:
    """Figures of a set of records.

    Returns:
        IFEval's four `{"correct", "total", "accuracy"}`, `by_type` (kind -> strict and loose), `missing`
        (prompts without a response), `intervals` (95 %: Wilson's for prompts, bootstrap clustered by prompt
        for instructions), and of the answers: `mean_response_tokens`, `median_response_tokens` and
        `no_stop_rate` (share without an end token) where the responses came with counts,
        `mean_response_words`, and `repetition_rate`: share of answers in which at least half of the word
        4-grams occurred before.
    """
    figures: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for metric in METRICS:
        correct, totals = prompt_counts(records, metric)
        figures[metric] = _share(int(correct.sum()), int(totals.sum()))
        independent = metric.startswith("prompt_level") and len(correct) == totals.sum()
        low, high = (
            wilson_interval(int(correct.sum()), int(totals.sum()))
            if independent
            else bootstrap_interval(correct, totals, seed=seed)
        )
        intervals[metric] = [low, high]
    figures["by_type"] = _by_type(records)
    figures["missing"] = missing
    figures["intervals"] = intervals
    figures |= _answer_figures(records)
    return figures


def prompt_counts(records: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Correct and judged items per prompt [N], in order of first appearance, repeats summed."""
    level, _, mode = metric.rpartition("_")
    counts: dict[Any, list[int]] = {}
    for record in records:
        verdicts = record[mode]
        correct, total = (
            (int(all(verdicts)), 1) if level == "prompt_level" else (sum(verdicts), len(verdicts))
        )
        entry = counts.setdefault(record["key"], [0, 0])
        entry[0] += correct
        entry[1] += total
    array = np.array(list(counts.values()), dtype=np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _by_type(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    correct: dict[str, Counter[str]] = {"strict": Counter(), "loose": Counter()}
    for record in records:
        for position, kind in enumerate(record["instruction_ids"]):
            totals[kind] += 1
            for mode, counter in correct.items():
                counter[kind] += record[mode][position]
    return {
        kind: {mode: _share(counter[kind], totals[kind]) for mode, counter in correct.items()}
        for kind in sorted(totals)
    }


def _answer_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "mean_response_words": float(np.mean([len(record["response"].split()) for record in records])),
        "repetition_rate": float(np.mean([r["repeated_share"] >= _REPEATS_FROM for r in records])),
    }
    if all("num_tokens" in record for record in records):
        tokens = [record["num_tokens"] for record in records]
        figures["mean_response_tokens"] = float(np.mean(tokens))
        figures["median_response_tokens"] = float(np.median(tokens))
    if all("finished" in record for record in records):
        figures["no_stop_rate"] = float(np.mean([not record["finished"] for record in records]))
    return figures


def _share(correct: int, total: int) -> dict[str, Any]:
    return {"correct": correct, "total": total, "accuracy": correct / total}
