"""Query values turned into driver calls, and rows for training.

Knows the user's own collections only; ours are tables.
"""

from __future__ import annotations

import base64
import datetime as dt
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from bson import ObjectId, decode_all
from bson.binary import Binary
from bson.decimal128 import Decimal128
from bson.errors import BSONError

from ..errors import QueryError
from ..query import Document, Query, Select, Write
from .batches import lean
from .folds import fold_of_document
from .tables import translated

__all__ = ["Cursor", "drops_id", "execute", "find_source", "from_extended", "kept_fields", "rows", "skim"]

_FLAGS = {"i": re.I, "m": re.M, "s": re.S, "x": re.X}
_OURS = ("llmnb.", "system.")


def _date(value: Any) -> dt.datetime:
    if isinstance(value, Mapping):
        value = int(value["$numberLong"])
    if isinstance(value, (int, float)):
        return dt.datetime.fromtimestamp(0, dt.timezone.utc) + dt.timedelta(milliseconds=value)
    moment = dt.datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.timezone.utc)


def _binary(value: Any) -> Any:
    data, kind = base64.b64decode(value["base64"]), int(value.get("subType", "00"), 16)
    return data if kind == 0 else Binary(data, kind)


def _regex(value: Any) -> re.Pattern[str]:
    flags = 0
    for letter in value.get("options", ""):
        flags |= _FLAGS.get(letter, 0)
    return re.compile(value["pattern"], flags)


# https://www.mongodb.com/docs/manual/reference/mongodb-extended-json/
_EXTENDED: dict[str, Callable[[Any], Any]] = {
    "$oid": ObjectId,
    "$date": _date,
    "$binary": _binary,
    "$regularExpression": _regex,
    "$numberDouble": float,
    "$numberInt": int,
    "$numberLong": int,
    "$numberDecimal": Decimal128,
}


