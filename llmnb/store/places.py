"""Where bytes lie: GridFS, or a folder behind any fsspec URL. Each upload gets a name of its own.

A place knows neither digests nor who needs the bytes; an upload that broke off is a name that nobody records.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import fsspec
import gridfs
from bson import ObjectId
from bson.errors import InvalidId
from gridfs.errors import GridFSError, NoFile
from pymongo.errors import CollectionInvalid, OperationFailure, PyMongoError

from ..errors import ArtifactError, MissingPackage
from .address import mask_uri
from .tables import no_space, translated

__all__ = ["BUCKET", "FolderPlace", "GridPlace", "Place", "absolute", "botocores", "needs_folders", "opened"]

BUCKET = "llmnb.fs"
GRID_CHUNK = 255 * 1024  # GridFS's own; larger ones were not faster
CHUNK = 4 * GRID_CHUNK  # bytes read at a time: whole chunks, so that GridFS copies no remainders


class Place(Protocol):
    """Bytes by name."""

    label: str

    def write(self, chunks: Iterable[bytes]) -> str:
        """Stores bytes under a new name; the name."""

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes, in pieces."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """How many bytes there are under each name; one that is not there is left out."""

    def delete(self, name: str) -> None:
        """Removes a name; nothing happens when there is none."""

    def names(self) -> Iterator[tuple[str, dt.datetime, int]]:
        """Every name with the time when its upload began and its size, uploads that broke off included."""


@contextlib.contextmanager
def _explained(label: str, what: str) -> Iterator[None]:
    try:
        with botocores():
            yield
    except (NoFile, FileNotFoundError) as error:
        if what.startswith("writing"):
            raise ArtifactError("There is no such place for artifacts.", seen=f"{label}: {error}") from error
        raise ArtifactError("Stored bytes are missing.", seen=f"{label}: {error}") from error
    except GridFSError as error:
        raise ArtifactError("Stored bytes are damaged.", seen=f"{label}: {error}") from error
    except (OSError, PyMongoError) as error:
        if no_space(error):
            raise ArtifactError(
                f"No space left: {what} {label} failed; nothing that was stored before is touched.",
                seen=str(error)[:200],
                todo="free space there (llmnb db gc removes what no record names), or give artifacts= another URL",
            ) from error
        if isinstance(error, PyMongoError):
            with translated(label):
                raise
        todo = None
        if label.startswith("s3"):
            todo = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for an endpoint of your own, AWS_ENDPOINT_URL"
        seen = f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{what[0].upper()}{what[1:]} {label} failed.", seen=seen, todo=todo) from error


@contextlib.contextmanager
def botocores() -> Iterator[None]:
    """The errors of S3's client, which are no OSErrors as those of other file systems, become some."""
    try:
        yield
    except Exception as error:  # by its name: botocore is not imported here, and its errors have no one root
        if not type(error).__module__.startswith(("botocore.", "aiobotocore.", "aiohttp.")):
            raise
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def needs_folders(fs: Any) -> bool:
    """False for object stores: they know no folders, and making one there would make a bucket that nobody asked for."""
    protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    return not {"s3", "gs", "gcs", "abfs", "az"} & set(protocols)


class GridPlace(Place):
    """GridFS in the database itself."""

    def __init__(self, database: Any) -> None:
        self.label = "gridfs"
        self._database = database
        self._prepared = False
        if type(database).__module__.startswith("mongomock"):
            from mongomock.gridfs import enable_gridfs_integration

            enable_gridfs_integration()
            self._prepared = True
        self._fs = gridfs.GridFS(database, BUCKET)

    def _prepare(self) -> None:
        """Makes the collection of chunks without compression, where we are the first and the server lets us.

        Weights do not compress; on 2 cores shared with mongod this put 48 MB 1.2x and got them 1.4x as fast.
        """
        if not self._prepared:
            engine = {"wiredTiger": {"configString": "block_compressor=none"}}
            with contextlib.suppress(CollectionInvalid, OperationFailure):  # it is there, or the server is managed
                self._database.create_collection(f"{BUCKET}.chunks", storageEngine=engine)
            self._prepared = True

    def write(self, chunks: Iterable[bytes]) -> str:
        name = ObjectId()
        with _explained("GridFS", "writing to"):
            self._prepare()
            upload = self._fs.new_file(_id=name, chunk_size=GRID_CHUNK)
            try:
                for chunk in chunks:
                    upload.write(chunk)
                upload.close()
            except BaseException:
                with contextlib.suppress(PyMongoError):
                    upload.abort()
                raise
        return str(name)

    def read(self, name: str) -> Iterator[bytes]:
        with _explained("GridFS", "reading from"):
            source = self._fs.get(ObjectId(name))
            left = source.length
            while left:
                chunk = source.readchunk()
                if not chunk:
                    raise ArtifactError("Stored bytes are damaged: some are missing.", seen=f"GridFS file {name}")
                left -= len(chunk)
                yield chunk

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        with _explained("GridFS", "reading from"):
            wanted = {"_id": {"$in": [ObjectId(name) for name in names]}}
            found = self._database[BUCKET + ".files"].find(wanted, {"length": 1})
            return {str(one["_id"]): int(one["length"]) for one in found}

    def delete(self, name: str) -> None:
        with _explained("GridFS", "deleting from"):
            self._fs.delete(ObjectId(name))

    def names(self) -> Iterator[tuple[str, dt.datetime, int]]:
        with _explained("GridFS", "reading from"):
            whole = {found["_id"]: found.get("length", 0) for found in self._database[BUCKET + ".files"].find()}
            group = [{"$group": {"_id": "$files_id", "chunks": {"$sum": 1}}}]
            parts = {found["_id"]: found["chunks"] for found in self._database[BUCKET + ".chunks"].aggregate(group)}
        for name in whole.keys() | parts.keys():
            if isinstance(name, ObjectId):
                yield str(name), name.generation_time, whole.get(name, parts.get(name, 0) * GRID_CHUNK)


