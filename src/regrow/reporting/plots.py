"""Plots as inline SVG that follows the page's colours, light or dark, and is the same for the same data.

Matplotlib draws with stand-in colours, each of which is then replaced by a CSS variable of the page.
"""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regrow.reporting.estimate import Estimate

# Role -> (stand-in colour, CSS variable, marker). The stand-ins only have to be distinct.
_ROLES = {
    "ink": ("#0a0b0c", "--ink", ""),
    "muted": ("#6a6b6c", "--muted", ""),
    "grid": ("#dadbdc", "--line", ""),
    "teacher": ("#4a5b6c", "--teacher", "D"),
    "student": ("#0e7c6b", "--student", "o"),
    "before": ("#c06b2a", "--before", "s"),
    "other": ("#7b5ea7", "--other", "^"),
}
_FONT_PX = 9.0
# Matplotlib's SVG counts in points; the page shows one point as one CSS pixel times this.
_SCALE = 1.25


@dataclass(frozen=True)
class Series:
    """Points of one line; `role` picks its colour and marker."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    role: str
    markers: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    label: str
    y: float
    role: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes: lines, reference levels and labelled boundaries along x."""

    title: str
    series: Sequence[Series]
    levels: Sequence[Level] = ()
    boundaries: Sequence[tuple[float, str]] = ()
    percent: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Bar:
    """One quantity of teacher and student, drawn relative to the teacher's."""

    label: str
    teacher: float
    student: float
    teacher_text: str
    student_text: str


def lines(name: str, panels: Sequence[Panel], xlabel: str, description: str) -> str:
    """Panels side by side that share the meaning of x."""
    panels = [panel for panel in panels if any(len(series.xs) for series in panel.series)]
    if not panels:
        return ""
    with _style():
        figure, axes = _axes(7.2, 2.7, len(panels))
        for ax, panel in zip(axes, panels, strict=True):
            for series in panel.series:
                color, _, marker = _ROLES[series.role]
                few = series.markers and len(series.xs) <= 80
                ax.plot(
                    series.xs,
                    series.ys,
                    color=color,
                    marker=(marker or "o") if few else None,
                    markersize=3.2,
                    linewidth=1.4,
                    label=series.label,
                )
            for level in panel.levels:
                ax.axhline(
                    level.y, color=_ROLES[level.role][0], linewidth=1.1, linestyle="--", label=level.label
                )
            for x, label in panel.boundaries:
                ax.axvline(x, color=_ROLES["muted"][0], linewidth=0.8, linestyle=":")
                ax.annotate(
                    _plain(label),
                    (x, 0.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 4),
                    textcoords="offset points",
                    color=_ROLES["muted"][0],
                    fontsize=8,
                )
            ax.set_title(_plain(panel.title), loc="left")
            ax.set_xlabel(_plain(xlabel))
            ax.xaxis.get_major_locator().set_params(integer=True)
            if panel.percent:
                ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            if panel.from_zero:
                ax.set_ylim(bottom=0)
            if len(panel.series) + len(panel.levels) > 1:
                ax.legend(loc="best")
            ax.grid(True, axis="y")
        return _svg(figure, name, description)


