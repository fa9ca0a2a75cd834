"""What a model is, and what it becomes at another width: from headers, or from a config.json alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.checkpoint.dtypes import ITEM_BYTES
from regrow.checkpoint.reader import INDEX_NAME, CheckpointReader, read_config_only
from regrow.errors import UserError
from regrow.families import (
    Family,
    count_by_part,
    expected_tensors,
    find_family,
    head_name,
    pruned_config,
    text_prefix,
    width_key,
)
from regrow.pruning.alignment import alignment_notes, format_costs
from regrow.types import SiteKind

_CONFIG_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def inspect_checkpoint(folder: str | Path, width: int | None = None) -> dict[str, Any]:
    """Describe a model folder; it may hold only a config.json.

    Returns:
        `family, model_type, num_layers, hidden_size, intermediate_size, width_key, widths (kind -> width),
        num_parameters, weight_bytes, parts (name -> parameters), tied, num_mtp_layers, mtp (parameters and
        bytes), source ("headers" or "config"), alignment (format -> sentence), notes`, and with `width`
        under `pruned` the same at that width. `num_parameters` and `weight_bytes` are those of the model that
        transformers builds: the multi-token-prediction head is in `parts` and in `mtp`, not in them. From a
        config alone, bytes are parameters times the size of its dtype.

    Raises:
        UserError: no model, unsupported family, damaged files, or a width that is not below the model's.
    """
    folder = Path(folder)
    config = read_config_only(folder)
    find_family(config)
    has_weights = (folder / INDEX_NAME).exists() or any(folder.glob("*.safetensors"))
    if has_weights:
        reader = CheckpointReader(folder)
        tensors = {n: (t.shape, ITEM_BYTES[t.dtype]) for n, t in reader.tensors.items()}
    else:
        item = _item_bytes(config)
        tensors = {name: (shape, item) for name, shape in expected_tensors(config).items()}
    result = _describe(config, tensors)
    result["source"] = "headers" if has_weights else "config"
    if width is not None:
        kinds = _main_kinds(find_family(config), config)
        before = result["intermediate_size"]
        if not 0 < width <= before:
            raise UserError(f"Width {width} is not within the model's {before}; choose 1 to {before}.")
        after = pruned_config(config, width, kinds=kinds)
        result["pruned"] = _describe(after, _resized(config, after, tensors))
        result["pruned"]["notes"] = alignment_notes(width)
        result["pruned"]["removed_parameters"] = result["num_parameters"] - result["pruned"]["num_parameters"]
    return result


Tensors = dict[str, tuple[tuple[int, ...], int]]


def _describe(config: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    family = find_family(config)
    c = family.settings(config)
    kinds = _main_kinds(family, config)
    key = width_key(config, kinds[0])
    widths = {spec.kind: c[spec.width_key] for spec in family.mlps if c.get(spec.width_key)}
    parts = count_by_part(config, {name: shape for name, (shape, _) in tensors.items()})
    nbytes = {name: math.prod(shape) * item for name, (shape, item) in tensors.items()}
    mtp_bytes = sum(n for name, n in nbytes.items() if family.is_mtp(name))
    tied = (
        bool(c.get("tie_word_embeddings")) and head_name(family, text_prefix(family, tensors)) not in tensors
    )
    return {
        "family": family.name,
        "model_type": config["model_type"],
        "num_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c[key],
        "width_key": key,
        "widths": widths,
        "num_parameters": sum(n for part, n in parts.items() if part != "mtp"),
        "weight_bytes": sum(nbytes.values()) - mtp_bytes,
        "parts": parts,
        "tied": tied,
        "num_mtp_layers": family.num_mtp_layers(config),
        "mtp": {"num_parameters": parts.get("mtp", 0), "weight_bytes": mtp_bytes},
        "alignment": format_costs(c[key]),
        "notes": [],
    }


def _main_kinds(family: Family, config: Mapping[str, Any]) -> tuple[SiteKind, ...]:
    """The kind that `--width` means: dense MLPs where any layer has one, else routed experts."""
    c = family.settings(config)
    dense = any("mlp.down_proj.weight" in family.layer(c, layer) for layer in range(c["num_hidden_layers"]))
    return ("dense",) if dense else ("expert",)


def _resized(before: Mapping[str, Any], after: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors at the new width. Those that the config does not foresee keep their shape."""
    prefix = text_prefix(find_family(before), tensors)
    old, new = (expected_tensors(config, prefix=prefix) for config in (before, after))
    scale = {name: math.prod(new[name]) / math.prod(old[name]) for name in old}
    result: Tensors = {}
    for name, (shape, item) in tensors.items():
        if name in old:
            result[name] = (new[name], item)
            continue
        path, _, rest = name.partition(".experts.")
        stack = f"{path}.experts.down_proj"
        if rest and stack in old:  # an expert stored on its own shrinks as the stack does
            result[name] = ((round(math.prod(shape) * scale[stack]),), item)
        else:
            result[name] = (shape, item)
    return result


def _item_bytes(config: Mapping[str, Any]) -> int:
    text = config.get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config):
        dtype = part.get("dtype") or part.get("torch_dtype")
        if isinstance(dtype, str):
            return _CONFIG_BYTES.get(dtype.removeprefix("torch."), 2)
    return 2


def format_inspection(result: Mapping[str, Any]) -> str:
    """A description for people."""
    pruned = result.get("pruned")
    lines = [
        f"{result['family']}: {result['num_layers']} layers, hidden size {result['hidden_size']:,}, "
        f"embeddings {'tied' if result['tied'] else 'not tied'}"
    ]

    def row(label: str, before: int, after: int | None) -> str:
        change = f" {after:>16,}" if after is not None else ""
        return f"  {label:<20}{before:>16,}{change}"

    for label in ("intermediate_size", "num_parameters", "weight_bytes"):
        lines.append(row(label, result[label], pruned[label] if pruned else None))
    for part, count in result["parts"].items():
        lines.append(row(part, count, pruned["parts"][part] if pruned else None))
    last = pruned or result
    lines += [f"  {name}: {text}" for name, text in last["alignment"].items()]
    lines += [f"  note: {note}" for note in last["notes"]]
    if result["source"] == "config":
        lines.append("  from config.json alone; bytes are parameters times the dtype's size")
    return "\n".join(lines)
