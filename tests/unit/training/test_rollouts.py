from functools import partial

import pytest

from regrow.data.templates import Encoded
from regrow.errors import UserError
from regrow.modeling.load import load_model, load_tokenizer
from regrow.training.distill import distill
from regrow.training.rollouts import Rollouts, prompt_length
from regrow.training.student import HiddenStates
from regrow.training.writing import own_answers
from tiny_models import save_tiny_model
from training_case import QUICK, make_case


def encode(tokenizer, prompt, answer):
    ids = tokenizer(prompt + answer)["input_ids"]
    begin = len(tokenizer(prompt)["input_ids"])
    return Encoded(ids, [index >= begin for index in range(len(ids))])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model("llama_tied", tmp_path_factory.mktemp("m"))
    return HiddenStates(load_model(folder, dtype="float32"), autocast=False), load_tokenizer(folder)


def rollouts(model, folder, **options):
    tokenizer = model[1]
    rows = [encode(tokenizer, f"ask {i} ", "reply") for i in range(4)]
    settings = {
        "work_dir": folder,
        "rows": rows,
        "plan": [(0, 1), (2,), (3, 0), (1,), (2, 3), (0,)],
        "tokenizer": tokenizer,
        "answer": partial(own_answers, tokenizer=tokenizer),
        "fraction": 1.0,
        "refresh_steps": 2,
        "first": (0, 0),
        "batches_per_step": 1,
        "batch_tokens": 100,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "batch_size": 32,
        "seed": 0,
    }
    return Rollouts(**settings | options)


def written(rollouts, model, step, positions):
    rollouts.prepare(step, model[0])
    return [rollouts.replace(position) for position in positions]


def test_prompt_ends_where_the_last_response_begins():
    assert prompt_length(Encoded([1, 2, 3, 4], [False, False, True, True])) == 2
    assert prompt_length(Encoded([1, 2, 3, 4, 5], [False, True, False, True, False])) == 3
    assert prompt_length(Encoded([1, 2], [True, True])) == 0
    assert prompt_length(Encoded([1, 2], [False, False])) == 0


def test_student_answers_the_prompts_of_the_window(model, tmp_path):
    first, second = written(rollouts(model, tmp_path), model, 0, (0, 1))
    assert (len(first), len(second)) == (2, 1)
    for row, number in zip([*first, *second], (0, 1, 2), strict=True):
        text = model[1].decode(row.input_ids[: row.response_mask.index(True)])
        assert text == f"ask {number} "
        assert 1 <= sum(row.response_mask) <= 7
    assert rollouts(model, tmp_path).replace(2) is None  # not of this window


@pytest.mark.parametrize(("batch_tokens", "count"), [(1, 1), (23, 1), (24, 2), (47, 3), (48, 4), (99, 4)])
def test_a_micro_batch_keeps_its_size_with_the_longest_answers(model, tmp_path, batch_tokens, count):
    """Prompts of 6 tokens, answers of up to 6."""
    settings = {"plan": [(0, 1, 2, 3)] * 6, "batch_tokens": batch_tokens}
    [rows] = written(rollouts(model, tmp_path, **settings), model, 0, (0,))
    assert len(rows) == count


def test_same_seed_same_answers_and_another_window_others(model, tmp_path):
    left = written(rollouts(model, tmp_path / "a"), model, 0, (0, 1))
    assert written(rollouts(model, tmp_path / "b"), model, 1, (0, 1)) == left
    assert written(rollouts(model, tmp_path / "c", seed=1), model, 0, (0, 1)) != left
    later = written(rollouts(model, tmp_path / "d"), model, 4, (4,))
    assert later != written(rollouts(model, tmp_path / "e", plan=[(2, 3)] * 6), model, 0, (0,))


def test_processes_write_their_own_micro_batches(model, tmp_path):
    both = {}
    for rank in (0, 1):
        share = rollouts(model, tmp_path, rank=rank, world_size=2, batches_per_step=2, refresh_steps=1)
        share.prepare(0, model[0])
        both |= {position: share.replace(position) for position in (0, 1) if share.replace(position)}
        assert share.replace(1 - rank) is None
    assert sorted(both) == [0, 1]


def test_fraction_is_kept_on_the_average(model, tmp_path):
    some = rollouts(model, tmp_path, fraction=0.3)
    share = sum(some.chosen(position) for position in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=0.03)
    assert not any(rollouts(model, tmp_path, fraction=0.0).chosen(p) for p in range(50))


def test_text_without_prompts_is_refused_before_anything_is_written(tmp_path):
    case = make_case(tmp_path)
    (tmp_path / "plain.jsonl").write_text('{"text": "no prompt, no response"}')
    case["corpora"] = [(str(tmp_path / "plain.jsonl"), "train", 1.0, None)]
    settings = QUICK | {"on_policy_fraction": 0.5}
    with pytest.raises(UserError, match="no prompt with a response"):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **settings)
    assert not (tmp_path / "work").exists()


def test_on_policy_training_learns(tmp_path):
    case = make_case(tmp_path)
    settings = QUICK | {"on_policy_fraction": 1.0, "refresh_steps": 3, "rollout_tokens": 12}
    report = distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **settings)
    assert report["held_out"][-1]["kl"] < 0.9 * report["held_out"][0]["kl"]
    with pytest.raises(UserError, match="live teacher"):
        distill(
            **case,
            out=tmp_path / "b",
            work_dir=tmp_path / "wb",
            **settings | {"teacher_mode": "cached"},
        )
