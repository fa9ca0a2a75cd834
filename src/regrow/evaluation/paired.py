"""Paired statistics: two models judged on the same prompts. Pure numpy and scipy.

Sign convention everywhere: A is the baseline, B the candidate, a difference is B - A, so a negative number
is a loss. `lost` are prompts that A gets right and B does not; `gained` the other way round.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest, norm

from regrow.evaluation.intervals import REPLICATES, bootstrap_interval

Verdict = Literal["better", "non-inferior", "worse", "not enough data"]

# Half a pseudo-prompt gained and half a one lost; see `bootstrap_ratios`.
_SMOOTHING = 0.5
_POWER = 0.8


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two accuracies on the same prompts, with its bootstrap interval.

    Attributes:
        baseline, candidate: accuracies of A and B (over instructions, or over prompts).
        difference: candidate - baseline.
        ci95: 95 % percentile interval of the difference, prompts resampled whole.
        standard_deviation: of one prompt's contribution to the difference, so that the standard error at n
            prompts is standard_deviation / sqrt(n).
        num_prompts: n.
    """

    baseline: float
    candidate: float
    difference: float
    ci95: tuple[float, float]
    standard_deviation: float
    num_prompts: int


def paired_difference(
    correct_a: np.ndarray,
    correct_b: np.ndarray,
    totals: np.ndarray,
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> PairedDifference:
    """Compare two models by sum(correct) / sum(totals), clustered by prompt.

    Args:
        correct_a: per prompt, items that A gets right (instructions, or 0/1 for the prompt), summed over
            repeats where a prompt was answered several times.
        correct_b: the same for B.
        totals: per prompt, items judged; the same for both models.
        seed: of the bootstrap.
        replicates: of the bootstrap.
    """
    a, b, totals = (np.asarray(values, dtype=np.float64) for values in (correct_a, correct_b, totals))
    difference = float((b - a).sum() / totals.sum())
    contribution = ((b - a) - difference * totals) / totals.mean()
    # The same pseudo-observations as in the bootstrap: no flips in a few prompts is no proof of equality.
    variance = float(np.mean(contribution**2)) + 2 * _SMOOTHING / (len(a) * totals.mean() ** 2)
    return PairedDifference(
        baseline=float(a.sum() / totals.sum()),
        candidate=float(b.sum() / totals.sum()),
        difference=difference,
        ci95=bootstrap_interval(b - a, totals, seed=seed, replicates=replicates, smoothing=_SMOOTHING),
        standard_deviation=math.sqrt(variance),
        num_prompts=len(a),
    )


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test (McNemar 1947): under equality each flip goes either way with chance 1/2.

    Returns 1.0 where nothing flipped.
    """
    if lost + gained == 0:
        return 1.0
    return float(binomtest(lost, lost + gained, 0.5).pvalue)


def judge(ci95: tuple[float, float], margin: float) -> Verdict:
    """The verdict on candidate B from the 95 % interval [low, high] of B - A.

    - `better`: low > 0. The interval lies above zero: a gain is shown.
    - `non-inferior`: -margin < low <= 0. A loss of `margin` or more is excluded; the interval may even lie
      wholly below zero (a loss is then shown, but one smaller than the margin).
    - `worse`: high < 0 and low <= -margin. A loss is shown, and one of `margin` or more is not excluded.
    - `not enough data`: low <= -margin and high >= 0. The interval holds both no loss and a loss of
      `margin`, so neither can be claimed.

    Exactly one of the four holds for any interval. `non-inferior` at 95 % two-sided is the usual
    one-sided test at 2.5 %.
    """
    low, high = ci95
    if low > 0:
        return "better"
    if low > -margin:
        return "non-inferior"
    return "worse" if high < 0 else "not enough data"


def prompts_needed(standard_deviation: float, true_difference: float, margin: float) -> int | None:
    """Prompts at which, with 80 % chance, the verdict is settled if B - A truly is `true_difference`.

    Above -margin the verdict that more data lead to is non-inferiority (or better), below it is `worse`; the
    interval must shrink to the distance between the true difference and what is to be excluded (-margin, or
    zero). None where the difference lies on the margin itself and no number of prompts settles it.
    """
    distance = true_difference + margin if true_difference > -margin else -true_difference
    if distance <= 1e-12:
        return None
    z = float(norm.ppf(0.975) + norm.ppf(_POWER))
    return math.ceil((z * standard_deviation / distance) ** 2)


def repeats_needed(
    differences: np.ndarray, num_needed: int | None, *, true_difference: float, margin: float
) -> int | None:
    """Answers per prompt (sampled, same prompts) that would settle the verdict, or None where none would.

    Repeats only shrink the part of the variance that comes from sampling the answers. With at least two
    repeats that part is estimated (one-way analysis of variance); with one it cannot be told apart, and the
    number returned assumes that all of the variance is of that kind: a lower bound.

    Args:
        differences: B - A per prompt and repeat [N, R], in units of the accuracy compared.
        num_needed: result of `prompts_needed` for one such answer set.
        true_difference: assumed difference.
        margin: of the verdict.
    """
    if num_needed is None:
        return None
    num_prompts, repeats = differences.shape
    if repeats < 2:
        return max(1, math.ceil(num_needed / num_prompts))
    distance = true_difference + margin if true_difference > -margin else -true_difference
    z = float(norm.ppf(0.975) + norm.ppf(_POWER))
    allowed = num_prompts * (distance / z) ** 2
    within = float(differences.var(axis=1, ddof=1).mean())
    between = max(0.0, float(differences.mean(axis=1).var(ddof=1)) - within / repeats)
    if between >= allowed:
        return None
    return max(repeats, math.ceil(within / (allowed - between)))
