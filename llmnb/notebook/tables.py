"""Small tables for a cell's output: aligned text in a terminal, an HTML table in a notebook.

Every cell is text and is escaped. This module knows nothing of what the tables are about.
"""

from __future__ import annotations

import datetime as dt
import html
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Table", "local_time", "short"]

_CELL = "padding:2px 14px 2px 0;vertical-align:top;text-align:{side};white-space:{wrap};word-break:break-word"
_FONT = "font-variant-numeric:tabular-nums;font-family:var(--jp-ui-font-family,var(--vscode-font-family,sans-serif))"


class Table:
    """Rows under headings.

    Args:
        columns: the headings.
        rows: as many cells in each; anything, shown with ``str``; None is shown as nothing.
        caption: a sentence above the table.
        note: a sentence below it: what to do next.
        empty: shown in place of a table without rows.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        caption: str = "",
        note: str = "",
        empty: str = "",
    ) -> None:
        self.columns, self.caption, self.note, self.empty = tuple(columns), caption, note, empty
        self.rows = [tuple("" if cell is None else str(cell) for cell in row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self.rows)

    def _right(self, column: int) -> bool:
        """Numbers stand on the right."""
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(
            cell[0] in "-+0123456789" and len(cell) < 16 and "-" not in cell[1:] for cell in cells
        )

    def __repr__(self) -> str:
        lines = [self.caption] if self.caption else []
        if self.rows:
            widths = [max(len(row[i]) for row in [self.columns, *self.rows]) for i in range(len(self.columns))]
            right = [self._right(i) for i in range(len(self.columns))]
            for row in [self.columns, *self.rows]:
                cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
                lines.append("  ".join(cells).rstrip())
        else:
            lines.append(self.empty or "nothing")
        return "\n".join([*lines, self.note] if self.note else lines)

    def _repr_html_(self) -> str:
        parts = [f'<div class="llmnb-words" style="{_FONT}">']
        if self.caption:
            parts.append(f"<div>{html.escape(self.caption)}</div>")
        if self.rows:
            right = [self._right(i) for i in range(len(self.columns))]
            parts.append('<table style="border-collapse:collapse;margin:4px 0;font-size:inherit">')
            parts.append(_row("th", self.columns, right))
            parts += [_row("td", row, right) for row in self.rows]
            parts.append("</table>")
        else:
            parts.append(f"<div>{html.escape(self.empty or 'nothing')}</div>")
        if self.note:
            parts.append(f"<div>{html.escape(self.note)}</div>")
        return "".join([*parts, "</div>"])


def _row(tag: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    out = ["<tr>"]
    for cell, side in zip(cells, right, strict=True):
        style = _CELL.format(side="right" if side else "left", wrap="normal" if len(cell) > 30 else "nowrap")
        weight = ";font-weight:600" if tag == "th" else ""
        out.append(f'<{tag} style="{style}{weight}">{html.escape(cell)}</{tag}>')
    return "".join([*out, "</tr>"])


def local_time(moment: Any) -> str:
    """A UTC datetime, or seconds since the epoch, as local wall time: ``21 Nov 18:04``. "" for None."""
    if moment is None or moment == 0:
        return ""
    if isinstance(moment, (int, float)):
        moment = dt.datetime.fromtimestamp(moment, dt.timezone.utc)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.timezone.utc)
    local = moment.astimezone()
    return f"{local.day} {local:%b %H:%M}"


def short(value: Any, width: int = 60) -> str:
    """A value in one line of at most ``width`` characters."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= width else text[: width - 1] + "…"
