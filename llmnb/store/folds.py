"""Which documents train and which validate: a stable hash of the document's ``_id``.

The same document always lands in the same fold, whatever order documents arrive in, on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..query import to_extended

__all__ = ["VALID_SHARE", "fold_of", "fold_of_document"]

VALID_SHARE = 0.05


def fold_of(_id: Any, valid_share: float = VALID_SHARE) -> str:
    """The fold of an id: "valid" for about ``valid_share`` of all ids, "train" for the others.

    Ids that MongoDB holds for equal (1 and 1.0) fall into the same fold.
    """
    data = hashlib.sha256(_canonical(_id).encode()).digest()
    return "valid" if int.from_bytes(data[:8], "big") < valid_share * 2**64 else "train"


def fold_of_document(document: Mapping[str, Any], valid_share: float = VALID_SHARE) -> str:
    """The document's own ``_fold``; else by its ``_id``; else (an aggregation's output) by all it holds."""
    if "_fold" in document:
        return str(document["_fold"])
    return fold_of(document["_id"] if "_id" in document else dict(document), valid_share)


def _canonical(value: Any) -> str:
    if type(value).__name__ == "ObjectId":  # nearly all are; a million of them took four seconds of CPU the long way
        return f'{{"$oid": "{value}"}}'
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=True)


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__.startswith(("bson", "uuid")) and type(value).__name__ != "ObjectId":
        return {"$" + type(value).__name__: str(value)}  # UUID, Decimal128, …: their text is stable
    return to_extended(value, "_id")
