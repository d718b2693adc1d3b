"""An evaluation as a value: what each model scored on the same rows, and which rows it did best and worst.

Knows neither models nor databases; JSON both ways. ``measures`` has the metrics' names, ``drawing`` the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import NotFound
from .measures import measure

__all__ = ["BASE", "Evaluation", "Example", "Scores"]

BASE = "base"


@dataclass(frozen=True)
class Example:
    """One row and what a model made of it.

    Attributes:
        id: of the document.
        score: of the metric that rows are ranked by.
        prompt: what was asked, "" for plain text.
        reference: the right answer, or the text.
        answer: the model's; None where none was asked for.
        scores: of every metric that a single row has.
    """

    id: str
    score: float
    prompt: str
    reference: str
    answer: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What one model scored.

    Attributes:
        name: "base" or "EXPERIMENT/STEP".
        metrics: name → figure.
        counts: ``rows``; ``tokens`` and ``trained`` (those that perplexity and token accuracy are taken over);
            ``answers`` (how many were compared) and ``cut`` (answers that ended at their limit).
        seconds: it took, without loading.
        best, worst: rows, the best and the worst first.
    """

    name: str
    metrics: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    best: tuple[Example, ...] = ()
    worst: tuple[Example, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """Reads what ``Evaluation.to_json`` wrote of it."""
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        for name in ("best", "worst"):
            known[name] = tuple(Example(**example) for example in data.get(name, ()))
        return cls(**known)


@dataclass(frozen=True)
class Evaluation:
    """The base and checkpoints of it, measured on the same rows.

    Attributes:
        models: the base first.
        metrics: in the order they were asked for.
        base: the base model as it was named.
        rows: where the rows are from: ``words``, ``collection``, ``select``, ``fold``, ``documents``,
            ``limit``, and of what was measured ``used``, ``kind`` and ``digest`` (of the base's token ids and labels).
        rank_by: the metric that best and worst rows are told by.
        settings: limit, max_new_tokens, batch_size, what BLEU was computed with, …
        notes: sentences for the person: what was cut, left out, or is to be known.
        versions: of the packages.
        created: seconds since the epoch (UTC).
        id: in the database; "" while it is not stored.
    """

    models: tuple[Scores, ...]
    metrics: tuple[str, ...]
    base: str
    rows: Mapping[str, Any] = field(default_factory=dict)
    rank_by: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0
    id: str = ""

    def __getitem__(self, name: str) -> Scores:
        """The scores of a model by name: "base", or "EXPERIMENT/STEP".

        Raises:
            NotFound: with near names.
        """
        for scores in self.models:
            if scores.name == str(name):
                return scores
        raise NotFound("evaluated model", name, self.names)

    @property
    def names(self) -> list[str]:
        """Who was measured, the base first."""
        return [scores.name for scores in self.models]

    def gain(self, name: str, metric: str) -> float:
        """How much better than the base a model is: positive is better, whichever way the metric counts."""
        if metric not in self.metrics:
            raise NotFound("metric", metric, self.metrics)
        gap = self[name].metrics[metric] - self[BASE].metrics[metric]
        return -gap if measure(metric).lower else gap

    def best(self, metric: str) -> str:
        """The name of the model that did best by a metric."""
        if metric not in self.metrics:
            raise NotFound("metric", metric, self.metrics)
        figures = {s.name: s.metrics[metric] for s in self.models if s.metrics[metric] == s.metrics[metric]}
        choose = min if measure(metric).lower else max
        return choose(figures, key=figures.__getitem__) if figures else BASE

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Reads ``to_json``; unknown fields are passed over."""
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        known["models"] = tuple(Scores.from_json(scores) for scores in data["models"])
        known["metrics"], known["notes"] = tuple(data["metrics"]), tuple(data.get("notes", ()))
        return cls(**known)

    def __repr__(self) -> str:
        from .drawing import text

        return text(self)

    def _repr_html_(self) -> str:
        from .drawing import page

        return page(self)
