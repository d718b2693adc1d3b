"""Checkpoints: folders of files, stored by digest, with a record that is written last.

A checkpoint's *loading* files (weights, adapter, tokenizer, configuration) stay as long as its record; the *resume*
files (optimizer, scheduler, RNG, position in the data) are kept for an experiment's newest step only. This module
never reads what is in a file.
"""

from __future__ import annotations

import builtins
import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import ArtifactError, InUse, LlmnbError, NotFound
from .artifacts import Artifacts, digest_of
from .clock import Clock
from .tables import Table, no_space, plain

__all__ = ["RESUME_PATTERNS", "Checkpoints"]

#: Files that only resuming needs, as patterns over the path within the folder: of transformers' Trainer,
#: accelerate, FSDP and DeepSpeed.
RESUME_PATTERNS = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_*/*",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_*/*",
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "rng_state*.pth",
    "random_states_*.pkl",
    "trainer_state.json",
    "training_args.bin",
    "sampler*.bin",
    "latest",
    "zero_to_fp32.py",
    "global_step*/*",
)


def is_resume_file(path: str) -> bool:
    """True for a path (within the folder, with "/") that only resuming needs."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in RESUME_PATTERNS)


def _manifest_digest(files: Iterable[Mapping[str, Any]]) -> str:
    listed = sorted((file["path"], file["sha256"]) for file in files)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def split_name(name: str) -> tuple[str, int]:
    """("experiment", step) of "experiment/step".

    Raises:
        NotFound: it is no such name.
    """
    experiment, _, step = str(name).rpartition("/")
    if not experiment or not step.isdigit():
        raise NotFound("checkpoint", name, todo="write experiment/step")
    return experiment, int(step)


def _checkpoint(record: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint.from_dict(record)


class Checkpoints:
    """The collection ``llmnb.checkpoints``.

    Args:
        table: of records.
        artifacts: holds the bytes.
        clock: the database's time.
        cache: local folder for fetched checkpoints.
    """

    def __init__(self, table: Table, artifacts: Artifacts, clock: Clock, cache: Path) -> None:
        self._table, self._artifacts, self._clock, self._cache = table, artifacts, clock, cache
        self.users: Callable[[str], list[str]] = lambda name: []
        artifacts.named = self._named

    # -- writing --------------------------------------------------------------------------------------------

    def put(
        self,
        experiment: str,
        step: int,
        folder: str | os.PathLike[str],
        *,
        kind: str = "adapter",
        metrics: Mapping[str, float] | None = None,
        base: str = "",
        base_fingerprint: str = "",
        best: bool = False,
    ) -> Checkpoint:
        """Stores a folder as the checkpoint of a step: the bytes first, the record last.

        Storing the same step again replaces it. Resume files of the experiment's other steps are let go.

        Args:
            experiment: the run's id.
            step: optimizer steps done.
            folder: what is stored, sub-folders included.
            kind: "adapter", "model" or "classifier".
            metrics: the newest evaluation; NaN and Inf are kept.
            base: the base model's hub id or path.
            base_fingerprint: identifies the base's weights.
            best: True when it is the run's best so far; then no other step of the run is.

        Raises:
            ArtifactError: the folder is empty or unreadable; no space left. Nothing stored before is lost.
            DatabaseError: the database refuses.
        """
        folder, claim = Path(folder), self._artifacts.new_claim()
        paths = sorted(path.relative_to(folder).as_posix() for path in _files_in(folder))
        if not any(not is_resume_file(path) for path in paths):
            raise ArtifactError(
                "This folder holds no weights to store.", seen=folder, todo="save the model there first"
            )
        try:
            digests = self._artifacts.put_files([folder / path for path in paths], claim)
            stored = [
                {"path": path, "sha256": digest, "size": (folder / path).stat().st_size}
                for path, digest in zip(paths, digests, strict=True)
            ]
            record = self._new_record(experiment, int(step), stored)
            record.update(
                kind=kind,
                base=str(base),
                base_fingerprint=base_fingerprint,
                metrics=plain(metrics or {}),
                best=bool(best),
            )
            before = self._table.find_one({"_id": record["_id"]})
            self._table.replace(record)
        except BaseException:
            with contextlib.suppress(LlmnbError):  # the error that is on its way says more than a second one
                self._artifacts.undo(claim)
            raise
        self._artifacts.release(claim)
        if best:
            self.mark_best(experiment, step)
        self._let_go(experiment, int(step), record["resumable"], before)
        return _checkpoint(record)

    def _new_record(self, experiment: str, step: int, stored: list[dict[str, Any]]) -> dict[str, Any]:
        files = [file for file in stored if not is_resume_file(file["path"])]
        resume = [file for file in stored if is_resume_file(file["path"])]
        return {
            "_id": f"{experiment}/{step}",
            "experiment": experiment,
            "step": step,
            "digest": _manifest_digest(files),
            "size": sum(file["size"] for file in files),
            "created": self._clock.now().timestamp(),
            "resumable": bool(resume),
            "files": files,
            "resume_files": resume,
        }

    def _let_go(self, experiment: str, step: int, resumable: bool, before: Mapping[str, Any] | None) -> None:
        """Frees what a new checkpoint made unnecessary."""
        dropped = [] if before is None else [*before["files"], *before["resume_files"]]
        if resumable:
            others = {"experiment": experiment, "step": {"$ne": step}, "resumable": True}
            for record in self._table.find(others):
                self._table.update({"_id": record["_id"]}, {"$set": {"resumable": False, "resume_files": []}})
                dropped += record["resume_files"]
        if dropped:
            self._artifacts.collect({file["sha256"] for file in dropped})

    def mark_best(self, experiment: str, step: int) -> None:
        """Makes a step the experiment's best, and no other.

        Raises:
            NotFound: there is no such checkpoint.
        """
        if not self._table.update({"experiment": experiment, "step": int(step)}, {"$set": {"best": True}}):
            raise NotFound("checkpoint", f"{experiment}/{step}", self.names(experiment) or self.experiments())
        others = {"experiment": experiment, "step": {"$ne": int(step)}, "best": True}
        self._table.update(others, {"$set": {"best": False}}, many=True)

    def remove(self, experiment: str, step: int) -> None:
        """Removes a checkpoint, and its bytes where nothing else names them.

        Raises:
            NotFound: there is none.
            InUse: a model version points at it.
        """
        name = f"{experiment}/{int(step)}"
        # The mark comes first and the look second; Models.point does it the other way round.
        if not self._table.update({"_id": name}, {"$set": {"removing": True}}):
            raise NotFound("checkpoint", name, self.names(experiment) or self.experiments())
        users = self.users(name)
        if users:
            self._table.update({"_id": name}, {"$unset": {"removing": ""}})
            raise InUse(
                f"The checkpoint {name} is in use.",
                seen="model " + ", model ".join(users),
                todo="remove that model first, or let it point at another checkpoint",
            )
        record = self._table.take({"_id": name})
        if record is not None:
            self._artifacts.collect({file["sha256"] for file in [*record["files"], *record["resume_files"]]})

    # -- reading --------------------------------------------------------------------------------------------

    def _named(self, among: Iterable[str] | None) -> set[str]:
        filter: dict[str, Any] = {}
        if among is not None:
            digests = {"$in": list(among)}
            filter = {"$or": [{"files.sha256": digests}, {"resume_files.sha256": digests}]}
        records = self._table.find(filter, {"files.sha256": 1, "resume_files.sha256": 1})
        return {file["sha256"] for record in records for file in [*record["files"], *record["resume_files"]]}

    def has(self, name: str) -> bool:
        """True when "experiment/step" is there and not being removed."""
        return self._table.count({"_id": name, "removing": {"$exists": False}}) > 0

    def names(self, experiment: str | None = None) -> list[str]:
        """Names ("experiment/step") of all checkpoints, or of one experiment's, by time and step."""
        names = (str(c) for e in ([experiment] if experiment else self.experiments()) for c in self.list(e))
        return list(names)

    def experiments(self) -> list[str]:
        """Ids of experiments that have a checkpoint, oldest first."""
        first: dict[str, float] = {}
        for record in self._table.find({}, {"experiment": 1, "created": 1}):
            name = record["experiment"]
            first[name] = min(record["created"], first.get(name, record["created"]))
        return sorted(first, key=lambda name: (first[name], name))

    def list(self, experiment: str) -> list[Checkpoint]:
        """An experiment's checkpoints by step; empty when there are none."""
        return [_checkpoint(record) for record in self._table.find({"experiment": experiment}, sort=[("step", 1)])]

    def get(self, experiment: str, step: int | None = None) -> Checkpoint:
        """One checkpoint; the last step's when none is named. ``get("experiment/step")`` is understood too.

        Raises:
            NotFound: with near names.
        """
        return _checkpoint(self.record(experiment, step))

    def record(self, experiment: str, step: int | None) -> dict[str, Any]:
        """What is stored about a checkpoint. Arguments and raises as for ``get``."""
        wanted: dict[str, Any] = {"experiment": experiment}
        if step is not None:
            wanted["step"] = int(step)
        found = self._table.find(wanted, sort=[("step", -1)], limit=1)
        if not found and step is None and "/" in experiment:
            return self.record(*split_name(experiment))
        if not found:
            steps = self.names(experiment)
            if steps:
                raise NotFound("checkpoint", f"{experiment}/{step}", steps)
            raise NotFound("checkpoint", experiment, self.experiments())
        return found[0]

    # -- fetching -------------------------------------------------------------------------------------------

    def fetch(self, checkpoint: Checkpoint, resume: bool = False) -> Path:
        """A local folder with the checkpoint's files, each proved by its sha256.

        It lies in the cache under the checkpoint's digest; a second fetch costs a look at sizes and times, and files
        that changed in the cache since they were proved are fetched again.

        Args:
            checkpoint: which one.
            resume: with the files that resuming needs.

        Raises:
            NotFound: it was removed.
            ArtifactError: bytes are missing or damaged; it cannot be resumed; no space left here.
        """
        record = self.record(checkpoint.experiment, checkpoint.step)
        files, name = list(record["files"]), record["digest"]
        if resume:
            if not record["resume_files"]:
                raise ArtifactError(
                    f"The checkpoint {checkpoint} cannot be resumed: its optimizer state is not kept.",
                    seen=[str(c) for c in self.list(checkpoint.experiment) if c.resumable],
                    todo="resume from the experiment's newest checkpoint",
                )
            files += record["resume_files"]
            name = f"{name[:32]}-{_manifest_digest(files)[:32]}"
        place = self._cache / name
        if not _proved(place, files):
            self._place(place, files)
        return place

    def _place(self, place: Path, files: builtins.list[dict[str, Any]]) -> None:
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            _sweep(self._cache)
            part = Path(tempfile.mkdtemp(dir=self._cache, prefix=".part-"))
        except OSError as error:
            raise ArtifactError("The cache folder cannot be written.", seen=error) from error
        try:
            for file in files:
                self._artifacts.fetch(file["sha256"], part / _inside(file["path"]))
            _write_proof(part, files)
            _swap_in(part, place, files)
        except OSError as error:
            what = "No space left for the cache." if no_space(error) else "The cache folder cannot be written."
            raise ArtifactError(what, seen=error) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


