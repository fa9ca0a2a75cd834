"""Stored results: written whole, found by what they were measured with, refused when damaged."""

import json
from pathlib import Path

import pytest

from regrow.errors import UserError
from regrow.evaluation.records import find_anywhere, find_result, read_result, settings_hash, write_result
from regrow.types import EvalResult

SETTINGS = {"prompts": "file.jsonl", "comparable": {"max_new_tokens": 8}, "model": "abc"}
RESULT = EvalResult("ifeval", {"missing": 0}, [{"key": 1, "response": "é\u2028\n"}, {"key": 2}], SETTINGS)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_result(tmp_path, "m-ifeval", RESULT)
    assert read_result(tmp_path / "m-ifeval.json") == RESULT
    assert read_result(tmp_path / "m-ifeval.jsonl") == RESULT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-ifeval.json", "m-ifeval.jsonl"]


def test_a_result_is_found_only_with_equal_settings(tmp_path: Path) -> None:
    write_result(tmp_path, "m-ifeval", RESULT)
    assert find_result(tmp_path, "m-ifeval", SETTINGS) == RESULT
    assert find_result(tmp_path, "m-ifeval", {**SETTINGS, "prompts": "elsewhere/file.jsonl"}) == RESULT
    assert find_result(tmp_path, "m-ifeval", {**SETTINGS, "model": "other"}) is None
    assert find_result(tmp_path, "m-ifeval", {**SETTINGS, "comparable": {"max_new_tokens": 9}}) is None
    assert find_result(tmp_path, "n-ifeval", SETTINGS) is None
    assert find_anywhere(tmp_path, "ifeval", SETTINGS) == RESULT
    assert find_anywhere(tmp_path, "latency", SETTINGS) is None


def test_hash_ignores_the_order_of_keys() -> None:
    assert settings_hash(SETTINGS) == settings_hash(dict(reversed(SETTINGS.items())))


def test_damage_is_named_and_measured_again(tmp_path: Path) -> None:
    write_result(tmp_path, "m-ifeval", RESULT)
    records = tmp_path / "m-ifeval.jsonl"
    records.write_text(records.read_text().split("\n")[0] + "\n")
    with pytest.raises(UserError, match="has 1 of 2 records"):
        read_result(records)
    assert find_result(tmp_path, "m-ifeval", SETTINGS) is None
    (tmp_path / "m-ifeval.json").write_text("{}")
    with pytest.raises(UserError, match="holds no result of regrow evaluate"):
        read_result(records)
    write_result(tmp_path, "m-ifeval", RESULT)
    summary = json.loads((tmp_path / "m-ifeval.json").read_text())
    (tmp_path / "m-ifeval.json").write_text(json.dumps({**summary, "schema": 99}))
    with pytest.raises(UserError, match="another version"):
        read_result(records)
