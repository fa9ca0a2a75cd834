import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow.checkpoint import CheckpointReader, read_config_only
from regrow.errors import RunError, UserError
from tiny_models import save_tiny_model


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def _save(folder, tensors, file="model.safetensors"):
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_come_as_stored_and_as_float32(folder, dtype):
    weight = torch.randn(7, 5).to(dtype)
    stack = torch.randn(3, 4, 2).to(dtype)
    _save(folder, {"w": weight, "s": stack, "scalar": torch.tensor(2.5).to(dtype), "none": torch.empty(0, 3)})
    reader = CheckpointReader(folder)
    np.testing.assert_array_equal(reader.read_float32("w"), weight.float().numpy())
    np.testing.assert_array_equal(reader.read_float32("w", begin=2, end=6), weight[2:6].float().numpy())
    np.testing.assert_array_equal(reader.read_float32("s", expert=1), stack[1].float().numpy())
    np.testing.assert_array_equal(reader.read_float32("s", expert=2, begin=1), stack[2, 1:].float().numpy())
    assert reader.read("scalar").shape == ()
    assert reader.read_float32("none").shape == (0, 3)
    item = weight.element_size()
    assert (
        reader.read_bytes("w", begin=5 * item, nbytes=5 * item)
        == weight[1:2].view(torch.uint8).numpy().tobytes()
    )
    with pytest.raises(IndexError):
        reader.read_bytes("w", begin=0, nbytes=35 * item + 1)


def test_all_tensors_of_a_release_are_read_bit_for_bit(tmp_path):
    folder = save_tiny_model("qwen3_5", tmp_path / "m", dtype=torch.bfloat16)
    reader = CheckpointReader(folder)
    expected = {}
    for name in reader.shard_names:
        expected |= load_file(folder / name)
    assert set(reader.tensors) == set(expected)
    assert len(reader.shard_names) == 2
    for name, tensor in expected.items():
        assert reader.read_bytes(name) == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_index_with_hundreds_of_shards(folder):
    weight_map, total = {}, 0
    for i in range(230):
        file = f"part-{i}.safetensors"
        _save(folder, {f"t{i}": torch.full((2, 3), float(i)), f"u{i}": torch.zeros(1)}, file)
        weight_map |= {f"t{i}": file, f"u{i}": file}
        total += 28
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = CheckpointReader(folder)
    assert list(reader.tensors) == list(weight_map)
    assert len(reader.shard_names) == 230
    assert reader.read_float32("t229")[0, 0] == 229


def test_a_single_file_of_any_name_needs_no_index(folder):
    _save(folder, {"w": torch.ones(2)}, "weights.safetensors")
    assert list(CheckpointReader(folder).tensors) == ["w"]
    _save(folder, {"w": torch.ones(2)}, "other.safetensors")
    with pytest.raises(UserError, match="2 safetensors files"):
        CheckpointReader(folder)
    _save(folder, {"v": torch.ones(2)})  # model.safetensors is the one that loaders take
    assert list(CheckpointReader(folder).tensors) == ["v"]


def test_links_into_a_cache_are_followed(folder, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    _save(blobs, {"w": torch.ones(2)}, "abc123.safetensors")
    (folder / "model.safetensors").symlink_to(blobs / "abc123.safetensors")
    assert CheckpointReader(folder).read_float32("w").tolist() == [1, 1]


def test_what_travels_and_what_stays(folder):
    _save(folder, {"w": torch.ones(2)})
    travels = ["tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json", "vocab.json"]
    travels += ["preprocessor_config.json", "tokenizer.model", "additional_chat_templates/tool.jinja"]
    stays = ["pytorch_model.bin", "README.md", ".gitattributes", "consolidated.safetensors", "model.gguf"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "original").mkdir()
    for name in [*travels, *stays, "original/params.json"]:
        (folder / name).write_text("x")
    (folder / "consolidated.safetensors").unlink()
    reader = CheckpointReader(folder)
    assert sorted(reader.other_files) == sorted(travels)
    assert sorted(reader.left_behind) == sorted(set(stays) - {"consolidated.safetensors"})


def test_fingerprint_follows_content_and_not_the_files(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "a")
    first = CheckpointReader(folder).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    again = shutil.copytree(folder, tmp_path / "b")
    save_file(dict(reversed(tensors.items())), again / "model.safetensors", metadata={"format": "np"})
    (again / "README.md").write_text("x")
    assert CheckpointReader(again).fingerprint() == first
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, again / "model.safetensors")
    assert CheckpointReader(again).fingerprint() != first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert CheckpointReader(folder).fingerprint() != first


def test_a_shard_that_shrinks_while_it_is_read(folder):
    _save(folder, {"w": torch.ones(1000)})
    reader = CheckpointReader(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(RunError, match="shrank"):
        reader.read("w")


def test_folders_that_hold_no_model(folder, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        read_config_only(tmp_path / "absent")
    with pytest.raises(UserError, match="no safetensors"):
        CheckpointReader(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match="pickled"):
        CheckpointReader(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        CheckpointReader(folder)


def _index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", ".safetensors",
     "x.bin", "", None, 7, ["model.safetensors"], "x\0.safetensors"],
)  # fmt: skip
def test_an_index_cannot_name_files_elsewhere(folder, file):
    _save(folder, {"w": torch.ones(1)})
    _index(folder, {"w": "model.safetensors", "v": file})
    with pytest.raises(UserError, match="no safetensors file of this folder"):
        CheckpointReader(folder)


def test_index_and_shards_must_agree(folder):
    _save(folder, {"w": torch.ones(1), "v": torch.ones(1)}, "a.safetensors")
    _save(folder, {"w": torch.ones(1)}, "b.safetensors")
    _index(folder, {"w": "a.safetensors"})
    with pytest.raises(UserError, match=r"'v' .* is not in the index"):
        CheckpointReader(folder)
    _index(folder, {"w": "a.safetensors", "v": "a.safetensors", "u": "a.safetensors"})
    with pytest.raises(UserError, match="lacks 'u'"):
        CheckpointReader(folder)
    _index(folder, {"w": "a.safetensors", "v": "b.safetensors"})
    with pytest.raises(UserError, match=r"in a second shard|is not in the index|lacks"):
        CheckpointReader(folder)
    _index(folder, {"w": "a.safetensors", "v": "c.safetensors"})
    with pytest.raises(UserError, match=r"c\.safetensors is missing|second shard"):
        CheckpointReader(folder)
    _index(folder, {})
    with pytest.raises(UserError, match="no weight_map"):
        CheckpointReader(folder)
