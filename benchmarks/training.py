"""A training step against TRL's off-policy GKD trainer: time per step and peak memory, on the same batches.

    python benchmarks/training.py [--rounds 6] [--batch-tokens 2048] [--precision bf16] [--threads 2]
        [--teacher FOLDER --student FOLDER] [--corpus FILE] [--quick]

By default the teacher is SmolLM2-135M-Instruct and the student its MLPs cut to 1280. Every contender lives in
a process of its own and trains through its own public trainer; the processes take turns step by step, so
that a machine that is slower for a while slows them alike, and times are compared round by round (median of
ratios). Micro-batches (real tokens, padding), loss (forward KL, temperature 1), learning rate, AdamW and
dtype of the weights are the same; neither side recomputes activations. Memory is the peak of the process'
resident memory during the timed steps (imports and models included). The last line is JSON.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("regrow", "regrow cached", "TRL GKD")
LEARNING_RATE = 2e-5


class Turn:
    """A worker's side of taking turns: wait for the word, take a step, say how long it took."""

    def __init__(self):
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print goes to standard error
        self.first = True

    def wait(self):
        if sys.stdin.readline().strip() != "step":
            self.channel.close()
            os._exit(0)
        if self.first:
            reset_peak()
            self.first = False
        self.start = time.perf_counter(), cpu_seconds()

    def done(self, tokens, loss):
        row = {
            "seconds": time.perf_counter() - self.start[0],
            "cpu_seconds": cpu_seconds() - self.start[1],
            "tokens": tokens,
            "loss": loss,
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(row), file=self.channel, flush=True)


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def options(arguments):
    """What both sides train with."""
    return {
        "max_steps": arguments["rounds"] + 1,
        "learning_rate": LEARNING_RATE,
        "batch_tokens": arguments["batch_tokens"],
        "precision": arguments["precision"],
        "sequence_length": arguments["sequence_length"],
        "device": "cpu",
        "report_to": (),
        "eval_steps": 10_000,
        "save_steps": 10_000,
        "held_out_tokens": 64,
        "warmup_fraction": 0.0,
        "optimizer": "adamw_torch_fused",
        "select_by": "last",
    }


def run_regrow(arguments, turn, cached):
    """Our trainer, whole: turns are hooked in where it fetches a step's batches and where it counts it."""
    from regrow.training.distill import distill
    from regrow.training.trainer import DistillTrainer

    fetch, finish = DistillTrainer.get_batch_samples, DistillTrainer.finish_step

    def get_batch_samples(self, *args):
        turn.wait()
        return fetch(self, *args)

    def finish_step(self):
        finish(self)
        turn.done(self._step_counts[1], self.record.recent[-1])

    DistillTrainer.get_batch_samples, DistillTrainer.finish_step = get_batch_samples, finish_step
    with tempfile.TemporaryDirectory() as work:
        distill(
            student=Path(arguments["student"]),
            teacher=Path(arguments["teacher"]),
            corpora=[(arguments["corpus"], "train", 1.0, None)],
            held_out=(arguments["corpus"], "train", 1.0, 8),
            out=Path(work) / "out",
            work_dir=Path(work) / "work",
            teacher_mode="cached" if cached else "live",
            **options(arguments),
        )


