"""The tables of card and page: data, settings, times, layers, parts, machine, versions, as recorded."""

from collections.abc import Iterable
from typing import Any

from regrow.reporting.facts import Facts, by_type, entries, ifeval_repeats, number, section
from regrow.reporting.steps import STEP_OF_STAGE
from regrow.reporting.table import NOT_MEASURED, Table, label_of
from regrow.reporting.text import (
    count,
    duration,
    figure,
    one_line,
    percent,
    public_name,
    share_with_interval,
    size,
)

_SETTINGS = {
    "max_steps": "Optimiser steps",
    "loss": "Loss",
    "beta": "Beta (mixture weight, or DPO's)",
    "temperature": "Temperature",
    "label_weight": "Weight of the text's own tokens",
    "tokens": "Tokens that count",
    "train": "Weights trained",
    "learning_rate": "Learning rate (peak)",
    "weight_decay": "Weight decay",
    "warmup_fraction": "Warm-up share",
    "max_grad_norm": "Gradient clipping (norm)",
    "batch_tokens": "Tokens per batch",
    "batch_size": "Pairs per batch",
    "gradient_accumulation_steps": "Gradient accumulation",
    "precision": "Precision",
    "optimizer": "Optimiser",
    "on_policy_fraction": "Share of text by the student itself",
    "refresh_steps": "Steps between new texts by the student",
    "rollout_tokens": "Length of a text by the student",
    "select_by": "Checkpoint chosen by",
    "patience": "Patience (evaluations)",
    "num_samples": "Answers by the student per prompt",
    "rank": "LoRA rank",
    "alpha": "LoRA alpha",
    "dropout": "LoRA dropout",
    "targets": "LoRA targets",
    "linear_attention": "LoRA on linear attention",
}
_WITH_BETA = ("jsd", "skewed_kl", "dpo")
_ON_POLICY = ("on_policy_fraction", "refresh_steps", "rollout_tokens")


def title_of(stage: str) -> str:
    """What a stage is called over columns and plots."""
    return STEP_OF_STAGE[stage].title if stage in STEP_OF_STAGE else stage.capitalize()


def widths(facts: Facts) -> tuple[int | None, int | None]:
    """Channels per MLP before and after the cut, where all layers agree."""
    report = facts.reports.get("prune", {})
    before = number(report, "width_before")
    after = number(section(report, "width"), "dense", "expert")
    if after is None:
        after = number(report, "width") or number(section(facts.recipe, "prune"), "width")
    return (int(before) if before else None, int(after) if after else None)


def layer_records(facts: Facts) -> list[dict[str, Any]]:
    """What pruning recorded of each MLP, in order."""
    return entries(facts.reports.get("prune", {}), "layers")


def layer_error(layer: dict[str, Any], when: str) -> float | None:
    """Relative error of an MLP's output on held-out calibration tokens, `before` or `after` the refit."""
    return number(layer, f"error_{when}")


def layer_table(facts: Facts) -> Table:
    """One row per MLP: channels kept, relative output error before and after the refit."""
    layers = layer_records(facts)
    columns: list[tuple[str, list[str]]] = [("MLP", [one_line(_site(layer)) for layer in layers])]
    for when, title in (("before", "Error after the cut"), ("after", "Error after the refit")):
        values = [layer_error(layer, when) for layer in layers]
        columns.append((title, [percent(v, 2) if v is not None else NOT_MEASURED for v in values]))
    rho = [number(layer, "rho") for layer in layers]
    columns.append(("Ridge (rho)", [figure(v, 2) if v is not None else NOT_MEASURED for v in rho]))
    filled = [(title, cells) for title, cells in columns if any(cell != NOT_MEASURED for cell in cells)]
    # Names alone say nothing: without any measured column there is no table.
    rows = tuple(zip(*(cells for _, cells in filled), strict=True)) if len(filled) > 1 else ()
    caption = "Error: squared error of the MLP's output relative to its squared size, on held-out tokens."
    return Table(tuple(title for title, _ in filled), rows, caption if len(filled) > 1 else "")


def layer_summary(facts: Facts) -> str:
    """The per-layer errors in one sentence."""
    pairs = [
        (_site(layer), layer_error(layer, "before"), layer_error(layer, "after"))
        for layer in layer_records(facts)
    ]
    after = [(value, site) for site, _, value in pairs if value is not None]
    before = [(value, site) for site, value, _ in pairs if value is not None]
    shown = after or before
    if not shown:
        return ""
    mean = sum(value for value, _ in shown) / len(shown)
    worst, site = max(shown)
    text = f"Mean relative output error of {len(shown)} MLPs: "
    if after and before:
        text += f"{percent(sum(v for v, _ in before) / len(before), 2)} after the cut, "
        text += f"{percent(mean, 2)} after the refit"
    else:
        text += f"{percent(mean, 2)} after the {'refit' if after else 'cut'}"
    return f"{text}; the largest is {percent(worst, 2)} at {one_line(site)}."


