"""What an inspection found, as values. JSON both ways; no document is in them except the rows that are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["Finding", "Rows", "ShownRow"]


@dataclass(frozen=True)
class Finding:
    """One sort of fault, with the documents that have it.

    Attributes:
        kind: a short name: "duplicate", "shortened", "missing", ….
        rows: the set of rows it was found in: "train", "valid", or a validation set's own name.
        number: how many documents.
        ids: their _ids as text, in the order of reading; of very many only the first.
        says: what was found, in a sentence.
        todo: what to do about it.
        stops: a training would refuse to start.
    """

    kind: str
    rows: str
    number: int
    ids: tuple[str, ...]
    says: str
    todo: str = ""
    stops: bool = False


@dataclass(frozen=True)
class Rows:
    """One set of rows, counted.

    Attributes:
        name: "train", "valid", or a validation set's own name.
        found: documents that were read.
        used: rows.
        dropped: documents without a row.
        cut: rows whose end was cut off.
        tokens: in all rows, after cutting.
        trained_tokens: of these, those that carry loss.
        lengths: shortest, median, 95 % and longest row, in tokens before cutting; empty without rows.
        histogram: rows by length, one number for each bin of ``Inspection.edges``.
    """

    name: str
    found: int
    used: int
    dropped: int
    cut: int
    tokens: int
    trained_tokens: int
    lengths: tuple[int, ...] = ()
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class ShownRow:
    """One row as the model sees it.

    Attributes:
        id: the document's _id, as text.
        rows: its set.
        tokens: each as (text, carries loss, is a special token).
        length: tokens of the row.
        trained: how many of them carry loss.
        before, after: tokens that stand before and after those that are shown.
    """

    id: str
    rows: str
    tokens: tuple[tuple[str, bool, bool], ...]
    length: int
    trained: int
    before: int = 0
    after: int = 0


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as plain data."""
    return asdict(value)


def made(cls: Any, data: Mapping[str, Any]) -> Any:
    """The dataclass of plain data: lists become tuples, and names that are not known are left out."""
    known = {f.name for f in fields(cls)}
    return cls(**{name: _tuples(value) for name, value in data.items() if name in known})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Facts:
    """What ``Inspection`` is made of.

    Attributes:
        collection: what was read.
        model: whose tokenizer read it.
        key: the fields that were read.
        kind: text, pair or messages.
        limit: tokens that a row may have.
        rows: each set, counted; what trains comes first.
        edges: bounds of the histograms' bins, in tokens, one more than there are bins.
        findings: those that stop a training come first.
        notes: sentences about what was chosen or converted.
        shown: rows as the model sees them.
        id_kind: of what kind the _ids are: "ObjectId", "str", "int", or "" when they are of several.
        seconds: how long the reading and tokenising took.
    """

    collection: str
    model: str
    key: Any
    kind: str
    limit: int
    rows: tuple[Rows, ...]
    edges: tuple[int, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    shown: tuple[ShownRow, ...] = ()
    id_kind: str = ""
    seconds: float = field(default=0.0, compare=False)
