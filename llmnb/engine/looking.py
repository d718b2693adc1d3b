"""A row as a person looks at it: its tokens as text, which of them carry loss, which are special."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["shown_rows", "tokens_of"]


def shown_rows(tokenizer: Any, rows: Any, count: int, most: int) -> list[dict[str, Any]]:
    """The first rows, each as ``tokens_of`` gives it; of preferences both answers, with their ``side``."""
    sides = getattr(rows, "sides", None)
    if sides is None:
        return [tokens_of(tokenizer, rows, at, most) for at in range(min(count, len(rows)))]
    words = ("chosen", "rejected")
    return [{**tokens_of(tokenizer, sides, at, most), "side": words[at % 2]} for at in range(2 * min(count, len(rows)))]


def tokens_of(tokenizer: Any, rows: Any, index: int, most: int = 400) -> dict[str, Any]:
    """One row of ``engine.rows.Rows``.

    Args:
        tokenizer: that made it.
        rows: the rows.
        index: which one.
        most: tokens to show; of a longer row those around the first that carries loss.

    Returns:
        ``tokens`` as [text, carries loss, is special], ``length``, ``trained``, and how many tokens stand ``before``
        and ``after`` those.
    """
    ids, labels = rows.ids(index).tolist(), rows.labels(index).tolist()
    special = set(tokenizer.all_special_ids)
    begin = next((i for i, label in enumerate(labels) if label >= 0), 0)
    # Near the first trained token, which may stand far behind a long prompt.
    first = max(0, min(begin - most // 2, len(ids) - most))
    tokens: list[list[Any]] = []
    at = first
    for text, count in _texts(tokenizer, ids[first : first + most]):
        tokens.append([text, labels[at + count - 1] >= 0, count == 1 and ids[at] in special])
        at += count
    return {
        "tokens": tokens,
        "length": len(ids),
        "trained": sum(label >= 0 for label in labels),
        "before": first,
        "after": max(0, len(ids) - first - most),
    }


def _texts(tokenizer: Any, ids: list[int]) -> Iterator[tuple[str, int]]:
    """The text of each token, and how many tokens it took: a character may be made of several."""
    at = 0
    while at < len(ids):
        head = ids[at - 1 : at]
        before = tokenizer.decode(head, skip_special_tokens=False) if head else ""
        for count in range(1, 5):
            whole = tokenizer.decode([*head, *ids[at : at + count]], skip_special_tokens=False)
            text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[at : at + count])
            if "\ufffd" not in text or at + count >= len(ids):
                break
        yield text, min(count, len(ids) - at)
        at += count
