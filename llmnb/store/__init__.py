"""MongoDB and the storage of artifacts: the only room that imports pymongo, bson, gridfs, mongomock or fsspec.

It knows documents, runs, events, checkpoints and model versions as records and bytes. It knows neither torch
nor Ray nor a notebook. The names below are loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .opening import Store as Store
    from .opening import open_store as open_store

__all__ = ["Store", "open_store"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import opening

        return getattr(opening, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
