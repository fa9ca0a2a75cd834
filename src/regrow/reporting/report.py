"""Write the model card and the page of a run."""

from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.files import disk_errors, read_json
from regrow.reporting.card import render_card
from regrow.reporting.facts import read_facts
from regrow.reporting.page import render_page


def write_report(*, run_dir: Path) -> dict[str, Any]:
    """Write `model/README.md` (the model card) and `report.html` from a run's `results.json`.

    The same results give the same bytes. Whatever was not recorded is left out.

    Args:
        run_dir: folder of a run, with `results.json` and, where a model was made, `model/`.

    Returns:
        `{"card", "page"}`: paths relative to `run_dir`, and `notes`.

    Raises:
        UserError: the folder holds no results.json, or it is not readable.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "results.json").is_file():
        raise UserError(f"{run_dir} holds no results.json, so it is no finished run; run its recipe first.")
    results = read_json(run_dir / "results.json")
    model = run_dir / "model"
    facts = read_facts(results, model if model.is_dir() else None)
    written: dict[str, Any] = {"notes": []}
    if model.is_dir():
        _replace(model / "README.md", str(render_card(facts)))
        written["card"] = "model/README.md"
    else:
        written["notes"].append("No model card was written, because the run holds no model folder.")
    if not facts.parent_card.get("license"):
        written["notes"].append(
            "The parent does not state its licence; add it to the card before publishing."
        )
    _replace(run_dir / "report.html", render_page(facts))
    return written | {"page": "report.html"}


def _replace(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one.

    A new file also leaves other names of an old one alone (the model folder may share it with a stage).
    """
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
