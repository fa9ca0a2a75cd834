"""Everything that needs a GPU, in one script of under ten minutes: the loss alone, then a full training step.

    python benchmarks/gpu.py [--dry-run] [--only loss|step]

1. The card's matrix rate (bf16, 8192^3).
2. The loss at [8192, 2560, 248320], forward + backward to the hidden states, frozen shared head, against its
   three bare matrix products and the peers: seconds, memory above the inputs, errors against fp64.
3. One training step of Qwen3.5-4B's real shape with random weights, teacher and student (MLPs at 7808) on one
   card, all but the embeddings trained: tokens per second, share of the card's matrix rate, peak memory, with
   our loss and with the peers'.

`--dry-run` does the same on the CPU at small sizes, to see that the script works. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from loss import DISTANCES, NUM_CHECKED, implementations, make_inputs, true_values

CONFIG = Path(__file__).with_name("qwen3_5_4b_config.json")
LOSS_SHAPE, DRY_LOSS_SHAPE = (8192, 2560, 248320), (64, 32, 2000)
STEP_SHAPE, DRY_STEP_SHAPE = (4, 2048), (2, 16)  # rows, tokens per row
STUDENT_WIDTH = 7808
PEERS = ["regrow", "TRL GKD", "Liger chunked", "torchtune chunked", "plain bf16 -> fp32"]


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function, repeats):
    """Best seconds of `repeats` runs after a first one, and peak bytes above what was held before."""
    held = 0
    function()
    if torch.cuda.is_available():
        synchronise()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - held if torch.cuda.is_available() else None
    return min(times), peak


def matrix_rate(device, size):
    """bf16 matrix rate in FLOP/s."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds, _ = timed(lambda: left @ right, 5)
    return 2 * size**3 / seconds


def attempt(function):
    """The function's result, or why there is none."""
    try:
        return function()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"skipped": "out of memory"}
    except ImportError as error:
        return {"skipped": str(error)}


# --- the loss alone -------------------------------------------------------------------------------------


def measure_losses(device, shape, repeats):
    student, teacher, head = (tensor.to(device) for tensor in make_inputs(shape, DISTANCES["1e-3"]))
    products_seconds, _ = timed(bare_products(student, teacher, head), repeats)
    truth, true_gradient = true_values(shape)["1e-3"]
    print(f"\nloss at {list(shape)}; three bare products {products_seconds * 1e3:.1f} ms")
    rows = []
    for name in PEERS:
        row = attempt(lambda name=name: measure_loss(name, student, teacher, head, repeats))
        if "skipped" not in row:
            row["ratio"] = row["seconds"] / products_seconds
            row["value_error"] = abs(row.pop("checked_value") / truth - 1)
            error = (row.pop("checked_gradient") - true_gradient).norm() / true_gradient.norm()
            row["gradient_error"] = error.item()
        rows.append({"name": name} | row)
        print(describe(rows[-1]), flush=True)
    return rows


def bare_products(student, teacher, head):
    """A function that does the three products; it holds a stand-in for the logits' gradient."""
    gradient = torch.zeros(student.shape[0], head.shape[0], dtype=head.dtype, device=head.device)

    def run():
        student @ head.T
        teacher @ head.T
        gradient @ head

    return run


def measure_loss(name, student, teacher, head, repeats):
    function = implementations()[name]()
    hidden = student.clone().requires_grad_()

    def run():
        hidden.grad = None
        function(hidden, teacher, head).backward()

    seconds, extra = timed(run, repeats)
    few = student[:NUM_CHECKED].clone().requires_grad_()
    value = function(few, teacher[:NUM_CHECKED], head)
    value.backward()
    checked = {"checked_value": value.item(), "checked_gradient": few.grad.double().cpu()}
    return {"seconds": seconds, "extra_bytes": extra} | checked


def describe(row):
    if "skipped" in row:
        return f"{row['name']:20s} skipped: {row['skipped']}"
    figures = {key: value for key, value in row.items() if isinstance(value, float | int)}
    return f"{row['name']:20s} " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items())


# --- a full training step -------------------------------------------------------------------------------


def build_model(device, width, dry):
    """A causal language model of the real shape, or a shrunk one, with random bf16 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = dict(json.loads(CONFIG.read_text())["text_config"]) | {"mtp_num_hidden_layers": 0}
    text["intermediate_size"] = width
    if dry:
        text |= {"hidden_size": 64, "num_hidden_layers": 4, "layer_types": text["layer_types"][:4]}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = AutoConfig.for_model(**(text | {"model_type": "qwen3_5_text"}))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def measure_steps(device, rows, length, rate, repeats, dry):
    teacher = build_model(device, 96 if dry else 9216, dry).eval()
    student = build_model(device, 80 if dry else STUDENT_WIDTH, dry)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    head = teacher.get_output_embeddings().weight.detach()  # frozen in both, so one serves both
    for parameters in (teacher.parameters(), student.get_input_embeddings().parameters()):
        for parameter in parameters:
            parameter.requires_grad_(False)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    ids = torch.randint(0, head.shape[0], (rows, length), device=device)
    num_tokens = rows * length
    bodies = [sum(p.numel() for p in model.model.layers.parameters()) for model in (teacher, student)]
    # Without attention's own products and recomputation: a lower bound of the work that is needed.
    flops = num_tokens * (2 * bodies[0] + 6 * bodies[1] + 6 * head.numel())
    print(f"\ntraining step: {num_tokens} tokens; layers hold {bodies[0]:,} + {bodies[1]:,} parameters")
    results = []
    for name in PEERS:

        def measure(name=name):
            function = implementations()[name]()

            def step():
                with torch.no_grad():
                    teacher_hidden = teacher.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
                hidden = student.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
                function(hidden, teacher_hidden, head).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            seconds, extra = timed(step, repeats)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            figures = {"seconds": seconds, "tokens_per_second": num_tokens / seconds}
            figures |= {"share_of_matrix_rate": flops / seconds / rate, "peak_bytes": peak}
            return figures | {"extra_bytes": extra}

        results.append({"name": name} | attempt(measure))
        print(describe(results[-1]), flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--only", choices=["loss", "step"])
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; use --dry-run to try the script on the CPU")
    device = torch.device("cpu" if dry else "cuda")
    name = "CPU (dry run)" if dry else torch.cuda.get_device_name()
    rate = matrix_rate(device, 256 if dry else 8192)
    print(f"{name}: {rate / 1e12:.2f} TFLOP/s in bf16 products")
    result = {"device": name, "matrix_flops_per_s": rate}
    repeats = 1 if dry else 3
    if arguments.only != "step":
        result["loss"] = measure_losses(device, DRY_LOSS_SHAPE if dry else LOSS_SHAPE, repeats)
    if arguments.only != "loss":
        rows, length = DRY_STEP_SHAPE if dry else STEP_SHAPE
        result["step"] = measure_steps(device, rows, length, rate, repeats, dry)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
