# ruff: noqa: N815  (shape suffixes on attributes)
"""Least-squares refit of down_proj after channels are removed.

The kept columns take over what the removed ones contributed, as far as the kept activations predict it:
W' = W_S + W_P C_PS (C_SS + lambda I)^-1, the minimiser of E||W' x_S - W x||^2 + lambda ||W' - W_S||^2. The
ridge pulls toward the original weights, not toward zero, so lambda -> infinity is the plain cut. Greedy OBS
updates end at the same W' (ZipLM, arXiv 2302.04089); for attention and MLPs of ReLU models the closed form is
in LLM-Surgeon and OSSCAR (arXiv 2403.12983).

Behind layers that are pruned already, the residual stream is off by some d from the parent's. The target is
then W x + d: the refit also makes up, as far as x predicts it, for what the layers before lost. Only E, the
sum of d x^T, is needed: W' = W_S + (W_P C_PS + E_S) (C_SS + lambda I)^-1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# lambda = rho * mean diag C. A walk over this grid starts at START and stops where held-out error turns.
RHOS: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
START = 3e-2


@dataclass(frozen=True)
class Shift:
    """What the layers before left to make up for, at the output of down_proj; d per token [D].

    Attributes:
        cross_DF: sum of d x^T over the calibration tokens, fp32.
        held_out_cross_DF: the same over held-out tokens.
        held_out_power: sum of ||d||^2 over held-out tokens.
    """

    cross_DF: Tensor
    held_out_cross_DF: Tensor
    held_out_power: float


@dataclass(frozen=True)
class Refit:
    """A refitted projection and how well it does on tokens that it was not fitted on.

    Attributes:
        weight_DK: new kept columns, fp32 values that the stored dtype holds exactly.
        rho: the ridge that was chosen, or None where the plain cut is at least as good and was kept.
        error_before: E||W x + d - W_S x_S||^2 / E||W x + d||^2 on the held-out tokens, the plain cut; d = 0
            without a shift.
        error_after: the same with `weight_DK`; never more than `error_before`.
        condition: (max / min pivot)^2 of the Cholesky factor, a lower bound of the condition number that was
            solved with; None where nothing was refitted.
        tried: rho -> held-out error.
    """

    weight_DK: Tensor
    rho: float | None
    error_before: float
    error_after: float
    condition: float | None
    tried: dict[float, float]


def refit_down(
    down_DF: Tensor,
    kept_K: Tensor,
    *,
    gram_FF: Tensor,
    num_tokens: int,
    held_out_gram_FF: Tensor,
    stored_dtype: torch.dtype,
    shift: Shift | None = None,
    rhos: Sequence[float] = RHOS,
    start: float = START,
) -> Refit:
    """Refit the kept columns, with the ridge that does best on held-out tokens.

    Errors are measured with the weights as they will be stored (rounded to `stored_dtype`).

    Args:
        down_DF: original weights, fp32.
        kept_K: ascending indices of kept channels.
        gram_FF: sum of x x^T over the calibration tokens, fp32.
        num_tokens: how many those were; only the scale of lambda depends on it.
        held_out_gram_FF: the same over held-out tokens, fp32.
        stored_dtype: dtype of the tensor in the checkpoint.
        shift: what else is to be made up for.
        rhos: ascending grid of ridges relative to the mean of the diagonal.
        start: first one that is tried.
    """
    none_K = kept_K[:0]
    scale = output_error(down_DF, none_K, down_DF[:, none_K], held_out_gram_FF, 1.0, shift)
    plain_DK = down_DF[:, kept_K]
    before = output_error(down_DF, kept_K, plain_DK, held_out_gram_FF, scale, shift)
    removed_P = removed_channels(kept_K, down_DF.shape[1])
    if scale <= 0 or (not len(removed_P) and shift is None):
        return Refit(plain_DK, None, before, before, None, {})
    cross_DF = None if shift is None else shift.cross_DF
    problem = _Problem(down_DF, kept_K, removed_P, gram_FF, cross_DF, max(num_tokens, 1))

    best: tuple[float, float, Tensor, float] | None = None
    tried: dict[float, float] = {}

    def measure(rho: float) -> float:
        nonlocal best
        if rho not in tried:
            weight_DK, condition = problem.solve(rho)
            rounded_DK = weight_DK.to(stored_dtype).float()
            error = output_error(down_DF, kept_K, rounded_DK, held_out_gram_FF, scale, shift)
            tried[rho] = error if torch.isfinite(rounded_DK).all() else float("inf")
            if best is None or tried[rho] < best[0]:
                best = (tried[rho], rho, rounded_DK, condition)
        return tried[rho]

    walk(measure, rhos, start)
    assert best is not None
    after, rho, weight_DK, condition = best
    if not after < before:
        return Refit(plain_DK, None, before, before, None, tried)
    return Refit(weight_DK, rho, before, after, condition, tried)


def walk(measure: Callable[[float], float], rhos: Sequence[float], start: float) -> None:
    """Call `measure` along an ascending grid, from `start` downhill until it rises, first down, then up."""
    middle = min(range(len(rhos)), key=lambda i: abs(rhos[i] - start))
    lowest = measure(rhos[middle])
    for step in (-1, 1):
        i, current, moved = middle + step, lowest, False
        while 0 <= i < len(rhos) and (value := measure(rhos[i])) < current:
            i, current, moved = i + step, value, True
        if moved:
            return


def removed_channels(kept_K: Tensor, width: int) -> Tensor:
    """Ascending indices that are not in `kept_K`."""
    gone_F = torch.ones(width, dtype=torch.bool, device=kept_K.device)
    gone_F[kept_K] = False
    return gone_F.nonzero()[:, 0]


def output_error(
    down_DF: Tensor,
    kept_K: Tensor,
    new_DK: Tensor,
    gram_FF: Tensor,
    scale: float,
    shift: Shift | None = None,
) -> float:
    """Sum over held-out tokens of ||W x + d - W' x_S||^2, over `scale`; products in fp32, sums in fp64."""
    delta_DF = down_DF.clone()
    delta_DF[:, kept_K] -= new_DK
    error = float(((delta_DF @ gram_FF) * delta_DF).sum(dtype=torch.float64))
    if shift is not None:
        error += 2 * float((delta_DF * shift.held_out_cross_DF).sum(dtype=torch.float64))
        error += shift.held_out_power
    return max(error, 0.0) / scale if scale > 0 else 0.0


