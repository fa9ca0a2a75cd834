"""Families that store gate above up in one `gate_up_proj`: Phi-3, GLM and GLM-4."""

from regrow.families.dense import MLP
from regrow.families.family import Family, Settings, Shapes
from regrow.families.shapes import PRE_NORMS, attention, fused_attention, fused_mlp, norms


def _phi3_layer(c: Settings, layer: int) -> Shapes:
    return {**fused_attention(c), **fused_mlp(c, c["intermediate_size"]), **norms(c, *PRE_NORMS)}


def _glm_layer(c: Settings, layer: int) -> Shapes:
    return {
        **attention(c, bias=bool(c.get("attention_bias"))),
        **fused_mlp(c, c["intermediate_size"]),
        **norms(c, *PRE_NORMS),
    }


def _glm4_layer(c: Settings, layer: int) -> Shapes:
    return {**_glm_layer(c, layer), **norms(c, "post_self_attn_layernorm", "post_mlp_layernorm")}


_GLM = {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2}
PHI3 = Family("phi3", (MLP,), _phi3_layer)
GLM = Family("glm", (MLP,), _glm_layer, defaults=_GLM)
GLM4 = Family("glm4", (MLP,), _glm4_layer, defaults=_GLM)
