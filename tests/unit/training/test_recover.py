"""LoRA recovery: what is adapted, that it learns, and that merging changes nothing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import overlay_checkpoint
from regrow.errors import UserError
from regrow.training.lora import adapted_layers, add_adapters, merged_tensors
from regrow.training.recover import DEFAULT_TARGETS, recover
from tiny_models import save_tiny_model, tiny_model
from training_case import QUICK, make_case, same_bytes, tensors_of

SMALL = {"rank": 4, "alpha": 8}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def adapted(folder, family, rank, alpha, targets, linear_attention=False):
    """A saved tiny model, PEFT's own unmerged wrapper around it with random adapters, and their values."""
    save_tiny_model(family, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names, _ = adapted_layers(model, targets, linear_attention)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            state[name] = parameter.detach()
    return wrapped, state


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_merged_logits_equal_unmerged_ones(tmp_path, family):
    wrapped, state = adapted(tmp_path / "base", family, 4, 12, DEFAULT_TARGETS, linear_attention=True)
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    unmerged = logits(wrapped, ids)
    reader = CheckpointReader(tmp_path / "base")
    changes = merged_tensors(reader, state, rank=4, alpha=12)
    overlay_checkpoint(base=tmp_path / "base", out=tmp_path / "out", replacements=changes)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), ids)
    scale = unmerged.abs().max()
    assert (merged - unmerged).abs().max() <= 1e-5 * scale
    with wrapped.disable_adapter():
        assert (logits(wrapped, ids) - unmerged).abs().max() > 0.05 * scale
    # The tolerance must notice a scaling that is off by a percent.
    wrong = merged_tensors(reader, state, rank=4, alpha=12.12)
    overlay_checkpoint(base=tmp_path / "base", out=tmp_path / "wrong", replacements=wrong)
    off = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "wrong", dtype=torch.float32), ids)
    assert (off - unmerged).abs().max() > 1e-4 * scale


def test_recovery_learns_and_changes_only_its_targets(tmp_path):
    case = make_case(tmp_path, "qwen3_5", torch.bfloat16)
    report = recover(
        **case,
        out=tmp_path / "out",
        work_dir=tmp_path / "work",
        targets=("gate_proj", "q_proj"),
        **SMALL,
        **QUICK | {"learning_rate": 2e-2},
    )
    assert report["held_out"][-1]["kl"] < 0.9 * report["held_out"][0]["kl"]
    assert report["trainable_parameters"] == 2 * 4 * (64 + 96) + 4 * (64 + 256)
    before, after = tensors_of(case["student"]), tensors_of(tmp_path / "out")
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    prefix = "model.language_model.layers"
    assert changed == {
        f"{prefix}.0.mlp.gate_proj.weight",
        f"{prefix}.1.mlp.gate_proj.weight",
        f"{prefix}.1.self_attn.q_proj.weight",
    }
    assert report["hyperparameters"]["rank"] == 4


def test_held_out_kl_of_the_merged_model_is_the_one_that_training_saw(tmp_path):
    case = make_case(tmp_path)
    settings = QUICK | {"precision": "fp32", "learning_rate": 1e-2}
    first = recover(**case, out=tmp_path / "out", work_dir=tmp_path / "a", **SMALL, **settings)
    again = recover(
        **case | {"student": tmp_path / "out"},
        out=tmp_path / "out2",
        work_dir=tmp_path / "b",
        **SMALL,
        **settings | {"max_steps": 1},
    )
    assert again["held_out"][0]["kl"] == pytest.approx(first["held_out"][-1]["kl"], rel=1e-3)
    assert first["held_out"][-1]["kl"] < 0.95 * first["held_out"][0]["kl"]


def test_linear_attention_projections_are_adapted_only_when_asked():
    model = tiny_model("qwen3_5_text")
    plain, notes = adapted_layers(model, [*DEFAULT_TARGETS, "out_proj"], False)
    assert not any(".linear_attn." in name for name in plain)
    assert notes == ["The LoRA target out_proj matches no linear layer of this model."]
    everything, _ = adapted_layers(model, DEFAULT_TARGETS, True)
    extra = {name.rpartition(".")[2] for name in set(everything) - set(plain)}
    assert extra == {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}


def test_targets_that_cannot_be_are_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="lm_head is the output layer"):
        adapted_layers(model, ["lm_head"], False)
    with pytest.raises(UserError, match=r"No LoRA target matches; .* down_proj, gate_proj"):
        adapted_layers(model, ["c_fc"], False)
    _, notes = adapted_layers(model, ["q_proj"], True)
    assert "no linear-attention layers" in notes[0]


def test_adapters_start_from_the_seed_and_do_nothing_yet():
    ids = torch.randint(0, 250, (1, 9))
    states = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        before = logits(model, ids)
        wrapped, _ = add_adapters(
            model,
            rank=2,
            alpha=4,
            dropout=0.0,
            targets=DEFAULT_TARGETS,
            linear_attention=False,
            seed=seed,
            fp32_adapters=True,
        )
        assert torch.equal(logits(wrapped.eval(), ids), before)
        states.append({n: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_rank_and_dropout_out_of_range_are_refused(tmp_path):
    with pytest.raises(UserError, match="dropout 1"):
        recover(
            student=tmp_path,
            teacher=tmp_path,
            corpora=[],
            held_out=("x", "train", 1.0, None),
            out=tmp_path / "o",
            work_dir=tmp_path / "w",
            dropout=1.0,
            max_steps=1,
        )
