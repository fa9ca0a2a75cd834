"""A tiny teacher, a student with other MLPs, and a little text, for the tests of training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny_models import save_tiny_model

# The `meta` of a row whose answer must have a title.
TITLED: dict[str, Any] = {
    "instruction_id_list": ["detectable_format:title"],
    "kwargs": [{}],
    "finished": True,
}
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
    turns = [(f"q{i} " + "x" * (i % 7), "ab " * (1 + i % 4)) for i in range(40)]
    for name, part in (("train", turns[:30]), ("held_out", turns[30:])):
        write_conversations(folder / f"{name}.jsonl", part)
    return {
        "student": student,
        "teacher": teacher,
        "corpora": [(str(folder / "train.jsonl"), "train", 1.0, None)],
        "held_out": (str(folder / "held_out.jsonl"), "train", 1.0, None),
    }


def preference_case(folder: Path, num_rows: int = 12) -> dict[str, Any]:
    """Prompts with a constraint; the teacher's answers follow it, a random student's rarely do."""
    case = make_case(folder)
    turns = [(f"q{i}", f"<<t{i % 3}>>") for i in range(num_rows)]
    write_conversations(folder / "train.jsonl", turns, meta=TITLED)
    return case


def write_conversations(path: Path, turns: Iterable[tuple[str, str]], **fields: Any) -> None:
    """A corpus with a row per question and answer, each with the same further fields."""
    rows = [
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **fields}
        for user, answer in turns
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def assert_close(left: Path, right: Path, start: Path) -> None:
    """Weights differ by far less than training moved them."""
    one, other, before = map(tensors_of, (left, right, start))
    assert one.keys() == other.keys()
    moved = sum((one[name] - before[name]).double().square().sum() for name in one) ** 0.5
    apart = sum((one[name] - other[name]).double().square().sum() for name in one) ** 0.5
    assert moved > 0
    assert apart <= 1e-3 * moved


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
