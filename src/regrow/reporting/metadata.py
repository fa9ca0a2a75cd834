"""The header of the model card: what the Hub reads."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from regrow.reporting.estimate import Estimate
from regrow.reporting.facts import IFEVAL_FIGURES, Facts, entries, estimate, section
from regrow.reporting.rows import ifeval_name, ifeval_source
from regrow.reporting.text import is_hub_id, one_line, public_name

_IFEVAL_METRICS = {
    "prompt_level_strict": "prompt_level_strict_acc",
    "inst_level_strict": "inst_level_strict_acc",
    "prompt_level_loose": "prompt_level_loose_acc",
    "inst_level_loose": "inst_level_loose_acc",
}
_FIDELITY_METRICS = (
    ("top1_agreement", "Top-1 agreement with the teacher"),
    ("top5_agreement", "Top-5 agreement with the teacher"),
    ("kl_mean", "Mean KL(teacher, model), nats"),
    ("student_perplexity", "Perplexity"),
)


def card_data(facts: Facts) -> ModelCardData:
    """Metadata of the published model; a field that the run does not settle is left out."""
    parent = facts.parent_card
    results = eval_results(facts)
    return ModelCardData(
        base_model=facts.parent_id,
        base_model_relation=base_model_relation(facts),
        library_name="transformers",
        pipeline_tag=pipeline_tag(facts),
        license=_text(parent.get("license")),
        license_name=_text(parent.get("license_name")),
        license_link=_text(parent.get("license_link")),
        language=_text(parent.get("language")),
        datasets=_datasets(facts) or None,
        tags=_tags(facts),
        eval_results=results or None,
        model_name=one_line(facts.name) if results else None,
    )


def base_model_relation(facts: Facts) -> str | None:
    """The Hub's word for how the model derives from its parent.

    The Hub knows adapter, merge, quantized and finetune, and none for pruning. A model that was trained after
    the cut is a finetune; for one that was only cut nothing is claimed (its tags say `pruned`).
    """
    trained = any(facts.moved(stage) for stage in facts.training)
    return "finetune" if trained and facts.parent_id else None


def pipeline_tag(facts: Facts) -> str:
    """The parent's own tag where it has one and the vision part is still there."""
    inherited = facts.parent_card.get("pipeline_tag")
    if isinstance(inherited, str):
        return one_line(inherited)
    return "image-text-to-text" if facts.has_vision else "text-generation"


def eval_results(facts: Facts) -> list[EvalResult]:
    """The published model's measured figures for the `model-index`."""
    student = facts.student
    if student is None:
        return []
    found = []
    held_out = section(facts.recipe, "held_out").get("source")
    if held_out is not None:
        dataset = facts.text_name(held_out)
        for key, label in _FIDELITY_METRICS:
            measured = estimate(student.fidelity, key)
            if measured:
                split = one_line(section(facts.recipe, "held_out").get("split") or "train")
                found.append(_result(dataset, f"{dataset} (held out)", key, label, measured, split))
    task = ifeval_name(facts)
    dataset = _ifeval_dataset(facts, task)
    for key, label in IFEVAL_FIGURES:
        measured = estimate(student.ifeval, key)
        if measured:
            found.append(_result(dataset, task, _IFEVAL_METRICS[key], f"Accuracy, {label}", measured, None))
    return found


def _ifeval_dataset(facts: Facts, task: str) -> str:
    if task == "IFEval" or task.startswith("IFEval ("):
        return "google/IFEval"
    return public_name(ifeval_source(facts))


def _result(
    dataset: str, name: str, metric: str, label: str, measured: Estimate, split: str | None
) -> EvalResult:
    if measured.low is not None and measured.high is not None:
        label += f" (95% interval {measured.low:.4g} to {measured.high:.4g})"
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=dataset,
        dataset_name=name,
        dataset_split=split,
        metric_type=metric,
        metric_name=label,
        metric_value=round(measured.value, 4),
    )


def _tags(facts: Facts) -> list[str]:
    tags = ["regrow", "pruned", "mlp-width-pruning"]
    if any(facts.moved(stage) for stage in facts.distilling):
        tags.append("knowledge-distillation")
    if any(facts.moved(stage) for stage in facts.adapting):
        tags.append("lora")
    tags += [stage for stage in ("sft", "dpo") if facts.moved(stage)]
    return tags


def _datasets(facts: Facts) -> list[str]:
    sources = [corpus.get("source") for corpus in entries(facts.recipe, "corpora")]
    return list(dict.fromkeys(source for source in sources if isinstance(source, str) and is_hub_id(source)))


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [one_line(item) for item in value]
    return one_line(value) if value else None
