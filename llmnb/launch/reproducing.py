"""A run once more, from its record alone, as a run and a model of its own; and whether it came out the same.

What changed since the first run is said on the new one: versions of packages before it begins, rows and base when they
were read. Nothing is refused for it, because seeing what a change does is a reason to run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..engine import manifest
from ..errors import RunError
from ..events import Event, Note
from .resuming import Given, objects_of, settled, spec_of
from .run import Run
from .start import check, launch

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["Sameness", "changed_rows", "reproduce", "sameness"]


@dataclass(frozen=True)
class Sameness:
    """How two runs' training losses compare, at the steps that both logged.

    Attributes:
        steps: how many steps both logged.
        missing: how many steps only one of them logged.
        equal: at how many of ``steps`` the losses are equal to the last bit.
        largest: the largest absolute difference; 0.0 when all are equal.
    """

    steps: int
    missing: int
    equal: int
    largest: float

    @property
    def same(self) -> bool:
        """True when every loss is equal, and none is missing."""
        return self.steps > 0 and self.missing == 0 and self.equal == self.steps

    def __str__(self) -> str:
        if self.same:
            return f"the same loss at each of {self.steps} steps, to the last bit"
        rest = f"; {self.missing} steps only in one of them" if self.missing else ""
        return f"the same loss at {self.equal} of {self.steps} steps, largest difference {self.largest:.3g}{rest}"


def sameness(one: Run, other: Run) -> Sameness:
    """Compares the training losses of two runs."""
    a, b = ({point["step"]: point["loss"] for point in run.metrics() if "loss" in point} for run in (one, other))
    both = a.keys() & b.keys()
    # Equal also when both are no numbers.
    gaps = [0.0 if a[s] == b[s] or (a[s] != a[s] and b[s] != b[s]) else abs(a[s] - b[s]) for s in both]
    return Sameness(len(both), len(a.keys() ^ b.keys()), sum(gap == 0.0 for gap in gaps), max(gaps, default=0.0))


def reproduce(
    store: Store,
    run_id: str,
    given: Given,
    *,
    identifier: str | None = None,
    wait: bool | None = None,
    progress: bool = True,
    on_event: Callable[[Event], Any] | None = None,
) -> Run:
    """Runs a run again. Arguments, returns and raises as for ``Run.reproduce``."""
    first = Run(store, run_id)
    record = first.record
    counts = record.get("counts") or {}
    if not counts.get("rows"):
        raise RunError(
            f"Run {first.id} never began to train: there is nothing to reproduce.",
            seen=f"state {record['state']}",
            todo="run.resume() starts it again",
        )
    recorded = TrainConfig.from_json(record["config"])
    config = settled(recorded, record)
    objects = objects_of(recorded, record, given)
    spec = spec_of(store, record)
    spec = replace(spec, identifier=identifier or f"{spec.identifier}-again")
    background = bool(record.get("background", record.get("job")))
    wait = not background if wait is None else wait
    check(store, spec, config, objects, wait=wait, background=background)
    return launch(
        store,
        spec=spec,
        version=store.models.add(spec, config),
        config=config,
        parcel_objects=objects,
        wait=wait,
        background=background,
        on_event=on_event,
        progress=progress,
        reproduces={
            "run": first.id,
            "changed": [*_changed_plan(record), *_changed_versions(counts.get("versions") or {})],
            "rows_digest": counts.get("rows_digest"),
            "rows": counts.get("rows"),
            "base_fingerprint": counts.get("base_fingerprint"),
        },
    )


def _changed_plan(record: Mapping[str, Any]) -> list[str]:
    """A run that was trained further had the learning rates of a shorter plan before."""
    return (
        ["the plan: that run was trained further, this one has the longer plan at once"]
        if record.get("extended")
        else []
    )


def _changed_versions(then: Mapping[str, str]) -> list[str]:
    now = manifest.versions()
    names = sorted(name for name in then.keys() | now.keys() if then and then.get(name) != now.get(name))
    return [f"{name} {then.get(name, 'absent')} then, {now.get(name, 'absent')} now" for name in names]


def changed_rows(first: Mapping[str, Any], counts: Mapping[str, Any]) -> Note:
    """What a run that reproduces another says when it has read its rows and its base.

    Args:
        first: the record's ``reproduces``.
        counts: of the new run.
    """
    changed = list(first.get("changed") or ())
    for name, what in (("rows_digest", "the rows"), ("base_fingerprint", "the base model")):
        then, now = first.get(name), counts.get(name)
        if then and now and then != now:
            many = f" ({first.get('rows')} then, {counts.get('rows')} now)" if name == "rows_digest" else ""
            changed.append(f"{what}{many}")
    if changed:
        text = f"This run reproduces {first['run']}. Changed since: {'; '.join(changed)}."
        return Note(level="warning", text=text, data={"reproduces": first["run"], "changed": changed})
    text = f"This run reproduces {first['run']}: the same rows, base and package versions."
    return Note(text=text, data={"reproduces": first["run"], "changed": []})
