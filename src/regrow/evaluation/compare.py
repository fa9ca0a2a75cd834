"""`regrow compare`: is model B as good as model A on the same prompts, and how sure is that?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regrow.errors import UserError
from regrow.evaluation.flips import count_flips, tally_types
from regrow.evaluation.paired import (
    judge,
    mcnemar_exact,
    paired_difference,
    prompts_needed,
    repeats_needed,
)
from regrow.evaluation.records import find_records, read_result
from regrow.evaluation.scoring import METRICS, prompt_counts
from regrow.types import EvalResult

Record = Mapping[str, Any]


def compare_runs(
    run_a: str | Path,
    run_b: str | Path,
    *,
    margin: float = 0.01,
    metric: str = "inst_level_strict",
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two runs' stored IFEval results; A is the baseline, B the candidate, differences are B - A.

    Args:
        run_a, run_b: a record file (`<model>-ifeval.jsonl` or `.json`), a folder of them, or a run folder;
            of a folder with several models, its final model is taken, else name the file.
        margin: the largest loss that is accepted, as a share (0.01 is one point).
        metric: the figure that the verdict is about, one of IFEval's four.
        seed: of the bootstrap.

    Returns:
        see `compare_results`.

    Raises:
        UserError: a run has no such result, or the two were made with different prompts, templates or modes.
    """
    paths = [find_records(run) for run in (run_a, run_b)]
    results = [read_result(path) for path in paths]
    compared = compare_results(*results, margin=margin, metric=metric, seed=seed)
    return {"baseline": str(paths[0]), "candidate": str(paths[1]), **compared}


def compare_results(
    a: EvalResult,
    b: EvalResult,
    *,
    margin: float = 0.01,
    metric: str = "inst_level_strict",
    seed: int = 0,
) -> dict[str, Any]:
    """Paired comparison of two IFEval results on the same prompts.

    Returns:
        `verdict`: `better`, `non-inferior`, `worse` or `not enough data`; `judge` defines each by `ci95`.
        `metric`, `margin`, `baseline_score`, `candidate_score`, `difference` (B - A), `ci95` (95 % bootstrap
        interval of the difference, prompts resampled with all their instructions, seeded).
        `mcnemar_p`: exact McNemar test on prompts that follow every instruction strictly (on a share of
        prompts because instructions of one prompt are not independent; with repeats, on the prompts whose
        number of successes differs).
        `num_repeats`: answers to each prompt.
        `flips`: for `prompts` and for `instructions`, how many B lost and gained; `examples` of both.
        `metrics`: difference and interval of all four figures. `by_type`: per kind of instruction both
        models' counts, and what was lost and gained.
        `needed`: if the verdict is open, prompts (or answers per prompt, by sampling) for an 80 % chance to
        settle it, if the true difference is as observed and if there is none; None where nothing would.

    Raises:
        UserError: the results cannot be compared; the message names what differs.
    """
    if metric not in METRICS:
        raise UserError(f"metric {metric!r} is unknown; use one of {', '.join(METRICS)}.")
    if not 0 < margin < 1:
        raise UserError(f"margin {margin} must be a share between 0 and 1, e.g. 0.01 for one point.")
    check_comparable(a, b)
    records_a, records_b = _paired_records(a.records, b.records)
    differences = {}
    for name in METRICS:
        correct_a, totals = prompt_counts(records_a, name)
        correct_b, _ = prompt_counts(records_b, name)
        differences[name] = paired_difference(correct_a, correct_b, totals, seed=seed)
    chosen = differences[metric]
    verdict = judge(chosen.ci95, margin)
    flips = count_flips(records_a, records_b)
    result: dict[str, Any] = {
        "verdict": verdict,
        "metric": metric,
        "margin": margin,
        "num_prompts": chosen.num_prompts,
        "num_repeats": _num_repeats(records_a),
        "baseline_score": chosen.baseline,
        "candidate_score": chosen.candidate,
        "difference": chosen.difference,
        "ci95": list(chosen.ci95),
        "mcnemar_p": mcnemar_exact(**flips["prompts"]),
        "flips": flips,
        "metrics": {
            name: {
                "baseline": found.baseline,
                "candidate": found.candidate,
                "difference": found.difference,
                "ci95": list(found.ci95),
            }
            for name, found in differences.items()
        },
        "by_type": tally_types(records_a, records_b),
        "seed": seed,
    }
    if verdict == "not enough data":
        result["needed"] = {
            "if_as_observed": _needed(records_a, records_b, metric, chosen, chosen.difference, margin),
            "if_no_difference": _needed(records_a, records_b, metric, chosen, 0.0, margin),
        }
    return result


