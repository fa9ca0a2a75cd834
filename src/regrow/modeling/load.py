"""From a model's name to a loaded model, its tokenizer and a device. Safetensors only; no pickle is read."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from regrow.errors import UserError
from regrow.files import read_json
from regrow.modeling.builtin import builtin_model

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.py",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]


def resolve_model(source: str, revision: str | None = None) -> Path:
    """The local folder of a model.

    Args:
        source: a local folder, `builtin:<name>`, or a Hub id (fetched to the Hub's cache, safetensors only).
        revision: branch, tag or commit of a Hub model.

    Raises:
        UserError: the folder or the Hub model does not exist, cannot be reached, or has no config.json.
    """
    if source.startswith("builtin:"):
        return builtin_model(source.removeprefix("builtin:"))
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no config.json; name the folder of a Hugging Face checkpoint.")
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file; name the folder that holds the checkpoint.")
    if not _HUB_ID.match(source):
        raise UserError(f"The model folder {source} does not exist; check the path.")
    return _fetch_from_hub(source, revision)


def load_model(
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode.

    Args:
        folder: a checkpoint's folder (see `resolve_model`).
        dtype: `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"` for the checkpoint's own.
        device: where the model is put.
        trust_remote_code: run Python code that the checkpoint brings along.

    Raises:
        UserError: the checkpoint is missing, incomplete, quantised, unsupported or does not fit its config.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise UserError(f"{folder} is quantised ({method}); use the bf16 checkpoint it was made from.")
    if dtype != "auto" and dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use auto, {', '.join(_DTYPES)}.")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_DTYPES.get(dtype, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"{folder} cannot be loaded: {_one_line(error)}") from None
    except Exception as error:  # safetensors raises its own class on a damaged file
        if type(error).__module__.startswith("safetensors"):
            raise UserError(
                f"{folder} has a damaged safetensors file ({_one_line(error)}); fetch it again."
            ) from None
        raise
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks the weight {missing[0]}{more}; fetch the checkpoint again.")
    return model.to(device).eval()


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's folder.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"{folder} has no usable tokenizer ({_one_line(error)}); copy the parent's tokenizer files there."
        ) from None


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        UserError: the device is unknown or absent.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r} is unknown; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for and PyTorch sees no CUDA device; use device: auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _fetch_from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise UserError(
            f"{source} is gated on the Hub; accept its terms there and run: hf auth login."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{source} has no revision {revision!r} on the Hub; check the name.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{source} is neither a local folder nor a model on the Hub; check the name."
        ) from None
    except Exception as error:  # the Hub's client raises requests', httpx' and its own errors
        raise UserError(
            f"{source} is no local folder and the Hub cannot be reached ({_one_line(error)}); "
            "check the path, or the network."
        ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} on the Hub holds no config.json; name a transformers checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{source} on the Hub has no safetensors weights; regrow reads no other format.")
    return folder


def load_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} has no usable config.json: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]
