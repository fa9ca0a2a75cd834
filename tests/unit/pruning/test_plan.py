import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.errors import UserError
from regrow.pruning.plan import format_ranges, load_plan, save_plan
from regrow.types import PruningPlan

PLAN = PruningPlan(
    parent="ab" * 32,
    width={"dense": 5, "mtp": 5},
    kept={"layers.0": (0, 1, 2, 5, 9), "layers.1": (3, 4, 7, 8, 9), "mtp.layers.0": (0, 2, 4, 6, 8)},
    origin={"criterion": "wanda", "seed": 0, "notes": ["é"]},
)


def test_a_plan_reads_back_and_gives_the_same_bytes(tmp_path):
    save_plan(PLAN, tmp_path / "a.json")
    assert load_plan(tmp_path / "a.json") == PLAN
    save_plan(load_plan(tmp_path / "a.json"), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert '"layers.0": "0-2,5,9"' in (tmp_path / "a.json").read_text()


@given(st.sets(st.integers(0, 300), min_size=1))
def test_any_channels_survive_the_file(tmp_path_factory, channels):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    kept = tuple(sorted(channels))
    save_plan(PruningPlan("p", {"dense": len(kept)}, {"layers.0": kept}), path)
    assert load_plan(path).kept == {"layers.0": kept}


def test_ranges_are_as_short_as_they_can_be():
    assert format_ranges((0, 1, 2, 4, 6, 7)) == "0-2,4,6-7"
    assert format_ranges((3,)) == "3"
    assert format_ranges(()) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"regrow_plan": 2},
        {"parent": None},
        {"origin": []},
        {"width": {"dense": "5"}},
        {"width": {"dense": 0}},
        {"width": {"dense": True}},
        {"width": []},
        {"kept": {"layers.0": [0, 1]}},
        {"kept": {"layers.0": ""}},
        {"kept": {"layers.0": "0-99999999"}},
        {"kept": {"layers.0": "3,2"}},
        {"kept": {"layers.0": "2-1"}},
        {"kept": {"layers.0": "0,0"}},
        {"kept": {"layers.0": "-1"}},
        {"kept": {"layers.0": "0-2,x"}},
        {"kept": {"layers.0": "٣"}},
        {"width": {"dense": 10**12}, "kept": {"layers.0": "0-99999998"}},
    ],
)
def test_damaged_plans_are_refused(tmp_path, change):
    save_plan(PLAN, tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text()) | change
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(UserError):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "1" * 5000, "[" * 100_000, '"\\ud800"', "\0"])
def test_what_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError):
        load_plan(tmp_path / "plan.json")
