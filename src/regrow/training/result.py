"""From trained parameters back to the checkpoint they came from."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow.checkpoint import CheckpointReader
from regrow.checkpoint.overlay import Values
from regrow.errors import RunError
from regrow.families import causal_lm_name, mlp_sites

Take = Callable[[Tensor], Tensor]


def changed_tensors(reader: CheckpointReader, trained: Mapping[str, Tensor]) -> dict[str, Values]:
    """New values of the checkpoint's tensors, as float32, made when they are written.

    A tensor whose trained values are what the stored ones become in the trained precision has not moved; it
    is left out, and so keeps its bytes.

    Args:
        reader: the student's checkpoint.
        trained: parameter of the causal language model -> values.

    Raises:
        RunError: a trained parameter has no tensor in the checkpoint.
    """
    changed: dict[str, Values] = {}
    found = set()
    for name, (inner, take) in places(reader).items():
        if inner not in trained:
            continue
        found.add(inner)
        values = take(trained[inner])
        if not torch.equal(torch.from_numpy(reader.read_float32(name)).to(values.dtype), values):
            changed[name] = partial(_as_float32, values)
    if lost := sorted(set(trained) - found):
        raise RunError(
            f"{reader.folder} has no tensor for the trained {lost[0]}; report this model's family."
        )
    return changed


def _as_float32(values: Tensor) -> NDArray[Any]:
    return values.float().numpy()


def places(reader: CheckpointReader) -> dict[str, tuple[str, Take]]:
    """Checkpoint tensor -> (parameter of the causal language model, which part of it).

    Tensors that the causal language model does not hold (vision, multi-token prediction) are left out.
    """
    parts: dict[str, Take] = {}
    for site in mlp_sites(reader.config, reader.tensors):
        tail = site.name.rsplit(".", 1)[-1]
        if site.kind != "expert" or site.gate.expert is not None or not tail.isdigit():
            continue
        # transformers stacks routed experts that lie in the checkpoint one by one: [E, 2F, D] and [E, D, F].
        expert, width = int(tail), site.width
        parts[site.gate.name] = partial(_rows_of, expert, 0, width)
        parts[site.up.name] = partial(_rows_of, expert, width, 2 * width)
        parts[site.down.name] = partial(_rows_of, expert, 0, site.hidden_size)
    found = {}
    for name in reader.tensors:
        inner = causal_lm_name(reader.config, name)
        if inner is not None:
            found[name] = (inner, parts.get(name, _whole))
    return found


def _rows_of(expert: int, begin: int, end: int, stack: Tensor) -> Tensor:
    return stack[expert, begin:end]


def _whole(tensor: Tensor) -> Tensor:
    return tensor
