"""`regrow run --dry-run`: check what can be checked without computing, and say what would run."""

from collections.abc import Iterator
from pathlib import Path

from regrow.data.corpora import is_local, read_corpus
from regrow.modeling.sources import resolve_headers
from regrow.needs import is_unwritten, unwritten
from regrow.recipe import Corpus, Recipe
from regrow.runner import (
    check_folder,
    check_names,
    check_processes,
    check_stages,
    check_width,
    enabled_stages,
    plan_run,
)
from regrow.stages import MODEL_STAGES, prepare_corpora


def describe_run(
    recipe: Recipe,
    run_dir: Path,
    *,
    start: str | None = None,
    until: str | None = None,
    processes: int = 1,
) -> Iterator[str]:
    """Lines that say what a run would do.

    The parent may be a folder that holds only a `config.json`. Hub corpora are not fetched; that is said.

    Raises:
        UserError: whatever the run itself would refuse at its start.
    """
    check_names(recipe, start, until)
    check_folder(run_dir, recipe)
    shape = check_width(recipe, resolve_headers(recipe.model, recipe.revision))
    pruned = shape["pruned"]
    yield (
        f"parent: {recipe.model}: {shape['family']}, {shape['num_layers']} layers, "
        f"MLP width {shape['intermediate_size']:,} -> {pruned['intermediate_size']:,}"
    )
    yield (
        f"parameters: {shape['num_parameters']:,} -> {pruned['num_parameters']:,}; "
        f"bytes: {shape['weight_bytes']:,} -> {pruned['weight_bytes']:,}"
    )
    yield from (f"note: {note}" for note in pruned.get("notes", []))
    prepare_corpora(recipe, run_dir, None)
    for section in recipe.synthesize:
        state = "run" if section in unwritten(recipe) else "skip"
        yield f"synthesize {section.out} ({section.num_prompts:,} prompts): {state}"
    for label, corpus in [*(("corpus", corpus) for corpus in recipe.corpora), ("held-out", recipe.held_out)]:
        yield f"{label}: {_describe_corpus(corpus, recipe)}"
    steps = plan_run(recipe, run_dir, start=start, until=until, processes=processes)
    check_processes(steps, recipe, processes)
    check_stages(steps, recipe)
    for step in steps:
        shared = f" in {step.processes} processes" if step.processes > 1 else ""
        yield f"{step.stage.name}: {step.action}{shared}"
    models = sum(stage.name in MODEL_STAGES for stage in enabled_stages(recipe))
    gigabytes = models * pruned["weight_bytes"] / 1e9
    yield f"disk: about {gigabytes:.1f} GB for {models} model(s) under {run_dir}, and training checkpoints"


def _describe_corpus(corpus: Corpus, recipe: Recipe) -> str:
    if is_unwritten(corpus, recipe):
        return f"{corpus.source}: written by the parent first"
    if not is_local(corpus.source):
        return f"{corpus.source} ({corpus.split}): on the Hub, not checked"
    rows = read_corpus(corpus.source, split=corpus.split, limit=corpus.limit)
    return f"{corpus.source}: {len(rows):,} usable rows"
