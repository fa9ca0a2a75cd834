"""Prompts per minute of `regrow.modeling.generate_responses` against lm-eval's Hugging Face backend.

Same model object, prompts, chat template, batch size, greedy decoding and token limit; the two take turns, in
an order that alternates, and each figure is the median of its runs. The last line is JSON.

    python benchmarks/generation.py --prompts input_data.jsonl --limit 64 --max-new-tokens 512 --batch-size 32
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from regrow.data.prompts import read_prompts
from regrow.modeling.generate import Response, generate_responses
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.modeling.sources import resolve_model


def ours(model: Any, tokenizer: Any, prompts: list[str], options: argparse.Namespace) -> list[Response]:
    return generate_responses(
        model,
        tokenizer,
        prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        progress=None,
    )


def lm_eval_backend(model: Any, tokenizer: Any, prompts: list[str], options: argparse.Namespace) -> list[str]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": options.max_new_tokens}
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    requests = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
    return backend.generate_until(requests, disable_tqdm=True)


def spread_prompts(source: str, limit: int) -> list[str]:
    prompts = [prompt.text for prompt in read_prompts(source)]
    step = max(len(prompts) // limit, 1)  # spread over the file: neighbours can be alike
    return prompts[::step][:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument(
        "--prompts", default="builtin:dev", help="as in a recipe: a file, a Hub id, builtin:dev"
    )
    parser.add_argument("--quick", action="store_true", help="16 prompts, 64 tokens, one round")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.quick:
        options.limit, options.max_new_tokens, options.repeats = 16, 64, 1
    if options.threads:
        torch.set_num_threads(options.threads)

    device = pick_device(options.device)
    folder = resolve_model(options.model)
    model, tokenizer = load_model(folder, dtype=options.dtype, device=device), load_tokenizer(folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in spread_prompts(options.prompts, options.limit)
    ]
    runners = {"regrow": ours, "lm_eval": lm_eval_backend}
    generate_responses(
        model, tokenizer, prompts[:2], max_new_tokens=8, batch_size=2, progress=None
    )  # warm up

    seconds: dict[str, list[float]] = {name: [] for name in runners}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runners}
    texts: dict[str, list[str]] = {}
    responses: list[Response] = []
    for repeat in range(options.repeats):
        for name in list(runners)[:: -1 if repeat % 2 else 1]:
            start, cpu_start = time.perf_counter(), time.process_time()
            output = runners[name](model, tokenizer, prompts, options)
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
            if name == "regrow":
                responses = output
            texts[name] = [item.text if isinstance(item, Response) else item for item in output]
            wall, cpu = seconds[name][-1], cpu_seconds[name][-1]
            print(f"repeat {repeat}: {name:8s} {wall:7.1f} s, {cpu:7.1f} s of CPU", flush=True)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [other / own for own, other in zip(seconds["regrow"], seconds["lm_eval"], strict=True)]
    same = sum(a.strip() == b.strip() for a, b in zip(texts["regrow"], texts["lm_eval"], strict=True))
    tokens = [response.num_tokens for response in responses]
    result = {
        "prompts_per_minute": {name: 60 * len(prompts) / value for name, value in median.items()},
        "speedup": statistics.median(ratios),
        "speedups": ratios,
        "same_texts": same,
        "num_prompts": len(prompts),
        "mean_new_tokens": statistics.mean(tokens),
        "cut_off": sum(not response.finished for response in responses),
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # on a busy machine a fairer measure than seconds
        "versions": {"torch": torch.__version__, **_versions()},
    }
    print(f"\n{'':10s}{'prompts/min':>12s}{'seconds':>10s}")
    for name, value in median.items():
        print(f"{name:10s}{60 * len(prompts) / value:12.1f}{value:10.1f}")
    print(json.dumps(result))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "lm_eval")}


if __name__ == "__main__":
    main()
