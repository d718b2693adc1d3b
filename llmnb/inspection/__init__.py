"""``Inspection``: what a training would see of the documents. A value that shows itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DataError, NotFound
from .page import page, row_html
from .report import Facts, Finding, Rows, ShownRow, made, plain
from .words import in_words, row_in_words

__all__ = ["Finding", "Inspection", "Rows", "ShownRow"]


class Inspection:
    """What a training would see of the documents. Made by ``llmnb.inspect`` and ``db.inspect``.

    In a notebook it is a page with the lengths as a plot and rows as coloured tokens; ``print`` gives words.

    Args:
        facts: what was found.
        look: makes rows of some _ids; None when they cannot be asked for any more.

    Attributes:
        rows: the sets of rows, counted: ``train`` first.
        findings: faults, those that stop a training first.
        shown: a few rows as the model sees them.
    """

    def __init__(self, facts: Facts, look: Callable[[list[str]], tuple[ShownRow, ...]] | None = None) -> None:
        self.facts = facts
        self._look = look

    @property
    def rows(self) -> tuple[Rows, ...]:
        """The sets of rows, counted."""
        return self.facts.rows

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Faults, those that stop a training first."""
        return self.facts.findings

    @property
    def shown(self) -> tuple[ShownRow, ...]:
        """A few rows as the model sees them."""
        return self.facts.shown

    @property
    def ok(self) -> bool:
        """False when a training would refuse to start."""
        return not any(finding.stops for finding in self.facts.findings)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The sorts of fault that were found."""
        return tuple(dict.fromkeys(finding.kind for finding in self.facts.findings))

    def ids(self, kind: str) -> list[str]:
        """The _ids of the documents with one sort of fault, as text.

        Raises:
            NotFound: nothing of that sort was found; with near names.
        """
        if kind not in self.kinds:
            raise NotFound("finding", kind, self.kinds)
        found = (finding.ids for finding in self.facts.findings if finding.kind == kind)
        return list(dict.fromkeys(identifier for ids in found for identifier in ids))

    def where(self, kind: str) -> dict[str, Any]:
        """A filter for these documents: ``db.execute(Collection("docs").find(found.where("duplicate")))``.

        Raises:
            DataError: the _ids are of several kinds, or of one that text does not tell.
            NotFound: nothing of that sort was found; with near names.
        """
        ids = self.ids(kind)
        if self.facts.id_kind == "str":
            return {"_id": {"$in": list(ids)}}
        if self.facts.id_kind == "ObjectId":
            return {"_id": {"$in": [{"$oid": identifier} for identifier in ids]}}
        if self.facts.id_kind == "int":
            return {"_id": {"$in": [int(identifier) for identifier in ids]}}
        raise DataError("These documents cannot be named in a filter.", seen="their _ids are of several types")

    def row(self, _id: Any) -> ShownRow:
        """One row as the model sees it: any document of the selection.

        Raises:
            NotFound: the selection has no such document, or no row is made of it.
        """
        wanted = str(_id)
        for row in self.facts.shown:
            if row.id == wanted:
                return _Shown(**vars(row))
        found = self._look([wanted]) if self._look is not None else ()
        if not found:
            near = [row.id for row in self.facts.shown]
            raise NotFound("row", wanted, near, None if near else "see ids() for documents without a row")
        return _Shown(**vars(found[0]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return plain(self.facts)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], look: Callable[[list[str]], tuple[ShownRow, ...]] | None = None
    ) -> Inspection:
        """What ``to_dict`` wrote."""
        parts = {"rows": Rows, "findings": Finding, "shown": ShownRow}
        nested = {name: tuple(made(kind, item) for item in data.get(name, ())) for name, kind in parts.items()}
        return cls(made(Facts, {**data, **nested}), look)

    def __repr__(self) -> str:
        return in_words(self.facts)

    def _repr_html_(self) -> str:
        return page(self.facts)


class _Shown(ShownRow):
    """A row that shows itself."""

    def __repr__(self) -> str:
        return "\n".join(row_in_words(self))

    def _repr_html_(self) -> str:
        return row_html(self)
