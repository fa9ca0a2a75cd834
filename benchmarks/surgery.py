"""Time and memory of cutting Qwen3.5-4B's real shape from 9216 to 7808 channels, beside `cp -r`.

    python benchmarks/make_qwen3_5_4b.py PARENT
    python benchmarks/surgery.py PARENT [--transformers]

Every way runs as a process of its own, in turn, each time after the parent was read into the page cache and
the disk had nothing left to write. The best of the repeats counts; the ratio of the medians stands beside it.
`--transformers` adds, once, at the end: load the result as both of its classes and generate, and the usual
load -> slice -> save_pretrained (13 GB of memory). The last line is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

WIDTH, SHARDS = 7808, 16
PLAN_AND_REWRITE = """
import sys
import numpy as np
from regrow.checkpoint import CheckpointReader
from regrow.families import mlp_sites
from regrow.pruning.rewrite import rewrite_checkpoint
from regrow.types import PruningPlan

parent, out, width, shards = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
reader = CheckpointReader(parent)
sites = mlp_sites(reader.config, reader.tensors)
rng = np.random.default_rng(0)
kept = {s.name: tuple(sorted(rng.choice(s.width, width, replace=False).tolist())) for s in sites}
plan = PruningPlan(reader.fingerprint(), {"dense": width, "mtp": width}, kept)
rewrite_checkpoint(parent=reader, plan=plan, out=out, shards=shards)
"""
TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForImageTextToText

parent, out, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(parent, dtype=torch.bfloat16)
kept = torch.arange(width)
for layer in model.model.language_model.layers:
    mlp = layer.mlp
    for projection, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        projection.weight = torch.nn.Parameter(projection.weight.detach().index_select(dim, kept))
model.config.text_config.intermediate_size = width
model.save_pretrained(out, max_shard_size="500MB")
"""
LOAD = """
import json
import sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

found = {}
for loader in (AutoModelForImageTextToText, AutoModelForCausalLM):
    model, info = loader.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
    prompt = torch.tensor([[1, 2, 3]])
    written = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    problems = {key: len(value) for key, value in info.items() if value}
    found[type(model).__name__] = {"problems": problems, "written_tokens": written}
    del model
print(json.dumps(found))
"""


def measure(command: list[str], parent: Path, out: Path) -> dict[str, float]:
    """Wall time, CPU time and peak resident memory of one process that reads `parent` and writes `out`."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for file in sorted(parent.glob("*.safetensors")):  # into the page cache
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"{command[:3]} failed:\n{errors[-2000:]}")
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mb": round(usage.ru_maxrss / 1024, 1),
    }


def describe(out: Path) -> dict[str, int]:
    """What lies in a written folder."""
    from regrow.checkpoint import CheckpointReader

    reader = CheckpointReader(out)
    mtp = sum(t.nbytes for t in reader.tensors.values() if t.name.startswith("mtp."))
    return {
        "shards": len(reader.shard_names),
        "main_bytes": sum(t.nbytes for t in reader.tensors.values()) - mtp,
        "mtp_bytes": mtp,
        "float32_tensors": sum(t.dtype == "F32" for t in reader.tensors.values()),
        "largest_shard_bytes": max((out / name).stat().st_size for name in reader.shard_names),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parent", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--skip-prune", action="store_true", help="leave out the whole `regrow prune`")
    arguments = parser.parse_args()
    parent: Path = arguments.parent
    out = parent.with_name(parent.name + "-out")
    size = [str(WIDTH), str(SHARDS)]
    prune = ["-m", "regrow", "prune", str(parent), "--width", str(WIDTH), "--shards", str(SHARDS)]
    ways = {
        "cp": ["cp", "-r", str(parent), str(out)],
        "rewrite": [sys.executable, "-c", PLAN_AND_REWRITE, str(parent), str(out), *size],
    }
    if not arguments.skip_prune:
        ways["prune_magnitude"] = [
            sys.executable, *prune, "--criterion", "magnitude", "--no-refit", "--out", str(out),
        ]  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    written: dict[str, dict[str, int]] = {}
    for repeat in range(arguments.repeats):
        for way, command in ways.items():
            runs[way].append(measure(command, parent, out))
            print(f"{way}: {runs[way][-1]}", file=sys.stderr, flush=True)
            if way != "cp" and not repeat:
                written[way] = describe(out)
    loaded = None
    if arguments.transformers:
        # The result of the last way, which is the product's.
        answer = subprocess.run([sys.executable, "-c", LOAD, str(out)], stdout=subprocess.PIPE, check=True)
        loaded = json.loads(answer.stdout.splitlines()[-1])
        command = [sys.executable, "-c", TRANSFORMERS, str(parent), str(out), str(WIDTH)]
        runs["transformers"] = [measure(command, parent, out)]
        written["transformers"] = describe(out)
    shutil.rmtree(out, ignore_errors=True)
    best = {way: min(results, key=lambda r: r["seconds"]) for way, results in runs.items()}
    median = {way: statistics.median(r["seconds"] for r in results) for way, results in runs.items()}
    ratios = {
        "ratio_to_cp": {way: round(best[way]["seconds"] / best["cp"]["seconds"], 3) for way in best},
        "ratio_of_medians": {way: round(median[way] / median["cp"], 3) for way in median},
    }
    print(json.dumps({"best": best, **ratios, "written": written, "loaded": loaded, "runs": runs}))


if __name__ == "__main__":
    main()