def from_extended(value: Any) -> Any:
    """Extended JSON to the driver's types, all the way down; other values stay as they are.

    Raises:
        QueryError: a value in extended JSON is malformed.
    """
    if isinstance(value, Mapping):
        if len(value) == 1:
            (key, inner), *_ = value.items()
            if key in _EXTENDED:
                try:
                    return _EXTENDED[key](inner)
                except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, re.error, BSONError) as error:
                    raise QueryError(f"This is not a value for {key}.", seen=repr(inner)[:80]) from error
        return {key: from_extended(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [from_extended(item) for item in value]
    return value


def _read(source: Any, where: str, raw: bool) -> Iterator[Any]:
    # One guard around the whole loop: one for each document took a fifth of the time of reading 40 000.
    with translated(where):
        if raw:
            yield from source
        else:
            yield from map(Document, source)


class Cursor:
    """Documents that are read while it is iterated, once.

    ``list(cursor)`` reads all of them; ``cursor.close()`` lets go of the server's side early.
    """

    def __init__(self, source: Any, where: str, raw: bool = False) -> None:
        self._source = source
        self._documents = _read(source, where, raw)

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def __next__(self) -> Document:
        return next(self._documents)

    def close(self) -> None:
        """Gives the server its cursor back."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def execute(database: Any, query: Query, where: str, valid_share: float) -> Any:
    """Runs a query.

    Args:
        database: of pymongo or mongomock.
        query: a Select or a Write.
        where: the database's address without its password.
        valid_share: share of inserted documents without a fold that validate.

    Returns:
        find, aggregate: a Cursor; find_one: a Document or None; count: int; insert_one: the id; insert_many: the
        ids; update, delete: how many documents changed.

    Raises:
        QueryError: the query cannot be run.
        DatabaseError: the database refuses or is away.
    """
    if not isinstance(query, Query):
        raise QueryError(
            "This is not a query.", seen=f"{type(query).__name__}: {query!r:.80}", todo="Collection('name').find()"
        )
    _check_ours(query)
    collection = database[query.collection]
    if isinstance(query, Select):
        return _select(collection, query, where)
    if isinstance(query, Write):
        return _write(collection, query, where, valid_share)
    raise QueryError("This kind of query is not known.", seen=type(query).__name__)


def _check_ours(query: Query) -> None:
    if query.collection.startswith(_OURS):
        raise QueryError(f"The collection {query.collection!r} is not one for your documents.")


def _select(collection: Any, query: Select, where: str) -> Any:
    if query.pipeline is not None:
        return _aggregate(collection, query, where)
    with translated(where):
        filter = from_extended(query.filter)
        if query.count:
            options = {k: v for k, v in (("limit", query.limit_to), ("skip", query.skip_first)) if v}
            return int(collection.count_documents(filter, **options))
        if query.one:
            found = collection.find_one(filter, _projection(query), sort=list(query.sort_by) or None)
            return None if found is None else Document(found)
        return Cursor(_find(collection, filter, _projection(query), query), where)


def _aggregate(collection: Any, query: Select, where: str, raw: bool = False) -> Cursor:
    with translated(where):
        stages = [from_extended(stage) for stage in query.pipeline or ()]
        if any({"$out", "$merge"} & set(stage) for stage in stages):  # a stored query may hold what was not checked
            raise QueryError("A selection must not write.", todo="leave out $out and $merge")
        found = lean(collection.aggregate_raw_batches(stages)) if raw else collection.aggregate(stages)
        return Cursor(found, where, raw)


def _projection(query: Select) -> Any:
    if query.projection is None or isinstance(query.projection, Mapping):
        return None if query.projection is None else from_extended(query.projection)
    return list(query.projection)


def _find(collection: Any, filter: Any, projection: Any, query: Select, raw: bool = False) -> Any:
    cursor = lean(collection.find_raw_batches(filter, projection)) if raw else collection.find(filter, projection)
    if query.sort_by:
        cursor = cursor.sort([(key, int(direction)) for key, direction in query.sort_by])
    if query.skip_first:
        cursor = cursor.skip(query.skip_first)
    if query.limit_to:
        cursor = cursor.limit(query.limit_to)
    return cursor


def _write(collection: Any, query: Write, where: str, valid_share: float) -> Any:
    if query.op in ("insert_one", "insert_many"):
        documents = []
        for given in query.documents:
            document = from_extended(given)
            document.setdefault("_id", ObjectId())
            document.setdefault("_fold", fold_of_document(document, valid_share))
            documents.append(document)
        with translated(where):
            if query.op == "insert_one":
                return collection.insert_one(documents[0]).inserted_id
            return collection.insert_many(documents).inserted_ids
    filter, update = from_extended(query.filter), from_extended(query.update)
    with translated(where):
        try:
            if query.op == "update_one":
                return collection.update_one(filter, update).modified_count
            if query.op == "update_many":
                return collection.update_many(filter, update).modified_count
            if query.op == "delete_one":
                return collection.delete_one(filter).deleted_count
            if query.op == "delete_many":
                return collection.delete_many(filter).deleted_count
        except ValueError as error:
            raise QueryError("This is not an update.", seen=str(error), todo="{'$set': {…}}") from error
    raise QueryError(f"There is no query {query.op!r}.")


def rows(
    database: Any,
    select: Select,
    where: str,
    valid_share: float,
    fold: str | None = None,
    limit: int = 0,
    told: Callable[[bytes], Any] | None = None,
) -> Iterator[Document]:
    """The selected documents, each with its ``_fold``; of one fold only, when ``fold`` is given.

    Folds divide what was selected: a selection limited to 100 documents gives at most 100 over all folds.

    A find without an order of its own is read in the order of ``_id``: MongoDB's natural order is another one on
    each member of a replica set, and was seen to change when a killed mongod recovered; training that goes on after
    that must see the same rows in the same order.

    ``told`` is given every byte that the server sends of them; not for mongomock.
    """
    if select.one or select.count:
        raise QueryError("Rows come from a find or an aggregation.", seen=select, todo="Collection('name').find()")
    source, drop = _rows_source(database, select, where, fold, raw=told is not None)
    given = 0
    with source:
        for document in source if told is None else _decoded(source, database.codec_options, where, told):
            document["_fold"] = fold_of_document(document, valid_share)
            if fold is not None and document["_fold"] != fold:
                continue
            if drop:
                document.pop("_id", None)
            yield document
            given += 1
            if limit and given >= limit:
                return


def drops_id(select: Select) -> bool:
    """True when the selection leaves the ``_id`` out. The server sends it all the same: the fold needs it."""
    projection = None if select.pipeline is not None else _projection(select)
    return isinstance(projection, dict) and projection.get("_id", 1) in (0, False)


def skim(database: Any, select: Select, where: str, fold: str | None, told: Callable[[bytes], Any]) -> None:
    """Reads what ``rows`` would read and decodes nothing. ``told`` is given every byte."""
    source, _ = _rows_source(database, select, where, fold, raw=True)
    batches: Any = source
    with source:
        for batch in batches:
            told(batch)


def _decoded(batches: Any, options: Any, where: str, told: Callable[[bytes], Any]) -> Iterator[Any]:
    for batch in batches:
        told(batch)
        with translated(where):
            documents = decode_all(batch, options)
        yield from map(Document, documents)


def _rows_source(database: Any, select: Select, where: str, fold: str | None, raw: bool = False) -> tuple[Cursor, bool]:
    if select.pipeline is not None:
        _check_ours(select)
        return _aggregate(database[select.collection], select, where, raw), False
    projection, drop = kept_fields(select)
    with translated(where):
        return Cursor(find_source(database[select.collection], select, projection, fold, raw), where, raw), drop


def kept_fields(select: Select) -> tuple[dict[str, Any] | None, bool]:
    """The projection of a selection with what its fold needs, and whether ``_id`` is taken out again."""
    projection = _projection(select)
    if isinstance(projection, list):
        projection = dict.fromkeys(projection or ["_id"], 1)
    if not projection:
        return projection, False
    including = any(_includes(value) for key, value in projection.items() if key != "_id")
    projection.pop("_id", None)  # the fold needs it; it is taken out again
    if including:
        projection["_fold"] = 1
    else:
        projection.pop("_fold", None)
    return projection or None, drops_id(select)


def find_source(collection: Any, select: Select, projection: Any, fold: str | None = None, raw: bool = False) -> Any:
    """The driver's cursor over a find, in the order in which its rows are trained."""
    filter = from_extended(select.filter)
    if fold is not None and not select.limit_to and not select.skip_first:
        # The server leaves out what certainly is of another fold; documents without a fold are hashed here.
        of_fold = {"$or": [{"_fold": fold}, {"_fold": {"$exists": False}}]}
        filter = {"$and": [filter, of_fold]} if filter else of_fold
    ordered = select if select.sort_by else replace(select, sort_by=(("_id", 1),))
    return _find(collection, filter, projection, ordered, raw)


def _includes(value: Any) -> bool:
    """True when this part of a projection makes it one that lists what to keep."""
    if isinstance(value, Mapping):
        return not {"$slice", "$meta"} & set(value)
    return bool(value)