class FolderPlace(Place):
    """A folder behind an fsspec URL: ``file:///data/artifacts``, ``memory://name``, ``s3://bucket/folder``.

    Args:
        url: where.
        identity: the database's own word; its folder beneath the URL, so that databases can share one.
    """

    def __init__(self, url: str, identity: str) -> None:
        self.label = url
        self._fs, root = opened(url)
        self._root = f"{root.rstrip('/')}/llmnb-{identity}"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def write(self, chunks: Iterable[bytes]) -> str:
        key = str(ObjectId())
        name, written = f"{key[-2:]}/{key}", 0
        path = self._path(name)
        with _explained(self.label, "writing to"):
            try:
                if needs_folders(self._fs):
                    self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                with self._fs.open(path, "wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                        written += len(chunk)
                    file.flush()
                    if "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)):
                        os.fsync(file.fileno())
                self._fs.invalidate_cache()
                if (found := self._fs.size(path)) != written:
                    raise OSError(f"{found} of {written} bytes are there")
            except BaseException:
                with contextlib.suppress(Exception):  # the error that is on its way says more than a second one
                    self._fs.rm_file(path)
                raise
        return name

    def read(self, name: str) -> Iterator[bytes]:
        with _explained(self.label, "reading from"), self._fs.open(self._path(name), "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        found = {}
        with _explained(self.label, "reading from"):
            self._fs.invalidate_cache()
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found[name] = int(self._fs.size(self._path(name)))
        return found

    def delete(self, name: str) -> None:
        with _explained(self.label, "deleting from"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def names(self) -> Iterator[tuple[str, dt.datetime, int]]:
        with _explained(self.label, "reading from"):
            try:
                self._fs.invalidate_cache()
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return
        for path, facts in found.items():
            folder, _, key = path.rpartition("/")
            try:
                began = ObjectId(key).generation_time
            except InvalidId:  # not ours
                continue
            yield f"{folder.rpartition('/')[2]}/{key}", began, int(facts.get("size") or 0)


def opened(url: str) -> tuple[Any, str]:
    """The file system of an fsspec URL, and the path in it.

    Credentials come from where the file system looks for them itself; for ``s3://`` that is the environment
    (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL`` for another endpoint than Amazon's).

    Raises:
        MissingPackage: s3fs is not installed.
        ArtifactError: there is no file system for this URL, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ValueError, ImportError) as error:
        if isinstance(error, ImportError) and url.startswith(("s3://", "s3a://")):
            raise MissingPackage("s3fs", "s3", "Storage at s3://") from error
        raise ArtifactError(
            "Nothing can be kept at this URL.",
            seen=f"{mask_uri(url)}: {error}",
            todo="install the package that fsspec needs for it",
        ) from error


def absolute(url: str | None) -> str | None:
    """The URL as it is recorded: a plain path becomes an absolute ``file://`` URL; None means GridFS.

    Raises:
        ArtifactError: the URL holds a password, which must not go into the database.
    """
    if url is None or url in ("gridfs", "gridfs://"):
        return None
    if mask_uri(url) != url:
        raise ArtifactError(
            "An artifact URL must not hold a password: it is recorded in the database.",
            seen=mask_uri(url),
            todo="give the credentials in the environment (for s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
        )
    scheme, mark, rest = url.partition("://")
    if not mark or scheme in ("file", "local"):
        return "file://" + os.path.abspath(os.path.expanduser(rest if mark else url))
    return url
