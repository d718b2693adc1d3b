"""An evaluation as text for a terminal and as HTML for a notebook. Every word of a model or a document is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .measures import figure, gap

if TYPE_CHECKING:
    from . import Evaluation, Example, Scores

__all__ = ["base_name", "examples", "measured_on", "page", "parts", "table", "text"]

_WIDTH = 100  # characters of a text that a line shows
_FONT = "font-variant-numeric:tabular-nums;font-family:var(--jp-ui-font-family,var(--vscode-font-family,sans-serif))"
_CELL = "padding:2px 14px 2px 0;vertical-align:top;text-align:{side}"
_PRE = "white-space:pre-wrap;word-break:break-word;max-height:12em;overflow:auto"


def table(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row for each model, a column for each metric, with the difference to the base."""
    base = found.models[0]
    rows = []
    for scores in found.models:
        cells = [scores.name]
        for metric in found.metrics:
            value = figure(metric, scores.metrics.get(metric))
            more = "" if scores is base else gap(metric, scores.metrics.get(metric), base.metrics.get(metric))
            cells.append(f"{value} ({more})" if more else value)
        rows.append(cells)
    return ["model", *(metric.replace("_", " ") for metric in found.metrics)], rows


def examples(found: Evaluation, scores: Scores) -> list[tuple[str, Example]]:
    """The rows to show of a model, each with its heading: the worst first."""
    kinds = [("worst", scores.worst), ("best", scores.best)]
    return [
        (f"{kind}: {example.id}, {found.rank_by.replace('_', ' ')} {figure(found.rank_by, example.score)}", example)
        for kind, rows in kinds
        for example in rows
    ]


def parts(example: Example) -> list[tuple[str, str]]:
    """What is to be read of a row, each with its name."""
    if example.answer is None:
        return [("prompt", example.prompt)] * bool(example.prompt) + [("text", example.reference)]
    return [("prompt", example.prompt), ("reference", example.reference), ("answer", example.answer)]


def text(found: Evaluation) -> str:
    """For a terminal: the table, what it was measured on, and the worst and the best row of each trained model."""
    columns, rows = table(found)
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [f"Evaluation of {_models(found)} of {base_name(found)} on {measured_on(found)}"]
    for row in [columns, *rows]:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    lines += [f"  {note}" for note in found.notes]
    for scores in found.models[1:] or found.models:
        for heading, example in _ends(examples(found, scores)):
            lines.append(f"{scores.name}, {heading}")
            lines += [f"    {name:<9}  {_line(words)}" for name, words in parts(example)]
    if found.id:
        lines.append(f"kept as {found.id}: db.evaluation({found.id!r})")
    return "\n".join(lines)


def page(found: Evaluation) -> str:
    """For a notebook: the table, and under it the rows of each model, folded."""
    columns, rows = table(found)
    out = [f'<div class="llmnb-words llmnb-evaluation" style="{_FONT}">']
    out.append(f"<div>{_e(_models(found))} of {_e(base_name(found))} on {_e(measured_on(found))}</div>")
    out.append('<table style="border-collapse:collapse;margin:4px 0;font-size:inherit">')
    out += [_row("th", columns), *(_row("td", row) for row in rows), "</table>"]
    out += [f'<div style="opacity:.75">{_e(note)}</div>' for note in found.notes]
    for scores in found.models:
        shown = examples(found, scores)
        if shown:
            out.append(f"<details><summary>{_e(scores.name)}: worst and best rows</summary>")
            for heading, example in shown:
                out.append(f'<div style="margin:6px 0 0;font-weight:600">{_e(heading)}</div>')
                for name, words in parts(example):
                    out.append(f'<div style="{_PRE}"><span style="opacity:.6">{_e(name)} </span>{_e(words)}</div>')
            out.append("</details>")
    if found.id:
        out.append(f'<div style="opacity:.75">kept as <code>{_e(found.id)}</code></div>')
    return "".join([*out, "</div>"])


def measured_on(found: Evaluation) -> str:
    """Which rows, in words, and how many tokens carried loss."""
    counts = found.models[0].counts
    words = str(found.rows.get("words") or "the rows given")
    more = f", {counts['trained']:,} tokens" if counts.get("trained") else ""
    return words + more


def base_name(found: Evaluation) -> str:
    """The base as a hub id, or the name of its folder: a path of this machine says nothing elsewhere."""
    return found.base.rstrip("/").rpartition("/")[2] if found.base.startswith(("/", "~", ".")) else found.base


def _models(found: Evaluation) -> str:
    count = len(found.models) - 1
    return f"{count} checkpoint{'' if count == 1 else 's'}"


def _ends(shown: Sequence[tuple[str, Example]]) -> list[tuple[str, Example]]:
    """The worst row and the best one: a terminal has no room for more."""
    worst = [item for item in shown if item[0].startswith("worst")][:1]
    return worst + [item for item in shown if item[0].startswith("best")][:1]


def _line(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _row(tag: str, cells: Sequence[str]) -> str:
    weight = ";font-weight:600" if tag == "th" else ""
    out = ["<tr>"]
    for at, cell in enumerate(cells):
        style = _CELL.format(side="right" if at else "left")
        out.append(f'<{tag} style="{style}{weight}">{_e(cell)}</{tag}>')
    return "".join([*out, "</tr>"])


def _e(words: str) -> str:
    return html.escape(str(words))
