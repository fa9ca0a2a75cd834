"""Two-layer models of every supported family, built on the spot from fixed seeds.

Weights are larger than a real initialisation and norms and biases are not at their neutral values, so that a
misplaced row, a swapped half or a lost bias changes the logits.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 288
END_OF_TEXT, IM_START, IM_END, THINK, END_THINK = 256, 257, 258, 259, 260
REAL_CONFIG = Path(__file__).parents[1] / "benchmarks" / "qwen3_5_4b_config.json"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined %}"
    "{%- if enable_thinking %}{{- '<think>\\n' }}{%- else %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
    "{%- endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
}
_TIED = {"tie_word_embeddings": True}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 60,
}

# name of the variant -> (model_type, settings that differ from _BASE)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", _TIED),
    "llama_bias": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", _TIED),
    "qwen3": ("qwen3", {"head_dim": 32, **_TIED}),
    "granite": ("granite", {"mlp_bias": True}),
    "smollm3": ("smollm3", _TIED),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "gemma": ("gemma", {"head_dim": 16, **_TIED}),
    "gemma2": ("gemma2", {"head_dim": 16, **_TIED}),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, **_TIED}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 16}),
}
QWEN3_5 = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
ALL_FAMILIES = (*VARIANTS, *QWEN3_5)


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of a two-layer model; `family` is one of `ALL_FAMILIES`."""
    if family in QWEN3_5:
        raw = tiny_qwen3_5_config(moe="moe" in family)
        raw = {**raw["text_config"], "mtp_num_hidden_layers": 0} if family.endswith("_text") else raw
        return AutoConfig.for_model(**{**raw, "model_type": family})
    model_type, settings = VARIANTS[family]
    if family == "gemma3":
        text = {**_BASE, **VARIANTS["gemma3_text"][1]}
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip
        return AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=280
        )
    return AutoConfig.for_model(model_type, **{**_BASE, **settings})


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A randomly initialised model in eval mode; `qwen3_5` holds the vision tower."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model.to(dtype).eval()


def save_tiny_model(
    family: str, folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a tiny model with its tokenizer the way the family's makers release it; returns the folder.

    `qwen3_5` has the real checkpoint's names: vision, multi-token prediction, two oddly named shards, and
    (with bf16) `A_log` and `linear_attn.norm` in F32.
    """
    folder = Path(folder)
    model = tiny_model(family, seed, dtype)
    model.save_pretrained(folder)
    if family in ("qwen3_5", "qwen3_5_moe"):
        _release_like_qwen3_5(folder, seed, dtype, moe=family == "qwen3_5_moe")
    save_tiny_tokenizer(folder)
    return folder


def save_tiny_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (256 bytes + 5 special tokens) with a ChatML template, saved into a folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def tiny_qwen3_5_config(moe: bool = False) -> dict[str, Any]:
    """The real Qwen3.5-4B config.json with its sizes shrunk and every other key as it is.

    `moe` makes it a mixture of experts the way Qwen3.5-35B-A3B is one.
    """
    config: dict[str, Any] = json.loads(REAL_CONFIG.read_text())
    config["text_config"].update(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        full_attention_interval=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.15,
        eos_token_id=END_OF_TEXT,
        dtype="float32",
    )
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 1, 1]
    config["vision_config"].update(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_position_embeddings=16,
        out_hidden_size=64,
        patch_size=4,
        initializer_range=0.15,
    )
    config.update(image_token_id=280, video_token_id=281, vision_start_token_id=282, vision_end_token_id=283)
    if moe:
        del config["text_config"]["intermediate_size"]
        config["text_config"].update(model_type="qwen3_5_moe_text", **_MOE)
        config.update(model_type="qwen3_5_moe", architectures=["Qwen3_5MoeForConditionalGeneration"])
    return config


def stack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts stored one by one, as transformers saves them, in the stacked form of some releases."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        base, found, rest = name.partition(".mlp.experts.")
        if not found:
            result[name] = tensor
        elif rest == "0.down_proj.weight":
            path, experts = f"{base}.mlp.experts", range(_MOE["num_experts"])
            part = {
                p: [tensors[f"{path}.{e}.{p}_proj.weight"] for e in experts] for p in ("gate", "up", "down")
            }
            pairs = zip(part["gate"], part["up"], strict=True)
            result[f"{path}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            result[f"{path}.down_proj"] = torch.stack(part["down"])
    return result


def _release_like_qwen3_5(folder: Path, seed: int, dtype: torch.dtype, moe: bool) -> None:
    (saved,) = folder.glob("*.safetensors")
    tensors = load_file(saved)
    saved.unlink()
    tensors = stack_experts(tensors)
    for name in tensors:
        if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight")):
            tensors[name] = tensors[name].float()
    full_layer = "model.language_model.layers.1."
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = {
        "mtp." + name.removeprefix("model.language_model.").replace("layers.1", "layers.0"): t.shape
        for name, t in tensors.items()
        if name.startswith(full_layer)
    }
    shapes |= {f"mtp.{n}.weight": (64,) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    shapes["mtp.fc.weight"] = (64, 128)
    for name, shape in shapes.items():
        tensors[name] = (torch.randn(tuple(shape), generator=generator) * 0.15).to(dtype)

    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for part, chosen in enumerate((names[:half], names[half:]), start=1):
        file = f"model.safetensors-{part:05d}-of-00002.safetensors"
        save_file({n: tensors[n].contiguous() for n in chosen}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = tiny_qwen3_5_config(moe)
    config["text_config"]["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    (folder / "generation_config.json").unlink(missing_ok=True)
