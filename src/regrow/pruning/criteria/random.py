"""Random channels: the floor that every other criterion must beat."""

import torch
from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion


def score(channels: Channels, keep: int) -> Tensor:
    """Uniform random scores [F], the same for the same seed."""
    generator = torch.Generator().manual_seed(channels.seed)
    return torch.rand(channels.width, generator=generator, dtype=torch.float64)


RANDOM = Criterion("random", "Uniformly random channels (baseline).", frozenset(), score)
