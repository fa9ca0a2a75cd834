"""How much memory training took, and what to do when it was too much."""

import contextlib
import resource
import sys
from collections.abc import Iterator, Sequence

import torch

from regrow.errors import RunError


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on the GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def share_for_vllm(device: torch.device) -> float | None:
    """The share of a GPU's memory that vLLM may take beside a run that waits for it; None off the GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what training holds but does not use is free to vLLM
    return free_share(*torch.cuda.mem_get_info(device))


def free_share(free_bytes: int, total_bytes: int) -> float:
    """Nine tenths of the free bytes as a share of all, rounded down.

    vLLM refuses a share above what is free once its own CUDA context has taken some, and its CUDA graphs may
    come on top.
    """
    return 900 * free_bytes // total_bytes / 1000


@contextlib.contextmanager
def memory_errors(remedies: Sequence[str], after: str = "") -> Iterator[None]:
    """Out of memory as one sentence with the remedies, and what else is to be said.

    Raises:
        RunError: memory did not suffice within the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not named and "can't allocate memory" not in str(error):
            raise
        raise RunError(f"Out of memory while training; {', or '.join(remedies)}.{after}") from None


@contextlib.contextmanager
def answers_fit(batch_size: int) -> Iterator[None]:
    """Out of memory while the student writes, by the name of the setting.

    Raises:
        RunError: memory did not suffice within the block.
    """
    try:
        yield
    except (RunError, MemoryError):
        raise RunError(
            f"Memory is too small for {batch_size} of the student's answers at a time; lower "
            "rollout_batch_size."
        ) from None
