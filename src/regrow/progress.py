"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_PLAIN_INTERVAL_S = 15.0


def say(message: str) -> None:
    """One line for the person, on standard error, so that standard output stays machine-readable."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts units of work; use as a context manager.

    Args:
        what: what is being done, e.g. `"calibrate"`.
        total: how many units there are, or None where that is not known.
        unit: name of one unit in the plural, e.g. `"tokens"`.
    """

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._start, self._last_line = 0.0, time.monotonic(), time.monotonic()
        self._bar: object | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            bar = Bar(*columns, console=Console(stderr=True), transient=True)
            bar.start()
            self._task = bar.add_task(self._what, total=self._total, rate="")
            self._bar = bar
        return self

    def advance(self, units: float, note: str = "") -> None:
        """Add finished units; `note` is shown beside the rate (e.g. the loss)."""
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._describe(note))  # type: ignore[attr-defined]
        elif time.monotonic() - self._last_line >= _PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            say(f"{self._what}: {self._describe(note)}{self._remaining()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
        if kind is None:
            say(f"{self._what}: done, {self._describe('')} in {time.monotonic() - self._start:.1f} s")

    def _describe(self, note: str) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        of_total = f"/{self._total:,.0f}" if self._total is not None else ""
        text = f"{self._done:,.0f}{of_total} {self._unit}, {self._done / elapsed:,.1f} {self._unit}/s"
        return f"{text}, {note}" if note else text

    def _remaining(self) -> str:
        if self._total is None or self._done <= 0:
            return ""
        elapsed = time.monotonic() - self._start
        return f", {elapsed / self._done * (self._total - self._done):,.0f} s left"


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what begins and how long it took."""
    start = time.monotonic()
    say(f"{what} ...")
    yield
    say(f"{what}: {time.monotonic() - start:.1f} s")
