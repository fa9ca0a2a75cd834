"""From a folder to a loaded model, its tokenizer and a device. Safetensors only; no pickle is read."""

import contextlib
from collections.abc import Iterator
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
from transformers.utils import logging as hf_logging

from regrow.errors import UserError
from regrow.files import read_json

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode.

    Args:
        folder: a checkpoint's folder (see `regrow.modeling.sources`).
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
        with _no_progress_bars():
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


def load_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} has no usable config.json: {_one_line(error)}") from None


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' loading bars out of regrow's own progress lines."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]