def dots(
    name: str,
    rows: Sequence[tuple[str, Sequence[tuple[str, str, Estimate]]]],
    xlabel: str,
    description: str,
    *,
    from_zero: bool = True,
) -> str:
    """Shares with their 95 % intervals, one line of dots per row.

    Args:
        name: unique on the page.
        rows: (label, [(series label, role, share)]) from top to bottom.
        xlabel: what is shown.
        description: for readers who do not see it.
        from_zero: whether the axis begins at zero.
    """
    if not rows:
        return ""
    num_series = max(len(entries) for _, entries in rows)
    spread = 0.34 if num_series > 1 else 0.0
    with _style():
        figure, (ax,) = _axes(7.2, 0.62 + len(rows) * (0.17 + 0.11 * num_series), 1)
        named: set[str] = set()
        for index, (_, entries) in enumerate(rows):
            for place, (label, role, value) in enumerate(entries):
                offset = spread * (place - (len(entries) - 1) / 2)
                y = index + offset
                color, _, marker = _ROLES[role]
                if value.low is not None and value.high is not None:
                    ax.plot(
                        [100 * value.low, 100 * value.high],
                        [y, y],
                        color=color,
                        linewidth=1.6,
                        alpha=0.55,
                        solid_capstyle="round",
                    )
                ax.plot(
                    [100 * value.value],
                    [y],
                    color=color,
                    marker=marker or "o",
                    markersize=4.6,
                    linestyle="none",
                    label=None if label in named else _plain(label),
                )
                named.add(label)
        ax.set_yticks(range(len(rows)), [_plain(label) for label, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(_plain(xlabel))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        if from_zero:
            ax.set_xlim(left=0)
        ax.grid(True, axis="x")
        if len(named) > 1:
            ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(named), borderaxespad=0.1)
        return _svg(figure, name, description)


def bars(name: str, rows: Sequence[Bar], description: str) -> str:
    """Size and speed: the student's as a share of the teacher's, with both figures written out."""
    rows = [row for row in rows if row.teacher > 0 and row.student >= 0]
    if not rows:
        return ""
    with _style():
        figure, (ax,) = _axes(7.2, 0.5 + 0.42 * len(rows), 1)
        longest = max(1.0, *(row.student / row.teacher for row in rows))
        for index, row in enumerate(rows):
            share = row.student / row.teacher
            for offset, value, role, text in (
                (-0.19, 1.0, "teacher", row.teacher_text),
                (0.19, share, "student", row.student_text),
            ):
                ax.barh(index + offset, value, height=0.34, color=_ROLES[role][0])
                ax.annotate(
                    _plain(text),
                    (value, index + offset),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=_ROLES["ink"][0],
                )
        ax.set_yticks(range(len(rows)), [_plain(row.label) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(0, longest * 1.28)
        ax.tick_params(axis="y", length=0)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        for label, role in (("teacher", "teacher"), ("published model", "student")):
            ax.barh([0], [0], color=_ROLES[role][0], label=label)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
        return _svg(figure, name, description)


def _style() -> Any:
    import matplotlib

    ink, muted, grid = (_ROLES[role][0] for role in ("ink", "muted", "grid"))
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "regrow",
            "font.family": "DejaVu Sans",
            "font.size": _FONT_PX,
            "axes.titlesize": _FONT_PX,
            "axes.titleweight": "bold",
            "axes.edgecolor": grid,
            "axes.labelcolor": muted,
            "axes.titlecolor": ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.unicode_minus": False,
            "text.parse_math": False,
            "grid.color": grid,
            "grid.linewidth": 0.7,
            "xtick.color": muted,
            "ytick.color": ink,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8.5,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "legend.labelcolor": ink,
            "legend.handlelength": 1.4,
            "lines.solid_capstyle": "round",
        }
    )


def _axes(width: float, height: float, num: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, num, squeeze=False)[0]
    return figure, list(axes)


def _svg(figure: Any, name: str, description: str) -> str:
    """The figure as an <svg> element: no date, ids of its own, colours and font from the page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for stand_in, variable, _ in _ROLES.values():
        text = text.replace(stand_in, f"var({variable})")
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", "var(--font)")
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    width = float(view.group(1)) * _SCALE if view else 0
    opening = (
        f'<svg role="img" aria-label="{html.escape(description, quote=True)}" '
        f'style="max-width: {width:.0f}px" viewBox="{view.group(0)[9:-1] if view else ""}">'
    )
    return re.sub(r"<svg[^>]*>", lambda match: opening, text, count=1).strip()


def _plain(label: str) -> str:
    """A recorded string as a label: one line, not too long. The SVG writer escapes it."""
    text = " ".join(str(label).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
