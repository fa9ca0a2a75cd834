"""Figures as people read them, and the escaping that keeps recorded strings from becoming markup."""

import math
import re
from pathlib import PurePosixPath
from typing import Any, TypeGuard

from regrow.reporting.estimate import Estimate

_MARKDOWN = re.compile(
    r"[\\`*{}\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+=-](?=[\s#+=-]|$)|^\d+(?=[.)](\s|$))"
)
_INTERVAL = re.compile(r"(\[[-+\u2212]?[\d.,]+, [-+\u2212]?[\d.,]+\])(?![(\[:])")
_PATH = re.compile(r"(?<![\w:/.~])(?:~|\.{1,2})?/(?:[^\s/]+/)*([^\s/]+)")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a recorded value is a finite number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_line(value: Any) -> str:
    """A recorded value on one line, without control and direction-changing characters."""
    return _CONTROL.sub(" ", str(value)).strip()


def escape_markdown(value: Any) -> str:
    """A recorded string that Markdown (also in a table cell) shows literally."""
    parts = _INTERVAL.split(one_line(value))
    # Every second part is an interval such as [0.1, 0.2], which no renderer takes for anything else.
    parts[::2] = [_MARKDOWN.sub(_backslash, part) for part in parts[::2]]
    return _ENTITY.sub("&amp;", "".join(parts)).replace("<", "&lt;").replace(">", "&gt;")


def _backslash(match: re.Match[str]) -> str:
    text = match.group(0)
    return f"{text}\\" if text.isdigit() else f"\\{text}"


def code_span(value: Any) -> str:
    """A recorded string as inline code, safe inside a table cell."""
    text = one_line(value).replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def is_hub_id(source: Any) -> bool:
    """Whether a source is written like `owner/name` on the Hub rather than like a path on some disk."""
    text = str(source)
    return _HUB_ID.fullmatch(text) is not None and not re.search(
        r"\.(jsonl?|parquet|gz|csv|txt|ya?ml)$", text
    )


def public_name(source: Any) -> str:
    """How a model or corpus is called in public: a Hub id or builtin name whole, of a path only its end.

    The folders of somebody's disk are nobody else's business and would be wrong anywhere else.
    """
    text = one_line(source)
    if is_hub_id(text) or text.startswith("builtin:"):
        return text
    return PurePosixPath(text.replace("\\", "/")).name or text


def without_paths(text: Any) -> str:
    """A recorded sentence with every path of somebody's disk shortened to its last part."""
    return _PATH.sub(r"\1", one_line(text))


def count(value: Any) -> str:
    """A whole number with thousands separators."""
    return f"{value:,.0f}" if is_number(value) else one_line(value)


def short_count(value: float) -> str:
    """A large number with a suffix: 134,515,008 -> `134.5 M`."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.2f} {suffix}" if suffix in "TB" else f"{scaled:.1f} {suffix}"
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units, as the Hub shows them."""
    for limit, unit, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if abs(num_bytes) >= limit:
            return f"{num_bytes / limit:.{digits}f} {unit}"
    return f"{num_bytes:,.0f} B"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: two parts at most."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def figure(value: Any, digits: int = 4) -> str:
    """A measured figure with `digits` significant digits, as plain decimals where that is readable."""
    if isinstance(value, bool) or value is None:
        return one_line(value)
    if not is_number(value):
        return one_line(value)
    if isinstance(value, int) or (abs(value) < 1e15 and value == int(value) and abs(value) >= 10**digits):
        return f"{value:,.0f}"
    if value != 0 and not 1e-4 <= abs(value) < 10**6:
        return f"{value:.{digits - 1}e}"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share as percent: 0.1667 -> `16.7 %`."""
    return f"{100 * share:.{digits}f} %"


def change(before: float, after: float) -> str:
    """Relative change with its sign: `-14.0 %`; empty where there is nothing to divide by."""
    if not before:
        return ""
    return f"{100 * (after - before) / before:+.1f} %".replace("-", "\u2212")


def points(difference: float) -> str:
    """A difference of two shares in percentage points with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "\u2212")


def share_with_interval(estimate: Estimate, digits: int = 1) -> str:
    """A share in percent with its 95 % interval where there is one: `30.6 % [27.5, 33.8]`."""
    text = percent(estimate.value, digits)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{100 * estimate.low:.{digits}f}, {100 * estimate.high:.{digits}f}]"


def value_with_interval(estimate: Estimate, digits: int = 3) -> str:
    """A figure with its 95 % interval where there is one: `0.1187 [0.1102, 0.1275]`."""
    text = figure(estimate.value, digits)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{figure(estimate.low, digits)}, {figure(estimate.high, digits)}]"
