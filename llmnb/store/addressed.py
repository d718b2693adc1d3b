"""A selection that is known by the ``_id`` of its documents, which are read in any order, some at a time.

An ``_id`` is kept as BSON, so that ids of every type, mixed, stay what they are: 19 bytes for an ``ObjectId``.
Knows no tokens and no training.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions

from ..errors import QueryError
from ..query import Document, Select
from .folds import fold_of_document
from .queries import find_source, kept_fields
from .tables import translated

__all__ = ["Addressed", "addressed"]


class _Keys:
    """BSON documents ``{"": _id}`` end to end; their ends are kept only once two have different lengths."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._width = 0
        self._ends: array[int] | None = None
        self._count = 0

    def append(self, key: bytes) -> None:
        if not self._count:
            self._width = len(key)
        if self._ends is None and len(key) != self._width:
            self._ends = array("q", range(self._width, self._width * (self._count + 1), self._width))
        self._bytes += key
        self._count += 1
        if self._ends is not None:
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self._count:
            raise IndexError(f"document {index} of {self._count}")
        if self._ends is None:
            return bytes(self._bytes[index * self._width : (index + 1) * self._width])
        return bytes(self._bytes[self._ends[index - 1] if index else 0 : self._ends[index]])

    def digest(self) -> str:
        found = hashlib.blake2b(self._bytes, digest_size=16)
        found.update(f"{self._count} of {self._width}".encode() if self._ends is None else self._ends.tobytes())
        return found.hexdigest()


class Addressed:
    """The documents of one fold of a selection, by number.

    What a filter selects is settled when the ids are read: a document that is changed later is read as it is then.
    """

    def __init__(self, collection: Any, select: Select, where: str, fold: str, keys: _Keys) -> None:
        self._collection, self._where, self._fold, self._keys = collection, where, fold, keys
        self._projection, self._drop = kept_fields(select)
        self._options = _codec(collection)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        """The ``_id`` in words."""
        return str(self._id(self._keys[index]))

    def digest(self) -> str:
        """Identifies the ids and their order: 32 hexadecimal digits. What the documents hold is not in it."""
        return self._keys.digest()

    def fetch(self, indices: Sequence[int], fields: Sequence[str] | None = None) -> list[Document | None]:
        """The documents in this order; None for one that is no longer there.

        Args:
            indices: any numbers, in any order.
            fields: the only fields that are wanted, beside ``_id``; a projection of the selection's own goes before.

        Raises:
            QueryError: several documents have the same ``_id`` (a view, or shards that do not agree).
            DatabaseError: the database is away, or refuses.
        """
        keys = [self._keys[index] for index in indices]
        projection = self._projection
        if projection is None and fields is not None:
            projection = {"_id": 1, "_fold": 1, **dict.fromkeys(fields, 1)}
        found: dict[bytes, Document] = {}
        with translated(self._where):
            for read in self._collection.find({"_id": {"$in": [self._id(key) for key in keys]}}, projection):
                key = self._key(read["_id"])
                if key in found:
                    raise _repeated(read["_id"], self._collection.name)
                document = found[key] = Document(read)
                document["_fold"] = self._fold
                if self._drop:
                    del document["_id"]
        return [found.get(key) for key in keys]

    def _id(self, key: bytes) -> Any:
        return bson.decode(key, self._options)[""]

    def _key(self, value: Any) -> bytes:
        return bson.encode({"": value}, codec_options=self._options)


def addressed(
    database: Any, select: Select, where: str, valid_share: float, most: int | None = None
) -> dict[str, Addressed]:
    """The ids of a selection, by fold, in the order in which ``queries.rows`` gives its documents.

    Args:
        most: from this many documents on it is told that there are too few: the answer is {} for ``most`` or fewer.

    Raises:
        QueryError: the documents of this selection have no ``_id`` by which they can be read.
        DatabaseError: the database is away, or refuses.
    """
    if select.one or select.count or select.pipeline is not None:
        raise QueryError("Only the documents of a find can be read by their _id.", seen=select)
    collection = database[select.collection]
    options = _codec(collection)
    folds: dict[str, _Keys] = {}
    seen: set[int] = set()
    last, count = b"", 0
    with translated(where):
        for read in find_source(collection, select, {"_id": 1, "_fold": 1}):
            key = bson.encode({"": read["_id"]}, codec_options=options)
            if key == last or (select.sort_by and hash(key) in seen):
                raise _repeated(read["_id"], select.collection)
            if select.sort_by:  # in the order of _id, equal ones are neighbours
                seen.add(hash(key))
            last, count = key, count + 1
            folds.setdefault(fold_of_document(read, valid_share), _Keys()).append(key)
    if most is not None and count <= most:
        return {}
    return {fold: Addressed(collection, select, where, fold, keys) for fold, keys in folds.items()}


def _codec(collection: Any) -> CodecOptions[Any]:
    """How this connection reads values; mongomock's options are of a class of its own."""
    options = collection.codec_options
    return (
        options if isinstance(options, CodecOptions) else CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
    )


def _repeated(value: Any, collection: str) -> QueryError:
    return QueryError(
        f"Several documents of {collection!r} have the same _id, so they cannot be read by it.",
        seen=f"_id {value!s:.60}",
        todo="leave streaming out, or select from a collection instead of a view",
    )
