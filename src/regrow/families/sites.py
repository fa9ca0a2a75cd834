"""The gated MLPs of a checkpoint, found by name and checked against the config."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regrow.errors import UserError
from regrow.families.family import Family, MlpSpec, Shapes
from regrow.families.layout import text_prefix
from regrow.families.registry import find_family
from regrow.types import MlpSite, SiteKind, TensorInfo, TensorRef

_WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")


def mlp_sites(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[MlpSite]:
    """Every MLP whose channels can be removed, in order of layers; multi-token prediction last.

    Raises:
        UserError: unsupported family; a layer without an MLP; shapes that contradict the config; quantised
            weights.
    """
    family = find_family(config)
    c = family.settings(config)
    prefix = text_prefix(family, tensors)
    sites: list[MlpSite] = []
    for layer in range(c["num_hidden_layers"]):
        where = _Where(f"{prefix}layers.{layer}.", f"layers.{layer}", layer, family.layer(c, layer))
        sites += _layer_sites(family, tensors, where)
    num_mtp = family.num_mtp_layers(config)
    _check_mtp_names(family, tensors, num_mtp)
    if family.mtp_layer is not None and any(family.is_mtp(name) for name in tensors):
        for layer in range(num_mtp):
            expected = family.mtp_layer(c, layer)
            where = _Where(f"{family.mtp_prefix}layers.{layer}.", f"mtp.layers.{layer}", layer, expected)
            sites += _layer_sites(family, tensors, where, mtp=True)
    for site in sites:
        _check_site(family, c, site, tensors)
    return sites


def main_kinds(config: Mapping[str, Any], sites: Iterable[MlpSite]) -> tuple[SiteKind, ...]:
    """The kinds of site that one `--width` governs.

    Dense MLPs, and the multi-token-prediction layer that shares their width key; where a model has no dense
    MLP, its routed experts.
    """
    present = {site.kind for site in sites}
    if "dense" in present:
        return ("dense", "mtp") if "mtp" in present else ("dense",)
    return ("expert",)


def width_key(config: Mapping[str, Any], kind: SiteKind) -> str:
    """The config's key for the width of a kind of site."""
    family = find_family(config)
    wanted = "dense" if kind == "mtp" else kind
    for spec in family.mlps:
        if spec.kind == wanted:
            return spec.width_key
    raise UserError(f"{family.name} has no MLP of the kind {kind}.")


def site_tensors(site: MlpSite) -> list[TensorRef]:
    """All tensors of a site that lose channels: gate, up, down and the biases of gate and up."""
    refs = (site.gate, site.up, site.down, site.gate_bias, site.up_bias)
    return [ref for ref in refs if ref is not None]


@dataclass(frozen=True)
class _Where:
    """One layer: how its tensors' names begin, its short name, its index, and the shapes it should have."""

    base: str
    short: str
    layer: int
    expected: Shapes


def _layer_sites(
    family: Family, tensors: Mapping[str, TensorInfo], where: _Where, mtp: bool = False
) -> Iterator[MlpSite]:
    for spec in family.mlps:
        path = f"{where.base}{spec.path}"
        module = f"{_causal_prefix(family)}layers.{where.layer}.{spec.module or spec.path}"
        if spec.kind == "expert":
            stack = where.expected.get(f"{spec.path}.down_proj")
            if stack is not None:
                found = list(_expert_refs(spec, tensors, path))
                if len(found) != stack[0]:
                    raise UserError(
                        f"{path} holds {len(found)} experts and config.json says {stack[0]}; "
                        "the checkpoint is incomplete."
                    )
                for number, refs in enumerate(found):
                    name = f"{where.short}.experts.{number}"
                    yield _site("expert", tensors, name, where.layer, refs, None if mtp else module)
        elif f"{spec.path}.down_proj.weight" in where.expected:
            refs_found = _separate(tensors, path, spec.names) or _fused(tensors, path)
            if refs_found is None:
                raise UserError(
                    f"{path} lacks its gate, up or down projection; the checkpoint is incomplete."
                )
            kind: SiteKind = "mtp" if mtp and spec.kind == "dense" else spec.kind
            name = where.short if spec.kind == "dense" else f"{where.short}.{spec.kind}"
            yield _site(kind, tensors, name, where.layer, refs_found, None if mtp else module)


