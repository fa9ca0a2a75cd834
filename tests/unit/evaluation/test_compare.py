"""The paired comparison of two stored results: known cases, refusals, and where records are found."""

import json
from pathlib import Path
from typing import Any

import pytest

from regrow.errors import UserError
from regrow.evaluation.compare import compare_results, compare_runs, format_comparison
from regrow.evaluation.records import find_records, write_result
from regrow.types import EvalResult

KINDS = ["punctuation:no_comma", "length_constraints:number_words"]
COMPARABLE = {
    "prompts_sha256": "a" * 64,
    "chat_template_sha256": "b" * 64,
    "enable_thinking": False,
    "max_new_tokens": 512,
    "do_sample": False,
}


def _result(verdicts: list[list[bool]], repeats: int = 1, **settings: Any) -> EvalResult:
    """Prompts with one or two instructions; `verdicts` in order of prompt, then repeat."""
    records = [
        {
            "key": 1000 + index // repeats,
            "repeat": index % repeats,
            "prompt": f"prompt {index // repeats}",
            "instruction_ids": KINDS[: len(strict)],
            "response": f"answer {strict}",
            "strict": strict,
            "loose": strict,
        }
        for index, strict in enumerate(verdicts)
    ]
    return EvalResult("ifeval", {}, records, {"comparable": {**COMPARABLE, **settings}})


T, F = [True], [False]


def test_a_hand_computed_case() -> None:
    a = _result([[True, True], [True, False], T, T, F, F, T, T])
    b = _result([[True, False], [True, True], T, F, T, F, T, F])
    found = compare_results(a, b)
    assert found["baseline_score"] == pytest.approx(7 / 10)
    assert found["candidate_score"] == pytest.approx(6 / 10)
    assert found["difference"] == pytest.approx(-1 / 10)
    assert found["flips"]["prompts"] == {"lost": 3, "gained": 2}  # prompts 0, 3, 7; 1, 4
    assert found["flips"]["instructions"] == {"lost": 3, "gained": 2}
    assert found["mcnemar_p"] == 1.0  # 3 against 2
    assert [example["key"] for example in found["flips"]["examples"]["lost"]] == [1000, 1003, 1007]
    assert [example["key"] for example in found["flips"]["examples"]["gained"]] == [1001, 1004]
    assert found["metrics"]["prompt_level_strict"]["difference"] == pytest.approx(-1 / 8)
    assert found["by_type"] == {
        KINDS[1]: {"total": 2, "baseline": 1, "candidate": 1, "lost": 1, "gained": 1},
        KINDS[0]: {"total": 8, "baseline": 6, "candidate": 5, "lost": 2, "gained": 1},
    }
    assert found["verdict"] == "not enough data"
    assert found["needed"]["if_no_difference"]["prompts"] > 10_000
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("lost", "gained", "same", "verdict"),
    [
        (10, 60, 430, "better"),
        (2, 2, 596, "non-inferior"),
        (60, 10, 430, "worse"),
        (20, 20, 460, "not enough data"),
        (0, 0, 20, "not enough data"),
    ],
)
def test_verdicts_of_clear_cases(lost: int, gained: int, same: int, verdict: str) -> None:
    a = _result([T] * lost + [F] * gained + [T] * same)
    b = _result([F] * lost + [T] * gained + [T] * same)
    found = compare_results(a, b, margin=0.01)
    assert found["verdict"] == verdict
    assert ("needed" in found) == (verdict == "not enough data")
    low, high = found["ci95"]
    assert low <= found["difference"] <= high
    assert verdict in format_comparison(found)


def test_swapping_the_runs_mirrors_the_result() -> None:
    a = _result([T] * 30 + [F] * 8 + [T] * 100 + [F] * 62)
    b = _result([F] * 30 + [T] * 8 + [T] * 100 + [F] * 62)
    forth, back = compare_results(a, b), compare_results(b, a)
    assert forth["difference"] == pytest.approx(-back["difference"])
    assert forth["mcnemar_p"] == back["mcnemar_p"]
    assert forth["flips"]["prompts"]["lost"] == back["flips"]["prompts"]["gained"] == 30
    assert forth["ci95"] == pytest.approx([-back["ci95"][1], -back["ci95"][0]], abs=0.01)


def test_order_of_records_does_not_matter_and_seeds_repeat() -> None:
    a = _result([T, F, T, T, F] * 20)
    b = _result([T, T, F, T, F] * 20)
    shuffled = EvalResult("ifeval", {}, b.records[::-1], b.settings)
    assert compare_results(a, b) == compare_results(a, shuffled)
    assert compare_results(a, b, seed=1)["ci95"] != compare_results(a, b, seed=2)["ci95"]


def test_repeated_answers_are_clustered_by_prompt() -> None:
    a = _result([T, T, T, T] * 60, repeats=4, temperature=0.7)
    b = _result(([T, T, T, T] * 5 + [F, F, F, F]) * 10, repeats=4, temperature=0.7)
    found = compare_results(a, b)
    assert (found["num_prompts"], found["num_repeats"]) == (60, 4)
    assert found["flips"]["prompts"] == {"lost": 10, "gained": 0}
    assert "60 prompts, 4 answers each" in format_comparison(found)
    assert found["mcnemar_p"] == pytest.approx(2 / 2**10)  # ten prompts lost, not forty
    assert found["ci95"][1] - found["ci95"][0] > 0.15


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prompts_sha256", "c" * 64),
        ("chat_template_sha256", "c" * 64),
        ("enable_thinking", True),
        ("max_new_tokens", 1_280),
        ("temperature", 0.7),
    ],
)
def test_runs_made_differently_are_refused_and_the_difference_named(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"differ in {setting} \("):
        compare_results(_result([T]), _result([T], **{setting: value}))


def test_runs_with_other_prompts_are_refused() -> None:
    a = _result([T, F, T])
    with pytest.raises(UserError, match="1 only in A, 0 only in B"):
        compare_results(a, EvalResult("ifeval", {}, a.records[:2], a.settings))


@pytest.mark.parametrize(
    "options", [{"margin": 0.0}, {"margin": 1.5}, {"margin": -0.01}, {"metric": "accuracy"}]
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"is unknown|must be a share"):
        compare_results(_result([T]), _result([T]), **options)


def test_a_result_of_another_benchmark_is_refused() -> None:
    with pytest.raises(UserError, match="A result of latency has no verdicts per prompt"):
        compare_results(_result([T]), EvalResult("latency", {}))


def test_runs_are_found_by_file_folder_and_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for model, verdicts in (("teacher", [T, T]), ("pruned", [F, F]), ("recovered", [T, F])):
        write_result(run / "evaluate" / "records", f"{model}-ifeval", _result(verdicts))
    records = run / "evaluate" / "records"
    with pytest.raises(UserError, match="holds results of pruned, recovered; name one file"):
        find_records(run)
    (run / "results.json").write_text(json.dumps({"final": "recovered"}))
    assert find_records(run) == records / "recovered-ifeval.json"
    found = compare_runs(records / "teacher-ifeval.jsonl", run)
    assert found["difference"] == -0.5
    assert found["candidate"].endswith("recovered-ifeval.json")
    alone = tmp_path / "alone"
    write_result(alone, "teacher-ifeval", _result([T]))
    assert find_records(alone) == alone / "teacher-ifeval.json"
    (tmp_path / "empty").mkdir()
    for wrong, complaint in (
        (tmp_path / "empty", "no IFEval records"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_records(wrong)
