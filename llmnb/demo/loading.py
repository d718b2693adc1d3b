"""The demo's documents into a database, and the questions that are kept for the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..query import Collection
from .library import HELD_OUT, documents

if TYPE_CHECKING:
    from ..db import Datalayer

__all__ = ["load_documents", "questions"]

_AT_ONCE = 1000  # documents per insert


def load_documents(db: Datalayer, collection: str = "stdlib", limit: int | None = None) -> dict[str, int]:
    """Inserts the documents that are not there yet; doing it twice changes nothing.

    Args:
        db: from ``connect()``.
        collection: where to.
        limit: only so many of them, a fair sample; None for all.

    Returns:
        ``{"inserted", "present", "train", "valid"}``: inserted now, there before, and both folds of the whole
        collection.
    """
    wanted = documents()[:limit]
    place = Collection(collection)
    there = {found["_id"] for found in db.execute(place.find({}, {"_id": 1}))}
    fresh = [document for document in wanted if document["_id"] not in there]
    for begin in range(0, len(fresh), _AT_ONCE):
        db.execute(place.insert_many(fresh[begin : begin + _AT_ONCE]))
    valid = db.execute(place.count_documents({"_fold": "valid"}))
    return {
        "inserted": len(fresh),
        "present": len(wanted) - len(fresh),
        "train": db.execute(place.count_documents({})) - valid,
        "valid": valid,
    }


def questions() -> list[dict[str, Any]]:
    """Three questions that are never trained on, one of each form, as documents with the library's own answer."""
    found = {document["_id"]: document for document in documents()}
    forms = ("what", "where", "takes")
    return [found[f"{form}/{name}"] for form, name in zip(forms, HELD_OUT, strict=True)]
