"""An inspection as a page of HTML: no script, and everything that a document holds is escaped.

A notebook that is opened without a kernel goes through JupyterLab's sanitiser, which takes out SVG, variables of the
theme and mixed colours. So the picture is an image, and colours are plain ones that can be read on white and on black.
"""

from __future__ import annotations

import base64
import html

from .report import Facts, Finding, ShownRow
from .words import counted, head_of, key_of, lengths_of, some

__all__ = ["page", "row_html"]

_FONT = "font-family:var(--jp-ui-font-family,var(--vscode-font-family,system-ui,sans-serif))"
_MONO = "font-family:monospace;font-size:.92em"
_ACCENT, _ERROR, _LINE = "#2b83d6", "#d64545", "1px solid #8a8a8a"
_GREY = "#8a8a8a"  # reads on white and on black
_SHOWN = 3
WIDTH, HEIGHT = 560, 120


def page(facts: Facts) -> str:
    """All of it."""
    parts = [
        f'<div class="llmnb-inspection" style="{_FONT};max-width:860px;line-height:1.45">',
        f'<div style="font-weight:600">{_text(facts.collection)} as {_text(facts.model)} reads it</div>',
        f'<div style="opacity:.8">{_text(facts.kind)}, key {_text(key_of(facts))}</div>',
    ]
    for rows in facts.rows:
        parts.append(f'<div style="margin-top:4px;font-variant-numeric:tabular-nums">{_text(counted(rows))}</div>')
        if rows.lengths:
            parts.append(f'<div style="opacity:.75">{_text(lengths_of(rows, facts.limit))}</div>')
    parts.append(histogram(facts))
    parts += [f'<div style="opacity:.8">{_text(note)}</div>' for note in facts.notes]
    stops = [finding for finding in facts.findings if finding.stops]
    others = [finding for finding in facts.findings if not finding.stops]
    parts.append(_findings("A training would not start", stops, _ERROR))
    parts.append(_findings("To look at", others, _GREY))
    if not facts.findings:
        parts.append('<div style="margin-top:6px">Nothing was found that speaks against training on it.</div>')
    parts += [row_html(row) for row in facts.shown[:_SHOWN]]
    if facts.shown:
        mark = f'<span style="{_TRAINED}">tinted</span>'
        parts.append(f'<div style="opacity:.75;margin-top:4px">{mark} tokens carry loss; framed ones are special</div>')
    return "".join([*parts, "</div>"])


def _text(value: object) -> str:
    return html.escape(str(value))


def _findings(head: str, found: list[Finding], colour: str) -> str:
    if not found:
        return ""
    items = []
    for finding in found:
        ids = f" <span style='opacity:.75'>_id {_text(some(finding.ids, finding.number))}</span>" if finding.ids else ""
        todo = f'<span style="opacity:.75"> — {_text(finding.todo)}</span>' if finding.todo else ""
        said = f"{_text(head_of(finding))}: {_text(finding.says)}"
        items.append(f'<li style="margin:2px 0;overflow-wrap:anywhere">{said}{todo}{ids}</li>')
    return (
        f'<div style="margin-top:8px;border-left:3px solid {colour};padding-left:10px">'
        f'<div style="font-weight:600">{head}</div>'
        f'<ul style="margin:2px 0 0;padding-left:18px">{"".join(items)}</ul></div>'
    )


def histogram(facts: Facts) -> str:
    """Rows by length as bars, with a line where rows are cut; the sets stand on one another."""
    sets = [rows for rows in facts.rows if rows.histogram]
    if not sets or len(facts.edges) < 2:
        return ""
    totals = [sum(rows.histogram[i] for rows in sets) for i in range(len(facts.edges) - 1)]
    most, low, high = max(totals), facts.edges[0], facts.edges[-1]
    if not most:
        return ""
    each = WIDTH / len(totals)
    said = "; ".join(
        f"{n} rows of {a} to {b - 1} tokens" for a, b, n in zip(facts.edges, facts.edges[1:], totals, strict=False)
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 20}" width="{WIDTH}" '
        f'height="{HEIGHT + 20}" font-size="11" font-family="system-ui,sans-serif">'
    ]
    for i, number in enumerate(totals):
        tall = HEIGHT * number / most
        if number:
            tall = max(tall, 1.5)
        out.append(
            f'<rect x="{i * each + 1:.1f}" y="{HEIGHT - tall:.1f}" width="{each - 2:.1f}" height="{tall:.1f}" '
            f'fill="{_ACCENT}" fill-opacity="{".45" if facts.edges[i] >= facts.limit else ".85"}"/>'
        )
    out.append(f'<path d="M0 {HEIGHT}H{WIDTH}" stroke="{_GREY}"/>')
    out.append(f'<text x="0" y="{HEIGHT + 14}" fill="{_GREY}">{low:,} tokens</text>')
    longest = f"{high - 1:,}" if high <= facts.limit else f"{facts.limit:,} fit, the longest has {high - 1:,}"
    out.append(f'<text x="{WIDTH}" y="{HEIGHT + 14}" fill="{_GREY}" text-anchor="end">{longest}</text>')
    cut = next((i for i, edge in enumerate(facts.edges[:-1]) if edge >= facts.limit), None)
    if cut is not None and low < facts.limit:
        out.append(f'<path d="M{cut * each:.1f} 0V{HEIGHT}" stroke="{_ERROR}" stroke-dasharray="4 3"/>')
    data = base64.b64encode("".join([*out, "</svg>"]).encode()).decode()
    return (
        f'<img alt="rows by length: {_text(said)}" src="data:image/svg+xml;base64,{data}" '
        f'style="width:100%;max-width:{WIDTH}px;display:block;margin:6px 0">'
    )


_TRAINED = "background-color:rgba(43,131,214,.28);border-radius:2px"


def row_html(row: ShownRow) -> str:
    """One row, its tokens coloured: tinted ones carry loss, framed ones are special."""
    spans = []
    for text, trained, special in row.tokens:
        style = (_TRAINED if trained else "") + (f";border:1px solid {_GREY};border-radius:2px" if special else "")
        shown = _text(text).replace("\n", '<span style="opacity:.5">⏎</span>\n')
        spans.append(f'<span style="{style}">{shown}</span>' if style else shown)
    before = f'<span style="opacity:.6">… {row.before:,} tokens before </span>' if row.before else ""
    after = f'<span style="opacity:.6"> … {row.after:,} tokens after</span>' if row.after else ""
    return (
        f'<div class="llmnb-row" style="margin-top:8px;border-top:{_LINE};padding-top:4px">'
        f'<div style="opacity:.75">{_text(row.rows)}, _id {_text(row.id)}: {row.length:,} tokens, {row.trained:,} '
        f'trained</div><div style="{_MONO};white-space:pre-wrap;overflow-wrap:anywhere">{before}{"".join(spans)}{after}'
        "</div></div>"
    )
