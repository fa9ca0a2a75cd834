"""Packages that only some work needs: looked for before that work begins, imported only then."""

import importlib
import importlib.metadata
from typing import Any

from packaging.version import Version

from regrow.errors import UserError

ENGINES = ("transformers", "vllm")
_TRL = "1.16"


def require_engine(engine: str) -> None:
    """Check before long work that an engine can be used.

    Raises:
        UserError: an unknown engine, or vLLM is not installed.
    """
    if engine not in ENGINES:
        raise UserError(f"The engine {engine!r} is unknown; use one of {', '.join(ENGINES)}.")
    if engine == "vllm":
        import_vllm()


def import_vllm() -> Any:
    """The package vllm.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"The engine vllm cannot be loaded ({error}); pip install vllm, or use the engine transformers."
        ) from None


def require_trl(stage: str) -> None:
    """Raises:
    UserError: TRL is not installed, or too old.
    """
    remedy = "run pip install 'regrow[post]'."
    try:
        importlib.import_module("trl")
        found = importlib.metadata.version("trl")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise UserError(f"{stage} trains with TRL, which cannot be loaded ({error}); {remedy}") from None
    if Version(found) < Version(_TRL):
        raise UserError(f"{stage} needs TRL {_TRL} or newer and found {found}; {remedy}")