def loss_points(facts: Facts, stage: str) -> list[tuple[float, float]]:
    """(step, training loss) of a training stage."""
    pairs = [
        (number(entry, "step"), number(entry, "loss"))
        for entry in entries(facts.reports.get(stage, {}), "losses")
    ]
    return [(step, loss) for step, loss in pairs if step is not None and loss is not None]


def held_out_points(facts: Facts, stage: str) -> list[dict[str, float]]:
    """Held-out `kl` and `top1` by `step` during a training stage."""
    found = []
    for entry in entries(facts.reports.get(stage, {}), "held_out"):
        values = {"step": number(entry, "step"), "kl": number(entry, "kl")}
        values["top1"] = number(entry, "top1_agreement")
        point = {key: value for key, value in values.items() if value is not None}
        if "step" in point and len(point) > 1:
            found.append(point)
    return found


def final_point(facts: Facts, stage: str) -> dict[str, float] | None:
    """The held-out figures of the weights that a training stage gave back."""
    best = number(facts.reports.get(stage, {}), "chosen_step")
    return next((point for point in held_out_points(facts, stage) if point["step"] == best), None)


def data_table(facts: Facts) -> Table:
    """The corpora: what for, where from, how much of it, which bytes."""
    use = "training" if facts.training else ""
    if "calibrate" in facts.reports:
        use = f"calibration and {use}" if use else "calibration"
    groups = (
        (use, entries(facts.recipe, "corpora")),
        ("held-out measurement", [section(facts.recipe, "held_out")]),
    )
    rows = []
    for purpose, group in groups:
        for corpus in group if purpose else []:
            if not corpus.get("source"):
                continue
            found = _recorded_corpus(facts, corpus)
            num_rows, num_tokens = number(found, "num_rows"), number(found, "num_tokens")
            passes = number(found, "passes") if purpose == use else None
            rows.append(
                (
                    facts.text_name(corpus["source"]),
                    one_line(corpus.get("split") or ""),
                    purpose,
                    f"{number(corpus, 'weight') or 1:g}",
                    count(num_rows) if num_rows is not None else "",
                    count(num_tokens) if num_tokens is not None else "",
                    f"{passes:g}" if passes is not None else "",
                    one_line(found.get("hash") or "")[:12],
                )
            )
    header = ("Corpus", "Split", "Used for", "Weight", "Rows", "Tokens", "Passes", "Hash")
    return _without_empty(Table(header, tuple(rows)))


def settings_table(facts: Facts) -> Table:
    """Settings of the training stages, side by side."""
    stages = facts.training
    sections = [facts.settings(stage) for stage in stages]
    on_policy = any(part.get("on_policy_fraction") or part.get("num_samples") for part in sections)
    rows = []
    for key, label in _SETTINGS.items():
        if key in _ON_POLICY and not on_policy:
            continue
        values = [part.get(key) for part in sections]
        if key == "beta":  # other losses do not read it
            values = [part.get(key) if part.get("loss") in _WITH_BETA else None for part in sections]
        if any(value is not None for value in values):
            rows.append((label, *(_setting(value) for value in values)))
    return Table(("Setting", *(title_of(stage) for stage in stages)), tuple(rows))


def times_table(facts: Facts) -> Table:
    """Wall time per stage and what it worked through."""
    rows = []
    for stage, seconds in facts.seconds.items():
        report = facts.reports.get(stage, {})
        tokens = number(report, "num_tokens")
        rate = number(report, "tokens_per_s")
        steps = number(report, "steps")
        memory = number(report, "peak_memory_bytes")
        rows.append(
            (
                title_of(stage),
                duration(seconds),
                count(steps) if steps is not None else "",
                count(tokens) if tokens is not None else "",
                figure(rate, 3) if rate is not None else "",
                size(memory) if memory is not None else "",
            )
        )
    if len(rows) > 1:
        rows.append(("All", duration(sum(facts.seconds.values())), "", "", "", ""))
    return _without_empty(
        Table(("Stage", "Wall time", "Steps", "Tokens", "Tokens/s", "Peak memory"), tuple(rows))
    )


def types_table(facts: Facts) -> Table:
    """IFEval by type of instruction: teacher and published model, strict, with intervals."""
    models = [m for m in (facts.teacher, facts.student) if m is not None and by_type(m.ifeval)]
    found = [by_type(model.ifeval) for model in models]
    repeats = max((ifeval_repeats(model.ifeval) for model in models), default=1)
    names = sorted({name for shares in found for name in shares})
    rows = []
    for name in names:
        shares = [one.get(name) for one in found]
        num = next((share.num for share in shares if share), None)
        cells = [share_with_interval(share) if share else NOT_MEASURED for share in shares]
        rows.append((one_line(name), count(num / repeats if num else num), *cells))
    header = ("Instruction", "Count", *(label_of(model.name) for model in models))
    certainty = "95 % Wilson intervals" if repeats == 1 else f"means of {repeats} answers to each prompt"
    return Table(header, tuple(rows), f"Strict; {certainty}. Single types are small samples.")


