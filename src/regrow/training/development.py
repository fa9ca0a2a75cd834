"""The development set: how many instructions the student follows, measured between steps.

A lower divergence does not promise better instruction following, so a run may choose its weights by prompts
whose constraints can be checked. They are disjoint from IFEval, which is never used to choose anything.
"""

from typing import Any

import torch
from torch import Tensor

from regrow.data.constraints import answer_of, check_response
from regrow.data.prompts import read_prompts
from regrow.modeling.generate import generate_responses
from regrow.training.student import HiddenStates, bf16_products

_BATCH_SIZE = 32


class DevelopmentSet:
    """Prompts that the student answers greedily; the checkers of IFEval judge the answers.

    Args:
        source: prompts with constraints, as in `read_prompts`.
        tokenizer: the student's.
        limit: only the first so many prompts.
        max_new_tokens: longest answer.
        enable_thinking: passed to the chat template when given; a thinking block is not judged.
        rank, world_size: each process answers its share.

    Raises:
        UserError: the prompts cannot be used.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        *,
        limit: int | None,
        max_new_tokens: int,
        enable_thinking: bool | None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._prompts = read_prompts(source, limit=limit)[rank::world_size]
        self._tokenizer, self._max_new_tokens = tokenizer, max_new_tokens
        self._enable_thinking = enable_thinking

    def counts(self, student: HiddenStates) -> Tensor:
        """Instructions that this process' answers follow strictly, and all of them, fp64 [2]."""
        device = next(student.parameters()).device
        with bf16_products(device, student.autocast):
            responses = generate_responses(
                student.model,
                self._tokenizer,
                [[{"role": "user", "content": prompt.text}] for prompt in self._prompts],
                max_new_tokens=self._max_new_tokens,
                batch_size=_BATCH_SIZE,
                enable_thinking=self._enable_thinking,
                progress="development set",
            )
        followed = total = 0
        for prompt, response in zip(self._prompts, responses, strict=True):
            answer = answer_of(response.text, thinking=self._enable_thinking is True)
            verdict = check_response(
                prompt.text, answer, prompt.instruction_ids, prompt.kwargs, row=prompt.where
            )
            followed += sum(verdict.strict)
            total += len(verdict.strict)
        return torch.tensor([followed, total], dtype=torch.float64)
