"""Bytes by the sha256 of themselves: equal bytes are stored once, and what is read is proved to be what was stored.

An artifact is a record (``llmnb.artifacts``) that names where its bytes lie. Whoever stores one holds a *claim* on
it until the record that needs it is written; collecting garbage passes over what is claimed. A claim of a process that
died runs out after ``GRACE_S``.

How a removal and a put at the same moment stay safe: each claim raises the artifact's ``generation``. The collector
reads the artifact, then looks for records that name it, then removes it only if the generation is still the one it read
and no claim lives. A put that came before the read is seen by its claim or by its record; one that came after changes
the generation.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from .clock import Clock
from .places import CHUNK, FolderPlace, GridPlace, Place
from .settings import Settings
from .tables import Duplicate, Table, no_space

__all__ = ["GRACE_S", "Artifacts", "Digest"]

GRACE_S = 3600.0
UPLOAD_GRACE_S = 24 * 3600.0  # an upload that has begun may take long; its name says when it began
_SAMPLE = 1 << 16


class Digest:
    """sha256 in a thread of its own, so that hashing (378 MB/s on one core) and moving bytes overlap."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._small = 0

    def update(self, chunk: bytes) -> None:
        """Adds the next bytes."""
        if self._pool is None:
            self._small += len(chunk)
            if self._small <= CHUNK:  # not worth a thread
                self._hash.update(chunk)
                return
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="llmnb-sha256")
        self._waiting.append(self._pool.submit(self._hash.update, chunk))
        while len(self._waiting) > 8:
            self._waiting.popleft().result()

    def hexdigest(self) -> str:
        """The sha256 of all bytes, once; ends the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        return self._hash.hexdigest()

    def __enter__(self) -> Digest:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def digest_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        hash = hashlib.sha256()
        while chunk := file.read(CHUNK):
            hash.update(chunk)
        return hash.hexdigest()


def _sample_of(path: Path) -> str:
    """A word for size and a few bytes. Files with different words differ; equal words say nothing."""
    hash = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in (0, max(0, size // 2), max(0, size - _SAMPLE)):
            file.seek(start)
            hash.update(file.read(_SAMPLE))
    return f"{size}-{hash.hexdigest()[:24]}"


class Artifacts:
    """The collection ``llmnb.artifacts`` and the places where bytes lie.

    Args:
        table: of records.
        database: for GridFS.
        settings: tells where new bytes go.
        clock: the database's time.
        named: gives the digests that records name: all, or those among the given ones.
        url: where new bytes go, when the caller said so for this process.
    """

    def __init__(self, table: Table, database: Any, settings: Settings, clock: Clock) -> None:
        self._table, self._database, self._settings, self._clock = table, database, settings, clock
        self.named: Callable[[Iterable[str] | None], set[str]] = lambda among: set()
        self._places: dict[str, Place] = {}

    # -- places ---------------------------------------------------------------------------------------------

    def _place(self, label: str | None) -> Place:
        label = label or "gridfs"
        if label not in self._places:
            if label == "gridfs":
                self._places[label] = GridPlace(self._database)
            else:
                self._places[label] = FolderPlace(label, self._settings.identity)
        return self._places[label]

    @property
    def where(self) -> str:
        """Where new artifacts go: "gridfs" or a URL."""
        return self._settings.artifacts or "gridfs"

    # -- claims ---------------------------------------------------------------------------------------------

    @staticmethod
    def new_claim() -> str:
        """A word for one piece of work that stores artifacts."""
        return uuid.uuid4().hex

    def _claimed(self, digests: Iterable[str], claim: str) -> set[str]:
        """Claims those that are stored, and says which are."""
        wanted = sorted(digests)
        if not wanted:
            return set()
        mark = {"id": claim, "at": self._clock.now()}
        change = {"$push": {"claims": mark}, "$inc": {"generation": 1}}
        self._table.update({"_id": {"$in": wanted}}, change, many=True)
        places: dict[str, list[dict[str, Any]]] = {}
        for record in self._table.find({"_id": {"$in": wanted}, "claims.id": claim}):
            places.setdefault(record["place"], []).append(record)
        held = set()
        for label, records in places.items():
            sizes = self._place(label).sizes([record["name"] for record in records])
            for record in records:
                if sizes.get(record["name"]) == record["size"]:
                    held.add(record["_id"])
                else:  # the record is there and its bytes are not (someone emptied the folder): they are stored anew
                    self._table.take({"_id": record["_id"], "name": record["name"]})
        return held

    def release(self, claim: str) -> None:
        """Lets go of everything that was stored under a claim; records name it by now, or nothing does."""
        self._table.update({"claims.id": claim}, {"$pull": {"claims": {"id": claim}}}, many=True)

    def undo(self, claim: str) -> None:
        """Lets go of what was stored under a claim, and removes what nobody else needs of it."""
        stored = {record["_id"] for record in self._table.find({"claims.id": claim}, {"_id": 1})}
        self.release(claim)
        self.collect(stored)

    # -- putting --------------------------------------------------------------------------------------------

    def put_file(self, path: str | os.PathLike[str], claim: str | None = None) -> str:
        """``put_files`` of one file; its sha256."""
        return self.put_files([path], claim)[0]

    def put_files(self, paths: Iterable[str | os.PathLike[str]], claim: str | None = None) -> list[str]:
        """Stores the bytes of files, unless equal ones are stored. What can be asked once is asked once for all.

        Args:
            paths: the files.
            claim: holds the bytes until ``release``; without one they are held for ``GRACE_S`` seconds.

        Returns:
            The sha256 of each file's bytes, in hexadecimal.

        Raises:
            ArtifactError: no space left; a file cannot be read or changed meanwhile.
            DatabaseError: the database refuses.
        """
        files, claim = [Path(path) for path in paths], claim or self.new_claim()
        try:
            samples = {path: _sample_of(path) for path in files}
            stored = self._table.find({"sample": {"$in": sorted(set(samples.values()))}}, {"sample": 1})
            alike = {record["sample"] for record in stored}
            # Only when something alike is stored can reading it all first save the upload.
            digests = {path: digest_of(path) for path, sample in samples.items() if sample in alike}
            held = self._claimed(set(digests.values()), claim)
            missing = [path for path in samples if digests.get(path) not in held]
            if missing:
                place = self._place(self._settings.artifacts)
                digests |= {path: self._upload(path, samples[path], claim, place) for path in missing}
        except OSError as error:
            raise ArtifactError("A file that should be stored cannot be read.", seen=error) from error
        return [digests[path] for path in files]

    def _upload(self, path: Path, sample: str, claim: str, place: Place) -> str:
        size, read = path.stat().st_size, 0
        with Digest() as running:

            def hashed() -> Iterator[bytes]:
                nonlocal read
                for chunk in _pieces(path):
                    running.update(chunk)
                    read += len(chunk)
                    yield chunk

            name = place.write(hashed())
            digest = running.hexdigest()
        now = self._clock.now()
        record = {
            "_id": digest,
            "size": size,
            "sample": sample,
            "place": place.label,
            "name": name,
            "created": now,
            "generation": 1,
            "claims": [{"id": claim, "at": now}],
        }
        try:
            if read != size:
                raise ArtifactError("A file changed while it was stored.", seen=path, todo="store it again")
            while True:
                try:
                    self._table.insert(record)
                    return digest
                except Duplicate:  # equal bytes were stored at the same moment; theirs stay
                    if self._claimed([digest], claim):
                        place.delete(name)
                        return digest
        except BaseException:
            # Unless the record stands after all (the answer got lost), the bytes are nobody's.
            with contextlib.suppress(Exception):
                if not self._table.find({"_id": digest, "name": name}, {"_id": 1}):
                    place.delete(name)
            raise

    # -- reading --------------------------------------------------------------------------------------------

    def _record(self, digest: str) -> dict[str, Any]:
        record = self._table.find_one({"_id": digest})
        if record is None:
            raise ArtifactError("These bytes are not stored.", seen=f"sha256 {digest}")
        return record

    def exists(self, digest: str) -> bool:
        """True when bytes with this sha256 are stored."""
        return self._table.count({"_id": digest}) > 0

    def size(self, digest: str) -> int:
        """How many bytes. Raises ArtifactError when they are not stored."""
        return int(self._record(digest)["size"])

    def fetch(self, digest: str, to: str | os.PathLike[str]) -> Path:
        """Writes stored bytes to a file, which appears only when its sha256 is proved.

        Raises:
            ArtifactError: the bytes are missing or damaged; no space left here.
        """
        record, to = self._record(digest), Path(to)
        place = self._place(record["place"])
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=to.parent, prefix=f".{to.name}.", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file, Digest() as running:
                    for chunk in place.read(record["name"]):
                        running.update(chunk)
                        file.write(chunk)
                    seen = running.hexdigest()
                if seen != digest:
                    raise ArtifactError(
                        "Stored bytes are damaged: their sha256 is not the one they were stored under.",
                        seen=f"{seen} instead of {digest} ({to.name}, in {place.label})",
                        todo="remove the checkpoint and train or store it again",
                    )
                os.replace(part, to)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
        except OSError as error:
            what = "No space left on this machine for" if no_space(error) else "This machine cannot write"
            raise ArtifactError(f"{what} {to.name}.", seen=f"{to.parent}: {error}") from error
        return to

    # -- what is no longer needed ---------------------------------------------------------------------------

    def collect(self, among: Iterable[str] | None = None, dry_run: bool = False) -> dict[str, int]:
        """Removes artifacts that no record names and nobody claims.

        Args:
            among: only these digests; None for all.
            dry_run: count only.

        Returns:
            ``files`` and ``bytes``.
        """
        wanted = None if among is None else list(among)
        stale = self._clock.now() - dt.timedelta(seconds=GRACE_S)
        unclaimed = {"claims": {"$not": {"$elemMatch": {"at": {"$gt": stale}}}}}
        candidates = self._table.find({**({} if wanted is None else {"_id": {"$in": wanted}}), **unclaimed})
        needed = self.named(wanted)  # after the artifacts were read: see the top of this file
        gone = {"files": 0, "bytes": 0}
        for record in candidates:
            if record["_id"] in needed:
                continue
            if not dry_run:
                same = {"_id": record["_id"], "generation": record["generation"], "name": record["name"]}
                if self._table.take({**same, **unclaimed}) is None:
                    continue
                self._place(record["place"]).delete(record["name"])
            gone["files"] += 1
            gone["bytes"] += record["size"]
        return gone

    def gc(self, dry_run: bool = False) -> dict[str, int]:
        """Removes what no record names, uploads that broke off included. Safe beside a running put.

        Returns:
            ``files`` and ``bytes`` that were (or with ``dry_run`` would be) removed.
        """
        gone = self.collect(dry_run=dry_run)
        old = self._clock.now() - dt.timedelta(seconds=UPLOAD_GRACE_S)
        labels = {"gridfs", self.where} | {r["place"] for r in self._table.find({}, {"place": 1})}
        for label in labels:
            place = self._place(label)
            began = [(name, size) for name, at, size in place.names() if at < old]
            known = {record["name"] for record in self._table.find({"place": label}, {"name": 1})}
            for name, size in began:
                if name in known:
                    continue
                if not dry_run:
                    place.delete(name)
                gone["files"] += 1
                gone["bytes"] += size
        return gone

    def stats(self) -> dict[str, Any]:
        """``files``, ``bytes`` and ``where`` new ones go."""
        sizes = [record["size"] for record in self._table.find({}, {"size": 1})]
        return {"files": len(sizes), "bytes": sum(sizes), "where": self.where}
