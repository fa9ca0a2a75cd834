"""The table of stages: what each depends on, what it reads, what it makes.

This is the only place that unpacks a recipe: the functions it calls take flat keyword arguments. Every
stage writes into a folder that the runner publishes when the function returns.
"""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.files import publish_folder, write_json
from regrow.needs import (
    check_dpo,
    check_evaluate,
    check_rollouts,
    check_sft,
    constraints,
    constraints_of_sft,
    development_prompts,
)
from regrow.recipe import Recipe, Synthesize, apply_override, parse_recipe
from regrow.reporting.steps import STEPS


@dataclass(frozen=True)
class Context:
    """Where a stage finds its inputs and puts its outputs.

    Attributes:
        recipe: the whole recipe.
        parent: local folder of the parent checkpoint.
        out: folder to write into; it appears under its final name only when the stage is finished.
        work: folder that survives a killed run (training checkpoints, finished evaluation records); the
            folder that it lies in outlives changed settings too (preference pairs).
        run_dir: the run's folder.
        finished: folders of the finished upstream stages, by name.
        processes: how many share the stage; each of them sees the same context.
    """

    recipe: Recipe
    parent: Path
    out: Path
    work: Path
    run_dir: Path
    finished: dict[str, Path]
    processes: int = 1

    def student(self, before: str | None = None) -> Path:
        """The newest model made so far (before the stage named `before`)."""
        made = [name for name in MODEL_STAGES if name in self.finished]
        if before in MODEL_STAGES:
            made = [name for name in made if MODEL_STAGES.index(name) < MODEL_STAGES.index(before)]
        return self.finished[made[-1]] / "model"


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: name of the stage, of its folder and of its verb.
        inputs: stages whose results it reads, where they are part of the run.
        reads: keys of the recipe that its result depends on; they are hashed into its manifest.
        run: the function; writes into `context.out` and returns a report of JSON values.
        enabled: whether a recipe asks for it.
        also: what else of the recipe its result depends on, hashed as well.
        check: refuses now what would fail when the stage is reached (raises `UserError`).
        parallel: whether several processes can share it under a recipe.
    """

    name: str
    inputs: tuple[str, ...]
    reads: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    enabled: Callable[[Recipe], bool] = lambda recipe: True
    also: Callable[[Recipe], dict[str, Any]] = lambda recipe: {}
    check: Callable[[Recipe], None] = lambda recipe: None
    parallel: Callable[[Recipe], bool] = lambda recipe: False


def needs_statistics(criterion: str, refit: bool) -> bool:
    """Whether pruning needs a calibration pass."""
    from regrow.pruning.criteria import find_criterion

    return find_criterion(criterion).needs_statistics or refit


def prepare_corpora(recipe: Recipe, run_dir: Path, parent: Path | None) -> None:
    """Refuse now what `write_corpora` would refuse, perhaps after hours.

    Args:
        recipe, run_dir: of the run.
        parent: the parent's folder; None where its weights are not there, and then finished text is not
            compared with what is asked for.

    Raises:
        UserError: settings, prompts or folders do not fit.
    """
    from regrow.synthesis.synthesize import synthesize

    for section in recipe.synthesize:
        if run_dir.resolve().is_relative_to(Path(section.out).resolve()):
            raise UserError(
                f"synthesize.out {section.out} holds the run folder {run_dir}; name a folder of its own."
            )
        synthesize(model=parent, **_writing(section, recipe), check_only=True)


def write_corpora(recipe: Recipe, parent: Path) -> None:
    """Have the parent write the text that the recipe asks for; what is finished already is left as it is.

    Raises:
        UserError: a folder holds text that was written with other settings, or something else.
        RunError: the device's memory is too small, or the disk is full.
    """
    from regrow.synthesis.synthesize import synthesize

    for section in recipe.synthesize:
        synthesize(
            model=parent,
            **_writing(section, recipe),
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
        )


def _writing(section: Synthesize, recipe: Recipe) -> dict[str, Any]:
    """What `synthesize` is asked for by an entry of the recipe."""
    options = section.model_dump()
    return options | {
        "out": Path(section.out),
        "seed": recipe.seed if section.seed is None else section.seed,
        "enable_thinking": recipe.enable_thinking,
    }


def _calibrate(context: Context) -> dict[str, Any]:
    from regrow.pruning.calibrate import calibrate

    recipe = context.recipe
    return calibrate(
        model=context.parent,
        corpora=[corpus.spec for corpus in recipe.corpora],
        out=context.out / "statistics.safetensors",
        sequence_length=recipe.sequence_length,
        enable_thinking=recipe.enable_thinking,
        seed=recipe.seed,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        **recipe.calibrate.model_dump(),
        **_calibrate_for(recipe),
    )


def _calibrate_for(recipe: Recipe) -> dict[str, Any]:
    """What calibration has to know of the pruning that follows."""
    from regrow.pruning.criteria import find_criterion

    if recipe.calibrate.method == "sequential":
        return {"width": recipe.prune.width, "criterion": recipe.prune.criterion}
    return {"fisher": find_criterion(recipe.prune.criterion).needs_gradients}


def _prune(context: Context) -> dict[str, Any]:
    from regrow.pruning.prune import prune

    calibrated = context.finished.get("calibrate")
    return prune(
        model=context.parent,
        out=context.out / "model",
        statistics=calibrated / "statistics.safetensors" if calibrated else None,
        seed=context.recipe.seed,
        **context.recipe.prune.model_dump(),
    )


def _train(context: Context, stage: str, student: Path, out: Path) -> dict[str, Any]:
    """Call a training stage's leaf function with its section of the recipe."""
    module, name = _TRAINING[stage]
    function = getattr(importlib.import_module(f"regrow.training.{module}"), name)
    recipe = context.recipe
    section = getattr(recipe, stage).model_dump()
    if context.processes > 1:  # a step stays what the recipe says; `check_share` has seen that it divides
        section["gradient_accumulation_steps"] //= context.processes
    if stage == "dpo":  # beside the work folder, whose name changes with every key of the section
        section["pairs_dir"] = context.work.parent
    return function(
        student=student,
        teacher=context.parent,
        corpora=[corpus.spec for corpus in recipe.corpora],
        held_out=recipe.held_out.spec,
        out=out,
        work_dir=context.work,
        sequence_length=recipe.sequence_length,
        enable_thinking=recipe.enable_thinking,
        seed=recipe.seed,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        shards=recipe.prune.shards,
        max_shard_size=recipe.prune.max_shard_size,
        **section,
    )


