"""The sentences of card and page, each made from what the run recorded.

Strings are plain text: the templates escape them for Markdown or HTML. A function that has nothing recorded
to stand on returns nothing.
"""

from regrow.reporting.estimate import interval_of
from regrow.reporting.facts import (
    IFEVAL_FIGURES,
    Facts,
    estimate,
    number,
    section,
)
from regrow.reporting.records import widths
from regrow.reporting.rows import ifeval_name
from regrow.reporting.steps import TRAINING_STEPS
from regrow.reporting.text import (
    change,
    count,
    figure,
    one_line,
    percent,
    points,
    share_with_interval,
    short_count,
    size,
    value_with_interval,
)


def summary(facts: Facts) -> str:
    """What the model is, in one or two sentences."""
    made = [step.made for step in TRAINING_STEPS if facts.moved(step.stage)]
    before, after = widths(facts)
    if before and after:
        cut = f"with its gated MLPs cut from {before:,} to {after:,} channels ({change(before, after)})"
    elif after:
        cut = f"with its gated MLPs cut to {after:,} channels"
    else:
        cut = "with its gated MLPs pruned"
    text = f"{facts.parent} {cut}"
    if made:
        text += f", then {_and(made)}"
    return f"{text}.{_size_sentence(facts)}"


def limitations(facts: Facts) -> list[str]:
    """What was lost, from the measurements, and what nobody measured."""
    found = [*_instruction_losses(facts), *_fidelity_losses(facts), *_answer_changes(facts)]
    found.append(_unmeasured(facts))
    found.append(
        f"It inherits the biases and risks of {facts.parent}; whether pruning and training changed any "
        "of them was not measured."
    )
    return found


def comparison_sentence(facts: Facts) -> str:
    """The verdict of the paired comparison, or nothing where none was recorded."""
    found = section(facts.comparison, "ifeval") or facts.comparison
    verdict, difference = found.get("verdict"), number(found, "difference")
    if verdict is None or difference is None:
        return ""
    metric = dict(IFEVAL_FIGURES).get(str(found.get("metric")))
    text = f"Paired with the teacher prompt by prompt on {ifeval_name(facts)}"
    text += f" ({metric}): {points(difference)} points" if metric else f": {points(difference)} points"
    interval = interval_of(found.get("ci95"))
    if interval:
        text += f" (95 % interval {points(interval[0])} to {points(interval[1])}, prompts resampled)"
    text += f"; verdict: {one_line(verdict)}"
    margin = number(found, "margin")
    if margin is not None:
        text += f" at a margin of {100 * margin:g} point{'' if margin == 0.01 else 's'}"
    text += "."
    flips = section(section(found, "flips"), "prompts")
    lost, gained = number(flips, "lost"), number(flips, "gained")
    if lost is not None and gained is not None:
        text += f" Prompts lost {count(lost)}, gained {count(gained)}"
        p = number(found, "mcnemar_p")
        text += f" (McNemar p = {figure(p, 2)})." if p is not None else "."
    needed = number(section(section(found, "needed"), "if_no_difference"), "prompts")
    if needed:
        answers = number(found, "num_repeats") or 1
        each = f" with {count(answers)} answers each" if answers > 1 else ""
        text += f" About {count(needed)} prompts{each} would settle it if there is no difference."
    return text


def direct_use(facts: Facts) -> str:
    """What the model is for."""
    text = f"What the licence and the card of {facts.parent} allow, where its size is in the way."
    if facts.student and (facts.student.fidelity or facts.student.ifeval):
        text += " Compare the figures below with what your task needs, then try it on your own examples."
    return text


def out_of_scope(facts: Facts) -> str:
    """What the model is not for."""
    return (
        f"Anything that {facts.parent} is not meant for; and work that depends on abilities which were not "
        "measured here, until you have measured them."
    )


def recommendations(facts: Facts) -> str:
    """What to do about the limitations."""
    teacher = facts.parent
    return (
        f"Run your own task on this model and on {teacher} side by side before replacing one by the other; "
        "agreement on held-out text does not prove that a particular ability survived."
    )


def notes(facts: Facts) -> list[str]:
    """What was skipped or approximated; a sentence that several stages wrote is said once."""
    stages: dict[str, list[str]] = {}
    for note in facts.notes:
        stage, separator, text = note.partition(": ")
        if separator and stage in (*facts.reports, "report"):
            stages.setdefault(text, []).append(stage)
        else:
            stages.setdefault(note, [])
    return [f"{', '.join(names)}: {text}" if names else text for text, names in stages.items()]


