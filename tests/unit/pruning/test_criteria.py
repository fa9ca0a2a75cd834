"""Scores against hand-computed values, and greedy removal against trying everything."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import naive_greedy_removal
from regrow.errors import RunError, UserError
from regrow.pruning.criteria import CRITERIA, Channels, find_criterion
from regrow.pruning.criteria.obs import DAMPING, remove_greedily
from regrow.pruning.select import alignment_notes, check_width, top_channels

# Two outputs, three channels, four tokens; all scores below were worked out by hand.
DOWN = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -0.5]])
X = torch.tensor([[1.0, 2.0, -4.0], [-1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [-1.0, 2.0, 4.0]])
HAND = {
    "magnitude": [4.0, 2.0, 1.0],
    "wanda": [4.0 * 2, 2.0 * 4, 1.0 * 8],
    "l2": [10.0 * 1, 4.0 * 4, 0.5 * 16],
    "activation": [1.0, 2.0, 4.0],
    "flap": [10.0 * 1, 4.0 * 0, 0.5 * 12],
    "fisher": [0.25, 1.0, 0.5],
}


def channels(down: torch.Tensor = DOWN, x: torch.Tensor = X, fisher: list[float] | None = None) -> Channels:
    x = x.double()
    return Channels(
        width=down.shape[1],
        num_tokens=len(x),
        down_l1_F=down.abs().sum(0),
        down_l2_F=down.norm(dim=0),
        down_DF=down,
        sum_squares_F=x.square().sum(0),
        sum_absolute_F=x.abs().sum(0),
        sum_F=x.sum(0),
        gram_FF=(x.T @ x).float(),
        fisher_F=torch.tensor(fisher or [1.0, 4.0, 2.0]),
        output_fisher_DD=torch.diag(torch.arange(1.0, len(down) + 1)),
    )


@pytest.mark.parametrize("name", HAND)
def test_scores_equal_hand_computed_ones(name: str) -> None:
    torch.testing.assert_close(
        CRITERIA[name].score(channels(), 2), torch.tensor(HAND[name], dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_permuting_channels_permutes_scores(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    down, x = torch.randn(5, 9, generator=generator), torch.randn(40, 9, generator=generator)
    fisher = torch.rand(9, generator=generator)
    order = torch.randperm(9, generator=generator)
    plain = CRITERIA[name].score(channels(down, x, fisher.tolist()), 6)
    permuted = CRITERIA[name].score(channels(down[:, order], x[:, order], fisher[order].tolist()), 6)
    torch.testing.assert_close(permuted, plain[order], rtol=1e-5, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(1, 20), st.integers(0, 10_000))
def test_obs_fisher_removes_the_channel_that_costs_least_in_the_metric(width, rows, tokens, seed) -> None:
    """The first removal, against the error that the best other columns leave, solved for each channel."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x = torch.randn(30, width, generator=generator, dtype=torch.float64)
    g = torch.randn(tokens, rows, generator=generator, dtype=torch.float64) * 10.0 ** -torch.arange(rows)
    metric = g.T @ g
    metric = metric / metric.diagonal().mean() + 1e-6 * torch.eye(rows, dtype=torch.float64)
    damped = x.T @ x / 30
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    costs = []
    for j in range(width):
        others = [i for i in range(width) if i != j]
        change = torch.linalg.solve(damped[others][:, others], damped[others][:, j])
        left = damped[j, j] - change @ damped[others][:, j]
        costs.append(float(left * (down[:, j] @ metric @ down[:, j])))
    fields = channels(down, x)
    fields = dataclasses.replace(fields, gram_FF=x.T @ x, output_fisher_DD=g.T @ g)
    scores = CRITERIA["obs_fisher"].score(fields, width - 1)
    assert costs[int(scores.argmin())] <= min(costs) * (1 + 1e-6)


def test_obs_fisher_without_gradients_is_obs() -> None:
    fields = dataclasses.replace(channels(), output_fisher_DD=torch.zeros(2, 2))
    torch.testing.assert_close(CRITERIA["obs_fisher"].score(fields, 2), CRITERIA["obs"].score(fields, 2))


def test_random_depends_on_the_seed_only() -> None:
    scores = [CRITERIA["random"].score(Channels(width=50, seed=seed), 10) for seed in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 30), st.integers(1, 9), st.integers(0, 10_000))
