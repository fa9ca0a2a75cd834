import json

import pytest

from regrow.data.blend import encode_corpora
from regrow.data.corpora import open_corpus
from regrow.data.health import corpus_health, corpus_problems, corpus_statistics, is_refusal
from regrow.modeling.load import load_tokenizer
from tiny_models import save_tiny_model


def row(answer="An answer.", finished=True, strict=None, question="Q?"):
    meta = {"finished": finished, "num_tokens": 4}
    if strict is not None:
        kinds = ["punctuation:no_comma", "startend:quotation"][: len(strict)]
        meta |= {"follow_strict": strict, "instruction_id_list": kinds}
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "meta": meta}


def test_statistics():
    rows = [row("one two three"), row("one", finished=False), row(strict=[True, False]), row(strict=[True])]
    rows[0]["messages"] = [{"role": "system", "content": "s"}, *rows[0]["messages"], *rows[0]["messages"]]
    found = corpus_statistics(rows)
    assert (found["num_rows"], found["num_answers"], found["num_multi_turn"], found["num_with_system"]) == (
        4,
        5,
        1,
        1,
    )
    assert found["cut_off_share"] == 0.25
    assert found["response_tokens"] == 16
    assert found["answer_words"] == {"mean": 11 / 5, "p5": 1, "p50": 2, "p95": 3}
    assert (found["num_constrained"], found["prompt_level_strict"]) == (2, 0.5)
    assert found["inst_level_strict"] == pytest.approx(2 / 3)
    assert found["inst_level_strict_by_type"] == {"punctuation:no_comma": 1.0, "startend:quotation": 0.0}
    assert corpus_health(rows)["problems"] == []


def test_mostly_cut_off_is_a_problem():
    assert "cut off" in corpus_health([row(finished=False)] * 6 + [row()] * 4)["problems"][0]
    assert corpus_health([row(finished=False)] * 5 + [row()] * 5)["problems"] == []


def test_mostly_violating_is_a_problem():
    bad = corpus_health([row()] * 90 + [row(strict=[True, False])] * 6 + [row(strict=[True])] * 4)
    assert "60% of the answers to prompts with constraints" in bad["problems"][0]
    assert corpus_health([row(strict=[False])] * 5 + [row(strict=[True])] * 5)["problems"] == []


def test_refusals_are_a_problem():
    text = "I'm sorry, but I can't help with that."
    assert "refusals" in corpus_health([row(text)] * 3 + [row()] * 7)["problems"][0]


def test_nothing_known_nothing_judged():
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    found = corpus_health(rows)
    assert found["problems"] == []
    assert found["cut_off_share"] is None
    assert found["prompt_level_strict"] is None
    assert corpus_health([])["problems"] == ["The corpus holds no answers; check its files."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I’m sorry, but I can’t assist with that request.", True),
        ("I cannot help with this.", True),
        ("As an AI language model, I don't have feelings.", True),
        ("Unfortunately, I am unable to open links.", True),
        ("Penguins cannot fly, but they swim well.", False),
        ("Dear Anna, I'm sorry that you had to wait.", False),
        ("Once upon a time there was a robot.", False),
        ("A" * 500 + " I cannot help with this.", False),
    ],
)
def test_refusals(text, expected):
    assert is_refusal(text) is expected


def test_a_corpus_that_should_not_be_learnt_from_is_reported_when_it_is_read(tmp_path, capsys):
    tokenizer = load_tokenizer(save_tiny_model("llama_tied", tmp_path / "model"))
    rows = [row(finished=False)] * 6 + [row()] * 4
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = [{"messages": item["messages"]} for item in rows]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    bad, silent = (
        encode_corpora(tokenizer, [(str(tmp_path / name), "train", 1.0, None)], max_length=64)
        for name in ("bad.jsonl", "plain.jsonl")
    )
    assert any("60% of the answers are cut off" in note for note in bad.notes)
    assert "60% of the answers are cut off" in capsys.readouterr().err
    assert not any("cut off at the token limit" in note for note in silent.notes)


@pytest.mark.parametrize(
    "meta",
    [
        {"num_tokens": None, "finished": None, "follow_strict": None, "instruction_id_list": None},
        {"num_tokens": "12"},
        {"follow_strict": True},
        {"follow_strict": [False], "instruction_id_list": []},
        {"pile_set_name": "Books"},
        "a string",
    ],
)
def test_other_peoples_notes_are_not_judged(tmp_path, meta):
    rows = [{"messages": row()["messages"], "meta": meta}, {"text": "plain", "meta": meta}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert corpus_problems(open_corpus(str(tmp_path / "c.jsonl"))) == []
