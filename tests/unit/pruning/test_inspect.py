import json
import shutil

import pytest
import torch

from regrow.checkpoint import CheckpointReader
from regrow.errors import UserError
from regrow.pruning.inspect import format_inspection, inspect_checkpoint
from regrow.pruning.rewrite import rewrite_checkpoint
from surgery_helpers import random_plan
from tiny_models import ALL_FAMILIES, REAL_CONFIG, save_tiny_model


@pytest.fixture
def real(tmp_path):
    shutil.copyfile(REAL_CONFIG, tmp_path / "config.json")
    return tmp_path


def test_qwen3_5_4b_from_its_config_alone(real):
    found = inspect_checkpoint(real, width=7808)
    assert (found["family"], found["num_layers"], found["hidden_size"]) == ("qwen3_5", 32, 2560)
    assert (found["intermediate_size"], found["pruned"]["intermediate_size"]) == (9216, 7808)
    assert found["tied"] is True
    assert (found["num_parameters"], found["weight_bytes"]) == (4_539_265_536, 9_078_531_072)
    pruned = found["pruned"]
    assert (pruned["num_parameters"], pruned["weight_bytes"]) == (4_193_235_456, 8_386_470_912)
    assert found["parts"] == {
        "embedding": 635_699_200,
        "full_attention": 293_605_376,
        "linear_attention": 1_011_356_160,
        "mlp": 2_264_924_160,
        "norms": 166_400,
        "vision": 333_514_240,
        "mtp": 120_599_552,
    }
    assert pruned["parts"] == {**found["parts"], "mlp": 1_918_894_080, "mtp": 109_786_112}
    assert pruned["mtp"]["weight_bytes"] == 219_572_224
    assert found["mtp"]["weight_bytes"] == 241_199_104
    assert "7680 and 7936" in pruned["notes"][0]
    assert json.loads(json.dumps(found)) == found
    text = format_inspection(found)
    assert "4,193,235,456" in text
    assert "config.json alone" in text


@pytest.mark.parametrize("width", [7680, 7936])
def test_aligned_widths_have_no_notes(real, width):
    assert inspect_checkpoint(real, width=width)["pruned"]["notes"] == []


def test_alignment_says_what_7808_costs(real):
    alignment = inspect_checkpoint(real, width=7808)["pruned"]["alignment"]
    assert alignment["bf16"].endswith("up to 8")
    assert "Q5_0" in alignment["gguf_k_quants"]
    assert alignment["block_fp8_128"].endswith("up to 1")  # 3904 / 128 = 30.5
    assert alignment["gptq_group_128"].endswith("up to 1")


@pytest.mark.parametrize("width", [0, -128, 9217, 100_000])
def test_impossible_widths_are_refused(real, width):
    with pytest.raises(UserError, match="9216"):
        inspect_checkpoint(real, width=width)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_inspect_foresees_is_what_pruning_writes(tmp_path, family):
    folder = save_tiny_model(family, tmp_path / "m", dtype=torch.bfloat16)
    reader = CheckpointReader(folder)
    kind = "dense" if inspect_checkpoint(folder)["width_key"] == "intermediate_size" else "expert"
    kind = "expert" if family == "mixtral" else kind
    foreseen = inspect_checkpoint(folder, width=32)["pruned"]
    rewrite_checkpoint(parent=reader, plan=random_plan(reader, widths={kind: 32}), out=tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    for key in ("num_parameters", "weight_bytes", "parts", "intermediate_size", "mtp", "tied"):
        assert found[key] == foreseen[key], key
    assert found["source"] == "headers"


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError):
        inspect_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2' is not supported; regrow knows llama"):
        inspect_checkpoint(tmp_path)
