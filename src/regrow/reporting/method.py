"""How the model was made, in sentences: what each stage did, on what, and what it left alone."""

from pathlib import PurePosixPath
from typing import Any

from regrow.reporting.facts import Facts, number, section
from regrow.reporting.records import final_point, held_out_points, widths
from regrow.reporting.steps import STEP_OF_STAGE
from regrow.reporting.text import change, count, duration, figure, one_line, percent

_REGIMES = {
    "bf16_mixed": "bf16 mixed precision (trained weights in fp32)",
    "bf16": "bf16 non-mixed precision",
    "fp32": "fp32",
}
_VIOLATIONS = {
    "balance": "answers that miss one are no more than those that follow all",
    "keep": "answers that miss one are kept",
    "drop": "answers that miss one are left out",
}
_LOSSES = {
    "forward_kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "jsd": "generalised Jensen-Shannon divergence",
    "skewed_kl": "skewed KL",
    "cross_entropy": "cross-entropy on the corpus' answers",
    "dpo": "DPO on pairs of answers",
}


def procedure(facts: Facts) -> list[str]:
    """One sentence per stage that changed or measured the model."""
    found = []
    calibrated = facts.reports.get("calibrate")
    sequential = facts.settings("calibrate").get("method") == "sequential"
    if calibrated is not None:
        tokens = number(calibrated, "num_tokens")
        whose = "each layer, behind the layers pruned before it" if sequential else "the parent"
        over = f", over {count(tokens)} tokens" if tokens else ""
        found.append(f"Calibrated: channel statistics of {whose}{over}.")
    pruned = facts.reports.get("prune")
    if pruned is not None:
        options = section(facts.recipe, "prune")
        criterion = pruned.get("criterion") or options.get("criterion")
        text = "Pruned: every MLP cut to the same width"
        if criterion:
            text += f", channels chosen by the criterion {one_line(criterion)}"
        if pruned.get("refit", options.get("refit")):
            text += "; down_proj refitted by ridge least squares"
            if sequential and calibrated is not None:
                text += " toward the parent's residual stream"
        found.append(f"{text}.")
    for stage in facts.training:
        if not facts.moved(stage):
            noun = STEP_OF_STAGE[stage].noun
            found.append(f"{noun}: no step beat the untrained weights, which were kept unchanged.")
        elif stage == "sft":
            found.append("Fine-tuned: LoRA trained and merged; cross-entropy on the corpus' answers alone.")
        elif stage == "dpo":
            found.append(_preferences(facts))
        else:
            options = facts.settings(stage)
            loss = _LOSSES.get(str(options.get("loss")), "divergence")
            how = f"{loss} over the full vocabulary, computed in fp32, against the frozen parent"
            found.append(f"{STEP_OF_STAGE[stage].noun}: {how}.")
    return found


def _preferences(facts: Facts) -> str:
    """Preference tuning, and the pairs that it was done on."""
    text = "Tuned on preferences: LoRA trained with DPO against the model before it, and merged"
    pairs = section(facts.reports.get("dpo"), "pairs")
    num, by_student = number(pairs, "num_pairs"), number(section(pairs, "chosen_from"), "student")
    if num is None:
        return f"{text}."
    text += f"; {count(num)} pairs of answers to prompts whose constraints a program checks"
    return (
        f"{text}, {count(by_student)} of the chosen ones its own." if by_student is not None else f"{text}."
    )


def preprocessing(facts: Facts) -> list[str]:
    """What happened to the text before it was tokens."""
    if not facts.recipe.get("corpora"):
        return []
    found = [_written(entry) for entry in facts.written_text]
    length = number(facts.recipe, "sequence_length")
    cut = f", truncated at {count(length)} tokens" if length else ""
    found.append(
        f"Rows with the parent's chat template applied where it has one{cut}; padding is never counted."
    )
    thinking = facts.recipe.get("enable_thinking")
    if isinstance(thinking, bool):
        found.append(f"The template's thinking mode is {'on' if thinking else 'off'}.")
    return found


def _written(entry: dict[str, Any]) -> str:
    """What the parent was asked to write into one folder."""
    prompts, own = number(entry, "num_prompts"), number(entry, "num_self_prompts")
    given = bool(entry.get("prompts"))
    words = f"{one_line(PurePosixPath(str(entry['out'])).name)}: the parent's own answers"
    words += f" to {'up to ' if given else ''}{count(prompts)} prompts" if prompts else ""
    words += " from a file" if given else ""
    words += f" and {count(own)} that it wrote itself" if own else ""
    constrained = None if given else number(entry, "constraint_share")
    if constrained:
        tries = number(entry, "attempts") or 1
        words += f", {percent(constrained)} of them with constraints that a program checks"
        words += f" (the best of up to {count(tries)} tries" if tries > 1 else " (one try"
        words += f"; {_VIOLATIONS.get(str(entry.get('violations')), 'answers that miss one may be in it')})"
    return f"{words}. Left out: answers that were cut off, prompts with eight words in a row from IFEval."


