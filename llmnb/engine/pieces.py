"""Documents in pieces: read, and tokenised one piece ahead of where rows are kept and counted.

Pieces come in order, so that what is counted does not depend on what runs beside what. Knows no tokenizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .counts import Counts
from .samples import Reader, Sample

__all__ = ["Piece", "ahead", "pieces_of", "size_of"]

# What is tokenised at once. So few rows that their lists and tuples are gone before Python's collector counts them as
# old: with 1000, each 10 000 chats cost one search of the whole heap (0.23 s beside torch, a fifth of an inspection).
_PIECE_ROWS, _PIECE_CHARS = 125, 1_000_000


class Piece(NamedTuple):
    """Documents in succession, bounded in rows and in characters: their samples, and those that have none."""

    kind: str
    samples: list[tuple[str, Sample]]
    skipped: list[tuple[str, str]]


def pieces_of(documents: Iterable[Mapping[str, Any]], reader: Reader, counts: Counts) -> Iterator[Piece]:
    """Reads documents; counts those that were found, and no others."""
    samples: list[tuple[str, Sample]] = []
    skipped: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        identifier = str(document.get("_id", counts.found))
        counts.found += 1
        sample = reader.read(document)
        if isinstance(sample, str):
            skipped.append((identifier, sample))
        else:
            samples.append((identifier, sample))
            size += size_of(sample)
        if max(len(samples), len(skipped)) >= _PIECE_ROWS or size >= _PIECE_CHARS:
            yield Piece(reader.kind or "text", samples, skipped)
            samples, skipped, size = [], [], 0
    if samples or skipped:
        yield Piece(reader.kind or "text", samples, skipped)


def ahead(
    pieces: Iterable[Piece], encode: Callable[[str, list[tuple[str, Sample]]], Any]
) -> Iterator[tuple[Piece, Any]]:
    """Each piece, tokenised, in order; the next one is tokenised meanwhile.

    The tokenizer works outside of Python's lock and on every core that it may use; one thread asks it, one piece at
    a time, while this one reads documents and keeps rows.
    """
    waiting: deque[tuple[Piece, Any]] = deque()
    with ThreadPoolExecutor(1, "tokenising") as pool:
        for piece in pieces:
            waiting.append((piece, pool.submit(encode, piece.kind, piece.samples) if piece.samples else None))
            if len(waiting) > 1:
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())


def _done(piece: Piece, future: Any) -> tuple[Piece, Any]:
    return piece, None if future is None else future.result()


def size_of(sample: Sample) -> int:
    """Characters of a sample, both answers of a preference included."""
    return _characters(sample.value) + _characters(sample.rejected)


def _characters(value: Any) -> int:
    if isinstance(value, dict):  # a message
        return len(value.get("content") or "")
    return sum(map(_characters, value)) if isinstance(value, (tuple, list)) else len(value or "")
