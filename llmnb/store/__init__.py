"""MongoDB and the storage of artifacts: the only room that imports pymongo, bson, gridfs, mongomock or fsspec.

It knows documents, runs, events, checkpoints and model versions as records and bytes. It knows neither torch
nor Ray nor a notebook. The names below are loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import FolderStore as FolderStore
    from .folder import open_folder as open_folder
    from .opening import Store as Store
    from .opening import open_store as open_store

_HOMES = {"FolderStore": "folder", "Store": "opening", "open_folder": "folder", "open_store": "opening"}

__all__ = ["FolderStore", "Store", "open_folder", "open_store"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
