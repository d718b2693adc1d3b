"""Every error llmnb raises, in one tree.

An error says what happened (``what``), what was seen (``seen``) and what to do (``todo``). Every error
pickles, because errors cross process borders. This module knows nothing else of the house::

    LlmnbError
    ├── ConfigError          a setting is wrong; carries every fault at once
    ├── QueryError           a query value that cannot be built, stored or run
    ├── NotFound             a name that is not in the database (offers near names)
    ├── InUse                something cannot be removed while something else points at it
    ├── DatabaseError        the database refused or vanished
    │   ├── ConnectError     wrong URI, nobody listens, wrong password
    │   └── EmbeddedError    the embedded mongod cannot be found or started
    ├── ArtifactError        stored bytes are missing or not what their digest says; no space left
    ├── DataError            the selected documents cannot be trained on
    ├── ModelError           a base model, tokenizer or adapter cannot be loaded
    │   └── AdapterMismatch  an adapter was trained on another base
    ├── LaunchError          a background process or Ray cluster could not be started or reached
    ├── RunError             a run failed, was lost, or is in a state that forbids the request
    └── MissingPackage       an optional package is needed for this (names the extra)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AdapterMismatch",
    "ArtifactError",
    "ConfigError",
    "ConnectError",
    "DataError",
    "DatabaseError",
    "EmbeddedError",
    "Fault",
    "InUse",
    "LaunchError",
    "LlmnbError",
    "MissingPackage",
    "ModelError",
    "NotFound",
    "QueryError",
    "RunError",
    "near",
]


def near(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Names of ``known`` that look like ``name``, best first."""
    return difflib.get_close_matches(str(name), list(known), n=n, cutoff=0.6)


def _rebuild(cls: type[LlmnbError], args: tuple[Any, ...], state: dict[str, Any]) -> LlmnbError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class LlmnbError(Exception):
    """The root of the tree.

    Args:
        what: what happened, one sentence.
        seen: what was found, when that helps (a value, a list of names).
        todo: what to do about it.
    """

    def __init__(self, what: str, *, seen: object = None, todo: str | None = None) -> None:
        self.what = what
        self.seen = None if seen is None else str(seen)
        self.todo = todo
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.seen is not None:
            parts.append(f"  Seen: {self.seen}")
        if self.todo:
            parts.append(f"  To do: {self.todo}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


@dataclass(frozen=True)
class Fault:
    """One wrong setting: ``option`` as the person wrote it, what is wrong, what to write instead."""

    option: str
    what: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.option}: {self.what}" + (f" — {self.todo}" if self.todo else "")


class ConfigError(LlmnbError):
    """One or more settings are wrong; ``faults`` holds all of them."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        head = "1 setting is wrong" if count == 1 else f"{count} settings are wrong"
        super().__init__(head + ":\n" + "\n".join(f"  - {fault}" for fault in self.faults))


class QueryError(LlmnbError):
    """A query cannot be built, serialised or run."""


class NotFound(LlmnbError):
    """A name that is not there.

    Args:
        kind: "model", "checkpoint", "run", "collection", …
        name: the name that was asked for.
        known: the names there are; near ones are offered.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str] = (), todo: str | None = None) -> None:
        known = list(known)
        close = near(str(name), known)
        self.kind, self.name = kind, str(name)
        if todo is None and close:
            todo = "did you mean " + " or ".join(repr(c) for c in close) + "?"
        listed = ", ".join(known[-8:]) if known else f"no {kind} at all"
        super().__init__(f"There is no {kind} {str(name)!r}.", seen=listed, todo=todo)


class InUse(LlmnbError):
    """Refused: something still points at it."""


class DatabaseError(LlmnbError):
    """The database refused an operation or went away."""


class ConnectError(DatabaseError):
    """The database cannot be reached or does not let us in. The URI is shown without its password."""


class EmbeddedError(DatabaseError):
    """The embedded mongod cannot be found or started."""


class ArtifactError(LlmnbError):
    """Stored bytes are missing, damaged, or cannot be written."""


class DataError(LlmnbError):
    """The selected documents cannot be used for training."""


class ModelError(LlmnbError):
    """A model, tokenizer or adapter cannot be loaded or used."""


class AdapterMismatch(ModelError):
    """An adapter does not belong to this base model."""


class LaunchError(LlmnbError):
    """A process or cluster could not be started or reached."""


class RunError(LlmnbError):
    """A run failed, or its state forbids the request. ``remote_traceback`` holds the worker's own."""

    def __init__(
        self, what: str, *, seen: object = None, todo: str | None = None, remote_traceback: str | None = None
    ) -> None:
        super().__init__(what, seen=seen, todo=todo)
        self.remote_traceback = remote_traceback


class MissingPackage(LlmnbError):
    """A package of an extra is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed.",
            todo=f"pip install 'llmnb[{extra}]'",
        )
