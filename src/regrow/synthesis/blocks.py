"""Rows are written block by block to an append-only file, so that an interrupted job continues."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.files import disk_errors, read_json, write_json
from regrow.progress import Progress, say
from regrow.synthesis.prompts import Prompt

Row = dict[str, Any]


_MANIFEST = "manifest.json"


def check_work(work: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder of work in progress that belongs to something else; there may be none yet.

    Raises:
        UserError: it was begun with other settings (the first that differs is named), or is something else.
    """
    if (work / _MANIFEST).is_file():
        require_same(read_json(work / _MANIFEST), settings, work)
    elif work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise UserError(f"{work} is in the way and is no work of this command; move it.")


def begin_work(work: Path, settings: dict[str, Any]) -> None:
    """Make the folder of work in progress where there is none."""
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        if not (work / _MANIFEST).is_file():
            write_json(work / _MANIFEST, settings)


def require_same(found: Any, settings: dict[str, Any], where: Path) -> None:
    """Refuse to go on with other settings than the work was begun with, naming the field."""
    if not isinstance(found, dict):
        raise UserError(f"{where} has a damaged manifest; remove the folder and start again.")
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"{where} was made with {name} = {found.get(name)!r:.60}, not {value!r:.60}; "
                "give the same settings, or name another output folder."
            )


def run_blocks(
    prompts: Sequence[Prompt],
    work: Path,
    *,
    block_size: int,
    rows_of: Callable[[int, Sequence[Prompt]], list[Row]],
) -> list[Row]:
    """The rows of all prompts, in order; blocks that the file holds already are not run again.

    Args:
        prompts: what is asked; block b is `prompts[b * block_size : (b + 1) * block_size]`.
        work: folder that holds `blocks.jsonl`, one line per finished block.
        block_size: prompts per block.
        rows_of: (block, its prompts) -> one row per prompt; must depend on nothing else.
    """
    path = work / "blocks.jsonl"
    blocks = _finished_blocks(path)
    rows = [row for block in blocks for row in block]
    if rows:
        say(f"Going on with {work}: {len(rows)} of {len(prompts)} prompts are answered.")
    with Progress("synthesize", len(prompts), "prompts") as bar:
        bar.advance(len(rows))
        for block in range(len(blocks), -(-len(prompts) // block_size)):
            part = prompts[block * block_size : (block + 1) * block_size]
            fresh = rows_of(block, part)
            with disk_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(fresh, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            rows += fresh
            bar.advance(len(fresh))
    return rows


def _finished_blocks(path: Path) -> list[list[Row]]:
    """Whole lines of the file; a torn last line, left by a killed process, is cut off."""
    if not path.exists():
        return []
    blocks, end = [], 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    break
                blocks.append(json.loads(line))
            except ValueError:
                break
            end += len(line)
    os.truncate(path, end)
    return blocks
