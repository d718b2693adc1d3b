"""An inspection as a page of HTML: no script, everything a document holds is escaped, colours of the theme."""

from __future__ import annotations

import html

from .report import Facts, Finding, ShownRow
from .words import counted, head_of, key_of, lengths_of, some

__all__ = ["page", "row_html"]

_FONT = "font-family:var(--jp-ui-font-family,var(--vscode-font-family,system-ui,sans-serif))"
_MONO = "font-family:var(--jp-code-font-family,var(--vscode-editor-font-family,monospace));font-size:.92em"
_ACCENT = "var(--jp-brand-color1,#1976d2)"
_ERROR = "var(--jp-error-color1,#c62828)"
_LINE = "1px solid var(--jp-border-color2,rgba(128,128,128,.35))"
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
        f"{a} to {b - 1} tokens: {n} rows" for a, b, n in zip(facts.edges, facts.edges[1:], totals, strict=False)
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 20}" width="{WIDTH}" '
        f'style="max-width:100%;display:block;margin:6px 0" role="img" aria-label="{_text(said)}" font-size="11" '
        f'font-family="system-ui,sans-serif"><title>{_text(said)}</title>'
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
    return "".join([*out, "</svg>"])


_TRAINED = f"background:color-mix(in srgb,{_ACCENT} 26%,transparent);border-radius:2px"


def row_html(row: ShownRow) -> str:
    """One row, its tokens coloured: tinted ones carry loss, framed ones are special."""
    spans = []
    for text, trained, special in row.tokens:
        style = (_TRAINED if trained else "") + (f";outline:1px solid {_GREY};outline-offset:-1px" if special else "")
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
