"""How near a student is to its teacher, token by token: agreement, KL divergence, perplexity.

What is counted: the predictions of tokens that exist, i.e. positions 0 .. L-2 of a row of L real tokens,
each judged against the token that follows. Pad positions never count. `tokens="all"` (the default, and the
headline) counts them all, the template's own and the user's tokens included; `"response"` counts only
predictions of tokens that the assistant writes, its end-of-turn token included. Both are always reported,
because published figures are not clear about which they are, and the template's own tokens are easy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regrow.checkpoint import CheckpointReader
from regrow.data.blend import CorpusSpec, encode_corpora
from regrow.data.templates import Encoded
from regrow.errors import UserError
from regrow.evaluation.token_table import TokenTable, row_records, table_figures, token_table
from regrow.modeling.hidden import head_of
from regrow.modeling.load import load_model, load_tokenizer, pick_device
from regrow.progress import say
from regrow.types import EvalResult, Tokens

_CORPUS_ROWS = 256
# The rows that are measured must not change with a run's seed, or runs could not be compared.
_ROW_SEED = 0


def evaluate_fidelity(
    *,
    student: Path,
    teacher: Path,
    held_out: CorpusSpec,
    corpora: Sequence[CorpusSpec] = (),
    sequence_length: int = 1_024,
    batch_size: int = 8,
    num_rows: int | None = None,
    tokens: Tokens = "all",
    enable_thinking: bool | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> EvalResult:
    """Compare a student with its teacher on held-out text.

    Args:
        student, teacher: local folders; the teacher's tokenizer and chat template are used for both.
        held_out: (source, split, weight, limit) of text that neither stage trained on.
        corpora: the distillation corpus in the same form; if given, the same figures on (at most 256 rows of)
            each are reported under `corpus`, for comparison with published figures.
        sequence_length: rows are cut off there.
        batch_size: rows at a time; changes nothing but speed and memory (and rounding).
        num_rows: use only this many rows of each text.
        tokens: which predictions the headline figures count; see the module's docstring.
        enable_thinking: passed to the chat template when given.
        seed: of the intervals' bootstrap.
        device, dtype: where and in what precision both models run.
        trust_remote_code: run code that a checkpoint brings along.

    Returns:
        figures `top1_agreement`, `top5_agreement`, `kl_mean`, `kl_p95` (nats), `student_perplexity`,
        `teacher_perplexity`, `num_tokens`, `intervals` (95 %, bootstrap, rows resampled whole), the same
        again under the name of the other counting rule (`response` or `all`), and under `corpus`. Records:
        per row, the sums that paired statistics need.

    Raises:
        UserError: a text or a model cannot be used, or the two vocabularies differ.
    """
    settings = fidelity_settings(
        student=student,
        teacher=teacher,
        held_out=held_out,
        corpora=corpora,
        sequence_length=sequence_length,
        num_rows=num_rows,
        tokens=tokens,
        enable_thinking=enable_thinking,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(teacher, trust_remote_code)
    options: dict[str, Any] = {"max_length": sequence_length, "enable_thinking": enable_thinking}
    rows, notes = _encode(tokenizer, [held_out], num_rows, options)
    target = pick_device(device)
    load: dict[str, Any] = {"dtype": dtype, "device": target, "trust_remote_code": trust_remote_code}
    pair = load_model(student, **load), load_model(teacher, **load)
    _same_vocabulary(*pair)
    table = token_table(*pair, rows, batch_size=batch_size, progress="fidelity")
    figures = _both_countings(table, tokens, seed, held_out[0])
    if corpora:
        corpus_rows, corpus_notes = _encode(
            tokenizer, corpora, min(num_rows or _CORPUS_ROWS, _CORPUS_ROWS), options
        )
        notes += corpus_notes
        corpus_table = token_table(*pair, corpus_rows, batch_size=batch_size, progress="fidelity, corpus")
        figures["corpus"] = _both_countings(corpus_table, tokens, seed, corpora[0][0])
    if notes:
        figures["notes"] = notes
        for note in notes:
            say(note)
    return EvalResult("fidelity", figures, row_records(table), settings)


def fidelity_settings(
    *,
    student: Path,
    teacher: Path,
    held_out: CorpusSpec,
    corpora: Sequence[CorpusSpec] = (),
    sequence_length: int = 1_024,
    num_rows: int | None = None,
    tokens: Tokens = "all",
    enable_thinking: bool | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """Everything that the figures depend on; reads and encodes the text, runs no model."""
    if tokens not in ("all", "response"):
        raise UserError(f"tokens {tokens!r} is unknown; use all or response.")
    tokenizer = load_tokenizer(teacher, trust_remote_code)
    options: dict[str, Any] = {"max_length": sequence_length, "enable_thinking": enable_thinking}
    texts = [([held_out], num_rows)]
    if corpora:
        texts.append((list(corpora), min(num_rows or _CORPUS_ROWS, _CORPUS_ROWS)))
    hashes = [
        encode_corpora(tokenizer, _limited(specs, most), seed=_ROW_SEED, **options).hash
        for specs, most in texts
    ]
    return {
        "sources": {"held_out": list(held_out), "corpora": [list(corpus) for corpus in corpora]},
        "comparable": {
            "held_out_sha256": hashes[0],
            "num_rows": num_rows,
            "sequence_length": sequence_length,
            "tokens": tokens,
            "enable_thinking": enable_thinking,
            "teacher": CheckpointReader(teacher).fingerprint(),
        },
        "corpus_sha256": hashes[1] if corpora else None,
        "dtype": dtype,
        "device": pick_device(device).type,
        "model": CheckpointReader(student).fingerprint(),
    }


def _both_countings(table: TokenTable, tokens: Tokens, seed: int, source: str) -> dict[str, Any]:
    other: Tokens = "response" if tokens == "all" else "all"
    figures = table_figures(table, tokens, seed=seed)
    if figures["num_tokens"] == 0:
        raise UserError(f"{source} has no response tokens within the sequence length; use tokens: all.")
    return {**figures, "tokens": tokens, other: table_figures(table, other, seed=seed)}


def _encode(
    tokenizer: Any, specs: Sequence[CorpusSpec], most: int | None, options: dict[str, Any]
) -> tuple[list[Encoded], list[str]]:
    encoded = encode_corpora(tokenizer, _limited(specs, most), seed=_ROW_SEED, **options)
    return encoded.first_pass[:most], list(encoded.notes)


def _limited(specs: Sequence[CorpusSpec], most: int | None) -> list[CorpusSpec]:
    return [
        (source, split, weight, limit if most is None else min(most, limit or most))
        for source, split, weight, limit in specs
    ]


def _same_vocabulary(student: Any, teacher: Any) -> None:
    sizes = [head_of(model).weight_VD.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"The student has {sizes[0]:,} tokens in its vocabulary and the teacher {sizes[1]:,}; "
            "name the parent that the student was made from."
        )
