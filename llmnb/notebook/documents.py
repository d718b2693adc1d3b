"""What is in a collection, as a table: its columns with their types, and some of its documents."""

from __future__ import annotations

from typing import Any

from ..query import Collection
from .tables import Table, short

__all__ = ["look_into"]


def look_into(store: Any, select: Any, rows: int) -> Table:
    """Columns with their types, an example of each, and how the documents are divided."""
    total = store.estimate(select)
    found = list(store.rows(select, limit=max(rows, 50)))
    columns: dict[str, list[Any]] = {}
    for document in found:
        for name, value in document.items():
            columns.setdefault(name, []).append(value)
    listed = [
        (
            name,
            " or ".join(sorted({type(v).__name__ for v in values})),
            "" if len(values) == len(found) else f"in {len(values)} of {len(found)}",
            *(_example(document.get(name, "")) for document in found[:rows]),
        )
        for name, values in sorted(columns.items(), key=lambda item: item[0].startswith("_"))
    ]
    folds = {fold: store.execute(_counted(select, fold)) for fold in ("train", "valid")}
    said = ", ".join(f"{count} {fold}" for fold, count in folds.items() if count)
    heads = ("column", "type", "", *(f"document {i + 1}" for i in range(min(rows, len(found)))))
    caption = f"{select.collection}: {total} documents" + (f" ({said})" if said else "")
    return Table(heads, listed, caption=caption, empty="No document matches.")


def _example(value: Any) -> str:
    """A value as text; strings and ids without quotes."""
    return short(str(value) if type(value).__name__ == "ObjectId" else value, 160)


def _counted(select: Any, fold: str) -> Any:
    narrowed = {"$and": [dict(select.filter), {"_fold": fold}]} if select.filter else {"_fold": fold}
    return Collection(select.collection).count_documents(narrowed)
