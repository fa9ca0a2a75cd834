import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from regrow.errors import UserError
from regrow.modeling.hidden import check_head, final_hidden, head_of
from tiny_models import VARIANTS, tiny_config, tiny_model

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# families that do something to their logits after the head, with values unlike their neutral ones
SCALED = {
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "layer_types": ["full_attention", "full_attention"]},
    "gemma2": {"final_logit_softcapping": 1.5, "head_dim": 8, "query_pre_attn_scalar": 8},
    "nanochat": {"final_logit_softcapping": 1.5},
}


def inputs(vocabulary=64):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 3:] = 0
    return ids * mask, mask


def scaled_model(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**BASE, **SCALED[model_type], "initializer_range": 0.3})
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def assert_head_gives_the_logits(model):
    ids, mask = inputs()
    expected = model(input_ids=ids, attention_mask=mask).logits
    actual = head_of(model).logits(final_hidden(model, ids, mask))
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], atol=2e-5, rtol=1e-5)
    check_head(model)


@pytest.mark.parametrize("family", [*VARIANTS, "qwen3_5_text"])
def test_head_of_final_hidden_is_the_models_logits(family):
    assert_head_gives_the_logits(tiny_model(family))


@pytest.mark.parametrize("model_type", SCALED)
def test_multipliers_and_softcaps(model_type):
    model = scaled_model(model_type)
    assert_head_gives_the_logits(model)
    head = head_of(model)
    assert head.scale != 1.0 or head.softcap is not None


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_5_text"])
@torch.no_grad()
def test_right_padding_changes_nothing(family):
    model = tiny_model(family)
    ids, mask = inputs()
    padded = final_hidden(model, ids, mask)
    for row in range(3):
        length = int(mask[row].sum())
        alone = final_hidden(model, ids[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_unknown_logit_changes_are_refused():
    model = scaled_model("granite")
    model.config.logits_scaling = 1.0  # as if the family's key had another name; the module keeps its own
    forward = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Odd
    with pytest.raises(UserError, match="changes its logits"):
        check_head(model)


def test_peft_models_are_looked_through():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    ids, mask = inputs()
    with torch.no_grad():
        before = final_hidden(model, ids, mask)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        assert torch.equal(final_hidden(wrapped, ids, mask), before)  # B starts at zero
    assert head_of(wrapped).weight_VD is model.lm_head.weight


def test_tied_head_is_the_embedding_and_no_head_is_refused():
    model = tiny_model("qwen2")
    assert head_of(model).weight_VD is model.get_input_embeddings().weight
    with pytest.raises(UserError, match="no linear output layer"):
        head_of(AutoModelForCausalLM.from_config(tiny_config("llama")).model)


def test_gradients_reach_the_weights():
    model = tiny_model("llama")
    final_hidden(model, *inputs()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "lm_head.weight")
