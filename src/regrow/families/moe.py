"""Mixtures of experts: dense layers, shared experts, and routed experts stored one by one or stacked.

`--width` governs the dense MLPs of a model that has any, else the routed experts; the shared expert has a
width of its own. Every expert keeps its own channels, all of them the same number.
"""

from regrow.errors import UserError
from regrow.families import qwen3_5
from regrow.families.dense import MLP
from regrow.families.family import Family, MlpSpec, Settings, Shapes
from regrow.families.shapes import (
    PRE_NORMS,
    attention,
    gated_mlp,
    head_norms,
    norms,
    stacked_experts,
)

EXPERTS = MlpSpec("expert", "mlp.experts", "moe_intermediate_size")
SHARED = MlpSpec("shared_expert", "mlp.shared_expert", "shared_expert_intermediate_size")
MIXTRAL_EXPERTS = MlpSpec(
    "expert", "block_sparse_moe.experts", "intermediate_size", ("w1", "w3", "w2"), module="mlp.experts"
)
# What AutoModelForCausalLM calls an expert that the checkpoint stores on its own.
_STACKED = (
    (r"\.experts\.\d+\.(?:gate|up)_proj\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.down_proj\.weight$", ".experts.down_proj"),
)
_MIXTRAL = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.\d+\.w[13]\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.w2\.weight$", ".experts.down_proj"),
)


def _is_sparse(c: Settings, layer: int) -> bool:
    step, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers", [])
    if type(step) is not int or step < 1 or not isinstance(dense, list):
        raise UserError("config.json: decoder_sparse_step or mlp_only_layers makes no sense; mend it.")
    return (layer + 1) % step == 0 and layer not in dense


def _routed(c: Settings, *, shared: bool) -> Shapes:
    d, experts = c["hidden_size"], c["num_experts"]
    shapes: Shapes = {
        "mlp.gate.weight": (experts, d),
        **stacked_experts(c, c["moe_intermediate_size"], experts),
    }
    if shared:
        width = c["shared_expert_intermediate_size"]
        shapes |= {"mlp.shared_expert_gate.weight": (1, d)}
        shapes |= gated_mlp(c, width, path="mlp.shared_expert")
    return shapes


def _qwen2_moe_layer(c: Settings, layer: int) -> Shapes:
    dense = gated_mlp(c, c["intermediate_size"])
    mlp = _routed(c, shared=True) if _is_sparse(c, layer) else dense
    return {**attention(c, bias=bool(c.get("qkv_bias", True))), **mlp, **norms(c, *PRE_NORMS)}


def _qwen3_moe_layer(c: Settings, layer: int) -> Shapes:
    bias = bool(c.get("attention_bias"))
    dense = gated_mlp(c, c["intermediate_size"])
    mlp = _routed(c, shared=False) if _is_sparse(c, layer) else dense
    block = attention(c, bias=bias, output_bias=bias)
    return {**block, **head_norms(c), **mlp, **norms(c, *PRE_NORMS)}


def _qwen3_5_moe_layer(c: Settings, layer: int) -> Shapes:
    return {**qwen3_5.mixer(c, layer), **_routed(c, shared=True)}


def _qwen3_5_moe_mtp_layer(c: Settings, layer: int) -> Shapes:
    return {**qwen3_5.full_attention(c), **_routed(c, shared=True), **norms(c, *PRE_NORMS)}


def _mixtral_layer(c: Settings, layer: int) -> Shapes:
    d, experts = c["hidden_size"], c["num_experts"]
    return {
        **attention(c, bias=False),
        "block_sparse_moe.gate.weight": (experts, d),
        **stacked_experts(c, c["intermediate_size"], experts, "block_sparse_moe.experts"),
        **norms(c, *PRE_NORMS),
    }


_QWEN2_MOE = {
    "intermediate_size": 5632,
    "num_experts": 60,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
_QWEN3_MOE = {
    "intermediate_size": 6144,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "num_key_value_heads": 4,
}
_QWEN3_5_MOE = {
    **qwen3_5.DEFAULTS,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
QWEN2_MOE = Family(
    "qwen2_moe", (MLP, EXPERTS, SHARED), _qwen2_moe_layer, defaults=_QWEN2_MOE, patterns=_STACKED
)
QWEN3_MOE = Family("qwen3_moe", (MLP, EXPERTS), _qwen3_moe_layer, defaults=_QWEN3_MOE, patterns=_STACKED)
MIXTRAL = Family(
    "mixtral",
    (MIXTRAL_EXPERTS,),
    _mixtral_layer,
    defaults={"num_key_value_heads": 8, "num_experts": 8},
    patterns=_MIXTRAL,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe",
    (EXPERTS, SHARED),
    _qwen3_5_moe_layer,
    defaults=_QWEN3_5_MOE,
    text_key="text_config",
    text_prefixes=("model.language_model.",),
    renames=qwen3_5.RENAMES,
    patterns=_STACKED,
    vision=qwen3_5.vision,
    vision_prefixes=qwen3_5.VISION_PREFIXES,
    mtp_key="mtp_num_hidden_layers",
    mtp=qwen3_5.mtp,
    mtp_layer=_qwen3_5_moe_mtp_layer,
)
QWEN3_5_MOE_TEXT = Family(
    "qwen3_5_moe_text",
    (EXPERTS, SHARED),
    _qwen3_5_moe_layer,
    defaults=_QWEN3_5_MOE,
    text_prefixes=("model.", "model.language_model."),
    renames=qwen3_5.RENAMES,
    patterns=_STACKED,
    mtp_key="mtp_num_hidden_layers",
    mtp=qwen3_5.mtp,
    mtp_layer=_qwen3_5_moe_mtp_layer,
)
