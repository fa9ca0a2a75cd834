"""The distillation loss alone, forward + backward to the hidden states, against its peers and its floor.

    python benchmarks/loss.py [--quick] [--threads 2] [--shapes T,D,V T,D,V ...] [--scale]

bf16 hidden states and head, frozen shared head, a student close to its teacher. Every implementation runs
in a process of its own that builds the inputs, then resets the peak of its resident memory, then runs:
"extra" is that peak minus what was resident before. In the same process, in turn with it, run the three
bare bf16 matrix products that no implementation can do without; times are compared as multiples of these,
so that a machine that is slower for a while does not decide. Value and gradient are compared with fp64 on
a few tokens at a KL near 1e-3 and near 1e-4. A peer is "right" if both are within 1 % at the larger KL.
torchtune's value leaves out the teacher's entropy. Liger runs without its torch.compile.

`--scale` runs 1k to 64k tokens instead: time per token and memory beyond the gradient must not grow.
The last line is JSON.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = ["1024,2560,248320", "4096,576,49152"]
QUICK_SHAPES = ["256,1024,65536", "1024,576,49152"]
NUM_CHECKED = 16  # tokens compared with fp64
DISTANCES = {"1e-3": 0.048, "1e-4": 0.0152}  # of student from teacher, and the KL it gives
SPREAD = 3.0  # standard deviation of the logits; real models have 2 to 4


def make_inputs(shape, distance):
    """Hidden states [T, D] of student and teacher and a head [V, D], bf16, the same in every process."""
    import torch

    num_tokens, width, vocab_size = shape
    rng = torch.Generator().manual_seed(0)
    head = torch.empty(vocab_size, width, dtype=torch.bfloat16).normal_(generator=rng)
    teacher = torch.randn(num_tokens, width, generator=rng) * SPREAD / width**0.5
    # One likely next token each, as in text.
    peaks = torch.randint(0, vocab_size, (num_tokens,), generator=rng)
    teacher = (teacher + head[peaks].float() * 10.0 / width).bfloat16()
    noise = torch.randn(num_tokens, width, generator=rng) * distance / width**0.5
    return (teacher.float() + noise).bfloat16(), teacher, head


# --- implementations: (student_hidden requiring grad, teacher_hidden, head) -> scalar loss ---------------


def ours(precision):
    from regrow.losses import fused_linear_kl

    return lambda s, t, head: fused_linear_kl(s, t, head, head, precision=precision).loss


def plain(product_dtype, softmax_dtype):
    """Full logits; products in `product_dtype`, log-softmax and KL in `softmax_dtype`."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    def loss(student, teacher, head):
        head = head.to(product_dtype)
        log_q = F.log_softmax((student.to(product_dtype) @ head.T).to(softmax_dtype), -1)
        with torch.no_grad():
            log_p = F.log_softmax((teacher.to(product_dtype) @ head.T).to(softmax_dtype), -1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return loss


def trl():
    import torch
    from trl.experimental.gkd import GKDTrainer

    def loss(student, teacher, head):
        with torch.no_grad():
            teacher_logits = teacher @ head.T
        return GKDTrainer.generalized_jsd_loss(student @ head.T, teacher_logits, beta=0.0)

    return loss


def liger():
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

    def loss(student, teacher, head):
        return module(
            student, head, teacher, head, torch.zeros(student.shape[0], dtype=torch.long, device=head.device)
        )

    return loss


def torchtune():
    import torch

    # The package cannot be imported beside a current torchao; the loss itself needs torch alone.
    package = importlib.util.find_spec("torchtune")
    if package is None or not package.submodule_search_locations:
        raise ImportError("torchtune is not installed (pip install --no-deps torchtune)")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    criterion = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=8)

    def loss(student, teacher, head):
        chunks = [(chunk @ head.T)[None] for chunk in student.chunk(8)]
        with torch.no_grad():
            teacher_chunks = [(chunk @ head.T)[None] for chunk in teacher.chunk(8)]
        return criterion(
            chunks, teacher_chunks, torch.zeros(1, student.shape[0], dtype=torch.long, device=head.device)
        )

    return loss


def implementations():
    import torch

    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "regrow": lambda: ours("auto"),
        "regrow exact": lambda: ours("exact"),
        "plain fp32 logits": lambda: plain(fp32, fp32),
        "plain bf16 -> fp32": lambda: plain(bf16, fp32),
        "plain bf16": lambda: plain(bf16, bf16),
        "TRL GKD": trl,
        "Liger chunked": liger,
        "torchtune chunked": torchtune,
    }


NAMES = [
    "regrow",
    "regrow exact",
    "plain bf16 -> fp32",
    "plain bf16",
    "TRL GKD",
    "Liger chunked",
    "torchtune chunked",
    "plain fp32 logits",
]

# --- one process per measurement ------------------------------------------------------------------------


