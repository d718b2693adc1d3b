"""``--name value`` for every option of LLM, LLMTrainer and TrainingArguments, as keyword arguments.

Faults are reported all at once, with near names. This module knows no database.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import options
from ..errors import ConfigError, Fault, near
from ..form import MODEL_ONLY, typed, types_of
from ..options import named
from ..query import Collection, Select

__all__ = ["known_settings", "named", "selection", "settings", "values"]

_ALL = frozenset({"bool", "int", "float", "str", "list", "dict", "None"})
_OBJECTS = ("select", "transform", "ray_configs", "training_kwargs", "eval_selects")  # Python objects: not from here


def values(given: Mapping[str, str | None]) -> dict[str, Any]:
    """Values whose types nobody declares (options of generate)."""
    return {name: True if text is None else options.parse("", text, _ALL) for name, text in given.items()}


def known_settings() -> list[str]:
    """Every name that ``llmnb train`` takes."""
    from ..trainer import LLMTrainer

    return sorted((LLMTrainer.names() | MODEL_ONLY) - set(_OBJECTS))


def settings(given: Mapping[str, str | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments of ``LLM`` and of ``LLMTrainer``.

    Raises:
        ConfigError: every unknown option with near names, every missing value.
    """
    model: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, text in given.items():
        types = types_of(name)
        if name in _OBJECTS:
            faults.append(Fault(f"--{name}", "takes a Python object", "use the Python API for it"))
        elif types is None:
            close = near(name, [*known_settings(), *options.synonyms()])
            hint = "did you mean " + " or ".join(f"--{c}" for c in close) + "?" if close else "--options names them all"
            faults.append(Fault(f"--{name}", "is not an option", hint))
        elif text is None and "bool" not in types:
            faults.append(Fault(f"--{name}", "needs a value", f"--{name} VALUE"))
        else:
            (model if name in MODEL_ONLY else trainer)[name] = True if text is None else typed(name, text)
    if faults:
        raise ConfigError(faults)
    return model, trainer


def selection(collection: str, filter: str | None = None, limit: int | None = None) -> Select:
    """A find, narrowed.

    Raises:
        ConfigError: the filter is not a JSON object.
    """
    matched: Any = {}
    if filter:
        try:
            matched = json.loads(filter)
        except ValueError as error:
            raise ConfigError([Fault("--filter", f"is not JSON ({error})", """--filter '{"lang": "en"}'""")]) from None
        if not isinstance(matched, dict):
            raise ConfigError([Fault("--filter", "must be a JSON object", """--filter '{"lang": "en"}'""")])
    found = Collection(collection).find(matched)
    return found.limit(limit) if limit else found
