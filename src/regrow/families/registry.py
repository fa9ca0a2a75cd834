"""Which families there are, and what is refused by name."""

from collections.abc import Mapping
from typing import Any

from regrow.errors import UserError
from regrow.families import dense, fused, gemma, moe, qwen3_5
from regrow.families.family import Family

FAMILIES: dict[str, Family] = {
    "llama": dense.LLAMA,
    "mistral": dense.MISTRAL,
    "qwen2": dense.QWEN2,
    "qwen3": dense.QWEN3,
    "granite": dense.GRANITE,
    "smollm3": dense.SMOLLM3,
    "olmo2": dense.OLMO2,
    "olmo3": dense.OLMO3,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3": gemma.GEMMA3,
    "gemma3_text": gemma.GEMMA3_TEXT,
    "phi3": fused.PHI3,
    "glm": fused.GLM,
    "glm4": fused.GLM4,
    "qwen3_5": qwen3_5.QWEN3_5,
    "qwen3_5_text": qwen3_5.QWEN3_5_TEXT,
    "qwen2_moe": moe.QWEN2_MOE,
    "qwen3_moe": moe.QWEN3_MOE,
    "qwen3_5_moe": moe.QWEN3_5_MOE,
    "qwen3_5_moe_text": moe.QWEN3_5_MOE_TEXT,
    "mixtral": moe.MIXTRAL,
}

# Couplings between the MLP's width and something else that cannot be kept exact.
REFUSED: dict[str, str] = {
    "gemma3n": "its layers have widths and activation sparsity of their own",
    "gemma3n_text": "its layers have widths and activation sparsity of their own",
    "gemma4": "some of its MLPs are twice as wide as the config says (use_double_wide_mlp)",
    "gemma4_text": "some of its MLPs are twice as wide as the config says (use_double_wide_mlp)",
    "gpt_oss": "its experts interleave gate and up and are stored in MXFP4",
    "bitnet": "its weights are ternary and a norm has the MLP's width",
    "lfm2": "its config recomputes the width it is given",
    "lfm2_moe": "its config recomputes the width it is given",
}


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: the checkpoint is quantised, its couplings cannot be kept exact, or nobody described it.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError("config.json names no model_type; name a folder that holds a transformers model.")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            raise UserError(
                f"The model is quantised ({method or 'quantization_config'}); prune the unquantised one."
            )
    if reason := REFUSED.get(model_type):
        raise UserError(f"{model_type} cannot be pruned exactly: {reason}; use a model of another family.")
    if model_type not in FAMILIES:
        raise UserError(
            f"The model type {model_type!r:.80} is not supported; regrow knows {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
