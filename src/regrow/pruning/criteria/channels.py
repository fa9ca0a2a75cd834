# ruff: noqa: N815  (shape suffixes on attributes)
"""What a criterion may look at, and the form of a criterion.

Tensors are of one MLP site; F channels, D hidden size. Sums run over the real tokens of the calibration
share of the corpus, held-out sequences and padding excluded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Need = Literal["norms", "down", "sums", "gram", "fisher", "output_fisher"]


@dataclass(frozen=True)
class Channels:
    """Weights and statistics of one site's channels; what a criterion does not need may be None.

    Attributes:
        width: F.
        seed: seed of this site, for criteria that draw.
        num_tokens: tokens that the sums run over.
        down_l1_F, down_l2_F: L1 and L2 norms of the columns of down_proj (`norms`).
        down_DF: down_proj itself, fp32 (`down`).
        sum_squares_F, sum_absolute_F, sum_F: sums of x^2, |x| and x over tokens, x the input of down_proj.
        gram_FF: sum of x x^T over tokens.
        fisher_F: sum over sequences of (dL/dm)^2, m a factor on the channel (see `criteria.fisher`).
        output_fisher_DD: sum over tokens of g g^T, g = dL/dy at the output y of down_proj (see
            `criteria.obs_fisher`).
    """

    width: int
    seed: int = 0
    num_tokens: int = 0
    down_l1_F: Tensor | None = None
    down_l2_F: Tensor | None = None
    down_DF: Tensor | None = None
    sum_squares_F: Tensor | None = None
    sum_absolute_F: Tensor | None = None
    sum_F: Tensor | None = None
    gram_FF: Tensor | None = None
    fisher_F: Tensor | None = None
    output_fisher_DD: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """How channels are ranked.

    Attributes:
        name: key in `CRITERIA`.
        citation: where the method comes from; the model card prints it.
        needs: which fields of `Channels` must be filled.
        score: (channels, keep) -> scores [F], float64, higher is more important. Only the choice of the top
            `keep` is defined by the scores; a criterion may stop ranking there.
    """

    name: str
    citation: str
    needs: frozenset[Need]
    score: Callable[[Channels, int], Tensor]

    @property
    def needs_statistics(self) -> bool:
        """Whether it cannot work from the weights alone."""
        return bool(self.needs & {"sums", "gram", "fisher", "output_fisher"})

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration must run backward, too."""
        return bool(self.needs & {"fisher", "output_fisher"})


def required(value: Tensor | None) -> Tensor:
    """A field that the criterion declared in `needs`, in float64."""
    if value is None:
        raise ValueError("a criterion asked for a field of Channels that it does not declare in `needs`")
    return value.double()