def _training(stage: str) -> Callable[[Context], dict[str, Any]]:
    """A training stage, on the newest model before it."""
    return lambda context: _train(context, stage, context.student(stage), context.out / "model")


def _dpo(context: Context) -> dict[str, Any]:
    report = _training("dpo")(context)
    shutil.copy2(context.work / "pairs.jsonl", context.out)
    return report


def _writes_itself(stage: str) -> Callable[[Recipe], bool]:
    """Each process would start its own vLLM, on the same GPU."""
    return lambda recipe: getattr(recipe, stage).rollout_engine != "vllm"


def _evaluate(context: Context) -> dict[str, Any]:
    from regrow.evaluation.compare import compare_runs
    from regrow.evaluation.evaluate import evaluate_models

    recipe, section = context.recipe, context.recipe.evaluate
    students = {
        MODEL_NAMES[name]: context.finished[name] / "model"
        for name in MODEL_STAGES
        if name in context.finished
    }
    final = list(students)[-1]
    report: dict[str, Any] = {"models": {}, "final": final}
    shared: dict[str, Any] = {
        "teacher": context.parent,
        "held_out": recipe.held_out.spec,
        "corpora": [corpus.spec for corpus in recipe.corpora],
        "records": context.work,
        "sequence_length": recipe.sequence_length,
        "enable_thinking": recipe.enable_thinking,
        "batch_size": section.batch_size,
        "num_rows": section.num_rows,
        "tokens": section.tokens,
        "reuse": [Path(folder) / part for folder in section.reuse for part in (".", _RECORDS)],
        "seed": recipe.seed,
        "device": recipe.device,
        "trust_remote_code": recipe.trust_remote_code,
        "ifeval": section.ifeval.model_dump(),
        "latency": section.latency.model_dump(),
    }
    both = {"teacher": context.parent, final: students[final]}
    every = {"teacher": context.parent, **students} if section.each_stage else both
    for benchmark in section.benchmarks:
        # Fidelity is cheap and shows what each stage gave; the rest compares the two ends.
        models = every if benchmark == "fidelity" else both
        for name, figures in evaluate_models(models=models, benchmarks=(benchmark,), **shared).items():
            report["models"].setdefault(name, {}).update(figures)
    if "ifeval" in section.benchmarks:
        ends = [context.work / f"{name}-ifeval.json" for name in both]
        names = {"baseline": "teacher", "candidate": final}  # rather than paths of this machine
        report["comparison"] = {"ifeval": compare_runs(*ends, seed=recipe.seed) | names}
    shutil.copytree(context.work, context.out / "records")
    return report


