"""The page stands alone, shows what was recorded, and its plots place values where they belong."""

import re
from html.parser import HTMLParser

import pytest

from regrow.reporting import plots
from regrow.reporting.estimate import Estimate
from regrow.reporting.plots import Bar, Panel, Series
from unit.reporting.fixture import full_results, only_pruned, without


class Reader(HTMLParser):
    """Tags, attributes and running text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self._inside = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("results", [full_results(), only_pruned(), {}])
def test_stands_alone(make_run, results):
    _, _, page = make_run(results)
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(reader.tags)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_ids_are_unique_and_references_resolve(full_run):
    _, _, page = full_run
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 50
    used = set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page))
    assert used <= set(ids)


def test_every_plot_of_a_full_run_and_none_without_data(make_run):
    _, _, page = make_run(full_results())
    titles = re.findall(r"<figure class=\"card\">\s*<h3>(.*?)</h3>", page)
    assert len(titles) == page.count("<svg") == 7
    _, _, page = make_run(only_pruned())
    assert "<svg" not in page
    assert "<h2>Plots</h2>" not in page
    _, _, page = make_run(without(full_results(), "ifeval"))
    assert page.count("<svg") == 5


def test_no_colour_is_fixed_in_the_plots(full_run):
    _, _, page = full_run
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
        assert "DejaVu" not in svg
        assert "aria-label=" in svg


def _placed(svg, role):
    """(x, y) of the markers of a role, in the order drawn."""
    pattern = rf'<use xlink:href="[^"]*" x="([-\d.]+)" y="([-\d.]+)" style="fill: var\(--{role}\)'
    return [(float(x), float(y)) for x, y in re.findall(pattern, svg)]


def _is_linear(values, places):
    """Whether places are an affine function of values."""
    (v0, p0), (v1, p1) = (values[0], places[0]), (values[-1], places[-1])
    slope = (p1 - p0) / (v1 - v0)
    return all(abs(p0 + slope * (v - v0) - p) < 0.01 for v, p in zip(values, places, strict=True))


def test_dots_stand_where_the_shares_are():
    shares = [0.1, 0.35, 0.2, 0.9]
    rows = [(f"r{i}", [("model", "student", Estimate(s, s - 0.05, s + 0.05))]) for i, s in enumerate(shares)]
    svg = plots.dots("t", rows, "share", "about")
    markers = _placed(svg, "student")[: len(shares)]
    assert _is_linear(shares, [x for x, _ in markers])
    assert [y for _, y in markers] == sorted(y for _, y in markers)
    line = r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"'
    whiskers = re.findall(line + r"[^>]*stroke: var\(--student\); stroke-opacity", svg)
    scale = (markers[3][0] - markers[0][0]) / 0.8
    assert len(whiskers) == 4
    for (left, _, right, _), (x, _) in zip(whiskers, markers, strict=True):
        assert float(right) - x == pytest.approx(0.05 * scale, abs=0.01)
        assert x - float(left) == pytest.approx(0.05 * scale, abs=0.01)


def test_a_share_without_interval_has_no_whisker():
    svg = plots.dots("t", [("r", [("model", "student", Estimate(0.5))])], "share", "about")
    assert "stroke-opacity" not in svg


def test_lines_pass_through_the_points():
    xs, ys = [0, 10, 20, 40], [0.12, 0.11, 0.115, 0.1]
    svg = plots.lines("t", [Panel("KL", (Series("kl", xs, ys, "student"),))], "step", "about")
    markers = _placed(svg, "student")[:4]
    assert _is_linear(xs, [x for x, _ in markers])
    assert _is_linear(ys, [y for _, y in markers])
    assert markers[0][1] < markers[3][1]  # larger values stand higher, where y is smaller


def test_bars_are_as_long_as_the_ratio():
    svg = plots.bars("t", [Bar("size", 200.0, 150.0, "200", "150")], "about")
    widths = {}
    for role in ("teacher", "student"):
        path = re.search(rf'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+)[^"]*"[^>]*var\(--{role}\)', svg)
        widths[role] = float(path.group(2)) - float(path.group(1))
    assert widths["student"] / widths["teacher"] == pytest.approx(0.75, abs=1e-3)


def test_nothing_to_draw_draws_nothing():
    assert plots.dots("t", [], "x", "d") == ""
    assert plots.lines("t", [Panel("p", ())], "x", "d") == ""
    assert plots.bars("t", [], "d") == ""
    assert plots.bars("t", [Bar("x", 0, 1, "", "")], "d") == ""


def test_plots_are_the_same_every_time():
    rows = [("a", [("m", "teacher", Estimate(0.5, 0.4, 0.6))])]
    assert plots.dots("t", rows, "x", "d") == plots.dots("t", rows, "x", "d")


def test_the_table_shows_figures_and_intervals(full_run):
    _, _, page = full_run
    plain = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "Held-out top-1 agreement ↑ – 85.8 % [85.2, 86.4] 86.5 % [85.9, 87.1] 86.8 % [86.2, 87.4]" in plain
    assert "verdict: not enough data at a margin of 1 point." in plain
    assert "121,243,968 (−9.9 %)" in plain
    assert "385.0 MB (−6.6 %)" in plain
    assert "23.7 (+8.5 %)" in plain
