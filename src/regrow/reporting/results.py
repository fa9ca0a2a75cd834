"""results.json: every figure that a run measured, by stage and by model."""

from pathlib import Path
from typing import Any

from regrow.files import read_json
from regrow.reporting.environment import describe_environment
from regrow.reporting.parent import read_parent


def gather_results(*, recipe: dict[str, Any], parent: Path, stages: dict[str, Path]) -> dict[str, Any]:
    """Collect the reports of finished stages.

    Args:
        recipe: the resolved recipe as JSON values.
        parent: the parent's folder.
        stages: folders of the finished stages by name, in the order in which they ran; each holds
            `report.json` and `manifest.json`.

    Returns:
        `{"recipe", "parent", "parent_card", "environment", "stages", "models", "final", "notes"}`; nothing in
        it was computed here.
    """
    results: dict[str, Any] = {
        "recipe": recipe,
        "parent": str(recipe["model"]),
        "parent_card": read_parent(parent),
        "environment": describe_environment(),
        "stages": {},
        "models": {},
        "final": None,
        "notes": [],
    }
    for name, folder in stages.items():
        report, manifest = read_json(folder / "report.json"), read_json(folder / "manifest.json")
        evaluated = report.pop("models", None) if name == "evaluate" else None
        if evaluated is not None:
            results["models"], results["final"] = evaluated, report["final"]
        results["stages"][name] = {
            "report": report,
            "seconds": manifest["seconds"],
            "manifest": manifest["hash"],
        }
        results["notes"] += [f"{name}: {note}" for note in report.get("notes", [])]
    return results