def status_bytes(field):
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak():
    """Resident bytes, after giving back what building the inputs freed, so that it cannot be used unseen."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def work(name, shape, repeats, threads, out):
    """Measure one implementation; writes a JSON file, and the checked gradients beside it."""
    import torch

    torch.set_num_threads(threads)
    try:
        loss = implementations()[name]()
    except ImportError as error:
        Path(out).write_text(json.dumps({"skipped": str(error)}))
        return
    student, teacher, head = make_inputs(shape, DISTANCES["1e-3"])
    student.requires_grad_()

    def run():
        student.grad = None
        start = time.perf_counter()
        value = loss(student, teacher, head)
        value.backward()
        return time.perf_counter() - start, value.item()

    # A small run first loads the libraries' code, which is not the loss's memory.
    tiny = student[:2].detach().requires_grad_()
    loss(tiny, teacher[:2], head[:8].clone()).backward()
    resident = reset_peak()
    seconds, value = run()
    extra = status_bytes("VmHWM") - resident
    times, bare_times = [seconds], [bare_products(student.detach(), teacher, head)]
    for _ in range(repeats - 1):
        times.append(run()[0])
        bare_times.append(bare_products(student.detach(), teacher, head))
    checks = {}
    for kl, distance in DISTANCES.items():
        hidden = make_inputs(shape, distance)[0][:NUM_CHECKED].requires_grad_() if kl != "1e-3" else None
        hidden = student.detach()[:NUM_CHECKED].requires_grad_() if hidden is None else hidden
        checked = loss(hidden, teacher[:NUM_CHECKED], head)
        checked.backward()
        checks[kl] = (checked.item(), hidden.grad.double())
    torch.save(checks, out + ".pt")
    result = {
        "seconds": min(times),
        "products_seconds": min(bare_times),
        "extra_bytes": extra,
        "value": value,
    }
    Path(out).write_text(json.dumps(result))


def bare_products(student, teacher, head):
    """Seconds of the student's logits, the teacher's logits and the gradient's product with the head."""
    import torch

    gradient = torch.zeros(student.shape[0], head.shape[0], dtype=head.dtype)
    start = time.perf_counter()
    logits = student @ head.T
    del logits
    logits = teacher @ head.T
    del logits
    gradient @ head
    return time.perf_counter() - start


def spawn(name, shape, repeats, threads, extra_args=()):
    """Run `work` in a process of its own; returns its result and the checked losses and gradients."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        command = [sys.executable, __file__, "--worker", name, "--out", out, "--repeats", str(repeats)]
        command += ["--threads", str(threads), "--shapes", ",".join(map(str, shape)), *extra_args]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not Path(out).exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {"skipped": f"failed: {last}"}, None
        result = json.loads(Path(out).read_text())
        return result, torch.load(out + ".pt") if Path(out + ".pt").exists() else None


def true_values(shape):
    """fp64 value and gradient of the checked tokens, per KL."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import torch

    from reference import naive_divergence, naive_logits

    truth = {}
    for kl, distance in DISTANCES.items():
        student, teacher, head = make_inputs(shape, distance)
        logits = naive_logits(student[:NUM_CHECKED], head).requires_grad_()
        teacher_logits = naive_logits(teacher[:NUM_CHECKED], head)
        value = naive_divergence("forward_kl", logits, teacher_logits).mean()
        (slope,) = torch.autograd.grad(value, logits)
        blocks = zip(slope.split(4096, 1), head.split(4096), strict=True)
        truth[kl] = (value.item(), sum(part @ block.double() for part, block in blocks))
    return truth


def measure_shape(shape, threads, repeats):
    """Rows of the table for one shape."""
    print(f"\n[tokens, hidden, vocabulary] = {list(shape)}, {threads} threads", flush=True)
    truth = true_values(shape)
    print("true KL of the checked tokens: " + ", ".join(f"{value:.6f}" for value, _ in truth.values()))
    header = f"{'':20s} {'seconds':>8s} {'/ products':>10s} {'extra MB':>9s}"
    for _ in truth:
        header += f" {'value err':>10s} {'grad err':>9s}"
    print(header + f"   (errors at KL {' and '.join(truth)})", flush=True)
    rows = []
    for name in NAMES:
        slow = name == "plain fp32 logits"
        result, checks = spawn(name, shape, 1 if slow else repeats, threads)
        row = {"shape": list(shape), "name": name} | result
        if "skipped" not in result:
            row["ratio"] = result["seconds"] / result["products_seconds"]
            for kl, (value, gradient) in truth.items():
                got_value, got_gradient = checks[kl]
                row[f"value_error_{kl}"] = abs(got_value / value - 1)
                row[f"gradient_error_{kl}"] = ((got_gradient - gradient).norm() / gradient.norm()).item()
            row["right"] = row["value_error_1e-3"] < 0.01 and row["gradient_error_1e-3"] < 0.01
        rows.append(row)
        print(format_row(row), flush=True)
    return rows


