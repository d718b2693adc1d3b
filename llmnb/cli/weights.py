"""``llmnb merge`` and ``llmnb export``: a checkpoint as a folder."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import paper

if TYPE_CHECKING:
    from ..db import Datalayer

__all__ = ["export", "merge", "named", "push"]


def merge(known: argparse.Namespace) -> int:
    """Merges a checkpoint into its base and prints the proof."""
    from ..db import connect

    database = connect(known.uri, home=known.home)
    terminal = sys.stderr.isatty()

    def say(words: str) -> None:
        if terminal:
            print(f"\r\033[K{paper.one_line(words, 70)} …", end="", file=sys.stderr, flush=True)

    try:
        report = database.merge(named(database, known.checkpoint), known.folder, base=known.base, say=say)
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(report)
    return 0


def export(known: argparse.Namespace) -> int:
    """Writes a checkpoint's files as a folder."""
    from ..db import connect

    database = connect(known.uri, home=known.home)
    found = database.named(named(database, known.checkpoint))
    folder = database.export(found, known.folder)
    print(f"{found} is in {folder}, verified: {paper.size(found.size)}.")
    if found.kind == "adapter":
        print(f"peft loads it on {found.base}: PeftModel.from_pretrained(model, folder)")
    else:
        print("transformers loads it: AutoModelForCausalLM.from_pretrained(folder)")
    return 0


def push(known: argparse.Namespace) -> int:
    """Uploads a checkpoint to a model hub."""
    from ..db import connect

    database = connect(known.uri, home=known.home)
    name = named(database, known.checkpoint)
    where = database.push(name, known.repo, folder=known.merged, base=known.base, private=not known.public)
    print(f"{name} is at {where}" + ("" if known.public else ", private when it was made now."))
    return 0


def named(database: Datalayer, name: str) -> str:
    """``latest`` and ``latest/STEP`` as the newest run with checkpoints; any other name as it is."""
    experiment, slash, step = name.partition("/")
    found = database.show("checkpoint") if experiment == "latest" else []
    return f"{found[-1]}{slash}{step}" if found else name
