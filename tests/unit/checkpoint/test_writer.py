import errno
import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from regrow.checkpoint import CheckpointReader, shard_file
from regrow.checkpoint.overlay import overlay_checkpoint
from regrow.checkpoint.shard_file import OutputTensor
from regrow.checkpoint.writer import config_text, whole_tensor, write_checkpoint
from regrow.errors import RunError, UserError
from surgery_helpers import tensor_bytes
from tiny_models import save_tiny_model


@pytest.fixture
def parent(tmp_path):
    return CheckpointReader(save_tiny_model("qwen3_5", tmp_path / "parent", dtype=torch.bfloat16))


def _copy(parent, out, **options):
    tensors = [whole_tensor(parent, name) for name in parent.tensors]
    return write_checkpoint(out=out, tensors=tensors, config=parent.config, parent=parent, **options)


@pytest.mark.parametrize("shards", [1, 2, 16, 75])
def test_exact_shards_hold_the_same_bytes(parent, tmp_path, shards):
    report = _copy(parent, tmp_path / "out", shards=shards)
    written = CheckpointReader(tmp_path / "out")
    assert len(written.shard_names) == report["shards"] == shards
    assert tensor_bytes(written) == tensor_bytes(parent)
    for name in written.shard_names:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert len(load_file(tmp_path / "out" / name)) > 0
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in parent.tensors.values())
        assert list(index["weight_map"]) == list(parent.tensors)
    else:
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_every_tensor_is_aligned_to_its_element(parent, tmp_path):
    _copy(parent, tmp_path / "out", shards=3)
    for tensor in CheckpointReader(tmp_path / "out").tensors.values():
        assert tensor.begin % {"F32": 4, "BF16": 2}[tensor.dtype] == 0


def test_config_keeps_its_layout_on_the_page(parent, tmp_path):
    _copy(parent, tmp_path / "out", shards=1)
    assert (tmp_path / "out" / "config.json").read_text() == (parent.folder / "config.json").read_text()


@pytest.mark.parametrize("text", ['{"b": 1, "a": 1e-06}\n', '{\n\t"a": 1}', "{}", '{\n  "é": [1,\n 2]\n}\n'])
def test_config_of_any_layout_can_be_written(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    again = config_text(json.loads(text), tmp_path / "config.json")
    assert json.loads(again) == json.loads(text)
    assert again.endswith("\n") == text.endswith("\n")


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_kernel_copies_the_bytes_are_the_same(parent, tmp_path, monkeypatch, error):
    def refuse(*arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    _copy(parent, tmp_path / "out", shards=2)
    assert tensor_bytes(CheckpointReader(tmp_path / "out")) == tensor_bytes(parent)


def test_large_tensors_go_in_pieces(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "PIECE_BYTES", 1000)
    _copy(parent, tmp_path / "out", shards=2)
    assert tensor_bytes(CheckpointReader(tmp_path / "out")) == tensor_bytes(parent)


def _nothing_left(tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def test_a_full_disk_leaves_nothing(parent, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(RunError, match="disk is full"):
        _copy(parent, tmp_path / "out", shards=2)
    _nothing_left(tmp_path)


def test_too_little_space_is_said_before_anything_is_written(parent, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result((0,) * 10) and _Free())
    with pytest.raises(RunError, match="free some space"):
        _copy(parent, tmp_path / "out")
    _nothing_left(tmp_path)


class _Free:
    free = 1000


def test_an_interrupted_write_leaves_nothing(parent, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    tensors = [whole_tensor(parent, name) for name in parent.tensors]
    tensors[-1] = OutputTensor(tensors[-1].name, tensors[-1].dtype, tensors[-1].shape, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(out=tmp_path / "out", tensors=tensors, config={}, parent=parent)
    _nothing_left(tmp_path)


def test_a_tensor_that_comes_out_short_is_an_error(parent, tmp_path):
    short = OutputTensor("w", "F32", (3,), lambda: [b"\0" * 8])
    with pytest.raises(RunError, match="8 bytes instead of 12"):
        write_checkpoint(out=tmp_path / "out", tensors=[short], config={}, parent=parent)
    _nothing_left(tmp_path)


def test_the_parent_and_other_results_are_never_overwritten(parent, tmp_path):
    before = tensor_bytes(parent)
    with pytest.raises(UserError):
        _copy(parent, parent.folder)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        _copy(parent, tmp_path / "taken")
    assert tensor_bytes(CheckpointReader(parent.folder)) == before
    (tmp_path / "empty").mkdir()
    _copy(parent, tmp_path / "empty")
    assert CheckpointReader(tmp_path / "empty").config == parent.config


def test_overlay_changes_what_it_is_told_and_nothing_else(parent, tmp_path):
    name, other = "model.language_model.layers.0.mlp.up_proj.weight", "mtp.fc.weight"
    new = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    report = overlay_checkpoint(
        base=parent.folder,
        out=tmp_path / "out",
        replacements={name: new, other: lambda: np.zeros((64, 128), np.float32)},
    )
    written = CheckpointReader(tmp_path / "out")
    expected = tensor_bytes(parent)
    bf16 = torch.from_numpy(new).to(torch.bfloat16)
    expected[name] = ("BF16", (96, 64), bf16.view(torch.uint8).numpy().tobytes())
    expected[other] = ("BF16", (64, 128), bytes(64 * 128 * 2))
    assert tensor_bytes(written) == expected
    assert report["replaced"] == 2
    assert report["shards"] == 2
    assert written.config == parent.config


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("absent", np.zeros(1, np.float32), UserError),
        ("model.language_model.norm.weight", np.zeros(63, np.float32), RunError),
        ("model.language_model.norm.weight", np.full(64, np.nan, np.float32), RunError),
        ("model.language_model.norm.weight", np.full(64, np.inf, np.float32), RunError),
    ],
)
def test_overlay_refuses_what_does_not_fit(parent, tmp_path, name, values, kind):
    with pytest.raises(kind):
        overlay_checkpoint(base=parent.folder, out=tmp_path / "out", replacements={name: values})
    _nothing_left(tmp_path)


def test_a_failure_in_one_file_stops_the_other_and_is_the_one_that_is_told(tmp_path):
    def fail():
        yield b"\0" * 4
        raise RunError("the first failure")

    def endless():
        while True:
            yield b"\0" * 4

    tensors = [OutputTensor("a", "F32", (1 << 40,), endless), OutputTensor("b", "F32", (1 << 40,), fail)]
    with pytest.raises(RunError, match="the first failure"):
        _write(tmp_path, tensors)


def test_computed_tensors_are_made_one_after_the_other_in_order(parent, tmp_path):
    order = []

    def values(name):
        order.append(("begin", name))
        yield b"\0" * 4
        order.append(("end", name))

    names = [f"t{i}" for i in range(6)]
    tensors = [OutputTensor(n, "F32", (1,), lambda n=n: values(n), computed=True) for n in names]
    write_checkpoint(out=tmp_path / "out", tensors=tensors, config={}, parent=parent, shards=3)
    assert order == [(what, name) for name in names for what in ("begin", "end")]


def _write(tmp_path, tensors):
    from regrow.checkpoint.writer import _write_shards

    _write_shards(tmp_path, {f"{tensor.name}.safetensors": [tensor] for tensor in tensors})
