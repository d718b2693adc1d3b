"""``llmnb show``: what is in the database."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import NotFound
from . import paper

if TYPE_CHECKING:
    from ..db import Datalayer

__all__ = ["show"]


def show(known: argparse.Namespace) -> int:
    """Prints names, newest last."""
    from ..db import connect

    database = connect(known.uri, home=known.home)
    printers = {"collection": _collections, "model": _models, "checkpoint": _checkpoints, "run": _runs}
    if known.kind is None:
        paper.fact("Database", database.store.describe())
        for kind, printer in printers.items():
            print(f"\n{kind}s")
            printer(database, None)
    else:
        printers[known.kind](database, known.identifier)
    return 0


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    if rows:
        paper.table(columns, rows, indent=2)
    else:
        print("  none")


def _collections(database: Datalayer, name: str | None) -> None:
    found = database.store.collections()
    if name is not None and name not in found:
        raise NotFound("collection", name, sorted(found))
    _table(("collection", "documents"), [(n, paper.count(c)) for n, c in found.items() if name in (None, n)])


def _models(database: Datalayer, name: str | None) -> None:
    known = database.show("model")
    if name is not None and name not in known:
        raise NotFound("model", name, known)
    rows = []
    for identifier in known if name is None else [name]:
        for version in database.store.models.versions(identifier):
            record = database.store.models.get(identifier, version)
            base = record["spec"]["model_name_or_path"]
            rows.append((identifier, version, record.get("checkpoint") or "", base))
    _table(("model", "version", "checkpoint", "base"), rows)


def _checkpoints(database: Datalayer, name: str | None) -> None:
    experiments = database.show("checkpoint")
    if name is not None and name not in experiments:
        raise NotFound("experiment", name, experiments)
    rows = []
    for experiment in experiments if name is None else [name]:
        for c in database.checkpoints(experiment):
            loss = paper.figure(c.metrics.get("eval_loss"))
            rows.append((experiment, c.step, loss, paper.size(c.size), "best" if c.best else "", c.kind))
    _table(("experiment", "step", "eval loss", "size", "", "kind"), rows)


def _runs(database: Datalayer, name: str | None) -> None:
    records = database.store.runs.list() if name is None else [database.store.runs.get(name)]
    _table(
        ("run", "model", "state", "started"),
        [(r["_id"], r["model"], r["state"], paper.local_time(r.get("started"))) for r in reversed(records)],
    )
