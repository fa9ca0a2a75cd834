"""Divergences between two models from hidden states, in chunks; the teacher may be a few stored entries."""

from collections.abc import Callable
from functools import partial

from regrow.losses.chunks import LossOutput
from regrow.losses.fused import fused_linear_divergence
from regrow.losses.metrics import TokenMetrics, divergence_metrics
from regrow.losses.sparse import SparseTargets, sparse_linear_kl, sparse_targets

fused_linear_kl: Callable[..., LossOutput] = partial(fused_linear_divergence, divergence="forward_kl")
fused_linear_reverse_kl: Callable[..., LossOutput] = partial(fused_linear_divergence, divergence="reverse_kl")
fused_linear_jsd: Callable[..., LossOutput] = partial(fused_linear_divergence, divergence="jsd")
fused_linear_skewed_kl: Callable[..., LossOutput] = partial(fused_linear_divergence, divergence="skewed_kl")

LOSSES: dict[str, Callable[..., LossOutput]] = {
    "forward_kl": fused_linear_kl,
    "reverse_kl": fused_linear_reverse_kl,
    "jsd": fused_linear_jsd,
    "skewed_kl": fused_linear_skewed_kl,
}

__all__ = [
    "LOSSES",
    "LossOutput",
    "SparseTargets",
    "TokenMetrics",
    "divergence_metrics",
    "fused_linear_divergence",
    "fused_linear_jsd",
    "fused_linear_kl",
    "fused_linear_reverse_kl",
    "fused_linear_skewed_kl",
    "sparse_linear_kl",
    "sparse_targets",
]
