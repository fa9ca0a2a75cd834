"""Several corpora, encoded and mixed by weight, the same for the same seed."""

import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regrow.data.corpora import Corpus, Example, open_corpus
from regrow.data.health import corpus_problems
from regrow.data.templates import Encoded, require_chat_template, tokenize_example, turn_end_ids
from regrow.errors import UserError
from regrow.progress import Progress, say

CorpusSpec = tuple[str, str, float, int | None]
_SILENT_ROWS = 2_000


@dataclass(frozen=True)
class EncodedCorpus:
    """A blend of corpora as tokens.

    Attributes:
        rows: encoded rows, in the blend's (seeded) order.
        sources: per corpus: source, split, weight, content hash, rows read and used, tokens used.
        hash: SHA-256 of the rows' tokens and masks, in order.
        notes: sentences about rows left out or cut off, and answers that nobody should learn from.
    """

    rows: list[Encoded]
    sources: list[dict[str, Any]]
    hash: str
    notes: list[str]


def encode_corpora(
    tokenizer: Any,
    corpora: Sequence[CorpusSpec],
    *,
    max_length: int,
    enable_thinking: bool | None = None,
    seed: int = 0,
    keep: Callable[[Example], bool] | None = None,
) -> EncodedCorpus:
    """Read, encode and blend corpora.

    Args:
        corpora: (source, split, weight, limit) each. Weights are shares of the blend's tokens; the blend is
            the largest one with these shares that repeats no row.
        max_length: conversations are cut off there; longer plain texts become several rows.
        enable_thinking: passed to the chat template when given.
        seed: order of the rows, and which of them are used.
        keep: use only rows for which this holds; a corpus without any is left out of the blend.

    Raises:
        UserError: a corpus cannot be read or has no usable rows, none is to be kept, or conversations meet no
            chat template.
    """
    read: list[list[Encoded]] = []
    sources: list[dict[str, Any]] = []
    notes: list[str] = []
    weights: list[float] = []
    for position, (source, split, weight, limit) in enumerate(corpora):
        corpus = open_corpus(source, split=split, limit=limit)
        notes += corpus.notes
        if keep is not None:
            kept = [example for example in corpus.examples if keep(example)]
            notes.append(f"{source}: {len(kept)} of {len(corpus.examples)} rows are to be used.")
            if not kept:
                continue
            corpus = replace(corpus, examples=kept)
        for problem in corpus_problems(corpus):
            say(problem)
            notes.append(problem)
        rows, row_notes = _encode(tokenizer, corpus, max_length, enable_thinking)
        notes += row_notes
        random.Random(f"{seed}-{position}").shuffle(rows)
        read.append(rows)
        weights.append(weight)
        sources.append(
            {"source": source, "split": split, "weight": weight, "hash": corpus.hash, "rows_read": len(rows)}
        )
    if not read:
        raise UserError(f"None of the corpora's rows is to be used ({' '.join(notes)}); use other corpora.")
    blend: list[Encoded] = []
    for rows, entry in zip(_shares(read, weights), sources, strict=True):
        entry["num_rows"] = len(rows)
        entry["num_tokens"] = sum(len(row.input_ids) for row in rows)
        if len(rows) < entry["rows_read"]:
            notes.append(
                f"{entry['source']}: {len(rows)} of {entry['rows_read']} rows used, as its weight asks."
            )
        blend += rows
    random.Random(f"{seed}-blend").shuffle(blend)
    return EncodedCorpus(blend, sources, _hash(blend), notes)


def _encode(
    tokenizer: Any, corpus: Corpus, max_length: int, enable_thinking: bool | None
) -> tuple[list[Encoded], list[str]]:
    if any(example.text is None for example in corpus.examples):
        require_chat_template(tokenizer)
    end_ids = set(turn_end_ids(tokenizer))
    rows: list[Encoded] = []
    refused: Counter[str] = Counter()
    short = 0
    with _progress(f"encode {corpus.source}", len(corpus.examples)) as bar:
        for example in corpus.examples:
            bar.advance(1)
            try:
                ids, mask = tokenize_example(tokenizer, example, enable_thinking, end_ids)
            except UserError as error:
                refused[str(error)] += 1
                continue
            cut = len(ids) > max_length and example.text is None
            pieces = range(0, 1 if cut else len(ids), max_length)
            for begin in pieces:
                piece = Encoded(ids[begin : begin + max_length], mask[begin : begin + max_length], cut)
                if len(piece.input_ids) > 1:
                    rows.append(piece)
                else:
                    short += begin == 0
    notes = [f"{corpus.source}: {count} rows left out: {reason}" for reason, count in refused.items()]
    if short:
        notes.append(f"{corpus.source}: {short} rows left out (fewer than two tokens).")
    if cuts := sum(row.truncated for row in rows):
        notes.append(f"{corpus.source}: {cuts} of {len(rows)} rows cut off at {max_length} tokens.")
    if not rows:
        raise UserError(
            f"The corpus {corpus.source} has no usable rows ({notes[-1].removeprefix(corpus.source + ': ')})"
        )
    return rows, notes


class _Silent:
    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, units: float) -> None:
        pass


def _progress(what: str, total: int) -> Progress | _Silent:
    return Progress(what, total, "rows") if total > _SILENT_ROWS else _Silent()


def _hash(rows: list[Encoded]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(len(row.input_ids)).encode())
        digest.update(array("q", row.input_ids).tobytes() + bytes(row.response_mask))
    return digest.hexdigest()


def _shares(read: list[list[Encoded]], weights: list[float]) -> list[list[Encoded]]:
    """The first rows of each corpus such that token counts are in proportion to the weights."""
    if len(read) == 1:
        return read
    tokens = [sum(len(row.input_ids) for row in rows) for rows in read]
    unit = min(count / weight for count, weight in zip(tokens, weights, strict=True))
    chosen: list[list[Encoded]] = []
    for rows, weight in zip(read, weights, strict=True):
        kept: list[Encoded] = []
        total = 0
        for row in rows:
            if total >= unit * weight:
                break
            kept.append(row)
            total += len(row.input_ids)
        chosen.append(kept)
    return chosen
