"""Conversations with a stub in the teacher's place: turns, attempts, verdicts, provenance."""

from dataclasses import dataclass

from regrow.data.constraints import answer_of
from regrow.synthesis.answers import Decoding, answer_block
from regrow.synthesis.prompts import make_prompt


@dataclass
class Reply:
    text: str
    num_tokens: int = 3
    finished: bool = True


class Stub:
    """Answers by a function of (conversation, decoding), and remembers what it was asked."""

    def __init__(self, reply):
        self.reply, self.calls = reply, []

    def __call__(self, conversations, decoding):
        self.calls.append((decoding, [list(c) for c in conversations]))
        return [self.reply(c, decoding) for c in conversations]


def run(prompts, stub, **settings):
    defaults = {"block": 2, "seed": 5, "temperature": 0.7, "top_p": 0.9, "attempts": 1, "model_name": "m"}
    return answer_block(prompts, stub, **(defaults | settings))


def no_comma(text="Say it.", **more):
    return make_prompt(
        (text,), split="train", kind="x", instruction_ids=("punctuation:no_comma",), kwargs=({},), **more
    )


def test_a_conversation_is_answered_turn_by_turn():
    prompt = make_prompt(("Hello?", "And now?"), split="held_out", kind="chat", system="Be kind.")
    single = make_prompt(("One?",), split="train", kind="chat")
    stub = Stub(lambda c, d: Reply(f"{len(c)} messages"))
    first, second = run([prompt, single], stub)
    assert first["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "2 messages"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "4 messages"},
    ]
    assert first["meta"] == {
        "prompt_id": prompt.id,
        "split": "held_out",
        "kind": "chat",
        "model": "m",
        "seed": 5,
        "decoding": "sampled",
        "finished": True,
        "num_tokens": 6,
    }
    assert [message["role"] for message in second["messages"]] == ["user", "assistant"]
    assert [len(conversations) for _, conversations in stub.calls] == [2, 1]


def test_a_cut_off_answer_ends_the_conversation():
    prompt = make_prompt(("Hello?", "And now?"), split="train", kind="chat")
    (row,) = run([prompt], Stub(lambda c, d: Reply("and then", finished=False)))
    assert len(row["messages"]) == 2
    assert row["meta"]["finished"] is False


def test_constraints_are_answered_greedily_first_and_the_rest_sampled():
    stub = Stub(lambda c, d: Reply("fine"))
    rows = run([no_comma(), make_prompt(("Hi",), split="train", kind="x")], stub)
    assert {d.greedy: len(c) for d, c in stub.calls} == {True: 1, False: 1}
    assert [row["meta"]["decoding"] for row in rows] == ["greedy", "sampled"]
    sampled = next(d for d, _ in stub.calls if not d.greedy)
    assert (sampled.temperature, sampled.top_p) == (0.7, 0.9)


def test_further_attempts_only_where_a_constraint_is_missed():
    good, bad, hopeless = no_comma("good"), no_comma("bad"), no_comma("hopeless")

    def reply(conversation, decoding):
        name = conversation[-1]["content"]
        commas = {"good": False, "bad": decoding.greedy, "hopeless": True, "x": True}[name]
        return Reply("a, b" if commas else "a b")

    stub = Stub(reply)
    rows = run([good, bad, hopeless, make_prompt(("x",), split="train", kind="x")], stub, attempts=3)
    assert [row["meta"].get("follow_strict") for row in rows] == [[True], [True], [False], None]
    assert [row["meta"].get("attempt") for row in rows] == [0, 1, 0, None]
    asked = [c[-1]["content"] for _, conversations in stub.calls for c in conversations]
    assert sorted(asked) == sorted(["good", "bad", "hopeless", "x", "bad", "hopeless", "hopeless"])
    assert len({d.seed for d, _ in stub.calls}) == 3


def test_greedy_runs_do_not_repeat_themselves():
    stub = Stub(lambda c, d: Reply("a, b"))
    run([no_comma()], stub, attempts=4, temperature=0.0)
    assert len(stub.calls) == 1


def test_a_finished_answer_beats_a_cut_off_one_that_meets_more():
    def reply(conversation, decoding):
        return Reply("a b", finished=False) if decoding.greedy else Reply("a, b")

    (row,) = run([no_comma()], Stub(reply), attempts=2)
    assert row["meta"]["finished"]
    assert row["meta"]["follow_strict"] == [False]


def test_seeds_differ_by_block_attempt_turn_and_seed():
    seeds = set()
    for seed in range(3):
        for block in range(4):
            prompts = [no_comma(), make_prompt(("a", "b"), split="train", kind="x")]
            stub = Stub(lambda c, d: Reply("a, b"))
            run(prompts, stub, seed=seed, block=block, attempts=3)
            found = {decoding.seed for decoding, _ in stub.calls}
            assert len(found) == 4  # attempts 0-2, and the second turn
            assert not found & seeds
            seeds |= found


def test_the_checker_does_not_see_the_thinking():
    (row,) = run([no_comma()], Stub(lambda c, d: Reply("well, hm, yes</think>\n\nDone.")))
    assert row["meta"]["follow_strict"] == [True]
    assert row["messages"][-1]["content"].startswith("well, hm")
    assert answer_of("<think>\n\n</think>\n\nText", thinking=False) == "Text"
    assert answer_of("No block.", thinking=False) == "No block."


def test_greedy_is_temperature_zero():
    assert Decoding(0.0, 1.0, 1).greedy
    assert not Decoding(0.1, 1.0, 1).greedy
