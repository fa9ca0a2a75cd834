"""The before/after table against hand-written rows, and its printed form."""

import json

import pytest

from regrow.reporting.table import before_after_table, print_summary
from unit.reporting.fixture import full_results, only_pruned, without


def rows_of(results):
    table = before_after_table(results)
    return table.header, {row[0]: row[1:] for row in table.rows}


def test_rows_of_a_full_run():
    header, rows = rows_of(full_results())
    assert header == ("", "Teacher", "Pruned", "Distilled", "Recovered", "Change")
    assert rows["Parameters"] == ("134,515,008", "–", "–", "121,243,968", "−9.9 %")
    assert rows["Weights on disk"] == ("269.0 MB", "242.5 MB", "242.5 MB", "242.5 MB", "−9.9 %")
    assert rows["Held-out top-1 agreement ↑"] == (
        "–",
        "85.8 % [85.2, 86.4]",
        "86.5 % [85.9, 87.1]",
        "86.8 % [86.2, 87.4]",
        "",
    )
    assert rows["Held-out perplexity ↓"][0] == "7.38 [7.10, 7.66]"
    assert rows["Held-out perplexity ↓"][-1] == "+2.7 %"
    assert rows["IFEval, instruction level, strict ↑"][-1] == "−1.6 points"
    assert rows["Decode (tokens/s) ↑"] == ("21.9", "–", "–", "23.7", "+8.5 %")
    assert all(len(row) == len(header) - 1 for row in rows.values())


def test_speed_ratios_are_the_paired_ones_where_measured():
    results = full_results()
    del results["models"]["recovered"]["latency"]["decode_speedup"]
    _, rows = rows_of(results)
    assert rows["Prefill (tokens/s) ↑"][-1] == "+11.2 %"  # prefill_speedup 1.112
    assert rows["Decode (tokens/s) ↑"][-1] == "+8.2 %"  # 23.7 / 21.9
    assert "Peak memory (whole process) ↓" in rows


def test_rows_that_nobody_measured_are_absent():
    _, rows = rows_of(without(full_results(), "ifeval"))
    assert not any("IFEval" in label or "Answer" in label for label in rows)
    assert "Parameters" in rows


def test_a_run_without_measurements_has_what_the_writer_counted():
    header, rows = rows_of(only_pruned())
    assert header == ("", "Pruned")
    assert rows == {"Weights on disk": ("242.5 MB",)}


def test_nothing_at_all():
    assert not before_after_table({})


def test_prompt_level_without_recorded_interval_gets_wilsons_and_instructions_get_none():
    results = full_results()
    for name in ("teacher", "recovered"):
        del results["models"][name]["ifeval"]["intervals"]
    _, rows = rows_of(results)
    assert rows["IFEval, prompt level, strict ↑"][0] == "18.7 % [15.6, 22.2]"
    assert rows["IFEval, instruction level, strict ↑"][0] == "30.6 %"


@pytest.mark.parametrize("columns", [70, 100, 140])
def test_the_printed_table_is_whole_at_any_width(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "results.json").write_text(json.dumps(full_results()))
    (tmp_path / "report.html").write_text("")
    print_summary(tmp_path)
    printed = capsys.readouterr().out
    assert "134,515,008" in printed
    assert "121,243,968" in printed
    assert "[86.2, 87.4]" in printed
    assert ("[85.9, 87.1]" in printed) == (columns > 110)
    assert f"page    {tmp_path / 'report.html'}" in printed
    assert "card " not in printed
    table = printed.split("Brackets")[0]
    assert max(len(line) for line in table.splitlines()) <= columns


def test_hostile_names_are_not_markup_for_rich(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    results = full_results()
    results["models"]["[bold]x[/bold]"] = results["models"].pop("recovered")
    results["final"] = "[bold]x[/bold]"
    (tmp_path / "results.json").write_text(json.dumps(results))
    print_summary(tmp_path)
    assert "[bold]x[/bold]" in capsys.readouterr().out.replace("\n", "")
