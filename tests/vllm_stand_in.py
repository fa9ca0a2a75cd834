"""vLLM played by transformers: the parts of its interface that are used, greedy, one prompt at a time."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from regrow.modeling.load import load_model


class SamplingParams(SimpleNamespace):
    """Whatever it is given."""


class Vllm(ModuleType):
    """The module.

    Attributes:
        started: the options of every engine, in order.
        asked: (prompts, sampling) of every call.
        running: engines that were not shut down.
    """

    SamplingParams = SamplingParams

    def __init__(self) -> None:
        super().__init__("vllm")
        self.started: list[dict[str, Any]] = []
        self.asked: list[tuple[Any, Any]] = []
        self.running = 0

    def LLM(self, **options: Any) -> "_Engine":  # noqa: N802
        """An engine on the model of `options`, in the dtype asked for."""
        self.started.append(options)
        self.running += 1
        return _Engine(self, options)


class _Engine:
    def __init__(self, module: Vllm, options: dict[str, Any]) -> None:
        self._module = module
        self._model: Any = load_model(options["model"], dtype=options["dtype"])
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))

    def _shutdown(self) -> None:
        assert self._model is not None
        self._module.running -= 1
        self._model = None

    def generate(self, prompts: Any, sampling: Any, use_tqdm: bool) -> list[SimpleNamespace]:
        self._module.asked.append((prompts, sampling))
        return [
            SimpleNamespace(outputs=[self._one(prompt["prompt_token_ids"], params)])
            for prompt, params in zip(prompts, sampling, strict=True)
        ]

    def _one(self, prompt: list[int], params: SamplingParams) -> SimpleNamespace:
        tokens: list[int] = []
        while len(tokens) < params.max_tokens:
            with torch.no_grad():
                logits = self._model(torch.tensor([prompt + tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
            if tokens[-1] in params.stop_token_ids:
                return SimpleNamespace(token_ids=tuple(tokens), finish_reason="stop")
        return SimpleNamespace(token_ids=tuple(tokens), finish_reason="length")


def install_vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """Let `import vllm` find the stand-in for the length of a test."""
    module = Vllm()
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module
