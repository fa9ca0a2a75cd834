"""What a store keeps of the teacher per token, in which form, and how it is read back.

With the teacher's head at hand the final hidden state says everything that the logits do, at 2 D bytes per
token instead of 4 V (Qwen3.5-4B: 5 KB instead of 1 MB). A few entries of the distribution, at 8 K bytes, need
no head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from regrow.losses import SparseTargets, sparse_targets
from regrow.losses.sparse import Kind
from regrow.modeling.hidden import Head
from regrow.modeling.sampling import uniform_stream
from regrow.training.student import head_arguments

Targets = Tensor | SparseTargets


class Form(Protocol):
    """One way of keeping what the student learns from."""

    @property
    def dtype(self) -> np.dtype:
        """Of a token's record."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the records besides teacher and text, JSON."""

    def encode(self, states_TD: Tensor, head: Head, rows: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Records [T] of the tokens of several rows.

        Args:
            states_TD: the teacher's final hidden states, row after row.
            head: the teacher's output layer.
            rows: the rows' numbers.
            counts: tokens per row.
        """

    def decode(self, records_T: np.ndarray) -> Targets:
        """What the loss takes, on the CPU."""

    def note(self, text: str) -> str:
        """A sentence about what is kept of that text."""


@dataclass(frozen=True)
class HiddenForm:
    """Final hidden states, rounded to bf16.

    Attributes:
        width: D.
    """

    width: int

    @property
    def dtype(self) -> np.dtype:
        """Bit patterns; numpy has no bf16."""
        return np.dtype([("state", "<i2", (self.width,))])

    @property
    def identity(self) -> dict[str, Any]:
        """The form alone."""
        return {"form": "hidden"}

    def encode(self, states_TD: Tensor, head: Head, rows: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Round."""
        records_T = np.empty(len(states_TD), self.dtype)
        records_T["state"] = states_TD.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy()
        return records_T

    def decode(self, records_T: np.ndarray) -> Tensor:
        """bf16 [T, D]."""
        return torch.from_numpy(np.ascontiguousarray(records_T["state"])).view(torch.bfloat16)

    def note(self, text: str) -> str:
        """Where the states come from."""
        return f"The teacher's hidden states of the {text} come from disk (bf16)."


@dataclass(frozen=True)
class SparseForm:
    """Entries of the teacher's distribution.

    Attributes:
        kind: which.
        num_entries: K, for `top_k` not above the vocabulary.
        temperature: divisor of the logits.
        seed: of the draws, which depend on it and the row's number only.
    """

    kind: Kind
    num_entries: int
    temperature: float
    seed: int = 0

    @property
    def dtype(self) -> np.dtype:
        """Ids and log-probabilities."""
        shape = (self.num_entries,)
        return np.dtype([("token_ids", "<i4", shape), ("log_probs", "<f4", shape)])

    @property
    def identity(self) -> dict[str, Any]:
        """Everything but a seed that nothing is drawn with."""
        identity = {"form": self.kind, "entries": self.num_entries, "temperature": self.temperature}
        return identity | ({"seed": self.seed} if self.kind == "sampled" else {})

    def encode(self, states_TD: Tensor, head: Head, rows: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Apply the head and choose."""
        uniforms_TK = None
        if self.kind == "sampled":
            streams = (
                uniform_stream(self.seed, row, count * self.num_entries)
                for row, count in zip(rows, counts, strict=True)
            )
            uniforms_TK = torch.cat([stream.view(-1, self.num_entries) for stream in streams])
        targets = sparse_targets(
            states_TD,
            kind=self.kind,
            num_entries=self.num_entries,
            temperature=self.temperature,
            uniforms_TK=uniforms_TK,
            **head_arguments(teacher=head),
        )
        records_T = np.empty(len(states_TD), self.dtype)
        records_T["token_ids"] = targets.token_ids_TK.cpu().numpy()
        records_T["log_probs"] = targets.log_probs_TK.cpu().numpy()
        return records_T

    def decode(self, records_T: np.ndarray) -> SparseTargets:
        """The targets."""
        ids_TK, log_probs_TK = (
            torch.from_numpy(np.ascontiguousarray(records_T[name])) for name in ("token_ids", "log_probs")
        )
        return SparseTargets(ids_TK, log_probs_TK, self.kind)

    def note(self, text: str) -> str:
        """What is approximated."""
        if self.kind == "top_k":
            kept = f"its {self.num_entries} most likely tokens, and the rest as one"
            meaning = "a lower bound of the full KL"
        else:
            kept = f"{self.num_entries} draws, the same in every epoch"
            meaning = "an estimate of the full KL without bias"
        return (
            f"Of the teacher's distribution on the {text} the store keeps {kept} "
            f"({self.dtype.itemsize} bytes per token); the KL there is {meaning}."
        )
