"""Evaluations as records by id: what was measured, on which rows, when. What a figure means is for others to know."""

from __future__ import annotations

import builtins
import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

from ..errors import NotFound
from .clock import Clock
from .tables import Duplicate, Table, plain

__all__ = ["Evaluations"]

_LARGE = ("best", "worst")


class Evaluations:
    """The collection ``llmnb.evaluations``.

    A record: ``_id``, which sorts by time (``20261128-014139-345``), ``created``, and the JSON form of an
    ``Evaluation``.
    """

    def __init__(self, table: Table, clock: Clock) -> None:
        self._table, self._clock = table, clock

    def add(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """Stores an evaluation under a new id.

        Returns:
            Its JSON form with ``id`` and ``created``.
        """
        now = self._clock.now()
        while True:
            id = now.strftime("%Y%m%d-%H%M%S-") + f"{now.microsecond // 1000:03d}"
            record = {**plain(evaluation), "_id": id, "created": now.timestamp()}
            record.pop("id", None)
            select = (evaluation.get("rows") or {}).get("select")
            if select is not None:
                record["rows"]["select"] = json.dumps(select)  # MongoDB takes no field that begins with "$"
            try:
                self._table.insert(record)
            except Duplicate:
                now += dt.timedelta(milliseconds=1)
            else:
                return _read(record)

    def get(self, id: str = "latest") -> dict[str, Any]:
        """The JSON form of one; "latest" is the newest.

        Raises:
            NotFound: with near ids.
        """
        found = self._table.find_one({} if id == "latest" else {"_id": id}, sort=[("_id", -1)])
        if found is None:
            raise NotFound("evaluation", id, [record["id"] for record in self.list()][::-1])
        return _read(found)

    def list(self) -> builtins.list[dict[str, Any]]:
        """All of them without their best and worst rows, newest first."""
        without = {f"models.{name}": 0 for name in _LARGE}
        return [_read(record) for record in self._table.find({}, without, [("_id", -1)])]

    def remove(self, id: str) -> None:
        """Raises NotFound when there is none of that id."""
        if not self._table.delete({"_id": id}):
            self.get(id)


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    found = {**{k: v for k, v in record.items() if k != "_id"}, "id": record["_id"]}
    rows = found.get("rows") or {}
    if isinstance(rows.get("select"), str):
        found["rows"] = {**rows, "select": json.loads(rows["select"])}
    return found
