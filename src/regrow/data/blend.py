"""Several corpora, encoded and mixed by weight, the same for the same seed."""

import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regrow.data.corpora import Corpus, Example, open_corpus
from regrow.data.health import corpus_problems
from regrow.data.templates import Encoded, require_chat_template, tokenize_example, turn_end_ids
from regrow.errors import UserError
from regrow.progress import Progress, say
from regrow.types import Tokens

CorpusSpec = tuple[str, str, float, int | None]
_SILENT_ROWS = 2_000


@dataclass(frozen=True)
class Part:
    """One corpus of a blend.

    Attributes:
        source: source, split, weight and content hash.
        numbers: its rows' numbers in the blend.
        share: how many of them one pass takes.
    """

    source: dict[str, Any]
    numbers: list[int]
    share: int


@dataclass(frozen=True)
class EncodedCorpus:
    """A blend of corpora as tokens, read in passes.

    A pass is the largest blend with the corpora's weights that repeats no row: the scarcest corpus gives all
    its rows, the others their share. The next pass goes on in those where the one before ended.

    Attributes:
        rows: every usable row once; first those of the first pass, in seeded order.
        parts: one entry per corpus.
        hash: SHA-256 of the rows' tokens and masks, in order, and of the shares where a pass is not all.
        notes: sentences about rows left out or cut off, and answers that nobody should learn from.
    """

    rows: list[Encoded]
    parts: list[Part]
    hash: str
    notes: list[str]

    def one_pass(self, number: int) -> list[int]:
        """Numbers of the rows of a pass (0 is the first), ascending; no row is in it twice."""
        return sorted(
            part.numbers[(number * part.share + index) % len(part.numbers)]
            for part in self.parts
            for index in range(part.share)
        )

    @property
    def first_pass(self) -> list[Encoded]:
        """The rows of the first pass, in order: all that a reader of one pass sees."""
        return self.rows[: sum(part.share for part in self.parts)]

    def sources(self, read: Iterable[int]) -> list[dict[str, Any]]:
        """What a report says of each corpus, of the rows that were read (numbers, as often as they were).

        `num_rows` and `num_tokens` count a row once; `passes` is how often one was read in the mean.
        """
        times = Counter(read)
        found = []
        for part in self.parts:
            used = [number for number in part.numbers if number in times]
            found.append(
                {
                    **part.source,
                    "num_rows": len(used),
                    "num_tokens": sum(len(self.rows[number].input_ids) for number in used),
                    "passes": round(sum(times[number] for number in used) / max(len(used), 1), 2),
                }
            )
        return found


def encode_corpora(
    tokenizer: Any,
    corpora: Sequence[CorpusSpec],
    *,
    max_length: int,
    enable_thinking: bool | None = None,
    seed: int = 0,
    tokens: Tokens = "all",
    keep: Callable[[Example], bool] | None = None,
) -> EncodedCorpus:
    """Read, encode and blend corpora.

    Args:
        corpora: (source, split, weight, limit) each. Weights are shares of the tokens of a pass.
        max_length: conversations are cut off there; longer plain texts become several rows.
        enable_thinking: passed to the chat template when given.
        seed: order of the rows, and which of them are used.
        tokens: which tokens will count; a row that has none of them is not usable.
        keep: use only rows for which this holds. A corpus that is left without rows is left out.

    Raises:
        UserError: a corpus cannot be read or has no usable rows, none of any is left, or conversations meet
            no chat template.
    """
    read: list[list[Encoded]] = []
    sources: list[dict[str, Any]] = []
    notes: list[str] = []
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
        if tokens == "response":
            answered = [row for row in rows if any(row.response_mask[1:])]
            if without := len(rows) - len(answered):
                notes.append(
                    f"{source}: {without} of {len(rows)} rows left out: no token of an answer within "
                    "sequence_length."
                )
                if not answered:
                    say(notes[-1])
            rows = answered
        if not rows:
            continue
        random.Random(f"{seed}-{position}").shuffle(rows)
        read.append(rows)
        sources.append({"source": source, "split": split, "weight": weight, "hash": corpus.hash})
    if not read and keep is not None:
        raise UserError(f"None of the corpora's rows is to be used ({' '.join(notes)}); use other corpora.")
    if not read:
        raise UserError(
            f"No row of {', '.join(str(source) for source, *_ in corpora)} has a token of an answer within "
            f"{max_length} tokens; raise sequence_length or, where there is such a key, use tokens: all."
        )
    shares = _shares(read, [entry["weight"] for entry in sources])
    for entry, rows, share in zip(sources, read, shares, strict=True):
        if share < len(rows):
            notes.append(
                f"{entry['source']}: one pass takes {share} of {len(rows)} rows, as its weight asks."
            )
    return _blend(read, sources, shares, seed, notes)


def _blend(
    read: list[list[Encoded]], sources: list[dict[str, Any]], shares: list[int], seed: int, notes: list[str]
) -> EncodedCorpus:
    places = [[(which, index) for index in range(len(rows))] for which, rows in enumerate(read)]
    first = [place for some, share in zip(places, shares, strict=True) for place in some[:share]]
    random.Random(f"{seed}-blend").shuffle(first)
    order = first + [place for some, share in zip(places, shares, strict=True) for place in some[share:]]
    numbers = {place: number for number, place in enumerate(order)}
    parts = [
        Part(entry, [numbers[place] for place in some], share)
        for entry, some, share in zip(sources, places, shares, strict=True)
    ]
    rows = [read[which][index] for which, index in order]
    return EncodedCorpus(rows, parts, _hash(rows, shares if len(first) < len(order) else []), notes)


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


def _hash(rows: list[Encoded], shares: list[int]) -> str:
    digest = hashlib.sha256(json.dumps(shares).encode() if shares else b"")
    for row in rows:
        digest.update(json.dumps(len(row.input_ids)).encode())
        digest.update(array("q", row.input_ids).tobytes() + bytes(row.response_mask))
    return digest.hexdigest()


def _shares(read: list[list[Encoded]], weights: list[float]) -> list[int]:
    """How many of each corpus' first rows make token counts in proportion to the weights."""
    tokens = [sum(len(row.input_ids) for row in rows) for rows in read]
    unit = min(count / weight for count, weight in zip(tokens, weights, strict=True))
    shares = []
    for rows, count, weight in zip(read, tokens, weights, strict=True):
        left = min(unit * weight, count)
        share = 0
        while share < len(rows) and left > 1e-6:
            left -= len(rows[share].input_ids)
            share += 1
        shares.append(share)
    return shares
