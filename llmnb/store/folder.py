"""A store in a folder behind any fsspec URL, for a worker that cannot reach the database.

It keeps the records that one run needs in small JSON files, with the same classes above it (``Runs``, ``Events``,
``Checkpoints``, …), so that whoever works with a ``Store`` works with this. A folder has no atomic change: each writer
has a file of its own for each record, every field in it carries a number, and the highest number counts. So writers
never overwrite each other's fields; that one field is changed by one of them at a time is left to who writes what.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import bson
from bson import json_util

from ..errors import ConnectError, NotFound
from ..query import Document, Select
from . import environment
from .artifacts import Artifacts
from .checkpoints import Checkpoints
from .clock import Clock
from .events import Events
from .matching import changed, matches
from .models import Models
from .places import botocores, needs_folders, opened
from .runs import Runs
from .settings import Settings
from .tables import Duplicate

__all__ = ["FolderStore", "FolderTable", "open_folder"]

_JSON = json_util.JSONOptions(tz_aware=True, json_mode=json_util.JSONMode.RELAXED)
_BSON: Any = bson.CodecOptions(tz_aware=True)

# A field as it is written: (number, value), or (number,) for one that was taken away.
Field = Sequence[Any]


class Folder:
    """Files below a URL, each written as a whole.

    Args:
        url: where.
    """

    def __init__(self, url: str) -> None:
        self.fs, root = opened(url)
        self.root = root.rstrip("/")
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """What goes wrong on the way there is what it is with a database: it may be back in a while.

        Raises:
            ConnectError: the folder cannot be reached.
        """
        try:
            with botocores():
                yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConnectError("The run's folder does not answer.", seen=f"{self.root}: {error}") from error

    def write(self, name: str, content: bytes) -> None:
        """A reader sees all of it or what was there before."""
        path = f"{self.root}/{name}"
        with self.reached():
            self.make(path)
            if not self.local:
                self.fs.pipe_file(path, content)
                return
            draft = f"{path}.{uuid.uuid4().hex[:8]}.part"
            self.fs.pipe_file(draft, content)
            Path(draft).replace(path)

    def make(self, path: str) -> None:
        """Makes the folder of a file, where there are folders."""
        if needs_folders(self.fs):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def read(self, name: str) -> bytes | None:
        """None where there is no such file (any more)."""
        try:
            with self.reached():
                return bytes(self.fs.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Names of a sub-folder's files, sorted."""
        try:
            with self.reached():
                self.fs.invalidate_cache()
                found = self.fs.ls(f"{self.root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{str(path).rpartition('/')[2]}" for path in found)


