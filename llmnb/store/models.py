"""Versions of models as records: what a model is made of, and which checkpoint holds its weights.

A version can be loaded once it points at a checkpoint (or needs none). It never owns bytes: two versions may
point at one checkpoint.
"""

from __future__ import annotations

import json
from typing import Any

from ..config import ModelSpec, TrainConfig
from ..errors import InUse, NotFound
from .checkpoints import Checkpoints
from .clock import Clock
from .runs import Runs
from .tables import Duplicate, Table

__all__ = ["Models"]


def _read(record: dict[str, Any]) -> dict[str, Any]:
    for name in ("spec", "config"):
        if isinstance(record.get(name), str):
            record[name] = json.loads(record[name])
    return record


class Models:
    """The collections ``llmnb.models`` and ``llmnb.counters``.

    A record: ``identifier``, ``version``, ``spec`` and ``config`` (JSON forms), ``checkpoint``
    ("experiment/step" or None), ``ready`` (can be loaded), ``created``.
    """

    def __init__(self, table: Table, counters: Table, runs: Runs, clock: Clock) -> None:
        self._table, self._counters, self._runs, self._clock = table, counters, runs, clock
        self.checkpoints: Checkpoints | None = None

    def add(self, spec: ModelSpec, config: TrainConfig | None = None) -> int:
        """A new version of ``spec.identifier``, which cannot be loaded yet (``point`` or ``ready``).

        Returns:
            The version, 1, 2, 3, …; callers at the same time never get the same one, and a number is not
            given again after its version was removed.
        """
        identifier = spec.identifier
        record = {
            "identifier": identifier,
            "spec": json.dumps(spec.to_json()),
            "config": None if config is None else json.dumps(config.to_json()),
            "checkpoint": None,
            "ready": False,
            "created": self._clock.now(),
        }
        while True:
            try:
                counter = self._counters.change({"_id": f"model/{identifier}"}, {"$inc": {"last": 1}}, upsert=True)
                version = int((counter or {})["last"])
                self._table.insert({"_id": f"{identifier}/{version}", **record, "version": version})
            except Duplicate:  # two made the counter at the same moment, or it fell behind
                continue
            return version

    def _one(self, identifier: str, version: int) -> dict[str, Any]:
        record = self._table.find_one({"identifier": identifier, "version": int(version)})
        if record is None:
            known = self.identifiers()
            if identifier not in known:
                raise NotFound("model", identifier, known)
            raise NotFound(f"version of the model {identifier!r}", version, map(str, self.versions(identifier)))
        return record

    def point(self, identifier: str, version: int, checkpoint: str) -> None:
        """Gives a version the weights of a checkpoint ("experiment/step"); from then on it can be loaded.

        Raises:
            NotFound: there is no such version or checkpoint.
        """
        before = self._one(identifier, version)
        self._table.update({"_id": before["_id"]}, {"$set": {"checkpoint": str(checkpoint), "ready": True}})
        # The pointer comes first and the look second; Checkpoints.remove does it the other way round, so of a
        # removal and a pointer at the same moment at least one sees the other.
        if self.checkpoints is not None and not self.checkpoints.has(str(checkpoint)):
            back = {"checkpoint": before["checkpoint"], "ready": before["ready"]}
            self._table.update({"_id": before["_id"], "checkpoint": str(checkpoint)}, {"$set": back})
            raise NotFound("checkpoint", checkpoint, self.checkpoints.names())

    def ready(self, identifier: str, version: int) -> None:
        """Marks a version that can be loaded as it is: a model without training."""
        self._table.update({"_id": self._one(identifier, version)["_id"]}, {"$set": {"ready": True}})

    def get(self, identifier: str, version: int | None = None) -> dict[str, Any]:
        """The record of a version; of the newest one that can be loaded, when none is named.

        Raises:
            NotFound: with near names; or no version of it can be loaded yet.
        """
        if version is not None:
            return _read(self._one(identifier, version))
        found = self._table.find({"identifier": identifier, "ready": True}, sort=[("version", -1)], limit=1)
        if found:
            return _read(found[0])
        versions = self.versions(identifier)
        if not versions:
            raise NotFound("model", identifier, self.identifiers())
        raise NotFound(
            "loadable version of the model",
            identifier,
            [f"version {v}, not trained yet" for v in versions],
            todo="wait for its run, or look at why it failed with db.runs()",
        )

    def identifiers(self) -> list[str]:
        """Names of models, sorted."""
        return sorted({record["identifier"] for record in self._table.find({}, {"identifier": 1})})

    def versions(self, identifier: str) -> list[int]:
        """All versions of a model, oldest first, loadable or not."""
        return [r["version"] for r in self._table.find({"identifier": identifier}, {"version": 1}, [("version", 1)])]

    def remove(self, identifier: str, version: int | None = None) -> None:
        """Removes one version, or the model with all of them. Checkpoints stay.

        Raises:
            NotFound: there is none.
            InUse: a run is filling it.
        """
        wanted = [self._one(identifier, version)["version"]] if version is not None else self.versions(identifier)
        if not wanted:
            raise NotFound("model", identifier, self.identifiers())
        busy = [run for number in wanted for run in self._runs.working_on(identifier, number)]
        if busy:
            raise InUse(f"The model {identifier!r} is being trained.", seen=", ".join(busy), todo="stop the run first")
        self._table.delete({"identifier": identifier, "version": {"$in": wanted}})

    def pointing_at(self, checkpoint: str) -> list[str]:
        """Model versions ("identifier/version") that need a checkpoint: as weights, or as their adapter."""
        return self.holders().get(checkpoint, [])

    def holders(self) -> dict[str, list[str]]:
        """Checkpoints ("experiment/step") that are needed, with the model versions that need them."""
        found: dict[str, list[str]] = {}
        for record in self._table.find({}, {"identifier": 1, "version": 1, "checkpoint": 1, "spec": 1}):
            for name in {record.get("checkpoint"), _read(record)["spec"].get("adapter_id")} - {None}:
                found.setdefault(str(name), []).append(f"{record['identifier']}/{record['version']}")
        return found
