"""Fisher information of a factor on each channel.

Put a factor m_j = 1 on channel j. KL(teacher, student) and its gradient are zero at m = 1, so the first order
says nothing; its Hessian there is the Fisher information, whose diagonal is E[(dL/dm_j)^2] when L is the
negative log-likelihood of tokens drawn from the teacher itself. Removing the channel (m_j = 0) then costs
about half of it. The calibration pass draws one continuation token per position and sums (dL/dm_j)^2 over
sequences.

Source: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656);
second-order Taylor pruning goes back to Molchanov et al. (arXiv 1906.10771).
"""

from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required


def score(channels: Channels, keep: int) -> Tensor:
    """Sum over sequences of (dL/dm_j)^2, per token [F]."""
    return required(channels.fisher_F) / max(channels.num_tokens, 1)


FISHER = Criterion(
    "fisher",
    "Kwon et al., A Fast Post-Training Pruning Framework for Transformers, arXiv 2204.09656 "
    "(Taylor pruning: Molchanov et al., arXiv 1906.10771).",
    frozenset({"fisher"}),
    score,
)
