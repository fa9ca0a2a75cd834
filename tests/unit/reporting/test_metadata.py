"""The card's header as the Hub reads it, and what is inherited from the parent."""

import pytest
import yaml
from huggingface_hub import ModelCard

from regrow.reporting.facts import read_facts
from regrow.reporting.metadata import card_data
from regrow.reporting.parent import read_parent
from regrow.reporting.rows import ifeval_name
from unit.reporting.fixture import full_results, only_pruned


def test_header_of_a_full_run(full_run):
    _, card, _ = full_run
    data = ModelCard(card).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.get("base_model_relation") == "finetune"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.license == "apache-2.0"
    assert data.language == ["en"]
    assert data.datasets == ["yahma/alpaca-cleaned"]
    assert {"regrow", "pruned", "knowledge-distillation", "lora"} <= set(data.tags)
    measured = {(result.dataset_type, result.metric_type): result for result in data.eval_results}
    inst = measured["google/IFEval", "inst_level_strict_acc"]
    assert inst.metric_value == round(242 / 834, 4)
    assert "95% interval 0.2552 to 0.3262" in inst.metric_name
    assert measured["builtin:smollm2-held-out", "top1_agreement"].metric_value == 0.868
    assert len(measured) == 8


def test_header_without_measurements(make_run):
    _, card, _ = make_run(only_pruned())
    header = yaml.safe_load(card.split("---")[1])
    assert "model-index" not in header
    assert "model_name" not in header
    assert "base_model_relation" not in header
    assert "license" not in header


def test_no_relation_is_claimed_for_an_unknown_parent():
    results = full_results()
    results["recipe"]["model"] = "/models/mine"
    results["parent_card"] = {}
    data = card_data(read_facts(results)).to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data


@pytest.mark.parametrize(
    ("prompts", "counts", "expected", "dataset"),
    [
        ("google/IFEval", (541, 834), "IFEval", "google/IFEval"),
        ("google/IFEval", (192, 304), "IFEval (first 192 prompts)", "google/IFEval"),
        ("builtin:dev", (541, 834), "Development set", "builtin:dev"),
        ("/data/ifeval/input_data.jsonl", (541, 834), "IFEval", "google/IFEval"),
        ("/data/mine.jsonl", (100, 130), "IFEval's checkers on mine.jsonl", "mine.jsonl"),
    ],
)
def test_only_ifeval_is_called_ifeval(prompts, counts, expected, dataset):
    results = full_results()
    for name in ("teacher", "recovered"):
        figures = results["models"][name]["ifeval"]
        figures["settings"]["prompts"] = prompts
        for key, total in zip(("prompt_level_strict", "inst_level_strict"), counts, strict=True):
            figures[key] = {"correct": 10, "total": total, "accuracy": 10 / total}
    facts = read_facts(results)
    assert ifeval_name(facts) == expected
    found = {result.dataset_type for result in card_data(facts).eval_results}
    assert found == {"builtin:smollm2-held-out", dataset}


def test_licence_and_language_from_the_parents_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma\nlanguage: [en, de]\n---\n# x\n"
    )
    (tmp_path / "LICENSE").write_text("Apache License\n   Version 2.0, January 2004")
    found = read_parent(tmp_path)
    assert found["license"] == "other"
    assert found["license_name"] == "gemma"
    assert found["language"] == ["en", "de"]
    assert found["license_source"] == "the parent's model card"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Apache License\n  Version 2.0, January 2004\n", "apache-2.0"),
        ("MIT License\n\nCopyright (c)", "mit"),
        ("All rights reserved.", None),
    ],
)
def test_licence_from_the_parents_licence_file(tmp_path, text, expected):
    (tmp_path / "LICENSE").write_text(text)
    assert read_parent(tmp_path).get("license") == expected


@pytest.mark.parametrize(
    "card", ["", "no header", "---\n- list\n---\n", "---\nlicense: [\n---\n", "---\nlicense: {a: 1}\n---\n"]
)
def test_a_broken_parents_card_says_nothing(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "regrow-source.json").write_text("[1")
    assert read_parent(tmp_path) == {}


def test_origin_of_a_fetched_parent(tmp_path):
    (tmp_path / "regrow-source.json").write_text('{"model_id": "a/b", "requirement": "c==1"}')
    found = read_parent(tmp_path)
    assert found["model_id"] == "a/b"
    assert "c==1" in found["origin"]