def check_comparable(a: EvalResult, b: EvalResult) -> None:
    """Refuse results that were not measured in the same way.

    Raises:
        UserError: naming every setting that differs, with both values.
    """
    for result in (a, b):
        if result.benchmark != "ifeval" or "comparable" not in result.settings:
            raise UserError(
                f"A result of {result.benchmark} has no verdicts per prompt; compare results of ifeval."
            )
    first, second = a.settings["comparable"], b.settings["comparable"]
    different = [
        f"{name} ({_short(first.get(name))} against {_short(second.get(name))})"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name) and name != "do_sample"  # temperature says it
    ]
    if different:
        raise UserError(
            f"The two runs differ in {', '.join(different)}; a paired comparison needs both evaluated in the "
            "same way."
        )


def format_comparison(result: Mapping[str, Any]) -> str:
    """A comparison as lines to read."""
    low, high = result["ci95"]
    flips = result["flips"]["prompts"]
    lines = [
        f"A (baseline):  {result.get('baseline', 'A')}",
        f"B (candidate): {result.get('candidate', 'B')}",
        f"{result['metric']}: A {result['baseline_score']:.4f}, B {result['candidate_score']:.4f}, "
        f"B - A {result['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}], "
        f"{result['num_prompts']} prompts"
        + (f", {result['num_repeats']} answers each" if result["num_repeats"] > 1 else ""),
        f"verdict at a margin of {result['margin']:g}: B is {result['verdict']}"
        if result["verdict"] != "not enough data"
        else f"verdict at a margin of {result['margin']:g}: not enough data",
        f"prompts lost {flips['lost']}, gained {flips['gained']}, McNemar p = {result['mcnemar_p']:.4f}",
    ]
    for assumption, needed in result.get("needed", {}).items():
        lines.append(
            f"to settle it, {assumption.replace('_', ' ')}: {_needed_words(needed, result['num_repeats'])}"
        )
    lines.append("all four figures (B - A):")
    lines += [
        f"  {name}: {entry['difference']:+.4f} [{entry['ci95'][0]:+.4f}, {entry['ci95'][1]:+.4f}]"
        for name, entry in result["metrics"].items()
    ]
    lines.append("by type (A -> B of total, lost, gained):")
    lines += [
        f"  {kind}: {entry['baseline']} -> {entry['candidate']} of {entry['total']}, "
        f"-{entry['lost']} +{entry['gained']}"
        for kind, entry in result["by_type"].items()
    ]
    for way, examples in result["flips"]["examples"].items():
        for example in examples:
            lines += [
                f"{way} (key {example['key']}): {_clip(example['prompt'])}",
                f"  A: {_clip(example['baseline_response'])}",
                f"  B: {_clip(example['candidate_response'])}",
            ]
    return "\n".join(lines)


def _paired_records(a: Sequence[Record], b: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Both runs' records in the same order; both must judge the same prompts."""
    by_key = {(record["key"], record.get("repeat", 0)): record for record in b}
    keys_a = [(record["key"], record.get("repeat", 0)) for record in a]
    only_a = [key for key, _ in keys_a if (key, 0) not in by_key]
    only_b = [key for key, _ in by_key if (key, 0) not in set(keys_a)]
    if only_a or only_b or len(keys_a) != len(by_key):
        raise UserError(
            f"The two runs answer different prompts: {len(only_a)} only in A, {len(only_b)} only in B "
            f"(first key {(only_a + only_b or ['unknown'])[0]}); evaluate both on the same prompts."
        )
    return list(a), [by_key[key] for key in keys_a]


def _needed(
    records_a: Sequence[Record],
    records_b: Sequence[Record],
    metric: str,
    found: Any,
    true_difference: float,
    margin: float,
) -> dict[str, int | None]:
    prompts = prompts_needed(found.standard_deviation, true_difference, margin)
    rows = []
    for repeat in range(_num_repeats(records_a)):
        correct_a, totals = prompt_counts([r for r in records_a if r.get("repeat", 0) == repeat], metric)
        correct_b, _ = prompt_counts([r for r in records_b if r.get("repeat", 0) == repeat], metric)
        rows.append((correct_b - correct_a) / totals.mean())
    per_repeat = np.stack(rows, axis=1)
    return {
        "prompts": prompts,
        "repeats": repeats_needed(per_repeat, prompts, true_difference=true_difference, margin=margin),
    }


def _num_repeats(records: Sequence[Record]) -> int:
    return 1 + max(int(record.get("repeat", 0)) for record in records)


def _needed_words(needed: Mapping[str, int | None], num_repeats: int) -> str:
    if needed["prompts"] is None:
        return "no number of prompts (the difference lies on the margin)"
    words = f"about {needed['prompts']:,} prompts"
    words += f" with {num_repeats} answers each" if num_repeats > 1 else ""
    if needed["repeats"] is not None:
        words += f", or at least {needed['repeats']:,} sampled answers to each of these"
    return words


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _clip(text: str, size: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= size else f"{line[: size - 3]}..."