def _report(context: Context) -> dict[str, Any]:
    from regrow.pruning.verify import verify_checkpoint
    from regrow.reporting.report import write_report
    from regrow.reporting.results import gather_results

    final = context.student()
    model = context.run_dir / "model"
    shutil.rmtree(model, ignore_errors=True)
    with publish_folder(model) as folder:
        link_model(final, folder)
    results = gather_results(
        recipe=context.recipe.model_dump(mode="json"), parent=context.parent, stages=context.finished
    )
    results["verification"] = verify_checkpoint(model, against=context.parent, trained=True)
    write_json(context.run_dir / "results.json", results)
    return write_report(run_dir=context.run_dir)


def link_model(source: Path, folder: Path) -> None:
    """Give a model a second name: weights by hard link where the disk allows it, small files by copy."""
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            try:
                os.link(path, folder / path.name)
                continue
            except OSError:
                pass
        shutil.copy2(path, folder / path.name)


def train_once(
    stage: str,
    *,
    student: Path,
    teacher: Path,
    corpora: list[str],
    held_out: str,
    steps: int,
    out: Path,
    overrides: list[str],
) -> dict[str, Any]:
    """A training stage as a verb of its own, with the checks and defaults of a recipe.

    Args:
        stage: a training stage of the table.
        student, teacher: local model folders.
        corpora, held_out: sources as in a recipe.
        steps: optimiser steps.
        out: new folder for the model.
        overrides: `key=value` settings of the recipe's section, or keys of the recipe itself (`seed=1`).
    """
    recipe = one_stage_recipe(stage, str(teacher), corpora, held_out, steps, overrides)
    work = out.with_name(f".{out.name}.work")
    context = Context(recipe, teacher, out.parent, work / stage, out.parent, {})
    report = _train(context, stage, student, out)
    shutil.rmtree(work, ignore_errors=True)
    return report


def one_stage_recipe(
    stage: str, teacher: str, corpora: list[str], held_out: str, steps: int, overrides: list[str]
) -> Recipe:
    """The recipe that a training verb stands for."""
    value: dict[str, Any] = {
        "name": stage,
        "model": teacher,
        "corpora": [{"source": source} for source in corpora],
        "held_out": {"source": held_out},
        "prune": {"width": 128},
        stage: {"max_steps": steps},
    }
    for override in overrides:
        of_the_recipe = override.partition("=")[0].partition(".")[0] in Recipe.model_fields
        apply_override(value, override if of_the_recipe else f"{stage}.{override}")
    return parse_recipe(value, f"regrow {stage}")


# training stage -> module and leaf function
_TRAINING = {
    "distill": ("distill", "distill"),
    "recover": ("recover", "recover"),
    "finish": ("distill", "distill"),
    "sft": ("sft", "sft"),
    "dpo": ("dpo", "dpo"),
}
MODEL_NAMES = {step.stage: step.model for step in STEPS}
MODEL_STAGES = tuple(MODEL_NAMES)
_RECORDS = Path("stages/evaluate/records")

_DATA = ("corpora", "sequence_length", "enable_thinking", "seed")


def _training_stage(
    name: str, run: Callable[[Context], dict[str, Any]] | None = None, **options: Any
) -> Stage:
    """The row of a stage that trains the newest model before it."""
    return Stage(
        name,
        MODEL_STAGES[: MODEL_STAGES.index(name)],
        (name, "held_out", *_DATA),
        run or _training(name),
        lambda recipe: getattr(recipe, name) is not None,
        **options,
    )


def _distilling_stage(name: str) -> Stage:
    return _training_stage(
        name, also=development_prompts(name), check=check_rollouts(name), parallel=_writes_itself(name)
    )


STAGES: tuple[Stage, ...] = (
    Stage(
        "calibrate",
        (),
        ("calibrate", *_DATA),
        _calibrate,
        lambda recipe: needs_statistics(recipe.prune.criterion, recipe.prune.refit),
        _calibrate_for,
        parallel=lambda recipe: recipe.calibrate.method != "sequential",
    ),
    Stage("prune", ("calibrate",), ("prune", "seed"), _prune),
    _distilling_stage("distill"),
    _distilling_stage("recover"),
    _distilling_stage("finish"),
    _training_stage("sft", also=constraints_of_sft, check=check_sft),
    _training_stage("dpo", _dpo, also=constraints, check=check_dpo),
    Stage("evaluate", MODEL_STAGES, ("evaluate", "held_out", *_DATA), _evaluate, check=check_evaluate),
    Stage("report", (*MODEL_STAGES, "evaluate"), ("name", "report"), _report),
)
