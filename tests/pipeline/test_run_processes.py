"""`regrow run --processes 2` on the CPU: the same run, shared."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tiny_models import save_tiny_model
from training_case import assert_close, write_conversations

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TRAINING = {
    "batch_tokens": 128,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "eval_steps": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "precision": "fp32",
    "select_by": "last",
}


def command(recipe: Path, out: Path, *options: object) -> list[str]:
    return [sys.executable, "-m", "regrow", "run", *map(str, (recipe, "--out", out, *options))]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def regrow_run(recipe: Path, out: Path, *options: object, code: int = 0) -> str:
    """Run a recipe; returns what it said."""
    done = subprocess.run(
        command(recipe, out, *options), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A tiny parent, its text and a recipe with every stage that processes can share."""
    folder = tmp_path_factory.mktemp("case")
    save_tiny_model("llama", folder / "parent")
    for name, count in (("train", 40), ("held", 10)):
        turns = [
            (f"Say {name} {row}, please.", f"Certainly: {row} {'ab ' * (row % 7)}.") for row in range(count)
        ]
        write_conversations(folder / f"{name}.jsonl", turns)
    value = {
        "name": "tiny",
        "model": str(folder / "parent"),
        "sequence_length": 64,
        "device": "cpu",
        "corpora": [{"source": str(folder / "train.jsonl")}],
        "held_out": {"source": str(folder / "held.jsonl")},
        "calibrate": {"num_tokens": 1500, "batch_size": 4},
        "prune": {"width": 64, "step": 32},
        "distill": {"max_steps": 6, **TRAINING},
        "recover": {"max_steps": 3, "rank": 2, "alpha": 4, **TRAINING},
        "finish": {"max_steps": 2, "rollout_tokens": 8, **TRAINING},
        "evaluate": {"benchmarks": ["fidelity"]},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="module")
def alone(recipe) -> Path:
    """The run of one process."""
    regrow_run(recipe, recipe.parent / "alone")
    return recipe.parent / "alone"


def read_report(run: Path, stage: str) -> dict:
    return json.loads((run / "stages" / stage / "report.json").read_text())


def assert_same_weights(left: Path, right: Path, stage: str, before: str) -> None:
    """What a stage made of the same model differs by far less than it moved it."""
    places = ((left, stage), (right, stage), (left, before))
    assert_close(*(run / "stages" / name / "model" for run, name in places))


def test_two_processes_make_the_same_run(recipe, alone, tmp_path):
    out = tmp_path / "run"
    said = regrow_run(recipe, out, "--processes", 2)
    for stage in ("calibrate", "distill", "recover", "finish"):
        assert f"== {stage} in 2 processes" in said
        assert read_report(alone, stage)["world_size"] == 1
        assert read_report(out, stage)["world_size"] == 2
    for stage in ("prune", "evaluate", "report"):
        assert f"== {stage} in one process" in said
    assert said.count("step 3: held-out KL") == 2  # distill's and recover's, of the first process only
    assert "[rank1]" not in said

    one, two = (load_file(run / "stages/calibrate/statistics.safetensors") for run in (alone, out))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
    for stage, before in (("distill", "prune"), ("recover", "distill")):
        left, right = ([entry["loss"] for entry in read_report(run, stage)["losses"]] for run in (alone, out))
        assert right == pytest.approx(left, rel=1e-4)
        assert_same_weights(alone, out, stage, before)
    assert [path.name for path in (out / "stages/distill").iterdir()].count("model") == 1
    assert list((out / "work").iterdir()) == []

    # Neither folder says how many processes made it: each goes on with any number.
    assert regrow_run(recipe, out).count("already finished, skipped") == 7
    assert regrow_run(recipe, alone, "--processes", 2).count("already finished, skipped") == 7


def test_a_killed_run_goes_on_with_another_number_of_processes(recipe, alone, tmp_path):
    out = tmp_path / "run"
    options = ("--until", "distill", "--processes", 2)
    process = subprocess.Popen(command(recipe, out, *options), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if list((out / "work").glob("distill-*/checkpoint-*")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert not (out / "stages/distill").exists()
    said = regrow_run(recipe, out, "--until", "distill")
    assert "distill: continuing from step" in said
    assert read_report(out, "distill")["world_size"] == 1
    assert_same_weights(alone, out, "distill", "prune")


def test_what_a_user_gets_wrong_is_one_sentence(recipe, tmp_path):
    out = tmp_path / "run"
    options = ("--until", "distill", "--processes", 2)
    said = regrow_run(recipe, out, *options, "--set", "distill.optimizer=nonsense", code=2)
    assert said.count("The trainer refuses these settings") == 1
    assert said.splitlines()[-1].startswith("regrow: The trainer refuses these settings: ")
    assert "Traceback" not in said
    assert sorted(path.name for path in (out / "stages").iterdir()) == ["calibrate", "prune"]
    regrow_run(recipe, out, *options)

    said = regrow_run(recipe, tmp_path / "other", "--processes", 3, code=2)
    assert said.startswith("regrow: distill.gradient_accumulation_steps is 2, which 3 processes cannot share")
    assert not (tmp_path / "other").exists()
    for wrong in ("0", "-1"):
        assert "use 1 or more" in regrow_run(recipe, tmp_path / "other", "--processes", wrong, code=2)


def test_dry_run_names_the_shared_stages(recipe, tmp_path):
    done = subprocess.run(
        command(recipe, tmp_path / "run", "--dry-run", "--processes", 2),
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    assert "distill: run in 2 processes\n" in done.stdout
    assert "prune: run\n" in done.stdout
