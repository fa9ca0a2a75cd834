"""Keeps benchmarks out of the prompts, and copies out of the corpus.

Two texts overlap when they share a run of eight words (case and punctuation aside), the measure of GPT-3's
and many later reports (Brown et al., arXiv 2005.14165, appendix C, with its n between 8 and 13). A text of
fewer than eight words counts as one run of its own.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import numpy as np

from regrow.synthesis.prompts import normalise

T = TypeVar("T")
NGRAM_WORDS = 8
_SHINGLE_WORDS = 3
_IFEVAL_ASSET = ("assets", "ifeval_8grams.u32")


def ngrams(text: str, n: int = NGRAM_WORDS) -> set[str]:
    """Runs of `n` words of a text; the whole text where it is shorter; nothing where it has no words."""
    words = normalise(text).split()
    if not words:
        return set()
    return {" ".join(words[start : start + n]) for start in range(max(1, len(words) - n + 1))}


def decontaminate(
    prompts: Sequence[T],
    against: Iterable[str],
    *,
    n: int = NGRAM_WORDS,
    text_of: Callable[[T], str] = str,
) -> tuple[list[T], int]:
    """Leave out prompts that share a run of `n` words with any text of a benchmark.

    Returns:
        the prompts that stay, in order, and how many were removed.
    """
    forbidden: set[str] = set()
    for text in against:
        forbidden |= ngrams(text, n)
    kept = [prompt for prompt in prompts if forbidden.isdisjoint(ngrams(text_of(prompt), n))]
    return kept, len(prompts) - len(kept)


def decontaminate_ifeval(prompts: Sequence[T], *, text_of: Callable[[T], str] = str) -> tuple[list[T], int]:
    """`decontaminate` against IFEval's 541 prompts, whose 8-grams ship with regrow as 32-bit hashes.

    The prompts themselves are not needed. A hash of an unrelated 8-gram collides with probability 4e-6.
    """
    forbidden = _ifeval_hashes()
    kept = [
        prompt
        for prompt in prompts
        if forbidden.isdisjoint(_hash(gram) for gram in ngrams(text_of(prompt), NGRAM_WORDS))
    ]
    return kept, len(prompts) - len(kept)


def write_ngram_hashes(texts: Iterable[str], path: Path) -> int:
    """Write the sorted 32-bit hashes of the texts' 8-grams, little endian; returns how many."""
    hashes = sorted({_hash(gram) for text in texts for gram in ngrams(text)})
    path.write_bytes(np.array(hashes, dtype="<u4").tobytes())
    return len(hashes)


def near_duplicates(
    texts: Sequence[str], against: Sequence[str], *, threshold: float = 0.7
) -> list[tuple[int, int]]:
    """Pairs (index in `texts`, index in `against`) that are equal but for a few words.

    Similarity is the Jaccard index of the sets of three-word runs (Broder, 1997); equal normalised texts
    have 1. At most one pair, the first found, per entry of `texts`.
    """
    index: dict[str, list[int]] = defaultdict(list)
    sizes = []
    for position, text in enumerate(against):
        shingles = ngrams(text, _SHINGLE_WORDS)
        sizes.append(len(shingles))
        for shingle in shingles:
            index[shingle].append(position)
    pairs = []
    for position, text in enumerate(texts):
        shingles = ngrams(text, _SHINGLE_WORDS)
        shared = Counter(other for shingle in shingles for other in index.get(shingle, ()))
        for other, count in shared.items():
            if count >= threshold * (len(shingles) + sizes[other] - count):
                pairs.append((position, other))
                break
    return pairs


def drop_repeats(items: Sequence[T], key_of: Callable[[T], str | None]) -> tuple[list[T], int]:
    """Keep the first item of each key (None is never a repeat); also how many were removed."""
    seen: set[str] = set()
    kept = []
    for item in items:
        key = key_of(item)
        if key is None or key not in seen:
            kept.append(item)
        if key is not None:
            seen.add(key)
    return kept, len(items) - len(kept)


@lru_cache(maxsize=1)
def _ifeval_hashes() -> frozenset[int]:
    raw = files("regrow").joinpath(*_IFEVAL_ASSET).read_bytes()
    return frozenset(np.frombuffer(raw, dtype="<u4").tolist())


def _hash(gram: str) -> int:
    return int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest(), "little")
