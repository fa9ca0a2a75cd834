"""How the figures were measured: the texts, the settings, the metrics."""

from typing import Any

from regrow.reporting.facts import Facts, ifeval_repeats, number, section
from regrow.reporting.rows import ifeval_name, ifeval_source
from regrow.reporting.text import count, one_line, public_name


def testing_data(facts: Facts) -> list[str]:
    """What the figures were measured on, and how."""
    student = facts.student
    if student is None:
        return []
    found = []
    held_out = section(facts.recipe, "held_out")
    if student.fidelity and held_out.get("source"):
        parts = [f"split {one_line(held_out.get('split') or 'train')}"]
        tokens = number(student.fidelity, "num_tokens")
        if tokens:
            parts.append(f"{count(tokens)} tokens")
        parts += _where(section(student.fidelity, "settings"))
        found.append(f"Held-out text: {facts.text_name(held_out['source'])} ({', '.join(parts)}).")
    if student.ifeval:
        found.append(_ifeval_setting(facts))
        missing = number(student.ifeval, "missing")
        if missing:
            found.append(f"{count(missing)} prompts had no answer and are left out of the figures.")
    if student.latency:
        options = section(section(student.latency, "settings"), "comparable")
        parts = [
            f"{count(value)} {what}"
            for key, what in (
                ("prompt_tokens", "prompt tokens"),
                ("new_tokens", "new tokens"),
                ("batch_size", "sequence(s) at a time"),
                ("repeats", "repeats, teacher and model in turn"),
                ("threads", "threads"),
            )
            if (value := number(options, key)) is not None
        ]
        if parts:
            found.append(f"Speed: {', '.join([*parts, *_where(options)])}.")
    return found


def _ifeval_setting(facts: Facts) -> str:
    assert facts.student is not None
    figures = facts.student.ifeval
    settings = section(figures, "settings")
    options = section(settings, "comparable")
    parts = []
    total = number(section(figures, "prompt_level_strict"), "total")
    if total:
        parts.append(
            f"{count(total / ifeval_repeats(figures))} prompts from {public_name(ifeval_source(facts))}"
        )
    if isinstance(options.get("do_sample"), bool):
        parts.append(_sampling(figures, options) if options["do_sample"] else "greedy decoding")
    longest = number(options, "max_new_tokens")
    if longest:
        parts.append(f"at most {count(longest)} new tokens")
    if isinstance(options.get("enable_thinking"), bool):
        parts.append(f"thinking {'on' if options['enable_thinking'] else 'off'}")
    if options.get("checkers"):
        parts.append(f"checkers of {one_line(options['checkers'])}")
    parts += _where(settings)
    return f"{ifeval_name(facts)}: {', '.join(parts)}." if parts else f"{ifeval_name(facts)}."


def _sampling(figures: dict[str, Any], options: dict[str, Any]) -> str:
    answers = ifeval_repeats(figures)
    words = "sampled" if answers == 1 else f"{count(answers)} sampled answers to each"
    return (
        f"{words} at temperature {number(options, 'temperature') or 1:g} and top-p "
        f"{number(options, 'top_p') or 1:g}"
    )


def _where(settings: dict[str, Any]) -> list[str]:
    """Precision and device of a measurement."""
    found = [one_line(settings[key]) for key in ("dtype", "device") if settings.get(key)]
    return [f"in {' on '.join(found)}"] if found else []


def metrics(facts: Facts) -> list[tuple[str, str]]:
    """Definitions of the metrics that were measured."""
    found = []
    student = facts.student
    if student and student.fidelity:
        found += [
            (
                "Top-1 and top-5 agreement",
                "share of held-out positions at which model and teacher have the same most likely next "
                "token; top 5: at which the teacher's is among the model's five",
            ),
            (
                "KL",
                "KL(teacher || model) of the next-token distributions over the full vocabulary, in nats and "
                "computed in fp32; 0 where they are equal",
            ),
            ("Perplexity", "exponential of the mean negative log-likelihood of the held-out text's tokens"),
        ]
    if any(model.ifeval for model in facts.models):
        found.append(
            (
                ifeval_name(facts),
                "share of prompts with every instruction followed (prompt level) and share of instructions "
                "followed (instruction level), judged by lm-eval's checkers on the answer as it is (strict) "
                "or after stripping typical decoration (loose)",
            )
        )
    if any(model.latency for model in facts.models):
        found.append(
            ("Speed", "tokens per second of reading a prompt (prefill) and of writing (decode), same machine")
        )
    return found
