"""The pieces that card and page are made of: plain text in a structure, escaped by whoever prints it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from regrow.reporting.table import Table


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str

    def __bool__(self) -> bool:
        return bool(self.text)


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.items)


@dataclass(frozen=True)
class Pairs:
    """Named values."""

    items: Sequence[tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.items)


@dataclass(frozen=True)
class Code:
    """Something to copy; `language` is that of the fence."""

    text: str
    language: str

    def __bool__(self) -> bool:
        return bool(self.text)


@dataclass(frozen=True)
class Details:
    """A long table behind a line that opens it."""

    summary: str
    table: Table

    def __bool__(self) -> bool:
        return bool(self.table)


Block = Paragraph | Bullets | Pairs | Code | Details | Table


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it.

    Attributes:
        level: depth of the heading, 2 for a chapter.
        title: the heading.
        blocks: its content; empty blocks are dropped.
    """

    level: int
    title: str
    blocks: Sequence[Block] = ()


def without_empty(sections: Iterable[Section]) -> list[Section]:
    """The sections that say something: with content of their own or in a deeper section below them."""
    kept: list[Section] = []
    for section in reversed(list(sections)):
        blocks = tuple(block for block in section.blocks if block)
        has_below = bool(kept) and kept[-1].level > section.level
        if blocks or has_below:
            kept.append(Section(section.level, section.title, blocks))
    return kept[::-1]
