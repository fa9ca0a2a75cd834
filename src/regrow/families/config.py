"""Edits of a config.json that follow from cutting its MLPs, and names in transformers' classes."""

import copy
import re
from collections.abc import Mapping
from typing import Any, Literal

from regrow.errors import UserError
from regrow.families.registry import find_family
from regrow.families.sites import width_key
from regrow.types import SiteKind


def pruned_config(
    config: Mapping[str, Any],
    width: int | Mapping[SiteKind, int],
    *,
    mtp: Literal["prune", "drop"] = "prune",
    kinds: tuple[SiteKind, ...] | None = None,
) -> dict[str, Any]:
    """A copy of the config with the new widths; keys keep their order, all else its value.

    `width` is one number for `kinds` (by default the dense MLPs, or the routed experts of a family without),
    or a number per kind. Only the language model's own settings change, never `vision_config`.

    Raises:
        UserError: unsupported family, or multi-token prediction at another width than the trunk's.
    """
    family = find_family(config)
    result = copy.deepcopy(dict(config))
    text = result[family.text_key] if family.text_key and family.text_key in result else result
    if isinstance(width, int):
        known = tuple(spec.kind for spec in family.mlps)
        kinds = kinds or (("dense",) if "dense" in known else ("expert",))
        widths: dict[SiteKind, int] = dict.fromkeys(kinds, width)
    else:
        widths = dict(width)
    keys: dict[str, int] = {}
    for kind, value in widths.items():
        key = width_key(config, kind)
        if keys.setdefault(key, value) != value:
            raise UserError(f"config.json has one {key} for trunk and multi-token prediction; use one width.")
    text.update(keys)
    if mtp == "drop" and family.mtp_key and (text.get(family.mtp_key) or family.mtp_key in text):
        text[family.mtp_key] = 0
    return result


def causal_lm_name(config: Mapping[str, Any], checkpoint_name: str) -> str | None:
    """The name of a checkpoint's tensor in `AutoModelForCausalLM`'s state dict; None if it is not in there.

    Routed experts that the checkpoint stores one by one all give the name of the stacked parameter.
    """
    family = find_family(config)
    if family.is_mtp(checkpoint_name):
        return None
    for old, new in family.renames:
        if checkpoint_name.startswith(old):
            if not new:
                return None
            name = new + checkpoint_name.removeprefix(old)
            for pattern, replacement in family.patterns:
                name = re.sub(pattern, replacement, name)
            return name
    return None