class FolderTable:
    """Records in a folder, with the operations of ``Table``.

    Args:
        folder: the store's.
        name: of the table, a sub-folder.
    """

    aggregates = False

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._writer = uuid.uuid4().hex[:12]
        self._lock = threading.RLock()
        self._mine: dict[str, dict[str, Field]] = {}
        self._batches: dict[str, dict[str, dict[str, Field]]] = {}  # never change once written
        self._batch = 0

    # -- files -----------------------------------------------------------------------------------------------

    def _file(self, id: str) -> str:
        return f"{self._name}/{quote(id, safe='')}~{self._writer}.json"

    def _parts(self, name: str) -> dict[str, dict[str, Field]]:
        if name in self._batches:
            return self._batches[name]
        content = self._folder.read(name)
        parts = {} if content is None else json_util.loads(content.decode(), json_options=_JSON)
        if name.endswith(".batch.json"):
            self._batches[name] = parts
        return parts

    def _write(self, name: str, parts: Mapping[str, Mapping[str, Field]]) -> None:
        self._folder.write(name, json_util.dumps(parts, json_options=_JSON).encode())

    def _load(self, only: str | None = None) -> dict[str, dict[str, Field]]:
        """id → field → the part of it with the highest number."""
        merged: dict[str, dict[str, Field]] = {}
        head = None if only is None else f"{self._name}/{quote(only, safe='')}~"
        for name in self._folder.names(self._name):
            if not name.endswith(".json") or not (head is None or name.startswith(head) or ".batch" in name):
                continue
            for id, fields in self._parts(name).items():
                record = merged.setdefault(id, {})
                for field, part in fields.items():
                    if field not in record or part[0] > record[field][0]:
                        record[field] = part
        return merged

    def _records(self, filter: Mapping[str, Any]) -> list[tuple[dict[str, Any], int]]:
        """(record, its highest number) of those that match."""
        only = filter.get("_id")
        found = []
        for id, fields in self._load(only if isinstance(only, str) else None).items():
            record = {field: part[1] for field, part in fields.items() if len(part) > 1}
            if record.get("_id") == id and matches(record, filter):
                found.append((record, max(part[0] for part in fields.values())))
        return sorted(found, key=lambda pair: str(pair[0]["_id"]))

    def _save(self, before: Mapping[str, Any], after: Mapping[str, Any], newest: int) -> None:
        id = str(after["_id"])
        mine = self._mine.setdefault(id, {})
        for field in before.keys() | after.keys():
            if field not in after:
                mine[field] = [newest + 1]
            elif field not in before or before[field] != after[field]:
                mine[field] = [newest + 1, after[field]]
        self._write(self._file(id), {id: mine})

    # -- reading ---------------------------------------------------------------------------------------------

    def find(
        self,
        filter: Mapping[str, Any],
        projection: Mapping[str, Any] | None = None,
        sort: Sequence[tuple[str, int]] = (),
        limit: int = 0,
    ) -> list[dict[str, Any]]:
        """The records that match, whole."""
        with self._lock:
            found = [record for record, _ in self._records(filter)]
        for key, direction in reversed(list(sort)):
            found.sort(key=lambda record: record[key], reverse=direction < 0)
        return found[:limit] if limit else found

    def find_one(self, filter: Mapping[str, Any], sort: Sequence[tuple[str, int]] = ()) -> dict[str, Any] | None:
        """The first record that matches, or None."""
        found = self.find(filter, sort=sort, limit=1)
        return found[0] if found else None

    def count(self, filter: Mapping[str, Any]) -> int:
        """How many records match."""
        return len(self.find(filter))

    # -- writing ---------------------------------------------------------------------------------------------

    def insert(self, record: Mapping[str, Any]) -> None:
        """Raises Duplicate when the key is taken."""
        with self._lock:
            if self._records({"_id": record["_id"]}):
                raise Duplicate("A record with this key is there already.", seen=record["_id"])
            self._save({}, record, self._newest(str(record["_id"])))

    def _newest(self, id: str) -> int:
        return max((part[0] for part in self._load(id).get(id, {}).values()), default=0)

    def insert_many(self, records: Sequence[Mapping[str, Any]]) -> None:
        """In one file; raises Duplicate, and writes none, when a key is taken."""
        with self._lock:
            taken = {record["_id"] for record, _ in self._records({"_id": {"$in": [r["_id"] for r in records]}})}
            if taken:
                raise Duplicate("A record with this key is there already.", seen=min(taken))
            self._batch += 1
            first = quote(str(records[0]["_id"]), safe="")
            parts = {str(r["_id"]): {field: [1, value] for field, value in r.items()} for r in records}
            self._write(f"{self._name}/{first}~{self._writer}-{self._batch}.batch.json", parts)

    def replace(self, record: Mapping[str, Any]) -> None:
        """Writes a whole record, new or not."""
        with self._lock:
            before = self.find_one({"_id": record["_id"]}) or {}
            self._save(before, record, self._newest(str(record["_id"])))

    def update(
        self, filter: Mapping[str, Any], change: Mapping[str, Any], many: bool = False, upsert: bool = False
    ) -> int:
        """How many records matched."""
        with self._lock:
            found = self._records(filter)[: None if many else 1]
            for record, newest in found:
                self._save(record, changed(record, change), newest)
            if not found and upsert:
                self.insert(changed({"_id": filter["_id"]}, change))
            return len(found)

    def change(
        self, filter: Mapping[str, Any], change: Mapping[str, Any], upsert: bool = False
    ) -> dict[str, Any] | None:
        """Changes one record and gives it as it is afterwards; None when none matched."""
        with self._lock:
            for record, newest in self._records(filter)[:1]:
                after = changed(record, change)
                self._save(record, after, newest)
                return after
            if upsert:
                self.insert(after := changed({"_id": filter["_id"]}, change))
                return after
            return None

    def take(self, filter: Mapping[str, Any]) -> dict[str, Any] | None:
        """Removes one record and gives it."""
        with self._lock:
            for record, newest in self._records(filter)[:1]:
                id = str(record["_id"])
                self._mine.setdefault(id, {}).update({field: [newest + 1] for field in record})
                self._write(self._file(id), {id: self._mine[id]})
                return record
            return None

    def delete(self, filter: Mapping[str, Any]) -> int:
        """How many records were removed."""
        taken = 0
        with self._lock:
            while self.take(filter) is not None:
                taken += 1
        return taken


