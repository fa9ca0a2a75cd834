"""Speed, memory and size of models that are measured side by side.

A machine's speed drifts (heat, other work), so the models take turns within every repeat, in alternating
order, and ratios are formed within a repeat before the median is taken: slow drift cancels.
"""

import inspect
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint import CheckpointReader
from regrow.errors import RunError
from regrow.modeling.load import load_model, pick_device
from regrow.progress import Progress
from regrow.types import EvalResult

_WARM_UP = 1


def model_size(folder: Path) -> dict[str, int]:
    """Parameters stored in a checkpoint and the bytes of its tensors; reads headers only."""
    tensors = CheckpointReader(folder).tensors.values()
    return {
        "num_parameters": sum(_product(tensor.shape) for tensor in tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
    }


def latency_settings(
    *,
    models: Mapping[str, Path],
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    repeats: int = 3,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "bfloat16",
    **_: Any,
) -> dict[str, Any]:
    """Everything that the figures depend on besides the machine and its load."""
    return {
        "comparable": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": _device_name(pick_device(device)),
            "threads": torch.get_num_threads(),
        },
        "models": {name: CheckpointReader(folder).fingerprint() for name, folder in models.items()},
    }


@torch.no_grad()
def measure_latency(
    *,
    models: Mapping[str, Path],
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    repeats: int = 3,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> dict[str, EvalResult]:
    """Measure models in turn on the same random prompt.

    Args:
        models: name -> local folder; the first is the one that ratios refer to (the teacher).
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded one by one after it, whatever they are.
        repeats: timed repeats, after one that is not counted.
        batch_size: sequences at once.
        seed: of the random prompt.
        device, dtype: where and in what precision the models run.
        trust_remote_code: run code that a checkpoint brings along.

    Returns:
        per model: `ttft_s` (one forward pass over the prompt, up to the first token), `prefill_tokens_per_s`,
        `decode_tokens_per_s` (medians over repeats; all sequences together), `prefill_speedup` and
        `decode_speedup` over the first model (medians of the ratios within a repeat), `peak_memory_bytes`,
        `num_parameters`, `weight_bytes`. Peak memory on CUDA is what the allocator held at most, other
        models' weights not counted; on a CPU it is the peak resident size of a fresh process that loads the
        model and does the same work, interpreter and libraries included (`peak_memory_kind` says which).
    """
    target = pick_device(device)
    settings = latency_settings(
        models=models,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    load = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded = {name: load_model(folder, device=target, **load) for name, folder in models.items()}  # type: ignore[arg-type]
    vocabulary = min(model.config.get_text_config().vocab_size for model in loaded.values())
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocabulary, (batch_size, prompt_tokens), generator=generator).to(target)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with Progress("latency", (repeats + _WARM_UP) * len(models), "measurements") as bar:
        for repeat in range(-_WARM_UP, repeats):
            for name in list(loaded)[:: 1 if repeat % 2 == 0 else -1]:
                timing = time_once(loaded[name], prompt, new_tokens)
                if repeat >= 0:
                    times[name].append(timing)
                bar.advance(1)
    baseline = times[next(iter(models))]
    results = {}
    for name, folder in models.items():
        peak = (
            _cuda_peak(loaded[name], prompt, new_tokens)
            if target.type == "cuda"
            else _process_peak(folder, prompt_tokens, new_tokens, batch_size, seed, load)
        )
        figures = {
            **timing_figures(times[name], baseline, prompt_tokens * batch_size, new_tokens * batch_size),
            "peak_memory_bytes": peak,
            "peak_memory_kind": "cuda_allocated" if target.type == "cuda" else "process_resident",
            **model_size(folder),
        }
        records = [
            {"repeat": index, "prefill_s": prefill, "decode_s": decode}
            for index, (prefill, decode) in enumerate(times[name])
        ]
        results[name] = EvalResult("latency", figures, records, settings)
    return results


def timing_figures(
    times: list[tuple[float, float]],
    baseline: list[tuple[float, float]],
    prompt_tokens: int,
    new_tokens: int,
) -> dict[str, float]:
    """Medians over repeats of (prefill seconds, decode seconds), and of the ratios to the baseline's."""
    prefill, decode = zip(*times, strict=True)
    pairs = list(zip(times, baseline, strict=True))
    return {
        "ttft_s": statistics.median(prefill),
        "prefill_tokens_per_s": prompt_tokens / statistics.median(prefill),
        "decode_tokens_per_s": new_tokens / statistics.median(decode),
        "prefill_speedup": statistics.median(base[0] / mine[0] for mine, base in pairs),
        "decode_speedup": statistics.median(base[1] / mine[1] for mine, base in pairs),
    }


@torch.no_grad()
def time_once(
    model: Any, prompt_BS: torch.Tensor, new_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds for the prompt (up to the first token) and for `new_tokens` further steps, greedy."""
    wait = torch.cuda.synchronize if prompt_BS.is_cuda else lambda: None
    # transformers 5.24 renamed the argument; the result's attribute kept its name
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    wait()
    start = clock()
    output = model(input_ids=prompt_BS, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    wait()
    middle = clock()
    for _ in range(new_tokens):
        output = model(input_ids=token, use_cache=True, **{cache: output.past_key_values})
        token = output.logits[:, -1:].argmax(-1)
    wait()
    return middle - start, clock() - middle


def _cuda_peak(model: Any, prompt: torch.Tensor, new_tokens: int) -> int:
    own = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time_once(model, prompt, new_tokens)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before + own)


def _process_peak(
    folder: Path, prompt_tokens: int, new_tokens: int, batch_size: int, seed: int, load: dict[str, Any]
) -> int:
    task = {
        "folder": str(folder),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "load": load,
    }
    finished = subprocess.run(
        [sys.executable, "-m", "regrow.evaluation.memory", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1]
        raise RunError(f"The process that measures the memory of {folder} failed ({reason[:200]}).")
    return int(json.loads(finished.stdout.strip().splitlines()[-1])["peak_memory_bytes"])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
