"""The machine and the software that a run used: cheap to collect, free of names that identify a person."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from regrow import __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "lm_eval",
    "numpy",
    "vllm",
    "flash-linear-attention",
    "causal-conv1d",
)


def describe_environment() -> dict[str, Any]:
    """What a run was made with.

    Host and user names are left out on purpose, because the result is published with the model.

    Returns:
        `{"hardware": {"cpu", "num_cores", "memory_bytes", "gpus": [{"name", "memory_bytes"}]},
        "versions": {"regrow", "regrow_commit", "python", "platform", package ...}}`; a key is absent where
        the machine does not tell.
    """
    return {"hardware": describe_hardware(), "versions": describe_versions()}


def describe_hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in bytes, and GPUs where torch sees some."""
    hardware: dict[str, Any] = {
        "cpu": _cpu_model(),
        "num_cores": _usable_cores(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
    }
    return {key: value for key, value in hardware.items() if value is not None}


def describe_versions() -> dict[str, str]:
    """Versions of regrow (with its git commit where it runs from a checkout) and of what it stands on."""
    versions = {"regrow": __version__}
    commit = _commit()
    if commit:
        versions["regrow_commit"] = commit
    versions["python"] = platform.python_version()
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine() or None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "hardware") and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or None


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    # A container may hold less than the machine has; the kernel writes "max" where there is no limit.
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": one.name, "memory_bytes": one.total_memory} for one in properties]


def _commit() -> str | None:
    """Commit of regrow's own checkout, or the one that pip recorded when it installed from git."""
    here = Path(__file__).resolve().parent
    tracked = _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
    if tracked is not None:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", str(here.parent))
        return f"{commit} (with local changes)" if commit and changed else commit
    try:
        text = importlib.metadata.distribution("regrow").read_text("direct_url.json")
        return json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, json.JSONDecodeError):
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
