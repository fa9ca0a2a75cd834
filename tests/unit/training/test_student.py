import pytest
import torch

from regrow.checkpoint import CheckpointReader
from regrow.errors import UserError
from regrow.modeling.hidden import final_hidden
from regrow.modeling.load import load_model
from regrow.training.result import changed_tensors, places
from regrow.training.student import HiddenStates, set_precision, share_frozen, stored_dtypes, trained_names
from tiny_models import save_tiny_model


def load(folder, family, dtype="float32", stored=torch.bfloat16):
    save_tiny_model(family, folder, 0, stored)
    return CheckpointReader(folder), load_model(folder, dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3_5"])
def test_embedding_and_output_layer_never_move(tmp_path, family):
    reader, model = load(tmp_path, family)
    everything = trained_names(reader, model, "all_but_embeddings")
    left = {name for name, _ in model.named_parameters()} - set(everything)
    assert left == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if family == "llama" else set())
    mlp = trained_names(reader, model, "mlp")
    assert len(mlp) == 2 * 3
    assert all(".mlp." in name for name in mlp)
    with pytest.raises(UserError, match="mlp or all_but_embeddings"):
        trained_names(reader, model, "everything")


def test_mixed_precision_keeps_frozen_tensors_as_stored(tmp_path):
    reader, model = load(tmp_path, "qwen3_5")
    names = trained_names(reader, model, "mlp")
    set_precision(model, names, stored_dtypes(reader), "bf16_mixed")
    dtypes = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert dtypes["model.layers.0.mlp.gate_proj.weight"] == (torch.float32, True)
    assert dtypes["model.embed_tokens.weight"] == (torch.bfloat16, False)
    assert dtypes["model.layers.0.linear_attn.A_log"] == (torch.float32, False)  # stored in F32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_frozen_equal_tensors_are_shared_and_others_are_not(tmp_path):
    reader, student = load(tmp_path / "a", "llama_tied")
    _, teacher = load(tmp_path / "b", "llama_tied", "bfloat16")
    teacher.requires_grad_(False)
    with torch.no_grad():
        teacher.model.norm.weight.add_(1.0)
    set_precision(student, trained_names(reader, student, "mlp"), stored_dtypes(reader), "bf16_mixed")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    saved = share_frozen(student, teacher)
    theirs = dict(teacher.named_parameters())
    shared = {n for n, p in student.named_parameters() if p.data_ptr() == theirs[n].data_ptr()}
    assert "model.embed_tokens.weight" in shared
    assert "model.layers.0.self_attn.q_proj.weight" in shared
    assert "model.norm.weight" not in shared
    assert not any(".mlp." in name for name in shared)
    assert saved == sum(theirs[name].nbytes for name in shared)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "gemma2"])
def test_right_padding_needs_no_mask(tmp_path, family):
    """Every architecture here is causal: what follows a token cannot change its state."""
    try:
        _, model = load(tmp_path, family)
    except KeyError:
        pytest.skip(f"no tiny {family}")
    ids = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(0))
    lengths = [40, 7, 23]
    hidden = HiddenStates(model, autocast=False)(ids)
    for row, length in enumerate(lengths):
        alone = final_hidden(model, ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long))
        torch.testing.assert_close(hidden[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_every_parameter_has_its_place_in_the_checkpoint(tmp_path):
    for family in ("llama", "llama_tied", "qwen3_5"):
        reader, model = load(tmp_path / family, family)
        inner = {name for name, _ in places(reader).values()}
        assert {name for name, _ in model.named_parameters()} <= inner


def test_routed_experts_stored_one_by_one_are_taken_out_of_their_stack(tmp_path):
    try:
        reader, model = load(tmp_path, "qwen3_moe", stored=torch.float32)
    except KeyError:
        pytest.skip("no tiny qwen3_moe")
    assert changed_tensors(reader, dict(model.named_parameters())) == {}
    name = next(n for n, _ in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    width = state[name].shape[1] // 2
    state[name][1, width + 2, 3] += 1.0
    changed = changed_tensors(reader, state)
    (key,) = changed
    assert key.endswith("experts.1.up_proj.weight")
    moved = changed[key]() - reader.read_float32(key)
    assert moved[2, 3] == pytest.approx(1.0)
    assert (moved != 0).sum() == 1


def test_only_tensors_that_moved_are_written(tmp_path):
    reader, model = load(tmp_path, "qwen3_5", "bfloat16")
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert changed_tensors(reader, state) == {}  # also A_log, whose bf16 value differs from the stored F32
    state["model.layers.0.linear_attn.A_log"][0] += 1.0
    assert list(changed_tensors(reader, state)) == ["model.language_model.layers.0.linear_attn.A_log"]