class _Problem:
    """The normal equations of one layer, factorised once per ridge in float64.

    At F = 9216 a matrix takes 680 MB, so there are only two at a time: C_SS and its factor.
    """

    def __init__(
        self,
        down_DF: Tensor,
        kept_K: Tensor,
        removed_P: Tensor,
        gram_FF: Tensor,
        cross_DF: Tensor | None,
        count: int,
    ) -> None:
        self._kept_DK = down_DF[:, kept_K].double()
        self._C_KK = gram_FF[kept_K[:, None], kept_K].double().div_(count)
        self._diagonal_K = self._C_KK.diagonal().clone()
        self._mean = float(gram_FF.diagonal().mean(dtype=torch.float64)) / count
        C_KP = gram_FF[kept_K[:, None], removed_P].double().div_(count)
        removed_DP = down_DF[:, removed_P].double()
        # Solve for whichever is narrower: the P removed channels or the D outputs.
        self._few_channels = cross_DF is None and removed_DP.shape[1] < removed_DP.shape[0]
        self._removed_DP = removed_DP
        self._right = C_KP if self._few_channels else C_KP @ removed_DP.T
        if cross_DF is not None:
            self._right = self._right + cross_DF[:, kept_K].T.double().div_(count)

    def solve(self, rho: float) -> tuple[Tensor, float]:
        """Weights [D, K] in fp32 and the condition estimate; infinite where the factorisation fails."""
        torch.add(self._diagonal_K, rho * self._mean, out=self._C_KK.diagonal())
        factor_KK, info = torch.linalg.cholesky_ex(self._C_KK)
        if int(info):
            return torch.full_like(self._kept_DK, torch.inf, dtype=torch.float32), float("inf")
        pivots_K = factor_KK.diagonal()
        condition = float((pivots_K.max() / pivots_K.min()).square())
        solution = torch.cholesky_solve(self._right, factor_KK)
        change_DK = self._removed_DP @ solution.T if self._few_channels else solution.T
        return (self._kept_DK + change_DK).float(), condition
