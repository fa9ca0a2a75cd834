"""Qwen3.5: linear and full attention in turn, a vision tower, and a multi-token-prediction (MTP) head.

Layouts checked against the released Qwen3.5-4B checkpoint: 297 vision, 426 text and 15 MTP tensors.
"""

from collections.abc import Mapping
from typing import Any

from regrow.errors import UserError
from regrow.families.dense import MLP
from regrow.families.family import Family, Settings, Shapes
from regrow.families.shapes import PRE_NORMS, attention, gated_mlp, head_norms, norms

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": False,
}
RENAMES = (
    ("model.language_model.", "model."),
    ("model.visual.", ""),
    ("model.", "model."),
    ("lm_head.", "lm_head."),
)
VISION_PREFIXES = ("model.visual.",)


def is_linear(c: Settings, layer: int) -> bool:
    """Whether a layer has linear attention (Gated DeltaNet)."""
    types = c.get("layer_types")
    if types is None:
        interval = c.get("full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            raise UserError("config.json: full_attention_interval must be a positive number; mend it.")
        return bool((layer + 1) % interval)
    if not isinstance(types, list) or len(types) != c["num_hidden_layers"]:
        raise UserError("config.json: layer_types does not name every layer; mend it.")
    return bool(types[layer] == "linear_attention")


def linear_attention(c: Settings) -> Shapes:
    """Tensors of one Gated DeltaNet block."""
    d, values = c["hidden_size"], c["linear_num_value_heads"]
    keys_dim = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values_dim = values * c["linear_value_head_dim"]
    mixed = 2 * keys_dim + values_dim
    shapes: Shapes = {
        "in_proj_qkv.weight": (mixed, d),
        "in_proj_z.weight": (values_dim, d),
        "in_proj_b.weight": (values, d),
        "in_proj_a.weight": (values, d),
        "out_proj.weight": (d, values_dim),
        "norm.weight": (c["linear_value_head_dim"],),
        "conv1d.weight": (mixed, 1, c["linear_conv_kernel_dim"]),
        "A_log": (values,),
        "dt_bias": (values,),
    }
    return {f"linear_attn.{name}": shape for name, shape in shapes.items()}


def full_attention(c: Settings) -> Shapes:
    """Grouped-query attention whose q_proj also makes the output gate."""
    bias = bool(c.get("attention_bias"))
    return {**attention(c, bias=bias, output_bias=bias, query_factor=2), **head_norms(c)}


def mixer(c: Settings, layer: int) -> Shapes:
    """The attention block of a layer, with the layer's norms."""
    block = linear_attention(c) if is_linear(c, layer) else full_attention(c)
    return {**block, **norms(c, *PRE_NORMS)}


def _layer(c: Settings, layer: int) -> Shapes:
    return {**mixer(c, layer), **gated_mlp(c, c["intermediate_size"])}


def _mtp_layer(c: Settings, layer: int) -> Shapes:
    return {**full_attention(c), **gated_mlp(c, c["intermediate_size"]), **norms(c, *PRE_NORMS)}


def mtp(c: Settings) -> Shapes:
    """What joins the MTP layers to the trunk."""
    d = c["hidden_size"]
    shapes: Shapes = {"fc.weight": (d, 2 * d)}
    return {**shapes, **norms(c, "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}


def vision(config: Mapping[str, Any]) -> Shapes:
    """The vision tower; its fc1/fc2 MLPs have a width of their own, which pruning never touches."""
    v = config.get("vision_config")
    if not isinstance(v, Mapping):
        raise UserError("config.json has no vision_config; fetch the file again.")
    try:
        d, f, merge, out = (
            v["hidden_size"],
            v["intermediate_size"],
            v["spatial_merge_size"],
            v["out_hidden_size"],
        )
        patch, frames, positions = v["patch_size"], v["temporal_patch_size"], v["num_position_embeddings"]
        depth, channels = v["depth"], v["in_channels"]
    except KeyError as error:
        raise UserError(f"config.json: vision_config lacks {error}; fetch the file again.") from None
    sizes = (d, f, merge, out, patch, frames, positions, depth, channels)
    if not all(type(size) is int and 0 < size < 1 << 24 for size in sizes) or depth > 1_000:
        raise UserError("config.json: a size of vision_config is no positive whole number; mend it.")
    merged = d * merge * merge
    block: Shapes = {
        **_linear("attn.qkv", 3 * d, d),
        **_linear("attn.proj", d, d),
        **_linear("mlp.linear_fc1", f, d),
        **_linear("mlp.linear_fc2", d, f),
        **_linear("norm1", d),
        **_linear("norm2", d),
    }
    shapes: Shapes = {
        **_linear("patch_embed.proj", d, channels, frames, patch, patch),
        "pos_embed.weight": (positions, d),
        **{f"blocks.{n}.{name}": shape for n in range(depth) for name, shape in block.items()},
        **_linear("merger.norm", d),
        **_linear("merger.linear_fc1", merged, merged),
        **_linear("merger.linear_fc2", out, merged),
    }
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def _linear(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


QWEN3_5 = Family(
    "qwen3_5",
    (MLP,),
    _layer,
    defaults=DEFAULTS,
    text_key="text_config",
    text_prefixes=("model.language_model.",),
    renames=RENAMES,
    vision=vision,
    vision_prefixes=VISION_PREFIXES,
    mtp_key="mtp_num_hidden_layers",
    mtp=mtp,
    mtp_layer=_mtp_layer,
)
QWEN3_5_TEXT = Family(
    "qwen3_5_text",
    (MLP,),
    _layer,
    defaults=DEFAULTS,
    text_prefixes=("model.", "model.language_model."),
    renames=RENAMES,
    mtp_key="mtp_num_hidden_layers",
    mtp=mtp,
    mtp_layer=_mtp_layer,
)
