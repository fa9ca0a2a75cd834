"""FLAP: how much a channel fluctuates around its mean, weighted by its column.

Source: An et al., "Fluctuation-based Adaptive Structured Pruning for LLMs" (arXiv 2312.11983),
equation 5. FLAP replaces a removed channel by its mean, through a bias on down_proj. The models here have no
such bias, so only the ranking is used; the refit makes up for the mean as far as other channels can.
"""

from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required


def score(channels: Channels, keep: int) -> Tensor:
    """||W_:j||_2^2 * Var(x_j) [F], the population variance over calibration tokens."""
    count = max(channels.num_tokens, 1)
    variance_F = required(channels.sum_squares_F) / count - (required(channels.sum_F) / count).square()
    return required(channels.down_l2_F).square() * variance_F.clamp(min=0)


FLAP = Criterion(
    "flap",
    "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, arXiv 2312.11983.",
    frozenset({"norms", "sums"}),
    score,
)
