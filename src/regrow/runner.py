"""Run the stages of a recipe: skip what is finished, resume what was killed, refuse what does not match.

A stage writes into a temporary folder, its `manifest.json` last, and the folder is renamed when it is
whole. The manifest holds what the result depends on (the stage's part of the recipe, the parent's
fingerprint, the corpora's hashes, the manifests of the stages it read, regrow's version): a stage whose
manifest matches is skipped; one that does not is refused by the name of the field that differs.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from regrow import __version__
from regrow.energy import measured_energy
from regrow.errors import UserError
from regrow.files import alone_in, disk_errors, publish_folder, read_json, sha256_json, write_json
from regrow.launch import run_in_processes
from regrow.needs import check_share, is_unwritten, unwritten
from regrow.packages import require_engine
from regrow.progress import say
from regrow.recipe import Recipe, parse_recipe
from regrow.stages import STAGES, Context, Stage, prepare_corpora, write_corpora

_PLACES = ("parent", "out", "work", "run_dir")
_ABSENT = object()  # a key that one of two manifests lacks; null is a value
# Fields of a manifest that its hash covers; the rest (seconds) may differ between equal runs.
_HASHED = ("stage", "version", "parent", "recipe", "corpora", "inputs")


@dataclass(frozen=True)
class Step:
    """A stage of one run and what is to be done with it."""

    stage: Stage
    folder: Path
    action: str  # "run", "skip" or "redo"
    processes: int = 1


def run_recipe(
    recipe: Recipe,
    run_dir: Path,
    *,
    start: str | None = None,
    until: str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Run a recipe's stages into a folder.

    Args:
        recipe: the validated recipe.
        run_dir: the run's folder; may hold an unfinished or finished run of the same recipe.
        start: redo this stage and all after it, even where a finished result lies there.
        until: stop after this stage.
        processes: how many share the stages that can be shared; the result does not depend on it.

    Returns:
        Stage name -> its report, for the stages that this call ran or skipped.

    Raises:
        UserError: the folder holds something else, or a finished stage was made with other settings.
        RunError: a stage failed; the finished ones stay and the same command goes on from there.
    """
    from regrow.modeling.sources import resolve_model

    check_names(recipe, start, until)
    check_folder(run_dir, recipe)
    parent = resolve_model(recipe.model, recipe.revision)
    check_width(recipe, parent)
    steps = plan_run(recipe, run_dir, start=start, until=until, processes=processes)
    check_processes(steps, recipe, processes)
    # All manifests before any work of a stage: a bad corpus or a mismatch is said now, not after hours.
    also = check_stages(steps, recipe)
    prepare_corpora(recipe, run_dir, parent)
    if unwritten(recipe):
        _read_given(recipe)
        _write_recipe(run_dir, recipe)
        with alone_in(run_dir, _in_use(run_dir)):
            write_corpora(recipe, parent)
        also = check_stages(steps, recipe)  # now with the text
    manifests = _manifests(recipe, parent, [step.stage for step in steps], also)
    for step in steps:
        if step.action == "skip":
            _require_match(step, manifests[step.stage.name], run_dir)
    if not (run_dir / "recipe.yaml").exists():
        _write_recipe(run_dir, recipe)
    with alone_in(run_dir, _in_use(run_dir)):
        finished: dict[str, Path] = {}
        for step in steps:
            name = step.stage.name
            if step.action == "skip":
                say(f"{name}: already finished, skipped")
            else:
                if step.action == "redo":
                    shutil.rmtree(step.folder)
                shared = f" in {step.processes} processes" if step.processes > 1 else " in one process"
                say(f"== {name}{shared if processes > 1 else ''}")
                _run_stage(step, recipe, parent, run_dir, finished, manifests[name])
            finished[name] = step.folder
        _write_recipe(run_dir, recipe)
        return {name: read_json(folder / "report.json") for name, folder in finished.items()}


def check_width(recipe: Recipe, parent: Path) -> dict[str, Any]:
    """What the parent becomes at the recipe's width, from its headers.

    Raises:
        UserError: the parent is unsupported or damaged, or the width is not below its own.
    """
    from regrow.pruning.inspect import inspect_checkpoint

    return inspect_checkpoint(parent, width=recipe.prune.width)


