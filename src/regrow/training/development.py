"""The development set: how many instructions the student follows, measured between steps.

A lower divergence does not promise better instruction following, so a run may choose its weights by prompts
whose constraints can be checked. They are disjoint from IFEval, which is never used to choose anything.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regrow.data.constraints import answer_of, check_response
from regrow.data.prompts import hash_prompts, read_prompts
from regrow.errors import UserError
from regrow.modeling.generate import encode_prompt
from regrow.training.student import HiddenStates
from regrow.training.writing import Answer


class DevelopmentSet:
    """Prompts that the student answers greedily; the checkers of IFEval judge the answers.

    Args:
        source: prompts with constraints, as in `read_prompts`.
        tokenizer: the student's.
        config: the student's config.json, for the length of its context.
        answer: who writes for the student.
        limit: only the first so many prompts.
        max_new_tokens: longest answer.
        batch_size: answers in flight.
        enable_thinking: passed to the chat template when given; a thinking block is not judged.
        rank, world_size: each process answers its share.

    Attributes:
        hash: SHA-256 of all prompts.

    Raises:
        UserError: the prompts cannot be used, or are too long with their answers.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        config: Mapping[str, Any],
        *,
        answer: Answer,
        limit: int | None,
        max_new_tokens: int,
        batch_size: int,
        enable_thinking: bool | None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        prompts = read_prompts(source, limit=limit)
        self.hash = hash_prompts(prompts)
        self._prompts = prompts[rank::world_size]
        self._answer, self._max_new_tokens = answer, max_new_tokens
        self._batch_size, self._enable_thinking = batch_size, enable_thinking
        self._conversations = [[{"role": "user", "content": prompt.text}] for prompt in self._prompts]
        longest = max(
            (len(encode_prompt(tokenizer, item, enable_thinking)) for item in self._conversations), default=0
        )
        context = config.get("text_config", config).get("max_position_embeddings")
        if context is not None and longest + max_new_tokens > context:
            raise UserError(
                f"A prompt of the development set has {longest} tokens; with development_tokens "
                f"({max_new_tokens}) it exceeds the model's context of {context}; lower development_tokens."
            )

    def counts(self, student: HiddenStates) -> Tensor:
        """This process' instructions that are followed strictly, all of them; answers that ended by
        themselves, all of them; fp64 [4].
        """
        responses = self._answer(
            student,
            self._conversations,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
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
        finished = sum(response.finished for response in responses)
        return torch.tensor([followed, total, finished, len(responses)], dtype=torch.float64)
