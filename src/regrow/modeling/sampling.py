"""Choosing the next token: greedy, or by nucleus sampling with random numbers given from outside."""

import torch
from torch import Tensor

_TOP_CANDIDATES = 256
_BLOCK_ELEMENTS = 16 * 2**20  # logits at a time: sampling takes ten times their memory


def greedy_tokens(logits_BV: Tensor) -> Tensor:
    """The most likely token of every row, [B]."""
    if logits_BV.device.type == "cpu":
        logits_BV = logits_BV.float()  # bf16 takes five times as long
    return logits_BV.argmax(dim=-1)


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Nucleus sampling by inverting the distribution function; arithmetic in fp32.

    Args:
        logits_BV: the model's logits.
        uniform_B: one number of [0, 1) per row; the same number and logits give the same token.
        temperature: divides the logits.
        top_p: keep the smallest set of most likely tokens whose probability reaches it (arXiv 1904.09751).

    Returns:
        token ids [B].
    """
    size = max(1, _BLOCK_ELEMENTS // logits_BV.shape[-1])
    blocks = zip(logits_BV.split(size), uniform_B.split(size), strict=True)
    return torch.cat([_sample(logits, uniform, temperature, top_p) for logits, uniform in blocks])


def uniform_stream(seed: int, index: int, size: int) -> Tensor:
    """`size` random numbers of [0, 1) that depend on the seed and the conversation's index only."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index * 7_919 + 17) % (1 << 63))
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    probabilities = torch.softmax(logits_BV.float() / temperature, dim=-1)
    if top_p >= 1.0:
        return _invert(probabilities, uniform_B * probabilities.sum(-1))
    # Sorting the whole vocabulary costs more than the model; the nucleus mostly lies in the top few.
    size = min(_TOP_CANDIDATES, probabilities.shape[-1])
    values, tokens = probabilities.topk(size, dim=-1)
    if bool((values.sum(-1) < top_p).any()) and size < probabilities.shape[-1]:
        values, tokens = probabilities.sort(dim=-1, descending=True)
    before = values.cumsum(-1) - values
    nucleus = values.masked_fill(before >= top_p, 0.0)
    chosen = _invert(nucleus, uniform_B * nucleus.sum(-1))
    return tokens.gather(-1, chosen[:, None])[:, 0]


def _invert(weights_BV: Tensor, target_B: Tensor) -> Tensor:
    """First position of every row whose cumulative weight exceeds the target; never one of weight 0."""
    cumulative = weights_BV.double().cumsum(-1)
    position = torch.searchsorted(cumulative, target_B.double()[:, None], right=True)[:, 0]
    last = weights_BV.shape[-1] - 1 - (weights_BV.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(position, last)
