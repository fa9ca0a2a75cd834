"""What the statistics cost: the calibration pass beside a plain forward pass, and layer by layer at 4B.

    python benchmarks/calibration.py                       # SmolLM2: overhead with and without correlations
    python benchmarks/make_qwen3_5_4b.py PARENT            # 9.3 GB of random weights in the real shape
    python benchmarks/calibration.py --large PARENT        # minutes per layer, memory (some layers only)

The overhead compares passes over the same batches in turn, median of the ratios within a repeat. The large
run calibrates the first layers of the parent (three linear-attention layers, one full-attention) in a process
of its own, prunes and refits them, and extrapolates to all layers; the JSON line says which figures are
extrapolated.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint import CheckpointReader
from regrow.data.batches import pad_batch, plan_batches
from regrow.data.templates import Encoded
from regrow.families import mlp_sites
from regrow.modeling.hidden import final_hidden
from regrow.modeling.load import load_model
from regrow.modeling.sources import resolve_model
from regrow.pruning.accumulate import Batch, SiteSums, hooked
from regrow.pruning.criteria.obs import remove_greedily
from regrow.pruning.passes import Job
from regrow.pruning.prune import read_down
from regrow.pruning.refit import refit_down


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(_one_run(Path(options.large), options)))
        return
    result: dict[str, Any] = {"benchmark": "calibration", "threads": options.threads}
    if options.large:
        result |= _large(options)
    else:
        result |= overhead(resolve_model(options.model), options)
    print(json.dumps(result))


def random_rows(vocabulary: int, num_tokens: int, length: int) -> list[Encoded]:
    """Rows of random ids whose lengths vary between a half and the whole of `length`."""
    generator = torch.Generator().manual_seed(0)
    rows, total = [], 0
    while total < num_tokens:
        size = int(torch.randint(length // 2, length + 1, (), generator=generator))
        size = min(size, max(num_tokens - total, 2))
        ids = torch.randint(0, vocabulary, (size,), generator=generator).tolist()
        rows.append(Encoded(ids, [True] * size))
        total += size
    return rows


def overhead(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a plain forward pass (no output head) and of passes that count."""
    model: Any = load_model(folder)
    reader = CheckpointReader(folder)
    sites = mlp_sites(reader.config, reader.tensors)
    rows = random_rows(model.config.get_text_config().vocab_size, options.tokens, options.length)
    plan = plan_batches([len(row.input_ids) for row in rows], batch_tokens=4096, seed=0, epoch=0)
    batches = [(list(batch), pad_batch([rows[i] for i in batch])) for batch in plan]
    held_out = frozenset(range(0, len(rows), 8))

    @torch.no_grad()
    def forward(count: Callable[[list[int], torch.Tensor], None]) -> float:
        start = time.monotonic()
        for indices, batch in batches:
            count(indices, batch["attention_mask"])
            final_hidden(model, batch["input_ids"], batch["attention_mask"])
        return time.monotonic() - start

    def counted(correlations: bool) -> float:
        sums = [
            SiteSums(site, torch.device("cpu"), correlations=correlations, fisher=False) for site in sites
        ]
        with hooked(model, sums) as hooks:

            def count(indices: list[int], mask_BS: torch.Tensor) -> None:
                hooks.batch = Batch.of(indices, mask_BS.bool(), held_out if correlations else frozenset())

            return forward(count)

    def plain() -> float:
        return forward(lambda indices, mask_BS: None)

    plain()  # warms caches
    ways: dict[str, Callable[[], float]] = {
        "plain": plain,
        "sums": lambda: counted(False),
        "correlations": lambda: counted(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            seconds[name].append(round(way(), 3))
            print(f"{name}: {seconds[name][-1]} s", file=sys.stderr, flush=True)

    def overhead_of(name: str) -> float:
        pairs = zip(seconds[name], seconds["plain"], strict=True)
        return round(statistics.median(counted / plain for counted, plain in pairs), 3)

    return {
        "model": options.model,
        "tokens": options.tokens,
        "seconds": seconds,
        "overhead_sums": overhead_of("sums"),
        "overhead_correlations": overhead_of("correlations"),
        "target_sums": 1.15,
        "target_correlations": 1.8,
    }


def _large(options: argparse.Namespace) -> dict[str, Any]:
    """Runs of several token numbers and of fewer layers, each in a process of its own."""
    runs = []
    for tokens in options.large_tokens:
        command = [sys.executable, __file__, "--one", "--large", options.large, "--tokens", str(tokens)]
        command += ["--layers", str(options.layers), "--threads", str(options.threads)]
        command += ["--width", str(options.width), "--length", str(options.length)]
        if tokens != options.large_tokens[-1]:
            command.append("--no-solve")
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(runs[-1], file=sys.stderr)
    last, num_layers = runs[-1], runs[-1]["layers_of_the_model"]
    per_token = last["layer_s"] / last["tokens"]
    minutes = {
        f"{tokens} tokens": round(
            num_layers * (per_token * tokens + last["score_s"] + last["refit_s"]) / 60, 1
        )
        for tokens in (16_384, 65_536, 262_144)
    }
    return {
        "runs": runs,
        "layers_run": options.layers,
        "extrapolated_total_minutes": minutes,
        "extrapolation": "layers x (seconds per token and layer x tokens + score + refit), from the last run",
        "target_peak_gb": 6.0,
    }


@torch.no_grad()
def _one_run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate the first layers layer by layer, then score and refit one of them."""
    from regrow.pruning import layerwise
    from regrow.pruning.skeleton import Skeleton

    reader = CheckpointReader(folder)
    every = mlp_sites(reader.config, reader.tensors)
    sites = [site for site in every if site.module and site.layer < options.layers]
    text = reader.config.get("text_config", reader.config)
    rows = random_rows(text["vocab_size"], options.tokens, options.length)
    plan = plan_batches([len(row.input_ids) for row in rows], batch_tokens=4096, seed=0, epoch=0)
    job = Job(
        folder=folder,
        reader=reader,
        sites=sites,
        rows=rows,
        held_out=frozenset(range(0, len(rows), 8)),
        batches=plan,
        correlations=True,
        fisher=False,
        seed=0,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )

    class Short(Skeleton):
        """Only the layers that this run pays for."""

        @property
        def layers(self) -> list[Any]:
            return super().layers[: options.layers]

    layerwise.Skeleton = Short  # type: ignore[misc]
    kept: dict[str, Any] = {}
    wanted = f"{sites[-1].name}."

    def write(name: str, value: Any) -> None:
        if name.startswith(wanted):
            kept[name.removeprefix(wanted)] = torch.from_numpy(value)

    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        clock = layerwise.run_layerwise(job, write, Path(scratch), 0)
    result: dict[str, Any] = {
        "tokens": options.tokens,
        "layers_of_the_model": len([site for site in every if site.kind in ("dense", "mtp")]),
        "embed_s": clock["embed"],
        "layer_s": round(clock["layers"] / options.layers, 2),
        "calibration_peak_gb": _peak_gb(),
    }
    if not options.no_solve:
        result |= _solve(reader, sites[-1], kept, options.width)
    return result | {"peak_gb": _peak_gb()}


def _solve(reader: CheckpointReader, site: Any, kept: dict[str, Any], width: int) -> dict[str, Any]:
    """Greedy removal and refit of one layer, one after the other as `prune` does it."""
    num_tokens = int(kept["num_tokens"][0])
    start = time.monotonic()
    down_DF = read_down(reader, site)
    removed, _ = remove_greedily(down_DF, kept["gram"] / num_tokens, num_removed=site.width - width)
    scored = time.monotonic()
    mask_F = torch.ones(site.width, dtype=torch.bool)
    mask_F[removed] = False
    result = refit_down(
        down_DF,
        mask_F.nonzero()[:, 0],
        gram_FF=kept["gram"],
        num_tokens=num_tokens,
        held_out_gram_FF=kept["held_out_gram"],
        stored_dtype=torch.bfloat16,
    )
    return {
        "site": site.name,
        "width": width,
        "score_s": round(scored - start, 2),
        "refit_s": round(time.monotonic() - scored, 2),
        "rho": result.rho,
        "error_before": result.error_before,
        "error_after": result.error_after,
        "rhos_tried": len(result.tried),
    }


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="builtin:smollm2-135m-instruct")
    add("--tokens", type=int, default=16_384)
    add("--length", type=int, default=512)
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--large", help="folder of make_qwen3_5_4b.py")
    add("--large-tokens", type=int, nargs="+", default=[2_048, 8_192])
    add("--layers", type=int, default=4)
    add("--width", type=int, default=7808)
    add("--scratch", help="where activations are spilled")
    add("--one", action="store_true", help=argparse.SUPPRESS)
    add("--no-solve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
