"""The table of benchmarks, and measuring several models with them so that a killed run goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.data.blend import CorpusSpec
from regrow.errors import UserError
from regrow.evaluation.fidelity import evaluate_fidelity, fidelity_settings
from regrow.evaluation.ifeval import evaluate_ifeval, ifeval_settings, score_responses
from regrow.evaluation.latency import latency_settings, measure_latency, model_size
from regrow.evaluation.perplexity import evaluate_perplexity, perplexity_settings
from regrow.evaluation.records import find_anywhere, find_result, write_result
from regrow.progress import say
from regrow.types import EvalResult


@dataclass(frozen=True)
class Benchmark:
    """One row of the table.

    Attributes:
        measure: the function; takes the options below and `model` (`student` where `needs_teacher`), or
            `models` where `joint`, and then returns one result per model.
        settings: takes the same arguments and says, without running a model, what the result depends on.
        options: names of the options that it takes out of those that a run gives.
        needs_teacher: it compares with the teacher, so the teacher itself has no such figures.
        joint: models must be measured side by side.
        resumes: `measure` takes `answers`, a file that survives a killed run.
    """

    measure: Callable[..., Any]
    settings: Callable[..., dict[str, Any]]
    options: tuple[str, ...]
    needs_teacher: bool = False
    joint: bool = False
    resumes: bool = False


_COMMON = ("seed", "device", "dtype", "trust_remote_code")

BENCHMARKS: dict[str, Benchmark] = {
    "fidelity": Benchmark(
        evaluate_fidelity,
        fidelity_settings,
        (
            *_COMMON,
            "teacher",
            "held_out",
            "corpora",
            "sequence_length",
            "enable_thinking",
            "batch_size",
            "num_rows",
            "tokens",
        ),
        needs_teacher=True,
    ),
    "ifeval": Benchmark(
        evaluate_ifeval,
        ifeval_settings,
        (
            *_COMMON,
            "prompts",
            "max_new_tokens",
            "batch_size",
            "limit",
            "enable_thinking",
            "temperature",
            "top_p",
            "repeats",
            "engine",
        ),
        resumes=True,
    ),
    "latency": Benchmark(
        measure_latency,
        latency_settings,
        (*_COMMON, "prompt_tokens", "new_tokens", "repeats", "batch_size"),
        joint=True,
    ),
    "perplexity": Benchmark(
        evaluate_perplexity,
        perplexity_settings,
        (*_COMMON, "data", "split", "window", "stride", "limit", "batch_size"),
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """A row of `BENCHMARKS`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r} is unknown; use one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def evaluate_models(
    *,
    models: Mapping[str, Path],
    teacher: Path,
    benchmarks: Sequence[str],
    records: Path,
    held_out: CorpusSpec,
    corpora: Sequence[CorpusSpec] = (),
    sequence_length: int = 1_024,
    enable_thinking: bool | None = None,
    batch_size: int = 8,
    num_rows: int | None = None,
    tokens: str = "all",
    ifeval: Mapping[str, Any] | None = None,
    latency: Mapping[str, Any] | None = None,
    perplexity: Mapping[str, Any] | None = None,
    reuse: Sequence[Path] = (),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure models and keep every result under `records`; what is there with equal settings is not redone.

    Args:
        models: name -> local folder, the teacher among them; the first is the baseline of speed ratios.
        teacher: the parent, for fidelity.
        benchmarks: names in `BENCHMARKS`.
        records: folder for `<model>-<benchmark>.jsonl` and `.json`; IFEval's answers are appended to
            `<model>-ifeval.answers.jsonl` while they are made.
        held_out, corpora, sequence_length, enable_thinking, batch_size, num_rows, tokens: see
            `evaluate_fidelity`; `enable_thinking` holds for IFEval too.
        ifeval, latency, perplexity: options of `evaluate_ifeval`, `measure_latency`, `evaluate_perplexity`.
        reuse: further folders of records, of other runs, in which equal results are looked for.
        seed, device, dtype, trust_remote_code: for all of them.

    Returns:
        model -> `num_parameters`, `weight_bytes`, and benchmark -> figures with their `settings` (None for
        the teacher's fidelity to itself).

    Raises:
        UserError: an unknown benchmark, or what the benchmarks raise.
    """
    rows = {name: find_benchmark(name) for name in benchmarks}
    shared: dict[str, Any] = {
        "teacher": teacher,
        "held_out": held_out,
        "corpora": corpora,
        "sequence_length": sequence_length,
        "enable_thinking": enable_thinking,
        "batch_size": batch_size,
        "num_rows": num_rows,
        "tokens": tokens,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    given = {"ifeval": ifeval or {}, "latency": latency or {}, "perplexity": perplexity or {}}
    measured: dict[str, dict[str, Any]] = {name: dict(model_size(folder)) for name, folder in models.items()}
    for name, row in rows.items():
        # A batch size for fidelity says nothing about one for generation or for timing.
        inherited = {key: value for key, value in shared.items() if row.needs_teacher or key != "batch_size"}
        options = _pick(row, {**inherited, **given.get(name, {})})
        for model, result in _measure(name, row, models, teacher, options, records, reuse).items():
            measured[model][name] = (
                None if result is None else {**result.figures, "settings": result.settings}
            )
    return measured


def evaluate_once(
    *,
    benchmark: str,
    model: Path | None = None,
    teacher: Path | None = None,
    data: str | None = None,
    prompts: str | None = None,
    responses: Path | None = None,
    sequence_length: int = 1_024,
    batch_size: int | None = None,
    limit: int | None = None,
    max_new_tokens: int = 1_280,
    enable_thinking: bool | None = None,
    tokens: str = "all",
    temperature: float | None = None,
    top_p: float | None = None,
    repeats: int | None = None,
    records: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    engine: str = "transformers",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """One benchmark on one model, as the verb `regrow evaluate` does it.

    Arguments are those of the benchmark's function; None leaves it its own default.

    Returns:
        `{benchmark: figures}`; for latency with a teacher also `{"teacher": figures}`.

    Raises:
        UserError: an unknown benchmark, or an argument that is missing or not for it, named.
    """
    row = find_benchmark(benchmark)
    special = {
        "engine": None if engine == "transformers" else engine,
        "temperature": temperature,
        "top-p": top_p,
        "repeats": repeats,
    }
    for option, asked in special.items():
        if asked is None:
            continue
        if option.replace("-", "_") not in row.options:
            raise UserError(f"--{option} is not for --benchmark {benchmark}; leave it out.")
        if responses is not None:
            raise UserError(f"--{option} is of answers to come, and --responses gives them; leave it out.")
    if responses is not None:
        if benchmark != "ifeval":
            raise UserError(f"--responses is for --benchmark ifeval, not {benchmark}; leave it out.")
        scored = score_responses(
            responses=responses, prompts=prompts or "google/IFEval", limit=limit, seed=seed
        )
        if records is not None:
            write_result(records, f"{responses.name.split('.')[0]}-ifeval", scored)
        return {"ifeval": scored.figures}
    needed = {
        "fidelity": {"a model": model, "--teacher": teacher, "--data": data},
        "perplexity": {"a model": model, "--data": data},
    }.get(benchmark, {"a model": model})
    for name, value in needed.items():
        if value is None:
            raise UserError(f"--benchmark {benchmark} needs {name}; name it.")
    assert model is not None
    options: dict[str, Any] = {
        "teacher": teacher,
        "held_out": (data, "train", 1.0, limit),
        "data": data,
        "prompts": prompts or "google/IFEval",
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "enable_thinking": enable_thinking,
        "tokens": tokens,
        "temperature": temperature,
        "top_p": top_p,
        "repeats": repeats,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "engine": engine,
        "trust_remote_code": trust_remote_code,
    }
    given = _pick(row, {name: value for name, value in options.items() if value is not None})
    models = {"model": model}
    if row.joint and teacher is not None:
        models = {"teacher": teacher, "model": model}
    results = _measure(benchmark, row, models, teacher, given, records, ())
    figures = {name: result.figures for name, result in results.items() if result is not None}
    if not figures:
        raise UserError(f"{model} is the teacher itself; name a student to compare with it.")
    found = {benchmark: figures["model"]}
    return {**found, "teacher": figures["teacher"]} if "teacher" in figures else found


def _measure(
    name: str,
    row: Benchmark,
    models: Mapping[str, Path],
    teacher: Path | None,
    options: dict[str, Any],
    records: Path | None,
    reuse: Sequence[Path],
) -> dict[str, EvalResult | None]:
    if row.joint:
        settings = row.settings(models=models, **options)
        found = {model: _finished(records, f"{model}-{name}", settings, ()) for model in models}
        if any(result is None for result in found.values()):
            found = dict(row.measure(models=models, **options))
            _keep(records, name, found)
        return found
    results: dict[str, EvalResult | None] = {}
    for model, folder in models.items():
        if row.needs_teacher and teacher is not None and folder.resolve() == teacher.resolve():
            results[model] = None
            continue
        arguments = {"student" if row.needs_teacher else "model": folder, **options}
        title = f"{model}-{name}"
        result = _finished(records, title, row.settings(**arguments), reuse)
        if result is None:
            say(f"{name} of {model} ...")
            if row.resumes and records is not None:
                arguments["answers"] = records / f"{title}.answers.jsonl"
            result = row.measure(**arguments)
        _keep(records, name, {model: result})
        results[model] = result
    return results


def _finished(
    records: Path | None, title: str, settings: dict[str, Any], reuse: Sequence[Path]
) -> EvalResult | None:
    result = find_result(records, title, settings) if records is not None else None
    if result is not None:
        say(f"{title}: measured already with the same settings.")
        return result
    benchmark = title.rpartition("-")[2]
    for folder in reuse:
        if (result := find_anywhere(folder, benchmark, settings)) is not None:
            say(f"{title}: taken from {folder}, measured with the same settings.")
            return result
    return None


def _keep(records: Path | None, benchmark: str, results: Mapping[str, EvalResult | None]) -> None:
    if records is None:
        return
    for model, result in results.items():
        if result is not None:
            write_result(records, f"{model}-{benchmark}", result)
            (records / f"{model}-{benchmark}.answers.jsonl").unlink(missing_ok=True)


def _pick(row: Benchmark, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in row.options if name in options}
