"""Runs as records: what was asked for, the state it is in, who works on it, how it ended.

A run's state changes in one step that names the state it comes from, so of two that want to change it one wins. A run
that is resumed is the same run in its next *attempt*; what a worker writes names its attempt, so that one of an attempt
before, which comes back after it was given up, changes nothing. This module decides nothing about processes; it writes
what others found.
"""

from __future__ import annotations

import builtins
import datetime as dt
import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import InUse, NotFound, RunError
from .clock import Clock
from .tables import Duplicate, Table, plain

__all__ = ["ACTIVE", "FINAL", "STATES", "Runs"]

ACTIVE = ("starting", "running", "stopping")
STATES = ("queued", *ACTIVE, "done", "failed", "stopped", "lost")
FINAL = frozenset({"done", "failed", "stopped", "lost"})
LETTERS = ("stop", "kill")


def _json(value: Any) -> str | None:
    # As text: a stored query holds keys such as "$oid" and "a.b", which some servers refuse as field names.
    if value is None:
        return None
    return json.dumps(value.to_json() if hasattr(value, "to_json") else value)


def _only(id: str, attempt: int | None) -> dict[str, Any]:
    """The filter of a run, or of one attempt of it. Records of before there were attempts have none: the first."""
    if attempt is None:
        return {"_id": id}
    return {"_id": id, "attempt": {"$in": [1, None]} if attempt == 1 else attempt}


def _read(record: dict[str, Any]) -> dict[str, Any]:
    if isinstance(record.get("config"), str):
        record["config"] = json.loads(record["config"])
    return record