def run_trl(arguments, turn):
    """TRL's GKD trainer with lmbda 0 (off-policy) and beta 0 (forward KL) on our micro-batches."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from regrow.data.blend import encode_corpora
    from regrow.training.rows import collate, plan_run

    tokenizer = AutoTokenizer.from_pretrained(arguments["student"])
    corpus = encode_corpora(
        tokenizer,
        [(arguments["corpus"], "train", 1.0, None)],
        max_length=arguments["sequence_length"],
        seed=0,
    )
    rows = corpus.rows
    steps = arguments["rounds"] + 1
    plan = plan_run(corpus, batch_tokens=arguments["batch_tokens"], seed=0, num_batches=steps)
    batches = iter([collate([rows[row] for row in numbers], "all") for numbers in plan])
    counts = []  # the loader runs one batch ahead

    def next_batch(_):
        batch = next(batches)
        counts.append(batch.num_tokens)
        labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": labels,
            "prompts": batch.input_ids[:, :1],
            "prompt_attention_mask": batch.attention_mask[:, :1],
        }

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            turn.wait()

        def on_log(self, args, trainer_state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                turn.done(counts[trainer_state.global_step - 1], logs["loss"])

    mixed = arguments["precision"] == "bf16_mixed"
    student = AutoModelForCausalLM.from_pretrained(
        arguments["student"], dtype=torch.float32 if mixed else torch.bfloat16
    )
    teacher = AutoModelForCausalLM.from_pretrained(arguments["teacher"], dtype=torch.bfloat16)
    teacher.requires_grad_(False)
    with tempfile.TemporaryDirectory() as work:
        config = GKDConfig(
            output_dir=work,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            bf16=mixed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_length=arguments["sequence_length"],
        )
        GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            data_collator=next_batch,
            train_dataset=datasets.Dataset.from_dict({"messages": [""] * steps}),
            processing_class=tokenizer,
            callbacks=[Turns()],
        ).train()


def worker(arguments):
    turn = Turn()
    import torch

    torch.set_num_threads(arguments["threads"])
    if arguments["contender"] == "TRL GKD":
        run_trl(arguments, turn)
    else:
        run_regrow(arguments, turn, cached=arguments["contender"] == "regrow cached")
    os._exit(0)


def take_turns(arguments):
    """Rows per contender; the first step of each is not kept."""
    processes = {}
    for name in CONTENDERS:
        given = json.dumps({**arguments, "contender": name})
        processes[name] = subprocess.Popen(
            [sys.executable, __file__, "--worker", given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not arguments["verbose"] else None,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(arguments["threads"])},
        )
    rows = {name: [] for name in CONTENDERS}
    for turn in range(arguments["rounds"] + 1):
        for name, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{name} died; run again with --verbose to see why.")
            row = json.loads(line)
            print(f"step {turn} {name:14s} {json.dumps(row)}", file=sys.stderr, flush=True)
            if turn:
                rows[name].append(row)
    for process in processes.values():
        process.kill()
        process.wait()
    return rows


def ratio(rows, name, key):
    """Median over rounds of TRL's figure over `name`'s."""
    return statistics.median(
        peer[key] / own[key] for own, peer in zip(rows[name], rows["TRL GKD"], strict=True)
    )


def make_student(teacher, folder):
    from regrow.pruning.prune import prune

    prune(model=teacher, out=folder, width=1280, criterion="magnitude", refit=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--precision", choices=["bf16", "bf16_mixed"], default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--teacher", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--student")
    parser.add_argument("--corpus", default="builtin:smollm2-chat")
    parser.add_argument("--quick", action="store_true", help="two rounds of 512 tokens")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    if given.quick:
        given.rounds, given.batch_tokens = 2, 512
    from regrow.modeling.sources import resolve_model

    with tempfile.TemporaryDirectory() as temporary:
        teacher = resolve_model(given.teacher)
        student = Path(given.student) if given.student else Path(temporary) / "student"
        if not given.student:
            make_student(teacher, student)
        rows = take_turns({**vars(given), "teacher": str(teacher), "student": str(student)})
    table = {}
    print(f"\n{'':16}{'tokens/s':>10}{'CPU s/step':>12}{'peak GB':>9}{'speed':>8}{'CPU':>7}{'memory':>8}")
    for name in CONTENDERS:
        mean = {key: statistics.mean(row[key] for row in rows[name]) for key in ("tokens", "cpu_seconds")}
        seconds = statistics.mean(row["seconds"] for row in rows[name])
        table[name] = {
            "tokens_per_s": mean["tokens"] / seconds,
            "cpu_seconds_per_step": mean["cpu_seconds"],
            "peak_bytes": max(row["peak_bytes"] for row in rows[name]),
            "speed_ratio_to_trl": ratio(rows, name, "seconds"),
            "cpu_ratio_to_trl": ratio(rows, name, "cpu_seconds"),
            "losses": [row["loss"] for row in rows[name]],
        }
    for row in table.values():
        row["memory_ratio_to_trl"] = row["peak_bytes"] / table["TRL GKD"]["peak_bytes"]
    for name, row in table.items():
        print(
            f"{name:16}{row['tokens_per_s']:10.1f}{row['cpu_seconds_per_step']:12.2f}"
            f"{row['peak_bytes'] / 1e9:9.2f}{row['speed_ratio_to_trl']:8.2f}{row['cpu_ratio_to_trl']:7.2f}"
            f"{row['memory_ratio_to_trl']:8.2f}"
        )
    result = {
        "benchmark": "training",
        "batch_tokens": given.batch_tokens,
        "precision": given.precision,
        "threads": given.threads,
        "speed_ratio": table["regrow"]["speed_ratio_to_trl"],
        "cached_speed_ratio": table["regrow cached"]["speed_ratio_to_trl"],
        "memory_ratio": table["regrow"]["memory_ratio_to_trl"],
        "rows": table,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
