"""Wanda, summed per channel.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695),
score |W_ij| * ||x_j||_2; summed over the column as `wanda_sp` in FLAP (arXiv 2312.11983).
"""

from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required


def score(channels: Channels, keep: int) -> Tensor:
    """Sum over i of |W_ij| * ||x_j||_2 [F], the norm taken over calibration tokens."""
    return required(channels.down_l1_F) * required(channels.sum_squares_F).sqrt()


WANDA = Criterion(
    "wanda",
    "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695; "
    "summed per channel as wanda_sp in arXiv 2312.11983.",
    frozenset({"norms", "sums"}),
    score,
)
