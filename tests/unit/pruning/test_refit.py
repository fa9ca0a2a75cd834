"""The closed form against least squares on stacked rows, and the choice of the ridge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import naive_ridge_refit
from regrow.pruning.refit import RHOS, output_error, refit_down, walk


def problem(rows: int, width: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    both = torch.randn(2 * tokens, width, generator=generator, dtype=torch.float64) @ mix
    down = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return down, both[:tokens], both[tokens:]


def gram(x: torch.Tensor) -> torch.Tensor:
    return (x.T @ x).float()


def naive_error(down: torch.Tensor, kept: list[int], new: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ down.T - x[:, kept] @ new.double().T).square().sum() / (x @ down.T).square().sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(3, 9), st.integers(0, 1000), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_weights_equal_least_squares(rows: int, width: int, seed: int, rho: float) -> None:
    down, x, held = problem(rows, width, 200, seed)
    kept = sorted(torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: width - 1].tolist())
    down32 = down.float()
    result = refit_down(
        down32,
        torch.tensor(kept),
        gram_FF=gram(x),
        num_tokens=len(x),
        held_out_gram_FF=gram(held),
        stored_dtype=torch.float32,
        rhos=[rho],
        start=rho,
    )
    ridge = rho * float(x.square().mean())
    expected = naive_ridge_refit(down32.double(), kept, x, ridge)
    if result.rho is not None:
        scale = expected.abs().max()
        torch.testing.assert_close(result.weight_DK.double(), expected, rtol=0, atol=float(2e-4 * scale))
    assert result.tried[rho] == pytest.approx(
        naive_error(down32.double(), kept, expected, held), rel=2e-3, abs=1e-6
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_stored_weights(stored: torch.dtype) -> None:
    down, x, held = problem(6, 12, 300, 4)
    kept = [0, 1, 3, 4, 5, 7, 8, 10, 11]
    result = refit_down(
        down.float(),
        torch.tensor(kept),
        gram_FF=gram(x),
        num_tokens=len(x),
        held_out_gram_FF=gram(held),
        stored_dtype=stored,
    )
    assert torch.equal(result.weight_DK, result.weight_DK.to(stored).float())
    plain = down.float()[:, kept]
    assert result.error_before == pytest.approx(naive_error(down, kept, plain, held), rel=1e-3)
    assert result.error_after == pytest.approx(naive_error(down, kept, result.weight_DK, held), rel=1e-3)
    assert result.error_after < result.error_before
    assert result.error_after == min(result.tried.values())


def test_a_huge_ridge_is_the_plain_cut() -> None:
    down, x, held = problem(4, 6, 100, 0)
    kept = torch.tensor([0, 2, 3, 5])
    result = refit_down(
        down.float(),
        kept,
        gram_FF=gram(x),
        num_tokens=100,
        held_out_gram_FF=gram(held),
        stored_dtype=torch.float32,
        rhos=[1e9],
        start=1e9,
    )
    torch.testing.assert_close(result.weight_DK, down.float()[:, kept], rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_fewer_tokens_than_channels_is_finite_and_never_worse(tokens: int, seed: int) -> None:
    down, x, held = problem(5, 24, tokens, seed)
    kept = torch.arange(0, 24, 2)
    result = refit_down(
        down.float(),
        kept,
        gram_FF=gram(x),
        num_tokens=tokens,
        held_out_gram_FF=gram(held),
        stored_dtype=torch.bfloat16,
    )
    assert torch.isfinite(result.weight_DK).all()
    assert result.error_after <= result.error_before


def test_a_refit_that_does_not_help_leaves_the_parents_columns() -> None:
    """Held-out tokens on which the fitted relation is reversed."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(100, 4, generator=generator)
    x, held = torch.cat([base, base[:, :2]], 1), torch.cat([base, -base[:, :2]], 1)
    down = torch.randn(3, 6, generator=generator)
    result = refit_down(
        down,
        torch.arange(4),
        gram_FF=x.T @ x,
        num_tokens=100,
        held_out_gram_FF=held.T @ held,
        stored_dtype=torch.float32,
    )
    assert result.rho is None
    assert torch.equal(result.weight_DK, down[:, :4])
    assert result.error_after == result.error_before
    assert result.condition is None


def test_channels_that_copy_each_other_are_refitted_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    base, fresh = torch.randn(2, 400, 4, generator=generator)
    x, held = (torch.cat([value, value[:, :2]], 1) for value in (base, fresh))
    down = torch.randn(3, 6, generator=generator)
    result = refit_down(
        down,
        torch.arange(4),
        gram_FF=x.T @ x,
        num_tokens=400,
        held_out_gram_FF=held.T @ held,
        stored_dtype=torch.float32,
    )
    assert result.error_before > 0.1
    assert result.error_after < 1e-8
    expected = down[:, :4].clone()
    expected[:, :2] += down[:, 4:]
    torch.testing.assert_close(result.weight_DK, expected, rtol=0, atol=1e-4)


def test_dead_layer_and_nothing_removed_are_no_problems() -> None:
    zero, down = torch.zeros(6, 6), torch.randn(3, 6)
    for gram_FF, kept in ((zero, torch.arange(4)), (torch.eye(6), torch.arange(6))):
        result = refit_down(
            down, kept, gram_FF=gram_FF, num_tokens=5, held_out_gram_FF=gram_FF, stored_dtype=torch.float32
        )
        assert torch.equal(result.weight_DK, down[:, kept])
        assert result.error_after == 0


@pytest.mark.parametrize("best", range(len(RHOS)))
def test_the_walk_finds_the_lowest_point_of_a_valley(best: int) -> None:
    seen: dict[float, float] = {}

    def measure(rho: float) -> float:
        seen[rho] = abs(RHOS.index(rho) - best)
        return seen[rho]

    walk(measure, RHOS, 1e-3)
    assert min(seen, key=lambda rho: seen[rho]) == RHOS[best]
    assert len(seen) <= abs(best - RHOS.index(1e-3)) + 3


def test_output_error_is_relative_and_not_negative() -> None:
    down, x, _ = problem(4, 6, 50, 2)
    kept = torch.arange(6)
    assert output_error(down.float(), kept, down.float(), gram(x), 1.0) == 0.0
    assert output_error(down.float(), kept[:3], down.float()[:, :3], gram(x), 0.0) == 0.0
