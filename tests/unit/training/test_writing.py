"""The student's texts through vLLM: its present weights, and nothing left behind. vLLM is a stand-in."""

import json
import sys
from functools import partial

import pytest
import torch
from transformers import TrainingArguments

from regrow.checkpoint import CheckpointReader
from regrow.errors import UserError
from regrow.modeling.load import load_model, load_tokenizer
from regrow.training.distill import distill
from regrow.training.lora import DEFAULT_TARGETS, add_adapters, merged_tensors
from regrow.training.memory import free_share, share_for_vllm
from regrow.training.recover import recover
from regrow.training.result import changed_tensors
from regrow.training.rollouts import Rollouts
from regrow.training.student import HiddenStates, set_precision, stored_dtypes, trained_names
from regrow.training.writing import find_answer
from tiny_models import save_tiny_model
from training_case import QUICK, make_case, same_bytes, tensors_of
from vllm_stand_in import install_vllm

PROMPTS = [f"q{number} {'xyz'[number % 3]}" for number in range(8)]
GREEDY = QUICK | {
    "precision": "fp32",
    "on_policy_fraction": 1.0,
    "refresh_steps": 3,
    "rollout_tokens": 12,
    "rollout_temperature": 1e-6,  # as good as greedy, which is all that the stand-in can do
}


@pytest.fixture
def vllm(monkeypatch):
    return install_vllm(monkeypatch)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"))


def full(model, reader):
    set_precision(model, trained_names(reader, model, "all_but_embeddings"), stored_dtypes(reader), "fp32")
    return model, changed_tensors


def lora(model, reader):
    set_precision(model, [], stored_dtypes(reader), "fp32")
    size = {"rank": 4, "alpha": 8}
    options = {"dropout": 0.0, "targets": DEFAULT_TARGETS, "linear_attention": False, "seed": 0}
    wrapped, _ = add_adapters(model, fp32_adapters=True, **size, **options)
    return wrapped, partial(merged_tensors, **size)


@pytest.mark.parametrize("method", [full, lora])
@pytest.mark.parametrize("family", ["llama_tied", "qwen3_5"])
def test_vllm_writes_with_the_weights_of_the_moment(family, method, vllm, tmp_path):
    reader = CheckpointReader(save_tiny_model(family, tmp_path / "m"))
    model, replacements = method(load_model(reader.folder, dtype="float32"), reader)
    student = HiddenStates(model, autocast=False)
    common = {
        "tokenizer": load_tokenizer(reader.folder),
        "base": reader,
        "replacements": replacements,
        "work_dir": tmp_path / "work",
        "precision": "fp32",
        "trust_remote_code": False,
    }

    def texts(engine):
        answer = find_answer(engine, **common)
        return answer(student, PROMPTS, max_new_tokens=12, batch_size=4, progress=None)

    before = texts("transformers")
    assert texts("vllm") == before
    optimizer = torch.optim.SGD(student.trained().values(), lr=0.5)
    student(torch.arange(40)[None]).square().mean().backward()
    optimizer.step()
    after = texts("transformers")
    assert after != before
    assert texts("vllm") == after
    assert [started["dtype"] for started in vllm.started] == ["float32"] * 2
    assert vllm.running == 0
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("train", [distill, recover])
def test_a_run_is_the_same_whoever_writes(case, train, vllm, tmp_path):
    reports = {}
    for engine in ("transformers", "vllm"):
        folders = {"out": tmp_path / engine, "work_dir": tmp_path / f"work-{engine}"}
        reports[engine] = train(**case, **folders, **GREEDY, rollout_engine=engine)
        assert any(f"written by the engine {engine}" in note for note in reports[engine]["notes"])
    assert len(vllm.started) == 2
    assert vllm.running == 0
    for window in (0, 1):
        own, other = (
            json.loads((tmp_path / f"work-{engine}/rollouts/window-{window}-0of1.json").read_text())
            for engine in reports
        )
        assert own == other != {}
    left, right = (tensors_of(tmp_path / engine) for engine in reports)
    assert all(same_bytes(left[name], right[name]) for name in left)
    assert not (tmp_path / "work-vllm" / ".partial-checkpoint").exists()


def test_the_development_set_is_answered_by_the_same_engine(case, vllm, tmp_path):
    options = QUICK | {"precision": "fp32", "select_by": "development", "max_steps": 2, "eval_steps": 1}
    options |= {"development_limit": 4, "development_tokens": 8}
    held_out = [
        distill(
            **case,
            out=tmp_path / engine,
            work_dir=tmp_path / f"work-{engine}",
            rollout_engine=engine,
            **options,
        )["held_out"]
        for engine in ("transformers", "vllm")
    ]
    assert held_out[0] == held_out[1]
    assert (len(vllm.started), vllm.running) == (3, 0)


def test_what_is_on_disk_needs_no_engine_again(case, vllm, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def killed(self, step, student):
        prepare(self, step, student)
        if step == 4:
            raise KilledError

    prepare = Rollouts.prepare
    folders = {"out": tmp_path / "out", "work_dir": tmp_path / "work"}
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Rollouts, "prepare", killed)
        distill(**case, **folders, **GREEDY, rollout_engine="vllm")
    assert len(vllm.started) == 2
    distill(**case, **folders, **GREEDY, rollout_engine="vllm")
    assert len(vllm.started) == 2
    with pytest.raises(UserError, match="rollout_engine 'vllm', not 'transformers'"):
        distill(**case, **folders | {"out": tmp_path / "other"}, **GREEDY)


def test_an_engine_that_fails_leaves_neither_copy_nor_engine(case, vllm, tmp_path, monkeypatch):
    def fails(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("vllm_stand_in._Engine._one", fails)
    with pytest.raises(ZeroDivisionError):
        distill(**case, out=tmp_path / "out", work_dir=tmp_path / "work", **GREEDY, rollout_engine="vllm")
    assert (len(vllm.started), vllm.running) == (1, 0)
    assert not (tmp_path / "work" / ".partial-checkpoint").exists()


def test_what_cannot_be_is_refused_before_anything_is_written(case, vllm, tmp_path, monkeypatch):
    run = partial(distill, **case, out=tmp_path / "out", work_dir=tmp_path / "work", **GREEDY)
    with pytest.raises(UserError, match="'pen' is unknown"):
        run(rollout_engine="pen")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="in one process"):
        patch.setattr(TrainingArguments, "world_size", 2)
        run(rollout_engine="vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        run(rollout_engine="vllm")
    assert not (tmp_path / "work").exists()


def test_vllm_is_given_most_of_what_is_free():
    assert free_share(80 << 30, 80 << 30) == 0.9
    assert free_share(50 << 30, 80 << 30) == 0.562
    assert free_share(0, 80 << 30) == 0
    assert share_for_vllm(torch.device("cpu")) is None
