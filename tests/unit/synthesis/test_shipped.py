"""The shipped corpus: what was held out stays out, and every recorded fact can be recomputed."""

import json
from importlib.resources import files

import pytest

from regrow.data.constrained import is_followed
from regrow.data.constraints import PUNKT_KINDS, check_response
from regrow.data.corpora import read_corpus
from regrow.data.health import corpus_health
from regrow.synthesis.decontaminate import decontaminate, decontaminate_ifeval, near_duplicates
from regrow.synthesis.prompts import generate_prompts, normalise
from regrow.synthesis.selection import user_turns
from shared_data import shared

NAMES = {"train": "smollm2-chat", "held_out": "smollm2-chat-heldout"}
SEED, NUM_PROMPTS, NUM_HELD_OUT = 0, 1_500, 240  # as the corpus was made; see assets/corpora/README.md


def path_of(split):
    return files("regrow").joinpath("assets", "corpora", f"{NAMES[split]}.jsonl")


@pytest.fixture(scope="module")
def corpus():
    return {
        split: [json.loads(line) for line in path_of(split).read_text(encoding="utf-8").splitlines()]
        for split in NAMES
    }


@pytest.fixture(scope="module")
def turns(corpus):
    return {split: [turn for row in rows for turn in user_turns(row)] for split, rows in corpus.items()}


def test_no_user_turn_is_in_both_splits(turns):
    assert not set(turns["train"]) & set(turns["held_out"])
    assert not {normalise(t) for t in turns["train"]} & {normalise(t) for t in turns["held_out"]}


def test_no_near_duplicate_is_in_both_splits(turns):
    assert near_duplicates(turns["train"], turns["held_out"]) == []


def test_no_overlap_with_ifeval(turns):
    texts = turns["train"] + turns["held_out"]
    assert decontaminate_ifeval(texts) == (texts, 0)
    lines = shared("ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert decontaminate(texts, [json.loads(line)["prompt"] for line in lines]) == (texts, 0)


def test_no_overlap_with_the_development_set(turns):
    lines = files("regrow").joinpath("assets", "dev_ifeval.jsonl").read_text(encoding="utf-8").splitlines()
    texts = turns["train"] + turns["held_out"]
    assert decontaminate(texts, [json.loads(line)["prompt"] for line in lines]) == (texts, 0)


def test_no_conversation_twice(corpus):
    rows = corpus["train"] + corpus["held_out"]
    assert len({"\n".join(normalise(t) for t in user_turns(row)) for row in rows}) == len(rows)
    answers = [normalise(row["messages"][-1]["content"]) for row in rows]
    long = [answer for answer in answers if len(answer.split()) >= 8]
    assert len(set(long)) == len(long)


def test_prompts_are_those_of_the_generator(corpus):
    for split, count in (("train", NUM_PROMPTS), ("held_out", NUM_HELD_OUT)):
        by_id = {p.id: p for p in generate_prompts(count, seed=SEED, split=split, style_share=0.0)}
        for row in corpus[split]:
            prompt = by_id[row["meta"]["prompt_id"]]
            assert tuple(user_turns(row)) == prompt.turns
            assert row["meta"]["split"] == split
            assert row["meta"].get("kwargs", []) == list(prompt.kwargs)


def test_conversations_are_whole(corpus):
    for row in corpus["train"] + corpus["held_out"]:
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])
        assert all("<|im_" not in message["content"] for message in row["messages"])
        assert row["meta"]["finished"]


def test_verdicts_can_be_recomputed(corpus, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(shared("nltk_data/tokenizers/punkt_tab/README").parents[2]))
    checked = [row for row in corpus["train"] + corpus["held_out"] if "kwargs" in row["meta"]]
    assert {kind for row in checked for kind in row["meta"]["instruction_id_list"]} >= PUNKT_KINDS
    for row in checked[::3]:
        meta = row["meta"]
        verdict = check_response(
            user_turns(row)[-1], row["messages"][-1]["content"], meta["instruction_id_list"], meta["kwargs"]
        )
        assert (verdict.strict, verdict.loose) == (meta["follow_strict"], meta["follow_loose"])


def test_size_and_health(corpus):
    assert sum(len(path_of(split).read_bytes()) for split in NAMES) <= 2_000_000
    assert len(corpus["held_out"]) >= 100
    assert len(corpus["train"]) >= 5 * len(corpus["held_out"])
    for rows in corpus.values():
        assert corpus_health(rows)["problems"] == []


def test_builtin_names(corpus):
    for split, name in NAMES.items():
        assert len(read_corpus(f"builtin:{name}")) == len(corpus[split])


def test_followed_answers_are_followed_and_their_prompts_are_nowhere_else(turns):
    examples = read_corpus("builtin:smollm2-followed")
    assert len(examples) == 223
    assert all(map(is_followed, examples))
    asked = [example.messages[-2]["content"] for example in examples]
    assert not {normalise(t) for t in asked} & {normalise(t) for t in turns["train"] + turns["held_out"]}
    assert near_duplicates(asked, turns["held_out"]) == []
    assert decontaminate_ifeval(asked) == (asked, 0)
    lines = files("regrow").joinpath("assets", "dev_ifeval.jsonl").read_text(encoding="utf-8").splitlines()
    assert decontaminate(asked, [json.loads(line)["prompt"] for line in lines]) == (asked, 0)
