"""Optimal Brain Surgeon, greedily, one channel after the other.

Removing channel j and letting the remaining columns of W make up for it in the least-squares sense costs
||W_:j||^2 / [H^-1]_jj with H = E[x x^T] + lambda I. The cheapest channel goes, W and H^-1 are updated to the
problem without it, and the next one is chosen, so that two channels which stand in for each other are never
both dropped.

Source: Hassibi and Stork, "Optimal Brain Surgeon" (NIPS 1992), per column as in ZipLM (Kurtic et al., arXiv
2302.04089, equations 4-5) and OSSCAR (Meng et al., arXiv 2403.12983).
"""

import math

import torch
from torch import Tensor

from regrow.pruning.criteria.channels import Channels, Criterion, required

DAMPING = 1e-3  # lambda / mean of diag E[x x^T]; best of 1e-2 and 1e-3 on held-out text
BLOCK = 64


def score(channels: Channels, keep: int) -> Tensor:
    """Scores [F]: -P .. -1 for removed channels in the order they went, else the cost at the end (>= 0)."""
    return score_weights(required(channels.down_DF), channels, keep)


def score_weights(down_DF: Tensor, channels: Channels, keep: int) -> Tensor:
    """The same for other weights than the site's own."""
    assert channels.gram_FF is not None
    removed, cost_F = remove_greedily(
        down_DF,
        channels.gram_FF / max(channels.num_tokens, 1),
        num_removed=channels.width - keep,
    )
    cost_F[removed] = torch.arange(-len(removed), 0, dtype=cost_F.dtype, device=cost_F.device)
    return cost_F


def remove_greedily(
    down_DF: Tensor,
    covariance_FF: Tensor,
    *,
    num_removed: int,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Channels in the order of greedy removal, and what removing each of the others would cost then.

    The choice is the exact greedy one for every `block`: within a block the rank-one updates are kept as two
    thin matrices and applied to the one column and the diagonal that are looked at; at its end they are
    applied to H^-1 and W as one matrix product. That turns num_removed passes over an F x F matrix, which at
    F = 9216 take minutes, into num_removed / block of them.

    Args:
        down_DF: W, any float dtype; computed with in float64.
        covariance_FF: E[x x^T].
        num_removed: how many channels go.
        damping: lambda over the mean of the covariance's diagonal.
        block: rank-one updates that are held back.

    Returns:
        Indices [num_removed] in order of removal, and costs [F] (zero where removed).
    """
    W_DF = down_DF.double().clone()
    width = W_DF.shape[1]
    inverse_FF = _damped_inverse(covariance_FF, damping)
    alive_F = torch.ones(width, dtype=torch.bool, device=W_DF.device)
    removed: list[int] = []
    while len(removed) < num_removed:
        count = min(block, num_removed - len(removed))
        removed += _remove_block(W_DF, inverse_FF, alive_F, count)
    cost_F = W_DF.square().sum(0) / inverse_FF.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
    cost_F[~alive_F] = 0
    return torch.tensor(removed, dtype=torch.long, device=W_DF.device), cost_F


def _remove_block(W_DF: Tensor, inverse_FF: Tensor, alive_F: Tensor, count: int) -> list[int]:
    """Remove `count` channels; updates all three arguments in place."""
    norms_F, diagonal_F = W_DF.square().sum(0), inverse_FF.diagonal().clone()
    # After t removals in this block: H^-1 is inverse - U U^T, and W is W - C U^T.
    U_FN = W_DF.new_zeros(W_DF.shape[1], count)
    C_DN = W_DF.new_zeros(W_DF.shape[0], count)
    chosen: list[int] = []
    for t in range(count):
        cost_F = torch.where(alive_F, norms_F.clamp(min=0) / diagonal_F, torch.inf)
        j = int(cost_F.argmin())
        column_F = inverse_FF[:, j] - U_FN[:, :t] @ U_FN[j, :t]
        root = column_F[j].sqrt()
        u_F = column_F / root
        c_D = (W_DF[:, j] - C_DN[:, :t] @ U_FN[j, :t]) / root
        product_F = c_D @ W_DF - U_FN[:, :t] @ (c_D @ C_DN[:, :t])
        norms_F += u_F.square() * c_D.dot(c_D) - 2 * u_F * product_F
        diagonal_F -= u_F.square()
        U_FN[:, t], C_DN[:, t] = u_F, c_D
        alive_F[j] = False
        diagonal_F[j] = 1
        chosen.append(j)
    W_DF.addmm_(C_DN, U_FN.T, alpha=-1)
    inverse_FF.addmm_(U_FN, U_FN.T, alpha=-1)
    W_DF[:, chosen] = 0
    inverse_FF[:, chosen] = 0
    inverse_FF[chosen] = 0
    inverse_FF.diagonal()[chosen] = 1
    return chosen


def _damped_inverse(covariance_FF: Tensor, damping: float) -> Tensor:
    """(C + lambda I)^-1 in float64.

    A few tokens with huge activations (attention sinks) put most of the energy into one direction; the
    rounding of a float32 gram can then exceed lambda and make the matrix indefinite, so lambda grows until
    it is not.
    """
    mean = float(covariance_FF.diagonal().mean(dtype=torch.float64))
    if not math.isfinite(mean):
        raise ValueError("the covariance is not finite")
    while True:
        H_FF = covariance_FF.to(torch.float64, copy=True)
        # The floor keeps an all-zero covariance (a layer that never fired) invertible.
        H_FF.diagonal().add_(max(damping * mean, 1e-30))
        factor_FF, info = torch.linalg.cholesky_ex(H_FF)
        del H_FF  # at F = 9216 each of these takes 680 MB
        if not int(info):
            return torch.cholesky_inverse(factor_FF)
        damping *= 10


OBS = Criterion(
    "obs",
    "Greedy Optimal Brain Surgeon per channel: Kurtic et al., ZipLM, arXiv 2302.04089; Meng et al., OSSCAR, "
    "arXiv 2403.12983; after Hassibi and Stork, NIPS 1992.",
    frozenset({"down", "gram"}),
    score,
)
