"""Strings and shapes that nobody expects: no markup gets out, nothing crashes, nothing is invented."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from regrow.errors import UserError
from regrow.reporting.card import render_card
from regrow.reporting.facts import read_facts
from regrow.reporting.page import render_page
from regrow.reporting.report import write_report
from regrow.reporting.table import before_after_table
from unit.reporting.fixture import full_results

EVIL = "x\n---\nlicense: mit\n---\n<script>alert(1)</script>](http://evil.example) | {{ 7*7 }} `*_$\u202e\x00"
MARKDOWN = MarkdownIt("commonmark").enable("table")


def _replace_strings(value, evil):
    if isinstance(value, dict):
        return {key: _replace_strings(item, evil) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_strings(item, evil) for item in value]
    return evil if isinstance(value, str) else value


def _tags(html_text):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Reader().feed(html_text)
    return found


def _paths(value, path=()):
    """Paths to every value inside a JSON value."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield (*path, key)
            yield from _paths(item, (*path, key))


def _put(value, path, new):
    *parents, last = path
    for key in parents:
        value = value[key]
    value[last] = new


def test_hostile_strings_everywhere(make_run):
    results = _replace_strings(full_results(), EVIL)
    by_type = results["models"]["recovered"]["ifeval"]["by_type"]
    by_type[EVIL] = by_type.pop("startend:quotation")
    results["environment"]["versions"][EVIL] = EVIL
    results["final"] = "recovered"
    _, card, page = make_run(results, {"model_type": EVIL, "architectures": [EVIL]})

    tags = _tags(page)
    assert "script" not in {tag for tag, _ in tags}
    assert "a" not in {tag for tag, _ in tags}
    assert "{{ 7*7 }}" in page
    assert r"{{ 7\*7 }}" in card.replace("\\{", "{").replace("\\}", "}")
    parsed = ModelCard(card)
    header = yaml.safe_load(card.split("\n---\n", 1)[0])
    assert header["license"] != "mit"
    assert set(header) <= {
        *("base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "language"),
        *("datasets", "tags", "model-index"),
    }
    rendered = MARKDOWN.render(parsed.text)
    found = {tag for tag, _ in _tags(rendered)}
    assert not {"script", "a", "img"} & found
    assert parsed.text.lstrip().startswith("# Model Card for ")


def test_tables_keep_their_columns(make_run):
    _, card, _ = make_run(_replace_strings(full_results(), "a | b"))
    rendered = MARKDOWN.render(ModelCard(card).text)
    for table in re.findall(r"<table>.*?</table>", rendered, flags=re.DOTALL):
        columns = {
            row.count("<td") + row.count("<th") for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
        }
        assert len(columns) == 1


JUNK = st.sampled_from(
    [None, "text", "", 0, -1, 3.5, 1e308, True, [], {}, [None], {"x": [1]}, math.nan, [[1, 2]]]
)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_part_may_be_missing_or_nonsense(data):
    results = full_results()
    paths = [path for path in _paths(results) if "layers" not in path[:-1] and len(path) < 7]
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=6)):
        try:
            _put(results, path, copy.deepcopy(data.draw(JUNK)))
        except (KeyError, TypeError, IndexError):
            continue
    facts = read_facts(results)
    before_after_table(facts)
    card = str(render_card(facts))
    assert ModelCard(card).text.strip().startswith("# Model Card for ")


def test_the_card_survives_a_corpus_without_a_usable_name():
    for junk in ([], {"x": 1}, None):
        results = full_results()
        results["recipe"]["corpora"][0]["source"] = junk
        assert "# Model Card for " in str(render_card(read_facts(results)))


def test_the_page_survives_every_part_being_nonsense():
    junk = ["text", [1, 2], -1, math.nan, {"x": 1}]
    for place, key in enumerate(("models", "stages", "recipe", "environment", "final")):
        results = full_results()
        results[key] = junk[place]
        assert render_page(read_facts(results)).startswith("<!doctype html>")


def test_the_card_survives_every_second_level_being_nonsense():
    for path in [path for path in _paths(full_results()) if len(path) == 2]:
        for junk in ("text", [1, 2]):
            results = full_results()
            _put(results, path, junk)
            assert "# Model Card" in str(render_card(read_facts(results)))


@pytest.mark.parametrize("value", [None, [], "text", 3, {"stages": 1, "models": [], "notes": "x"}])
def test_results_of_another_shape(value):
    facts = read_facts(value)
    assert "<h1>" in render_page(facts)
    assert "# Model Card" in str(render_card(facts))


def test_no_results_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(run_dir=tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        write_report(run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_run_without_a_model_folder_still_has_a_page(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(full_results()))
    written = write_report(run_dir=tmp_path)
    assert "card" not in written
    assert "no model folder" in written["notes"][0]
    assert (tmp_path / "report.html").exists()