def _expert_refs(spec: MlpSpec, tensors: Mapping[str, TensorInfo], path: str) -> Iterator["Refs"]:
    gate_up, down = tensors.get(f"{path}.gate_up_proj"), tensors.get(f"{path}.down_proj")
    if gate_up is not None and down is not None:
        if len(gate_up.shape) != 3 or len(down.shape) != 3 or gate_up.shape[0] != down.shape[0]:
            raise UserError(f"{gate_up.name} and {down.name} are no stacks of experts; fetch them again.")
        half = gate_up.shape[1] // 2
        for expert in range(gate_up.shape[0]):
            yield (
                TensorRef(gate_up.name, 1, 0, expert),
                TensorRef(gate_up.name, 1, half, expert),
                TensorRef(down.name, 2, 0, expert),
            )
        return
    expert = 0
    while refs := _separate(tensors, f"{path}.{expert}", spec.names):
        yield refs
        expert += 1


Refs = tuple[TensorRef, TensorRef, TensorRef]


def _separate(tensors: Mapping[str, TensorInfo], path: str, names: tuple[str, str, str]) -> Refs | None:
    gate, up, down = (f"{path}.{name}.weight" for name in names)
    if gate in tensors and up in tensors and down in tensors:
        return TensorRef(gate, 0), TensorRef(up, 0), TensorRef(down, 1)
    return None


def _fused(tensors: Mapping[str, TensorInfo], path: str) -> Refs | None:
    gate_up, down = tensors.get(f"{path}.gate_up_proj.weight"), f"{path}.down_proj.weight"
    if gate_up is None or down not in tensors or not gate_up.shape:
        return None
    half = gate_up.shape[0] // 2
    return TensorRef(gate_up.name, 0), TensorRef(gate_up.name, 0, half), TensorRef(down, 1)


def _site(
    kind: SiteKind,
    tensors: Mapping[str, TensorInfo],
    name: str,
    layer: int,
    refs: Refs,
    module: str | None,
) -> MlpSite:
    gate, up, down = refs
    shape = tensors[down.name].shape
    if len(shape) < 2:
        raise UserError(f"{down.name} is no matrix; fetch the checkpoint again.")
    biases: list[TensorRef | None] = []
    for ref in (gate, up):
        bias = ref.name.removesuffix(".weight") + ".bias"
        biases.append(TensorRef(bias, 0, ref.start) if bias in tensors else None)
    return MlpSite(
        name=name,
        kind=kind,
        layer=layer,
        width=shape[-1],
        hidden_size=shape[-2],
        gate=gate,
        up=up,
        down=down,
        gate_bias=biases[0],
        up_bias=biases[1],
        module=module,
    )


def _check_site(
    family: Family, c: Mapping[str, Any], site: MlpSite, tensors: Mapping[str, TensorInfo]
) -> None:
    wanted: SiteKind = "dense" if site.kind == "mtp" else site.kind
    key = next(spec.width_key for spec in family.mlps if spec.kind == wanted)
    if site.width != c.get(key) or site.hidden_size != c["hidden_size"]:
        raise UserError(
            f"{site.down.name} is {site.hidden_size} x {site.width}, but config.json says hidden_size "
            f"{c['hidden_size']} and {key} {c.get(key)}; the checkpoint contradicts itself."
        )
    fused = site.gate.name == site.up.name
    rows = site.width * (2 if fused else 1)
    for ref in site_tensors(site):
        tensor = tensors[ref.name]
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise UserError(
                f"{ref.name} is stored as {tensor.dtype} (quantised); prune the unquantised model."
            )
        if ref in (site.gate, site.up) and tensor.shape[-2:] != (rows, site.hidden_size):
            raise UserError(
                f"{ref.name} has the shape {list(tensor.shape)}, which does not fit its down_proj."
            )
        if ref in (site.gate_bias, site.up_bias) and tensor.shape != (rows,):
            raise UserError(f"{ref.name} has the shape {list(tensor.shape)}, which does not fit its weight.")


def _check_mtp_names(family: Family, tensors: Mapping[str, TensorInfo], num_mtp: int) -> None:
    """Multi-token-prediction tensors in a form that nobody described must not be passed on half cut."""
    if family.mtp_key is None:
        return
    layers = {
        int(match.group(1))
        for name in tensors
        if (match := re.match(re.escape(family.mtp_prefix) + r"layers\.(\d{1,6})\.", name))
    }
    if layers and layers != set(range(num_mtp)):
        raise UserError(
            f"The checkpoint holds {len(layers)} multi-token-prediction layers and config.json declares "
            f"{num_mtp} ({family.mtp_key}); make them agree."
        )


def _causal_prefix(family: Family) -> str:
    return dict(family.renames).get(family.text_prefixes[0], "model.")
