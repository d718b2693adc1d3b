"""An inspection in words, for terminals and screen readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .report import Facts, Finding, Rows, ShownRow

__all__ = ["bar", "counted", "head_of", "in_words", "lengths_of", "row_in_words", "some"]

_NAMED = 5
_BARS = " ▏▎▍▌▋▊▉█"
_WIDTH = 30


def in_words(facts: Facts) -> str:
    """All of it, in lines."""
    lines = [f"{facts.collection} as {facts.model} reads it: {facts.kind}, key {key_of(facts)}"]
    for rows in facts.rows:
        lines.append(f"  {counted(rows)}")
        if rows.lengths:
            lines.append(f"    {lengths_of(rows, facts.limit)}")
    lines += _histogram(facts)
    lines += [f"  {note}" for note in facts.notes]
    stops = [finding for finding in facts.findings if finding.stops]
    others = [finding for finding in facts.findings if not finding.stops]
    for head, found in (("A training would not start:", stops), ("To look at:", others)):
        if found:
            lines.append(head)
            lines += [line for finding in found for line in _finding(finding)]
    if not facts.findings:
        lines.append("Nothing was found that speaks against training on it.")
    for row in facts.shown[:1]:
        lines += ["", *row_in_words(row)]
    return "\n".join(lines)


def key_of(facts: Facts) -> str:
    """The fields that were read."""
    return facts.key if isinstance(facts.key, str) else ", ".join(map(str, facts.key or ()))


def counted(rows: Rows) -> str:
    """A set of rows in one line."""
    parts = [f"{rows.name}: {rows.used:,} rows of {rows.found:,} documents"]
    if rows.dropped:
        parts.append(f"{rows.dropped:,} left out")
    if rows.cut:
        parts.append(f"{rows.cut:,} cut")
    share = f", {rows.trained_tokens / rows.tokens:.0%} of them trained" if rows.tokens else ""
    return ", ".join(parts) + f"; {rows.tokens:,} tokens{share}"


def lengths_of(rows: Rows, limit: int) -> str:
    """How long its rows are."""
    if not rows.lengths:
        return ""
    shortest, median, most, longest = rows.lengths
    return f"{shortest:,} to {longest:,} tokens a row, half below {median:,}, 95 % below {most:,}; {limit:,} fit"


def _histogram(facts: Facts) -> Iterator[str]:
    first = facts.rows[0] if facts.rows else None
    if first is None or not first.histogram or not max(first.histogram):
        return
    width = len(f"{facts.edges[-1]:,}")
    yield f"  tokens a row, {first.name}"
    for low, high, number in zip(facts.edges, facts.edges[1:], first.histogram, strict=False):
        mark = "  cut" if high > facts.limit and number else ""
        yield f"  {low:>{width},}–{high - 1:<{width},} {bar(number, max(first.histogram))} {number:,}{mark}"


def bar(number: int, most: int) -> str:
    """A bar of eighths of a letter."""
    eighths = max(1, round(8 * _WIDTH * number / most)) if number else 0
    return (_BARS[8] * (eighths // 8) + (_BARS[eighths % 8] if eighths % 8 else "")).ljust(_WIDTH)


def _finding(finding: Finding) -> list[str]:
    ids = f" (_id {some(finding.ids, finding.number)})" if finding.ids else ""
    line = f"  - {head_of(finding)}: {finding.says}{ids}"
    return [line, f"    {finding.todo}"] if finding.todo else [line]


def head_of(finding: Finding) -> str:
    """Where, and how many documents."""
    if not finding.number:
        return finding.rows
    return f"{finding.rows}, " + ("1 document" if finding.number == 1 else f"{finding.number:,} documents")


def some(ids: Sequence[str], number: int) -> str:
    """The first _ids, and that there are more."""
    return ", ".join(ids[:_NAMED]) + (", …" if number > _NAMED else "")


def row_in_words(row: ShownRow) -> list[str]:
    """One row, in parts that carry loss and parts that do not. Special tokens are as they are written."""
    lines = [f"{row.rows}, _id {row.id}: {row.length:,} tokens, {row.trained:,} trained"]
    if row.before:
        lines.append(f"  … {row.before:,} tokens before")
    for trained, text in parts(row):
        head = "  trained   " if trained else "  read only "
        lines.append(head + text.replace("\n", "⏎\n            "))
    if row.after:
        lines.append(f"  … {row.after:,} tokens after")
    return lines


def parts(row: ShownRow) -> list[tuple[bool, str]]:
    """A row's tokens, joined where their neighbours carry loss as they do."""
    out: list[tuple[bool, str]] = []
    for text, trained, _ in row.tokens:
        if out and out[-1][0] is trained:
            out[-1] = trained, out[-1][1] + text
        else:
            out.append((trained, text))
    return out