def test_greedy_removal_equals_trying_every_channel(width, rows, tokens, block, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x[:, -1] += 2 * x[:, 0]
    covariance = x.T @ x / tokens
    damping = 1e-2
    removed, _ = remove_greedily(down, covariance, num_removed=width - 1, damping=damping, block=block)
    expected = naive_greedy_removal(down, x, width - 1, damping * float(covariance.diagonal().mean()))
    assert removed.tolist() == expected


def test_cost_is_what_removing_one_more_channel_costs() -> None:
    from reference import naive_ridge_objective

    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    covariance = x.T @ x / 50
    ridge = 0.01 * float(covariance.diagonal().mean())
    removed, cost = remove_greedily(down, covariance, num_removed=3, damping=0.01, block=2)
    kept = [j for j in range(7) if j not in removed.tolist()]
    base = naive_ridge_objective(down, kept, x, ridge)
    for j in kept:
        more = naive_ridge_objective(down, [k for k in kept if k != j], x, ridge) - base
        assert float(cost[j]) == pytest.approx(more, rel=1e-9)


def test_of_two_equal_channels_one_stays() -> None:
    """Wanda drops both of a pair of weak twins; greedy removal keeps one, which then does both jobs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 6, generator=generator)
    x[:, 1] = x[:, 0]
    down = torch.randn(8, 6, generator=generator)
    down[:, :2] *= 0.8 / down[:, :2].norm(dim=0)
    down[:, 2:] /= down[:, 2:].norm(dim=0)
    scored = channels(down, x, [1.0] * 6)
    by_l2 = top_channels(CRITERIA["l2"].score(scored, 4), 4, "x").tolist()
    by_obs = top_channels(CRITERIA["obs"].score(scored, 4), 4, "x").tolist()
    assert not {0, 1} & set(by_l2)
    assert len({0, 1} & set(by_obs)) == 1


def test_obs_scores_order_removed_channels_before_all_others() -> None:
    generator = torch.Generator().manual_seed(5)
    down, x = torch.randn(5, 12, generator=generator), torch.randn(60, 12, generator=generator)
    scored = channels(down, x, [1.0] * 12)
    covariance = scored.gram_FF / 60
    removed, _ = remove_greedily(down, covariance, num_removed=5, damping=DAMPING)
    scores = CRITERIA["obs"].score(scored, 7)
    assert scores[removed].tolist() == [-5, -4, -3, -2, -1]
    assert (scores >= 0).sum() == 7


def test_a_layer_that_never_fired_still_gets_scores() -> None:
    scored = channels(DOWN, torch.zeros(4, 3))
    for name in CRITERIA:
        assert torch.isfinite(CRITERIA[name].score(scored, 2)).all()


def test_a_gram_that_rounding_made_indefinite_still_gives_an_order() -> None:
    """One token of a million times the others' energy, accumulated in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator)
    x[0] *= 1e3
    gram = (x.T @ x) - 400 * torch.eye(8)
    assert torch.linalg.eigvalsh(gram.double() / 300).min() < 0
    removed, cost = remove_greedily(
        torch.randn(4, 8, generator=generator), gram / 300, num_removed=3, damping=1e-9
    )
    assert len(set(removed.tolist())) == 3
    assert torch.isfinite(cost).all()


def test_top_channels_are_ascending_and_ties_keep_the_lower_index() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0])
    assert top_channels(scores, 3, "x").tolist() == [0, 1, 3]
    with pytest.raises(RunError, match=r"layers\.4"):
        top_channels(torch.tensor([1.0, torch.nan]), 1, "layers.4")


def test_unknown_criterion_is_named() -> None:
    with pytest.raises(UserError, match=r"'wandaa'.*wanda"):
        find_criterion("wandaa")


@pytest.mark.parametrize(("width", "step"), [(1000, 128), (0, 128), (-128, 128), (1664, 128), (128, 0)])
def test_impossible_widths_are_refused(width: int, step: int) -> None:
    with pytest.raises(UserError, match=str(width)):
        check_width(width, step, 1536)


@pytest.mark.parametrize(
    ("width", "says"),
    [(7808, ("K-quants", "7680 and 7936")), (1000, ("does not fit", "768 and 1024")), (7680, ())],
)
def test_alignment_is_said_in_one_line(width: int, says: tuple[str, ...]) -> None:
    notes = alignment_notes(width)
    assert len(notes) == (1 if says else 0)
    assert all(part in notes[0] for part in says)
