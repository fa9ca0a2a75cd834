"""The model that writes the corpus, loaded once, when the first answer is needed."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from regrow.modeling.load import load_tokenizer
from regrow.modeling.writers import Writer, open_writer
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
        engine: str,
        trust_remote_code: bool,
    ) -> None:
        self._folder, self._trust = folder, trust_remote_code
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self._enable_thinking, self._dtype = enable_thinking, dtype
        self._device, self._engine = device, engine

    def close(self) -> None:
        """Give the model's memory back."""
        if "_writer" in self.__dict__:  # it was needed
            self._writer.close()

    @cached_property
    def _writer(self) -> Writer:
        return open_writer(
            self._folder,
            engine=self._engine,
            dtype=self._dtype,
            device=self._device,
            trust_remote_code=self._trust,
        )

    def answer(self, conversations: Sequence[Sequence[Message]], decoding: Decoding) -> Sequence[Answered]:
        """Answer conversations that end in a user turn."""
        return self._writer(
            conversations,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
            enable_thinking=self._enable_thinking,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=decoding.seed,
            progress=None,
        )

    def write_user_turns(self, count: int, *, seed: int) -> Sequence[Answered]:
        """Let the model write what a user might say, at temperature 1 (variety is the point)."""
        header = user_header(load_tokenizer(self._folder, self._trust))
        return self._writer(
            [header] * count,
            max_new_tokens=_USER_TURN_TOKENS,
            batch_size=self._batch_size,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
            progress="user turns",
        )
