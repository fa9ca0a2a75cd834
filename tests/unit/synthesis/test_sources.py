import json
from types import SimpleNamespace

import pytest

from regrow.errors import UserError
from regrow.synthesis.decontaminate import near_duplicates
from regrow.synthesis.prompts import make_prompt, normalise
from regrow.synthesis.sources import hold_out, read_prompts, self_prompts, user_header
from tiny_models import save_tiny_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("First thing?\n\nSecond thing?\nfirst  THING\n", encoding="utf-8")
    assert [prompt.turns for prompt in read_prompts(path)] == [("First thing?",), ("Second thing?",)]


def test_jsonl_rows(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        [
            {"prompt": "A?", "system": "S"},
            {
                "prompt": "B?",
                "instruction_id_list": ["keywords:existence"],
                "kwargs": [{"keywords": ["x"], "n": None}],
            },
            {"instruction": "C", "input": "text"},
            {
                "messages": [
                    {"role": "user", "content": "D"},
                    {"role": "assistant", "content": "d"},
                    {"role": "user", "content": "E"},
                ]
            },
        ],
    )
    prompts = read_prompts(path)
    assert [prompt.turns for prompt in prompts] == [("A?",), ("B?",), ("C\n\ntext",), ("D", "E")]
    assert prompts[0].system == "S"
    assert (prompts[1].instruction_ids, prompts[1].kwargs) == (
        ("keywords:existence",),
        ({"keywords": ["x"]},),
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no JSON object"),
        ('{"prompt": " "}', "line 2 has no text"),
        ('{"prompt": 3}', "line 2 has no text"),
        ('{"prompt": "x", "instruction_id_list": ["a:b"], "kwargs": [{}]}', "line 2: 'a:b' is no known kind"),
        (
            '{"prompt": "x", "instruction_id_list": ["punctuation:no_comma"]}',
            "line 2: instruction_id_list and",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, line, problem):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        read_prompts(path)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "p.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(UserError):
        read_prompts(tmp_path / "absent.jsonl")


def test_hold_out_keeps_near_duplicates_together():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    texts = []
    for word in words:
        base = f"please tell me in a few words how the {word} machine of the old factory works today"
        texts += [base, base + " thanks", f"an unrelated question on {word} number one"]
    prompts = [make_prompt((text,), split="train", kind="file") for text in texts]
    for seed in range(5):
        result = hold_out(prompts, 4, seed=seed)
        assert [prompt.turns for prompt in result] == [prompt.turns for prompt in prompts]
        parts = {split: [p.turns[0] for p in result if p.split == split] for split in ("train", "held_out")}
        assert len(parts["held_out"]) >= 4
        assert near_duplicates(parts["train"], parts["held_out"]) == []
        assert hold_out(prompts, 4, seed=seed) == result


def test_hold_out_looks_at_every_turn():
    prompts = [
        make_prompt(("One?", "The same follow-up question"), split="train", kind="file"),
        make_prompt(("Two?", "the same follow up question!"), split="train", kind="file"),
        make_prompt(("Three?",), split="train", kind="file"),
    ]
    for seed in range(6):
        splits = [prompt.split for prompt in hold_out(prompts, 1, seed=seed)]
        assert splits[0] == splits[1]
    assert {prompt.split for prompt in hold_out(prompts, 0, seed=0)} == {"train"}


def test_user_header(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    assert user_header(tokenizer) == "<|im_start|>user\n"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        user_header(tokenizer)


def test_self_prompts_are_filtered_and_counted():
    texts = ["What is a good soup?", " what is a GOOD soup ", "Hi", "word " * 400, "And this one here?"]
    generated = [SimpleNamespace(text=text, finished=True) for text in texts]
    generated.append(SimpleNamespace(text="This one is cut", finished=False))
    prompts, counts = self_prompts(generated)
    assert [normalise(prompt.turns[0]) for prompt in prompts] == ["what is a good soup", "and this one here"]
    assert counts == {"cut_off": 1, "length": 2, "repeated": 1}
    assert all(prompt.kind == "self" for prompt in prompts)
