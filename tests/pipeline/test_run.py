"""One recipe from parent to card, on tiny models of real architectures, through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_models import save_tiny_model
from training_case import write_conversations

TASKS = ["Name a colour", "Count to three", "Say hello", "Write a short line", "Name an animal"]


def regrow(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "regrow", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def write_corpus(path: Path, num_rows: int, word: str) -> None:
    turns = [
        (
            f"{TASKS[row % len(TASKS)]}, please ({word} {row}).",
            f"Certainly: {word} {row} {'ab ' * (row % 7)}.",
        )
        for row in range(num_rows)
    ]
    write_conversations(path, turns)


def write_recipe(folder: Path, parent: Path, **changes) -> Path:
    write_corpus(folder / "train.jsonl", 40, "train")
    write_corpus(folder / "held.jsonl", 10, "held")
    prompts = [
        {
            "key": key,
            "prompt": f"{task}. Use no commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for key, task in enumerate(TASKS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    training = {
        "batch_tokens": 256,
        "learning_rate": 1e-3,
        "eval_steps": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "precision": "fp32",
    }
    value = {
        "name": "tiny",
        "model": str(parent),
        "sequence_length": 64,
        "device": "cpu",
        "corpora": [{"source": str(folder / "train.jsonl")}],
        "held_out": {"source": str(folder / "held.jsonl")},
        "calibrate": {"num_tokens": 1500, "batch_size": 4},
        "prune": {"width": 64, "step": 32, "shards": 3},
        "distill": {"max_steps": 6, **training},
        "recover": {"max_steps": 3, "rank": 2, "alpha": 4, **training},
        "finish": {
            "max_steps": 3,
            "rollout_tokens": 8,
            "development_prompts": str(folder / "prompts.jsonl"),
            "development_tokens": 8,
            **training,
        },
        "evaluate": {
            "ifeval": {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 8, "batch_size": 4},
            "latency": {"prompt_tokens": 16, "new_tokens": 4, "repeats": 1},
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(value | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_whole_run_then_skip(tmp_path, family):
    parent = tmp_path / "parent"
    save_tiny_model(family, parent)
    recipe = write_recipe(tmp_path, parent)
    out = tmp_path / "run"
    regrow("run", recipe, "--out", out)

    results = json.loads((out / "results.json").read_text())
    assert list(results["stages"]) == ["calibrate", "prune", "distill", "recover", "finish", "evaluate"]
    assert set(results["models"]) == {"teacher", "pruned", "distilled", "recovered", "finished"}
    assert results["final"] == "finished"
    for name in ("pruned", "distilled", "recovered", "finished"):
        fidelity = results["models"][name]["fidelity"]
        assert 0 <= fidelity["top1_agreement"] <= 1
        assert fidelity["kl_mean"] >= 0
    assert results["models"]["teacher"]["ifeval"]["prompt_level_strict"]["total"] == len(TASKS)

    model = out / "model"
    assert sorted(path.name for path in model.glob("*.safetensors")) == [
        f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)
    ]
    card = (model / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    ids = AutoTokenizer.from_pretrained(model)("hello", return_tensors="pt")["input_ids"]
    assert torch.isfinite(loaded(ids).logits).all()
    assert regrow("verify", model, "--against", parent, "--trained").returncode == 0

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = regrow("run", recipe, "--out", out)
    assert again.stderr.count("already finished, skipped") == 7
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


@pytest.mark.slow
def test_killed_run_ends_at_the_same_weights(tmp_path):
    parent = tmp_path / "parent"
    save_tiny_model("llama", parent)
    recipe = write_recipe(tmp_path, parent, recover=None, finish=None)
    regrow("run", recipe, "--out", tmp_path / "whole", "--until", "distill")

    command = [
        sys.executable,
        "-m",
        "regrow",
        "run",
        recipe,
        "--out",
        tmp_path / "killed",
        "--until",
        "distill",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if list((tmp_path / "killed" / "work").glob("distill-*/**/checkpoint-*")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "stages" / "distill").exists()
    regrow("run", recipe, "--out", tmp_path / "killed", "--until", "distill")

    def weights(run: str) -> dict[str, torch.Tensor]:
        files = sorted((tmp_path / run / "stages" / "distill" / "model").glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    whole, killed = weights("whole"), weights("killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_dry_run_writes_nothing_and_takes_a_bare_config(tmp_path):
    parent = tmp_path / "parent"
    save_tiny_model("llama", parent)
    for path in parent.iterdir():
        if path.name != "config.json":
            path.unlink()
    recipe = write_recipe(tmp_path, parent)
    before = sorted(tmp_path.rglob("*"))
    done = regrow("run", recipe, "--out", tmp_path / "run", "--dry-run")
    assert "96 -> 64" in done.stdout
    assert "train.jsonl: 40 usable rows" in done.stdout
    assert "distill: run" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_says_what_the_parent_would_write(tmp_path):
    parent = tmp_path / "parent"
    save_tiny_model("llama", parent)
    text = tmp_path / "text"
    recipe = write_recipe(
        tmp_path,
        parent,
        synthesize=[{"out": str(text), "num_prompts": 2000}],
        corpora=[{"source": f"{text}/train.jsonl"}],
        held_out={"source": f"{text}/held_out.jsonl"},
    )
    done = regrow("run", recipe, "--out", tmp_path / "run", "--dry-run")
    assert f"synthesize {text} (2,000 prompts): run" in done.stdout
    assert f"corpus: {text}/train.jsonl: written by the parent first" in done.stdout
    assert not text.exists()


def test_sequential_calibration_belongs_to_one_way_of_pruning(tmp_path):
    parent = tmp_path / "parent"
    save_tiny_model("llama", parent)
    calibrate = {"num_tokens": 1500, "batch_size": 4, "method": "sequential"}
    recipe = write_recipe(tmp_path, parent, calibrate=calibrate)
    out = tmp_path / "run"
    for criterion in ("obs", "obs_fisher"):
        regrow(
            "run",
            recipe,
            "--out",
            out / criterion,
            "--until",
            "prune",
            "--set",
            f"prune.criterion={criterion}",
        )
        report = json.loads((out / criterion / "stages/prune/report.json").read_text())
        assert report["criterion"] == criterion
    for change in ("prune.width=32", "prune.criterion=wanda"):
        refused = regrow(
            "run", recipe, "--out", out / "obs", "--until", "prune", "--set", change, check=False
        )
        assert refused.returncode == 2
        assert "calibrate" in refused.stderr
        assert change.split("=")[0].rpartition(".")[2] in refused.stderr
