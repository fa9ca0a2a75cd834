"""Weight magnitude: how large the column of down_proj is, whatever flows through it.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (arXiv 1506.02626),
summed over the column as in structured pruning (Li et al., arXiv 1608.08710).
"""

from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required


def score(channels: Channels, keep: int) -> Tensor:
    """Sum over i of |W_ij| [F]."""
    return required(channels.down_l1_F)


MAGNITUDE = Criterion(
    "magnitude",
    "Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626; "
    "per channel as in Li et al., arXiv 1608.08710.",
    frozenset({"norms"}),
    score,
)
