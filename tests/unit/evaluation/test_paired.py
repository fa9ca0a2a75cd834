"""Paired statistics against scipy, hand-computed cases and simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from regrow.evaluation.paired import (
    judge,
    mcnemar_exact,
    paired_difference,
    prompts_needed,
    repeats_needed,
)


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),  # 2 * (1/2)^5
        (0, 6, 2 / 64),
        (9, 2, 2 * (1 + 11 + 55) / 2**11),  # two-sided: both tails of Binomial(11, 1/2) up to 2
        (7, 7, 1.0),
    ],
)
def test_mcnemar_by_hand(lost: int, gained: int, expected: float) -> None:
    assert mcnemar_exact(lost, gained) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_twice_the_smaller_binomial_tail(lost: int, gained: int) -> None:
    tail = binom.cdf(min(lost, gained), lost + gained, 0.5) if lost + gained else 1.0
    assert mcnemar_exact(lost, gained) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert mcnemar_exact(lost, gained) == mcnemar_exact(gained, lost)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.02, "better"),
        (0.0, 0.02, "non-inferior"),
        (-0.0099, 0.02, "non-inferior"),
        (-0.009, -0.001, "non-inferior"),  # a loss is shown, but one below the margin
        (-0.01, 0.0, "not enough data"),  # the margin itself is not excluded
        (-0.05, 0.05, "not enough data"),
        (-0.05, -0.001, "worse"),
        (-0.05, -0.02, "worse"),
    ],
)
def test_verdicts_at_a_margin_of_one_point(low: float, high: float, verdict: str) -> None:
    assert judge((low, high), 0.01) == verdict


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0.001, 0.5))
def test_verdict_follows_from_the_interval_alone(low: float, width: float, margin: float) -> None:
    high = low + width
    verdict = judge((low, high), margin)
    assert (verdict == "better") == (low > 0)
    assert (verdict in ("better", "non-inferior")) == (low > -margin)
    assert (verdict == "worse") == (low <= -margin and high < 0)


def test_difference_is_candidate_minus_baseline_over_all_items() -> None:
    found = paired_difference(np.array([2, 0, 1]), np.array([1, 0, 1]), np.array([3, 1, 1]))
    assert found.baseline == pytest.approx(3 / 5)
    assert found.candidate == pytest.approx(2 / 5)
    assert found.difference == pytest.approx(-1 / 5)
    assert found.num_prompts == 3


def test_interval_of_a_difference_is_the_paired_one() -> None:
    # 30 losses and 10 gains among 500 prompts: sd of d is sqrt(0.08 - 0.04^2).
    a = np.array([1] * 30 + [0] * 10 + [1] * 300 + [0] * 160)
    b = np.array([0] * 30 + [1] * 10 + [1] * 300 + [0] * 160)
    found = paired_difference(a, b, np.ones(500))
    assert found.difference == pytest.approx(-0.04)
    error = np.sqrt((0.08 - 0.04**2 + 1 / 500) / 500)
    assert found.standard_deviation / np.sqrt(500) == pytest.approx(error, rel=1e-9)
    assert found.ci95 == pytest.approx((-0.04 - 1.96 * error, -0.04 + 1.96 * error), abs=0.003)


@pytest.mark.parametrize("num_prompts", [20, 60, 100])
def test_no_flips_among_few_prompts_prove_nothing(num_prompts: int) -> None:
    answers = np.arange(num_prompts) % 2
    found = paired_difference(answers, answers, np.ones(num_prompts))
    assert found.difference == 0
    assert judge(found.ci95, 0.01) == "not enough data"


def test_no_flips_among_ifevals_prompts_are_enough_for_a_point() -> None:
    answers = np.arange(541) % 2
    assert judge(paired_difference(answers, answers, np.ones(541)).ci95, 0.01) == "non-inferior"


def test_claims_are_false_as_rarely_as_they_should_be() -> None:
    # True difference: exactly the margin. Non-inferiority may be claimed in 2.5 % of experiments.
    generator = np.random.default_rng(4)
    trials, claims, margin = 400, 0, 0.05
    for trial in range(trials):
        flips = generator.choice([-1, 0, 1], p=[0.125, 0.8, 0.075], size=300)
        a = (flips < 0).astype(int)
        found = paired_difference(a, a + flips, np.ones(300), seed=trial, replicates=1_000)
        claims += judge(found.ci95, margin) in ("better", "non-inferior")
    assert claims / trials <= 0.05


def test_needed_prompts_give_the_power_that_they_promise() -> None:
    spread, margin = np.sqrt(0.2), 0.06
    needed = prompts_needed(spread, 0.0, margin)
    assert needed == int(np.ceil(((1.959964 + 0.841621) * spread / margin) ** 2))
    generator = np.random.default_rng(9)
    trials, settled = 300, 0
    for trial in range(trials):
        flips = generator.choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=needed)
        a = (flips < 0).astype(int)
        found = paired_difference(a, a + flips, np.ones(needed), seed=trial, replicates=1_000)
        settled += judge(found.ci95, margin) in ("better", "non-inferior")
    assert 0.72 <= settled / trials <= 0.88


def test_needed_prompts_follow_the_verdict_that_more_data_lead_to() -> None:
    assert prompts_needed(0.5, -0.03, 0.01) == prompts_needed(
        0.5, 0.02, 0.01
    )  # 3 points from what is excluded
    assert prompts_needed(0.5, -0.01, 0.01) == prompts_needed(0.5, 0.0, 0.01)
    assert prompts_needed(0.5, -0.01, 0.01 + 1e-15) is None  # on the margin itself: never


def test_one_answer_per_prompt_gives_a_lower_bound_of_repeats() -> None:
    differences = np.zeros((100, 1))
    assert repeats_needed(differences, 950, true_difference=0.0, margin=0.01) == 10
    assert repeats_needed(differences, None, true_difference=0.0, margin=0.01) is None


def test_repeats_help_only_against_the_noise_of_sampling() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(scale=0.5, size=(400, 4))
    spread = prompts_needed(0.5, 0.0, 0.02)
    found = repeats_needed(noise, spread, true_difference=0.0, margin=0.02)
    # sd / sqrt(400 R) = margin / (z + z): R = 12.3
    assert found == pytest.approx(12.3, abs=2.0)
    between = noise + generator.normal(scale=0.5, size=(400, 1))
    assert repeats_needed(between, spread, true_difference=0.0, margin=0.02) is None