_PROOF = ".llmnb-proved.json"
_LEFT_OVER_S = 24 * 3600.0


def _sweep(cache: Path) -> None:
    """Removes what fetches that were killed long ago left half-done."""
    for left in (*cache.glob(".part-*"), *cache.glob(".old-*")):
        with contextlib.suppress(OSError):  # another process may be at the same
            if time.time() - left.stat().st_mtime > _LEFT_OVER_S:
                shutil.rmtree(left, ignore_errors=True)


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or parts.name == _PROOF:
        raise ArtifactError("A stored checkpoint names a file outside its folder.", seen=path)
    return path


def _files_in(folder: Path) -> Iterator[Path]:
    """A folder's files, without the proof that a fetch left in it."""
    return (path for path in folder.rglob("*") if path.is_file() and path.name != _PROOF)


def _stamp(path: Path) -> builtins.list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def _write_proof(folder: Path, files: builtins.list[dict[str, Any]]) -> None:
    stamps = {file["path"]: [file["sha256"], *_stamp(folder / file["path"])] for file in files}
    (folder / _PROOF).write_text(json.dumps(stamps), encoding="utf-8")


def _proved(folder: Path, files: builtins.list[dict[str, Any]]) -> bool:
    """True when every file is the one whose sha256 was proved: by its size and time, else by reading it again."""
    try:
        stamps = json.loads((folder / _PROOF).read_text(encoding="utf-8"))
        for file in files:
            path = folder / _inside(file["path"])
            if stamps.get(file["path"]) != [file["sha256"], *_stamp(path)] and digest_of(path) != file["sha256"]:
                return False
    except (OSError, ValueError):
        return False
    return True


def _swap_in(part: Path, place: Path, files: builtins.list[dict[str, Any]]) -> None:
    """Puts a finished folder in its place. Another process may do the same; both hold the same bytes."""
    for _ in range(10):
        try:
            os.rename(part, place)
            return
        except OSError:
            if _proved(place, files):
                return
            # A damaged one is in the way: aside with it first, so that the place is never half full.
            aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=".old-"))
            try:
                os.rename(place, aside / "it")
            except FileNotFoundError:
                pass
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{place} cannot be replaced")
