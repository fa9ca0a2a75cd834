"""The model that writes the corpus, loaded once, when the first answer is needed."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from regrow.modeling.generate import generate_responses
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.synthesis.answers import Answered, Decoding, Message
from regrow.synthesis.sources import user_header

_USER_TURN_TOKENS = 200


class Teacher:
    """A chat model that answers batches of conversations; `answer` has the type `answers.Answer`."""

    def __init__(
        self,
        folder: Path,
        *,
        max_new_tokens: int,
        batch_size: int,
        enable_thinking: bool | None,
        device: str,
        dtype: str,
        trust_remote_code: bool,
    ) -> None:
        self._folder, self._trust = folder, trust_remote_code
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self._enable_thinking, self._dtype = enable_thinking, dtype
        self._device = pick_device(device)

    @cached_property
    def _model(self) -> Any:
        return load_model(self._folder, dtype=self._dtype, device=self._device, trust_remote_code=self._trust)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._folder, self._trust)

    def answer(self, conversations: Sequence[Sequence[Message]], decoding: Decoding) -> Sequence[Answered]:
        """Answer conversations that end in a user turn."""
        return generate_responses(
            self._model,
            self._tokenizer,
            conversations,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
            enable_thinking=self._enable_thinking,
            do_sample=not decoding.greedy,
            temperature=1.0 if decoding.greedy else decoding.temperature,
            top_p=decoding.top_p,
            seed=decoding.seed,
            progress=None,
        )

    def write_user_turns(self, count: int, *, seed: int) -> Sequence[Answered]:
        """Let the model write what a user might say, at temperature 1 (variety is the point)."""
        return generate_responses(
            self._model,
            self._tokenizer,
            [user_header(self._tokenizer)] * count,
            max_new_tokens=_USER_TURN_TOKENS,
            batch_size=self._batch_size,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
            progress="user turns",
        )
