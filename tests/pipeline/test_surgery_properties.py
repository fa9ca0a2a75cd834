"""Surgery on random architectures: identities that must hold whatever the sizes, layouts and dtypes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import overlay_checkpoint
from regrow.families import count_parameters, expected_tensors, mlp_sites
from regrow.pruning.plan import identity_plan, load_plan, save_plan
from regrow.pruning.rewrite import rewrite_checkpoint
from regrow.pruning.verify import verify_checkpoint
from regrow.types import PruningPlan
from surgery_helpers import load, logits, tensor_bytes
from tiny_models import tiny_config

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "glm4", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe",
            "qwen3_5_text")  # fmt: skip


def _settings(examples: int) -> settings:
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)


@st.composite
def architectures(draw) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    config: dict[str, Any] = {
        "model_type": draw(st.sampled_from(FAMILIES)),
        "vocab_size": draw(st.integers(1, 20)),
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "intermediate_size": draw(st.integers(3, 40)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if n <= heads])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "num_experts": draw(st.integers(1, 4)),
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "shared_expert_intermediate_size": draw(st.integers(3, 20)),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mtp_num_hidden_layers": draw(st.integers(0, 2)),
        "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 4, "linear_value_head_dim": 6,
        "full_attention_interval": draw(st.integers(1, 3)),
    }  # fmt: skip
    return config


def _write(folder: Path, config: dict[str, Any], draw) -> CheckpointReader:
    """A checkpoint of this config with random bytes, random dtypes and a random number of shards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    dtypes = {}
    tensors = {}
    for name, shape in expected_tensors(config).items():
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
        part = name.split(".mlp.")[0].split(".experts.")[0]
        dtype = dtypes.setdefault(part, dtype)  # one dtype per layer's MLP, as engines expect
        tensors[name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)
    names = list(tensors)
    shards = draw(st.integers(1, min(3, len(names))))
    weight_map = {}
    for number in range(shards):
        chosen = {name: tensors[name] for name in names[number::shards]}
        save_file(chosen, folder / f"part{number}.safetensors")
        weight_map |= dict.fromkeys(chosen, f"part{number}.safetensors")
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return CheckpointReader(folder)


def _nested(sites, rng, fractions) -> list[dict[str, tuple[int, ...]]]:
    """Kept channels of every site at shrinking widths, each a subset of the one before; parent's indices."""
    chosen: list[dict[str, tuple[int, ...]]] = []
    previous = {site.name: np.arange(site.width) for site in sites}
    for fraction in fractions:
        level = {}
        for site in sites:
            keep = max(1, int(site.width * fraction))
            level[site.name] = np.sort(rng.choice(previous[site.name], keep, replace=False))
        previous = level
        chosen.append({name: tuple(kept.tolist()) for name, kept in level.items()})
    return chosen


def _plan(reader, sites, kept) -> PruningPlan:
    return PruningPlan(reader.fingerprint(), {site.kind: len(kept[site.name]) for site in sites}, kept, {})


@_settings(20)
@given(config=architectures(), data=st.data())
def test_surgery_on_random_architectures(tmp_path_factory, config, data):
    _check_identities(tmp_path_factory, config, data)


@pytest.mark.slow
@_settings(300)
@given(config=architectures(), data=st.data())
def test_surgery_on_many_random_architectures(tmp_path_factory, config, data):
    _check_identities(tmp_path_factory, config, data)


@_settings(8)
@given(
    family=st.sampled_from(["llama", "qwen3", "gemma2", "phi3"]),
    width=st.integers(8, 60),
    fraction=st.floats(0.2, 0.9),
    seed=st.integers(0, 99),
)
def test_removing_channels_that_are_always_zero_changes_nothing(
    tmp_path_factory, family, width, fraction, seed
):
    base = tmp_path_factory.mktemp("zero")
    config = tiny_config(family)
    config.intermediate_size = width
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(base / "parent")
    reader = CheckpointReader(base / "parent")
    sites = mlp_sites(reader.config, reader.tensors)
    (kept,) = _nested(sites, np.random.default_rng(seed), (fraction,))
    closed = {}
    for site in sites:
        gone = np.setdiff1d(np.arange(width), kept[site.name])
        values = closed.setdefault(site.gate.name, reader.read_float32(site.gate.name))
        values[gone + site.gate.start] = 0
    overlay_checkpoint(base=base / "parent", out=base / "zeroed", replacements=closed)
    zeroed = CheckpointReader(base / "zeroed")
    rewrite_checkpoint(parent=zeroed, plan=_plan(zeroed, sites, kept), out=base / "out")
    torch.testing.assert_close(
        logits(load(base / "out")), logits(load(base / "zeroed")), atol=2e-5, rtol=1e-5
    )


def _check_identities(tmp_path_factory, config, data) -> None:
    base = tmp_path_factory.mktemp("random")
    parent = _write(base / "parent", config, data.draw)
    sites = mlp_sites(parent.config, parent.tensors)
    total = sum(int(np.prod(t.shape)) for t in parent.tensors.values())
    assert sum(count_parameters(config).values()) == total

    # keep-all is the identity
    plan = identity_plan(parent.fingerprint(), sites)
    shards = data.draw(st.integers(1, min(6, len(parent.tensors))))
    rewrite_checkpoint(parent=parent, plan=plan, out=base / "same", shards=shards)
    same = CheckpointReader(base / "same")
    assert tensor_bytes(same) == tensor_bytes(parent)
    assert same.config == parent.config
    assert same.fingerprint() == parent.fingerprint()

    # prune(prune(x, a), b) equals prune(x, b), through plan files
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    wide, narrow = _nested(sites, rng, (0.8, 0.4))
    rewrite_checkpoint(parent=parent, plan=_plan(parent, sites, wide), out=base / "a", shards=shards)
    middle = CheckpointReader(base / "a")
    places = {name: {old: new for new, old in enumerate(kept)} for name, kept in wide.items()}
    renumbered = {n: tuple(places[n][channel] for channel in kept) for n, kept in narrow.items()}
    save_plan(_plan(middle, sites, renumbered), base / "plan.json")
    rewrite_checkpoint(
        parent=middle, plan=load_plan(base / "plan.json"), out=base / "ab", max_shard_size="1KB"
    )
    rewrite_checkpoint(parent=parent, plan=_plan(parent, sites, narrow), out=base / "b", shards=1)
    stepwise, direct = CheckpointReader(base / "ab"), CheckpointReader(base / "b")
    assert tensor_bytes(stepwise) == tensor_bytes(direct)
    assert stepwise.config == direct.config

    # and every one of them passes verification against its parent
    for folder, against in (("same", "parent"), ("a", "parent"), ("ab", "a"), ("b", "parent")):
        assert verify_checkpoint(base / folder, against=base / against)["problems"] == []
