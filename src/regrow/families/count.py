"""Parameters by part, from the config alone."""

import math
from collections.abc import Mapping
from typing import Any

from regrow.families.layout import expected_tensors, part_of
from regrow.families.registry import find_family

_ORDER = (
    "embedding", "full_attention", "linear_attention", "mlp", "shared_expert", "experts", "router", "norms",
    "vision", "head", "mtp",
)  # fmt: skip


def count_parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Part of the model -> parameters. A tied head is not counted.

    transformers does not build the multi-token-prediction head: the model it loads has the sum of every part
    but `mtp`.

    Raises:
        UserError: unsupported family, or a size is missing from the config.
    """
    return count_by_part(config, expected_tensors(config))


def count_by_part(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Part -> parameters of the tensors given."""
    family = find_family(config)
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        part = part_of(family, name)
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return {part: counts[part] for part in _ORDER if part in counts}
