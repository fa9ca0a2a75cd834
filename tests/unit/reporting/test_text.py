"""Figures and escaping against hand-written expectations and an independent Markdown renderer."""

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from regrow.evaluation.intervals import wilson_interval
from regrow.reporting import text
from regrow.reporting.estimate import Estimate, interval_of, share

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0, 4, "0"),
        (0.0, 4, "0"),
        (12, 4, "12"),
        (0.11874, 3, "0.119"),
        (-0.0156, 2, "-0.016"),
        (7.378, 3, "7.38"),
        (1912.7, 3, "1,913"),
        (123456789, 4, "123,456,789"),
        (0.00005, 2, "5.0e-05"),
        (float("nan"), 3, "nan"),
        (None, 3, "None"),
        (True, 3, "True"),
    ],
)
def test_figure(value, digits, expected):
    assert text.figure(value, digits) == expected


def test_sizes_counts_and_times():
    assert text.size(269_030_016) == "269.0 MB"
    assert text.size(8_386_470_912) == "8.39 GB"
    assert text.size(512) == "512 B"
    assert text.short_count(134_515_008) == "134.5 M"
    assert text.short_count(4_539_265_536) == "4.54 B"
    assert text.short_count(9_999) == "9,999"
    assert text.duration(59.94) == "59.9 s"
    assert text.duration(71.25) == "1 min 11 s"
    assert text.duration(3_599.6) == "1 h 00 min"
    assert text.duration(4_058.6) == "1 h 08 min"
    assert text.change(134_515_008, 121_243_968) == "\u22129.9 %"
    assert text.change(0, 5) == ""
    assert text.points(-0.0156) == "\u22121.6"
    assert text.points(0.02) == "+2.0"


def test_intervals_are_written_beside_the_figure():
    assert text.share_with_interval(Estimate(0.306, 0.271, 0.342)) == "30.6 % [27.1, 34.2]"
    assert text.share_with_interval(Estimate(0.306)) == "30.6 %"
    assert text.value_with_interval(Estimate(0.1187, 0.1102, 0.1275)) == "0.119 [0.110, 0.128]"


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (1, 2), (255, 834), (101, 541)])
def test_wilson_agrees_with_the_other_implementation(correct, total):
    measured = share(correct, total)
    low, high = wilson_interval(correct, total)
    assert measured.value == correct / total
    assert (measured.low, measured.high) == pytest.approx((low, high), abs=1e-12)


def test_wilson_by_hand():
    # n = 10, p = 0.5, z = 1.96: centre 0.5, half width 1.96 * sqrt(0.25/10 + 0.9604/100) / 1.38415
    assert share(5, 10).low == pytest.approx(0.23659, abs=1e-5)


@pytest.mark.parametrize("value", [None, [1], [1, "2"], [2, 1], [True, 2], {"low": 1}, "12"])
def test_what_is_no_interval(value):
    assert interval_of(value) is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-4B"),
        ("builtin:smollm2-chat", "builtin:smollm2-chat"),
        ("/home/ada/models/qwen", "qwen"),
        ("../data/held_out.jsonl", "held_out.jsonl"),
        ("data/held_out.jsonl", "held_out.jsonl"),
        ("C:\\models\\qwen", "qwen"),
    ],
)
def test_public_name_never_holds_somebodys_folders(source, expected):
    assert text.public_name(source) == expected


def test_paths_inside_sentences_are_shortened():
    said = "/home/ada/x.jsonl: 3 of 9 rows of ~/y/z.txt, ../d/e used; see https://hub.example/a/b and 3/4."
    assert text.without_paths(said) == (
        "x.jsonl: 3 of 9 rows of z.txt, e used; see https://hub.example/a/b and 3/4."
    )


def _shown(markdown: str) -> tuple[str, str]:
    """What a Markdown renderer makes of it, as HTML and as plain text."""
    rendered = MARKDOWN.render(markdown)
    return rendered, html.unescape(re.sub(r"<[^>]*>", "", rendered)).strip()


NASTY = [
    "*a* _b_ __c__ ~~d~~ `e`",
    "a_b_c down_proj _x",
    "[x](http://evil.example) ![y](z.png) [1]: http://evil.example",
    "<script>alert(1)</script><b>",
    "# heading",
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "> quote",
    "--- ",
    "===",
    "&lt;b&gt; &amp; &#42;",
    "back\\slash \\* \\",
    "a | b | c",
    "$x^2$",
    "[0.1, 0.2] [0.1, 0.2](http://evil.example)",
    "``` fence",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_markdown_shows_a_string_literally(nasty):
    rendered, plain = _shown(text.escape_markdown(nasty))
    assert plain == nasty.strip()
    assert set(re.findall(r"<(\w+)", rendered)) <= {"p"}


@given(st.text(alphabet=st.sampled_from("a1 _*`[](){}<>|#~$&;:!\\-+=.\n\t\u202e/"), max_size=25))
@settings(max_examples=400, deadline=None)
def test_no_string_becomes_markup(value):
    rendered, plain = _shown(text.escape_markdown(value))
    assert set(re.findall(r"<(\w+)", rendered)) <= {"p"}
    assert " ".join(plain.split()) == " ".join(text.one_line(value).split())


@given(st.text(alphabet=st.sampled_from("a1 _*`[]()<>|#&\\\n"), max_size=25))
@settings(max_examples=200, deadline=None)
def test_no_string_breaks_a_table(value):
    cell = text.escape_markdown(value)
    rendered = MARKDOWN.render(f"| h | i |\n| --- | --- |\n| {cell} | last |\n")
    assert rendered.count("<td>") == 2
    assert "<td>last</td>" in rendered


def test_code_spans_hold_back_ticks_and_bars():
    rendered, plain = _shown(text.code_span("a`b``c"))
    assert "<code>" in rendered
    assert plain == "a`b``c"
