import pytest
import torch
from torch import nn

from regrow.modeling.hidden import final_hidden
from regrow.training.cpu_attention import NAME, attention_forward, use_cpu_attention
from tiny_models import tiny_model


class Layer(nn.Module):
    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def naive(query, key, value, mask, causal, scale, groups):
    """fp64 softmax attention."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scale
    length = scores.shape[-1]
    if causal:
        scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def window(length, size):
    index = torch.arange(length)
    near = (index[:, None] - index[None]).clamp(min=-1)
    return ((near >= 0) & (near < size))[None, None]


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "width", "mask", "scale"),
    [
        (2, 4, 2, 17, 8, None, None),
        (1, 3, 3, 128, 8, None, 0.5),
        (2, 2, 1, 131, 16, None, None),  # a block and a bit
        (1, 4, 2, 300, 8, None, None),
        (2, 4, 2, 150, 8, "window", None),
        (2, 2, 1, 140, 8, "additive", None),
        (1, 2, 2, 1, 8, None, None),
    ],
)
def test_gradients_are_those_of_softmax_attention(batch, heads, groups, length, width, mask, scale):
    generator = torch.Generator().manual_seed(0)

    def tensor(count):
        shape = (batch, count, length, width)
        return torch.randn(shape, generator=generator).requires_grad_()

    leaves = tensor(heads), tensor(heads // groups), tensor(heads // groups)
    if mask == "window":
        mask = window(length, 20).expand(batch, 1, -1, -1)
    elif mask == "additive":
        mask = torch.zeros(batch, 1, length, length).masked_fill(~window(length, 9), -1e9)
    output, _ = attention_forward(Layer(groups), *leaves, mask, scaling=scale)
    grad = torch.randn(output.shape, generator=generator)
    found = torch.autograd.grad(output, leaves, grad)
    expected = naive(*leaves, mask, mask is None, scale or width**-0.5, groups)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for left, right in zip(found, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_bf16_gradients_are_as_good_as_torchs_own():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 140, 16), (2, 2, 140, 16), (2, 2, 140, 16))
    leaves = [torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in shapes]
    grad = torch.randn(2, 140, 4, 16, generator=generator).bfloat16()
    exact = torch.autograd.grad(naive(*leaves, None, True, 0.25, 2), leaves, grad.double())
    output, _ = attention_forward(Layer(2), *leaves, None)
    ours = torch.autograd.grad(output, leaves, grad)
    for left, right in zip(ours, exact, strict=True):
        assert (left.double() - right).norm() <= 0.01 * right.norm()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_5_text", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("mixed", [False, True])
def test_models_train_as_with_torchs_attention(family, mixed):
    model = tiny_model(family)
    if model.config._attn_implementation != "sdpa":
        assert not use_cpu_attention(model)
        return
    ids = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            hidden = final_hidden(model, ids)
        hidden.float().square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    assert use_cpu_attention(model)
    assert model.config._attn_implementation == NAME
    after = gradients()
    assert set(before) == set(after)
    for name, value in before.items():
        tolerance = 0.03 if mixed else 1e-4
        assert (after[name] - value).norm() <= tolerance * value.norm() + 1e-6, name