def check_stages(steps: list[Step], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Refuse now what a stage that will run would refuse when it is reached; returns each stage's `also`.

    Raises:
        UserError: a package, prompts or constraints are missing.
    """
    for section in unwritten(recipe):
        require_engine(section.engine)
    for step in steps:
        if step.action != "skip":
            step.stage.check(recipe)
    return {step.stage.name: step.stage.also(recipe) for step in steps}


def _read_given(recipe: Recipe) -> None:
    """Read the text that is there, before the parent writes the rest for hours."""
    from regrow.data.corpora import open_corpus

    for corpus in (*recipe.corpora, recipe.held_out):
        if not is_unwritten(corpus, recipe):
            open_corpus(corpus.source, split=corpus.split, limit=corpus.limit)


def check_processes(steps: list[Step], recipe: Recipe, processes: int) -> None:
    """Refuse a number of processes that this run or this machine cannot use.

    Raises:
        UserError: it is below 1, above the GPUs, of no use, or a step does not divide among them.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: there is nobody to do the work; use 1 or more.")
    if processes == 1:
        return
    if not any(step.processes > 1 for step in steps):
        raise UserError(
            f"--processes {processes}: this run has no stage that processes can share (calibrate, unless "
            "sequential, and distill, recover and finish, unless vllm writes); leave it out."
        )
    shared = [step.stage for step in steps if step.processes > 1 and step.action != "skip"]
    for stage in shared:
        check_share(stage.name, recipe, processes)
    if shared and recipe.device != "cpu":
        import torch

        if 0 < (gpus := torch.cuda.device_count()) < processes:
            raise UserError(
                f"--processes {processes}: each needs a GPU of its own, and PyTorch sees {gpus}; use {gpus}."
            )


def plan_run(
    recipe: Recipe,
    run_dir: Path,
    *,
    start: str | None = None,
    until: str | None = None,
    processes: int = 1,
) -> list[Step]:
    """What `run_recipe` would do, stage by stage; changes nothing."""
    steps = []
    redo = False
    for stage in enabled_stages(recipe):
        folder = run_dir / "stages" / stage.name
        redo = redo or stage.name == start
        done = (folder / "manifest.json").exists()
        action = ("redo" if redo else "skip") if done else "run"
        steps.append(Step(stage, folder, action, processes if stage.parallel(recipe) else 1))
        if stage.name == until:
            break
    return steps


def enabled_stages(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe asks for, in order."""
    return [stage for stage in STAGES if stage.enabled(recipe)]


def _manifests(
    recipe: Recipe, parent: Path, stages: list[Stage], also: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What each stage's result depends on; reads every corpus and the parent's headers once."""
    from regrow.checkpoint.reader import CheckpointReader
    from regrow.data.corpora import corpus_hash

    fields = recipe.model_dump(mode="json")
    specs = {"corpora": [corpus.spec for corpus in recipe.corpora], "held_out": [recipe.held_out.spec]}
    hashes: dict[str, list[str]] = {}
    fingerprint = CheckpointReader(parent).fingerprint()
    manifests: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for key in specs.keys() & set(stage.reads) - hashes.keys():
            hashes[key] = [
                corpus_hash(source, split=split, limit=limit) for source, split, _, limit in specs[key]
            ]
        value: dict[str, Any] = {
            "stage": stage.name,
            "version": __version__,
            "parent": fingerprint,
            "recipe": {key: fields[key] for key in stage.reads} | also[stage.name],
            "corpora": {key: hashes[key] for key in stage.reads if key in specs},
            "inputs": {name: manifests[name]["hash"] for name in stage.inputs if name in manifests},
        }
        manifests[stage.name] = value | {"hash": sha256_json(value)}
    return manifests


def _run_stage(
    step: Step,
    recipe: Recipe,
    parent: Path,
    run_dir: Path,
    finished: dict[str, Path],
    manifest: dict[str, Any],
) -> None:
    name = step.stage.name
    start = time.monotonic()
    # Named by the manifest, so that changed settings never resume from another run's checkpoints.
    work = run_dir / "work" / f"{name}-{manifest['hash'][:12]}"
    with disk_errors(run_dir):
        work.mkdir(parents=True, exist_ok=True)
    with publish_folder(step.folder) as out:
        with measured_energy(recipe.report.country) as energy:
            context = Context(recipe, parent, out, work, run_dir, dict(finished), step.processes)
            report = step.stage.run(context) if step.processes == 1 else _share(step.stage, context)
        if energy:
            report["emissions"] = energy
        write_json(out / "report.json", report)
        write_json(out / "manifest.json", manifest | {"seconds": round(time.monotonic() - start, 2)})
    shutil.rmtree(work, ignore_errors=True)


def _share(stage: Stage, context: Context) -> dict[str, Any]:
    """Run a stage in several processes; its report is the first one's."""
    places = {name: str(getattr(context, name)) for name in _PLACES}
    arguments = {
        "stage": stage.name,
        "recipe": context.recipe.model_dump(mode="json"),
        "places": places,
        "finished": {name: str(folder) for name, folder in context.finished.items()},
        "processes": context.processes,
    }
    return run_in_processes(
        f"{__name__}:run_share",
        arguments,
        processes=context.processes,
        folder=context.work / "processes",
        what=stage.name,
    )


def run_share(
    *, stage: str, recipe: dict[str, Any], places: dict[str, str], finished: dict[str, str], processes: int
) -> dict[str, Any]:
    """What each of several processes does of a stage: all that is in its `Context`, as JSON."""
    context = Context(
        recipe=parse_recipe(recipe, stage),
        finished={name: Path(folder) for name, folder in finished.items()},
        processes=processes,
        **{name: Path(folder) for name, folder in places.items()},
    )
    return next(row for row in STAGES if row.name == stage).run(context)


def _require_match(step: Step, wanted: dict[str, Any], run_dir: Path) -> None:
    name = step.stage.name
    found = read_json(step.folder / "manifest.json")
    if found.get("hash") == wanted["hash"]:
        return
    for field in _HASHED:
        difference = _first_difference(found.get(field), wanted[field], field)
        if difference:
            raise UserError(
                f"The finished stage {name} in {run_dir} was made with another {difference}; "
                f"redo it with --from {name}, or name another folder with --out."
            )
    raise UserError(f"The manifest of stage {name} in {run_dir} is damaged; redo it with --from {name}.")


def _first_difference(found: Any, wanted: Any, field: str) -> str | None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            there, now = found.get(key, _ABSENT), wanted.get(key, _ABSENT)
            difference = _first_difference(there, now, f"{field}.{key}")
            if difference:
                return difference
        return None
    if found != wanted:
        return f"{field} ({_brief(found)} there, {_brief(wanted)} now)"
    return None


def _brief(value: Any) -> str:
    text = "nothing" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_names(recipe: Recipe, start: str | None, until: str | None) -> None:
    """Refuse stage names that the recipe does not have (UserError)."""
    names = [stage.name for stage in enabled_stages(recipe)]
    for option, name in (("--from", start), ("--until", until)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: this recipe has no such stage; it has {', '.join(names)}.")
    if start and until and names.index(start) > names.index(until):
        raise UserError(f"--from {start} comes after --until {until}; swap them.")


def check_folder(run_dir: Path, recipe: Recipe) -> None:
    """Refuse a folder that is not new, empty, or that of a run of a recipe of the same name (UserError)."""
    marker = run_dir / "recipe.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; name a folder with --out.")
    if run_dir.exists() and any(run_dir.iterdir()) and not marker.exists():
        raise UserError(f"{run_dir} holds something that is no regrow run; name another folder with --out.")
    if marker.exists():
        held = yaml.safe_load(marker.read_text(encoding="utf-8"))
        other = held.get("name") if isinstance(held, dict) else None
        if other != recipe.name:
            raise UserError(
                f"{run_dir} holds the run {other!r}, not {recipe.name!r}; name another folder with --out."
            )


def _in_use(run_dir: Path) -> str:
    return f"Another regrow run is using {run_dir}; wait for it or name another folder with --out."


def _write_recipe(run_dir: Path, recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "recipe.yaml").write_text(text, encoding="utf-8")
