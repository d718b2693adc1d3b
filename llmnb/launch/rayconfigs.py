"""``ray_configs`` as plain data, so that a run can be resumed without giving them again; and back.

Only fields that were set and have a JSON form are kept. What has none (callbacks, a file system), and what may hold a
secret (a runtime environment, an address with a password), is named, and must be given again. Loads no Ray for the way
there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, Fault

__all__ = ["described", "rebuilt", "storage_path"]

# The classes that ``ray_configs`` may hold, each with where it is found.
_CLASSES = {
    "ScalingConfig": "ray.train",
    "RunConfig": "ray.train",
    "FailureConfig": "ray.train",
    "CheckpointConfig": "ray.train",
    "LoggingConfig": "ray.train",
    "TorchConfig": "ray.train.torch",
}
_SECRET = frozenset({"worker_runtime_env"})


def described(configs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary that is stored with the run; None for none.

    Args:
        configs: keyword arguments of ``TorchTrainer``.
    """
    if not configs:
        return None
    left: list[str] = []
    kept = {name: _plain(f"ray_configs[{name!r}]", value, left) for name, value in configs.items()}
    return {"configs": kept, "left": left}


def rebuilt(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``described`` was given.

    Raises:
        ConfigError: parts of it could not be stored; they are named.
    """
    if not summary:
        return {}
    if summary.get("left"):
        todo = "run.resume(ray_configs={…}), as when the run was started"
        raise ConfigError([Fault(name, "is not in the database", todo) for name in summary["left"]])
    return {name: _object(value) for name, value in summary["configs"].items() if value is not None}


def _plain(where: str, value: Any, left: list[str]) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        if "@" in value and "://" in value:
            left.append(where)
            return None
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{where}[{name!r}]", item, left) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(where, item, left) for item in value]
    kind = type(value).__name__
    if dataclasses.is_dataclass(value) and kind in _CLASSES:
        given = {"class": kind}
        for field in dataclasses.fields(value):
            found = getattr(value, field.name)
            if _is_default(field, found) or _is_empty(found) or _is_made_up(field.name, found):
                continue
            if field.name in _SECRET:
                left.append(f"{where}.{field.name}")
            else:
                given[field.name] = _plain(f"{where}.{field.name}", found, left)
        return given
    left.append(where)
    return None


def _is_default(field: Any, value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return bool(field.default is not dataclasses.MISSING and value == field.default)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and not value


def _is_made_up(name: str, value: Any) -> bool:
    """Ray fills these in where a person named none: today's date, and a folder of this machine."""
    made = name == "name" and str(value).startswith("ray_train_run-")
    return made or (name == "storage_path" and value == _default_storage())


def _object(value: Any) -> Any:
    if not isinstance(value, Mapping) or value.get("class") not in _CLASSES:
        return value
    import importlib

    cls = getattr(importlib.import_module(_CLASSES[value["class"]]), value["class"])
    return cls(**{name: _object(item) for name, item in value.items() if name != "class"})


def storage_path(run_config: Any) -> str | None:
    """The storage path that a person gave to a ``RunConfig``; None for none of theirs."""
    path = getattr(run_config, "storage_path", None)
    return None if path is None or str(path) == _default_storage() else str(path)


def _default_storage() -> str:
    return os.path.expanduser("~/ray_results")  # what Ray fills in: one folder for all projects of a person
