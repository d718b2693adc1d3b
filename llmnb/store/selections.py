"""Selected documents as a source: read when called, and told by their content without being decoded.

Whoever makes something of documents can keep it under their fingerprint, and find it again for a fraction of the work.
Knows nothing of what is made of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pymongo

from ..query import Document, Select
from . import queries

if TYPE_CHECKING:
    from .opening import Store

__all__ = ["Selection"]


class Selection:
    """The documents of a selection.

    Args:
        store: the database, one that other processes reach by its address.
        select: which documents.
        fold: those of one fold only.

    Attributes:
        keeps: local folder for what is made of documents.
    """

    def __init__(self, store: Store, select: Select, fold: str | None = None) -> None:
        self._store, self._select, self._fold = store, select, fold
        self.keeps: Path = Path(store.home) / "cache" / "rows"

    def __call__(self) -> Iterator[Document]:
        """Reads them."""
        return self._store.rows(self._select, self._fold)

    def fingerprint(self) -> str:
        """Identifies the documents and their order: the bytes that the server sends, which are not decoded."""
        found = self._begun()
        queries.skim(self._store.database, self._select, self._store.safe_uri, self._fold, found.update)
        return found.hexdigest()

    def told(self) -> tuple[Iterator[Document], Callable[[], str]]:
        """Reads them, and says afterwards which fingerprint those had that were read.

        Between a fingerprint and a reading documents may change; what is made of a reading belongs to its own.
        """
        found, store = self._begun(), self._store
        documents = queries.rows(
            store.database, self._select, store.safe_uri, store.valid_share, self._fold, told=found.update
        )
        return documents, found.hexdigest

    def _begun(self) -> Any:
        # What decides beside the bytes: the fold of a document without one, whether its _id is taken out, the driver.
        select = self._select
        about = [self._fold, self._store.valid_share, queries.drops_id(select), pymongo.version]
        return hashlib.blake2b(_SOURCES + json.dumps(about).encode(), digest_size=16)


def _sources() -> bytes:
    """Of what makes documents of bytes: another version of it may make others."""
    modules = (Path(__file__).parent / name for name in ("queries.py", "folds.py", "../query.py"))
    return b"".join(path.read_bytes() for path in modules if path.is_file())


_SOURCES = _sources()
