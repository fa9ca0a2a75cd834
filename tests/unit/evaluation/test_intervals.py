"""Intervals against published values, closed forms and simulated coverage."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from regrow.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_quantile_interval,
    bootstrap_ratios,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "total"), [(0, 12), (12, 12), (1, 3), (101, 541), (251, 834), (1, 1)])
def test_wilson_is_scipys(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    low, high = wilson_interval(correct, total)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= correct / total <= high <= 1


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_of_a_share_has_the_binomial_spread() -> None:
    hits = np.array([1.0] * 120 + [0.0] * 280)
    ratios = bootstrap_ratios(hits, np.ones(400), seed=3)
    assert ratios.mean() == pytest.approx(0.3, abs=0.002)
    assert ratios.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 400), rel=0.05)


def test_clusters_are_resampled_whole() -> None:
    # 50 prompts whose 4 instructions are all followed or all missed: the spread is that of 50 trials.
    followed = np.array([4.0] * 25 + [0.0] * 25)
    low, high = bootstrap_interval(followed, np.full(50, 4.0), seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / 50), rel=0.1)


def test_ratio_weights_clusters_by_their_size() -> None:
    ratios = bootstrap_ratios(np.array([3.0, 0.0]), np.array([3.0, 1.0]), seed=0)
    assert set(np.round(ratios, 9)) == {0.0, 0.75, 1.0}  # both, the first twice, the second twice


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=80)
    first = bootstrap_interval(values, np.ones(80), seed=5)
    assert first == bootstrap_interval(values, np.ones(80), seed=5)
    assert first != bootstrap_interval(values, np.ones(80), seed=6)


def test_smoothing_keeps_an_interval_from_collapsing_and_fades_with_data() -> None:
    zeros = np.zeros(100)
    assert bootstrap_interval(zeros, np.ones(100)) == (0.0, 0.0)
    low, high = bootstrap_interval(zeros, np.ones(100), smoothing=0.5)
    assert low <= -0.02 <= 0.02 <= high
    values = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=2_000)
    plain = np.subtract(*bootstrap_interval(values, np.ones(2_000)))
    assert np.subtract(*bootstrap_interval(values, np.ones(2_000), smoothing=0.5)) == pytest.approx(
        plain, rel=0.03
    )


@pytest.mark.parametrize(("num_clusters", "least"), [(40, 0.90), (150, 0.925)])
def test_interval_covers_the_truth_as_often_as_it_says(num_clusters: int, least: float) -> None:
    # Prompts with 1-3 correlated instructions; the truth is the ratio of expectations.
    generator = np.random.default_rng(11)
    trials, covered = 300, 0
    for trial in range(trials):
        sizes = generator.integers(1, 4, size=num_clusters)
        ability = generator.beta(1.5, 1.5, size=num_clusters)
        low, high = bootstrap_interval(
            generator.binomial(sizes, ability).astype(float), sizes, seed=trial, replicates=1_000
        )
        covered += low <= 0.5 <= high
    assert least <= covered / trials <= 0.985


def test_quantile_interval_holds_the_quantile_and_widens_with_clustering() -> None:
    generator = np.random.default_rng(2)
    level = np.repeat(generator.normal(size=60), 50)  # every row has a level of its own
    values = level + 0.1 * generator.normal(size=3_000)
    by_row = bootstrap_quantile_interval(values, np.repeat(np.arange(60), 50), 0.95)
    by_token = bootstrap_quantile_interval(values, np.arange(3_000), 0.95)
    assert by_row[0] < np.quantile(values, 0.95) < by_row[1]
    assert np.diff(by_row) > 3 * np.diff(by_token)
