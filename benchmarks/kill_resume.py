"""kill -9 at random moments of a training run; the resumed run must end at the undisturbed run's weights.

    python benchmarks/kill_resume.py [--kills 50] [--seed 0]

A tiny model is distilled in a child process that writes a checkpoint every other step. The child is killed
again and again, at moments spread over everything that it does (imports, steps, evaluations, writing
checkpoints and the result), and started again with the same command until it finishes; when it finishes
before all kills are spent, the next run starts from nothing. Weights are compared bit for bit. The last line
is JSON.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SETTINGS = {
    "max_steps": 24,
    "batch_tokens": 256,
    "learning_rate": 2e-3,
    "gradient_accumulation_steps": 2,
    "sequence_length": 64,
    "device": "cpu",
    "report_to": (),
    "eval_steps": 5,
    "save_steps": 2,
    "logging_steps": 3,
    "precision": "bf16_mixed",
}


def train(arguments):
    """The child: one `distill`, with a mark on standard output when training is about to begin."""
    import torch

    from regrow.training.distill import distill
    from regrow.training.trainer import DistillTrainer

    torch.set_num_threads(1)
    start = DistillTrainer.train

    def marked(self, *args, **kwargs):
        print("training", flush=True)
        return start(self, *args, **kwargs)

    DistillTrainer.train = marked
    for name in ("student", "teacher", "out", "work_dir"):
        arguments[name] = Path(arguments[name])
    distill(**arguments)


def digest(folder):
    """Hash of the weights, byte for byte."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def start(arguments):
    return subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(arguments, default=str)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process):
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"A resumed run failed:\n{errors[-3000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        train(json.loads(given.child))
        return
    from training_case import make_case

    moments = random.Random(given.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = make_case(folder)
        process = start({**case, **SETTINGS, "out": folder / "whole", "work_dir": folder / "work"})
        process.stdout.readline()
        begin = time.monotonic()
        finish(process)
        span = time.monotonic() - begin
        expected = digest(folder / "whole")
        kills = runs = equal = during_write = 0
        steps = []
        while kills < given.kills:
            out, work = folder / "out", folder / "resumed"
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)
            while True:
                process = start({**case, **SETTINGS, "out": out, "work_dir": work})
                if kills < given.kills:
                    if moments.random() < 0.9:
                        process.stdout.readline()  # most of the time, wait until it trains
                    try:
                        process.wait(moments.uniform(0, 0.7 * span))
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGKILL)
                        process.communicate()
                        kills += 1
                        during_write += (work / ".partial-checkpoint").exists()
                        found = [int(path.name.split("-")[1]) for path in work.glob("checkpoint-*")]
                        steps.append(max(found, default=0))
                        print(
                            f"kill {kills}: newest checkpoint is of step {steps[-1]}",
                            file=sys.stderr,
                            flush=True,
                        )
                        if out.exists():
                            break  # killed behind its last step: the model appears whole or not at all
                        continue
                finish(process)
                break
            runs += 1
            equal += digest(out) == expected
    result = {
        "benchmark": "kill_resume",
        "kills": kills,
        "kills_while_writing": during_write,
        "kills_before_the_first_checkpoint": steps.count(0),
        "finished_runs": runs,
        "bit_equal_runs": equal,
        "seconds": time.monotonic() - started,
    }
    print(f"{kills} kills, {runs} runs finished, {equal} of them bit-equal to the undisturbed one")
    print(json.dumps(result))
    sys.exit(0 if equal == runs else 1)


if __name__ == "__main__":
    main()
