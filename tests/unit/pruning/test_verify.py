"""verify finds every way in which a pruned checkpoint can be wrong, and says nothing against a right one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import overlay_checkpoint
from regrow.errors import UserError
from regrow.pruning.rewrite import rewrite_checkpoint
from regrow.pruning.verify import format_verification, verify_checkpoint
from surgery_helpers import random_plan
from tiny_models import ALL_FAMILIES, save_tiny_model

ENGINES = {"transformers", "vllm", "vllm_speculative", "sglang", "llama_cpp"}
DOWN = "model.language_model.layers.0.mlp.down_proj.weight"
UP = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_tiny_model("qwen3_5", tmp_path_factory.mktemp("verify") / "parent", dtype=torch.bfloat16)


@pytest.fixture
def pruned(parent, tmp_path):
    reader = CheckpointReader(parent)
    plan = random_plan(reader, widths={"dense": 64})
    rewrite_checkpoint(parent=reader, plan=plan, out=tmp_path / "pruned", shards=1)
    return tmp_path / "pruned"


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **text) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config))


def _assert_bad(result, *fragments):
    assert result["ok"] is False
    text = " ".join(result["problems"])
    for fragment in fragments:
        assert fragment in text, text
    json.dumps(result, allow_nan=False)
    assert format_verification(result).startswith("NOT ok")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_passes_against_its_parent(tmp_path, family):
    folder = save_tiny_model(family, tmp_path / "parent")
    reader = CheckpointReader(folder)
    rewrite_checkpoint(parent=reader, plan=random_plan(reader), out=tmp_path / "out", shards=4)
    result = verify_checkpoint(tmp_path / "out", against=folder)
    assert result["problems"] == []
    assert result["ok"] is True
    assert result["compared"]["refitted"] == result["compared"]["trained"] == 0
    assert set(result["engines"]) == ENGINES
    has_mtp = family in ("qwen3_5", "qwen3_5_moe")
    for name, verdict in result["engines"].items():
        assert verdict["ok"] is (has_mtp if name == "vllm_speculative" else True)
    assert verify_checkpoint(folder)["ok"] is True  # what transformers saved


def test_counts_are_by_what_became_of_each(pruned, parent):
    result = verify_checkpoint(pruned, against=parent)
    assert result["compared"] == {"untouched": 66, "cut": 3, "refitted": 0, "trained": 0}
    assert result["widths"] == {"dense": 64, "mtp": 64}
    assert json.loads(json.dumps(result)) == result
    assert format_verification(result).startswith("ok")


def test_a_refitted_down_projection_is_said_to_be_one(pruned, parent):
    _edit(pruned, lambda t: t[DOWN].add_(0.01))
    result = verify_checkpoint(pruned, against=parent)
    assert result["ok"] is True
    assert result["compared"]["refitted"] == 1
    assert any("1 of 3 MLPs were refitted" in note for note in result["notes"])


def test_columns_of_other_channels_are_not_taken_for_a_plain_cut(pruned, parent):
    _edit(pruned, lambda t: t.update({DOWN: t[DOWN].roll(1, dims=1)}))
    assert verify_checkpoint(pruned, against=parent)["compared"]["cut"] == 2


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda t: t[UP][3].add_(1), "layers.0 has gate and up rows that are not its parent's"),
        (lambda t: t.update({UP: t[UP].roll(1, dims=0)}), "layers.0 has gate and up rows"),
        (lambda t: t["model.language_model.norm.weight"][0].add_(1), "norm.weight differs"),
        (lambda t: t["model.visual.pos_embed.weight"][0, 0].add_(1), "pos_embed.weight differs"),
        (lambda t: t["mtp.fc.weight"][0, 0].add_(1), "mtp.fc.weight differs"),
        (lambda t: t["mtp.layers.0.mlp.up_proj.weight"][0, 0].add_(1), "mtp.layers.0 has gate and up rows"),
        (
            lambda t: t.update({"mtp.fc.weight": t["mtp.fc.weight"].float()}),
            "mtp.fc.weight is stored as F32 and its parent's as BF16",
        ),
        (lambda t: t[DOWN][0].fill_(torch.nan), "NaN or infinite"),
        (lambda t: t[DOWN][0, 0].fill_(-torch.inf), "NaN or infinite"),
    ],
)
def test_changed_values_are_found(pruned, parent, change, fragment):
    _edit(pruned, change)
    _assert_bad(verify_checkpoint(pruned, against=parent), fragment)


def test_channels_in_another_order_are_found(pruned, parent):
    base = "model.language_model.layers.0.mlp."

    def shuffle(t):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        for name in ("gate_proj", "up_proj"):
            t[f"{base}{name}.weight"] = t[f"{base}{name}.weight"][order]
        t[DOWN] = t[DOWN][:, order]

    _edit(pruned, shuffle)
    _assert_bad(verify_checkpoint(pruned, against=parent), "in another order")


def test_equal_channels_are_matched_one_to_one(parent, tmp_path):
    reader = CheckpointReader(parent)
    gate = UP.replace("up_proj", "gate_proj")
    zero = np.zeros((96, 64), np.float32)
    overlay_checkpoint(base=parent, out=tmp_path / "parent", replacements={UP: zero, gate: zero})
    reader = CheckpointReader(tmp_path / "parent")
    rewrite_checkpoint(parent=reader, plan=random_plan(reader), out=tmp_path / "out")
    result = verify_checkpoint(tmp_path / "out", against=tmp_path / "parent")
    assert result["ok"] is True


def test_a_trained_model_is_checked_for_shape_only_when_asked(pruned, parent):
    def train(t):
        for name, tensor in t.items():
            if "language_model" in name:
                tensor.add_(0.01)

    _edit(pruned, train)
    assert verify_checkpoint(pruned, against=parent)["ok"] is False
    result = verify_checkpoint(pruned, against=parent, trained=True)
    assert result["ok"] is True
    assert result["compared"]["trained"] > 0
    assert result["compared"]["cut"] == 1  # MTP stayed
    _edit(pruned, lambda t: t.update({DOWN: t[DOWN][:, :63]}))
    assert verify_checkpoint(pruned, against=parent, trained=True)["ok"] is False


def test_mtp_declared_but_missing(pruned, parent):
    """What `save_pretrained` of transformers makes: the head is gone and the config still declares it."""
    _edit(pruned, lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])
    result = verify_checkpoint(pruned, against=parent)
    _assert_bad(result, "declares 1 multi-token-prediction layer(s)")
    verdicts = {name: verdict["ok"] for name, verdict in result["engines"].items()}
    assert verdicts == {
        "transformers": True, "vllm": True, "sglang": True, "vllm_speculative": False, "llama_cpp": False,
    }  # fmt: skip


def test_mtp_left_at_the_parents_width(pruned, parent):
    source = load_file(parent / CheckpointReader(parent).tensors["mtp.fc.weight"].file)
    _edit(pruned, lambda t: t.update({n: x for n, x in source.items() if n.startswith("mtp.layers.0.mlp")}))
    result = verify_checkpoint(pruned, against=parent)
    _assert_bad(result, "mtp.layers.0.mlp")
    assert result["engines"]["transformers"]["ok"] is True
    assert result["engines"]["vllm_speculative"]["ok"] is False
    assert result["engines"]["llama_cpp"]["ok"] is False


def test_mtp_there_but_not_declared(pruned, parent):
    _edit_config(pruned, mtp_num_hidden_layers=0)
    result = verify_checkpoint(pruned, against=parent)
    _assert_bad(result, "does not declare")
    assert result["engines"]["vllm_speculative"]["ok"] is False


def test_mtp_dropped_as_asked_is_right(parent, tmp_path):
    reader = CheckpointReader(parent)
    rewrite_checkpoint(parent=reader, plan=random_plan(reader), out=tmp_path / "out", mtp="drop")
    result = verify_checkpoint(tmp_path / "out", against=parent)
    assert result["problems"] == []
    assert any("dropped" in note for note in result["notes"])
    assert result["engines"]["vllm_speculative"]["ok"] is False
    assert result["engines"]["llama_cpp"]["ok"] is True


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda t: t.pop("model.visual.pos_embed.weight"), ("pos_embed.weight is missing", "was lost")),
        (lambda t: t.pop(UP), ("up_proj.weight is missing",)),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), ("not foreseen", "not in the parent")),
        (lambda t: t.update({UP: t[UP][:63]}), ("shape that config.json does not foresee", "up_proj")),
        (lambda t: t.update({"mtp.fc.weight": t["mtp.fc.weight"][:, :3]}), ("mtp.fc.weight",)),
    ],
)
def test_lost_added_and_misshapen_tensors_are_found(pruned, parent, change, fragments):
    _edit(pruned, change)
    _assert_bad(verify_checkpoint(pruned, against=parent), *fragments)


def test_config_that_contradicts_the_tensors(pruned, parent):
    _edit_config(pruned, intermediate_size=96)
    result = verify_checkpoint(pruned, against=parent)
    _assert_bad(result, "does not foresee")
    assert not any(verdict["ok"] for verdict in result["engines"].values())


def test_other_settings_must_be_the_parents(pruned, parent):
    _edit_config(pruned, rms_norm_eps=1e-5)
    _assert_bad(verify_checkpoint(pruned, against=parent), "another text_config.rms_norm_eps")


def test_lost_files_are_found_and_changed_ones_noted(pruned, parent):
    (pruned / "tokenizer.json").unlink()
    (pruned / "chat_template.jinja").write_text("other")
    result = verify_checkpoint(pruned, against=parent)
    _assert_bad(result, "tokenizer.json lies beside")
    assert any("chat_template.jinja" in note for note in result["notes"])


def test_an_index_with_a_wrong_total_is_found(parent, tmp_path):
    folder = shutil.copytree(parent, tmp_path / "copy")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for metadata, fragment in (({"total_size": 7}, "total_size 7"), ({}, "does not give total_size")):
        path.write_text(json.dumps({**index, "metadata": metadata}))
        _assert_bad(verify_checkpoint(folder), fragment)


def test_damage_is_a_verdict_and_not_an_error(parent, tmp_path):
    folder = shutil.copytree(parent, tmp_path / "copy")
    shard = folder / "model.safetensors-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = verify_checkpoint(folder)
    _assert_bad(result, "damaged")
    assert set(result["engines"]) == ENGINES
    assert not any(verdict["ok"] for verdict in result["engines"].values())
    with pytest.raises(UserError):
        verify_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError):
        verify_checkpoint(parent, against=tmp_path / "absent")


def test_a_checkpoint_cut_and_saved_by_transformers(tmp_path):
    """Another tool's result: first channels kept, saved by save_pretrained."""
    parent = save_tiny_model("llama", tmp_path / "parent")
    model = AutoModelForCausalLM.from_pretrained(parent)
    for layer in model.model.layers:
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(layer.mlp, name)
            linear.weight = torch.nn.Parameter(linear.weight.detach().narrow(dim, 0, 64).clone())
    model.config.intermediate_size = 64
    model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    result = verify_checkpoint(tmp_path / "out", against=parent)
    # save_pretrained of a model leaves the tokenizer behind
    _assert_bad(result, "chat_template.jinja (and 2 more) lies beside")
    assert len(result["problems"]) == 1
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(parent / name, tmp_path / "out" / name)
    assert verify_checkpoint(tmp_path / "out", against=parent)["problems"] == []


def test_a_text_model_with_the_names_of_one_with_vision(tmp_path):
    folder = save_tiny_model("qwen3_5_text", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    renamed = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    engines = verify_checkpoint(folder)["engines"]
    assert engines["transformers"]["ok"] is True
    assert engines["vllm"]["ok"] is engines["llama_cpp"]["ok"] is False


def test_a_parent_of_another_family(pruned, tmp_path):
    other = save_tiny_model("llama", tmp_path / "llama")
    assert verify_checkpoint(pruned, against=other)["ok"] is False
