"""The whole job with a stub teacher, and once with a real (tiny) model."""

import json
import sys
from dataclasses import dataclass

import pytest

import regrow.synthesis.synthesize as job
from regrow.data.constraints import PUNKT_KINDS
from regrow.data.corpora import read_corpus
from regrow.errors import UserError
from regrow.synthesis.decontaminate import near_duplicates
from regrow.synthesis.prompts import normalise
from regrow.synthesis.requirements import KIND_WEIGHTS
from regrow.synthesis.selection import select_rows, user_turns
from regrow.synthesis.synthesize import synthesize
from tiny_models import save_tiny_model, save_tiny_tokenizer


@dataclass
class Reply:
    text: str
    num_tokens: int
    finished: bool = True


class StubTeacher:
    """Answers depend on the conversation, the seed and the place in the batch, as sampling does."""

    stop_after: int | None = None
    num_calls = num_closed = 0

    def __init__(self, folder, **settings):
        self.settings = settings

    def answer(self, conversations, decoding):
        type(self).num_calls += 1
        if self.stop_after is not None and self.num_calls > self.stop_after:
            raise KeyboardInterrupt
        return [
            Reply(f"The answer {decoding.seed} {place} is: {c[-1]['content'][:40]}.", 7, place % 5 != 4)
            for place, c in enumerate(conversations)
        ]

    def close(self):
        type(self).num_closed += 1

    def write_user_turns(self, count, *, seed):
        return [Reply(f"Question number {i % 30} about subject {i % 30}?", 5) for i in range(count)]


