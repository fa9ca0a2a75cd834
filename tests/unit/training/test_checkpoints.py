import json

import pytest

from regrow.errors import UserError
from regrow.training.best import BestWeights
from regrow.training.checkpoints import (
    claim_work_dir,
    newest_checkpoint,
    publish_checkpoint,
    read_record,
    staging_folder,
)
from regrow.training.settings import TrainingSettings


def publish(work, step, **record):
    folder = staging_folder(work) / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * step)
    (folder / "inner" / "more").write_bytes(b"m")
    return publish_checkpoint(work, step, {"step": step, **record})


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path):
    claim_work_dir(tmp_path, {})
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        publish(tmp_path, step)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert read_record(tmp_path / "checkpoint-100") == {"step": 100}
    assert not (tmp_path / "checkpoint-9").exists()
    assert not staging_folder(tmp_path).exists()


@pytest.mark.parametrize("damage", ["missing", "short", "record", "no record"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, capsys):
    for step in (1, 2):
        publish(tmp_path, step)
    newest = tmp_path / "checkpoint-2"
    if damage == "missing":
        (newest / "inner" / "more").unlink()
    elif damage == "short":
        (newest / "weights").write_bytes(b"w")
    elif damage == "record":
        (newest / "regrow.json").write_text('{"files": {"wei')
    else:
        (newest / "regrow.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert "step 2 is damaged" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_cleared(tmp_path):
    folder = staging_folder(tmp_path) / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_st')
    claim_work_dir(tmp_path, {"seed": 0})
    assert newest_checkpoint(tmp_path) is None
    assert not staging_folder(tmp_path).exists()


def test_a_folder_of_another_run_is_refused_by_the_setting_that_differs(tmp_path):
    claim_work_dir(tmp_path, {"seed": 0, "loss": "forward_kl"})
    claim_work_dir(tmp_path, {"seed": 0, "loss": "forward_kl"})
    with pytest.raises(UserError, match="with loss 'forward_kl', not 'jsd'"):
        claim_work_dir(tmp_path, {"seed": 0, "loss": "jsd"})


def test_entries_of_the_teacher_matter_only_where_they_are_used():
    ignored = [TrainingSettings(max_steps=1, teacher_entries=entries).identity() for entries in (8, 9)]
    assert ignored[0] == ignored[1]
    used = [
        TrainingSettings(max_steps=1, teacher_mode="top_k", teacher_entries=entries).identity()
        for entries in (8, 9)
    ]
    assert used[0] != used[1]


def test_identity_with_tuples_survives_json(tmp_path):
    claim_work_dir(tmp_path, json.loads(json.dumps({"targets": ["a", "b"]})))
    claim_work_dir(tmp_path, {"targets": ["a", "b"]})


def test_best_weights_live_as_long_as_a_checkpoint_names_them(tmp_path):
    best = BestWeights(tmp_path, writes=True)
    for step in (2, 4, 6):
        best.save(step, {})
    publish(tmp_path, 4, best_step=2)
    publish(tmp_path, 6, best_step=6)
    best.forget_unused()
    assert best.path(2).exists()  # the checkpoint of step 4 could still be gone back to
    assert best.path(6).exists()
    assert not best.path(4).exists()
    BestWeights(tmp_path, writes=False).save(8, {})
    assert not best.path(8).exists()
