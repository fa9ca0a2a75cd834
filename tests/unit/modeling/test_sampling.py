import pytest
import torch

from regrow.modeling.sampling import greedy_tokens, sample_tokens, uniform_stream


def naive_nucleus(logits, uniform, temperature, top_p):
    """Sort, keep the smallest set that reaches top_p, walk the distribution function."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = p.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for token in order:
        kept.append(token)
        total += float(p[token])
        if total >= top_p:
            break
    target = uniform * total
    for token in kept:
        target -= float(p[token])
        if target < 0:
            return token
    return kept[-1]


@pytest.mark.parametrize(
    ("vocabulary", "top_p", "temperature"), [(50, 0.5, 1.0), (2_000, 0.9, 0.7), (2_000, 0.99, 2.0)]
)
def test_nucleus_against_a_naive_walk(vocabulary, top_p, temperature):
    torch.manual_seed(0)
    logits = torch.randn(64, vocabulary, dtype=torch.float64).float() * 3
    uniform = torch.rand(64, dtype=torch.float64)
    actual = sample_tokens(logits, uniform, temperature=temperature, top_p=top_p).tolist()
    expected = [naive_nucleus(*row, temperature, top_p) for row in zip(logits, uniform.tolist(), strict=True)]
    assert sum(a == b for a, b in zip(actual, expected, strict=True)) >= 63  # fp32 against fp64 at a border


def test_blocks_of_rows_change_nothing(monkeypatch):
    logits, uniforms = torch.randn(7, 50), torch.rand(7, dtype=torch.float64)
    whole = sample_tokens(logits, uniforms, temperature=1.0, top_p=0.9)
    monkeypatch.setattr("regrow.modeling.sampling._BLOCK_ELEMENTS", 120)
    assert torch.equal(sample_tokens(logits, uniforms, temperature=1.0, top_p=0.9), whole)


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, 4)
    uniform = uniform_stream(0, 0, 20_000)
    counts = torch.bincount(sample_tokens(logits, uniform, temperature=1.0, top_p=1.0), minlength=4) / 20_000
    assert torch.allclose(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.012)


def test_impossible_tokens_are_never_chosen():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    for uniform in (0.0, 0.5, 1 - 1e-16):
        token = sample_tokens(
            logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0, top_p=1.0
        )
        assert token.item() in (1, 3)


def test_low_temperature_is_greedy():
    torch.manual_seed(0)
    logits = torch.randn(8, 100)
    chosen = sample_tokens(logits, torch.rand(8, dtype=torch.float64), temperature=1e-3, top_p=1.0)
    assert torch.equal(chosen, greedy_tokens(logits))


def test_streams_differ_by_seed_and_conversation():
    streams = [uniform_stream(seed, index, 8).tolist() for seed in (0, 1) for index in (0, 1)]
    assert len({tuple(stream) for stream in streams}) == 4
    assert uniform_stream(3, 5, 8).tolist() == uniform_stream(3, 5, 8).tolist()
    assert uniform_stream(3, 5, 4).tolist() == uniform_stream(3, 5, 8).tolist()[:4]
