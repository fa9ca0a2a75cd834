"""A tiny teacher, a student with other MLPs, and a little text, for the tests of training."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny_models import save_tiny_model

QUICK: dict[str, Any] = {
    "max_steps": 6,
    "batch_tokens": 192,
    "learning_rate": 2e-3,
    "sequence_length": 48,
    "device": "cpu",
    "report_to": (),
    "eval_steps": 3,
    "save_steps": 2,
    "logging_steps": 2,
}


def make_case(folder: Path, family: str = "llama_tied", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Folders and corpora as keyword arguments of `distill` and `recover`, without `out` and `work_dir`."""
    teacher = save_tiny_model(family, folder / "teacher", 0, dtype)
    student = save_tiny_model(family, folder / "student", 0, dtype)
    generator = torch.Generator().manual_seed(1)
    for file in student.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".mlp." in name and "visual" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = (tensor.float() + 0.05 * noise).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{i} " + "x" * (i % 7)},
                {"role": "assistant", "content": "ab " * (1 + i % 4)},
            ]
        }
        for i in range(40)
    ]
    for name, part in (("train", rows[:30]), ("held_out", rows[30:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return {
        "student": student,
        "teacher": teacher,
        "corpora": [(str(folder / "train.jsonl"), "train", 1.0, None)],
        "held_out": (str(folder / "held_out.jsonl"), "train", 1.0, None),
    }


def preference_case(folder: Path, num_rows: int = 12) -> dict[str, Any]:
    """Prompts with a constraint; the teacher's answers follow it, a random student's rarely do."""
    case = make_case(folder)
    meta = {"instruction_id_list": ["detectable_format:title"], "kwargs": [{}], "finished": True}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": f"<<t{i % 3}>>"},
            ],
            "meta": meta,
        }
        for i in range(num_rows)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return case


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit, dtype included."""
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )
