"""``llmnb show``: what is in the database."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Fault, NotFound
from . import paper

if TYPE_CHECKING:
    from ..db import Datalayer

__all__ = ["checkpoints", "data", "show"]

_LOOKED_AT = 50  # documents, for the columns that a collection has


def show(known: argparse.Namespace) -> int:
    """Prints names, newest last."""
    from ..db import connect

    database = connect(known.uri, home=known.home)
    printers = {"collection": _collections, "model": _models, "checkpoint": _checkpoints, "run": _runs}
    printers["evaluation"] = _evaluations
    if known.kind is None:
        paper.fact("Database", paper.place(database.store))
        for kind, printer in printers.items():
            print(f"\n{kind}s")
            printer(database, None)
    else:
        printers[known.kind](database, known.identifier)
    return 0


def data(known: argparse.Namespace) -> int:
    """Collections, the columns of one, or what a training would see of it; 1 when it would refuse to start."""
    from ..db import connect
    from ..query import Collection

    if known.model is not None:
        return _inspected(known)
    asked = [*known.more[:1], *(f"--{name}" for name in ("key", "filter", "limit", "row") if getattr(known, name))]
    if asked:
        todo, what = "--model M says whose tokenizer reads the documents", asked[0]
        raise ConfigError([Fault(what, "is about an inspection, which needs a model", todo)])
    database = connect(known.uri, home=known.home)
    if known.collection is None:
        _collections(database, None)
        return 0
    _collections(database, known.collection)
    columns: dict[str, list[Any]] = {}
    found = list(database.execute(Collection(known.collection).find().limit(_LOOKED_AT)))
    for document in found:
        for name, value in document.items():
            columns.setdefault(name, []).append(value)
    room = paper.width() - 40
    print()
    paper.table(
        ("column", "type", "", "example"),
        [
            (
                name,
                " or ".join(sorted({type(value).__name__ for value in values})),
                "" if len(values) == len(found) else f"in {len(values)} of {len(found)}",
                paper.one_line(values[0], room),
            )
            for name, values in columns.items()
        ],
        indent=2,
    )
    return 0


def _inspected(known: argparse.Namespace) -> int:
    from ..db import connect
    from .training import described

    model = described(known)
    found = connect(known.uri, home=known.home).inspect(model)
    print(found if known.row is None else found.row(known.row))
    return 0 if found.ok else 1


def checkpoints(known: argparse.Namespace) -> int:
    """Checkpoints of all runs, or of one."""
    from ..db import connect

    database = connect(known.uri, home=known.home)
    found = database.show("checkpoint")
    name = found[-1] if known.experiment == "latest" and found else known.experiment
    if known.remove is not None:
        if name is None:
            raise ConfigError([Fault("--remove", "needs a run", "llmnb checkpoints RUN --remove STEP")])
        database.remove("checkpoint", name, known.remove)
        print(f"Removed {name}/{known.remove}.")
        return 0
    _checkpoints(database, name)
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


def _evaluations(database: Datalayer, name: str | None) -> None:
    if name is not None:
        print(database.evaluation(name))
        return
    rows = [(e.id, e.rows.get("words", ""), ", ".join(e.names[1:])) for e in reversed(database.evaluations())]
    _table(("evaluation", "of", "checkpoints"), rows)


def _runs(database: Datalayer, name: str | None) -> None:
    records = database.store.runs.list() if name is None else [database.store.runs.get(name)]
    _table(
        ("run", "model", "state", "started"),
        [(r["_id"], r["model"], r["state"], paper.local_time(r.get("started"))) for r in reversed(records)],
    )
