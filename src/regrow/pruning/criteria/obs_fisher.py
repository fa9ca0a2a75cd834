"""Optimal Brain Surgeon that counts an output error by what it does to the model's predictions.

`obs` asks for the smallest ||dW x||^2, as if every direction of the residual stream mattered alike. To second
order, KL(parent, pruned) is half the average of (g^T dW x)^2, where g = dL/dy is the gradient at the output y
of down_proj of the negative log-likelihood of tokens drawn from the parent. With g and x taken as independent
(K-FAC) that is tr(dW^T G dW C), G = E[g g^T], C = E[x x^T]: greedy OBS on G^(1/2) W in place of W. The refit
needs no G: for channels that are chosen, the least-squares columns minimise every output's error at once.

Source: Martens and Grosse, K-FAC (arXiv 1503.05671); for removing whole columns, van der Ouderaa et al., "The
LLM Surgeon" (arXiv 2312.17244).
"""

import torch
from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required
from regrow.pruning.criteria.obs import score_weights

DAMPING = (
    1e-6  # added to G, relative to its mean eigenvalue: with fewer tokens than outputs G has no full rank
)


def score(channels: Channels, keep: int) -> Tensor:
    """Scores [F] as of `obs`, of the weights in the metric of the predictions."""
    return score_weights(
        root(required(channels.output_fisher_DD)) @ required(channels.down_DF), channels, keep
    )


def root(fisher_DD: Tensor) -> Tensor:
    """A factor R [D, D] with R^T R = G / (mean eigenvalue of G) + damping; the identity where G is zero."""
    mean = fisher_DD.diagonal().mean()
    identity_DD = torch.eye(len(fisher_DD), dtype=fisher_DD.dtype, device=fisher_DD.device)
    if not float(mean) > 0:
        return identity_DD
    values_D, vectors_DD = torch.linalg.eigh(fisher_DD / mean + DAMPING * identity_DD)
    return values_D.clamp(min=0).sqrt()[:, None] * vectors_DD.T


OBS_FISHER = Criterion(
    "obs_fisher",
    "Greedy Optimal Brain Surgeon per channel with the Kronecker-factored Fisher: van der Ouderaa et al., "
    "The LLM Surgeon, arXiv 2312.17244; Martens and Grosse, K-FAC, arXiv 1503.05671.",
    frozenset({"down", "gram", "output_fisher"}),
    score,
)
