import json
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.synthesis.decontaminate import (
    decontaminate,
    decontaminate_ifeval,
    drop_repeats,
    near_duplicates,
    ngrams,
    write_ngram_hashes,
)
from shared_data import shared

NINE = "one two three four five six seven eight nine"


def test_ngrams():
    assert ngrams(NINE) == {
        "one two three four five six seven eight",
        "two three four five six seven eight nine",
    }
    assert ngrams("Short, text!") == {"short text"}
    assert ngrams(" ...") == set()


def test_decontaminate_counts_and_keeps_order():
    prompts = [
        "Unrelated question about the weather in the mountains today",
        "Please: ONE, two three (four) five six... seven eight!",  # eight words of the benchmark
        "one two three four five six seven and then eight",  # seven only
        "Short text.",  # equals a short benchmark text
        "Short text here.",
    ]
    kept, removed = decontaminate(prompts, [NINE, "short TEXT"])
    assert (kept, removed) == ([prompts[0], prompts[2], prompts[4]], 2)
    assert decontaminate(prompts, [NINE], n=7) == ([prompts[0], prompts[3], prompts[4]], 2)
    assert decontaminate(prompts, []) == (prompts, 0)


def test_decontaminate_any_object():
    rows = [{"q": NINE}, {"q": "else"}]
    assert decontaminate(rows, [NINE], text_of=lambda row: row["q"]) == ([{"q": "else"}], 1)


def test_shipped_hashes_are_ifevals(tmp_path):
    lines = shared("ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    write_ngram_hashes(prompts, tmp_path / "x")
    shipped = files("regrow").joinpath("assets", "ifeval_8grams.u32").read_bytes()
    assert (tmp_path / "x").read_bytes() == shipped
    assert decontaminate_ifeval(prompts) == ([], len(prompts))
    # a few words before and after do not hide a prompt
    hidden = [f"Hello there. {prompt} Thank you!" for prompt in prompts]
    kept, _ = decontaminate_ifeval(hidden)
    assert len(kept) <= sum(len(prompt.split()) < 9 for prompt in prompts)


def test_ifeval_filter_passes_unrelated_text():
    text = shared("wikitext2/wiki.test.raw").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if len(line.split()) > 20][:1500]
    assert len(lines) > 1000
    kept, removed = decontaminate_ifeval(lines)
    assert removed <= 0.002 * len(lines)
    assert len(kept) + removed == len(lines)


WORD = st.sampled_from(["a", "b", "c", "d"])
TEXTS = st.lists(st.lists(WORD, max_size=8).map(" ".join), max_size=6)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_near_duplicates_against_all_pairs(texts, against, threshold):
    def jaccard(a, b):
        a, b = ngrams(a, 3), ngrams(b, 3)
        return len(a & b) / len(a | b) if a & b else 0.0

    naive = {i for i, a in enumerate(texts) if any(jaccard(a, b) >= threshold for b in against)}
    found = near_duplicates(texts, against, threshold=threshold)
    assert {i for i, _ in found} == naive
    assert all(jaccard(texts[i], against[j]) >= threshold for i, j in found)


def test_equal_turns_are_near_duplicates():
    assert near_duplicates(["Hello, World!", "other"], ["hello world"]) == [(0, 0)]


@pytest.mark.parametrize(("keys", "kept"), [("abab", "ab"), ("", ""), ("aNNa", "aNN")])
def test_drop_repeats(keys, kept):
    items, removed = drop_repeats(list(keys), lambda key: None if key == "N" else key)
    assert ("".join(items), removed) == (kept, len(keys) - len(kept))
