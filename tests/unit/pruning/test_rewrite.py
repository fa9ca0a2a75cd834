import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from regrow.checkpoint import CheckpointReader
from regrow.errors import RunError, UserError
from regrow.families import mlp_sites
from regrow.pruning import cut
from regrow.pruning.rewrite import rewrite_checkpoint
from surgery_helpers import random_plan, tensor_bytes
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewrite") / "parent"
    return CheckpointReader(save_tiny_model("qwen3_5", folder, dtype=torch.bfloat16))


def _values(reader, name):
    info = reader.tensors[name]
    raw = np.frombuffer(reader.read_bytes(name), np.uint16 if info.dtype == "BF16" else np.uint32)
    return raw.reshape(info.shape)


@pytest.mark.parametrize("piece", [1 << 24, 700, 1])
def test_rows_and_columns_go_together_in_trunk_and_mtp(parent, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(cut, "PIECE_BYTES", piece)
    plan = random_plan(parent, seed=3, widths={"dense": 41})
    report = rewrite_checkpoint(parent=parent, plan=plan, out=tmp_path / "out", shards=4)
    written = CheckpointReader(tmp_path / "out")
    touched = set()
    for base, site in [
        ("model.language_model.layers.0.mlp", "layers.0"),
        ("model.language_model.layers.1.mlp", "layers.1"),
        ("mtp.layers.0.mlp", "mtp.layers.0"),
    ]:
        kept = np.array(plan.kept[site])
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = f"{base}.{name}.weight"
            before = _values(parent, full)
            expected = before[:, kept] if name == "down_proj" else before[kept]
            np.testing.assert_array_equal(_values(written, full), expected)
            touched.add(full)
    before, after = tensor_bytes(parent), tensor_bytes(written)
    assert {n: t for n, t in after.items() if n not in touched} == {
        n: t for n, t in before.items() if n not in touched
    }
    assert sum(t.dtype == "F32" for t in written.tensors.values()) == 2
    assert report["mtp"] == "pruned"
    assert report["weight_bytes"] == report["main_bytes"] + report["mtp_bytes"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected_config = json.loads((parent.folder / "config.json").read_text())
    expected_config["text_config"]["intermediate_size"] = 41
    assert json.dumps(config) == json.dumps(expected_config)  # the order of keys too


def test_dropping_mtp_takes_its_tensors_and_the_declaration(parent, tmp_path):
    plan = random_plan(parent, widths={"dense": 64})
    report = rewrite_checkpoint(parent=parent, plan=plan, out=tmp_path / "out", mtp="drop")
    written = CheckpointReader(tmp_path / "out")
    assert not [name for name in written.tensors if name.startswith("mtp.")]
    assert written.config["text_config"]["mtp_num_hidden_layers"] == 0
    assert report["mtp"] == "dropped"
    assert report["mtp_bytes"] == 0


def test_a_declared_head_that_is_not_there_is_no_longer_declared(parent, tmp_path):
    folder = save_tiny_model("qwen3_5_text", tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["mtp_num_hidden_layers"] = 1  # what transformers' save_pretrained leaves behind
    (folder / "config.json").write_text(json.dumps(config))
    reader = CheckpointReader(folder)
    report = rewrite_checkpoint(parent=reader, plan=random_plan(reader), out=tmp_path / "out")
    assert CheckpointReader(tmp_path / "out").config["mtp_num_hidden_layers"] == 0
    assert any("no longer declared" in note for note in report["notes"])


def test_same_plan_same_bytes(parent, tmp_path):
    for name in ("a", "b"):
        rewrite_checkpoint(parent=parent, plan=random_plan(parent, 5), out=tmp_path / name, shards=3)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_refitted_columns_replace_the_cut_ones_in_the_stored_dtype(parent, tmp_path):
    plan = random_plan(parent, widths={"dense": 32})
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    new = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    rewrite_checkpoint(parent=parent, plan=plan, out=tmp_path / "out", replacements={name: lambda: new})
    written = CheckpointReader(tmp_path / "out")
    assert written.tensors[name].dtype == "BF16"
    np.testing.assert_array_equal(
        written.read_float32(name), torch.from_numpy(new).bfloat16().float().numpy()
    )


def test_wrong_refits_leave_no_folder(parent, tmp_path):
    plan = random_plan(parent, widths={"dense": 32})
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    for values in (np.zeros((64, 33), np.float32), np.full((64, 32), np.nan, np.float32)):
        with pytest.raises(RunError):
            rewrite_checkpoint(
                parent=parent, plan=plan, out=tmp_path / "out", replacements={name: lambda v=values: v}
            )
    with pytest.raises(UserError, match="no down_proj"):
        rewrite_checkpoint(
            parent=parent, plan=plan, out=tmp_path / "out", replacements={"mtp.fc.weight": lambda: values}
        )
    assert list(tmp_path.iterdir()) == []


def test_plans_that_do_not_fit_are_refused(parent, tmp_path):
    plan = random_plan(parent, widths={"dense": 64})
    kept = plan.kept["layers.0"]
    foreign = [
        replace(plan, parent="0" * 64),
        replace(plan, kept={k: v for k, v in plan.kept.items() if k != "layers.1"}),
        replace(plan, kept={k: v for k, v in plan.kept.items() if k != "mtp.layers.0"}),
        replace(plan, width={"dense": 64}),
        replace(plan, width={"dense": 63, "mtp": 63}),
        replace(plan, width={"expert": 64}),
        replace(plan, kept={**plan.kept, "layers.0": (*kept[:-1], 96)}),
        replace(plan, kept={**plan.kept, "layers.0": (-1, *kept[1:])}),
        replace(plan, kept={**plan.kept, "layers.0": (kept[1], kept[0], *kept[2:])}),
        replace(plan, kept={**plan.kept, "layers.0": (kept[0], kept[0], *kept[2:])}),
    ]
    for wrong in foreign:
        with pytest.raises(UserError):
            rewrite_checkpoint(parent=parent, plan=wrong, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_parents_folder_is_refused_as_output(parent):
    with pytest.raises(UserError):
        rewrite_checkpoint(parent=parent, plan=random_plan(parent), out=parent.folder)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_quantised_weights_are_refused_by_name(parent, tmp_path, dtype):
    folder = shutil.copytree(parent.folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    reader = CheckpointReader(folder)
    with pytest.raises(UserError, match="quantised \\(gptq\\)"):
        mlp_sites(reader.config, reader.tensors)
    tensors = {
        name: replace(info, dtype=dtype) if name.endswith("layers.1.mlp.up_proj.weight") else info
        for name, info in reader.tensors.items()
    }
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is stored as"):
        mlp_sites(config, tensors)
