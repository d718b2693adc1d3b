"""Runs beside one another: in which settings they differ, and what came of each.

Pure functions of what the database holds. They know neither database nor display.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import series
from ..series import Curve
from .still import title_of
from .tables import short
from .words import figure, number

__all__ = ["MOST", "differences", "outcomes", "settings_of", "table"]

MOST = 5  # runs beside the first: more cannot be told apart
# Names and places, not settings.
_NO_SETTINGS = frozenset({"identifier", "output_dir", "eval_selects"})


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings in one flat table, the arguments of the Trainer among them."""
    config = dict(record.get("config") or {})
    flat = {name: value for name, value in config.items() if name not in ("arguments", "select")}
    flat |= dict(config.get("arguments") or {})
    select = config.get("select")
    if isinstance(select, Mapping):
        flat["collection"] = select.get("collection")
        flat["filter"] = select.get("filter") or None
        flat["limit"] = select.get("limit") or None
    return {"model": record.get("model"), **{k: v for k, v in flat.items() if k not in _NO_SETTINGS}}


def differences(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ: each with its value in every run, "default" where none was given."""
    tables = [settings_of(record) for record in records]
    names = dict.fromkeys(name for table in tables for name in table)
    found = []
    for name in names:
        values = [_word(table[name]) if table.get(name) is not None else "default" for table in tables]
        if len(set(values)) > 1:
            found.append((name, values))
    return found


def _word(value: Any) -> str:
    if isinstance(value, str):
        return short(value, 40)
    if isinstance(value, float):
        return f"{value:.6g}"
    return short(json.dumps(value, default=str), 40)


def outcomes(curves: Sequence[Curve]) -> list[tuple[str, list[str]]]:
    """What came of each run: state, step, newest loss, lowest evaluation loss."""
    lowest = [series.best(curve) for curve in curves]
    rows = [
        ("state", [curve.state or "queued" for curve in curves]),
        ("step", [number(curve.step) + (f" / {number(curve.total)}" if curve.total else "") for curve in curves]),
        ("loss", [figure(curve["loss"].last) for curve in curves]),
    ]
    if any(lowest):
        rows.append(("best eval", [f"{figure(low[1])} at {number(low[0])}" if low else "–" for low in lowest]))
    return rows


def table(records: Sequence[Mapping[str, Any]], curves: Sequence[Curve]) -> dict[str, Any]:
    """Heads and rows: what differs in the settings, then what came of it."""
    differ = differences(records)
    return {
        "heads": [title_of(record) for record in records],
        "rows": [[name, *values] for name, values in [*differ, *outcomes(curves)]],
        "settings": len(differ),
    }
