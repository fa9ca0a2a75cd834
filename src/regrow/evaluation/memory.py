"""Peak resident memory of one model on a CPU, in a process of its own: `python -m regrow.evaluation.memory`.

A process's peak can only grow, so models measured in one process would hide each other.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from regrow.evaluation.latency import time_once
from regrow.modeling.load import load_model


def main(task: dict[str, Any]) -> None:
    """Load a model, run its prompt and decoding once, print the peak as one line of JSON."""
    torch.set_num_threads(task["threads"])
    model = load_model(Path(task["folder"]), device="cpu", **task["load"])
    generator = torch.Generator().manual_seed(task["seed"])
    vocabulary = model.config.get_text_config().vocab_size
    shape = (task["batch_size"], task["prompt_tokens"])
    time_once(model, torch.randint(0, vocabulary, shape, generator=generator), task["new_tokens"])
    print(json.dumps({"peak_memory_bytes": peak_resident_bytes()}))


def peak_resident_bytes() -> int:
    """Peak resident size of this process.

    Not `ru_maxrss` on Linux: a process begins with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
