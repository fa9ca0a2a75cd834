"""Confidence intervals for shares and for ratios of sums. Pure numpy, seeded.

The unit of sampling is the *cluster*: a prompt with its instructions, or a row of text with its tokens.
Items of one cluster are not independent, so a bootstrap over items would give intervals that are too
narrow; every interval here resamples whole clusters.
"""

from collections.abc import Iterator

import numpy as np
from scipy.stats import norm

REPLICATES = 10_000
_GATHERED = 4_000_000


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of independent trials (Wilson 1927, JASA 22).

    Unlike the normal approximation it does not collapse at 0 or 1 and never leaves [0, 1].
    """
    if total == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    share, shrink = correct / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z * ((share * (1 - share) + z * z / (4 * total)) / total) ** 0.5 / shrink
    # The bounds are exact at the ends; rounding must not push them past the share itself.
    return (
        0.0 if correct == 0 else max(0.0, centre - half),
        1.0 if correct == total else min(1.0, centre + half),
    )


def resample_counts(num_clusters: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks [R, N] of bootstrap draws: each row holds N cluster indices drawn with replacement."""
    generator = np.random.default_rng(seed)
    block = max(1, _GATHERED // max(num_clusters, 1))
    for begin in range(0, replicates, block):
        rows = min(block, replicates - begin)
        yield generator.integers(0, num_clusters, size=(rows, num_clusters))


def bootstrap_ratios(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    smoothing: float = 0.0,
) -> np.ndarray:
    """Bootstrap distribution [replicates] of sum(numerators) / sum(denominators), clusters resampled whole.

    Args:
        numerators: per cluster, e.g. instructions followed, or the difference of two such counts.
        denominators: per cluster, e.g. instructions asked; their sum must be positive.
        replicates: number of bootstrap samples.
        seed: the same seed gives the same distribution.
        smoothing: expected number of pseudo-clusters of +1 and of -1 that each sample gains (drawn from a
            Poisson distribution). 0.5 is Agresti and Min's adjustment for paired proportions (2005,
            Statistics in Medicine 24:729) in bootstrap form: it keeps an interval of a difference from
            collapsing to a point when few pairs or none differ, and is negligible when many do.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.asarray(denominators, dtype=np.float64)
    parts = [
        (numerators[draws].sum(axis=1), denominators[draws].sum(axis=1))
        for draws in resample_counts(len(numerators), replicates, seed)
    ]
    tops = np.concatenate([top for top, _ in parts])
    bottoms = np.concatenate([bottom for _, bottom in parts])
    if smoothing > 0:
        extra = np.random.default_rng([seed, 1])
        tops = tops + extra.poisson(smoothing, replicates) - extra.poisson(smoothing, replicates)
    # A sample may by chance hold only empty clusters; it says nothing and is given the observed ratio.
    observed = numerators.sum() / denominators.sum()
    return np.divide(tops, bottoms, out=np.full(replicates, observed), where=bottoms > 0)


def bootstrap_interval(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
    smoothing: float = 0.0,
) -> tuple[float, float]:
    """Percentile interval of `bootstrap_ratios` (Efron and Tibshirani 1993, chapter 13)."""
    ratios = bootstrap_ratios(numerators, denominators, replicates=replicates, seed=seed, smoothing=smoothing)
    low, high = np.quantile(ratios, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def bootstrap_quantile_interval(
    values: np.ndarray,
    clusters: np.ndarray,
    quantile: float,
    *,
    confidence: float = 0.95,
    replicates: int = 400,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of a quantile over items, e.g. the 95th percentile of the tokens' KL, rows resampled whole.

    Args:
        values: one per item [T].
        clusters: the cluster of each item [T], numbered from 0 without gaps.
        quantile: between 0 and 1.
        confidence, replicates, seed: as above.
    """
    order = np.argsort(values, kind="stable")
    ordered, owner = np.asarray(values)[order], np.asarray(clusters)[order]
    num_clusters = int(owner.max()) + 1
    found = []
    for draws in resample_counts(num_clusters, replicates, seed):
        for draw in draws:
            weights = np.cumsum(np.bincount(draw, minlength=num_clusters)[owner])
            if weights[-1] > 0:
                found.append(ordered[np.searchsorted(weights, quantile * weights[-1])])
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
