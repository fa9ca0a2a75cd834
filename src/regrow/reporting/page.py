"""One self-contained HTML page: headline figures, plots, the before/after table and the whole record."""

import re
from dataclasses import dataclass

import jinja2

from regrow.reporting import content, method, plots, records
from regrow.reporting.card import TEMPLATES, card_sections
from regrow.reporting.estimate import Estimate
from regrow.reporting.facts import IFEVAL_FIGURES, Facts, by_type, estimate, number
from regrow.reporting.plots import Bar, Level, Panel, Series
from regrow.reporting.rows import ifeval_name, memory_label, speed_change
from regrow.reporting.steps import STEP_OF_MODEL
from regrow.reporting.table import before_after_table, label_of
from regrow.reporting.text import change, count, figure, one_line, percent, points, short_count, size

_BAR_FIGURES = (
    ("num_parameters", "Parameters", count),
    ("weight_bytes", "Weights on disk", size),
    ("prefill_tokens_per_s", "Prefill, tokens/s", lambda value: figure(value, 3)),
    ("decode_tokens_per_s", "Decode, tokens/s", lambda value: figure(value, 3)),
    ("peak_memory_bytes", "Peak memory", size),
)
_NOT_ON_PAGE = ("How to Get Started with the Model", "Results", "Summary", "Citation", "Direct Use")


@dataclass(frozen=True)
class Tile:
    """A headline figure: what, how much, and the second line (its interval or what it was before)."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Plot:
    """A plot with its heading and what a reader should know about it."""

    title: str
    svg: str
    note: str


def render_page(facts: Facts) -> str:
    """The page as one HTML document without any outside reference."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    sections = [section for section in card_sections(facts) if section.title not in _NOT_ON_PAGE]
    page = environment.get_template("page.html.jinja").render(
        title=one_line(facts.name),
        summary=content.summary(facts),
        tiles=tiles(facts),
        results=before_after_table(facts),
        verdict=content.comparison_sentence(facts),
        plots=[plot for plot in draw_plots(facts) if plot.svg],
        sections=sections,
    )
    # A figure and its unit stay on one line.
    return re.sub(r"(?<=\d) %", "\u00a0%", page)


def tiles(facts: Facts) -> list[Tile]:
    """The figures that a reader looks for first; one that was not measured has no tile."""
    teacher, student = facts.teacher, facts.student
    if student is None:
        return []
    found = []
    if student.num_parameters:
        before = teacher.num_parameters if teacher else None
        note = f"{change(before, student.num_parameters)}, from {short_count(before)}" if before else ""
        found.append(Tile("Parameters", short_count(student.num_parameters), note))
    agreement = estimate(student.fidelity, "top1_agreement")
    if agreement:
        found.append(Tile("Held-out agreement with the teacher", percent(agreement.value), _range(agreement)))
    for key, label in IFEVAL_FIGURES[1:2]:
        after = estimate(student.ifeval, key)
        before_share = estimate(teacher.ifeval, key) if teacher else None
        if after and before_share:
            found.append(
                Tile(
                    f"{ifeval_name(facts)}, {label}",
                    f"{points(after.value - before_share.value)} points",
                    f"{percent(before_share.value)} to {percent(after.value)}",
                )
            )
    decode = [number(m.latency, "decode_tokens_per_s") if m else None for m in (teacher, student)]
    if decode[0] and decode[1]:
        gain = speed_change(student, "decode_speedup", decode[0], decode[1])
        found.append(Tile("Decode speed", gain, f"{figure(decode[1], 3)} tokens/s"))
    if facts.seconds:
        found.append(Tile("Time to make", method.wall_time(facts), "wall time of all stages"))
    return found


def draw_plots(facts: Facts) -> list[Plot]:
    """Every plot that the record has data for."""
    task = ifeval_name(facts)
    return [
        Plot(
            "Agreement with the teacher, stage by stage",
            _agreement_plot(facts),
            "Share of held-out positions with the same most likely next token; bars are 95 % intervals.",
        ),
        Plot(
            f"{task}: what survived",
            _ifeval_plot(facts),
            "Share of prompts, or of instructions, followed; bars are 95 % intervals where they are known.",
        ),
        Plot(
            f"{task} by type of instruction",
            _types_plot(facts),
            "Strict; bars, where there are any, are 95 % Wilson intervals. Single types are few prompts, so "
            "most differences prove nothing.",
        ),
        Plot(
            "Training loss", _loss_plot(facts), "As logged: mean divergence per token since the last entry."
        ),
        Plot(
            "Held-out text during training",
            _held_out_plot(facts),
            "Distance from the teacher on text that training never saw; step 0 is the model before it.",
        ),
        Plot(
            "What the cut and the refit did to each MLP",
            _layers_plot(facts),
            "Squared error of each MLP's output relative to its size, on held-out calibration tokens.",
        ),
        Plot("Size and speed", _bars_plot(facts), "Length of a bar: relative to the teacher."),
    ]


