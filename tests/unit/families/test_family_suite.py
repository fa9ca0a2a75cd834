"""What every family must pass, on a two-layer model that transformers itself made and saved."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import overlay_checkpoint
from regrow.families import (
    FAMILIES,
    causal_lm_name,
    count_parameters,
    expected_tensors,
    mlp_sites,
    pruned_config,
    text_prefix,
)
from regrow.pruning.plan import identity_plan
from regrow.pruning.rewrite import rewrite_checkpoint
from surgery_helpers import load, logits, prune_in_memory, random_plan, tensor_bytes
from tiny_models import ALL_FAMILIES, save_tiny_model

VISION = ("qwen3_5", "qwen3_5_moe", "gemma3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_model(family, tmp_path_factory.mktemp(family) / "parent")
        return made[family]

    return save


def test_every_family_is_in_the_suite():
    covered = {AutoConfig.for_model(f).model_type if f in FAMILIES else f for f in ALL_FAMILIES}
    assert set(FAMILIES) <= covered


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_names_and_shapes_follow_from_the_config(saved, family):
    reader = CheckpointReader(saved(family))
    prefix = text_prefix(FAMILIES[reader.config["model_type"]], reader.tensors)
    expected = expected_tensors(reader.config, prefix=prefix)
    found = _stacked({n: t.shape for n, t in reader.tensors.items()})
    assert found == {n.replace("vision_tower.vision_model.", "vision_tower."): s for n, s in expected.items()}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_pruned_checkpoint_equals_the_model_pruned_in_memory(saved, family, tmp_path):
    parent = CheckpointReader(saved(family))
    plan = random_plan(parent, seed=1)
    rewrite_checkpoint(parent=parent, plan=plan, out=tmp_path / "out", shards=3)
    for causal in (True, False) if family in VISION else (True,):
        oracle = load(parent.folder, causal)
        before = logits(oracle)
        prune_in_memory(oracle, plan.kept)
        expected, found = logits(oracle), logits(load(tmp_path / "out", causal))
        assert not torch.equal(before, expected)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_keeping_every_channel_is_the_identity(saved, family, tmp_path):
    parent = CheckpointReader(saved(family))
    plan = identity_plan(parent.fingerprint(), mlp_sites(parent.config, parent.tensors))
    rewrite_checkpoint(parent=parent, plan=plan, out=tmp_path / "out", shards=2)
    written = CheckpointReader(tmp_path / "out")
    assert tensor_bytes(written) == tensor_bytes(parent)
    assert written.config == parent.config
    assert written.other_files == parent.other_files


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_removing_channels_that_are_always_zero_changes_nothing(saved, family, tmp_path):
    parent = CheckpointReader(saved(family))
    plan = random_plan(parent, seed=2)
    new: dict[str, np.ndarray] = {}
    for site in mlp_sites(parent.config, parent.tensors):
        gone = sorted(set(range(site.width)) - set(plan.kept[site.name]))
        for ref in (site.gate, site.gate_bias):  # a closed gate: act(0) * up = 0
            if ref is not None:
                values = new.setdefault(ref.name, parent.read_float32(ref.name))
                (values if ref.expert is None else values[ref.expert])[np.array(gone) + ref.start] = 0
    overlay_checkpoint(base=parent.folder, out=tmp_path / "zeroed", replacements=new)
    zeroed = CheckpointReader(tmp_path / "zeroed")
    zeroed_plan = type(plan)(zeroed.fingerprint(), plan.width, plan.kept)
    rewrite_checkpoint(parent=zeroed, plan=zeroed_plan, out=tmp_path / "out", max_shard_size="50KB")
    expected = logits(load(zeroed.folder))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits(load(parent.folder)), expected, atol=1e-2)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_causal_lm_names_are_the_state_dict(saved, family):
    reader = CheckpointReader(saved(family))
    names = {causal_lm_name(reader.config, name) for name in reader.tensors} - {None}
    model = load(reader.folder)
    tied = {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()
    assert names == set(model.state_dict()) - tied
    for site in mlp_sites(reader.config, reader.tensors):
        if site.name.startswith("mtp."):
            assert site.module is None
        else:
            assert hasattr(model.get_submodule(site.module), "down_proj")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_count_parameters_is_torchs_count(saved, family):
    reader = CheckpointReader(saved(family))
    for config in (reader.config, pruned_config(reader.config, 32)):
        counts = count_parameters(config)
        model_config = AutoConfig.for_model(**config)
        auto = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(model_config)
        total = sum(p.numel() for p in model.parameters())
        assert sum(n for part, n in counts.items() if part != "mtp") == total


def _stacked(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes with experts that are stored one by one put together the way the specs describe them."""
    result = dict(shapes)
    for name in shapes:
        match = re.fullmatch(r"(.*\.experts)\.0\.(?:gate_proj|w1)\.weight", name)
        if match:
            base = match.group(1)
            mine = [n for n in shapes if n.startswith(base + ".")]
            width, hidden = shapes[name]
            for n in mine:
                del result[n]
            number = len({n.removeprefix(base + ".").split(".")[0] for n in mine})
            result[f"{base}.gate_up_proj"] = (number, 2 * width, hidden)
            result[f"{base}.down_proj"] = (number, hidden, width)
    return result