def glossary(facts: Facts) -> list[tuple[str, str]]:
    """The terms that this report uses."""
    terms = [
        ("Teacher", "the unpruned parent model"),
        (
            "Channel",
            "one unit of a gated MLP: a row of gate_proj and up_proj with the matching column of down_proj",
        ),
    ]
    if section(facts.reports, "prune").get("refit") or section(facts.recipe, "prune").get("refit"):
        terms.append(
            (
                "Refit",
                "least-squares solution for down_proj after the cut, with which the kept channels stand in "
                "for the removed ones on the calibration text",
            )
        )
    if facts.distilling:
        terms.append(("Distillation", "training the pruned model on the teacher's next-token distributions"))
    if facts.adapting:
        terms.append(("LoRA", "trained low-rank updates of the weights, added to them after training"))
    if "dpo" in facts.reports:
        terms.append(("DPO", "training that prefers the better of two answers to a prompt"))
    if any(model.ifeval for model in facts.models):
        terms.append(("IFEval", "benchmark of instructions that a program can check"))
    return terms


def _size_sentence(facts: Facts) -> str:
    teacher, student = facts.teacher, facts.student
    if student is None or student.num_parameters is None:
        return ""
    text = f" It has {short_count(student.num_parameters)} parameters"
    if teacher and teacher.num_parameters:
        text += f" instead of {short_count(teacher.num_parameters)}"
        text += f" ({change(teacher.num_parameters, student.num_parameters)})"
    if student.weight_bytes:
        text += f" in {size(student.weight_bytes)} of weights"
    return f"{text}."


def _instruction_losses(facts: Facts) -> list[str]:
    teacher, student = facts.teacher, facts.student
    if student is None or not student.ifeval:
        return []
    found = []
    for key, label in IFEVAL_FIGURES[:2]:
        after = estimate(student.ifeval, key)
        before = estimate(teacher.ifeval, key) if teacher else None
        if after and before:
            found.append(
                f"{ifeval_name(facts)} ({label}): {share_with_interval(after)}, the teacher "
                f"{share_with_interval(before)}; a difference of {points(after.value - before.value)} points."
            )
        elif after:
            found.append(f"{ifeval_name(facts)} ({label}): {share_with_interval(after)}.")
    sentence = comparison_sentence(facts)
    return [*found, sentence] if sentence else found


def _fidelity_losses(facts: Facts) -> list[str]:
    student = facts.student
    if student is None:
        return []
    found = []
    agreement, kl = estimate(student.fidelity, "top1_agreement"), estimate(student.fidelity, "kl_mean")
    if agreement:
        text = (
            f"On held-out text its most likely next token is the teacher's at "
            f"{share_with_interval(agreement)} of the positions; at the other "
            f"{percent(1 - agreement.value)} it would go on differently"
        )
        found.append(f"{text} (mean KL {value_with_interval(kl)} nats)." if kl else f"{text}.")
    after = estimate(student.fidelity, "student_perplexity")
    before = estimate(student.fidelity, "teacher_perplexity")
    if after and before:
        found.append(
            f"Perplexity of the held-out text: {value_with_interval(after)}, the teacher "
            f"{value_with_interval(before)} ({change(before.value, after.value)})."
        )
    return found


def _answer_changes(facts: Facts) -> list[str]:
    teacher, student = facts.teacher, facts.student
    if teacher is None or student is None:
        return []
    found = []
    for key, what in (
        ("no_stop_rate", "Answers cut off at the token limit"),
        ("repetition_rate", "Answers in which at least half of the word 4-grams occurred before"),
    ):
        before, after = number(teacher.ifeval, key), number(student.ifeval, key)
        if before is not None and after is not None:
            found.append(f"{what}: {percent(after)}, the teacher {percent(before)}.")
    before, after = (number(model.ifeval, "mean_response_tokens") for model in (teacher, student))
    if before and after:
        found.append(f"Mean length of an answer: {figure(after, 3)} tokens, the teacher {figure(before, 3)}.")
    return found


def _unmeasured(facts: Facts) -> str:
    missing = []
    student = facts.student
    if student is None or not student.fidelity:
        missing.append("agreement with the teacher")
    if student is None or not student.ifeval:
        missing.append("instruction following")
    if student is None or not student.latency:
        missing.append("speed")
    missing += ["knowledge", "reasoning", "code", "long contexts", "safety"]
    if "vision" in str(facts.parent_card.get("pipeline_tag")) or facts.has_vision:
        missing.append("images")
    return f"Not measured: {_and(missing)}, and languages other than those of the texts below."


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
