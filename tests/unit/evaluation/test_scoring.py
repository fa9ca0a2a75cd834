"""Files of prompts and responses, verdicts and totals, against published scores and hand-made cases."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from regrow.data.prompts import hash_prompts, read_prompts
from regrow.errors import UserError
from regrow.evaluation.ifeval import score_responses
from regrow.evaluation.scoring import METRICS, answer_of, repeated_share, summarise
from shared_data import shared

UNSTABLE = (1122, 1129)  # counts of '#' and '!': lm-eval replaces them by a random letter


@pytest.fixture(autouse=True)
def _nltk_data(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "reference" in request.node.name:
        monkeypatch.setenv("NLTK_DATA", str(shared("nltk_data/tokenizers/punkt_tab/README").parents[2]))


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _row(key: int, text: str, *constraints: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "key": key,
        "prompt": text,
        "instruction_id_list": [kind for kind, _ in constraints],
        "kwargs": [kwargs for _, kwargs in constraints],
    }


NO_COMMA = ("punctuation:no_comma", {})
LOWER = ("change_case:english_lowercase", {})
WORDS = ("length_constraints:number_words", {"relation": "at least", "num_words": 4})
PROMPTS = [_row(1, "One", NO_COMMA), _row(2, "Two", NO_COMMA, WORDS), _row(3, "Three", WORDS)]


def _totals(figures: dict[str, Any]) -> list[tuple[int, int]]:
    return [(figures[name]["correct"], figures[name]["total"]) for name in METRICS]


def test_reference_of_gpt4() -> None:
    responses = shared("ifeval/reference/input_response_data_gpt4_20231107_145030.jsonl")
    scored = score_responses(responses=responses, prompts=shared("ifeval/input_data.jsonl"))
    stable = [record for record in scored.records if record["key"] not in UNSTABLE]
    assert _totals(summarise(stable, missing=0)) == [(415, 539), (694, 830), (429, 539), (710, 830)]
    for (correct, total), (low, high, of) in zip(
        _totals(scored.figures),
        [(415, 417, 541), (696, 698, 834), (430, 431, 541), (713, 714, 834)],
        strict=True,
    ):
        assert low <= correct <= high
        assert total == of
    assert scored.figures["missing"] == scored.figures["unmatched"] == 0


def test_reference_of_a_small_model_item_by_item(tmp_path: Path) -> None:
    prompts = shared("ifeval/input_data.jsonl")
    source = shared("ifeval/reference/m-ifeval_qwen2.5-0.5b-instruct-gptq-int4.jsonl.gz")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        published = {row["key"]: row for row in map(json.loads, file)}
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    left = [row for row in rows if row["key"] not in (*UNSTABLE, 2785)]
    scored = score_responses(responses=source, prompts=_write(tmp_path / "prompts.jsonl", left))
    assert _totals(scored.figures) == [(129, 538), (286, 828), (135, 538), (301, 828)]
    for record in scored.records:
        assert record["strict"] == published[record["key"]]["follow_strict"]
        assert record["loose"] == published[record["key"]]["follow_loose"]
    by_type = scored.figures["by_type"]
    assert sum(entry["strict"]["correct"] for entry in by_type.values()) == 286
    assert sum(entry["loose"]["total"] for entry in by_type.values()) == 828


def test_prompts_without_a_response_are_left_out_and_counted(tmp_path: Path) -> None:
    prompts = _write(tmp_path / "p.jsonl", PROMPTS)
    given = [{"prompt": "Two", "response": "one, two"}, {"prompt": "Three", "response": "a b c d e"}]
    scored = score_responses(responses=_write(tmp_path / "r.jsonl", given), prompts=prompts)
    assert scored.figures["missing"] == 1
    assert _totals(scored.figures)[:2] == [(1, 2), (1, 3)]
    assert scored.figures["prompt_level_strict"] == {"correct": 1, "total": 2, "accuracy": 0.5}
    assert scored.figures["by_type"]["length_constraints:number_words"]["strict"] == {
        "correct": 1,
        "total": 2,
        "accuracy": 0.5,
    }
    assert [record["key"] for record in scored.records] == [2, 3]


def test_responses_match_by_key_where_they_have_no_prompt_and_by_prompt_before_key(tmp_path: Path) -> None:
    prompts = _write(tmp_path / "p.jsonl", PROMPTS)
    given = [{"key": 1, "response": "a, b"}, {"key": 1, "prompt": "Three", "response": "a b c d"}]
    scored = score_responses(responses=_write(tmp_path / "r.jsonl", given), prompts=prompts)
    assert [(record["key"], record["strict"]) for record in scored.records] == [(1, [False]), (3, [True])]


def test_an_empty_response_counts_as_given(tmp_path: Path) -> None:
    prompts = _write(tmp_path / "p.jsonl", PROMPTS)
    given = _write(tmp_path / "r.jsonl", [{"prompt": "One", "response": ""}])
    scored = score_responses(responses=given, prompts=prompts)
    assert scored.figures["missing"] == 2
    assert _totals(scored.figures)[0] == (0, 1)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "r.jsonl line 2 is not valid JSON"),
        ('["a list"]', "r.jsonl line 2 is no JSON object"),
        ({"prompt": "One"}, "r.jsonl line 2 has no text under 'response'"),
        ({"prompt": "One", "response": None}, "r.jsonl line 2 has no text under 'response'"),
        ({"response": "answer"}, "r.jsonl line 2 has neither 'prompt' nor 'key'"),
        ({"prompt": "Two", "response": "again"}, "r.jsonl line 2 answers the same prompt as r.jsonl line 1"),
    ],
)
def test_a_malformed_response_is_named_by_line(tmp_path: Path, line: Any, complaint: str) -> None:
    prompts = _write(tmp_path / "p.jsonl", PROMPTS)
    given = _write(tmp_path / "r.jsonl", [{"prompt": "Two", "response": "x"}, line])
    with pytest.raises(UserError, match=complaint):
        score_responses(responses=given, prompts=prompts)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"key": 9, "instruction_id_list": ["x"], "kwargs": [{}]}, "line 2 has no text under 'prompt'"),
        ({"key": 9, "prompt": "P", "kwargs": [{}]}, "line 2 needs lists under 'instruction_id_list'"),
        (_row(9, "P", ("punctuation:no_dots", {})), "line 2: 'punctuation:no_dots' is no known kind"),
        (
            _row(9, "P", ("length_constraints:number_words", {"num_words": 3})),
            "line 2: .* takes the arguments",
        ),
        (_row(1, "P", NO_COMMA), "line 2 has the same key as p.jsonl line 1"),
        (_row(9, "One", NO_COMMA), "line 2 has the same prompt as p.jsonl line 1"),
    ],
)
def test_a_malformed_prompt_is_named_by_line(tmp_path: Path, row: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_prompts(_write(tmp_path / "p.jsonl", [PROMPTS[0], row]))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"none.jsonl cannot be read \(No such file"):
        score_responses(responses=tmp_path / "none.jsonl", prompts=_write(tmp_path / "p.jsonl", PROMPTS))


def test_responses_to_other_prompts_are_refused(tmp_path: Path) -> None:
    given = _write(tmp_path / "r.jsonl", [{"prompt": "Four", "response": "x"}])
    with pytest.raises(UserError, match="answers none of the prompts"):
        score_responses(responses=given, prompts=_write(tmp_path / "p.jsonl", PROMPTS))


def test_arguments_that_the_hub_fills_with_null_are_absent(tmp_path: Path) -> None:
    filled = [
        {**row, "kwargs": [{"num_words": None, "relation": None, **kwargs} for kwargs in row["kwargs"]]}
        for row in PROMPTS
    ]
    plain = read_prompts(_write(tmp_path / "p.jsonl", PROMPTS))
    assert hash_prompts(read_prompts(_write(tmp_path / "q.jsonl", filled))) == hash_prompts(plain)


def test_the_hash_knows_every_part_of_a_prompt(tmp_path: Path) -> None:
    first = hash_prompts(read_prompts(_write(tmp_path / "p.jsonl", PROMPTS)))
    for changed in (_row(7, "One", NO_COMMA), _row(1, "One!", NO_COMMA), _row(1, "One", LOWER)):
        assert hash_prompts(read_prompts(_write(tmp_path / "q.jsonl", [changed, *PROMPTS[1:]]))) != first


def test_a_thinking_block_is_not_judged() -> None:
    assert answer_of("<think>a, b</think>\n\nanswer", thinking=True) == "answer"
    assert answer_of("still thinking, and cut off", thinking=True) == ""
    assert answer_of("plain", thinking=False) == "plain"


def test_repeated_share_counts_4_grams_seen_before() -> None:
    assert repeated_share("one two three") == 0
    assert repeated_share("a b c d e f g h") == 0
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)  # 5 grams, the last equals the first
    assert repeated_share("la " * 103) == pytest.approx(0.99)


def test_answer_figures_say_how_answers_end_and_repeat() -> None:
    records = [
        _record(1, [True], finished=True, num_tokens=10, repeated_share=0.0, response="a b"),
        _record(2, [True, False], finished=False, num_tokens=30, repeated_share=0.5, response="a b c d"),
    ]
    figures = summarise(records, missing=0)
    assert figures["no_stop_rate"] == 0.5
    assert figures["repetition_rate"] == 0.5
    assert figures["mean_response_tokens"] == 20
    assert figures["mean_response_words"] == 3
    without = [{k: v for k, v in record.items() if k not in ("finished", "num_tokens")} for record in records]
    assert not {"no_stop_rate", "mean_response_tokens"} & set(summarise(without, missing=0))


def test_repeats_count_every_answer_and_stay_one_cluster() -> None:
    records = [{**_record(key, [key % 2 == 0]), "repeat": repeat} for key in range(40) for repeat in range(5)]
    figures = summarise(records, missing=0)
    assert figures["prompt_level_strict"] == {"correct": 100, "total": 200, "accuracy": 0.5}
    low, high = figures["intervals"]["prompt_level_strict"]
    assert high - low > 0.25  # 40 prompts, not 200 independent answers (which would give 0.14)


def _record(key: int, strict: list[bool], **more: Any) -> dict[str, Any]:
    kinds = ["punctuation:no_comma", "length_constraints:number_words"][: len(strict)]
    base = {"key": key, "repeat": 0, "instruction_ids": kinds, "strict": strict, "loose": strict}
    return {**base, "response": "x", "repeated_share": 0.0, **more}


def test_the_development_set_is_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.data.prompts.require_checkers", lambda kinds: None)
    assert len(read_prompts("builtin:dev")) >= 500
    with pytest.raises(UserError, match="name a jsonl file, a Hub dataset, or builtin:dev"):
        read_prompts("builtin:test")
