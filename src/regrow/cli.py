"""The verbs. Thin: each parses its arguments, calls one function, prints what came back.

Heavy imports are inside the verbs, so that `--help` answers at once.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from regrow.errors import RegrowError, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune a language model's MLPs and regrow its ability.",
)

Model = Annotated[str, typer.Argument(help="Local folder, Hub id, or builtin:<name>.")]
Out = Annotated[Path, typer.Option("--out", help="New folder (or file) for the result.")]
Engine = Annotated[
    Literal["transformers", "vllm"], typer.Option(help="Who generates; vllm must be installed.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto, cpu or cuda.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model ships.")]
CorpusFiles = Annotated[
    list[str],
    typer.Option("--corpus", help="json/jsonl/parquet file, Hub dataset, or builtin:<name>; repeatable."),
]
Length = Annotated[
    int, typer.Option("--sequence-length", min=1, help="Tokens after which a row is truncated.")
]
Student = Annotated[str, typer.Argument(help="Folder of the pruned (or already distilled) model.")]
Teacher = Annotated[str, typer.Option(help="The parent.")]
HeldOut = Annotated[str, typer.Option(help="Text for held-out agreement and KL.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
Thinking = Annotated[
    bool | None,
    typer.Option("--thinking/--no-thinking", help="Chat template's thinking mode, where it has one."),
]


_INTERRUPTED = 130


def main() -> None:
    """Entry point: explained failures become one sentence and an exit code."""
    # The checkers report every answer whose language they cannot tell, with the whole answer.
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    try:
        app(standalone_mode=True)
    except RegrowError as error:
        print(f"regrow: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # what typer makes of Ctrl-C, silently
            print("regrow: interrupted; the same command goes on where it can.", file=sys.stderr)
        raise


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/<name>.")] = None,
    settings: Set = None,
    start: Annotated[str | None, typer.Option("--from", help="Redo from this stage on.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Stop after this stage.")] = None,
    processes: Annotated[
        int, typer.Option(help="Processes, one per GPU, that share the stages that can be shared.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, run nothing.")] = False,
) -> None:
    """Run a recipe from parent checkpoint to model card; a killed run goes on where it was."""
    from regrow.recipe import load_recipe

    loaded = load_recipe(recipe, settings)
    run_dir = out or Path("runs") / loaded.name
    if dry_run:
        from regrow.dry_run import describe_run

        for line in describe_run(loaded, run_dir, start=start, until=until, processes=processes):
            print(line)
        return
    from regrow.runner import run_recipe

    reports = run_recipe(loaded, run_dir, start=start, until=until, processes=processes)
    if "report" in reports:
        from regrow.reporting.table import print_summary

        print_summary(run_dir)


@app.command()
def inspect(
    model: Model,
    width: Annotated[
        int | None, typer.Option(min=1, help="Also say what the model becomes at this width.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Family, layers, widths, parameters and bytes by part; reads headers only."""
    from regrow.modeling.sources import resolve_headers
    from regrow.pruning.inspect import format_inspection, inspect_checkpoint

    result = inspect_checkpoint(resolve_headers(model), width=width)
    _emit(result, as_json, format_inspection)


