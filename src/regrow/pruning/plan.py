"""A pruning plan as a file: readable JSON, small, and the same bytes every time.

Kept channels are written as ranges, e.g. `"0-12,14,20-31"`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.files import disk_errors, read_json
from regrow.types import PruningPlan

SCHEMA = 1
_MOST_CHANNELS = 1 << 24


def save_plan(plan: PruningPlan, path: str | Path) -> None:
    """Write a plan; equal plans give equal bytes."""
    value = {
        "regrow_plan": SCHEMA,
        "parent": plan.parent,
        "width": plan.width,
        "origin": plan.origin,
        "kept": {site: format_ranges(kept) for site, kept in plan.kept.items()},
    }
    path = Path(path)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def load_plan(path: str | Path) -> PruningPlan:
    """Read a plan back.

    Raises:
        UserError: the file is missing, damaged, or no plan.
    """
    value: Any
    try:
        value = read_json(path)
    except ValueError:
        raise _damaged(path, "it is no JSON") from None
    if not isinstance(value, dict) or value.get("regrow_plan") != SCHEMA:
        raise UserError(f"{path} is no pruning plan of version {SCHEMA}; give a file made by regrow prune.")
    parent, width, kept, origin = (value.get(key) for key in ("parent", "width", "kept", "origin"))
    if not isinstance(parent, str) or not isinstance(origin, dict):
        raise _damaged(path, "its parent or origin is missing")
    if not isinstance(width, dict) or not all(type(w) is int and w > 0 for w in width.values()):
        raise _damaged(path, "its widths are missing")
    if not isinstance(kept, dict) or not all(isinstance(text, str) for text in kept.values()):
        raise _damaged(path, "its kept channels are missing")
    most = min(max(width.values(), default=0), _MOST_CHANNELS)
    channels = {site: _parse_ranges(text, most, path, site) for site, text in kept.items()}
    return PruningPlan(parent=parent, width=width, kept=channels, origin=origin)


def identity_plan(parent: str, sites: Iterable[Any]) -> PruningPlan:
    """The plan that keeps every channel of the sites given."""
    sites = list(sites)
    return PruningPlan(
        parent=parent,
        width={site.kind: site.width for site in sites},
        kept={site.name: tuple(range(site.width)) for site in sites},
        origin={"criterion": "keep-all"},
    )


def format_ranges(channels: Sequence[int]) -> str:
    """Ascending channels as ranges."""
    parts: list[str] = []
    begin = 0
    for i in range(1, len(channels) + 1):
        if i == len(channels) or channels[i] != channels[i - 1] + 1:
            first, last = channels[begin], channels[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            begin = i
    return ",".join(parts)


def _parse_ranges(text: str, most: int, path: str | Path, site: str) -> tuple[int, ...]:
    channels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,8})(?:-([0-9]{1,8}))?", part)
        if match is None:
            raise _damaged(path, f"the channels of {site!r:.80} are no ranges")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if last < first or (channels and first <= channels[-1]) or len(channels) + last - first >= most:
            raise _damaged(path, f"the channels of {site!r:.80} do not ascend, or are more than the width")
        channels.extend(range(first, last + 1))
    return tuple(channels)


def _damaged(path: str | Path, what: str) -> UserError:
    return UserError(f"The plan {path} is damaged: {what}; make it again with regrow prune.")
