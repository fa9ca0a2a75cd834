"""Fine-tuning and preference tuning as stages of a run and as verbs."""

import json

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from interruption import Killed, interrupted
from regrow.cli import app
from regrow.dry_run import describe_run
from regrow.errors import UserError
from regrow.recipe import parse_recipe
from regrow.runner import run_recipe
from regrow.training.trl_trainers import PlannedDpo
from tiny_models import save_tiny_model
from training_case import TITLED, write_conversations

QUICK = {"max_steps": 2, "report_to": [], "precision": "fp32", "logging_steps": 1, "rank": 2, "alpha": 4}
DPO = {
    "num_samples": 1,
    "rollout_tokens": 6,
    "min_pairs": 4,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
}


def write_corpus(path, num_rows, word):
    turns = [(f"{word} {row}: answer with a title.", f"<<{word} {row}>>") for row in range(num_rows)]
    write_conversations(path, turns, meta=TITLED)


@pytest.fixture
def recipe(tmp_path):
    save_tiny_model("llama", tmp_path / "parent")
    write_corpus(tmp_path / "train.jsonl", 8, "train")
    write_corpus(tmp_path / "held.jsonl", 4, "held")
    return {
        "name": "tiny",
        "model": str(tmp_path / "parent"),
        "sequence_length": 96,
        "device": "cpu",
        "corpora": [{"source": str(tmp_path / "train.jsonl")}],
        "held_out": {"source": str(tmp_path / "held.jsonl")},
        "prune": {"width": 64, "step": 32, "criterion": "magnitude", "refit": False},
        "sft": {**QUICK, "select_by": "last"},
        "dpo": {**QUICK, **DPO},
        "evaluate": {"benchmarks": ["fidelity"]},
    }


def test_run_measures_and_publishes_what_each_stage_made(recipe, tmp_path):
    parsed = parse_recipe(recipe, "recipe")
    assert any(
        line.startswith("disk:") and " 3 model(s)" in line for line in describe_run(parsed, tmp_path / "x")
    )
    run_recipe(parsed, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["stages"]) == ["prune", "sft", "dpo", "evaluate"]
    assert set(results["models"]) == {"teacher", "pruned", "finetuned", "aligned"}
    assert results["final"] == "aligned"
    assert len((tmp_path / "run/stages/dpo/pairs.jsonl").read_text().splitlines()) == 8
    card = (tmp_path / "run/model/README.md").read_text()
    for words in (
        "Fine-tuned: LoRA trained and merged",
        "8 pairs of answers",
        "Aligned (DPO)",
        "DPO on pairs of answers",
        "rafailov2023dpo",
        "- sft",
    ):
        assert words in card
    assert "knowledge-distillation" not in card
    assert "hinton2015distilling" not in card
    assert "Preferences (LoRA)" in (tmp_path / "run/report.html").read_text()
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_was_judged_is_not_skipped_where_constraints_changed(recipe, tmp_path, stage):
    recipe["sft"] = {**QUICK, "rows": "followed"} if stage == "sft" else None
    run_recipe(parse_recipe(recipe, "recipe"), tmp_path / "run", until=stage)
    corpus = tmp_path / "train.jsonl"
    corpus.write_text(corpus.read_text().replace("detectable_format:title", "punctuation:no_comma"))
    with pytest.raises(UserError, match=rf"{stage}.*recipe\.constraints"):
        run_recipe(parse_recipe(recipe, "recipe"), tmp_path / "run", until=stage)


def test_other_settings_train_on_the_same_pairs(recipe, tmp_path, monkeypatch):
    recipe["sft"] = None
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted(patch, PlannedDpo, "compute_loss", 1)
        with pytest.raises(Killed):
            run_recipe(parse_recipe(recipe, "recipe"), run, until="dpo")

    def never(*args, **kwargs):
        raise AssertionError("the student writes again")

    monkeypatch.setattr("regrow.training.writing.generate_responses", never)
    recipe["dpo"]["learning_rate"] = 1e-3
    run_recipe(parse_recipe(recipe, "recipe"), run, until="dpo")
    pairs = (run / "stages/dpo/pairs.jsonl").read_text()
    recipe["dpo"]["beta"] = 0.2  # after the stage is finished too
    run_recipe(parse_recipe(recipe, "recipe"), run, start="dpo", until="dpo")
    assert (run / "stages/dpo/pairs.jsonl").read_text() == pairs
    recipe["dpo"]["rollout_tokens"] = 7
    with pytest.raises(AssertionError, match="writes again"):
        run_recipe(parse_recipe(recipe, "recipe"), run, start="dpo", until="dpo")


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_verbs_take_the_keys_of_their_section(recipe, tmp_path, verb):
    settings = recipe[verb] | {"report_to": "[]"}
    options = [
        part for key, value in settings.items() if key != "max_steps" for part in ("--set", f"{key}={value}")
    ]
    parent = recipe["model"]
    command = [verb, parent, "--teacher", parent, "--corpus", str(tmp_path / "train.jsonl"), "--steps", "1"]
    command += ["--held-out", str(tmp_path / "held.jsonl"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"method: {verb}" in done.stdout
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / ".out.work").exists()
    done = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "b"), "--set", "lr=1"])
    assert isinstance(done.exception, UserError)
    assert f"{verb}.lr" in str(done.exception)
