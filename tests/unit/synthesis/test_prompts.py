"""Generated prompts: distinct, repeatable, and split by topic."""

import json
from collections import Counter

import pytest

import regrow.synthesis.prompts as prompts_module
from regrow.errors import UserError
from regrow.synthesis.decontaminate import decontaminate, decontaminate_ifeval, near_duplicates, ngrams
from regrow.synthesis.dev_set import development_set, development_set_lines, shipped_development_set
from regrow.synthesis.prompts import generate_prompts, load_material, normalise, split_material
from shared_data import shared


@pytest.fixture(scope="module")
def train():
    return generate_prompts(3000, seed=11)


@pytest.fixture(scope="module")
def held_out():
    return generate_prompts(400, seed=11, split="held_out")


def test_same_seed_same_prompts():
    assert generate_prompts(50, seed=4) == generate_prompts(50, seed=4)
    assert generate_prompts(50, seed=4) != generate_prompts(50, seed=5)


def test_prompts_are_distinct_and_complete(train):
    assert len({normalise(prompt.turns[0]) for prompt in train}) == len(train) == 3000
    assert len({prompt.id for prompt in train}) == len(train)
    for prompt in train:
        assert all(turn.strip() for turn in prompt.turns)
        if prompt.kind != "code":
            assert "{" not in "".join(prompt.turns), prompt.turns
        assert len(prompt.instruction_ids) == len(prompt.kwargs) <= 3


def test_shares(train):
    assert sum(bool(prompt.instruction_ids) for prompt in train) == 750
    assert 0.2 < sum(prompt.system is not None for prompt in train) / 3000 < 0.3
    assert 0.05 < sum(len(prompt.turns) > 1 for prompt in train) / 3000 < 0.15
    styles = tuple(load_material("train")["styles"])
    free = [prompt for prompt in train if not prompt.instruction_ids]
    assert (
        0.3 < sum(prompt.turns[0].endswith(styles) for prompt in free) / len(free) < 0.5
    )  # of the open ones half
    plain = generate_prompts(400, seed=0, style_share=0.0)
    assert not any(prompt.turns[0].endswith(styles) for prompt in plain)
    none = generate_prompts(40, seed=0, constraint_share=0.0, system_share=0.0, multi_turn_share=0.0)
    assert not any(prompt.instruction_ids or prompt.system or len(prompt.turns) > 1 for prompt in none)
    every = generate_prompts(40, seed=0, constraint_share=1.0)
    assert all(prompt.instruction_ids for prompt in every)


@pytest.mark.parametrize("num_prompts", [3_000, 40_000])  # the recommended recipe asks for the latter
def test_variety(train, num_prompts):
    prompts = train if num_prompts == 3_000 else generate_prompts(num_prompts, seed=2)
    assert len({normalise(prompt.turns[0]) for prompt in prompts}) == num_prompts
    kinds = Counter(prompt.kind for prompt in prompts)
    assert len(kinds) >= 20
    assert max(kinds.values()) < 0.2 * num_prompts
    values = load_material("train")["slots"].values()
    assert sum(map(len, values)) > 500


def test_held_out_shares_no_user_turn_and_no_near_duplicate(train, held_out):
    ours = {normalise(turn) for prompt in train for turn in prompt.turns}
    theirs = [turn for prompt in held_out for turn in prompt.turns]
    assert not [turn for turn in theirs if normalise(turn) in ours]
    pairs = near_duplicates(theirs, [turn for prompt in train for turn in prompt.turns], threshold=0.85)
    assert len(pairs) <= 0.02 * len(theirs)  # short templates; the selection of rows removes these


def test_topics_are_partitioned():
    material = load_material("train")
    train, held_out = split_material(material, "train"), split_material(material, "held_out")
    for slot, values in material["slots"].items():
        parts = train["slots"][slot], held_out["slots"][slot]
        if slot in ("audience", "tone", "language", "count"):
            assert parts == (values, values)
        else:
            assert sorted(parts[0] + parts[1]) == sorted(values)
            assert parts[1], slot
            assert not set(parts[0]) & set(parts[1])
    for name in material["follow_ups"]:
        assert not set(train["follow_ups"][name]) & set(held_out["follow_ups"][name])
        assert held_out["follow_ups"][name]


def test_no_overlap_with_ifeval(train, held_out):
    lines = shared("ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()
    benchmark = [json.loads(line)["prompt"] for line in lines]
    prompts = train + held_out + generate_prompts(3000, seed=12, constraint_share=1.0)
    texts = ["\n".join(prompt.turns) for prompt in prompts]
    assert decontaminate(texts, benchmark) == (texts, 0)
    assert decontaminate_ifeval(texts) == (texts, 0)


@pytest.mark.parametrize("name", ["constraint_share", "system_share", "multi_turn_share"])
def test_bad_share(name):
    with pytest.raises(UserError, match=name):
        generate_prompts(4, seed=0, **{name: 1.5})


def test_too_many_prompts(monkeypatch):
    monkeypatch.setattr(prompts_module, "_MAX_DRAWS_PER_PROMPT", 5)
    with pytest.raises(UserError, match="distinct held_out prompts"):
        generate_prompts(9_000, seed=0, split="held_out", constraint_share=0.0)


# --- development set ---


def test_development_set_is_rebuilt_byte_for_byte():
    assert shipped_development_set().read_text(encoding="utf-8") == development_set_lines()


def test_development_set_is_large_and_varied():
    rows = development_set()
    assert len(rows) >= 500
    assert len({row["key"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    kinds = Counter(kind for row in rows for kind in row["instruction_id_list"])
    assert len(kinds) == 25
    assert min(kinds.values()) >= 5


def test_development_set_is_disjoint(train, held_out):
    rows = development_set()
    grams = set().union(*(ngrams(row["prompt"]) for row in rows))
    constrained = generate_prompts(2000, seed=13, constraint_share=1.0)
    others = [turn for prompt in train + held_out + constrained for turn in prompt.turns]
    overlap = [turn for turn in others if not grams.isdisjoint(ngrams(turn))]
    assert overlap == []
    lines = shared("ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()
    overlap = [line for line in lines if not grams.isdisjoint(ngrams(json.loads(line)["prompt"]))]
    assert overlap == []


def test_development_and_training_material_share_nothing_but_manner():
    train, dev = load_material("train"), load_material("dev")

    def texts(material):
        values = [value for values in material["slots"].values() for value in values]
        values += [task["text"] for task in material["tasks"]] + material["yes_no"]
        values += [w for wordings in material["wordings"].values() for w in wordings]
        return {normalise(value) for value in values + material["keywords"] + material["end_phrases"]}

    assert texts(train) & texts(dev) == set()
    assert set(train["wordings"]) == set(dev["wordings"])
