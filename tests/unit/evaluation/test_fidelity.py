"""Fidelity against a naive float64 oracle, whatever the batches, the padding and the counting rule."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference import naive_token_figures
from regrow.data.blend import encode_corpora
from regrow.errors import UserError
from regrow.evaluation.fidelity import evaluate_fidelity
from regrow.evaluation.token_table import TokenTable, row_records, table_figures
from regrow.modeling.load import load_model, load_tokenizer
from tiny_models import save_tiny_model

NAMES = ("top1_agreement", "top5_agreement", "kl_mean", "kl_p95", "student_perplexity", "teacher_perplexity")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A teacher, a student near it, and chat text with rows of very different lengths."""
    folder = tmp_path_factory.mktemp("fidelity")
    teacher = save_tiny_model("qwen3", folder / "teacher", seed=0)
    model = load_model(teacher, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    student = folder / "student"
    model.save_pretrained(student)
    rows = [{"instruction": f"q{i} " * (1 + i % 5), "output": f"a{i} " * (1 + 3 * (i % 4))} for i in range(9)]
    data = folder / "held.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return student, teacher, str(data)


def _measure(pair: tuple[Path, Path, str], **options: Any) -> Any:
    student, teacher, data = pair
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "sequence_length": 96, "batch_size": 4}
    return evaluate_fidelity(
        student=student, teacher=teacher, held_out=(data, "train", 1.0, None), **{**defaults, **options}
    )


def _oracle(pair: tuple[Path, Path, str], *, response: bool, max_length: int = 96) -> dict[str, Any]:
    student, teacher, data = pair
    encoded = encode_corpora(load_tokenizer(teacher), [(data, "train", 1.0, None)], max_length=max_length)
    models = [load_model(folder, dtype="float32").double() for folder in (student, teacher)]
    rows = [row.input_ids for row in encoded.rows]
    counted = [row.response_mask if response else [True] * len(row.input_ids) for row in encoded.rows]
    return naive_token_figures(*models, rows, counted)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize("response", [False, True])
def test_figures_are_the_oracles(pair: tuple[Path, Path, str], batch_size: int, response: bool) -> None:
    expected = _oracle(pair, response=response)
    found = _measure(pair, batch_size=batch_size, tokens="response" if response else "all").figures
    assert found["num_tokens"] == expected["num_tokens"]
    assert 0.1 < expected["top1_agreement"] < 0.98  # an easy case would prove nothing
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], rel=2e-4), name
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    other = found["all" if response else "response"]
    assert other["num_tokens"] == _oracle(pair, response=not response)["num_tokens"]
    assert other["kl_mean"] == pytest.approx(_oracle(pair, response=not response)["kl_mean"], rel=2e-4)


def test_rows_are_cut_at_the_sequence_length(pair: tuple[Path, Path, str]) -> None:
    expected = _oracle(pair, response=False, max_length=40)
    found = _measure(pair, sequence_length=40).figures
    assert found["num_tokens"] == expected["num_tokens"] < _oracle(pair, response=False)["num_tokens"]
    assert found["kl_mean"] == pytest.approx(expected["kl_mean"], rel=2e-4)


def test_a_model_agrees_with_itself(pair: tuple[Path, Path, str]) -> None:
    _, teacher, data = pair
    figures = _measure((teacher, teacher, data)).figures
    assert figures["top1_agreement"] == figures["top5_agreement"] == 1.0
    assert abs(figures["kl_mean"]) < 1e-6
    assert figures["student_perplexity"] == figures["teacher_perplexity"]


def test_records_hold_the_sums_of_the_figures(pair: tuple[Path, Path, str]) -> None:
    result = _measure(pair)
    tokens = sum(record["num_tokens"] for record in result.records)
    assert len(result.records) == result.figures["num_rows"] == 9
    assert tokens == result.figures["num_tokens"]
    assert sum(record["kl"] for record in result.records) / tokens == pytest.approx(
        result.figures["kl_mean"], rel=1e-9
    )
    response = [record["response"] for record in result.records]
    assert sum(r["top1"] for r in response) / sum(r["num_tokens"] for r in response) == pytest.approx(
        result.figures["response"]["top1_agreement"]
    )


def test_the_distillation_corpus_is_measured_beside(pair: tuple[Path, Path, str]) -> None:
    figures = _measure(pair, corpora=[(pair[2], "train", 1.0, 3)], num_rows=5).figures
    assert figures["num_rows"] == 5
    assert figures["corpus"]["num_rows"] == 3
    assert figures["corpus"]["num_tokens"] < figures["num_tokens"]


def test_of_several_corpora_one_pass_is_measured(pair: tuple[Path, Path, str]) -> None:
    corpora = [(pair[2], "train", 1.0, None), (pair[2], "train", 1.0, 2)]
    figures = _measure(pair, corpora=corpora).figures
    whole = _measure(pair, corpora=corpora[:1]).figures
    assert figures["corpus"]["num_rows"] < 2 + whole["corpus"]["num_rows"]


def test_settings_name_what_the_figures_depend_on(pair: tuple[Path, Path, str]) -> None:
    first, second = _measure(pair).settings, _measure(pair, batch_size=2, seed=3).settings
    assert first == second
    for options in ({"tokens": "response"}, {"sequence_length": 50}, {"num_rows": 4}):
        assert _measure(pair, **options).settings != first


def test_bad_input_is_one_sentence(pair: tuple[Path, Path, str], tmp_path: Path) -> None:
    student, _, data = pair
    with pytest.raises(UserError, match="tokens 'some' is unknown"):
        _measure(pair, tokens="some")
    model = load_model(student, dtype="float32")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="300 tokens in its vocabulary and the teacher 288"):
        _measure((tmp_path / "wide", pair[1], data))
    with pytest.raises(UserError, match="no response tokens within the sequence length"):
        _measure(pair, tokens="response", sequence_length=8)


def test_figures_of_a_hand_made_table() -> None:
    table = TokenTable(
        row=np.array([0, 0, 1, 1, 1]),
        response=np.array([False, True, False, False, True]),
        kl=np.array([0.0, 1.0, 2.0, 3.0, 4.0], dtype=np.float32),
        top1=np.array([True, False, True, True, False]),
        top5=np.array([True, True, True, True, False]),
        nll_student=np.log(np.array([2.0, 2.0, 2.0, 4.0, 8.0])).astype(np.float32),
        nll_teacher=np.log(np.array([2.0] * 5)).astype(np.float32),
    )
    figures = table_figures(table, "all")
    assert figures["top1_agreement"] == 0.6
    assert figures["top5_agreement"] == 0.8
    assert figures["kl_mean"] == 2.0
    assert figures["kl_p95"] == pytest.approx(3.8)
    assert figures["student_perplexity"] == pytest.approx((2 * 2 * 2 * 4 * 8) ** 0.2)
    assert figures["teacher_perplexity"] == pytest.approx(2.0)
    answers = table_figures(table, "response")
    assert (answers["num_tokens"], answers["top1_agreement"], answers["kl_mean"]) == (2, 0.0, 2.5)
    assert row_records(table)[1]["response"]["kl"] == 4.0
    none = TokenTable(**{**vars(table), "response": np.zeros(5, dtype=bool)})
    assert table_figures(none, "response") == {"num_tokens": 0}


def test_a_broken_models_perplexity_stays_a_number() -> None:
    column = np.array([1_000.0, 1_000.0], dtype=np.float32)
    flags = np.array([True, True])
    table = TokenTable(np.array([0, 1]), flags, column, flags, flags, column, column)
    assert math.isfinite(table_figures(table, "all")["student_perplexity"])
