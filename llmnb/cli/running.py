"""``llmnb runs``, ``llmnb watch RUN``, ``llmnb stop RUN``, ``llmnb resume RUN``, ``llmnb reproduce RUN``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..events import Note
from ..options import CHANGEABLE
from . import paper
from .settings import named, settings

__all__ = ["reproduce", "resume", "runs", "stop", "watch"]


def _database(known: argparse.Namespace) -> Any:
    from ..db import connect

    return connect(known.uri, home=known.home)


def runs(known: argparse.Namespace) -> int:
    """Lists runs."""
    store = _database(known).store
    store.runs.find_lost()
    rows = []
    for record in store.runs.list(limit=known.limit, **({"state": known.state} if known.state else {})):
        note = (record.get("error") or {}).get("what") or record.get("warning") or ""
        if record["state"] == "queued" and record.get("waits_for"):
            note = f"waits for {', '.join(record['waits_for'])}"
        silence = store.runs.silence(record)
        if silence is not None:
            note = f"no sign of life for {paper.about(silence)}"
        rows.append(
            (
                record["_id"],
                record.get("model"),
                record.get("version"),
                record["state"],
                paper.local_time(record.get("started") or record.get("created")),
                _took(record),
                paper.one_line(note, 60) if note else "",
            )
        )
    if not rows:
        print(f"No run is {known.state}." if known.state else "No run yet. llmnb quickstart makes one.")
        return 0
    paper.table(("run", "model", "version", "state", "started", "took", "note"), rows)
    return 0


def _took(record: dict[str, Any]) -> str:
    start, end = record.get("started"), record.get("ended")
    return paper.about((end - start).total_seconds()) if start and end else ""


def watch(known: argparse.Namespace) -> int:
    """Follows a run. Ctrl-C ends the watching, never the run."""
    run = _database(known).run(known.run)
    try:
        with paper.Follower(run.record["model"]) as follower:
            run.wait(on_event=follower)
    except KeyboardInterrupt:
        print(f"\nThe run goes on. llmnb stop {run.id} ends it with a checkpoint.", file=sys.stderr)
        return 130
    _tell(run, follower)
    return 0


def _tell(run: Any, follower: paper.Follower) -> None:
    """How a run that was followed ended."""
    for text in follower.warnings:
        paper.fact("", text)
    paper.fact("Run", f"{run.id}, {run.state}")
    if follower.loss is not None:
        words = f"{paper.figure(follower.first_loss)} → {paper.figure(follower.loss)} in {follower.step} steps"
        evaluated = f", eval loss {paper.figure(follower.eval_loss)}" if follower.eval_loss is not None else ""
        paper.fact("Loss", words + evaluated)
    saved = run.checkpoints()
    if saved:
        rows = [
            (c.step, paper.figure(c.metrics.get("eval_loss")), paper.size(c.size), "best" if c.best else "")
            for c in saved
        ]
        paper.table(("checkpoint", "eval loss", "size", ""), rows)


def stop(known: argparse.Namespace) -> int:
    """Asks a run to end."""
    run = _database(known).run(known.run)
    if known.now:
        run.kill()
        print(f"{run.id}: {run.state}")
    else:
        run.stop()
        print(f"Stopping {run.id}: it saves a checkpoint, then it ends.")
    return 0


def resume(known: argparse.Namespace) -> int:
    """Goes on with a run that has ended, and follows it unless it was detached."""
    changes = _changes(known)
    from .quiet import hush

    hush()
    database = _database(known)
    run = database.run(known.run)
    if known.detach:
        run.resume(wait=False, **changes)
        print(f"Run {run.id} goes on in the background.\n  llmnb watch {run.id}\n  llmnb stop {run.id}")
        return 0
    with paper.Follower(run.record["model"]) as follower:
        run.resume(wait=True, progress=False, on_event=follower, **changes)
    _tell(run, follower)
    return 0


def reproduce(known: argparse.Namespace) -> int:
    """Runs a run again, follows it, and compares the losses."""
    from .quiet import hush

    hush()
    first = _database(known).run(known.run)
    with paper.Follower(known.identifier or f"{first.record['model']}-again") as follower:
        again = first.reproduce(identifier=known.identifier, wait=True, progress=False, on_event=follower)
    for event in again.events():
        if isinstance(event, Note) and "reproduces" in event.data:
            paper.fact("", event.text)
    _tell(again, follower)
    paper.fact("Compared", f"{again.same_as(first)} as run {first.id}")
    return 0


def _changes(known: argparse.Namespace) -> dict[str, Any]:
    said = {name: getattr(known, name) for name in CHANGEABLE if getattr(known, name) is not None}
    model, changes = settings({**said, **named(known.more)})
    if known.changed_data:
        changes["changed_data"] = True
    return {**model, **changes}
