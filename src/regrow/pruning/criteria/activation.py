"""Mean absolute activation, blind to the weights behind it.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron, arXiv
2407.14679), section 2.2, importance of MLP neurons.
"""

from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required


def score(channels: Channels, keep: int) -> Tensor:
    """E[|x_j|] [F]."""
    return required(channels.sum_absolute_F) / max(channels.num_tokens, 1)


ACTIVATION = Criterion(
    "activation",
    "Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation (Minitron), "
    "arXiv 2407.14679.",
    frozenset({"sums"}),
    score,
)