def _agreement_plot(facts: Facts) -> str:
    rows = []
    for model in facts.models:
        measured = estimate(model.fidelity, "top1_agreement")
        if measured and model.name in (*STEP_OF_MODEL, facts.final):
            role = "student" if model.name == facts.final else "before"
            rows.append((label_of(model.name), [("agreement", role, measured)]))
    return plots.dots(
        "agreement", rows, "top-1 agreement on held-out text", "Agreement by stage", from_zero=False
    )


def _ifeval_plot(facts: Facts) -> str:
    rows = []
    for key, label in IFEVAL_FIGURES:
        entries = []
        for model, name, role in _both(facts):
            measured = estimate(model.ifeval, key)
            if measured:
                entries.append((name, role, measured))
        if entries:
            rows.append((label, entries))
    return plots.dots("ifeval", rows, "accuracy", f"{ifeval_name(facts)} of teacher and published model")


def _types_plot(facts: Facts) -> str:
    both = [(name, role, by_type(model.ifeval)) for model, name, role in _both(facts)]
    names = sorted({key for _, _, shares in both for key in shares})
    rows = [
        (key, [(name, role, shares[key]) for name, role, shares in both if key in shares]) for key in names
    ]
    return plots.dots("types", rows, "followed, strict", f"{ifeval_name(facts)} by type of instruction")


def _loss_plot(facts: Facts) -> str:
    panels = []
    for stage in facts.training:
        pairs = records.loss_points(facts, stage)
        if pairs:
            steps, losses = zip(*pairs, strict=True)
            title = records.title_of(stage)
            panels.append(Panel(title, (Series("loss", steps, losses, "student", markers=len(steps) < 30),)))
    return plots.lines("loss", panels, "optimiser step", "Training loss by step")


def _held_out_plot(facts: Facts) -> str:
    """KL and agreement over all training steps, one stage after the other."""
    curves: dict[str, tuple[list[float], list[float]]] = {"kl": ([], []), "top1": ([], [])}
    boundaries: list[tuple[float, str]] = []
    start = 0.0
    for stage in facts.training:
        found = records.held_out_points(facts, stage)
        if not found:
            continue
        if start:
            boundaries.append((start, stage))
        for point in found:
            for key, (xs, ys) in curves.items():
                if key in point:
                    xs.append(start + point["step"])
                    ys.append(point[key])
        start += max(point["step"] for point in found)
    panels = []
    for key, title in (("kl", "KL(teacher || model), nats"), ("top1", "Top-1 agreement")):
        xs, ys = curves[key]
        if xs:
            series = (Series("held-out text", xs, ys, "student"),)
            levels = _corpus_level(facts, key)
            panels.append(
                Panel(title, series, levels, boundaries, percent=key == "top1", from_zero=key == "kl")
            )
    return plots.lines("held-out", panels, "optimiser step", "Held-out KL and agreement by step")


def _corpus_level(facts: Facts, key: str) -> tuple[Level, ...]:
    student = facts.student
    if student is None:
        return ()
    name = {"kl": "kl_mean", "top1": "top1_agreement"}[key]
    corpus = student.fidelity.get("corpus")
    measured = estimate(corpus, name) if isinstance(corpus, dict) else None
    return (Level("training corpus, at the end", measured.value, "other"),) if measured else ()


def _layers_plot(facts: Facts) -> str:
    layers = records.layer_records(facts)
    series = []
    for when, label, role in (("before", "after the cut", "before"), ("after", "after the refit", "student")):
        pairs = [(i, records.layer_error(layer, when)) for i, layer in enumerate(layers)]
        known = [(float(i), value) for i, value in pairs if value is not None]
        if known:
            xs, ys = zip(*known, strict=True)
            series.append(Series(label, xs, ys, role))
    panel = Panel("Relative error of the MLP's output", series, percent=True, from_zero=True)
    return plots.lines(
        "layers", [panel], "MLP, in order", "Relative error per MLP before and after the refit"
    )


def _bars_plot(facts: Facts) -> str:
    teacher, student = facts.teacher, facts.student
    if teacher is None or student is None:
        return ""
    rows = []
    for key, label, write in _BAR_FIGURES:
        before, after = (getattr(m, key, None) or number(m.latency, key) for m in (teacher, student))
        if before and after:
            gain = change(before, after)
            if key.endswith("_tokens_per_s"):
                gain = speed_change(student, key.replace("tokens_per_s", "speedup"), before, after)
            if key == "peak_memory_bytes":
                label = memory_label(facts).removesuffix(" \u2193")
            rows.append(Bar(label, before, after, write(before), f"{write(after)} ({gain})"))
    return plots.bars("size-speed", rows, "Size and speed of teacher and published model")


def _both(facts: Facts) -> list[tuple]:
    found = []
    if facts.teacher:
        found.append((facts.teacher, "teacher", "teacher"))
    if facts.student:
        found.append((facts.student, "published model", "student"))
    return found


def _range(measured: Estimate) -> str:
    if measured.low is None or measured.high is None:
        return ""
    return f"95 % interval {100 * measured.low:.1f} to {100 * measured.high:.1f} %"
