"""``llmnb evaluate``: checkpoints against their base, as a table."""

from __future__ import annotations

import argparse
import sys

from ..errors import ConfigError, Fault
from . import paper

__all__ = ["evaluate"]


def evaluate(known: argparse.Namespace) -> int:
    """Measures checkpoints and prints the table, with the worst and the best row of each."""
    from ..db import connect
    from ..form import selection

    if known.filter and not known.collection:
        raise ConfigError([Fault("--filter", "narrows a --collection", "give --collection, too")])
    select = selection(known.collection, known.filter, None) if known.collection else None
    database = connect(known.uri, home=known.home)
    terminal = sys.stderr.isatty()

    def say(words: str) -> None:
        if terminal:
            print(f"\r\033[K{paper.one_line(words, 70)} …", end="", file=sys.stderr, flush=True)

    names = ("max_new_tokens", "batch_size", "rank_by")
    given = {name: getattr(known, name) for name in names if getattr(known, name) is not None}
    try:
        found = database.evaluate(
            known.checkpoints or "latest",
            select,
            known.metrics,
            limit=known.limit,
            base=known.base,
            say=say,
            **given,
        )
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(found)
    return 0
