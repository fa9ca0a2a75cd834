"""On-policy distillation: the student answers prompts, the teacher judges every token of the answers.

Source: Agarwal et al., arXiv 2306.13649 (GKD). The answers of a window of steps are written before its first
step and kept on disk, so that a resumed run trains on the same ones.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regrow.data.templates import Encoded
from regrow.errors import UserError
from regrow.files import read_json, write_json
from regrow.modeling.generate import closing_ids, encode_prompt
from regrow.training.student import HiddenStates
from regrow.training.writing import Answer


class Rollouts:
    """Continuations of the corpus' own prompts by the student, window by window.

    Args:
        work_dir: where they are kept.
        rows: the corpus; a prompt is a row up to its last response.
        plan: the run's micro-batches.
        tokenizer: the student's.
        answer: who writes for the student.
        fraction: share of the micro-batches that are replaced, chosen by the seed.
        refresh_steps: steps per window.
        first: the step that this session starts at and its place in the plan.
        batches_per_step: micro-batches of a step over all processes.
        batch_tokens: the most tokens of a micro-batch, padding counted; one with room for fewer of the
            longest possible answers takes its first prompts only.
        max_new_tokens, temperature: how the student writes; temperature 0 is greedy.
        batch_size: answers in flight.
        seed: which batches, and the sampling.
        rank, world_size: each process writes and keeps those of its own micro-batches.
    """

    def __init__(
        self,
        *,
        work_dir: Path,
        rows: Sequence[Encoded],
        plan: Sequence[tuple[int, ...]],
        tokenizer: Any,
        answer: Answer,
        fraction: float,
        refresh_steps: int,
        first: tuple[int, int],
        batches_per_step: int,
        batch_tokens: int,
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._folder = work_dir / "rollouts"
        self._rows, self._plan, self._tokenizer = rows, plan, tokenizer
        self._answer, self._fraction, self._seed = answer, fraction, seed
        self._refresh, self._first, self._per_step = refresh_steps, first, batches_per_step
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self._rank, self._world_size = rank, world_size
        self._end = closing_ids(tokenizer)
        self._window = -1
        self._written: dict[int, list[Encoded]] = {}

    def chosen(self, position: int) -> bool:
        """Whether the student writes the micro-batch at this place of the plan."""
        digest = hashlib.sha256(f"{self._seed}-{position}".encode()).digest()
        return int.from_bytes(digest[:8]) < self._fraction * 2**64

    def replace(self, position: int) -> list[Encoded] | None:
        """The rows that the student wrote for a micro-batch, or None where the corpus' own are used."""
        return self._written.get(position) or None

    def prepare(self, step: int, student: HiddenStates) -> None:
        """Have the answers of the window that holds `step` at hand; write them if they are not on disk."""
        window = step // self._refresh
        if window == self._window:
            return
        path = self._folder / f"window-{window}-{self._rank}of{self._world_size}.json"
        if path.exists():
            stored = read_json(path)
            self._written = {
                int(position): [Encoded(ids, mask) for ids, mask in rows] for position, rows in stored.items()
            }
        else:
            self._written = self._write(window, student)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(
                path,
                {
                    position: [[row.input_ids, row.response_mask] for row in rows]
                    for position, rows in self._written.items()
                },
            )
        self._window = window

    def _write(self, window: int, student: HiddenStates) -> dict[int, list[Encoded]]:
        step, place = self._first
        begin = place + (max(window * self._refresh, step) - step) * self._per_step
        end = min(place + ((window + 1) * self._refresh - step) * self._per_step, len(self._plan))
        texts = [
            (position, self._tokenizer.decode(prompt))
            for position in range(begin + self._rank, end, self._world_size)
            if self.chosen(position)
            for prompt in self._prompts(position)
        ]
        if not texts:
            return {}
        # The run's own random state must not depend on whether the answers were on disk.
        with torch.random.fork_rng():
            responses = self._answer(
                student,
                [text for _, text in texts],
                max_new_tokens=self._max_new_tokens,
                batch_size=self._batch_size,
                temperature=self._temperature,
                seed=self._seed * 1_000_003 + window,
                progress="student writes",
            )
        written: dict[int, list[Encoded]] = {}
        for (position, text), response in zip(texts, responses, strict=True):
            ids = encode_prompt(self._tokenizer, text, None)
            tokens = [*response.token_ids, *(self._end if response.finished else [])]
            if tokens:
                row = Encoded([*ids, *tokens], [False] * len(ids) + [True] * len(tokens))
                written.setdefault(position, []).append(row)
        return written

    def _prompts(self, position: int) -> list[list[int]]:
        """The first prompts of a micro-batch that fit into it with the longest possible answers."""
        rows = [self._rows[number] for number in self._plan[position]]
        prompts = [row.input_ids[:length] for row in rows if (length := prompt_length(row))]
        widths = itertools.accumulate((len(prompt) + self._max_new_tokens for prompt in prompts), max)
        fitting = sum(count * width <= self._batch_tokens for count, width in enumerate(widths, 1))
        return prompts[: max(fitting, 1)]


def require_prompts(rows: Sequence[Encoded]) -> None:
    """Raises:
    UserError: no row has a prompt and a response.
    """
    if not any(prompt_length(row) for row in rows):
        raise UserError(
            "on_policy_fraction needs a corpus of conversations; it holds no prompt with a response."
        )


def prompt_length(row: Encoded) -> int:
    """Tokens before the last response of a row; 0 where there is no prompt or no response."""
    mask = row.response_mask
    end = next((index for index in range(len(mask), 0, -1) if mask[index - 1]), 0)
    while end and mask[end - 1]:
        end -= 1
    return end