def format_row(row):
    if "skipped" in row:
        return f"{row['name']:20s} skipped: {row['skipped']}"
    line = f"{row['name']:20s} {row['seconds']:8.2f} {row['ratio']:10.2f} {row['extra_bytes'] / 1e6:9.0f}"
    for kl in DISTANCES:
        line += f" {row[f'value_error_{kl}']:10.2e} {row[f'gradient_error_{kl}']:9.2e}"
    return line + ("" if row["right"] else "   not right")


def summarise(rows):
    """The JSON line: each figure the worst over the shapes."""
    figures = {
        "time_ratio_to_matmuls": [],
        "time_ratio_to_best_peer": [],
        "time_ratio_to_fastest_peer_right_or_not": [],
        "extra_memory_ratio_to_best_peer": [],
        "gradient_error": [],
        "value_error": [],
    }
    for shape in {tuple(row["shape"]) for row in rows}:
        done = [row for row in rows if tuple(row["shape"]) == shape and "skipped" not in row]
        mine = next(row for row in done if row["name"] == "regrow")
        peers = [row for row in done if not row["name"].startswith("regrow")]
        figures["time_ratio_to_matmuls"].append(mine["ratio"])
        right = [row["ratio"] for row in peers if row["right"]]
        if right:
            figures["time_ratio_to_best_peer"].append(mine["ratio"] / min(right))
        if peers:
            fastest = min(row["ratio"] for row in peers)
            figures["time_ratio_to_fastest_peer_right_or_not"].append(mine["ratio"] / fastest)
            leanest = min(row["extra_bytes"] for row in peers)
            figures["extra_memory_ratio_to_best_peer"].append(mine["extra_bytes"] / leanest)
        figures["gradient_error"].append(max(mine[f"gradient_error_{kl}"] for kl in DISTANCES))
        figures["value_error"].append(max(mine[f"value_error_{kl}"] for kl in DISTANCES))
    return {name: round(max(values), 5) if values else None for name, values in figures.items()}


# --- scale ----------------------------------------------------------------------------------------------


def work_scale(shape, threads, out):
    """Seconds and memory of one loss at many tokens."""
    import torch

    from regrow.losses import fused_linear_kl

    torch.set_num_threads(threads)
    student, teacher, head = make_inputs(shape, DISTANCES["1e-3"])
    student.requires_grad_()
    fused_linear_kl(student[:2].detach().requires_grad_(), teacher[:2], head, head).loss.backward()
    resident = reset_peak()
    start = time.perf_counter()
    fused_linear_kl(student, teacher, head, head).loss.backward()
    seconds = time.perf_counter() - start
    extra = status_bytes("VmHWM") - resident
    # The gradient is the result: the tensor kept for backward, and the one that backward returns.
    result = {"seconds": seconds, "extra_bytes": extra, "result_bytes": 2 * student.grad.nbytes}
    Path(out).write_text(json.dumps(result))


def scale(threads, quick):
    width, vocab_size = (64, 8192) if quick else (576, 49152)
    print(
        f"hidden {width}, vocabulary {vocab_size}\n  tokens  seconds  us/token  extra MB beyond the gradient"
    )
    rows = []
    for num_tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        shape = (num_tokens, width, vocab_size)
        result, _ = spawn("regrow", shape, 1, threads, ("--scale",))
        row = {"shape": list(shape)} | result
        row["us_per_token"] = result["seconds"] / num_tokens * 1e6
        row["extra_bytes"] = max(0, result["extra_bytes"] - result["result_bytes"])
        rows.append(row)
        seconds, per_token = row["seconds"], row["us_per_token"]
        print(f"{num_tokens:8d} {seconds:8.2f} {per_token:9.0f} {row['extra_bytes'] / 1e6:9.0f}", flush=True)
    first, last = rows[0], rows[-1]
    growth = last["extra_bytes"] / max(1, first["extra_bytes"])
    per_token = last["us_per_token"] / first["us_per_token"]
    print(json.dumps({"memory_growth_1k_to_64k": growth, "time_per_token_growth": per_token, "rows": rows}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=None, help="T,D,V of each shape")
    parser.add_argument("--quick", action="store_true", help="smaller shapes, under two minutes")
    parser.add_argument("--scale", action="store_true", help="1k to 64k tokens instead of the peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    texts = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    shapes = [tuple(int(part) for part in text.split(",")) for text in texts]
    if arguments.worker and arguments.scale:
        work_scale(shapes[0], arguments.threads, arguments.out)
    elif arguments.worker:
        work(arguments.worker, shapes[0], arguments.repeats, arguments.threads, arguments.out)
    elif arguments.scale:
        scale(arguments.threads, arguments.quick)
    else:
        rows = [row for shape in shapes for row in measure_shape(shape, arguments.threads, arguments.repeats)]
        print(json.dumps(summarise(rows) | {"rows": rows}))


if __name__ == "__main__":
    main()
