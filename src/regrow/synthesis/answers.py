"""The teacher answers prompts: turn by turn, with further attempts where a constraint was missed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from regrow.data.constraints import Verdict, answer_of, check_response
from regrow.synthesis.prompts import Prompt

Message = dict[str, str]
_SEEDS_PER_BLOCK = 1_000  # attempts x turns of one block stay below this


class Answered(Protocol):
    """What the generator returns per conversation; `modeling.generate.Response` fits."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def num_tokens(self) -> int: ...  # noqa: D102
    @property
    def finished(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Decoding:
    """How the teacher's answers are drawn. `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    seed: int

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0


Answer = Callable[[Sequence[Sequence[Message]], Decoding], Sequence[Answered]]


@dataclass(frozen=True)
class _Result:
    messages: list[Message]
    num_tokens: int
    finished: bool
    verdict: Verdict | None
    decoding: Decoding
    attempt: int

    @property
    def rank(self) -> tuple[bool, int]:
        """Finished answers before cut-off ones, then by constraints met."""
        return self.finished, sum(self.verdict.strict) if self.verdict else 0

    @property
    def good(self) -> bool:
        return self.finished and (self.verdict is None or all(self.verdict.strict))


def answer_block(
    prompts: Sequence[Prompt],
    answer: Answer,
    *,
    block: int,
    seed: int,
    temperature: float,
    top_p: float,
    attempts: int,
    model_name: str,
) -> list[dict[str, Any]]:
    """One corpus row per prompt, in order.

    Prompts with constraints are answered greedily first, since that is how instruction following is
    measured, and then up to `attempts - 1` times by sampling while a constraint is missed; the best attempt
    stays. Other prompts are sampled once. All seeds derive from `seed`, the block's number, the attempt and
    the turn, so a block gives the same rows whenever it is run.
    """
    best: dict[int, _Result] = {}
    for attempt in range(attempts):
        groups: dict[Decoding, list[int]] = {}
        for index, prompt in enumerate(prompts):
            if attempt and (not prompt.instruction_ids or best[index].good):
                continue
            greedy = temperature == 0 or (bool(prompt.instruction_ids) and attempt == 0)
            if attempt and temperature == 0:
                continue  # a greedy answer would only repeat itself
            base = (seed * 1_000_003 + block) * _SEEDS_PER_BLOCK + attempt * 10
            decoding = Decoding(0.0 if greedy else temperature, 1.0 if greedy else top_p, base)
            groups.setdefault(decoding, []).append(index)
        for decoding, indices in groups.items():
            results = _converse([prompts[index] for index in indices], answer, decoding, attempt)
            for index, result in zip(indices, results, strict=True):
                if index not in best or result.rank > best[index].rank:
                    best[index] = result
    return [_row(prompt, best[index], model_name, seed) for index, prompt in enumerate(prompts)]


def _converse(prompts: Sequence[Prompt], answer: Answer, decoding: Decoding, attempt: int) -> list[_Result]:
    conversations: list[list[Message]] = [
        [{"role": "system", "content": prompt.system}] if prompt.system else [] for prompt in prompts
    ]
    num_tokens, finished = [0] * len(prompts), [True] * len(prompts)
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        # a conversation whose answer was cut off is not continued
        active = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns) and finished[i]]
        for i in active:
            conversations[i].append({"role": "user", "content": prompts[i].turns[turn]})
        turn_decoding = Decoding(decoding.temperature, decoding.top_p, decoding.seed + turn)
        responses = answer([conversations[i] for i in active], turn_decoding) if active else []
        for i, response in zip(active, responses, strict=True):
            conversations[i].append({"role": "assistant", "content": response.text})
            num_tokens[i] += response.num_tokens
            finished[i] = response.finished
    return [
        _Result(messages, num_tokens[i], finished[i], _verdict(prompts[i], messages), decoding, attempt)
        for i, messages in enumerate(conversations)
    ]


def _verdict(prompt: Prompt, messages: list[Message]) -> Verdict | None:
    if not prompt.instruction_ids:
        return None
    return check_response(
        prompt.turns[-1],
        answer_of(messages[-1]["content"], thinking=False),
        prompt.instruction_ids,
        prompt.kwargs,
        row=f"prompt {prompt.id}",
    )


def _row(prompt: Prompt, result: _Result, model_name: str, seed: int) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "prompt_id": prompt.id,
        "split": prompt.split,
        "kind": prompt.kind,
        "model": model_name,
        "seed": seed,
        "decoding": "greedy" if result.decoding.greedy else "sampled",
        "finished": result.finished,
        "num_tokens": result.num_tokens,
    }
    if result.verdict is not None:
        meta |= {
            "attempt": result.attempt,
            "instruction_id_list": list(prompt.instruction_ids),
            "kwargs": list(prompt.kwargs),
            "follow_strict": result.verdict.strict,
            "follow_loose": result.verdict.loose,
        }
    return {"messages": result.messages, "meta": meta}
