"""Squared output error of removing one channel alone: the diagonal case of Optimal Brain Surgeon.

Source: Hassibi and Stork, "Second order derivatives for network pruning" (NIPS 1992), with a
diagonal Hessian; ||W x - W_{without j} x||^2 averaged over tokens is exactly this score.
"""

from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required


def score(channels: Channels, keep: int) -> Tensor:
    """||W_:j||_2^2 * E[x_j^2] [F]."""
    mean_squares_F = required(channels.sum_squares_F) / max(channels.num_tokens, 1)
    return required(channels.down_l2_F).square() * mean_squares_F


L2 = Criterion(
    "l2",
    "Diagonal case of Optimal Brain Surgeon, Hassibi and Stork, NIPS 1992.",
    frozenset({"norms", "sums"}),
    score,
)
