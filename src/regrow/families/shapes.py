"""Shapes of the blocks that decoder layers are built of. Names are relative to the layer."""

from regrow.families.family import Settings, Shapes


def attention(c: Settings, *, bias: bool, output_bias: bool = False, query_factor: int = 1) -> Shapes:
    """Separate q, k, v, o projections; `query_factor` 2 where q_proj also makes an output gate."""
    heads, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    d = c["hidden_size"]
    widths = {"q_proj": query_factor * heads, "k_proj": kv, "v_proj": kv}
    shapes: Shapes = {f"self_attn.{name}.weight": (width, d) for name, width in widths.items()}
    shapes["self_attn.o_proj.weight"] = (d, heads)
    if bias:
        shapes |= {f"self_attn.{name}.bias": (width,) for name, width in widths.items()}
    if output_bias:
        shapes["self_attn.o_proj.bias"] = (d,)
    return shapes


def fused_attention(c: Settings) -> Shapes:
    """One qkv_proj, as in Phi-3."""
    heads, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    d = c["hidden_size"]
    return {"self_attn.qkv_proj.weight": (heads + 2 * kv, d), "self_attn.o_proj.weight": (d, heads)}


def head_norms(c: Settings) -> Shapes:
    """Query and key norms over one head."""
    return {f"self_attn.{name}.weight": (c["head_dim"],) for name in ("q_norm", "k_norm")}


def wide_norms(c: Settings) -> Shapes:
    """Query and key norms over all heads together, as in OLMo 2."""
    return {
        "self_attn.q_norm.weight": (c["num_attention_heads"] * c["head_dim"],),
        "self_attn.k_norm.weight": (c["num_key_value_heads"] * c["head_dim"],),
    }


def gated_mlp(c: Settings, width: int, *, bias: bool = False, path: str = "mlp") -> Shapes:
    """Separate gate, up and down projections."""
    d = c["hidden_size"]
    shapes: Shapes = {
        f"{path}.gate_proj.weight": (width, d),
        f"{path}.up_proj.weight": (width, d),
        f"{path}.down_proj.weight": (d, width),
    }
    if bias:
        shapes |= {
            f"{path}.gate_proj.bias": (width,),
            f"{path}.up_proj.bias": (width,),
            f"{path}.down_proj.bias": (d,),
        }
    return shapes


def fused_mlp(c: Settings, width: int) -> Shapes:
    """Gate above up in one matrix."""
    d = c["hidden_size"]
    return {"mlp.gate_up_proj.weight": (2 * width, d), "mlp.down_proj.weight": (d, width)}


def stacked_experts(c: Settings, width: int, experts: int, path: str = "mlp.experts") -> Shapes:
    """All routed experts in two tensors [E, 2F, D] and [E, D, F]."""
    d = c["hidden_size"]
    return {f"{path}.gate_up_proj": (experts, 2 * width, d), f"{path}.down_proj": (experts, d, width)}


def norms(c: Settings, *names: str) -> Shapes:
    """Norms over the hidden size."""
    return {f"{name}.weight": (c["hidden_size"],) for name in names}


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
