"""A run that is interrupted anywhere and continued ends at the weights of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from interruption import Killed, assert_same_run, interrupted
from regrow.errors import UserError
from regrow.training.distill import distill
from regrow.training.recover import recover
from regrow.training.trainer import DistillTrainer
from training_case import QUICK, make_case, same_bytes, tensors_of

SETTINGS = QUICK | {"gradient_accumulation_steps": 2, "max_steps": 7, "logging_steps": 3}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("compute_loss", 1),  # before any checkpoint
        ("compute_loss", 7),  # in the middle of an accumulated step, off the checkpoints' rhythm
        ("evaluate", 2),  # between a step and its checkpoint
        ("_save", 2),  # while a checkpoint is written
        ("finish_step", 7),  # at the very end
    ],
)
def test_interrupted_distillation_is_the_same_run(case, tmp_path, monkeypatch, method, at):
    whole = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **SETTINGS)
    with monkeypatch.context() as patch:
        interrupted(patch, DistillTrainer, method, at)
        with pytest.raises(Killed):
            distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **SETTINGS)
    assert not (tmp_path / "b").exists()
    resumed = distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **SETTINGS)
    assert_same_run(whole, resumed, (tmp_path / "a", tmp_path / "b"))


def test_dropout_and_adapters_resume_too(case, tmp_path, monkeypatch):
    lora = {"rank": 2, "alpha": 4, "dropout": 0.3, **SETTINGS}
    whole = recover(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **lora)
    with monkeypatch.context() as patch:
        interrupted(patch, DistillTrainer, "compute_loss", 10)
        with pytest.raises(Killed):
            recover(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **lora)
    resumed = recover(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **lora)
    assert_same_run(whole, resumed, (tmp_path / "a", tmp_path / "b"))


def test_on_policy_windows_resume_too(case, tmp_path, monkeypatch):
    settings = SETTINGS | {"on_policy_fraction": 0.5, "refresh_steps": 3, "rollout_tokens": 8}
    whole = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **settings)
    with monkeypatch.context() as patch:
        interrupted(patch, DistillTrainer, "compute_loss", 11)  # step 6: in the second window
        with pytest.raises(Killed):
            distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **settings)
    resumed = distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **settings)
    assert_same_run(whole, resumed, (tmp_path / "a", tmp_path / "b"))
    windows = sorted(path.name for path in (tmp_path / "wa" / "rollouts").iterdir())
    assert windows == [f"window-{window}-0of1.json" for window in range(3)]


def test_a_finished_run_whose_result_was_lost_only_writes_it_again(case, tmp_path, monkeypatch):
    first = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "w", **SETTINGS)
    interrupted(monkeypatch, DistillTrainer, "compute_loss", 1)
    second = distill(**case, out=tmp_path / "b", work_dir=tmp_path / "w", **SETTINGS)
    assert_same_run(first, second, (tmp_path / "a", tmp_path / "b"))


def test_other_settings_do_not_continue_a_run(case, tmp_path):
    work = tmp_path / "w"
    distill(**case, out=tmp_path / "a", work_dir=work, **SETTINGS)
    with pytest.raises(UserError, match=r"with learning_rate 0.002, not 0.1"):
        distill(**case, out=tmp_path / "b", work_dir=work, **SETTINGS | {"learning_rate": 0.1})


SCRIPT = """
import json, sys
from pathlib import Path
from regrow.training.distill import distill
arguments = json.loads(sys.argv[1])
for name in ("student", "teacher", "out", "work_dir"):
    arguments[name] = Path(arguments[name])
distill(**arguments)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(case, tmp_path):
    """The benchmark kill_resume.py does this fifty times."""
    distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **SETTINGS | {"save_steps": 1})
    arguments = {**case, "out": tmp_path / "b", "work_dir": tmp_path / "wb", **SETTINGS, "save_steps": 1}
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments, default=str)]
    moments = random.Random(0)
    work, kills = Path(tmp_path / "wb"), 0
    while not (tmp_path / "b").exists():
        assert kills < 20
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
        if kills < 3:
            while process.poll() is None and not work.exists():
                time.sleep(0.05)
            time.sleep(moments.uniform(1.0, 8.0))
            process.send_signal(signal.SIGKILL)
            kills += 1
        else:
            kills += 1
        process.wait()
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(same_bytes(one[name], other[name]) for name in one)
    assert torch.isfinite(one["model.norm.weight"]).all()
