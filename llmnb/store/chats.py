"""Conversations that a person wants to keep, as records by name. What is in one is for others to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InUse, NotFound
from .clock import Clock
from .tables import Duplicate, Table, plain

__all__ = ["Chats"]


class Chats:
    """The collection ``llmnb.chats``.

    A record: ``_id`` (the name), ``id`` (of the conversation), ``chat`` (its JSON form), ``turns``, ``speakers``,
    ``created``, ``changed``.
    """

    def __init__(self, table: Table, clock: Clock) -> None:
        self._table, self._clock = table, clock

    def keep(self, name: str, chat: Mapping[str, Any]) -> None:
        """Writes a conversation under a name, over an earlier state of the same one.

        Raises:
            InUse: another conversation has that name.
        """
        now = self._clock.now()
        speakers = {reply["speaker"]: None for turn in chat["turns"] for reply in turn["replies"]}
        content = plain({"chat": chat, "turns": len(chat["turns"]), "speakers": list(speakers), "changed": now})
        if self._table.update({"_id": name, "id": chat["id"]}, {"$set": content}):
            return
        try:
            self._table.insert({"_id": name, "id": chat["id"], "created": now, **content})
        except Duplicate:
            if self._table.update({"_id": name, "id": chat["id"]}, {"$set": content}):
                return  # somebody else kept it at the same moment
            raise InUse(
                f"Another conversation is kept as {name!r}.",
                todo=f"choose another name, or go on with that one: %%llm_chat --history {name}",
            ) from None

    def get(self, name: str) -> dict[str, Any]:
        """The record of that name.

        Raises:
            NotFound: with near names.
        """
        found = self._table.find_one({"_id": name})
        if found is None:
            raise NotFound("kept chat", name, [record["_id"] for record in self.list()][::-1])
        return found

    def list(self) -> list[dict[str, Any]]:
        """All records without their texts, newest change first."""
        return self._table.find({}, {"chat": 0}, [("changed", -1), ("_id", 1)])

    def remove(self, name: str) -> None:
        """Raises NotFound when there is none of that name."""
        if not self._table.delete({"_id": name}):
            self.get(name)
