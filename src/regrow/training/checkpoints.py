"""Training checkpoints that are whole or absent, and the way back to the newest whole one."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.files import disk_errors, read_json, write_json
from regrow.progress import say

RECORD = "regrow.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_STAGING = ".partial-checkpoint"
_KEEP = 2


def claim_work_dir(work_dir: Path, identity: dict[str, Any]) -> None:
    """Mark a work folder as belonging to one run, or check that it does.

    Raises:
        UserError: it holds the checkpoints of another run; names the first setting that differs.
    """
    path = work_dir / "run.json"
    with disk_errors(work_dir):
        work_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work_dir / _STAGING, ignore_errors=True)
    if not path.exists():
        write_json(path, identity)
        return
    found = read_json(path)
    for key in {**identity, **found}:
        if found.get(key) != identity.get(key):
            raise UserError(
                f"{work_dir} holds a training run with {key} {found.get(key)!r}, not {identity.get(key)!r}; "
                "use the same settings to continue it, or remove the folder to start again."
            )


def newest_checkpoint(work_dir: Path) -> Path | None:
    """The last checkpoint whose files are all there with the sizes that were recorded."""
    for step, folder in sorted(_checkpoints(work_dir), reverse=True):
        if _is_whole(folder):
            return folder
        say(f"The checkpoint of step {step} is damaged; going back to the one before.")
    return None


def staging_folder(work_dir: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return work_dir / _STAGING


def publish_checkpoint(work_dir: Path, step: int, record: dict[str, Any]) -> Path:
    """Give the staged checkpoint of a step its name, with the run's record inside, and drop old ones.

    A process that is killed at any point leaves the previous checkpoints and at most a staging folder.
    """
    staged = work_dir / _STAGING / f"checkpoint-{step}"
    final = work_dir / staged.name
    with disk_errors(work_dir):
        sizes = {
            str(path.relative_to(staged)): path.stat().st_size
            for path in sorted(staged.rglob("*"))
            if path.is_file()
        }
        write_json(staged / RECORD, {"files": sizes, "record": record})
        _sync(staged)
        if final.exists():  # a damaged one, or the same step of a run that went back
            shutil.rmtree(final)
        os.rename(staged, final)
        shutil.rmtree(work_dir / _STAGING, ignore_errors=True)
    for _, old in sorted(_checkpoints(work_dir))[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The run's record inside a checkpoint."""
    return read_json(checkpoint / RECORD)["record"]


def kept_records(work_dir: Path) -> list[dict[str, Any]]:
    """The records of all whole checkpoints."""
    return [read_record(folder) for _, folder in _checkpoints(work_dir) if _is_whole(folder)]


def _checkpoints(work_dir: Path) -> list[tuple[int, Path]]:
    if not work_dir.is_dir():
        return []
    found = ((_NAME.match(path.name), path) for path in work_dir.iterdir())
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def _is_whole(folder: Path) -> bool:
    try:
        sizes = read_json(folder / RECORD)["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return False


def _sync(folder: Path) -> None:
    """Ask the disk to hold the files before their folder gets its name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
