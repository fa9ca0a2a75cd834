"""`sft` and `dpo`, interrupted anywhere and continued, end at the weights of a run that was not."""

import pytest

from interruption import Killed, assert_same_run, interrupted
from regrow.errors import RunError, UserError
from regrow.training.dpo import dpo
from regrow.training.post_steps import PostSteps
from regrow.training.record import RunRecord
from regrow.training.sft import sft
from regrow.training.trl_trainers import PlannedDpo, PlannedSft
from training_case import preference_case

SETTINGS = {
    "max_steps": 7,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "sequence_length": 48,
    "device": "cpu",
    "report_to": (),
    "eval_steps": 3,
    "save_steps": 2,
    "logging_steps": 3,
    "rank": 2,
    "alpha": 4,
    "select_by": "last",
}
SFT = SETTINGS | {"batch_tokens": 128, "dropout": 0.3}
DPO = SETTINGS | {"batch_size": 3, "num_samples": 2, "min_pairs": 8, "rollout_tokens": 8}
STAGES = {"sft": (sft, SFT, PlannedSft), "dpo": (dpo, DPO, PlannedDpo)}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return preference_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return STAGES[request.param]


@pytest.fixture(scope="module")
def whole(case, stage, tmp_path_factory):
    """An undisturbed run: its report and its model."""
    function, settings, _ = stage
    folder = tmp_path_factory.mktemp("whole")
    return function(**case, out=folder / "out", work_dir=folder / "work", **settings), folder / "out"


def kill(case, stage, folder, monkeypatch, method, at, owner=None, **options):
    function, settings, trainer = stage
    with monkeypatch.context() as patch:
        interrupted(patch, owner or trainer, method, at)
        with pytest.raises(Killed):
            function(**case, out=folder / "out", work_dir=folder / "work", **settings | options)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("owner", "method", "at"),
    [
        (None, "compute_loss", 1),  # before any checkpoint
        (None, "compute_loss", 8),  # in the middle of an accumulated step, off the rhythm of checkpoints
        (None, "_save", 2),  # while a checkpoint is written
        (PostSteps, "_evaluate", 3),  # between a step and its checkpoint
        (PostSteps, "chosen", 1),  # at the very end
    ],
)
def test_interrupted_training_is_the_same_run(case, stage, whole, tmp_path, monkeypatch, owner, method, at):
    kill(case, stage, tmp_path, monkeypatch, method, at, owner)
    function, settings, trainer = stage
    if method == "chosen":
        interrupted(monkeypatch, trainer, "compute_loss", 1)  # nothing is left to train
    report = function(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **settings)
    assert_same_run(whole[0], report, (whole[1], tmp_path / "out"))
    assert [entry["step"] for entry in report["losses"]] == [2, 3, 4, 6, 7]


def test_a_damaged_checkpoint_goes_back_to_the_one_before(case, stage, whole, tmp_path, monkeypatch, capsys):
    kill(case, stage, tmp_path, monkeypatch, "compute_loss", 11)
    newest = tmp_path / "work" / "checkpoint-4"
    assert {path.name for path in newest.iterdir()} >= {"model.safetensors", "optimizer.pt", "rng_state.pth"}
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    function, settings, _ = stage
    report = function(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **settings)
    said = capsys.readouterr().err
    assert "step 4 is damaged" in said
    assert "continuing from step 2 of 7" in said
    assert_same_run(whole[0], report, (whole[1], tmp_path / "out"))


def test_the_best_adapters_survive(case, stage, tmp_path, monkeypatch):
    real = RunRecord.add_evaluation
    monkeypatch.setattr(  # the second step is the best, whatever was measured
        RunRecord,
        "add_evaluation",
        lambda self, step, figures: real(self, step, figures | {"kl": 1.0 + abs(step - 2)}),
    )
    options = {"select_by": "held_out_kl", "eval_steps": 1}
    function, settings, _ = stage
    reports = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        if name == "killed":
            kill(case, stage, folder, monkeypatch, "compute_loss", 11, **options)
        reports.append(function(**case, out=folder / "out", work_dir=folder / "work", **settings | options))
    assert reports[1]["chosen_step"] == 2
    assert_same_run(*reports, (tmp_path / "whole" / "out", tmp_path / "killed" / "out"))


def test_other_settings_do_not_continue_a_run(case, stage, tmp_path, monkeypatch):
    kill(case, stage, tmp_path, monkeypatch, "compute_loss", 5)
    function, settings, _ = stage
    folders = {"out": tmp_path / "out", "work_dir": tmp_path / "work"}
    others = {"learning_rate": 0.1, "gradient_accumulation_steps": 1, "rank": 3, "targets": ("up_proj",)}
    for name, value in others.items():
        with pytest.raises(UserError, match=f"training run with {name} .*, not .*use the same settings"):
            function(**case, **folders, **settings | {name: value})
    own = {"batch_tokens": 64} if function is sft else {"num_samples": 3}
    with pytest.raises(UserError, match=f"training run with {next(iter(own))} "):
        function(**case, **folders, **settings | own)
    function(**case, **folders, **settings | {"save_steps": 5, "max_shard_size": "1MB"})


def test_a_broken_loss_leaves_the_last_good_checkpoint(case, stage, tmp_path):
    function, settings, _ = stage
    broken = settings | {"learning_rate": 1e30, "warmup_fraction": 0.0, "save_steps": 1, "max_grad_norm": 1e9}
    with pytest.raises(RunError, match="The last checkpoint is kept"):
        function(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **broken)
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-1"]
