"""What the checkpoint picker shows: rows, words and the still table, as functions of what the database holds.

No widget is known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import LlmnbError, NotFound
from ..evaluation import Evaluation, drawing
from . import words
from .tables import Table, local_time, short

__all__ = ["Listed", "found", "fault", "rows", "table"]

SHOWN = 200  # rows of the picker; nobody scrolls through more


class Listed(list[Checkpoint]):
    """Checkpoints, newest first. Shown as a table; in a notebook not a second time beside the picker."""

    def __init__(self, checkpoints: Sequence[Checkpoint], *, seen: bool = False) -> None:
        super().__init__(checkpoints)
        self._seen = seen

    def __repr__(self) -> str:
        return repr(table(self))

    def _repr_html_(self) -> str:
        return table(self)._repr_html_()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if self._seen:  # the picker stands there already; the next time somebody wants to see it
            self._seen = False
            return
        display(table(self))


def found(database: Any, experiment: str | None) -> list[Checkpoint]:
    """The checkpoints of an experiment, or of all, newest first.

    Raises:
        NotFound: no such experiment, with near names.
    """
    experiments = database.show("checkpoint")
    if experiment is not None and experiment not in experiments:
        raise NotFound("experiment", experiment, experiments)
    names = experiments[::-1] if experiment is None else [experiment]
    listed = [checkpoint for name in names for checkpoint in database.checkpoints(name)]
    return sorted(listed, key=lambda c: (c.created, c.experiment, c.step), reverse=True)


def rows(database: Any, experiment: str | None) -> tuple[list[dict[str, Any]], int]:
    """The picker's rows, newest first, and how many older ones are not shown. An experiment may have none yet."""
    try:
        listed = found(database, experiment)
    except NotFound:
        return [], 0
    holders = database.store.models.holders() if listed else {}
    return [_row(c, holders.get(str(c), ())) for c in listed[:SHOWN]], max(0, len(listed) - SHOWN)


def _row(checkpoint: Checkpoint, holders: Sequence[str]) -> dict[str, Any]:
    loss = checkpoint.metrics.get("eval_loss")
    return {
        "name": str(checkpoint),
        "experiment": checkpoint.experiment,
        "step": words.number(checkpoint.step),
        "loss": "" if loss is None else words.figure(loss),
        "size": words.size(checkpoint.size),
        "created": checkpoint.created,
        "best": checkpoint.best,
        "whole": checkpoint.kind != "adapter",
        "resumable": checkpoint.resumable,
        "held": _held(holders),
    }


def _held(holders: Sequence[str]) -> str:
    """Why a checkpoint cannot be removed, or ""."""
    names = [" v".join(holder.rsplit("/", 1)) for holder in holders]
    if not names:
        return ""
    if len(names) == 1:
        return f"the model {names[0]} answers with it"
    return f"the models {', '.join(names[:-1])} and {names[-1]} answer with it"


def table(checkpoints: Sequence[Checkpoint], caption: str = "") -> Table:
    """The same without a widget."""
    listed = []
    for saved in checkpoints:
        loss = saved.metrics.get("eval_loss")
        base = saved.base.rstrip("/").rpartition("/")[2] if saved.base.startswith("/") else saved.base
        listed.append(
            (
                saved.experiment,
                saved.step,
                "" if loss is None else words.figure(loss),
                words.size(saved.size),
                "best" if saved.best else "",
                saved.kind,
                base,
                local_time(saved.created),
            )
        )
    return Table(
        ("experiment", "step", "eval loss", "size", "", "kind", "base", "saved"),
        listed,
        caption=caption,
        empty="There are no checkpoints yet.",
        note="%%llm_chat --checkpoint EXPERIMENT/STEP asks one" if listed else "",
    )


def fault(error: LlmnbError) -> str:
    """An error in one or two sentences."""
    seen = f" ({short(error.seen, 200)})" if error.seen else ""
    what = error.what.rstrip(".") + seen + "."
    return f"{what} To do: {error.todo}." if error.todo else what


def merged(name: str, folder: str, report: Any) -> dict[str, Any]:
    """The proof of a merge, for the page."""
    head = f"Merged {name} into {folder} ({words.size(report.size)}): it says what the adapter says."
    return {"head": head, "lines": [list(line) for line in report.lines()]}


def evaluated(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation, for the page: its table, what it was measured on, and rows of each model."""
    columns, figures = drawing.table(evaluation)
    lines = [["measured on", drawing.measured_on(evaluation)]]
    lines += [["note", note] for note in evaluation.notes]
    if evaluation.id:
        lines.append(["kept as", evaluation.id])
    examples = [
        {
            "name": scores.name,
            "shown": [[head, drawing.parts(row)] for head, row in drawing.examples(evaluation, scores)],
        }
        for scores in evaluation.models
    ]
    return {
        "head": f"Evaluated {', '.join(evaluation.names[1:])} against the base {drawing.base_name(evaluation)}.",
        "lines": lines,
        "table": {"columns": columns, "rows": figures},
        "examples": [example for example in examples if example["shown"]],
    }


def exported(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    """Where an export went, and what loads it."""
    if checkpoint.kind == "adapter":
        how = f'PeftModel.from_pretrained(model, "{folder}") on {checkpoint.base}'
    else:
        how = f'AutoModelForCausalLM.from_pretrained("{folder}")'
    lines = [["size", words.size(checkpoint.size)], ["verified", "each file by its sha256"], ["loads with", how]]
    return {"head": f"Exported {checkpoint} to {folder}.", "lines": lines}


def asked(names: Sequence[str]) -> dict[str, Any]:
    """How to ask models where no chat stands beside the picker."""
    first, *rest = sorted(names, key=lambda name: name == "base")
    compare = f" --compare {' '.join(rest)}" if rest else ""
    line = f"%%llm_chat --checkpoint {first}{compare}"
    return {"head": f"To ask {' and '.join(names)}:", "lines": [["in a cell of its own", line]]}


def state(busy: Mapping[str, Any] | None, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is being done and what came of the last thing."""
    return {"busy": dict(busy) if busy else None, "result": dict(result) if result else None}
