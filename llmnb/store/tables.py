"""Our own collections, with the operations that MongoDB and mongomock both do, and errors in our words.

Nothing here knows what a record means.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import bson.errors
from pymongo import ReturnDocument
from pymongo import errors as driver

from ..errors import ConnectError, DatabaseError, QueryError

__all__ = ["Duplicate", "Table", "no_space", "plain", "translated"]

_AUTHENTICATION = {11, 18, 8000}
_UNAUTHORIZED = {13}
_READ_ONLY = {10107, 13435, 10058, 189}
# A server that starts, ends or changes its part: the same question is answered a moment later. From the drivers'
# specification of retryable errors; and 211 (no key to sign the cluster's time with yet), seen after kill -9.
_PASSING = {6, 7, 89, 91, 134, 211, 262, 9001, 11600, 11602, 13436}
_DISK_FULL = 14031


class Duplicate(QueryError, DatabaseError):
    """A record with this key is there already."""


def no_space(error: BaseException) -> bool:
    """True when an error says that a disk is full or a quota is used up."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if isinstance(error, driver.OperationFailure) and error.code == _DISK_FULL:
        return True
    return "no space left on device" in str(error).lower()


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns the driver's errors into ours.

    Args:
        where: the database's address without its password.

    Raises:
        ConnectError: nobody answers, or the password is wrong.
        Duplicate: a unique key is taken.
        QueryError: the query or a document is at fault.
        DatabaseError: anything else that the database refused.
    """
    try:
        yield
    except driver.BulkWriteError as error:
        faults = error.details.get("writeErrors", [])
        if faults and all(fault.get("code") == 11000 for fault in faults):
            raise Duplicate("A document with this _id is there already.", seen=faults[0].get("errmsg")) from error
        raise _refused(faults[0] if faults else error.details, where) from error
    except driver.DuplicateKeyError as error:
        raise Duplicate("A document with this key is there already.", seen=_short(error)) from error
    except driver.OperationFailure as error:
        raise _refused({"code": error.code, "errmsg": _short(error)}, where) from error
    except driver.ConfigurationError as error:  # InvalidURI is one
        raise ConnectError(
            "The database's address cannot be used.",
            seen=f"{where} ({_short(error)})",
            todo="write mongodb://user:password@host:27017/name, with special characters as %40 for @, %3A for :",
        ) from error
    except driver.NotPrimaryError as error:
        raise DatabaseError(
            "The server does not take writes: it is not the primary of its replica set.",
            seen=where,
            todo="give the address of the whole replica set (…/?replicaSet=name)",
        ) from error
    except driver.ConnectionFailure as error:
        raise ConnectError(
            "The database does not answer.",
            seen=f"{where} ({_short(error)})",
            todo="check that the server runs and that host and port are right; connect() without an address "
            "starts an embedded server",
        ) from error
    except (bson.errors.BSONError, driver.InvalidOperation, OverflowError) as error:
        raise QueryError("This cannot be stored in or asked of MongoDB.", seen=_short(error)) from error
    except driver.PyMongoError as error:
        raise DatabaseError("The database failed.", seen=f"{where}: {_short(error)}") from error
    except NotImplementedError as error:
        raise QueryError(
            "The database in this process (mongomock) cannot do this.",
            seen=_short(error),
            todo="use a real server: connect() or connect('mongodb://…')",
        ) from error


def _short(error: BaseException) -> str:
    # The driver appends the topology or the server's whole answer; the first part says it.
    return str(error).split(", full error:")[0].split(", Timeout:")[0][:300]


def _refused(fault: Mapping[str, Any], where: str) -> DatabaseError | QueryError:
    code, text = fault.get("code"), str(fault.get("errmsg", fault))[:300]
    if code in _AUTHENTICATION or "Authentication failed" in text:
        return ConnectError(
            "The database does not let us in: user or password is wrong.",
            seen=where,
            todo="check user and password in the address, and authSource=… when the user lives in another database",
        )
    if code in _UNAUTHORIZED:
        return DatabaseError(
            "The database refuses this: the user has no right to it.",
            seen=f"{where}: {text}",
            todo="give the user the role readWrite on this database",
        )
    if code in _READ_ONLY:
        return DatabaseError("The database does not take writes now.", seen=f"{where}: {text}")
    if code in _PASSING:
        return DatabaseError("The database is starting or ending; it answers in a moment.", seen=f"{where}: {text}")
    if code == _DISK_FULL or "no space left" in text.lower():
        return DatabaseError(
            "There is no space left on the database's disk.", seen=f"{where}: {text}", todo="free space there"
        )
    return QueryError("The database refuses this query.", seen=text, todo="see the MongoDB manual for this operator")


def plain(value: Any) -> Any:
    """A value that BSON can hold: numpy scalars become numbers, tuples lists; NaN and Inf stay what they are."""
    if value is None or isinstance(value, (str, bool, bytes, dt.datetime)):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else float(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


def _aware(record: dict[str, Any] | None) -> Any:
    # A Database that a person handed over may give naive datetimes; MongoDB's are always UTC.
    if record is not None:
        for key, value in record.items():
            if isinstance(value, dt.datetime) and value.tzinfo is None:
                record[key] = value.replace(tzinfo=dt.timezone.utc)
    return record


class Table:
    """One of our collections.

    Args:
        collection: of pymongo or mongomock.
        where: the database's address without its password, for error texts.
        lock: held around each operation where the database itself is not atomic (mongomock).
        indexes: index specifications, made before the first write, so that reading needs no right to write.
    """

    def __init__(
        self,
        collection: Any,
        where: str,
        lock: contextlib.AbstractContextManager[Any] | None = None,
        indexes: Sequence[Sequence[tuple[str, int]]] = (),
    ) -> None:
        self.collection = collection
        self._where = where
        self._lock = lock
        self._indexes = list(indexes)
        self._indexing = threading.Lock()
        self.aggregates = type(collection).__module__.startswith("pymongo.")  # mongomock knows part of it only

    @contextlib.contextmanager
    def _held(self, write: bool = False) -> Iterator[Any]:
        with translated(self._where), self._lock or contextlib.nullcontext():
            if write and self._indexes:
                with self._indexing:
                    while self._indexes:
                        self.collection.create_index(list(self._indexes[-1]))
                        self._indexes.pop()
            yield self.collection

    def find(
        self,
        filter: Mapping[str, Any],
        projection: Mapping[str, Any] | None = None,
        sort: Sequence[tuple[str, int]] = (),
        limit: int = 0,
    ) -> list[dict[str, Any]]:
        """The records that match."""
        with self._held() as collection:
            cursor = collection.find(dict(filter), projection)
            if sort:
                cursor = cursor.sort(list(sort))
            if limit:
                cursor = cursor.limit(limit)
            return [_aware(record) for record in cursor]

    def find_one(self, filter: Mapping[str, Any], sort: Sequence[tuple[str, int]] = ()) -> dict[str, Any] | None:
        """The first record that matches, or None."""
        found = self.find(filter, sort=sort, limit=1)
        return found[0] if found else None

    def aggregate(self, pipeline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the stages of a pipeline make of the records; only where ``aggregates`` is True."""
        with self._held() as collection:
            return [_aware(record) for record in collection.aggregate([dict(stage) for stage in pipeline])]

    def insert(self, record: Mapping[str, Any]) -> None:
        """Raises Duplicate when the key is taken."""
        with self._held(write=True) as collection:
            collection.insert_one(dict(record))

    def insert_many(self, records: Sequence[Mapping[str, Any]]) -> None:
        """In order; stops with Duplicate at the first key that is taken."""
        with self._held(write=True) as collection:
            collection.insert_many([dict(record) for record in records], ordered=True)

    def replace(self, record: Mapping[str, Any]) -> None:
        """Writes a whole record, new or not."""
        with self._held(write=True) as collection:
            collection.replace_one({"_id": record["_id"]}, dict(record), upsert=True)

    def update(
        self, filter: Mapping[str, Any], change: Mapping[str, Any], many: bool = False, upsert: bool = False
    ) -> int:
        """How many records matched."""
        with self._held(write=True) as collection:
            call = collection.update_many if many else collection.update_one
            return int(call(dict(filter), dict(change), upsert=upsert).matched_count)

    def change(
        self, filter: Mapping[str, Any], change: Mapping[str, Any], upsert: bool = False
    ) -> dict[str, Any] | None:
        """Changes one record in one step and gives it as it is afterwards; None when none matched."""
        with self._held(write=True) as collection:
            return _aware(
                collection.find_one_and_update(
                    dict(filter), dict(change), upsert=upsert, return_document=ReturnDocument.AFTER
                )
            )

    def take(self, filter: Mapping[str, Any]) -> dict[str, Any] | None:
        """Removes one record in one step and gives it."""
        with self._held(write=True) as collection:
            return _aware(collection.find_one_and_delete(dict(filter)))

    def delete(self, filter: Mapping[str, Any]) -> int:
        """How many records were removed."""
        with self._held(write=True) as collection:
            return int(collection.delete_many(dict(filter)).deleted_count)

    def count(self, filter: Mapping[str, Any]) -> int:
        """How many records match."""
        with self._held() as collection:
            return int(collection.count_documents(dict(filter)))
