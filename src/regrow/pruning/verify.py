"""Is a checkpoint whole, is it what its config says, and is it cut from its parent and nothing else?

Works on checkpoints that other tools made. Everything is read in pieces; memory does not grow with the model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regrow.checkpoint.header import read_json_object
from regrow.checkpoint.reader import INDEX_NAME, CheckpointReader, read_config_only
from regrow.errors import UserError
from regrow.families import (
    Family,
    Faults,
    canonical_name,
    find_family,
    find_faults,
    mlp_sites,
    site_tensors,
    width_key,
)
from regrow.progress import Progress
from regrow.pruning.alignment import alignment_notes, format_costs
from regrow.pruning.compare import Comparison, compare_site, compare_tensor, non_finite, shared_settings
from regrow.pruning.engines import engine_support
from regrow.types import MlpSite

# Keys whose value may differ between two releases of one model without changing what it computes.
_HARMLESS_KEYS = {"transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path"}


def verify_checkpoint(
    folder: str | Path, against: str | Path | None = None, *, trained: bool = False
) -> dict[str, Any]:
    """Check a checkpoint, and with `against` its relation to its parent.

    Args:
        folder: the model folder.
        against: the parent's folder.
        trained: allow other values (a distilled model): shapes, dtypes and names are checked all the same,
            and what differs is listed as trained.

    Returns:
        `ok`, `problems` (sentences), `notes` (sentences), `engines` (name -> `{"ok", "why"}`), `alignment`
        (format -> sentence), `family`, `widths` (kind -> width), `num_tensors`, `weight_bytes` and, with a
        parent, `compared`: counts of `untouched` tensors and of `cut`, `refitted` and `trained` MLPs and
        tensors.

    Raises:
        UserError: there is no model at `folder` or `against`, or the parent itself is damaged.
    """
    folder = Path(folder)
    config = read_config_only(folder)
    parent = CheckpointReader(against) if against is not None else None
    try:
        reader = CheckpointReader(folder)
        family = find_family(config)
        faults = find_faults(config, reader.tensors)
        problems = _layout_problems(family, faults) + _index_problems(reader)
        sites = _find_sites(reader, problems, faults.mtp_ok)
    except UserError as error:
        return _refused(str(error))
    structural = list(problems)
    notes = [f"{name} is there although nothing needs it; loaders ignore it." for name in faults.harmless[:1]]
    comparison = Comparison()
    if parent is not None and sites:
        _compare(reader, sites, parent, trained, faults.mtp_ok, comparison, notes)
        problems += comparison.problems
    with Progress("verify: values", len(reader.tensors), "tensors") as progress:
        broken = []
        for name in reader.tensors:
            if non_finite(reader, name):
                broken.append(name)
            progress.advance(1)
    problems += _list("holds NaN or infinite values", broken)
    main = next((site for site in sites if site.kind == "dense"), sites[0] if sites else None)
    result: dict[str, Any] = {
        "ok": not problems,
        "problems": problems,
        "engines": engine_support(family, config, structural, faults),
        "alignment": format_costs(main.width) if main else {},
        "notes": notes + (alignment_notes(main.width) if main else []),
        "family": family.name,
        "widths": {site.kind: site.width for site in sites},
        "num_tensors": len(reader.tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in reader.tensors.values()),
    }
    if parent is not None:
        result["compared"] = {
            "untouched": len(comparison.untouched),
            "cut": len(comparison.cut),
            "refitted": len(comparison.refitted),
            "trained": len(comparison.trained),
        }
    return result


def _find_sites(reader: CheckpointReader, problems: list[str], mtp_ok: bool) -> list[MlpSite]:
    """The MLPs; those of the trunk alone where the multi-token-prediction head is at fault already.

    Where the layout has no fault that was named, what `mlp_sites` refuses is one.
    """
    family = find_family(reader.config)
    tensors = reader.tensors
    config = reader.config
    if not mtp_ok:
        tensors = {name: info for name, info in tensors.items() if not family.is_mtp(name)}
    try:
        return mlp_sites(config, tensors)
    except UserError as error:
        if not problems:
            problems.append(str(error))
        return []


def _layout_problems(family: Family, faults: Faults) -> list[str]:
    """Names, shapes and dtypes against the config, as sentences."""
    problems = _list("is missing", faults.missing) + _list("is not foreseen by config.json", faults.extra)
    misshapen = faults.misshapen + faults.mtp_misshapen
    problems += _list("", misshapen, "has a shape that config.json does not foresee: ")
    problems += _list("is stored as integers or float8: the checkpoint is quantised", faults.not_float)
    if faults.mtp_missing:
        problems.append(
            f"config.json declares {faults.mtp_declared} multi-token-prediction layer(s) ({family.mtp_key}), "
            f"but {len(faults.mtp_missing)} of their tensors are missing."
        )
    if faults.mtp_extra:
        problems.append(
            f"The checkpoint holds {len(faults.mtp_extra)} multi-token-prediction tensors that config.json "
            f"does not declare ({family.mtp_key})."
        )
    return problems


def _compare(
    reader: CheckpointReader,
    sites: list[MlpSite],
    parent: CheckpointReader,
    trained: bool,
    mtp_ok: bool,
    into: Comparison,
    notes: list[str],
) -> None:
    parent_family = find_family(parent.config)
    parent_sites = {site.name: site for site in mlp_sites(parent.config, parent.tensors)}
    in_sites = {ref.name for site in sites for ref in site_tensors(site)}
    in_parent_sites = {ref.name for site in parent_sites.values() for ref in site_tensors(site)}
    theirs = {canonical_name(name): name for name in parent.tensors if name not in in_parent_sites}
    mine = {canonical_name(name): name for name in reader.tensors if name not in in_sites}
    if not mtp_ok:  # that head was found at fault already; say nothing twice
        parent_sites = {
            n: site for n, site in parent_sites.items() if not parent_family.is_mtp(site.down.name)
        }
        theirs, mine = (
            {key: name for key, name in names.items() if not parent_family.is_mtp(name)}
            for names in (theirs, mine)
        )
    if parent_family.name != find_family(reader.config).name:
        into.problems.append(f"The parent is a {parent_family.name}, which this checkpoint is not.")
    lost = [name for key, name in theirs.items() if key not in mine]
    lost += [site.down.name for name, site in parent_sites.items() if name not in {s.name for s in sites}]
    dropped = [name for name in lost if parent_family.is_mtp(name)]
    if dropped and not parent_family.num_mtp_layers(reader.config):
        notes.append("The parent's multi-token-prediction head was dropped, and config.json says so.")
        lost = [name for name in lost if name not in dropped]
    into.problems += _list("of the parent was lost", lost)
    into.problems += _list("is not in the parent", [name for key, name in mine.items() if key not in theirs])
    total = len(mine) + len(sites)
    with Progress("verify: against the parent", total, "tensors and MLPs") as progress:
        for key in (key for key in mine if key in theirs):
            compare_tensor(reader, mine[key], parent, theirs[key], trained, into)
            progress.advance(1)
        for site in sites:
            if site.name in parent_sites:
                compare_site(reader, site, parent, parent_sites[site.name], trained, into)
            progress.advance(1)
    if into.refitted:
        notes.append(
            f"{len(into.refitted)} of {len(sites)} MLPs were refitted: gate and up are their parent's rows, "
            "down_proj has new values."
        )
    if into.trained:
        notes.append(f"{len(into.trained)} tensors and MLPs have trained values; their shapes were checked.")
    widths = {width_key(reader.config, site.kind) for site in sites}
    for key in sorted(shared_settings(reader.config, parent.config)):
        last = key.rsplit(".", 1)[-1]
        if last in widths or last in _HARMLESS_KEYS or last == parent_family.mtp_key:
            continue
        into.problems.append(f"config.json has another {key} than the parent's.")
    gone = [name for name in parent.other_files if name not in reader.other_files]
    into.problems += _list("lies beside the parent's weights and was lost", gone)
    changed = [
        n for n in parent.other_files if n not in gone and not _same_file(reader.folder, parent.folder, n)
    ]
    if changed:
        notes.append(f"Files with another content than the parent's: {', '.join(changed)}.")


def _index_problems(reader: CheckpointReader) -> list[str]:
    path = reader.folder / INDEX_NAME
    if not path.exists():
        return []
    metadata = read_json_object(path).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    actual = sum(tensor.nbytes for tensor in reader.tensors.values())
    if total is None:
        return [f"{INDEX_NAME} does not give total_size."]
    return (
        [] if total == actual else [f"{INDEX_NAME} gives total_size {total} and the tensors have {actual}."]
    )


def _same_file(a: Path, b: Path, name: str) -> bool:
    return (a / name).read_bytes() == (b / name).read_bytes()


def _list(what: str, names: Iterable[str], before: str = "") -> list[str]:
    """One sentence for many names."""
    names = list(names)
    if not names:
        return []
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return [f"A tensor {before}{names[0]}{more}." if before else f"{names[0]}{more} {what}."]


def _refused(reason: str) -> dict[str, Any]:
    broken = {"ok": False, "why": "the checkpoint cannot be read"}
    names = ("transformers", "vllm", "vllm_speculative", "sglang", "llama_cpp")
    return {
        "ok": False,
        "problems": [reason],
        "engines": {name: dict(broken) for name in names},
        "alignment": {},
        "notes": [],
    }


def format_verification(result: Mapping[str, Any]) -> str:
    """A verdict for people."""
    lines = ["ok: every check holds" if result["ok"] else f"NOT ok: {len(result['problems'])} problem(s)"]
    lines += [f"  problem: {text}" for text in result["problems"]]
    if "compared" in result:
        counts = ", ".join(f"{count} {what}" for what, count in result["compared"].items())
        lines.append(f"  against the parent: {counts}")
    for name, verdict in result["engines"].items():
        lines.append(f"  {name}: {'yes' if verdict['ok'] else 'no'}, {verdict['why']}")
    lines += [f"  {name}: {text}" for name, text in result["alignment"].items()]
    lines += [f"  note: {note}" for note in result["notes"]]
    return "\n".join(lines)
