"""The one place that reads the environment.

=================  ==========================================================================
``LLMNB_URI``      the database of ``connect()``; without it an embedded mongod is used
``LLMNB_HOME``     folder of the embedded mongod and of the cache; default ``./.llmnb``
``LLMNB_MONGOD``   path of the mongod program for the embedded server
``LLMNB_ARTIFACTS``  where new artifacts go (an fsspec URL), when the caller does not say
=================  ==========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Environment", "for_child", "read"]


@dataclass(frozen=True)
class Environment:
    """What the environment says; None where it says nothing. The URI may hold a password."""

    uri: str | None = field(repr=False)
    home: Path
    mongod: str | None
    artifacts: str | None = field(repr=False)
    search_path: str


def read(source: Mapping[str, str] | None = None) -> Environment:
    """The settings in ``source`` (default: this process's environment). Empty values count as unset."""
    values = os.environ if source is None else source
    return Environment(
        uri=values.get("LLMNB_URI") or None,
        home=Path(values.get("LLMNB_HOME") or ".llmnb").expanduser(),
        mongod=values.get("LLMNB_MONGOD") or None,
        artifacts=values.get("LLMNB_ARTIFACTS") or None,
        search_path=values.get("PATH", os.defpath),
    )


def for_child(source: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment for a program that needs to know nothing of us: no URI, no tokens."""
    values = os.environ if source is None else source
    return {name: values[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if name in values}