class FolderStore:
    """One run's records, rows and checkpoints in a folder. Made by ``open_folder``; attributes as ``Store``'s."""

    uri = None
    in_process = embedded = mock = False

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.name, self.safe_uri, self.home = url, "folder", url, home
        self._folder = Folder(url)
        clock = Clock(None)
        self.settings = Settings(self._table("settings"))  # type: ignore[arg-type]
        self.artifacts = Artifacts(self._table("artifacts"), None, self.settings, clock)  # type: ignore[arg-type]
        events = self._table("events")
        self.runs = Runs(self._table("runs"), events, clock)  # type: ignore[arg-type]
        self.events = Events(events, self.runs)  # type: ignore[arg-type]
        checkpoints = self._table("checkpoints")
        self.checkpoints = Checkpoints(checkpoints, self.artifacts, clock, home / "cache")  # type: ignore[arg-type]
        self.models = Models(self._table("models"), self._table("counters"), self.runs, clock)  # type: ignore[arg-type]
        self.models.checkpoints = self.checkpoints
        self.checkpoints.users = self.models.pointing_at

    def _table(self, name: str) -> FolderTable:
        return FolderTable(self._folder, f"records/{name}")

    def __repr__(self) -> str:
        return f"FolderStore({self.url!r})"

    def describe(self) -> str:
        """One line: where."""
        return f"the folder {self.url}"

    # -- rows ------------------------------------------------------------------------------------------------

    @staticmethod
    def _rows_file(select: Select, fold: str | None) -> str:
        word = json.dumps([select.to_json(), fold], sort_keys=True)
        return f"rows/{hashlib.sha256(word.encode()).hexdigest()[:24]}.bson.gz"

    def put_rows(self, select: Select, fold: str | None, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps the rows of a selection: BSON, compressed."""
        path = f"{self._folder.root}/{self._rows_file(select, fold)}"
        with self._folder.reached():
            self._folder.make(path)
            with self._folder.fs.open(path, "wb") as file, gzip.open(file, "wb", compresslevel=5) as packed:
                for row in rows:
                    packed.write(bson.encode(row))

    def rows(self, select: Select, fold: str | None = None, limit: int = 0) -> Iterator[Document]:
        """The rows that were kept for a selection.

        Raises:
            NotFound: none were.
        """
        path = f"{self._folder.root}/{self._rows_file(select, fold)}"
        try:
            with self._folder.reached():
                file = self._folder.fs.open(path, "rb")
        except FileNotFoundError:
            raise NotFound("rows of the selection from", select.collection, todo="apply the model again") from None
        with file, gzip.open(file, "rb") as packed:
            for count, row in enumerate(bson.decode_file_iter(packed, _BSON), start=1):
                yield Document(row)
                if limit and count >= limit:
                    return

    def source(self, select: Select, fold: str | None = None) -> Callable[[], Iterator[Document]]:
        """``rows`` when it is called."""
        return partial(self.rows, select, fold)

    # -- as a whole ------------------------------------------------------------------------------------------

    def adopt(
        self, record: Mapping[str, Any], model: Mapping[str, Any], checkpoints: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Takes over the records of a run, of the model version it fills, and of its checkpoints (without bytes)."""
        self.settings.set_artifacts(f"{self.url.rstrip('/')}/files")
        for table, given in (("runs", record), ("models", model), *(("checkpoints", one) for one in checkpoints)):
            held = {k: json.dumps(v) if k in ("config", "spec") and v is not None else v for k, v in given.items()}
            self._table(table).insert(held)

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        with contextlib.suppress(FileNotFoundError), self._folder.reached():
            self._folder.fs.rm(self._folder.root, recursive=True)

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> FolderStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_folder(url: str, *, home: Path | str | None = None) -> FolderStore:
    """Opens a folder as a store.

    Args:
        url: an fsspec URL.
        home: local folder for the cache; default LLMNB_HOME, else ``./.llmnb``.

    Raises:
        ArtifactError: there is no such kind of folder.
    """
    return FolderStore(url, Path(home).expanduser() if home is not None else environment.read().home)
