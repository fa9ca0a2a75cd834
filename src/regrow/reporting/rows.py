"""The rows of the before/after table: how each figure is read from a model and how it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regrow.reporting.estimate import Estimate
from regrow.reporting.facts import IFEVAL_FIGURES, Facts, Model, estimate, ifeval_repeats, number, section
from regrow.reporting.text import (
    change,
    count,
    figure,
    percent,
    points,
    public_name,
    share_with_interval,
    size,
    value_with_interval,
)

IFEVAL_SIZE = (541, 834)  # prompts, instructions
_MEMORY_KINDS = {"process_resident": "whole process", "cuda_allocated": "GPU, allocated"}

Read = Callable[[Model], Estimate | None]
Versus = Callable[[Model, Model, float, float], str]


@dataclass(frozen=True)
class Row:
    """One figure of the table.

    Attributes:
        label: what it is, with its unit and the direction that is better.
        read: the figure of a model, or None where it was not measured.
        write: its text.
        versus: text of the published model (second) against the teacher (first), from both figures.
    """

    label: str
    read: Read
    write: Callable[[Estimate], str]
    versus: Versus


def ifeval_name(facts: Facts) -> str:
    """What the instruction-following figures were measured on; only IFEval itself is called IFEval.

    A local file is taken for IFEval where its prompts and instructions are as many as IFEval's.
    """
    model = facts.student or facts.teacher
    source = ifeval_source(facts)
    if source.startswith("builtin:"):
        return "Development set"
    repeats = ifeval_repeats(model.ifeval) if model else 1
    prompts, instructions = (
        total / repeats if model and (total := number(section(model.ifeval, key), "total")) else None
        for key in ("prompt_level_strict", "inst_level_strict")
    )
    if source != "google/IFEval" and (prompts, instructions) != IFEVAL_SIZE:
        return f"IFEval's checkers on {public_name(source)}"
    if prompts is not None and prompts < IFEVAL_SIZE[0]:
        return f"IFEval (first {count(prompts)} prompts)"
    return "IFEval"


def ifeval_source(facts: Facts) -> str:
    """Where the prompts came from: as measured, else as the recipe says."""
    model = facts.student or facts.teacher
    measured = section(model.ifeval, "settings").get("prompts") if model else None
    asked = section(section(facts.recipe, "evaluate"), "ifeval").get("prompts")
    return str(measured or asked or "google/IFEval")


def table_rows(facts: Facts) -> list[Row]:
    """Every row that the table may have, in order."""
    other = "response" if _counts_all(facts) else "all"
    counted = {"response": "answer tokens only", "all": "all tokens"}[other]
    task = ifeval_name(facts)
    rows = [
        Row("Parameters", _whole("num_parameters"), lambda e: count(e.value), _relative),
        Row("Weights on disk", _whole("weight_bytes"), lambda e: size(e.value), _relative),
        _share("Held-out top-1 agreement \u2191", "top1_agreement"),
        _share("Held-out top-5 agreement \u2191", "top5_agreement"),
        _value("Held-out KL, mean (nats) \u2193", "kl_mean"),
        _value("Held-out KL, 95th percentile \u2193", "kl_p95"),
        Row("Held-out perplexity \u2193", _perplexity(facts), value_with_interval, _relative),
        _share(f"Top-1 agreement, {counted} \u2191", "top1_agreement", other),
        _value(f"KL, {counted} \u2193", "kl_mean", other),
        _share("Training-corpus top-1 agreement \u2191", "top1_agreement", "corpus"),
    ]
    rows += [_accuracy(f"{task}, {label} \u2191", key) for key, label in IFEVAL_FIGURES]
    rows += [
        _plain("Answer length, mean (tokens)", "ifeval", "mean_response_tokens", _three, _relative),
        _plain("Answers cut off", "ifeval", "no_stop_rate", _percent, _difference),
        _plain("Answers that repeat", "ifeval", "repetition_rate", _percent, _difference),
        _plain(
            "Prefill (tokens/s) \u2191",
            "latency",
            "prefill_tokens_per_s",
            _three,
            _speedup("prefill_speedup"),
        ),
        _plain(
            "Decode (tokens/s) \u2191", "latency", "decode_tokens_per_s", _three, _speedup("decode_speedup")
        ),
        _plain("Time to first token (s) \u2193", "latency", "ttft_s", _three, _relative),
        _plain(memory_label(facts), "latency", "peak_memory_bytes", lambda e: size(e.value), _relative),
    ]
    return rows


def memory_label(facts: Facts) -> str:
    """Peak memory, and of what."""
    kinds = {str(model.latency.get("peak_memory_kind")) for model in facts.models if model.latency}
    kind = _MEMORY_KINDS.get(kinds.pop(), "") if len(kinds) == 1 else ""
    return f"Peak memory ({kind}) \u2193" if kind else "Peak memory \u2193"


def speed_change(student: Model, key: str, before: float, after: float) -> str:
    """Change of a speed: from the paired ratio where it was measured, else from the two figures."""
    ratio = number(student.latency, key)
    return change(1.0, ratio) if ratio is not None else change(before, after)


def _counts_all(facts: Facts) -> bool:
    return not any(model.fidelity.get("tokens") == "response" for model in facts.models)


def _share(label: str, key: str, part: str | None = None) -> Row:
    return Row(label, _fidelity(key, part), share_with_interval, lambda *_: "")


def _value(label: str, key: str, part: str | None = None) -> Row:
    return Row(label, _fidelity(key, part), value_with_interval, lambda *_: "")


def _accuracy(label: str, key: str) -> Row:
    return Row(label, lambda model: estimate(model.ifeval, key), share_with_interval, _difference)


def _plain(label: str, benchmark: str, key: str, write: Callable[[Estimate], str], versus: Versus) -> Row:
    def read(model: Model) -> Estimate | None:
        value = number(getattr(model, benchmark), key)
        return Estimate(float(value)) if value is not None else None

    return Row(label, read, write, versus)


def _fidelity(key: str, part: str | None) -> Read:
    return lambda model: estimate(section(model.fidelity, part) if part else model.fidelity, key)


def _whole(name: str) -> Read:
    def read(model: Model) -> Estimate | None:
        value = getattr(model, name)
        return Estimate(float(value)) if value is not None else None

    return read


def _perplexity(facts: Facts) -> Read:
    """The teacher's own is measured with each student's; the published one's pairing is shown."""

    def read(model: Model) -> Estimate | None:
        if model.name != "teacher":
            return estimate(model.fidelity, "student_perplexity")
        measured: Any = facts.student or next((m for m in facts.models if m.fidelity), None)
        return estimate(measured.fidelity, "teacher_perplexity") if measured else None

    return read


def _three(measured: Estimate) -> str:
    return figure(measured.value, 3)


def _percent(measured: Estimate) -> str:
    return percent(measured.value)


def _relative(teacher: Model, student: Model, before: float, after: float) -> str:
    return change(before, after)


def _difference(teacher: Model, student: Model, before: float, after: float) -> str:
    return f"{points(after - before)} points"


def _speedup(key: str) -> Versus:
    return lambda teacher, student, before, after: speed_change(student, key, before, after)
