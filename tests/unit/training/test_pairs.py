"""Preference pairs: which answers make one, what is counted, and that they are made once."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.data.constrained import ConstrainedRow, constrained_rows, constraints_hash, judge
from regrow.errors import UserError
from regrow.modeling.generate import Response
from regrow.training.pairs import Candidate, choose_pair, load_or_make_pairs, require_pairs
from tiny_models import save_tiny_tokenizer


def candidate(source="student", finished=True, follows=(True,), text="a"):
    return Candidate(source, text, [1, 2], finished, list(follows))


def candidates(num_constraints):
    follows = st.lists(st.booleans(), min_size=num_constraints, max_size=num_constraints)
    one = st.builds(candidate, st.sampled_from(["student", "teacher"]), st.booleans(), follows)
    return st.lists(one, max_size=6)


@given(st.integers(1, 4).flatmap(candidates))
def test_chosen_is_finished_and_follows_strictly_more_than_rejected(found):
    pair = choose_pair(found)
    best = max((sum(c.follows) for c in found if c.finished), default=-math.inf)
    worst = min((sum(c.follows) for c in found), default=math.inf)
    if pair is None:
        assert best <= worst
        return
    chosen, rejected = pair
    assert chosen.finished
    assert (sum(chosen.follows), sum(rejected.follows)) == (best, worst)
    assert best > worst


def test_pairs_by_hand():
    good, bad = candidate("teacher", follows=[True, True]), candidate(follows=[True, False])
    assert choose_pair([good, bad]) == (good, bad)
    assert choose_pair([bad, bad]) is None  # a tie
    assert choose_pair([candidate("teacher", False, [True, True]), bad]) is None  # cut off
    own = candidate("student", follows=[True, True])
    assert choose_pair([good, own, bad])[0] is own
    assert choose_pair([]) is None


def row(prompt="Say a, b and c. Use no commas.", answer="a b c", finished=True):
    kinds = ["punctuation:no_comma"]
    return ConstrainedRow("x line 1", [{"role": "user", "content": prompt}], answer, finished, kinds, [{}])


def test_judged_is_what_follows_the_thinking_block():
    assert judge(row(), "one, two</think>\n\nabc", thinking=True) == [True]
    assert judge(row(), "one two", thinking=True) == [False]  # the block never ends: nothing was answered
    assert judge(row(), "a, b", thinking=False) == [False]


ANSWERS = {
    "first": ["a, b", "a b"],  # the student's own second answer is good
    "second": ["a, b", "c, d"],  # only the teacher's is
    "third": ["a b", "c d"],  # all are: no pair
    "fourth": ["a, b", "c, d"],  # the teacher's was cut off: no pair
}


@pytest.fixture
def made(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path / "tokenizer")

    def answers(student, conversations, **options):
        made.calls += 1
        seen: dict[str, int] = {}
        found = []
        for conversation in conversations:
            key = conversation[-1]["content"].split(".")[0]
            text = ANSWERS[key][seen.get(key, 0)]
            seen[key] = seen.get(key, 0) + 1
            found.append(Response(text, tokenizer(text)["input_ids"], len(text) + 1, True))
        return found

    rows = [row(f"{key}. Use no commas.", finished=key != "fourth") for key in ANSWERS]

    def made(max_length=500):
        return load_or_make_pairs(
            tmp_path,
            None,
            tokenizer,
            rows,
            answer=answers,
            num_samples=2,
            max_new_tokens=8,
            temperature=1.0,
            batch_size=4,
            max_length=max_length,
            enable_thinking=None,
            seed=0,
        )

    made.calls, made.folder, made.tokenizer = 0, tmp_path, tokenizer
    return made


def test_pairs_are_made_counted_and_read_again(made):
    pairs, counts = made()
    assert counts == {
        "num_prompts": 4,
        "num_pairs": 2,
        "prompts_without_pair": 2,
        "chosen_from": {"student": 1, "teacher": 1},
        "rejected_from": {"student": 2, "teacher": 0},
        "too_long": 0,
    }
    assert made() == (pairs, counts)
    assert made.calls == 1
    lines = [json.loads(line) for line in (made.folder / "pairs.jsonl").read_text().splitlines()]
    assert [line["chosen"]["text"] for line in lines] == ["a b", "a b c"]
    # both answers stand behind the same prompt and end their turn
    decode = made.tokenizer.decode
    for pair in pairs:
        assert decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
        assert decode(pair.chosen.token_ids) == pair.chosen.text + "<|im_end|>"
        assert decode(pair.rejected.token_ids) == pair.rejected.text + "<|im_end|>"


def test_damaged_pairs_are_refused_and_long_answers_left_out(made):
    _, counts = made(max_length=4)
    assert (counts["num_pairs"], counts["too_long"]) == (0, 12)
    (made.folder / "pairs.jsonl").write_text('{"where": 1}\n')
    with pytest.raises(UserError, match="damaged; remove"):
        made()


def test_too_few_pairs_are_one_sentence_with_counts_and_remedy():
    require_pairs(3, 9, 3)
    with pytest.raises(UserError) as caught:
        require_pairs(2, 9, 3)
    message = str(caught.value)
    for part in ("2 preference pairs", "9 prompts", "needs 3", "--constraint-share", "min_pairs"):
        assert part in message
    assert "\n" not in message


def test_rows_with_constraints_are_found_by_their_meta(tmp_path):
    turn = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    meta = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "finished": False}
    rows = [
        {"messages": [turn, answer], "meta": meta},
        {"messages": [turn, answer], "meta": {"kind": "free"}},
        {"messages": [turn, answer]},
        {"messages": [turn, answer, turn], "meta": meta},
        {"text": "plain", "meta": meta},
        {"messages": [turn, answer, turn, answer], "meta": meta | {"finished": True}},
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = [(str(path), "train", 1.0, None)]
    found = constrained_rows(spec)
    assert [(len(r.prompt), r.answer, r.finished, r.where) for r in found] == [
        (1, "a", False, "c.jsonl line 1"),
        (3, "a", True, "c.jsonl line 6"),
    ]
    before = constraints_hash(spec)
    path.write_text(path.read_text().replace('"kwargs": [{}]', '"kwargs": [{"x": 1}]'))
    with pytest.raises(UserError, match=r"c\.jsonl line 1: punctuation:no_comma takes"):
        constrained_rows(spec)
    rows[0]["meta"] = meta | {"finished": True}
    path.write_text("\n".join(map(json.dumps, rows)))
    assert constraints_hash(spec) != before
