"""`regrow synthesize`: a teacher writes a corpus, in blocks that survive an interruption."""

import contextlib
import json
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from regrow.checkpoint.reader import CheckpointReader
from regrow.data.constraints import require_checkers
from regrow.data.health import corpus_health, corpus_statistics
from regrow.errors import UserError
from regrow.files import (
    alone_in,
    publish_folder,
    read_json,
    require_new_folder,
    sha256_file,
    sha256_json,
    write_json,
)
from regrow.packages import require_engine
from regrow.progress import say
from regrow.synthesis.answers import answer_block
from regrow.synthesis.blocks import Row, begin_work, check_work, require_same, run_blocks
from regrow.synthesis.decontaminate import decontaminate, decontaminate_ifeval
from regrow.synthesis.prompts import Prompt, generate_prompts, make_prompt
from regrow.synthesis.selection import CutOff, Violations, select_rows
from regrow.synthesis.sources import hold_out, read_prompts, self_prompts
from regrow.synthesis.teacher import Teacher

_SCHEMA = 1
_HELD_OUT_SHARE = 0.16
_BATCHES_PER_BLOCK = 2


def synthesize(
    *,
    model: Path | None,
    out: Path,
    num_prompts: int = 1_500,
    num_held_out: int | None = None,
    seed: int = 0,
    constraint_share: float = 0.25,
    system_share: float = 0.25,
    multi_turn_share: float = 0.15,
    style_share: float = 0.5,
    prompts: str | Path | None = None,
    prompts_split: str = "train",
    num_self_prompts: int = 0,
    keep_out: Sequence[str | Path] = (),
    max_new_tokens: int = 512,
    batch_size: int = 32,
    temperature: float = 0.7,
    top_p: float = 0.95,
    attempts: int = 1,
    cut_off: CutOff = "drop",
    violations: Violations = "balance",
    enable_thinking: bool | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
    engine: str = "transformers",
    trust_remote_code: bool = False,
    check_only: bool = False,
) -> dict[str, Any]:
    """Have a model write conversations; `out` gets `train.jsonl`, `held_out.jsonl` and `report.json`.

    Each row is `{"messages": [...], "meta": {...}}`; `meta` tells the prompt's id and kind, the model, the
    seed, how the answer was decoded, whether it ended by itself, its length, and the checkers' verdicts. Work
    in progress lies beside `out` in `<out>.work`; the same command continues it.

    Args:
        model: folder of a chat model; None, for `check_only`, where its weights are not there yet.
        out: folder to make.
        num_prompts: training prompts of the project's own, or the most that are taken from `prompts`.
        num_held_out: held-out prompts; by default 16 % of `num_prompts`.
        seed: seeds prompts, sampling and splits.
        constraint_share, system_share, multi_turn_share, style_share: see `generate_prompts`.
        prompts, prompts_split: take prompts from here instead (see `read_prompts`).
        num_self_prompts: in addition, user turns that the model is asked to write itself.
        keep_out: prompt files of further benchmarks, besides IFEval, whose prompts are left out.
        max_new_tokens: longest answer.
        batch_size: conversations in flight.
        temperature, top_p: sampling of answers; 0 is greedy. Prompts with constraints are answered greedily
            first in any case.
        attempts: tries at a prompt with constraints, all but the first sampled; the best one stays.
        cut_off, violations: what happens to answers that hit the limit or miss a constraint (see
            `select_rows`).
        enable_thinking: passed to the chat template: the mode in which the model will be used.
        device, dtype, engine, trust_remote_code: see `open_writer`.
        check_only: refuse what can be refused now, and write nothing.

    Returns:
        the report: settings, counts of everything left out, statistics of both splits.

    Raises:
        UserError: bad settings, a folder with other work in it or in which another process writes, no usable
            prompts or answers.
    """
    if num_held_out is None:
        num_held_out = round(num_prompts * _HELD_OUT_SHARE)
    _check(num_prompts, num_held_out, num_self_prompts, max_new_tokens, batch_size, attempts)
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature} or top_p {top_p} is out of range; try 0.7 and 0.95.")
    if prompts is None:
        generate = partial(
            generate_prompts,
            seed=seed,
            constraint_share=constraint_share,
            system_share=system_share,
            multi_turn_share=multi_turn_share,
            style_share=style_share,
        )
        own = generate(num_prompts) + generate(num_held_out, split="held_out")
    else:
        own = read_prompts(prompts, split=prompts_split)[: num_prompts + num_held_out]
        own = hold_out(own, min(num_held_out, len(own) // 2), seed=seed)
    benchmarks = [prompt for file in keep_out for prompt in read_prompts(file)]
    own, num_contaminated = _decontaminate(own, benchmarks)
    settings = {
        "schema": _SCHEMA,
        "model": CheckpointReader(model).fingerprint() if model is not None else None,
        "prompts": sha256_json([[prompt.split, prompt.id] for prompt in own]),
        "num_self_prompts": num_self_prompts,
        "benchmarks": sha256_json([prompt.id for prompt in benchmarks]),
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "top_p": top_p,
        "attempts": attempts,
        "cut_off": cut_off,
        "violations": violations,
        "enable_thinking": enable_thinking,
        "dtype": dtype,
        **({} if engine == "transformers" else {"engine": engine}),
    }
    out = Path(out)
    if (out / "report.json").is_file():
        report = read_json(out / "report.json")
        if model is not None:
            require_same(report.get("settings"), settings, out)
        if not check_only:
            say(f"{out} is finished already; nothing to do.")
        return report
    require_engine(engine)
    require_checkers([kind for prompt in own for kind in prompt.instruction_ids])
    require_new_folder(out)
    work = out.with_name(f"{out.name}.work")
    if model is not None:
        check_work(work, settings)
    if check_only:
        return {}
    assert model is not None
    begin_work(work, settings)
    teacher = Teacher(
        model,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        enable_thinking=enable_thinking,
        device=device,
        dtype=dtype,
        engine=engine,
        trust_remote_code=trust_remote_code,
    )
    alone = alone_in(work, f"Another regrow is writing {out}; wait for it or name another folder.")
    with alone, contextlib.closing(teacher):
        require_new_folder(out)  # another process may have finished it meanwhile
        written, written_counts = _self_written(teacher, work, num_self_prompts, benchmarks, seed)
        asked = own + written
        random.Random(f"order {seed}").shuffle(
            asked
        )  # so that what an interrupted job holds is a fair sample
        rows = run_blocks(
            asked,
            work,
            block_size=batch_size * _BATCHES_PER_BLOCK,
            rows_of=lambda block, part: answer_block(
                part,
                teacher.answer,
                block=block,
                seed=seed,
                temperature=temperature,
                top_p=top_p,
                attempts=attempts,
                model_name=model.name,
            ),
        )
        kept, left_out = select_rows(rows, cut_off=cut_off, violations=violations)
        train, held_out = _part(kept, "train"), _part(kept, "held_out")
        if not train:
            raise UserError(
                f"None of the {len(rows)} answers can be used (left out: {left_out}); raise max_new_tokens."
            )
        report = {
            "settings": settings,
            "counts": {
                "prompts": len(asked),
                "prompts_in_benchmarks": num_contaminated,
                "self_prompts": written_counts,
                "left_out": left_out,
                "train": len(train),
                "held_out": len(held_out),
            },
            "train": corpus_health(train),
            "held_out": corpus_statistics(held_out),
            "before_selection": corpus_statistics(rows),
        }
        for problem in report["train"]["problems"]:
            say(f"Look at {out} before training on it: {problem}")
        with publish_folder(out) as folder:
            write_rows(folder / "train.jsonl", train)
            write_rows(folder / "held_out.jsonl", held_out)
            report["files"] = {name: sha256_file(folder / name) for name in ("train.jsonl", "held_out.jsonl")}
            write_json(folder / "report.json", report)
        shutil.rmtree(work)
    return report


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _check(
    num_prompts: int,
    num_held_out: int,
    num_self_prompts: int,
    max_new_tokens: int,
    batch_size: int,
    attempts: int,
) -> None:
    at_least = {
        "num_prompts": (num_prompts, 1),
        "num_held_out": (num_held_out, 0),
        "num_self_prompts": (num_self_prompts, 0),
        "max_new_tokens": (max_new_tokens, 1),
        "batch_size": (batch_size, 1),
        "attempts": (attempts, 1),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            raise UserError(f"{name} is {value}; give at least {least}.")


def _part(rows: Sequence[Row], split: str) -> list[Row]:
    return [row for row in rows if row["meta"]["split"] == split]


def _text(prompt: Prompt) -> str:
    return "\n".join(prompt.turns)


def _decontaminate(prompts: Sequence[Prompt], benchmarks: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    kept, num_ifeval = decontaminate_ifeval(prompts, text_of=_text)
    kept, num_others = decontaminate(kept, [_text(prompt) for prompt in benchmarks], text_of=_text)
    return kept, num_ifeval + num_others


def _self_written(
    teacher: Teacher, work: Path, count: int, benchmarks: Sequence[Prompt], seed: int
) -> tuple[list[Prompt], dict[str, int]]:
    """User turns by the model itself, written once per job and split like any prompts from elsewhere."""
    if not count:
        return [], {}
    path = work / "self_prompts.json"
    if not path.is_file():
        prompts, counts = self_prompts(teacher.write_user_turns(count, seed=seed))
        prompts, counts["in_benchmarks"] = _decontaminate(prompts, benchmarks)
        write_json(path, {"turns": [prompt.turns for prompt in prompts], "counts": counts})
    found = read_json(path)
    prompts = [make_prompt(tuple(turns), split="train", kind="self") for turns in found["turns"]]
    return hold_out(prompts, round(len(prompts) * _HELD_OUT_SHARE), seed=seed), found["counts"]
