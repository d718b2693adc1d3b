"""``%llm_checkpoints`` with one checkpoint: merge, export, remove."""

from __future__ import annotations

from typing import Any

from IPython.display import display

from ..errors import ConfigError, Fault
from .session import Session

__all__ = ["with_checkpoint"]


def with_checkpoint(session: Session, known: Any) -> Any:
    """Merges, exports or removes the one checkpoint that a line names.

    Returns:
        Of a merge the proof, of an export the folder.

    Raises:
        ConfigError: two of them are asked for, or no checkpoint is named.
    """
    database = session.database()
    asked = [f"--{name}" for name in ("merge", "export", "remove") if getattr(known, name)]
    if len(asked) > 1:
        raise ConfigError([Fault(" and ".join(asked), "are two things", "one at a time")])
    if not known.experiment or (known.remove and "/" not in known.experiment):
        raise ConfigError([Fault(asked[0], "needs a checkpoint", f"EXPERIMENT/STEP {asked[0]} …")])
    if known.merge:
        return _merged(session, known.experiment, known.merge)
    checkpoint = database.named(known.experiment)
    if known.export:
        return database.export(checkpoint, known.export)
    database.remove("checkpoint", checkpoint.experiment, checkpoint.step)
    print(f"Removed {checkpoint}.")
    return None


def _merged(session: Session, name: str, folder: str) -> Any:
    """In a notebook what is being done is said in one line that changes."""
    database = session.database()
    if not session.in_notebook:
        return database.merge(name, folder)
    line = display({"text/plain": "Merging …"}, raw=True, display_id=True)
    report = database.merge(
        name, folder, say=lambda words: line.update({"text/plain": f"Merging: {words} …"}, raw=True)
    )
    line.update({"text/plain": f"Merged {name}."}, raw=True)
    return report
