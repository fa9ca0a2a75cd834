"""Before and after, side by side: the one table that terminal, card and page share."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.files import read_json
from regrow.reporting.facts import Facts, number, read_facts
from regrow.reporting.rows import Row, table_rows
from regrow.reporting.steps import STEP_OF_MODEL
from regrow.reporting.text import count

NOT_MEASURED = "\u2013"
_ASCII = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2191": "(up)", "\u2193": "(down)"})


@dataclass(frozen=True)
class Table:
    """A table of plain strings, escaped by whoever prints it.

    Attributes:
        header: one cell per column.
        rows: cells; every row is as long as the header.
        caption: a sentence under the table, or empty.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __bool__(self) -> bool:
        return bool(self.rows)


def before_after_table(results: dict[str, Any] | Facts) -> Table:
    """Every figure that was measured, one row each, for the teacher and every model of the run.

    Args:
        results: the value of a run's results.json, or its facts.

    Returns:
        Header `("", "Teacher", ..., "Change")`; a cell that was not measured holds a dash; rows without any
        measured cell are left out. `Change` compares the published model with the teacher and is left out
        where nothing can be compared.
    """
    facts = results if isinstance(results, Facts) else read_facts(results)
    models = facts.models
    if not models:
        return Table(("",), ())
    rows = []
    for row in table_rows(facts):
        found = [row.read(model) for model in models]
        if not any(found):
            continue
        cells = [row.write(value) if value else NOT_MEASURED for value in found]
        rows.append((row.label, *cells, _versus(row, facts)))
    header = ("", *(label_of(model.name) for model in models), "Change")
    if all(not row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(header, tuple(rows), _caption(facts, rows))


def label_of(name: str) -> str:
    """How a model of the run is called in tables and plots."""
    if name == "teacher":
        return "Teacher"
    return STEP_OF_MODEL[name].model_label if name in STEP_OF_MODEL else name


def print_summary(run_dir: str | Path) -> None:
    """Print the table of a finished run and where its results lie, on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    run_dir = Path(run_dir)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows no arrows shows question marks instead of failing after hours of work.
        sys.stdout.reconfigure(errors="replace")
    console = Console()
    known = _can_write("\u2212\u2013\u2191\u2193", console.encoding)

    def text(value: str) -> Text:
        return Text(value if known else value.translate(_ASCII))

    table = _narrowed(before_after_table(read_json(run_dir / "results.json")), console.width)
    if table:
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, title in enumerate(table.header):
            shown.add_column(text(title), justify="left" if index == 0 else "right", no_wrap=index > 0)
        for row in table.rows:
            shown.add_row(*(text(cell.replace(" [", "\n[")) for cell in row))
        console.print(shown)
        if table.caption:
            console.print(text(table.caption))
    for what, path in (
        ("model", run_dir / "model"),
        ("card", run_dir / "model" / "README.md"),
        ("page", run_dir / "report.html"),
        ("figures", run_dir / "results.json"),
    ):
        if path.exists():
            console.print(Text(f"{what:8}{path}"), soft_wrap=True)


def _can_write(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _narrowed(table: Table, width: int) -> Table:
    """The table without the models between teacher and final one, as many as do not fit a terminal."""
    last = len(table.header) - 1 - (table.header[-1] == "Change")
    while last > 2 and _printed_width(table) > width:
        last -= 1
        kept = [index for index in range(len(table.header)) if index != last]
        table = Table(
            tuple(table.header[i] for i in kept),
            tuple(tuple(row[i] for i in kept) for row in table.rows),
            table.caption,
        )
    return table


def _printed_width(table: Table) -> int:
    columns = zip(table.header, *table.rows, strict=True)
    widths = [max(len(part) for cell in cells for part in cell.split(" [")) + 3 for cells in columns]
    # The first column may wrap.
    return sum(widths[1:]) + min(widths[0], 26)


def _versus(row: Row, facts: Facts) -> str:
    if facts.teacher is None or facts.student is None:
        return ""
    before, after = row.read(facts.teacher), row.read(facts.student)
    return row.versus(facts.teacher, facts.student, before.value, after.value) if before and after else ""


def _caption(facts: Facts, rows: list[tuple[str, ...]]) -> str:
    parts = []
    if any("[" in cell for row in rows for cell in row):
        parts.append("Brackets hold 95 % intervals.")
    student = facts.student
    tokens = number(student.fidelity, "num_tokens") if student else None
    if tokens:
        parts.append(f"Held-out figures are over {count(tokens)} tokens.")
    if any(NOT_MEASURED in row for row in rows):
        parts.append(f"{NOT_MEASURED}: not measured, or true by definition.")
    return " ".join(parts)
