"""Weights chosen by a development set, and training that ends when waiting does not help."""

import json
from functools import partial

import pytest
import torch

from regrow.data.constraints import check_response
from regrow.errors import UserError
from regrow.modeling.generate import generate_responses
from regrow.modeling.load import load_model, load_tokenizer
from regrow.training import development
from regrow.training.development import DevelopmentSet
from regrow.training.distill import distill
from regrow.training.record import RunRecord
from regrow.training.student import HiddenStates
from regrow.training.trainer import DistillTrainer
from regrow.training.writing import own_answers
from training_case import QUICK, make_case, same_bytes, tensors_of

PROMPTS = [
    {"prompt": f"say {word}", "instruction_id_list": ids, "kwargs": kwargs, "key": key}
    for key, (word, ids, kwargs) in enumerate(
        [
            ("one", ["punctuation:no_comma"], [{}]),
            ("two", ["change_case:english_lowercase", "punctuation:no_comma"], [{}, {}]),
            ("three", ["startend:end_checker"], [{"end_phrase": "zzz"}]),
            ("four", ["length_constraints:number_words"], [{"num_words": 500, "relation": "at least"}]),
        ]
    )
]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "dev.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    return str(file)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"))


def settings(prompts, **more):
    return (
        QUICK | {"select_by": "development", "development_prompts": prompts, "development_tokens": 8} | more
    )


def test_counts_are_those_of_the_checkers_and_processes_share_the_prompts(case, prompts):
    tokenizer, model = load_tokenizer(case["student"]), load_model(case["student"], dtype="float32")
    answers = generate_responses(
        model,
        tokenizer,
        [[{"role": "user", "content": row["prompt"]}] for row in PROMPTS],
        max_new_tokens=8,
        batch_size=1,
        progress=None,
    )
    verdicts = [
        check_response(row["prompt"], answer.text, row["instruction_id_list"], row["kwargs"]).strict
        for row, answer in zip(PROMPTS, answers, strict=True)
    ]

    def counts(**share):
        options = {"limit": None, "max_new_tokens": 8, "batch_size": 2, "enable_thinking": None} | share
        config = model.config.to_dict()
        development = DevelopmentSet(
            prompts, tokenizer, config, answer=partial(own_answers, tokenizer=tokenizer), **options
        )
        return development.counts(HiddenStates(model, False))

    finished = sum(answer.finished for answer in answers)
    assert counts().tolist() == [sum(map(sum, verdicts)), 5, finished, 4]
    assert counts(limit=2).tolist()[:2] == [sum(map(sum, verdicts[:2])), 3]
    shares = [counts(rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(shares[0] + shares[1], counts())


def test_most_instructions_followed_wins_and_the_lower_kl_breaks_ties():
    record = RunRecord()
    seen = [
        record.add_evaluation(step, {"kl": kl, "development": share})
        for step, (kl, share) in enumerate([(0.5, 0.3), (0.4, 0.2), (0.9, 0.4), (0.8, 0.4), (0.8, 0.4)])
    ]
    assert seen == [True, False, True, True, False]
    assert (record.best_step, record.best_kl, record.best_development) == (3, 0.8, 0.4)
    assert record.since_best == 1


def test_the_step_that_follows_most_is_given_back(case, prompts, tmp_path, monkeypatch):
    found = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(
        DevelopmentSet, "counts", lambda self, student: torch.tensor([next(found), 5.0, 1.0, 4.0]).double()
    )
    report = distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **settings(prompts))
    assert report["chosen_step"] == 3
    assert [entry["development"] for entry in report["held_out"]] == [0.2, 0.6, 0.4]
    # By KL the last step would have been the best.
    assert report["held_out"][-1]["kl"] == min(entry["kl"] for entry in report["held_out"])
    assert any("Only 25% of the answers" in note for note in report["notes"])
    assert any("60.0% of the development set's instructions" in note for note in report["notes"])


def test_patience_ends_training_early_also_when_it_is_killed_right_after(
    case, prompts, tmp_path, monkeypatch
):
    options = settings(prompts, max_steps=12, eval_steps=2, save_steps=2, patience=2, logging_steps=4)
    whole = distill(**case, out=tmp_path / "a", work_dir=tmp_path / "wa", **fixed(monkeypatch, options))
    assert [entry["step"] for entry in whole["held_out"]] == [0, 2, 4, 6]
    assert (whole["steps"], whole["chosen_step"]) == (6, 2)
    assert whole["losses"][-1]["step"] == 6
    assert any("stopped early at step 6" in note for note in whole["notes"])

    class KilledError(BaseException):
        pass

    def killed(*args):
        raise KilledError

    train = DistillTrainer.train
    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "train", lambda *args, **kw: (train(*args, **kw), killed()))
        with pytest.raises(KilledError):
            distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **fixed(monkeypatch, options))
    resumed = distill(**case, out=tmp_path / "b", work_dir=tmp_path / "wb", **options)
    assert (resumed["steps"], resumed["chosen_step"]) == (6, 2)
    left, right = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(same_bytes(left[name], right[name]) for name in left)


def fixed(monkeypatch, options):
    """The development set improves once, at the first evaluation after the start."""
    found = iter([1.0, 3.0, 2.0, 2.0, 4.0, 4.0, 4.0])

    def counts(self, student):
        return torch.tensor([next(found), 5.0, 1.0, 4.0]).double()

    monkeypatch.setattr(development.DevelopmentSet, "counts", counts)
    return options


def test_a_resumed_run_does_not_mix_development_sets(case, prompts, tmp_path):
    options = settings(prompts, max_steps=2, eval_steps=2)
    distill(**case, out=tmp_path / "a", work_dir=tmp_path / "work", **options)
    with open(prompts, "a") as file:
        file.write("\n" + json.dumps(PROMPTS[0] | {"key": 9, "prompt": "another"}))
    with pytest.raises(UserError, match="development"):
        distill(**case, out=tmp_path / "b", work_dir=tmp_path / "work", **options)


def test_what_is_refused_leaves_no_work_behind(case, prompts, tmp_path):
    for change in ({"development_tokens": 100_000}, {"development_prompts": "none.jsonl"}):
        with pytest.raises(UserError):
            distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **settings(prompts) | change)
    cached = {"teacher_mode": "cached", "on_policy_fraction": 0.5}
    with pytest.raises(UserError, match="needs a live teacher"):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK | cached)
    assert not (tmp_path / "work").exists()


def test_a_tie_with_a_higher_kl_counts_as_no_better():
    record = RunRecord()
    for step, (kl, share) in enumerate([(0.5, 0.3), (0.6, 0.3), (0.7, 0.3)]):
        record.add_evaluation(step, {"kl": kl, "development": share})
    assert (record.best_step, record.since_best) == (0, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"select_by": "last", "patience": 2}, "patience needs something to wait for"),
        ({"select_by": "luck"}, "select_by is 'luck'"),
        ({"select_by": "development", "development_prompts": "none.jsonl"}, "none.jsonl do not exist"),
        ({"select_by": "development", "development_tokens": 0}, "development_tokens is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(case, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **QUICK | options)
