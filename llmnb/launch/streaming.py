"""Which documents a run reads while it trains, and a database that may be away meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import unstreamable
from ..errors import ConfigError, Fault, QueryError
from ..job import TrainJob

if TYPE_CHECKING:
    from ..store import Store
    from ..store.addressed import Addressed

__all__ = ["MOST_AT_ONCE", "Patient", "streamed"]

# Selections of more documents are streamed unless told otherwise. Reading 1 000 000 short ones first took 240 s on two
# very busy cores, so that a run of fewer waits less than a minute.
MOST_AT_ONCE = 200_000
_AT_ONCE = 500

Patiently = Callable[[Callable[[], Any]], Any]


class Patient:
    """The documents of one fold, for the engine; a database that is away is asked again."""

    def __init__(self, documents: Addressed, patiently: Patiently) -> None:
        self._documents, self._patiently = documents, patiently
        self.name, self.digest = documents.name, documents.digest

    def __len__(self) -> int:
        return len(self._documents)

    def fetch(self, indices: Sequence[int], fields: Sequence[str] | None = None) -> Sequence[Mapping[str, Any] | None]:
        """Documents by number, None for one that is gone."""
        return self._patiently(lambda: self._documents.fetch(indices, fields))  # type: ignore[no-any-return]

    def __call__(self) -> Iterator[Mapping[str, Any]]:
        """All that are still there, in order, to be read before the training."""
        for begin in range(0, len(self), _AT_ONCE):
            found = self.fetch(range(begin, min(begin + _AT_ONCE, len(self))))
            yield from (document for document in found if document is not None)


def streamed(job: TrainJob, store: Store, patiently: Patiently) -> dict[str, Patient]:
    """The folds of a selection whose documents are read while the run trains; {} when all are read before it.

    Raises:
        ConfigError: ``streaming=True``, where that cannot be.
    """
    config = job.config
    select, asked = config.select, config.streaming
    if asked is False or select is None:
        return {}
    why = unstreamable({"method": config.method, "select": select}, config.arguments, job.model.task)
    if why is None and not hasattr(store, "addressed"):
        why = "with log_to_db=False the documents are handed over as one file"
    try:
        if why is None:
            # The server's estimate may be off after a crash; what is counted decides, so a resumed run does the same.
            if not asked and patiently(lambda: store.estimate(select)) <= MOST_AT_ONCE // 2:
                return {}
            folds = patiently(lambda: store.addressed(select, None if asked else MOST_AT_ONCE))
            return {fold: Patient(found, patiently) for fold, found in folds.items()} if "train" in folds else {}
    except QueryError as error:
        why = str(error)
    if asked:
        raise ConfigError([Fault("streaming", f"is not possible: {why}", "leave it out")])
    return {}
