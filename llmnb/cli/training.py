"""``llmnb train``: a model, a collection, and any option."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Fault, LlmnbError
from . import paper
from .settings import known_settings, named, selection, settings

if TYPE_CHECKING:
    from ..db import Datalayer
    from ..launch.run import Run
    from ..llm import LLM

__all__ = ["described", "train"]


def train(known: argparse.Namespace) -> int:
    """Trains, and follows the run unless it was detached."""
    if known.options:
        print(textwrap.fill("  ".join(known_settings()), paper.width()))
        return 0
    model = described(known)
    from ..db import connect
    from .quiet import hush

    hush()
    database = connect(known.uri, home=known.home)
    paper.fact("Database", paper.place(database.store))
    if known.detach:
        run = _given(database.apply(model, wait=False))
        print(f"Run {run.id} goes on in the background.\n  llmnb watch {run.id}\n  llmnb stop {run.id}")
        return 0
    return _train_here(database, model)


def described(known: argparse.Namespace) -> LLM:
    """The model as the line describes it; all faults of the line at once, before any connection."""
    faults: list[Fault] = []
    model: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    more = list(known.more)
    if known.key:
        more += ["--key", known.key]
    try:
        model, trainer = settings(named(more))
    except ConfigError as error:
        faults += error.faults
    if known.model:
        model["model_name_or_path"] = known.model
    elif "model_name_or_path" not in model:
        faults.append(Fault("--model", "is needed", "a hub id or a folder"))
    if not known.collection:
        faults.append(Fault("--collection", "is needed: which documents to train on", "llmnb show collection"))
    if faults:
        raise ConfigError(faults)
    from ..llm import LLM
    from ..trainer import LLMTrainer

    trainer["select"] = selection(known.collection, known.filter, known.limit)
    identifier = getattr(known, "identifier", None) or "llm"
    made = LLM(identifier, trainer=LLMTrainer(f"{identifier}-trainer", **trainer), **model)
    assert made.trainer is not None
    made.trainer.freeze(made.spec())  # says what is wrong before a database is looked for
    return made


def _train_here(database: Datalayer, model: LLM) -> int:
    with paper.Follower("Training") as follower:
        run = _given(database.apply(model, on_event=follower, progress=False))
    for text in follower.warnings:
        paper.fact("", text)
    counts = follower.counts
    trained = f"{counts['trainable'] / 1e6:.2f} M of {counts['parameters'] / 1e6:.1f} M weights, " if counts else ""
    paper.fact(
        "Training",
        f"{trained}{follower.step} steps in {paper.about(follower.seconds)}, {paper.count(follower.rate)} tokens/s: "
        f"loss {paper.figure(follower.first_loss)} → {paper.figure(follower.loss)}"
        + (f", eval loss {paper.figure(follower.eval_loss)}" if follower.eval_loss is not None else ""),
    )
    paper.fact("Run", f"{run.id}, {run.state}")
    rows = [
        (c.step, paper.figure(c.metrics.get("eval_loss")), paper.size(c.size), "best" if c.best else "")
        for c in run.checkpoints()
    ]
    if rows:
        paper.table(("checkpoint", "eval loss", "size", ""), rows)
        print(f"Ask it: llmnb chat --model {model.identifier}")
    return 0


def _given(run: Run | None) -> Run:
    if run is None:
        raise LlmnbError("The model has no trainer.")
    return run
