"""Finished results on disk: `<model>-<benchmark>.jsonl` (one item a line) and, written last, `.json`.

The `.json` says what the result was measured with; one that is there is finished, and is not measured again
while its settings' hash is the one asked for.
"""

import json
import os
from pathlib import Path
from typing import Any

from regrow.data.prompts import read_jsonl
from regrow.errors import UserError
from regrow.files import disk_errors, read_json, sha256_json, write_json
from regrow.types import EvalResult

SCHEMA = 1
_RECORD_FOLDERS = (".", "records", "evaluate/records", "stages/evaluate/records")

# Names of files and data sets as the user gave them; their content is hashed beside them.
_DISPLAY_ONLY = frozenset({"prompts", "sources"})


def settings_hash(settings: dict[str, Any]) -> str:
    """Hash of what a result depends on; names of sources do not count, hashes of their content do."""
    return sha256_json({key: value for key, value in settings.items() if key not in _DISPLAY_ONLY})


def write_result(folder: Path, name: str, result: EvalResult) -> None:
    """Keep a finished result as `<folder>/<name>.jsonl` and `<folder>/<name>.json`."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.jsonl.partial-{os.getpid()}"
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(lines)
        partial.replace(folder / f"{name}.jsonl")
    summary = {
        "schema": SCHEMA,
        "benchmark": result.benchmark,
        "settings_sha256": settings_hash(result.settings),
        "settings": result.settings,
        "num_records": len(result.records),
        "figures": result.figures,
    }
    write_json(folder / f"{name}.json", summary)


def find_result(folder: Path, name: str, settings: dict[str, Any]) -> EvalResult | None:
    """The finished result of that name if it was measured with these settings, else None."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    try:
        result = read_result(path)
    except UserError:
        return None  # damaged or of another version: measured again, and overwritten
    return result if settings_hash(result.settings) == settings_hash(settings) else None


def find_anywhere(folder: Path, benchmark: str, settings: dict[str, Any]) -> EvalResult | None:
    """A finished result of any name in a folder that was measured with these settings, else None."""
    for path in sorted(folder.glob(f"*-{benchmark}.json")):
        if (result := find_result(folder, path.stem, settings)) is not None:
            return result
    return None


def read_result(path: str | Path) -> EvalResult:
    """Read a finished result by its `.json` or `.jsonl` file.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    path = Path(path)
    summary = read_json(path.with_suffix(".json"))
    wanted = ("schema", "benchmark", "settings", "figures", "num_records")
    if not isinstance(summary, dict) or any(key not in summary for key in wanted):
        raise UserError(f"{path.with_suffix('.json')} holds no result of regrow evaluate; check the path.")
    if summary["schema"] != SCHEMA:
        raise UserError(
            f"{path.with_suffix('.json')} was written by another version of regrow; evaluate again."
        )
    records = [record for _, record in read_jsonl(path.with_suffix(".jsonl"))]
    if len(records) != summary["num_records"]:
        raise UserError(
            f"{path.with_suffix('.jsonl')} has {len(records)} of {summary['num_records']} records; "
            "evaluate again."
        )
    return EvalResult(summary["benchmark"], summary["figures"], records, summary["settings"])


def find_records(run: str | Path) -> Path:
    """The IFEval record file that a path stands for; a record file, a folder of them, or a run folder.

    Raises:
        UserError: there is none, or the folder holds several models and does not say which is final.
    """
    run = Path(run)
    if not run.is_dir():
        if run.exists():
            return run
        raise UserError(f"{run} does not exist; name a run folder or a record file <model>-ifeval.jsonl.")
    for folder in _RECORD_FOLDERS:
        found = {
            path.name.removesuffix("-ifeval.json"): path
            for path in sorted((run / folder).glob("*-ifeval.json"))
        }
        if not found:
            continue
        final = None
        if (run / "results.json").is_file():
            results = read_json(run / "results.json")
            final = results.get("final") if isinstance(results, dict) else None
        students = [name for name in found if name != "teacher"] or list(found)
        name = final if final in found else students[0] if len(students) == 1 else None
        if name is None:
            raise UserError(
                f"{run} holds results of {', '.join(students)}; name one file, e.g. {found[students[0]]}."
            )
        return found[name]
    raise UserError(f"{run} holds no IFEval records; run regrow evaluate --benchmark ifeval --records there.")