@pytest.fixture(autouse=True)
def no_punkt_needed(monkeypatch):
    """Leave out the two kinds whose checkers need NLTK's data, so that these tests run anywhere."""
    weights = {kind: weight for kind, weight in KIND_WEIGHTS.items() if kind not in PUNKT_KINDS}
    monkeypatch.setattr("regrow.synthesis.requirements.KIND_WEIGHTS", weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_model("llama", folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def stub(monkeypatch):
    class Fresh(StubTeacher):
        pass

    monkeypatch.setattr(job, "Teacher", Fresh)
    return Fresh


def run(model, out, **settings):
    return synthesize(**({"model": model, "out": out, "num_prompts": 60, "batch_size": 8} | settings))


def rows_of(out, name="train"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_files_and_report(model, tmp_path, stub):
    report = run(model, tmp_path / "out", seed=3)
    train, held_out = rows_of(tmp_path / "out"), rows_of(tmp_path / "out", "held_out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    counts = report["counts"]
    assert counts["prompts"] == 60 + 10
    assert (counts["train"], counts["held_out"]) == (len(train), len(held_out))
    assert len(train) + len(held_out) + sum(counts["left_out"].values()) == 70
    assert counts["left_out"]["cut_off"] > 0
    assert report["train"]["num_rows"] == len(train)
    assert {row["meta"]["split"] for row in train} == {"train"}
    assert all(row["meta"]["model"] == "tiny-llama" and row["meta"]["finished"] for row in train + held_out)
    assert not (tmp_path / "out.work").exists()
    assert str(tmp_path) not in (tmp_path / "out" / "train.jsonl").read_text()
    examples = read_corpus(str(tmp_path / "out" / "train.jsonl"))
    assert [example.messages for example in examples] == [row["messages"] for row in train]


def test_what_can_be_refused_at_once_is_refused_by_a_check_that_writes_nothing(
    model, tmp_path, stub, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert run(model, tmp_path / "out", check_only=True) == {}
    assert run(None, tmp_path / "out", check_only=True) == {}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    for wrong, words in (
        ({"out": tmp_path / "foreign"}, "foreign"),
        ({"prompts": tmp_path / "none.txt"}, "none.txt"),
        ({"num_prompts": 10**6, "style_share": 0.0}, "ask for fewer"),
        ({"engine": "vllm"}, "vllm"),
    ):
        with pytest.raises(UserError, match=words):
            run(model, **{"out": tmp_path / "out", "check_only": True} | wrong)
    run(model, tmp_path / "out")
    assert (stub.num_closed, run(model, tmp_path / "out", check_only=True)["counts"]["prompts"]) == (1, 70)
    with pytest.raises(UserError, match="was made with max_new_tokens = 512, not 9"):
        run(model, tmp_path / "out", check_only=True, max_new_tokens=9)


def test_two_jobs_never_write_the_same_text(model, tmp_path, stub, monkeypatch):
    def second(*arguments, **options):
        with pytest.raises(UserError, match="Another regrow is writing"):
            run(model, tmp_path / "out")
        return real(*arguments, **options)

    real = job.run_blocks
    monkeypatch.setattr(job, "run_blocks", second)
    run(model, tmp_path / "out")
    monkeypatch.setattr(job, "run_blocks", real)
    run(model, tmp_path / "alone")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "alone")


def test_an_interrupted_job_ends_with_the_same_bytes(model, tmp_path, stub):
    run(model, tmp_path / "whole", attempts=2)
    whole_calls = stub.num_calls
    stub.num_calls, stub.stop_after = 0, whole_calls // 2
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", attempts=2)
    assert not (tmp_path / "parts").exists()
    blocks = tmp_path / "parts.work" / "blocks.jsonl"
    num_done = len(blocks.read_text().splitlines())
    assert num_done >= 1
    blocks.write_bytes(blocks.read_bytes() + b'[{"messages": [{"role')  # torn while writing
    stub.num_calls, stub.stop_after = 0, whole_calls // 3
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", attempts=2)
    lines = blocks.read_text().splitlines()
    assert len(lines) > num_done
    assert all(json.loads(line) for line in lines)  # the torn line is gone
    stub.num_calls, stub.stop_after = 0, None
    run(model, tmp_path / "parts", attempts=2)
    assert 0 < stub.num_calls < whole_calls  # finished blocks were not asked again
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "field"),
    [({"temperature": 0.9}, "temperature"), ({"seed": 1}, "prompts"), ({"attempts": 2}, "attempts")],
)
def test_other_settings_are_refused_by_name(model, tmp_path, stub, change, field):
    stub.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out")
    with pytest.raises(UserError, match=f"made with {field} = "):
        run(model, tmp_path / "out", **change)
    stub.stop_after = None
    run(model, tmp_path / "out")
    with pytest.raises(UserError, match=f"made with {field} = "):  # finished work, too
        run(model, tmp_path / "out", **change)


def test_finished_work_is_not_done_again(model, tmp_path, stub):
    first = run(model, tmp_path / "out")
    calls = stub.num_calls
    assert run(model, tmp_path / "out") == first
    assert stub.num_calls == calls


def test_an_output_folder_with_something_else(model, tmp_path, stub):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        run(model, tmp_path / "out")
    assert stub.num_calls == 0


def test_prompts_from_a_file_are_decontaminated_and_split(model, tmp_path, stub):
    shared_run = "the quick brown fox jumps over the lazy dog"
    lines = [f"Question {i} of the file about thing {i}?" for i in range(30)] + [f"Say: {shared_run} now"]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_text(f"Translate {shared_run}.", encoding="utf-8")
    report = run(
        model,
        tmp_path / "out",
        prompts=tmp_path / "p.txt",
        num_held_out=6,
        keep_out=[tmp_path / "b.txt"],
        cut_off="keep",
    )
    assert report["counts"]["prompts_in_benchmarks"] == 1
    asked = {
        turn
        for name in ("train", "held_out")
        for row in rows_of(tmp_path / "out", name)
        for turn in user_turns(row)
    }
    assert asked == set(lines[:30])
    assert len(rows_of(tmp_path / "out", "held_out")) == 6


def test_self_written_prompts(model, tmp_path, stub):
    report = run(model, tmp_path / "out", num_self_prompts=40)
    assert report["counts"]["self_prompts"]["repeated"] == 10
    assert report["counts"]["prompts"] == 70 + 30
    kinds = [row["meta"]["kind"] for row in rows_of(tmp_path / "out")]
    assert "self" in kinds


@pytest.mark.parametrize(
    "bad",
    [
        {"num_prompts": 0},
        {"attempts": 0},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
    ],
)
def test_bad_settings(model, tmp_path, stub, bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        run(model, tmp_path / "out", **bad)
    assert list(tmp_path.iterdir()) == []


def test_nothing_usable(model, tmp_path, stub, monkeypatch):
    monkeypatch.setattr(stub, "answer", lambda self, cs, d: [Reply("x", 1, finished=False) for _ in cs])
    with pytest.raises(UserError, match="None of the 70 answers"):
        run(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def row(split, *turns, answer="Some answer.", finished=True, strict=None):
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    meta = {"split": split, "finished": finished}
    if strict is not None:
        meta["follow_strict"] = strict
    return {"messages": messages, "meta": meta}


def test_selection_counts_each_reason():
    long_answer = "The very same answer of more than eight words, word for word."
    rows = [
        row("train", "a first question of this kind"),
        row("train", "A first question, of this kind!", answer="b"),
        row("train", "cut", finished=False),
        row("train", "void", answer=" "),
        row("train", "missed", strict=[True, False]),
        row("train", "kept", strict=[True, True], answer=long_answer),
        row("held_out", "other", answer=long_answer),
        row("held_out", "how do I bake a good loaf of bread"),
        row("train", "so how do I bake a good loaf of bread"),
        row("train", "new one", "How do I bake a good loaf of bread?"),
    ]
    kept, counts = select_rows(rows, cut_off="drop", violations="drop")
    assert counts == {
        "empty": 1,
        "cut_off": 1,
        "violating": 1,
        "repeated_prompts": 1,
        "repeated_answers": 1,
        "near_held_out": 2,
    }
    assert [user_turns(r)[0] for r in kept] == [
        "other",
        "how do I bake a good loaf of bread",
        "a first question of this kind",
    ]
    assert len(kept) + sum(counts.values()) == len(rows)
    kept, counts = select_rows(rows, cut_off="keep", violations="keep")
    assert "cut_off" not in counts
    assert "violating" not in counts
    assert len(kept) + sum(counts.values()) == len(rows)


def test_balance_keeps_as_many_misses_as_hits():
    rows = [
        row("train", "one", answer="1", strict=[False, False, True]),
        row("train", "two", answer="2", strict=[True]),
        row("train", "three", answer="3", strict=[False]),
        row("train", "four", answer="4"),
        row("train", "five", answer="5", strict=[True, False]),
        row("train", "six", answer="6", strict=[True, True]),
        row("held_out", "seven", answer="7", strict=[False]),
    ]
    kept, counts = select_rows(rows, cut_off="drop", violations="balance")
    assert [user_turns(r)[0] for r in kept] == ["one", "two", "four", "five", "six"]
    assert counts["violating"] == 2


def test_splits_share_no_turn(model, tmp_path, stub):
    run(model, tmp_path / "out", num_prompts=300, num_held_out=60, batch_size=64, multi_turn_share=0.6)
    train, held_out = rows_of(tmp_path / "out"), rows_of(tmp_path / "out", "held_out")
    ours = [turn for row in train for turn in user_turns(row)]
    theirs = [turn for row in held_out for turn in user_turns(row)]
    assert len(theirs) > 30
    assert not {normalise(turn) for turn in ours} & {normalise(turn) for turn in theirs}
    assert near_duplicates(ours, theirs) == []


def test_a_real_model_writes_a_corpus(model, tmp_path):
    """Random weights hardly end a turn; with cut-off answers kept the job runs, and repeats exactly."""
    settings = {
        "num_prompts": 4,
        "num_held_out": 2,
        "max_new_tokens": 4,
        "batch_size": 4,
        "cut_off": "keep",
        "constraint_share": 0.5,
        "num_self_prompts": 3,
        "dtype": "float32",
        "device": "cpu",
        "multi_turn_share": 0.0,
        "system_share": 0.0,
    }
    report = run(model, tmp_path / "a", **settings)
    run(model, tmp_path / "b", **settings)
    assert report["before_selection"]["num_rows"] >= 6
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
