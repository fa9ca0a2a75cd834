"""Gemma 1 to 3: norms before and after each block, tied embeddings, and (Gemma 3) a SigLIP vision tower."""

from collections.abc import Mapping
from typing import Any

from regrow.errors import UserError
from regrow.families.dense import MLP
from regrow.families.family import Family, Settings, Shapes
from regrow.families.shapes import PRE_NORMS, attention, gated_mlp, head_norms, norms

_FOUR_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
# Sizes of SigLIP that a released config.json may leave out.
_VISION_DEFAULTS = {"num_channels": 3, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                    "image_size": 224, "patch_size": 16}  # fmt: skip


def _block(c: Settings) -> Shapes:
    bias = bool(c.get("attention_bias"))
    return {**attention(c, bias=bias, output_bias=bias), **gated_mlp(c, c["intermediate_size"])}


def _gemma_layer(c: Settings, layer: int) -> Shapes:
    return {**_block(c), **norms(c, *PRE_NORMS)}


def _gemma2_layer(c: Settings, layer: int) -> Shapes:
    return {**_block(c), **norms(c, *_FOUR_NORMS)}


def _gemma3_layer(c: Settings, layer: int) -> Shapes:
    return {**_gemma2_layer(c, layer), **head_norms(c)}


def vision(config: Mapping[str, Any]) -> Shapes:
    """The SigLIP tower and the projector of Gemma 3."""
    given, text = config.get("vision_config"), config.get("text_config")
    if not isinstance(given, Mapping) or not isinstance(text, Mapping):
        raise UserError("config.json has no vision_config or text_config; fetch the file again.")
    v = {**_VISION_DEFAULTS, **given}
    sizes = [v[key] for key in _VISION_DEFAULTS]
    if not all(type(size) is int and 0 < size < 1 << 24 for size in sizes) or v["num_hidden_layers"] > 1_000:
        raise UserError("config.json: a size of vision_config is no positive whole number; mend it.")
    d, f = v["hidden_size"], v["intermediate_size"]
    layer: Shapes = {
        f"self_attn.{name}.weight": (d, d) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    } | {"mlp.fc1.weight": (f, d), "mlp.fc2.weight": (d, f)}
    layer |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in layer.items()}
    layer |= {f"layer_norm{n}.{kind}": (d,) for n in (1, 2) for kind in ("weight", "bias")}
    tower: Shapes = {
        "embeddings.patch_embedding.weight": (d, v["num_channels"], v["patch_size"], v["patch_size"]),
        "embeddings.patch_embedding.bias": (d,),
        "embeddings.position_embedding.weight": ((v["image_size"] // v["patch_size"]) ** 2, d),
        "post_layernorm.weight": (d,),
        "post_layernorm.bias": (d,),
    }
    for number in range(v["num_hidden_layers"]):
        tower |= {f"encoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    if v.get("vision_use_head", True):
        tower |= {
            "head.probe": (1, 1, d),
            "head.attention.in_proj_weight": (3 * d, d),
            "head.attention.in_proj_bias": (3 * d,),
            "head.attention.out_proj.weight": (d, d),
            "head.attention.out_proj.bias": (d,),
            "head.layernorm.weight": (d,),
            "head.layernorm.bias": (d,),
            "head.mlp.fc1.weight": (f, d),
            "head.mlp.fc1.bias": (f,),
            "head.mlp.fc2.weight": (d, f),
            "head.mlp.fc2.bias": (d,),
        }
    shapes: Shapes = {f"vision_tower.vision_model.{name}": shape for name, shape in tower.items()}
    shapes["multi_modal_projector.mm_input_projection_weight"] = (d, text.get("hidden_size", 2304))
    shapes["multi_modal_projector.mm_soft_emb_norm.weight"] = (d,)
    return shapes


_TIED = {"tie_word_embeddings": True, "head_dim": 256}
GEMMA = Family("gemma", (MLP,), _gemma_layer, defaults={**_TIED, "num_key_value_heads": 16})
GEMMA2 = Family("gemma2", (MLP,), _gemma2_layer, defaults={**_TIED, "num_key_value_heads": 4})
# Released Gemma 3 configs leave out what equals transformers' default, even the number of heads.
_GEMMA3 = {**_TIED, "num_key_value_heads": 4, "num_attention_heads": 8, "vocab_size": 262_208}
GEMMA3_TEXT = Family("gemma3_text", (MLP,), _gemma3_layer, defaults=_GEMMA3)
GEMMA3 = Family(
    "gemma3",
    (MLP,),
    _gemma3_layer,
    defaults=_GEMMA3,
    text_key="text_config",
    text_prefixes=("language_model.model.", "model.language_model."),
    head_names=("language_model.lm_head.weight", "lm_head.weight"),
    renames=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("model.", "model."),
        ("lm_head.", "lm_head."),
    ),
    vision=vision,
    vision_prefixes=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
