"""``llmnb.json``: the card that lies in every checkpoint folder and says what the folder is.

Attributes in the file: ``base`` (as the person gave it), ``base_fingerprint``, ``kind`` ("adapter" or
"model"), ``step``, ``chat_template``, ``prompt_template``, ``rows_kind`` (text, pair or messages), ``vocabulary``
(rows of the embeddings),
``precision``, ``bits``, ``rows`` and ``rows_digest`` (what it was trained on), ``tokens``, ``best``, ``patience``,
``window`` (the loss since the last log) and ``versions``. No torch here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..events import Metric

__all__ = ["FILE", "kind_of", "metrics_of", "numbers", "read", "versions", "write"]

FILE = "llmnb.json"
_SKIP = ("step", "epoch", "total_flos")


def versions() -> dict[str, str]:
    """Versions of the packages that made a checkpoint."""
    found = {}
    for package in ("llmnb", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(folder: str | Path, card: dict[str, Any]) -> None:
    """Writes the card in one move, so that a reader never sees half of it."""
    path = Path(folder) / FILE
    part = path.with_suffix(".part")
    part.write_text(json.dumps(card, indent=1, default=str), encoding="utf-8")
    os.replace(part, path)


def read(folder: str | Path) -> dict[str, Any]:
    """The card of a folder; empty when it has none (an adapter from elsewhere)."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(folder: str | Path) -> list[Metric]:
    """What the run had said up to a checkpoint, as its ``trainer_state.json`` remembers; none without one."""
    path = Path(folder) / "trainer_state.json"
    if not path.is_file():
        return []
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")).get("log_history", ()):
        values = numbers(entry)
        if values:
            found.append(Metric(step=int(entry["step"]), epoch=entry.get("epoch"), values=values))
    return found


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one of Trainer's logs that are told; none of its closing summary."""
    if "train_runtime" in logs:
        return {}
    return {
        name: float(value)
        for name, value in logs.items()
        if isinstance(value, (int, float)) and name not in _SKIP and not name.endswith("_model_preparation_time")
    }


def kind_of(folder: str | Path) -> str | None:
    """ "adapter" for a PEFT folder, "model" for a whole model, None for anything else."""
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return str(read(folder).get("kind", "model"))
    return None
