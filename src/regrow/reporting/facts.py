"""What a run recorded, read from results.json without trusting that any part of it is there.

Everything that card, page and terminal show goes through here, so that a stage that was skipped or a
benchmark that was not run leaves a gap instead of an error or an invented figure.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from regrow.files import read_json
from regrow.reporting.estimate import Estimate, interval_of, share
from regrow.reporting.steps import STEP_OF_MODEL, STEPS, TRAINING_STEPS
from regrow.reporting.text import is_hub_id, is_number, one_line, public_name, without_paths

IFEVAL_FIGURES = (
    ("prompt_level_strict", "prompt level, strict"),
    ("inst_level_strict", "instruction level, strict"),
    ("prompt_level_loose", "prompt level, loose"),
    ("inst_level_loose", "instruction level, loose"),
)


@dataclass(frozen=True)
class Model:
    """Measured figures of one model of the run; a benchmark that was not run is an empty dictionary."""

    name: str
    num_parameters: int | None = None
    weight_bytes: int | None = None
    fidelity: dict[str, Any] = field(default_factory=dict)
    ifeval: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """A run's record in one shape.

    Attributes:
        recipe: the resolved recipe, or empty.
        models: the models that something is known of, teacher first, in the order of the stages.
        final: name of the published model, or None where nothing was evaluated and no stage made one.
        reports: stage -> its report.
        seconds: stage -> wall time.
        environment: hardware and versions.
        config: the published model's config.json.
        has_chat_template: whether the published model's folder holds a chat template.
        parent_card: what the parent's own card and licence file say (`parent.read_parent`).
        verification: result of `verify_checkpoint` on the published model, or empty.
        comparison: paired comparison of the final model with the teacher, per benchmark, or empty.
        notes: everything skipped or approximated, one sentence each.
    """

    recipe: dict[str, Any]
    models: tuple[Model, ...]
    final: str | None
    reports: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    environment: dict[str, Any]
    parent_card: dict[str, Any]
    config: dict[str, Any]
    has_chat_template: bool
    verification: dict[str, Any]
    comparison: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def teacher(self) -> Model | None:
        """The parent's figures."""
        return self.model("teacher")

    @property
    def student(self) -> Model | None:
        """The published model's figures."""
        return self.model(self.final) if self.final else None

    @property
    def training(self) -> tuple[str, ...]:
        """The training stages that ran, in order."""
        return tuple(step.stage for step in TRAINING_STEPS if step.stage in self.reports)

    @property
    def distilling(self) -> tuple[str, ...]:
        """Those that trained toward the parent's distributions."""
        return tuple(s.stage for s in TRAINING_STEPS if s.distils and s.stage in self.reports)

    @property
    def adapting(self) -> tuple[str, ...]:
        """Those that trained LoRA adapters."""
        return tuple(s.stage for s in TRAINING_STEPS if s.lora and s.stage in self.reports)

    def moved(self, stage: str) -> bool:
        """Whether a training stage changed the weights; it keeps the old ones where no step was better."""
        return stage in self.reports and self.reports[stage].get("chosen_step") != 0

    def settings(self, stage: str) -> dict[str, Any]:
        """Settings of a stage: those it recorded, else the recipe's."""
        return section(self.recipe, stage) | section(self.reports.get(stage), "hyperparameters")

    def model(self, name: str) -> Model | None:
        """Figures of one model, or None."""
        return next((model for model in self.models if model.name == name), None)

    @property
    def parent(self) -> str:
        """Public name of the parent: its Hub id where one is known."""
        return self.parent_id or public_name(self.recipe.get("model") or "the parent model")

    @property
    def parent_id(self) -> str | None:
        """Hub id of the parent, or None for a folder that does not say where it came from."""
        known = self.parent_card.get("model_id") or self.recipe.get("model")
        return str(known) if known is not None and is_hub_id(known) else None

    @property
    def written_text(self) -> list[dict[str, Any]]:
        """The recipe's entries of text that the parent wrote itself."""
        return [entry for entry in entries(self.recipe, "synthesize") if entry.get("out")]

    def text_name(self, source: Any) -> str:
        """Public name of a corpus; of text that the parent wrote with its folder, as the files are alike."""
        path = PurePosixPath(os.path.normpath(str(source)))
        for out in (PurePosixPath(os.path.normpath(str(entry["out"]))) for entry in self.written_text):
            if path.is_relative_to(out):
                return one_line(f"{out.name}/{path.relative_to(out)}")
        return public_name(source)

    @property
    def has_vision(self) -> bool:
        """Whether the published model has a vision part."""
        return bool(section(self.config, "vision_config"))

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the configuration."""
        return section(self.config, "text_config") or self.config

    @property
    def name(self) -> str:
        """Name of the published model."""
        report = section(self.recipe, "report")
        return str(report.get("model_id") or self.recipe.get("name") or "pruned-model")


def read_facts(results: Any, model: Path | None = None) -> Facts:
    """Bring the value of a results.json into one shape; whatever is missing or malformed is left out.

    Args:
        results: the value of results.json.
        model: folder of the published model, for its configuration and file names.
    """
    results = results if isinstance(results, dict) else {}
    stages = {name: entry for name, entry in section(results, "stages").items() if isinstance(entry, dict)}
    reports = {name: section(entry, "report") for name, entry in stages.items()}
    environment = section(results, "environment")
    if not environment:
        environment = {key: section(results, key) for key in ("hardware", "versions")}
    measured = section(results, "models")
    made = [step.model for step in STEPS if step.stage in reports]
    final = results.get("final") or (made[-1] if made else None)
    names = dict.fromkeys(["teacher", *STEP_OF_MODEL, *measured, *([str(final)] if final else [])])
    models = [_model(name, measured.get(name), reports) for name in names]
    return Facts(
        recipe=section(results, "recipe"),
        models=tuple(model for model in models if model is not None),
        final=str(final) if final else None,
        reports=reports,
        seconds={name: e["seconds"] for name, e in stages.items() if is_number(e.get("seconds"))},
        environment=environment,
        parent_card=section(results, "parent_card"),
        config=_json_in(model, "config.json"),
        has_chat_template=_has_chat_template(model),
        verification=section(results, "verification") or section(reports.get("prune"), "verification"),
        comparison=_comparison(results, reports),
        notes=tuple(dict.fromkeys(without_paths(note) for note in _list(results.get("notes")))),
    )


def entries(holder: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a recorded list; empty where there is none."""
    found = holder.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def section(value: Any, key: str) -> dict[str, Any]:
    """A dictionary inside a dictionary; empty where it is missing or something else."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def number(value: Any, *keys: str) -> float | None:
    """The first of several keys that holds a finite number."""
    if isinstance(value, dict):
        for key in keys:
            if is_number(value.get(key)):
                return value[key]
    return None


def estimate(figures: dict[str, Any], key: str) -> Estimate | None:
    """One figure of a benchmark with its recorded 95 % interval (`intervals: {key: [low, high]}`).

    The figure is a number or a count `{"correct", "total", "accuracy"}`. Prompts are independent, so a
    prompt-level count without an interval is given Wilson's; instructions of one prompt are not, so theirs
    is left without one.
    """
    value = figures.get(key)
    interval = interval_of(section(figures, "intervals").get(key))
    low, high = interval or (None, None)
    if not isinstance(value, dict):
        return Estimate(float(value), low, high) if is_number(value) else None
    counted = _counts(value)
    accuracy = value.get("accuracy")
    if counted is None:
        return Estimate(float(accuracy), low, high) if is_number(accuracy) else None
    if interval is None and key.startswith("prompt_level"):
        return share(*counted)
    return Estimate(counted[0] / counted[1], low, high, counted[1])


def by_type(ifeval: dict[str, Any], mode: str = "strict") -> dict[str, Estimate]:
    """Instruction type -> share followed, with Wilson's interval where each prompt was answered once.

    (A prompt rarely has a type twice; several answers to it are no independent trials.)
    """
    found = {}
    once = ifeval_repeats(ifeval) == 1
    for name, entry in sorted(section(ifeval, "by_type").items()):
        counted = _counts(section(entry, mode))
        if counted is not None:
            correct, total = counted
            found[str(name)] = share(correct, total) if once else Estimate(correct / total, num=total)
    return found


def ifeval_repeats(ifeval: dict[str, Any]) -> int:
    """How many answers to each prompt the figures are of."""
    comparable = section(section(ifeval, "settings"), "comparable")
    return int(number(comparable, "repeats") or 1)


def _counts(value: dict[str, Any]) -> tuple[int, int] | None:
    correct, total = value.get("correct"), value.get("total")
    if is_number(correct) and is_number(total) and 0 <= correct <= total and total > 0:
        return int(correct), int(total)
    return None


def _model(name: str, measured: Any, reports: dict[str, dict[str, Any]]) -> Model | None:
    measured = measured if isinstance(measured, dict) else {}
    made_by = reports.get(STEP_OF_MODEL[name].stage) if name in STEP_OF_MODEL else None
    if not measured and made_by is None:
        return None
    size = section(measured, "size")
    latency = section(measured, "latency")
    counts = [measured, size, latency]
    pruned = reports.get("prune", {})
    if name == "teacher":
        counts += [section(pruned, "parent"), section(pruned, "before")]
    elif made_by is not None:
        counts += [made_by, section(made_by, "after"), pruned, section(pruned, "after")]
    return Model(
        name=name,
        num_parameters=_first_int(counts, "num_parameters"),
        weight_bytes=_first_int(counts, "weight_bytes"),
        fidelity=section(measured, "fidelity"),
        ifeval=section(measured, "ifeval"),
        latency=latency,
    )


def _first_int(places: Iterable[dict[str, Any]], key: str) -> int | None:
    found = next((value for place in places if (value := number(place, key)) is not None), None)
    return int(found) if found is not None else None


def _comparison(results: dict[str, Any], reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return section(results, "comparison") or section(reports.get("evaluate"), "comparison")


def _has_chat_template(model: Path | None) -> bool:
    if model is not None and (model / "chat_template.jinja").is_file():
        return True
    return bool(_json_in(model, "tokenizer_config.json").get("chat_template"))


def _json_in(model: Path | None, name: str) -> dict[str, Any]:
    if model is None or not (model / name).is_file():
        return {}
    value = read_json(model / name)
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
