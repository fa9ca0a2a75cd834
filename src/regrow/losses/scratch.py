"""Buffers that are kept from chunk to chunk: fresh ones cost a page fault per 4 KB."""

import math

import torch
from torch import Tensor


class Scratch:
    """Named buffers of one device; each grows to the largest size asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer of that name in that shape, contents undefined."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)