@app.command()
def calibrate(
    model: Model,
    corpus: CorpusFiles,
    out: Out,
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 65_536,
    sequence_length: Length = 1_024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    correlations: Annotated[
        bool, typer.Option(help="Also gather the channels' correlation matrices.")
    ] = True,
    fisher: Annotated[
        bool, typer.Option(help="Also gather squared gradients (criteria fisher, obs_fisher).")
    ] = False,
    method: Annotated[
        Literal["in_memory", "layerwise", "sequential"],
        typer.Option(
            help="in_memory; layerwise for models larger than memory; sequential prunes on the way."
        ),
    ] = "in_memory",
    width: Annotated[int | None, typer.Option(min=1, help="Of sequential: the width it prunes to.")] = None,
    criterion: Annotated[str, typer.Option(help="Of sequential: how it chooses channels.")] = "obs",
    held_out_fraction: Annotated[
        float, typer.Option(help="Share of rows kept to choose the refit's ridge.")
    ] = 0.125,
    thinking: Thinking = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Run a model over a corpus and write its channels' statistics to one safetensors file."""
    from regrow.modeling.sources import resolve_model
    from regrow.pruning.calibrate import calibrate as calibrate_model

    report = calibrate_model(
        model=resolve_model(model),
        corpora=[(source, "train", 1.0, None) for source in corpus],
        out=out,
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        correlations=correlations,
        fisher=fisher,
        method=method,
        width=width,
        criterion=criterion,
        held_out_fraction=held_out_fraction,
        enable_thinking=thinking,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    _emit(report, False, _lines)


@app.command("merge-statistics")
def merge(
    files: Annotated[list[Path], typer.Argument(help="Statistics files of the same model.")], out: Out
) -> None:
    """Merge statistics files of the same model, as if their corpora had been one."""
    from regrow.pruning.statistics import merge_statistics

    merge_statistics(files, out)


@app.command()
def prune(
    model: Model,
    out: Out,
    width: Annotated[int, typer.Option(min=1, help="Channels to keep per MLP.")],
    criterion: Annotated[str, typer.Option(help="How channels are scored.")] = "magnitude",
    statistics: Annotated[Path | None, typer.Option(help="Statistics file of `regrow calibrate`.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file that says which channels stay.")] = None,
    refit: Annotated[bool, typer.Option(help="Refit down_proj (needs correlations).")] = False,
    step: Annotated[int, typer.Option(min=1, help="The width must be a multiple of this.")] = 128,
    shards: Annotated[int | None, typer.Option(min=1, help="Write exactly this many files.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Or limit their size, e.g. 5GB.")] = None,
    mtp: Annotated[
        Literal["prune", "drop"], typer.Option(help="Multi-token-prediction layer: prune or drop.")
    ] = "prune",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Cut a checkpoint's MLPs to a width, shard by shard, without loading the model."""
    from regrow.modeling.sources import resolve_model
    from regrow.pruning.prune import prune as prune_model

    report = prune_model(
        model=resolve_model(model),
        out=out,
        width=width,
        step=step,
        criterion=criterion,
        statistics=statistics,
        plan=plan,
        refit=refit,
        shards=shards,
        max_shard_size=max_shard_size,
        mtp=mtp,
        seed=seed,
    )
    _emit(report, as_json, _lines)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    against: Annotated[Path | None, typer.Option(help="The parent's folder.")] = None,
    trained: Annotated[bool, typer.Option(help="Values may differ by training; shapes may not.")] = False,
    as_json: Json = False,
) -> None:
    """Check a checkpoint tensor by tensor, also one that another tool made; exit 1 if something is wrong."""
    from regrow.pruning.verify import format_verification, verify_checkpoint

    result = verify_checkpoint(folder, against=against, trained=trained)
    _emit(result, as_json, format_verification)
    if not result["ok"]:
        raise typer.Exit(1)


def _training_verb(stage: str, what: str) -> None:
    """Add a training verb: the same checks and defaults as a recipe's, through a recipe of one stage."""

    @app.command(stage, help=f"{what}; --set takes the keys of a recipe's {stage}.")
    def train(
        student: Student,
        teacher: Teacher,
        corpus: CorpusFiles,
        held_out: HeldOut,
        steps: Steps,
        out: Out,
        settings: Set = None,
    ) -> None:
        from regrow.files import require_new_folder
        from regrow.modeling.sources import resolve_model
        from regrow.stages import train_once

        require_new_folder(out)
        report = train_once(
            stage,
            student=resolve_model(student),
            teacher=resolve_model(teacher),
            corpora=corpus,
            held_out=held_out,
            steps=steps,
            out=out,
            overrides=settings or [],
        )
        _emit(report, False, _lines)


_training_verb("distill", "Distil a pruned model from its parent")
_training_verb("recover", "Train LoRA with the distillation loss and merge it")
_training_verb("finish", "Distil on the student's own answers, judged by its parent")
_training_verb("sft", "Fine-tune LoRA on the corpus' answers and merge it")
_training_verb("dpo", "Tune LoRA on preferences that checkers decide and merge it")


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model; not needed with --responses.")] = None,
    benchmark: Annotated[
        Literal["fidelity", "ifeval", "latency", "perplexity"], typer.Option(help="What to measure.")
    ] = "fidelity",
    teacher: Annotated[str | None, typer.Option(help="The parent (fidelity).")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out text (fidelity, perplexity).")] = None,
    prompts: Annotated[str | None, typer.Option(help="IFEval prompts: file, Hub id or builtin:dev.")] = None,
    responses: Annotated[Path | None, typer.Option(help="Score these responses, without a model.")] = None,
    sequence_length: Length = 1_024,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows at a time.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1_280,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of answers; 0, greedy, if unset.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Of sampled answers: nucleus.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Sampled answers to a prompt (ifeval), timings (latency).")
    ] = None,
    thinking: Thinking = None,
    engine: Engine = "transformers",
    records: Annotated[Path | None, typer.Option(help="Folder for per-item results (resumable).")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Measure a model: agreement with its parent, instruction following, speed."""
    from regrow.evaluation.evaluate import evaluate_once

    result = evaluate_once(
        benchmark=benchmark,
        model=_resolved(model),
        teacher=_resolved(teacher),
        data=data,
        prompts=prompts,
        responses=responses,
        sequence_length=sequence_length,
        batch_size=batch_size,
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repeats=repeats,
        enable_thinking=thinking,
        engine=engine,
        records=records,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        from regrow.files import write_json

        write_json(out, result)
    _emit(result, False, _lines)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="Per-item results of A (file, or a run's records).")],
    run_b: Annotated[Path, typer.Argument(help="Per-item results of B.")],
    margin: Annotated[float, typer.Option(help="Non-inferiority margin, e.g. 0.01 for a point.")] = 0.01,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Paired comparison of two runs: difference, interval, McNemar, flips, verdict."""
    from regrow.evaluation.compare import compare_runs, format_comparison

    _emit(compare_runs(run_a, run_b, margin=margin, seed=seed), as_json, format_comparison)


@app.command()
def synthesize(
    model: Model,
    out: Out,
    num_prompts: Annotated[int, typer.Option(min=1, help="Training prompts.")] = 1_500,
    num_held_out: Annotated[
        int | None, typer.Option(min=0, help="Held-out prompts; default 16 % more.")
    ] = None,
    constraint_share: Annotated[float, typer.Option(help="Share with checkable constraints.")] = 0.25,
    system_share: Annotated[float, typer.Option(help="Share with a system prompt.")] = 0.25,
    multi_turn_share: Annotated[float, typer.Option(help="Share with several turns.")] = 0.15,
    style_share: Annotated[
        float, typer.Option(help="Share of open tasks with a wish about the answer's manner.")
    ] = 0.5,
    prompts: Annotated[str | None, typer.Option(help="Your own prompts: txt, jsonl or Hub id.")] = None,
    num_self_prompts: Annotated[
        int, typer.Option(min=0, help="User turns that the model writes itself.")
    ] = 0,
    keep_out: Annotated[
        list[Path] | None, typer.Option(help="Prompt files of benchmarks to keep out, besides IFEval.")
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Tries at a prompt with constraints.")] = 1,
    violations: Annotated[
        Literal["balance", "keep", "drop"], typer.Option(help="Answers that miss a constraint.")
    ] = "balance",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 for greedy.")] = 0.7,
    thinking: Thinking = None,
    engine: Engine = "transformers",
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Have the teacher write a corpus: its own answers to varied prompts, with a held-out split."""
    from regrow.modeling.sources import resolve_model
    from regrow.synthesis.synthesize import synthesize as synthesize_corpus

    report = synthesize_corpus(
        model=resolve_model(model),
        out=out,
        num_prompts=num_prompts,
        constraint_share=constraint_share,
        num_held_out=num_held_out,
        system_share=system_share,
        multi_turn_share=multi_turn_share,
        style_share=style_share,
        prompts=prompts,
        num_self_prompts=num_self_prompts,
        keep_out=keep_out or (),
        attempts=attempts,
        violations=violations,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        enable_thinking=thinking,
        engine=engine,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    _emit(report, False, _lines)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Write the model card and the page again from a run's results."""
    from regrow.reporting.report import write_report
    from regrow.reporting.table import print_summary

    write_report(run_dir=run_dir)
    print_summary(run_dir)


@app.command()
def publish(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Option(help="Hub repository, e.g. you/model.")],
    private: Annotated[bool, typer.Option(help="Create it private.")] = True,
) -> None:
    """Upload a finished run's model folder to the Hub."""
    from regrow.hub import push_folder

    print(push_folder(run_dir / "model", repo_id=repo, private=private))


def _resolved(source: str | None) -> Path | None:
    if source is None:
        return None
    from regrow.modeling.sources import resolve_model

    return resolve_model(source)


def _emit(result: dict[str, Any], as_json: bool, formatter: Any) -> None:
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        print(formatter(result))


def _lines(result: dict[str, Any], indent: str = "") -> str:
    """A dictionary as readable lines; long lists are left to the JSON forms."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict | list):
            lines.append(f"{indent}{key}: {len(value)} entries")
        elif isinstance(value, list) and value and isinstance(value[0], str):
            lines += [f"{indent}{key}:", *(f"{indent}  - {item}" for item in value)]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(line for line in lines if line)


__all__ = ["UserError", "app", "main"]
