"""Speed figures from known times, sizes from headers, and that drift of the machine cancels."""

from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.evaluation import latency
from regrow.evaluation.latency import model_size, time_once, timing_figures
from tiny_models import save_tiny_model, tiny_model


def test_figures_from_known_times() -> None:
    times = [(0.5, 2.0), (0.25, 4.0), (1.0, 1.0)]
    baseline = [(1.0, 4.0), (0.5, 6.0), (2.0, 3.0)]
    figures = timing_figures(times, baseline, prompt_tokens=100, new_tokens=10)
    assert figures == {
        "ttft_s": 0.5,
        "prefill_tokens_per_s": 200.0,
        "decode_tokens_per_s": 5.0,
        "prefill_speedup": 2.0,
        "decode_speedup": 2.0,
    }


def test_slow_drift_cancels_in_the_ratio() -> None:
    # The machine gets slower by half every repeat; the student is truly 1.25 times as fast.
    slowness = [1.0, 1.5, 2.25, 3.375]
    figures = timing_figures(
        [(0.8 * s, 0.8 * s) for s in slowness], [(s, s) for s in slowness], prompt_tokens=1, new_tokens=1
    )
    assert figures["decode_speedup"] == figures["prefill_speedup"] == pytest.approx(1.25)


def test_the_clock_is_read_around_prompt_and_decoding() -> None:
    model = tiny_model("llama")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_, **kw: calls.append(1), with_kwargs=True)
    readings: list[int] = []

    def clock() -> float:
        readings.append(len(calls))
        return float(len(calls))

    assert time_once(model, torch.zeros(2, 7, dtype=torch.long), 5, clock) == (1.0, 5.0)
    assert readings == [0, 1, 6]


def test_size_is_that_of_the_stored_tensors(tmp_path: Path) -> None:
    folder = save_tiny_model("llama_tied", tmp_path / "model", dtype=torch.bfloat16)
    expected = sum(parameter.numel() for parameter in tiny_model("llama_tied").parameters())
    assert model_size(folder) == {"num_parameters": expected, "weight_bytes": 2 * expected}


def test_models_take_turns_on_the_same_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: save_tiny_model(name, tmp_path / name) for name in ("llama", "qwen3")}
    turns: list[tuple[str, int]] = []

    def timed(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        turns.append((model.config.model_type, int(prompt.sum())))
        return (1.0, 2.0) if model.config.model_type == "llama" else (0.5, 1.0)

    monkeypatch.setattr(latency, "time_once", timed)
    monkeypatch.setattr(latency, "_process_peak", lambda *_: 123)
    options: dict[str, Any] = {"prompt_tokens": 12, "new_tokens": 3, "repeats": 2, "batch_size": 2}
    results = latency.measure_latency(models=models, dtype="float32", device="cpu", **options)
    # one round that is not counted, then two; the order alternates
    assert [name for name, _ in turns] == ["qwen3", "llama", "llama", "qwen3", "qwen3", "llama"]
    assert len({prompt for _, prompt in turns}) == 1
    assert [len(result.records) for result in results.values()] == [2, 2]
    assert results["llama"].figures["decode_speedup"] == 1.0
    assert results["qwen3"].figures["decode_speedup"] == 2.0
    assert results["qwen3"].figures["prefill_tokens_per_s"] == 48.0
    assert results["qwen3"].figures["peak_memory_bytes"] == 123


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    ballast = bytearray(1_500_000_000)  # this process's memory must not count
    ballast[::4096] = b"1" * len(ballast[::4096])
    result = latency.measure_latency(
        models={"m": folder}, prompt_tokens=12, new_tokens=3, repeats=1, dtype="float32", device="cpu"
    )["m"]
    assert len(ballast) > 0
    assert result.figures["peak_memory_kind"] == "process_resident"
    assert 1e8 < result.figures["peak_memory_bytes"] < 1.4e9  # an interpreter with torch
    assert result.figures["prefill_tokens_per_s"] == pytest.approx(12 / result.figures["ttft_s"])
