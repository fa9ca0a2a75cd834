"""Evaluating several models: what is finished is not redone, a killed run goes on, names are as promised."""

import json
from pathlib import Path
from typing import Any

import pytest

from regrow.errors import UserError
from regrow.evaluation.compare import compare_runs
from regrow.evaluation.evaluate import BENCHMARKS, evaluate_models, evaluate_once
from regrow.evaluation.ifeval import evaluate_ifeval
from regrow.evaluation.records import read_result
from regrow.modeling import writers
from tiny_models import save_tiny_model

PROMPTS = [
    {
        "key": index,
        "prompt": f"Say {'word ' * index}{index}",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"][: 1 + index % 2],
        "kwargs": [{}, {}][: 1 + index % 2],
    }
    for index in range(6)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("evaluation")
    chat = [{"instruction": f"ask {i}", "output": f"say {i} " * (1 + i)} for i in range(4)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return {
        "teacher": save_tiny_model("qwen3", folder / "teacher", seed=0),
        "student": save_tiny_model("qwen3", folder / "student", seed=1),
        "chat": str(folder / "chat.jsonl"),
        "prompts": str(folder / "prompts.jsonl"),
    }


def _evaluate(world: dict[str, Any], records: Path, benchmarks: tuple[str, ...], **options: Any) -> Any:
    return evaluate_models(
        models={"teacher": world["teacher"], "pruned": world["student"]},
        teacher=world["teacher"],
        benchmarks=benchmarks,
        records=records,
        held_out=(world["chat"], "train", 1.0, None),
        ifeval={"prompts": world["prompts"], "max_new_tokens": 8, "batch_size": 2},
        latency={"prompt_tokens": 8, "new_tokens": 2, "repeats": 1},
        device="cpu",
        dtype="float32",
        **options,
    )


def test_models_are_measured_and_the_results_kept(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.evaluation.latency._process_peak", lambda *_: 123)
    measured = _evaluate(world, tmp_path, ("fidelity", "ifeval", "latency"))
    assert measured["teacher"]["fidelity"] is None
    assert measured["pruned"]["fidelity"]["num_tokens"] > 0
    assert measured["pruned"]["num_parameters"] == measured["pruned"]["latency"]["num_parameters"]
    for model in ("teacher", "pruned"):
        figures = measured[model]["ifeval"]
        assert figures["inst_level_strict"]["total"] == 9
        assert figures["settings"]["comparable"]["max_new_tokens"] == 8
        assert len(read_result(tmp_path / f"{model}-ifeval.json").records) == 6
        assert 0 <= figures["no_stop_rate"] <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{kind}"
        for name in (
            "teacher-ifeval",
            "pruned-ifeval",
            "teacher-latency",
            "pruned-latency",
            "pruned-fidelity",
        )
        for kind in ("json", "jsonl")
    )
    json.dumps(measured, allow_nan=False)
    compared = compare_runs(tmp_path / "teacher-ifeval.json", tmp_path)
    assert compared["num_prompts"] == 6


def test_finished_results_are_not_measured_again(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _evaluate(world, tmp_path / "a", ("ifeval",))
    monkeypatch.setattr(writers, "generate_responses", _must_not_run)
    assert _evaluate(world, tmp_path / "a", ("ifeval",)) == first
    assert _evaluate(world, tmp_path / "b", ("ifeval",), reuse=(tmp_path / "a",)) == first
    assert (tmp_path / "b" / "pruned-ifeval.json").exists()
    with pytest.raises(AssertionError, match="generated again"):
        _evaluate(world, tmp_path / "a", ("ifeval",), enable_thinking=True)


def test_a_killed_run_goes_on_with_the_answers_it_has(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "model": world["teacher"],
        "prompts": world["prompts"],
        "max_new_tokens": 12,
        "batch_size": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    whole = evaluate_ifeval(**options)
    answers = tmp_path / "answers.jsonl"
    real = writers.generate_responses

    def killed(model: Any, tokenizer: Any, conversations: Any, *, on_result: Any, **rest: Any) -> Any:
        def keep(index: int, response: Any) -> None:
            on_result(index, response)
            if len(answers.read_text().splitlines()) == 4:
                raise KeyboardInterrupt

        return real(model, tokenizer, conversations, on_result=keep, **rest)

    monkeypatch.setattr(writers, "generate_responses", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_ifeval(**options, answers=answers)
    with open(answers, "a") as file:
        file.write('{"key": 5, "respon')  # torn by the kill
    asked: list[int] = []

    def counting(model: Any, tokenizer: Any, conversations: Any, **rest: Any) -> Any:
        asked.append(len(conversations))
        return real(model, tokenizer, conversations, **rest)

    monkeypatch.setattr(writers, "generate_responses", counting)
    resumed = evaluate_ifeval(**options, answers=answers)
    assert asked == [3]
    assert resumed == whole
    assert [json.loads(line) for line in answers.read_text().splitlines()]
    longer = evaluate_ifeval(**{**options, "max_new_tokens": 13}, answers=answers)
    assert asked == [3, 6]  # other settings: none of the answers is used
    assert longer.settings != whole.settings


def test_a_killed_sampled_run_ends_with_the_answers_of_a_whole_one(
    world: dict[str, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model": world["teacher"],
        "prompts": world["prompts"],
        "max_new_tokens": 12,
        "batch_size": 3,
        "temperature": 1.0,
        "repeats": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    answers = tmp_path / "answers.jsonl"
    whole = evaluate_ifeval(**options, answers=answers)
    lines = answers.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[1:]]
    kept = [line for line, row in zip(lines[1:], rows, strict=True) if row["key"] in (3, 5) or row["repeat"]]
    answers.write_text("".join([lines[0], *kept[:4]]))
    assert evaluate_ifeval(**options, answers=answers).records == whole.records


def test_sampled_repeats_differ_and_need_sampling(world: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": world["teacher"],
        "prompts": world["prompts"],
        "max_new_tokens": 8,
        "limit": 2,
        "dtype": "float32",
        "device": "cpu",
        "repeats": 3,
    }
    with pytest.raises(UserError, match="repeats 3 needs sampled answers"):
        evaluate_ifeval(**options)
    with pytest.raises(UserError, match=r"top_p 0.9 needs sampled answers"):
        evaluate_ifeval(**options | {"repeats": 1, "top_p": 0.9})
    for wrong in ({"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(UserError, match="out of range"):
            evaluate_ifeval(**options | {"temperature": 1.0} | wrong)
    records = evaluate_ifeval(**options, temperature=1.0).records
    assert [(record["key"], record["repeat"]) for record in records] == [
        (k, r) for k in (0, 1) for r in range(3)
    ]
    assert len({record["response"] for record in records}) > 2
    once = evaluate_once(benchmark="ifeval", temperature=0.5, top_p=0.9, records=tmp_path, **options)
    assert once["ifeval"]["prompt_level_strict"]["total"] == 2 * 3
    expected = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "seed": 0, "repeats": 3}
    settings = read_result(tmp_path / "model-ifeval.json").settings
    assert expected.items() <= settings["comparable"].items()


def test_the_verb_gives_the_fixed_names(world: dict[str, Any], tmp_path: Path) -> None:
    found = evaluate_once(
        benchmark="fidelity",
        model=world["student"],
        teacher=world["teacher"],
        data=world["chat"],
        device="cpu",
    )
    names = {"top1_agreement", "top5_agreement", "kl_mean", "kl_p95", "student_perplexity"}
    assert names | {"teacher_perplexity", "num_tokens"} <= set(found["fidelity"])
    responses = tmp_path / "responses.jsonl"
    responses.write_text(json.dumps({"prompt": PROMPTS[1]["prompt"], "response": "Yes"}) + "\n")
    scored = evaluate_once(benchmark="ifeval", responses=responses, prompts=world["prompts"])["ifeval"]
    assert scored["missing"] == 5
    assert scored["prompt_level_strict"] == {"correct": 0, "total": 1, "accuracy": 0.0}
    assert scored["inst_level_strict"] == {"correct": 1, "total": 2, "accuracy": 0.5}
    assert set(scored["by_type"]) == {"punctuation:no_comma", "change_case:english_lowercase"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"benchmark": "mmlu"}, "benchmark 'mmlu' is unknown"),
        ({"benchmark": "fidelity"}, "needs a model"),
        ({"benchmark": "fidelity", "model": Path("x")}, "needs --teacher"),
        ({"benchmark": "fidelity", "model": Path("x"), "teacher": Path("y")}, "needs --data"),
        ({"benchmark": "latency"}, "needs a model"),
        ({"benchmark": "latency", "responses": Path("r")}, "--responses is for --benchmark ifeval"),
        ({"benchmark": "fidelity", "repeats": 2}, "--repeats is not for --benchmark fidelity"),
        ({"benchmark": "latency", "top_p": 0.9}, "--top-p is not for --benchmark latency"),
        (
            {"benchmark": "ifeval", "responses": Path("r"), "temperature": 0.7},
            "--temperature is of answers to come",
        ),
        ({"benchmark": "perplexity", "engine": "vllm"}, "--engine is not for --benchmark perplexity"),
    ],
)
def test_missing_and_misplaced_arguments_are_named(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        evaluate_once(**arguments)


def test_every_benchmark_takes_the_options_of_its_settings(world: dict[str, Any]) -> None:
    import inspect

    for name, row in BENCHMARKS.items():
        accepted = inspect.signature(row.measure).parameters
        assert set(row.options) <= set(accepted), name
        assert row.resumes == ("answers" in accepted), name


def _must_not_run(*arguments: Any, **options: Any) -> None:
    raise AssertionError("generated again")
