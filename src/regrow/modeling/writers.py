"""Who writes a model's answers: this project's own generation, or vLLM where it is installed.

Both take the same token ids (the chat template is applied here), the same end tokens and sampling settings,
and give the same `Response`. vLLM's kernels round differently, so its texts may differ from transformers'.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from transformers import AutoConfig, GenerationConfig

from regrow.errors import UserError
from regrow.modeling.generate import (
    Conversation,
    Response,
    check_lengths,
    encode_prompt,
    end_token_ids,
    generate_responses,
)
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.packages import import_vllm, require_engine
from regrow.progress import say

_CHUNK = 1_024  # prompts per call
_LONGEST_PROMPT = 4_096  # vLLM reserves memory for it before it has seen a prompt


class Writer(Protocol):
    """Answers conversations; arguments and errors are those of `generate_responses`."""

    def __call__(  # noqa: D102
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        batch_size: int,
        enable_thinking: bool | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        on_result: Callable[[int, Response], None] | None = None,
        progress: str | None = "generate",
    ) -> list[Response]: ...

    def close(self) -> None:
        """Give the memory back; whoever opens a writer and goes on with other work calls this."""


def open_writer(
    folder: Path,
    *,
    engine: str,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    gpu_memory_utilization: float | None = None,
) -> Writer:
    """A model, ready to answer.

    Args:
        folder: local model folder.
        engine: a name of `packages.ENGINES`. vLLM takes its own device and batch size.
        dtype, device, trust_remote_code: as in `load_model`.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes; None is its own default.

    Raises:
        UserError: an unknown engine, or vLLM is not installed or refuses the model.
    """
    require_engine(engine)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if engine == "vllm":
        return _Vllm(folder, tokenizer, dtype, trust_remote_code, gpu_memory_utilization)
    model = load_model(folder, dtype=dtype, device=pick_device(device), trust_remote_code=trust_remote_code)
    return _Own(model, tokenizer)


class _Own:
    """This project's own generation."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def __call__(self, conversations: Sequence[Conversation], **options: Any) -> list[Response]:
        return generate_responses(self._model, self._tokenizer, conversations, **options)

    def close(self) -> None:
        self._model = None


class _Vllm:
    """vLLM's offline engine, started with the first prompts."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        dtype: str,
        trust_remote_code: bool,
        gpu_memory_utilization: float | None,
    ) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype, self._trust = dtype, trust_remote_code
        share = gpu_memory_utilization
        self._memory = {} if share is None else {"gpu_memory_utilization": share}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        generation = None
        if (folder / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(folder)
        self._model = SimpleNamespace(config=config, generation_config=generation)
        self._end_ids = end_token_ids(tokenizer, self._model)
        self._llm: Any = None
        self._context = 0

    def __call__(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        batch_size: int,
        enable_thinking: bool | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        on_result: Callable[[int, Response], None] | None = None,
        progress: str | None = "generate",
    ) -> list[Response]:
        vllm = import_vllm()
        prompts = [encode_prompt(self._tokenizer, item, enable_thinking) for item in conversations]
        check_lengths(self._model, prompts, max_new_tokens)
        if not prompts:
            return []
        needed = max(map(len, prompts)) + max_new_tokens
        if self._llm is None or needed > self._context:
            self.close()  # its memory goes before a longer one starts
            self._llm = self._start(vllm, max(needed, _LONGEST_PROMPT + max_new_tokens))
        # A seed per prompt: who shares its batch must not decide what is drawn.
        sampling = [
            vllm.SamplingParams(
                temperature=temperature,
                top_p=top_p if temperature > 0 else 1.0,
                max_tokens=max_new_tokens,
                stop_token_ids=self._end_ids,
                seed=(seed * 1_000_003 + number) % (1 << 63) if temperature > 0 else None,
                detokenize=False,
            )
            for number in (range(len(prompts)) if numbers is None else numbers)
        ]
        responses: list[Response] = []
        for begin in range(0, len(prompts), _CHUNK):  # what is finished reaches the caller chunk by chunk
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts[begin : begin + _CHUNK]],
                sampling[begin : begin + _CHUNK],
                use_tqdm=progress is not None,
            )
            for output in outputs:
                responses.append(self._response(output.outputs[0]))
                if on_result is not None:
                    on_result(len(responses) - 1, responses[-1])
        return responses

    def close(self) -> None:
        """Shut the engine down; further prompts start another."""
        if self._llm is None:
            return
        # The engine is a process of its own; one that is only forgotten may keep its memory.
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None

    def _start(self, vllm: Any, context: int) -> Any:
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or context
        self._context = min(context, limit)
        try:
            return vllm.LLM(
                model=str(self._folder),
                dtype=self._dtype,
                trust_remote_code=self._trust,
                max_model_len=self._context,
                generation_config="vllm",  # no penalty, no top-k from the checkpoint
                **self._memory,
            )
        except (ValueError, RuntimeError) as error:
            say(str(error))
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"vLLM refuses {self._folder} ({reason}); use the engine transformers.") from None

    def _response(self, output: Any) -> Response:
        tokens = [int(token) for token in output.token_ids]
        finished = output.finish_reason == "stop"
        kept = tokens[:-1] if tokens and tokens[-1] in self._end_ids else tokens
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Response(text, kept, len(kept) + finished, finished)
