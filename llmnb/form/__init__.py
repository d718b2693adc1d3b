"""The training form, without any display: its rows, and what was typed into them.

A row is a setting of ``ModelSpec``, ``TrainConfig`` or ``TrainingArguments``, or says which documents. Everything here
is a function of values: this room knows no widget, no database and no torch.
"""

from __future__ import annotations

from .forecast import Forecast, forecast, steps
from .rows import NOT_ROWS, PRESETS, TABS, Preset, Row, rows, types_of
from .values import MODEL_ONLY, Values, by_row, filled, line, selection, settings, spell, typed

__all__ = [
    "MODEL_ONLY",
    "NOT_ROWS",
    "PRESETS",
    "TABS",
    "Forecast",
    "Preset",
    "Row",
    "Values",
    "by_row",
    "filled",
    "forecast",
    "line",
    "rows",
    "selection",
    "settings",
    "spell",
    "steps",
    "typed",
    "types_of",
]
