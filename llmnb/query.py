"""Documents and queries as values.

A query is plain data until a database executes it: it compares, prints, and goes to JSON and back (MongoDB
extended JSON for ObjectId, dates and bytes). This room knows no database driver; ``store`` turns a value
into driver calls. Nothing here is ever pickled or evaluated.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import QueryError

__all__ = ["Collection", "Document", "Query", "Select", "Write", "from_json", "to_extended"]

FOLDS = ("train", "valid")


class Document(dict[str, Any]):
    """A MongoDB document: a ``dict``. ``_fold`` is "train" or "valid".

    Nested keys can be read with dots: ``Document({"a": {"b": 1}}).get_path("a.b")``.
    """

    def get_path(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path, or ``default``."""
        value: Any = self
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            else:
                return default
        return value


def to_extended(value: Any, where: str = "query") -> Any:
    """Python values to JSON-able extended JSON (https://www.mongodb.com/docs/manual/reference/mongodb-extended-json/).

    Raises:
        QueryError: a value has no JSON form (a function, an open file, …).
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$numberDouble": _double(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise QueryError(f"A key in {where} is not a string.", seen=repr(key))
        return {key: to_extended(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_extended(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dt.datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=dt.timezone.utc)
        stamp = aware.astimezone(dt.timezone.utc)
        return {"$date": stamp.strftime("%Y-%m-%dT%H:%M:%S.") + f"{stamp.microsecond // 1000:03d}Z"}
    if isinstance(value, re.Pattern):
        flags = "".join(c for c, f in (("i", re.I), ("m", re.M), ("s", re.S), ("x", re.X)) if value.flags & f)
        return {"$regularExpression": {"pattern": value.pattern, "options": flags}}
    if isinstance(value, (bytes, bytearray)):
        return {"$binary": {"base64": base64.b64encode(bytes(value)).decode(), "subType": "00"}}
    if type(value).__name__ == "ObjectId":  # bson belongs to the store; its text form is all we need
        return {"$oid": str(value)}
    raise QueryError(
        f"A value in {where} cannot be stored in a query.",
        seen=f"{type(value).__name__}: {value!r:.80}",
        todo="use strings, numbers, dates, ObjectIds, lists and dicts",
    )


def _double(value: float) -> str:
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


@dataclass(frozen=True)
class Query:
    """What all queries share: a collection and a JSON form."""

    collection: str

    def to_json(self) -> dict[str, Any]:
        """The JSON-able form; ``llmnb.query.from_json`` reads it back."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Query) and _canonical(self) == _canonical(other)

    def __hash__(self) -> int:
        return hash(_canonical(self))


def _canonical(query: Query) -> str:
    return json.dumps(query.to_json(), sort_keys=True)


@dataclass(frozen=True, eq=False)
class Select(Query):
    """Reads documents: a find, or an aggregation.

    Attributes:
        filter: a MongoDB filter.
        projection: a MongoDB projection, or None for whole documents.
        sort_by: pairs of (field, 1 or -1).
        limit_to: the most documents to give, 0 for all.
        skip_first: documents to pass over.
        one: True for ``find_one``: the result is one document or None.
        count: True for ``count_documents``: the result is a number.
        pipeline: aggregation stages; then the other fields are unused.
    """

    filter: Mapping[str, Any] = field(default_factory=dict)
    projection: Mapping[str, Any] | Sequence[str] | None = None
    sort_by: tuple[tuple[str, int], ...] = ()
    limit_to: int = 0
    skip_first: int = 0
    one: bool = False
    count: bool = False
    pipeline: tuple[Mapping[str, Any], ...] | None = None

    def sort(self, key: str | Sequence[tuple[str, int]], direction: int = 1) -> Select:
        """Ordered by a field (1 ascending, -1 descending) or by a list of such pairs."""
        pairs = ((key, direction),) if isinstance(key, str) else tuple((k, int(d)) for k, d in key)
        return self._extended({"$sort": dict(pairs)}, sort_by=pairs)

    def limit(self, n: int) -> Select:
        """At most ``n`` documents."""
        if n < 0:
            raise QueryError("limit must not be negative.", seen=n)
        return self._extended({"$limit": n}, limit_to=int(n))

    def skip(self, n: int) -> Select:
        """Without the first ``n`` documents."""
        if n < 0:
            raise QueryError("skip must not be negative.", seen=n)
        return self._extended({"$skip": n}, skip_first=int(n))

    def where(self, **equal: Any) -> Select:
        """The same selection, narrowed to documents whose fields equal the given values."""
        if self.pipeline is not None:
            return replace(self, pipeline=(*self.pipeline, {"$match": equal}))
        return replace(self, filter={"$and": [dict(self.filter), equal]} if self.filter else equal)

    def _extended(self, stage: Mapping[str, Any], **changes: Any) -> Select:
        if self.pipeline is not None:
            return replace(self, pipeline=(*self.pipeline, stage))
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"op": "find", "collection": self.collection}
        if self.pipeline is not None:
            return {**out, "op": "aggregate", "pipeline": to_extended(list(self.pipeline), "pipeline")}
        if self.one:
            out["op"] = "find_one"
        if self.count:
            out["op"] = "count_documents"
        if self.filter:
            out["filter"] = to_extended(self.filter, "filter")
        if self.projection is not None:
            plain = dict(self.projection) if isinstance(self.projection, Mapping) else list(self.projection)
            out["projection"] = to_extended(plain, "projection")
        if self.sort_by:
            out["sort"] = [list(pair) for pair in self.sort_by]
        if self.limit_to:
            out["limit"] = self.limit_to
        if self.skip_first:
            out["skip"] = self.skip_first
        return out


