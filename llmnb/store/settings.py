"""What a database records about itself: where its artifacts go, and which share of documents validates."""

from __future__ import annotations

import uuid
from typing import Any

from ..errors import QueryError
from .folds import VALID_SHARE
from .tables import Duplicate, Table

__all__ = ["Settings"]


class Settings:
    """The collection ``llmnb.settings``: few records, read when needed."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._share: float | None = None

    def _get(self, name: str) -> dict[str, Any]:
        return self._table.find_one({"_id": name}) or {}

    @property
    def artifacts(self) -> str | None:
        """The fsspec URL for new artifacts; None for GridFS."""
        return self._get("artifacts").get("url")

    def set_artifacts(self, url: str | None) -> None:
        """Records where new artifacts go. Those that are stored stay where they are and stay readable."""
        if self.artifacts != url:
            self._table.update({"_id": "artifacts"}, {"$set": {"url": url}}, upsert=True)

    @property
    def identity(self) -> str:
        """A word that no other database has: two databases may keep artifacts at one URL."""
        found = self._get("identity").get("word")
        if found:
            return str(found)
        word = uuid.uuid4().hex[:12]
        try:
            self._table.insert({"_id": "identity", "word": word})
        except Duplicate:  # another process was first
            return str(self._get("identity")["word"])
        return word

    @property
    def valid_share(self) -> float:
        """Share of documents without a fold that validate. Read once for each open store."""
        if self._share is None:
            self._share = float(self._get("folds").get("valid_share", VALID_SHARE))
        return self._share

    def set_valid_share(self, share: float) -> None:
        """Raises QueryError unless 0 <= share < 1."""
        if not 0 <= share < 1:
            raise QueryError("The share of validating documents lies between 0 and 1.", seen=share)
        self._table.update({"_id": "folds"}, {"$set": {"valid_share": float(share)}}, upsert=True)
        self._share = float(share)