def training_regime(facts: Facts) -> list[tuple[str, str]]:
    """The line that the Hub's template asks for."""
    stages = [facts.settings(stage) for stage in facts.training]
    regimes = dict.fromkeys(str(options.get("precision")) for options in stages if options.get("precision"))
    return (
        [("Training regime", ", ".join(_REGIMES.get(name, one_line(name)) for name in regimes))]
        if regimes
        else []
    )


def training_course(facts: Facts) -> list[str]:
    """What the training stages did to the held-out figures, and where they stopped."""
    found = []
    for stage in facts.training:
        points = held_out_points(facts, stage)
        if len(points) < 2:
            continue
        first, last = points[0], final_point(facts, stage) or points[-1]
        parts = []
        for key, label, write in (
            ("kl", "KL", lambda v: figure(v, 3)),
            ("top1", "top-1 agreement", percent),
        ):
            before, after = first.get(key), last.get(key)
            if before is not None and after is not None:
                parts.append(f"{label} {write(before)} to {write(after)}")
        if parts:
            found.append(f"{STEP_OF_STAGE[stage].noun}, held-out text during training: {', '.join(parts)}.")
    return found


def factors(facts: Facts) -> str:
    """What the results are split by."""
    found = []
    if sum(bool(model.fidelity) for model in facts.models) > 1:
        found.append("by stage of the run")
    if facts.student and section(facts.student.ifeval, "by_type"):
        found.append("by type of instruction")
    return f"Results are given {' and '.join(found)}." if found else ""


def pruned_and_preserved(facts: Facts) -> list[str]:
    """What the cut took and what it left bit-identical."""
    pruned = facts.reports.get("prune")
    if pruned is None:
        return []
    before, after = widths(facts)
    found = []
    if before and after:
        found.append(
            f"Cut: {count(before - after)} of {count(before)} channels in every MLP "
            f"({change(before, after)}): rows of gate_proj and up_proj with their columns of down_proj."
        )
    kept = "attention, embeddings, output layer and norms"
    if facts.has_vision:
        kept += ", and the vision part"
    found.append(f"Bit-identical to the parent's after the cut: {kept}.")
    untouched = number(section(facts.verification, "compared"), "untouched")
    if untouched is not None and facts.verification.get("ok") is True:
        found.append(
            f"Verified: {count(untouched)} tensors of the published files equal the parent's bit for bit."
        )
    refitted = number(pruned, "refitted")
    if refitted:
        found.append(f"Refitted: {count(refitted)} down_proj matrices.")
    for stage in facts.training:
        what = str(facts.settings(stage).get("train"))
        if facts.moved(stage) and what in _TRAINED:
            found.append(f"{STEP_OF_STAGE[stage].noun} trained {_TRAINED[what]}.")
    targets: dict[str, None] = {}
    for stage in facts.adapting:
        named = facts.settings(stage).get("targets")
        if facts.moved(stage) and isinstance(named, list):
            targets |= dict.fromkeys(one_line(target) for target in named)
    if targets:
        found.append(f"LoRA merged into: {', '.join(targets)}.")
    mtp = pruned.get("mtp")
    if mtp in ("pruned", "dropped"):
        found.append(f"The multi-token-prediction layer was {mtp}.")
    return found


_TRAINED = {
    "mlp": "the MLPs; everything else stayed as it was",
    "all_but_embeddings": "every weight of the language model but the embedding and the output layer",
}


def engines(facts: Facts) -> list[str]:
    """Which engines take the model, as `regrow verify` found, and what its width costs quantised formats."""
    found = []
    for name, verdict in section(facts.verification, "engines").items():
        if isinstance(verdict, dict) and isinstance(verdict.get("ok"), bool):
            why = f", {one_line(verdict['why'])}" if verdict.get("why") else ""
            found.append(f"{one_line(name)}: {'yes' if verdict['ok'] else 'no'}{why}.")
    for name, text in section(facts.verification, "alignment").items():
        found.append(f"{one_line(name)}: {one_line(text)}")
    return found


def loading_note(facts: Facts) -> str:
    """What the snippet does not show."""
    if facts.has_vision:
        return (
            "This loads the language model alone; AutoModelForImageTextToText loads the vision part with it, "
            "which the cut left untouched."
        )
    return ""


def objective(facts: Facts) -> str:
    """The objective that the weights were trained on last."""
    names = [str(facts.settings(stage).get("loss")) for stage in facts.training if facts.moved(stage)]
    losses = {name: _LOSSES[name] for name in names if name in _LOSSES}
    if not losses:
        return ""
    by_token = [text for name, text in losses.items() if name != "dpo"]
    parts = [f"{' then '.join(by_token)}, token by token"] if by_token else []
    if "dpo" in losses:
        parts.append(losses["dpo"])
    return f"Decoder-only language model; objective of the regrowth: {', then '.join(parts)}."


def wall_time(facts: Facts) -> str:
    """All stages together."""
    return duration(sum(facts.seconds.values())) if facts.seconds else ""