@dataclass(frozen=True, eq=False)
class Write(Query):
    """Changes documents: ``op`` is insert_many, insert_one, update_many, update_one, delete_many, delete_one."""

    op: str = "insert_many"
    documents: tuple[Mapping[str, Any], ...] = ()
    filter: Mapping[str, Any] = field(default_factory=dict)
    update: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"op": self.op, "collection": self.collection}
        if self.documents:
            out["documents"] = to_extended([dict(d) for d in self.documents], "documents")
        if self.op.startswith(("update", "delete")):
            out["filter"] = to_extended(self.filter, "filter")
        if self.update is not None:
            out["update"] = to_extended(self.update, "update")
        return out


class Collection:
    """A collection by name. Every method gives a query value; ``db.execute(query)`` runs it.

    Args:
        name: the collection's name in the database.

    Raises:
        QueryError: the name is empty, or begins with ``llmnb.`` (those collections are ours) or ``system.``.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name or "$" in name or "\0" in name:
            raise QueryError("A collection needs a name without '$'.", seen=repr(name))
        if name.startswith(("llmnb.", "system.")):
            raise QueryError(f"The collection {name!r} is not one for your documents.", todo="choose another name")
        self.name = name

    def __repr__(self) -> str:
        return f"Collection({self.name!r})"

    def find(self, filter: Mapping[str, Any] | None = None, projection: Any = None) -> Select:
        """All documents that match."""
        return Select(self.name, _mapping(filter, "filter"), projection)

    def find_one(self, filter: Mapping[str, Any] | None = None, projection: Any = None) -> Select:
        """The first document that matches, or None."""
        return Select(self.name, _mapping(filter, "filter"), projection, one=True)

    def count_documents(self, filter: Mapping[str, Any] | None = None) -> Select:
        """How many documents match."""
        return Select(self.name, _mapping(filter, "filter"), count=True)

    def aggregate(self, pipeline: Sequence[Mapping[str, Any]]) -> Select:
        """An aggregation. ``$out`` and ``$merge`` write, so they are refused."""
        stages = tuple(_mapping(stage, "pipeline") for stage in pipeline)
        for stage in stages:
            if {"$out", "$merge"} & set(stage):
                raise QueryError("A selection must not write.", seen=stage, todo="leave out $out and $merge")
        return Select(self.name, pipeline=stages)

    def insert_one(self, document: Mapping[str, Any]) -> Write:
        """One new document."""
        return Write(self.name, "insert_one", (_mapping(document, "document"),))

    def insert_many(self, documents: Iterable[Mapping[str, Any]]) -> Write:
        """New documents."""
        docs = tuple(_mapping(d, "document") for d in documents)
        if not docs:
            raise QueryError("insert_many was given no documents.", todo="give at least one document")
        return Write(self.name, "insert_many", docs)

    def update_many(self, filter: Mapping[str, Any], update: Mapping[str, Any]) -> Write:
        """Changes all documents that match."""
        return Write(self.name, "update_many", (), _mapping(filter, "filter"), _mapping(update, "update"))

    def update_one(self, filter: Mapping[str, Any], update: Mapping[str, Any]) -> Write:
        """Changes the first document that matches."""
        return Write(self.name, "update_one", (), _mapping(filter, "filter"), _mapping(update, "update"))

    def delete_many(self, filter: Mapping[str, Any]) -> Write:
        """Deletes all documents that match."""
        return Write(self.name, "delete_many", (), _mapping(filter, "filter"))

    def delete_one(self, filter: Mapping[str, Any]) -> Write:
        """Deletes the first document that matches."""
        return Write(self.name, "delete_one", (), _mapping(filter, "filter"))

    def sort(self, key: str | Sequence[tuple[str, int]], direction: int = 1) -> Select:
        """``find().sort(…)``."""
        return self.find().sort(key, direction)

    def limit(self, n: int) -> Select:
        """``find().limit(n)``."""
        return self.find().limit(n)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise QueryError(f"A {what} must be a dict.", seen=f"{type(value).__name__}: {value!r:.80}")
    return value


def from_json(data: Mapping[str, Any]) -> Query:
    """The query value that ``Query.to_json`` wrote.

    Extended JSON inside it (``{"$oid": …}``, ``{"$date": …}``) is kept as such; the store turns it into the
    driver's types when it runs the query.

    Raises:
        QueryError: the data is no query of ours.
    """
    try:
        op, name = data["op"], Collection(data["collection"]).name
    except (KeyError, TypeError) as error:
        raise QueryError("This is not a stored query.", seen=repr(data)[:120]) from error
    if op == "aggregate":
        return Select(name, pipeline=tuple(data["pipeline"]))
    if op in ("find", "find_one", "count_documents"):
        return Select(
            name,
            data.get("filter", {}),
            data.get("projection"),
            tuple((k, d) for k, d in data.get("sort", ())),
            data.get("limit", 0),
            data.get("skip", 0),
            one=op == "find_one",
            count=op == "count_documents",
        )
    if op in ("insert_one", "insert_many", "update_one", "update_many", "delete_one", "delete_many"):
        return Write(name, op, tuple(data.get("documents", ())), data.get("filter", {}), data.get("update"))
    raise QueryError(f"There is no query {op!r}.")