class Runs:
    """The collection ``llmnb.runs``."""

    def __init__(self, table: Table, events: Table, clock: Clock) -> None:
        self._table, self._events, self._clock = table, events, clock

    def create(self, identifier: str, *, model: str, version: int | None, config: Any, **fields: Any) -> dict[str, Any]:
        """A new run in state "queued".

        Args:
            identifier: goes into the id, which sorts by time: ``20261121-180412-345-llm``.
            model: the model's identifier.
            version: the model version that the run will fill.
            config: a TrainConfig, or its JSON form. No secrets.
            **fields: more of the record: job, ray_address, owner, counts, …

        Returns:
            The record.
        """
        word = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(identifier)).strip("-.") or "run"
        created = self._clock.now()
        record: dict[str, Any] = {
            "identifier": str(identifier),
            "model": model,
            "version": version,
            "config": _json(config),
            "job": None,
            "ray_address": None,
            "state": "queued",
            "attempt": 1,
            "owner": None,
            "heartbeat": None,
            "control": None,
            "counts": {},
            "error": None,
            "created": created,
            "started": None,
            "ended": None,
            "last_seq": 0,
            **plain(fields),
        }
        while True:
            stamp = created.strftime("%Y%m%d-%H%M%S-") + f"{created.microsecond // 1000:03d}"
            whole = {"_id": f"{stamp}-{word}", **record, "created": created}
            try:
                self._table.insert(whole)
            except Duplicate:
                created += dt.timedelta(milliseconds=1)
            else:
                return _read(dict(whole))

    def get(self, id: str = "latest") -> dict[str, Any]:
        """The record of a run; "latest" is the newest one.

        Raises:
            NotFound: with near ids.
        """
        if id == "latest":
            found = self._table.find({}, sort=[("_id", -1)], limit=1)
        else:
            found = self._table.find({"_id": id}, limit=1)
        if not found:
            raise NotFound("run", id, self.ids())
        return _read(found[0])

    def ids(self) -> list[str]:
        """Ids, oldest first."""
        return [record["_id"] for record in self._table.find({}, {"_id": 1}, sort=[("_id", 1)])]

    def list(self, limit: int = 0, **equal: Any) -> list[dict[str, Any]]:
        """Records, newest first; those only whose fields equal the given values."""
        return [_read(record) for record in self._table.find(equal, sort=[("_id", -1)], limit=limit)]

    def transition(
        self, id: str, frm: str | Sequence[str], to: str, *, attempt: int | None = None, **fields: Any
    ) -> bool:
        """Moves a run from one of the states ``frm`` to ``to``, in one step.

        ``started`` and ``ended`` are set on the way; ``fields`` are written in the same step.

        Args:
            id: the run.
            frm: a state, or several.
            to: a state.
            attempt: only while the run is in this attempt; None for any.
            **fields: more of the record.

        Returns:
            False when the run is not in one of those states (someone else was first, or it is gone) or attempts.

        Raises:
            RunError: ``to`` is no state.
        """
        if to not in STATES:
            raise RunError(f"{to!r} is not a state of a run.", seen=", ".join(STATES))
        states = [frm] if isinstance(frm, str) else list(frm)
        now = self._clock.now()
        change: dict[str, Any] = {"state": to, **plain(fields)}
        if to in ACTIVE:
            change.setdefault("heartbeat", now)
        if to == "starting":
            change.setdefault("started", now)
        if to in FINAL:
            change.setdefault("ended", now)
        return self._table.change({**_only(id, attempt), "state": {"$in": states}}, {"$set": change}) is not None

    def reopen(self, id: str, attempt: int, **fields: Any) -> dict[str, Any] | None:
        """Moves a run that is over back to "queued", for its next attempt, in one step.

        What belonged to the attempt before is cleared: its error, its worker, its letter.

        Args:
            id: the run.
            attempt: the attempt that was seen to be over. Of several that saw the same one, one gets the next.
            **fields: more of the record; ``config`` as for ``create``.

        Returns:
            The record as it is now, or None: it is not over, someone else was first, or it is gone.
        """
        if "config" in fields:
            fields["config"] = _json(fields["config"])
        worker = ("owner", "heartbeat", "rank0", "job", "runner", "waits_for", "ray_address", "away")
        cleared = dict.fromkeys(("error", "warning", "reason", "ended", "control", *worker))
        change = {**cleared, **plain(fields), "state": "queued", "attempt": attempt + 1}
        wanted = {**_only(id, attempt), "state": {"$in": sorted(FINAL)}}
        found = self._table.change(wanted, {"$set": change})
        return None if found is None else _read(found)

    def holds(self, id: str, attempt: int) -> bool:
        """True while the run is in this attempt: nobody has taken it over."""
        return bool(self._table.find(_only(id, attempt), {"_id": 1}, limit=1))  # half the time of a count

    def beat(self, id: str, attempt: int | None = None) -> bool:
        """Says that the run's worker lives. False when its attempt is over, or the run gone: it should end."""
        alive = {**_only(id, attempt), "state": {"$nin": sorted(FINAL)}}
        return self._table.update(alive, {"$set": {"heartbeat": self._clock.now()}}) > 0

    def ask(self, id: str, letter: str) -> bool:
        """Leaves a letter for the worker: "stop" (save a checkpoint and end) or "kill" (end now).

        Asking twice changes nothing, and a "stop" never takes back a "kill".

        Returns:
            False when the run is over already.

        Raises:
            RunError: another letter.
            NotFound: no such run.
        """
        if letter not in LETTERS:
            raise RunError(f"A run understands no {letter!r}.", seen=", ".join(LETTERS))
        wanted: dict[str, Any] = {"_id": id, "state": {"$nin": sorted(FINAL)}}
        if letter == "stop":
            wanted["control"] = {"$ne": "kill"}
        if self._table.update(wanted, {"$set": {"control": letter}}):
            return True
        return self.get(id)["state"] not in FINAL

    def control(self, id: str, attempt: int | None = None) -> str | None:
        """The letter that waits for the worker: "stop", "kill" or None."""
        found = self._table.find(_only(id, attempt), {"control": 1}, limit=1)
        return found[0].get("control") if found else None

    def update(self, id: str, **fields: Any) -> None:
        """Writes fields of a record; not the state (``transition``) and not the id.

        Raises:
            NotFound: no such run.
            RunError: a field that is not written this way.
        """
        refused = {"_id", "state"} & set(fields)
        if refused:
            raise RunError(f"{refused.pop()!r} is not written by update.", todo="use transition()")
        if "config" in fields:
            fields["config"] = _json(fields["config"])
        if not self._table.update({"_id": id}, {"$set": plain(fields)}):
            raise NotFound("run", id, self.ids())

    def find_lost(self, limit_s: float = 60.0, grace_s: float = 20.0) -> builtins.list[str]:
        """Moves runs to "lost" whose worker has been silent for longer than ``limit_s`` seconds.

        A database that refused every beat for a minute makes living workers look silent. So the first look only leaves
        a doubt on the record, which proves that writes are taken again; who then stays silent for ``grace_s`` is lost.

        Whoever calls may be one of many: each run is moved by one of them, in one step that names the
        heartbeat that was seen, so that a worker that comes back in between stays.

        Returns:
            The ids that this call moved.
        """
        now = self._clock.now()
        cutoff = now - dt.timedelta(seconds=limit_s)
        # Of a run that does not reach this database the courier brings the beats, and judges.
        here = {"away": None, "state": {"$in": list(ACTIVE)}}
        moved = []
        for record in self._table.find({**here, "heartbeat": {"$lt": cutoff}}):
            seen = {"_id": record["_id"], "state": record["state"], "heartbeat": record["heartbeat"]}
            doubted = record.get("doubted")
            if doubted is None or doubted <= record["heartbeat"]:  # none, or of a silence before
                self._table.change(seen, {"$set": {"doubted": now}})
                continue
            if (now - doubted).total_seconds() < grace_s:
                continue
            age = (now - record["heartbeat"]).total_seconds()
            error = {
                "type": "RunError",
                "what": "The run's worker fell silent: it was killed, or its machine went away.",
                "seen": f"no heartbeat for {age:.0f} s (limit {limit_s:.0f} s), state was {record['state']}",
                "todo": "resume the run from its newest checkpoint; look at its log and at the machine's memory",
                "traceback": None,
            }
            if self._table.change(seen, {"$set": {"state": "lost", "ended": now, "error": error}}) is not None:
                moved.append(record["_id"])
        return moved

    def silence(self, record: dict[str, Any], limit_s: float = 60.0) -> float | None:
        """Seconds since an active run's last sign of life, None while they are no more than ``limit_s``."""
        if record.get("state") not in ACTIVE or not record.get("heartbeat") or record.get("away"):
            return None
        age = (self._clock.now() - record["heartbeat"]).total_seconds()
        return age if age > limit_s else None

    def working_on(self, model: str, version: int | None = None) -> builtins.list[str]:
        """Ids of runs that are not over and fill this model (version)."""
        wanted: dict[str, Any] = {"model": model, "state": {"$nin": sorted(FINAL)}}
        if version is not None:
            wanted["version"] = version
        return [record["_id"] for record in self._table.find(wanted, {"_id": 1})]

    def saw(self, id: str, seq: int) -> None:
        """Records that events up to ``seq`` are stored."""
        self._table.update({"_id": id}, {"$max": {"last_seq": seq}})

    def remove(self, id: str) -> None:
        """Removes a run that is over, with its events. Its checkpoints stay.

        Raises:
            NotFound: no such run.
            InUse: it is not over.
        """
        record = self.get(id)
        if self._table.take({"_id": id, "state": {"$in": sorted(FINAL)}}) is None:
            raise InUse(f"The run {id!r} is not over.", seen=record["state"], todo="stop it first")
        self._events.delete({"_id": {"$gt": f"{id}/", "$lt": f"{id}/:"}})
