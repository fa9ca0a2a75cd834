"""IFEval (Zhou et al., arXiv 2311.07911): generate, then judge with lm-eval's instruction checkers."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regrow.checkpoint import CheckpointReader
from regrow.data.prompts import Key, Prompt, hash_prompts, read_prompts, read_responses
from regrow.errors import UserError
from regrow.evaluation.records import settings_hash
from regrow.evaluation.scoring import score_prompt, summarise
from regrow.files import disk_errors
from regrow.modeling.generate import Response
from regrow.modeling.load import load_tokenizer, pick_device
from regrow.modeling.writers import Writer, open_writer
from regrow.progress import say
from regrow.recipe import sampling_contradiction
from regrow.types import EvalResult


def score_responses(
    *, responses: str | Path, prompts: str | Path, limit: int | None = None, seed: int = 0
) -> EvalResult:
    """Judge given responses, without a model.

    Args:
        responses: jsonl file (.gz allowed) of `{"prompt", "response"}` (or `{"key", "response"}`).
        prompts: see `read_prompts`.
        limit: only the first `limit` prompts.
        seed: of the intervals' bootstrap.

    Raises:
        UserError: a file or line cannot be used, or none of the prompts has a response.
    """
    rows = read_prompts(prompts, limit=limit)
    answers, unmatched = read_responses(responses, rows)
    if not answers:
        raise UserError(
            f"{responses} answers none of the prompts of {prompts}; check that they belong together."
        )
    if unmatched and limit is None:
        say(f"{responses}: {unmatched} responses answer none of the prompts and are left out.")
    records = [score_prompt(prompt, answers[prompt.key]) for prompt in rows if prompt.key in answers]
    figures = summarise(records, missing=len(rows) - len(records), seed=seed)
    comparable = {
        "prompts_sha256": hash_prompts(rows),
        "num_prompts": len(rows),
        "responses": "given",
        "checkers": _checkers(),
    }
    settings = {"prompts": str(prompts), "comparable": comparable}
    return EvalResult("ifeval", {**figures, "unmatched": unmatched}, records, settings)


def ifeval_settings(
    *,
    model: Path,
    prompts: str = "google/IFEval",
    max_new_tokens: int = 1_280,
    limit: int | None = None,
    enable_thinking: bool | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repeats: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    engine: str = "transformers",
    trust_remote_code: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """Everything that the answers depend on besides the model; costs no forward pass.

    `comparable` is what must be equal between two models for a comparison to mean something.
    """
    tokenizer = load_tokenizer(model, trust_remote_code)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    rows = read_prompts(prompts, limit=limit)
    sampled = temperature > 0
    return {
        "prompts": str(prompts),
        "comparable": {
            "prompts_sha256": hash_prompts(rows),
            "num_prompts": len(rows),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "enable_thinking": enable_thinking,
            "max_new_tokens": max_new_tokens,
            "do_sample": sampled,
            **({"temperature": temperature, "top_p": top_p, "seed": seed} if sampled else {}),
            "repeats": repeats,
            "checkers": _checkers(),
        },
        "dtype": dtype,
        **({} if engine == "transformers" else {"engine": engine}),
        "device": pick_device(device).type,
        "model": CheckpointReader(model).fingerprint(),
    }


def evaluate_ifeval(
    *,
    model: Path,
    prompts: str = "google/IFEval",
    max_new_tokens: int = 1_280,
    batch_size: int = 32,
    limit: int | None = None,
    enable_thinking: bool | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repeats: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    engine: str = "transformers",
    trust_remote_code: bool = False,
    answers: Path | None = None,
) -> EvalResult:
    """Have a model answer IFEval's prompts through its chat template, and judge the answers.

    Args:
        model: local folder.
        prompts: see `read_prompts`.
        max_new_tokens: longest answer.
        batch_size: sequences in flight.
        limit: only the first `limit` prompts.
        enable_thinking: passed to the chat template when given; a thinking block is not judged.
        temperature, top_p, seed: of sampling; temperature 0 is greedy.
        repeats: answers per prompt; more than one needs a temperature.
        device, dtype: where and in what precision the model runs.
        engine: who generates, `"transformers"` or `"vllm"`.
        trust_remote_code: run code that the checkpoint brings along.
        answers: jsonl file to which answers are appended as they come, so that a killed run goes on; a file
            made with other settings is begun anew.

    Raises:
        UserError: unusable prompts or model, or settings of sampling that contradict each other.
    """
    if problem := sampling_contradiction(temperature, top_p, repeats):
        raise UserError(f"IFEval: {problem}.")
    settings = ifeval_settings(
        model=model,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        limit=limit,
        enable_thinking=enable_thinking,
        temperature=temperature,
        top_p=top_p,
        repeats=repeats,
        seed=seed,
        device=device,
        dtype=dtype,
        engine=engine,
        trust_remote_code=trust_remote_code,
    )
    rows = read_prompts(prompts, limit=limit)
    numbers = {prompt.key: number for number, prompt in enumerate(rows)}
    known = _begin_answers(answers, settings_hash(settings))
    writer: Writer | None = None
    with contextlib.ExitStack() as opened:
        for repeat in range(repeats):
            title = "ifeval" if repeats == 1 else f"ifeval ({repeat + 1} of {repeats})"
            todo = [prompt for prompt in rows if (prompt.key, repeat) not in known]
            if len(todo) < len(rows):
                say(f"{title}: {len(rows) - len(todo)} of {len(rows)} answers are there already.")
            if not todo:
                continue
            if writer is None:
                writer = open_writer(
                    model, engine=engine, dtype=dtype, device=device, trust_remote_code=trust_remote_code
                )
                opened.callback(writer.close)
            known |= _generate(
                todo,
                writer,
                title=title,
                numbers=[numbers[prompt.key] for prompt in todo],  # each draws what it would in a whole run
                repeat=repeat,
                answers=answers,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                enable_thinking=enable_thinking,
                temperature=temperature,
                top_p=top_p,
                seed=seed + 1_000_003 * repeat,
            )
    thinking = enable_thinking is True
    records = [
        score_prompt(prompt, known[prompt.key, repeat], thinking=thinking)
        for prompt in rows
        for repeat in range(repeats)
    ]
    return EvalResult("ifeval", summarise(records, missing=0, seed=seed), records, settings)


def _generate(
    todo: Sequence[Prompt],
    writer: Writer,
    *,
    title: str,
    repeat: int,
    answers: Path | None,
    **generation: Any,
) -> dict[tuple[Key, int], dict[str, Any]]:
    made: dict[tuple[Key, int], dict[str, Any]] = {}

    def keep(index: int, response: Response) -> None:
        key = todo[index].key
        row = {
            "key": key,
            "repeat": repeat,
            "response": response.text,
            "num_tokens": response.num_tokens,
            "finished": response.finished,
        }
        made[key, repeat] = row
        if answers is not None:
            with disk_errors(answers), open(answers, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    conversations = [[{"role": "user", "content": prompt.text}] for prompt in todo]
    writer(conversations, on_result=keep, progress=title, **generation)
    return made


def _begin_answers(answers: Path | None, made_with: str) -> dict[tuple[Key, int], dict[str, Any]]:
    """Answers that an earlier run with the same settings left, and a file ready for more.

    The file is written anew from what could be read, so that a torn last line does not stay in it.
    """
    if answers is None:
        return {}
    rows: list[dict[str, Any]] = []
    if answers.exists():
        for line in answers.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            if isinstance(row, dict):
                rows.append(row)
    same = bool(rows) and rows[0].get("settings") == made_with
    if rows and not same:
        say(f"{answers.name} was made with other settings; its answers are not used.")
    kept = [row for row in rows[1:] if isinstance(row.get("response"), str)] if same else []
    with disk_errors(answers):
        answers.parent.mkdir(parents=True, exist_ok=True)
        partial = answers.with_name(f".{answers.name}.partial")
        lines = [{"settings": made_with}, *kept]
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        partial.replace(answers)
    return {(row["key"], row.get("repeat", 0)): row for row in kept}


def _checkers() -> str:
    return f"lm-eval {version('lm-eval')}"
