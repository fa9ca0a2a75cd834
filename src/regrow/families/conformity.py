"""Do a checkpoint's names, shapes and dtypes fit its config?"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regrow.errors import UserError
from regrow.families.family import Family, Shape
from regrow.families.layout import expected_tensors, head_name, text_prefix
from regrow.families.registry import find_family
from regrow.types import TensorInfo

_FLOATS = ("BF16", "F16", "F32", "F64")
# Buffers that older releases stored and that every loader ignores.
_STALE_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$|masked_bias$")


@dataclass(frozen=True)
class Faults:
    """How a checkpoint departs from what its config foresees; names, or sentences' beginnings.

    Attributes:
        missing: foreseen tensors that are not there.
        misshapen: `name [found] instead of [foreseen]`.
        not_float: foreseen tensors that are stored as integers or float8.
        extra: tensors that nothing foresees.
        harmless: extra tensors that loaders ignore (stale buffers, the head of a tied model).
        mtp_missing, mtp_misshapen, mtp_extra: the same for multi-token prediction.
        mtp_declared: layers of it that the config declares.
        prefix: where the language model lies.
    """

    missing: list[str]
    misshapen: list[str]
    not_float: list[str]
    extra: list[str]
    harmless: list[str]
    mtp_missing: list[str]
    mtp_misshapen: list[str]
    mtp_extra: list[str]
    mtp_declared: int
    prefix: str

    @property
    def mtp_ok(self) -> bool:
        """Whether declaration and tensors of multi-token prediction agree."""
        return not (self.mtp_missing or self.mtp_misshapen or self.mtp_extra)

    @property
    def main_ok(self) -> bool:
        """Whether everything else that is foreseen is there, in the right shape."""
        return not (self.missing or self.misshapen or self.not_float)


def find_faults(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Faults:
    """Compare a checkpoint with its config.

    Routed experts may be stored one by one or stacked, and older names of the same tensor are known.

    Raises:
        UserError: unsupported family or impossible sizes.
    """
    family = find_family(config)
    prefix = text_prefix(family, tensors)
    found = _stacked(tensors, family)
    by_canonical = {canonical_name(name): name for name in found}
    faults: dict[str, list[str]] = {
        key: []
        for key in ("missing", "misshapen", "extra", "harmless", "mtp_missing", "mtp_misshapen", "mtp_extra")
    }
    wanted = expected_tensors(config, prefix=prefix)
    for name, shape in wanted.items():
        part = "mtp_" if family.is_mtp(name) else ""
        actual = by_canonical.get(canonical_name(name))
        if actual is None:
            faults[f"{part}missing"].append(name)
        elif found[actual] != shape:
            faults[f"{part}misshapen"].append(f"{name} {list(found[actual])} instead of {list(shape)}")
    foreseen = {canonical_name(name) for name in wanted}
    tied_head = {head_name(family, prefix)} if family.settings(config).get("tie_word_embeddings") else set()
    for key, name in by_canonical.items():
        if key not in foreseen:
            harmless = name in tied_head or _STALE_BUFFERS.search(name)
            kind = "harmless" if harmless else "mtp_extra" if family.is_mtp(name) else "extra"
            faults[kind].append(name)
    ignored = set(faults["harmless"]) | set(faults["extra"])
    not_float = [name for name, t in tensors.items() if t.dtype not in _FLOATS and name not in ignored]
    return Faults(**faults, not_float=not_float, mtp_declared=family.num_mtp_layers(config), prefix=prefix)


def require_whole(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Faults:
    """The faults of a checkpoint that may be cut: extra tensors, and a declared MTP head that is not there.

    Raises:
        UserError: anything else does not fit, naming the first such tensor.
    """
    faults = find_faults(config, tensors)
    family = find_family(config)
    absent_mtp = not any(family.is_mtp(name) for name in tensors)
    missing = faults.missing + ([] if absent_mtp else faults.mtp_missing)
    misshapen = faults.misshapen + faults.mtp_misshapen
    if faults.not_float:
        name = faults.not_float[0]
        raise UserError(
            f"{name} is stored as {tensors[name].dtype} (quantised); prune the unquantised model."
        )
    if missing:
        raise UserError(f"The checkpoint lacks {_first(missing)}; fetch it again.")
    if misshapen:
        raise UserError(f"A tensor contradicts config.json: {_first(misshapen)}; fetch both again.")
    if faults.mtp_extra:
        raise UserError(
            f"The checkpoint holds {_first(faults.mtp_extra)}, which {family.mtp_key} of config.json does "
            "not declare; make them agree."
        )
    return faults


def canonical_name(name: str) -> str:
    """One name for what releases of different age call differently."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    name = name.replace("model.language_model.", "language_model.model.")
    return re.sub(r"^(?:model\.)?(vision_tower|multi_modal_projector)\.", r"\1.", name)


def _stacked(tensors: Mapping[str, TensorInfo], family: Family) -> dict[str, Shape]:
    """Shapes by name, with experts that are stored one by one put together as the specs describe them."""
    shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in tensors.items()}
    for spec in family.mlps:
        if spec.kind != "expert":
            continue
        gate, up, down = spec.names
        pattern = re.compile(rf"(.*\.{re.escape(spec.path)})\.([0-9]+)\.({gate}|{up}|{down})\.weight$")
        stacks: dict[tuple[str, str], dict[int, Shape]] = {}
        for name, shape in list(shapes.items()):
            if (match := pattern.match(name)) and len(shape) == 2:
                stacks.setdefault((match[1], match[3]), {})[int(match[2])] = shape
        for base in {base for base, _ in stacks}:
            parts = [stacks.get((base, part), {}) for part in spec.names]
            numbers = set(range(len(parts[0])))
            alike = all(len(set(part.values())) == 1 and set(part) == numbers for part in parts)
            if not alike or parts[0][0] != parts[1][0]:
                continue  # left apart, so that they show up as extra and the stack as missing
            for number in numbers:
                for part in spec.names:
                    del shapes[f"{base}.{number}.{part}.weight"]
            (width, hidden), (rows, columns) = parts[0][0], parts[2][0]
            shapes[f"{base}.gate_up_proj"] = (len(numbers), 2 * width, hidden)
            shapes[f"{base}.down_proj"] = (len(numbers), rows, columns)
    return shapes


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
