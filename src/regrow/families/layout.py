"""Names and shapes of all tensors of a model, from its config alone."""

from collections.abc import Mapping
from typing import Any

from regrow.families.family import Family, Shapes
from regrow.families.registry import find_family


def text_prefix(family: Family, names: Mapping[str, Any]) -> str:
    """Where the language model lies among these names, e.g. `model.language_model.`."""
    for prefix in family.text_prefixes:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix
    return family.text_prefixes[0]


def expected_tensors(
    config: Mapping[str, Any], *, prefix: str | None = None, with_mtp: bool = True
) -> Shapes:
    """Name -> shape of every tensor that a model of this config has, as its makers store it.

    Routed experts are given stacked ([E, 2F, D] and [E, D, F]); checkpoints may hold them one by one. The
    output head is left out when it is tied to the embedding.

    Raises:
        UserError: unsupported family, or a size is missing from the config.
    """
    family = find_family(config)
    c = family.settings(config)
    prefix = family.text_prefixes[0] if prefix is None else prefix
    d, vocab = c["hidden_size"], c["vocab_size"]
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocab, d), f"{prefix}norm.weight": (d,)}
    for layer in range(c["num_hidden_layers"]):
        block = family.layer(c, layer)
        shapes |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in block.items()}
    if not c.get("tie_word_embeddings"):
        shapes[head_name(family, prefix)] = (vocab, d)
    if family.vision is not None:
        shapes |= family.vision(config)
    num_mtp = family.num_mtp_layers(config) if with_mtp else 0
    if num_mtp and family.mtp is not None and family.mtp_layer is not None:
        shapes |= {f"{family.mtp_prefix}{name}": shape for name, shape in family.mtp(c).items()}
        for layer in range(num_mtp):
            block = family.mtp_layer(c, layer)
            shapes |= {f"{family.mtp_prefix}layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def head_name(family: Family, prefix: str) -> str:
    """What the output head is called in a checkpoint whose language model lies at `prefix`."""
    return dict(zip(family.text_prefixes, family.head_names, strict=False)).get(prefix, family.head_names[0])


def part_of(family: Family, name: str) -> str:
    """Which part of the model a tensor belongs to, for counts by part."""
    if family.is_mtp(name):
        return "mtp"
    if name.startswith(family.vision_prefixes):
        return "vision"
    for fragment, part in _PARTS:
        if fragment in name:
            return part
    return "norms"


_PARTS = (
    ("embed_tokens.", "embedding"),
    ("lm_head.", "head"),
    (".linear_attn.", "linear_attention"),
    (".self_attn.", "full_attention"),
    (".mlp.shared_expert.", "shared_expert"),
    (".mlp.shared_expert_gate.", "router"),
    (".mlp.gate.", "router"),
    (".block_sparse_moe.gate.", "router"),
    (".experts.", "experts"),
    (".mlp.", "mlp"),
)
