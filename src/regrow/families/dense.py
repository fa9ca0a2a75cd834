"""Llama and its relatives: separate gate, up and down projections in every layer."""

from regrow.families.family import Family, MlpSpec, Settings, Shapes
from regrow.families.shapes import PRE_NORMS, attention, gated_mlp, head_norms, norms, wide_norms

MLP = MlpSpec("dense", "mlp", "intermediate_size")


def _llama_layer(c: Settings, layer: int) -> Shapes:
    bias = bool(c.get("attention_bias"))
    return {
        **attention(c, bias=bias, output_bias=bias),
        **gated_mlp(c, c["intermediate_size"], bias=bool(c.get("mlp_bias"))),
        **norms(c, *PRE_NORMS),
    }


def _mistral_layer(c: Settings, layer: int) -> Shapes:
    return {
        **attention(c, bias=False),
        **gated_mlp(c, c["intermediate_size"]),
        **norms(c, *PRE_NORMS),
    }


def _qwen2_layer(c: Settings, layer: int) -> Shapes:
    return {**attention(c, bias=True), **gated_mlp(c, c["intermediate_size"]), **norms(c, *PRE_NORMS)}


def _qwen3_layer(c: Settings, layer: int) -> Shapes:
    bias = bool(c.get("attention_bias"))
    return {
        **attention(c, bias=bias, output_bias=bias),
        **head_norms(c),
        **gated_mlp(c, c["intermediate_size"]),
        **norms(c, *PRE_NORMS),
    }


def _olmo2_layer(c: Settings, layer: int) -> Shapes:
    bias = bool(c.get("attention_bias"))
    return {
        **attention(c, bias=bias, output_bias=bias),
        **wide_norms(c),
        **gated_mlp(c, c["intermediate_size"]),
        **norms(c, "post_attention_layernorm", "post_feedforward_layernorm"),
    }


LLAMA = Family("llama", (MLP,), _llama_layer)
MISTRAL = Family("mistral", (MLP,), _mistral_layer, defaults={"num_key_value_heads": 8})
QWEN2 = Family("qwen2", (MLP,), _qwen2_layer)
QWEN3 = Family("qwen3", (MLP,), _qwen3_layer, defaults={"head_dim": 128})
GRANITE = Family("granite", (MLP,), _llama_layer)
SMOLLM3 = Family(
    "smollm3", (MLP,), _llama_layer, defaults={"num_key_value_heads": 4, "tie_word_embeddings": True}
)
OLMO2 = Family("olmo2", (MLP,), _olmo2_layer)
OLMO3 = Family("olmo3", (MLP,), _olmo2_layer)