def parts_table(facts: Facts) -> Table:
    """Which parts were cut, which were trained, which are bit-identical to the parent's."""
    preserved = facts.reports.get("prune", {}).get("preserved")
    rows: list[tuple[str, ...]] = []
    if isinstance(preserved, dict):
        for part, entry in preserved.items():
            rows.append((one_line(part), count(entry) if isinstance(entry, int) else one_line(entry)))
    return Table(("Part", "Kept bit-identical by the cut"), tuple(rows))


def hardware_lines(facts: Facts) -> list[tuple[str, str]]:
    """The machine."""
    hardware = section(facts.environment, "hardware")
    found = []
    names: dict[str, int] = {}
    for gpu in entries(hardware, "gpus"):
        memory = number(gpu, "memory_bytes")
        name = one_line(gpu.get("name", "GPU")) + (f" ({size(memory)})" if memory else "")
        names[name] = names.get(name, 0) + 1
    if names:
        found.append(("GPU", ", ".join(f"{num} x {name}" for name, num in names.items())))
    if hardware.get("cpu"):
        cores = number(hardware, "num_cores")
        found.append(("CPU", f"{one_line(hardware['cpu'])}{f', {count(cores)} cores' if cores else ''}"))
    memory = number(hardware, "memory_bytes")
    if memory:
        found.append(("Memory", size(memory)))
    return found


def impact_lines(facts: Facts) -> list[tuple[str, str]]:
    """Hours, and energy and carbon where codecarbon recorded them."""
    found = []
    if facts.seconds:
        found.append(("Hours used", f"{sum(facts.seconds.values()) / 3600:.2f} (wall time of all stages)"))
    energy = _total(facts, "energy_kwh")
    carbon = _total(facts, "co2eq_kg")
    if energy is not None:
        found.append(("Energy", f"{figure(energy, 3)} kWh (estimated by codecarbon)"))
    if carbon is not None:
        found.append(("Carbon emitted", f"{figure(1000 * carbon, 3)} g CO2eq (estimated by codecarbon)"))
    return found


def versions_lines(facts: Facts) -> list[tuple[str, str]]:
    """Versions of the software."""
    return [(one_line(k), one_line(v)) for k, v in section(facts.environment, "versions").items() if v]


def architecture_lines(facts: Facts) -> list[tuple[str, str]]:
    """The published model's shape, from its configuration."""
    config = facts.text_config
    found = []
    names = facts.config.get("architectures")
    if isinstance(names, list) and names:
        found.append(("Class", ", ".join(one_line(name) for name in names)))
    for key, label in (
        ("num_hidden_layers", "Layers"),
        ("hidden_size", "Hidden size"),
        ("intermediate_size", "Intermediate size (channels per MLP)"),
        ("num_attention_heads", "Attention heads"),
        ("num_key_value_heads", "Key/value heads"),
        ("vocab_size", "Vocabulary"),
        ("max_position_embeddings", "Positions"),
    ):
        value = number(config, key)
        if value is not None:
            found.append((label, count(value)))
    return found


def _site(layer: dict[str, Any]) -> str:
    return str(layer.get("name", "?"))


def _setting(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, list):
        return ", ".join(one_line(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else one_line(value)


def _recorded_corpus(facts: Facts, corpus: dict[str, Any]) -> dict[str, Any]:
    """What the stages recorded of a corpus of the recipe; training counts come before calibration's.

    Calibration records local files by name only, which others may share.
    """
    reports = [facts.reports.get(stage, {}) for stage in (*facts.training, "calibrate")]
    recorded = [
        entry
        for report in reports
        for entry in (*entries(report, "corpora"), section(report, "held_out_corpus"))
        if entry.get("split", corpus.get("split")) == corpus.get("split")
    ]
    for name in (str, public_name):
        for entry in recorded:
            if name(entry.get("source")) == name(corpus["source"]):
                return entry
    return {}


def _total(facts: Facts, key: str) -> float | None:
    found = [
        value
        for report in facts.reports.values()
        if (value := number(section(report, "emissions"), key)) is not None
    ]
    return sum(found) if found else None


def _without_empty(table: Table) -> Table:
    """The table without columns in which every cell is empty."""
    kept = [i for i in range(len(table.header)) if any(row[i] for row in table.rows)]
    return Table(_pick(table.header, kept), tuple(_pick(row, kept) for row in table.rows), table.caption)


def _pick(cells: tuple[str, ...], kept: Iterable[int]) -> tuple[str, ...]:
    return tuple(cells[i] for i in kept)
