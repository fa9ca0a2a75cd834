"""What the parent says about itself (licence, language, origin), for its child's card to inherit."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

_LICENCES = (
    (re.compile(r"Apache License\s+Version 2\.0", re.IGNORECASE), "apache-2.0"),
    (re.compile(r"\bMIT License\b", re.IGNORECASE), "mit"),
)
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_parent(folder: str | Path) -> dict[str, Any]:
    """What a parent's folder says about itself; whatever it does not say is absent.

    Returns:
        Keys of `license`, `license_name`, `license_link`, `language`, `pipeline_tag` as in the header of its
        card; `license_source` (where the licence was read); `model_id` (the Hub's name for it, where the
        folder records one) and `origin` (one sentence on how its weights came about, for models that regrow
        fetched itself).
    """
    folder = Path(folder)
    header = _card_header(folder / "README.md")
    facts = {key: header[key] for key in _INHERITED if _is_text(header.get(key))}
    if "license" in facts:
        facts["license_source"] = "the parent's model card"
    else:
        for path in sorted((*folder.glob("LICENSE*"), *folder.glob("LICENCE*"))):
            text = _read(path)[:4_000]
            known = next((name for pattern, name in _LICENCES if pattern.search(text)), None)
            if known:
                facts |= {"license": known, "license_source": f"the parent's file {path.name}"}
                break
    source = _json(folder / "regrow-source.json")
    if isinstance(source.get("model_id"), str):
        facts["model_id"] = source["model_id"]
        facts["origin"] = (
            f"The parent used here is {source['model_id']} dequantised from the GGUF file in the PyPI package"
            f" {source.get('requirement')}, so it already differs from the original by that file's rounding."
        )
    return facts


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _card_header(path: Path) -> dict[str, Any]:
    match = _FRONT_MATTER.match(_read(path))
    if match is None:
        return {}
    try:
        header = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path) or "{}")
    except (json.JSONDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
