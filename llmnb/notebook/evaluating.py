"""``%llm_evaluate``'s words as ``db.evaluate``'s, and the line that says how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import display

from ..errors import ConfigError, Fault, near
from ..evaluation import Evaluation
from ..evaluation.measures import GROUPS, KNOWN
from ..form import selection

__all__ = ["evaluate", "metrics_of"]

_SETTINGS = ("max_new_tokens", "batch_size", "rank_by")


def evaluate(session: Any, known: Any, names: Mapping[str, Any]) -> Evaluation:
    """Carries a line out.

    Args:
        session: whose database is asked.
        known: the line, parsed.
        names: the notebook's variables: own metrics and a transform are given by name.

    Raises:
        ConfigError: options that do not go together, names that are not there.
    """
    if known.filter and not known.collection:
        raise ConfigError([Fault("--filter", "narrows a --collection", "give --collection, too")])
    words: dict[str, Any] = {k: getattr(known, k) for k in _SETTINGS if getattr(known, k) is not None}
    words["metrics"] = metrics_of(known.metrics, names)
    if known.collection:
        words["select"] = selection(known.collection, known.filter, None)
    if known.transform:
        words["transform"] = _function(known.transform, names)
    words.update(limit=known.limit, base=known.base)
    asked = known.checkpoints or "latest"
    database = session.database()
    if not session.in_notebook:
        found: Evaluation = database.evaluate(asked, **words)
        return found
    line = display({"text/plain": "Evaluating …"}, raw=True, display_id=True)

    def say(text: str) -> None:
        line.update({"text/plain": f"Evaluating: {text} …"}, raw=True)

    try:
        found = database.evaluate(asked, say=say, **words)
    except BaseException:
        line.update({"text/plain": "Not evaluated."}, raw=True)
        raise
    line.update({"text/plain": f"Evaluated: {', '.join(found.names)}."}, raw=True)
    return found


def metrics_of(words: Sequence[str] | None, names: Mapping[str, Any]) -> list[Any] | None:
    """Metrics as they were typed, parted by spaces or commas; other names are the notebook's functions."""
    if not words:
        return None
    known = {name.lower() for name in (*KNOWN, *GROUPS)}
    asked = [part for word in words for part in word.split(",") if part]
    return [names[a] if a.lower() not in known and callable(names.get(a)) else a for a in asked]


def _function(name: str, names: Mapping[str, Any]) -> Any:
    if not callable(names.get(name)):
        close = near(name, [n for n, value in names.items() if callable(value) and not n.startswith("_")])
        todo = f"did you mean {close[0]}?" if close else "the name of a variable that holds the run's function"
        raise ConfigError([Fault("--transform", f"there is no function {name!r}", todo)])
    return names[name]
