"""An inspection in a process of its own: the caller loads neither torch nor a tokenizer, and no row passes through it.

``inspect`` is the caller's end; ``python -m llmnb.launch.inspecting`` is the other, which is given one job through its
standard input, reads the documents itself, answers once, and ends. Documents of a database that only the caller can
reach (mongomock, a Database object) travel in the job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelSpec, TrainConfig
from ..inspection import Inspection, ShownRow
from . import collector
from .errand import Errand, own, serve

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["inspect"]

_MEMORY = "when memory was short: select less"


@dataclass(frozen=True)
class InspectJob:
    """Attributes:

    spec: whose tokenizer reads.
    config: what is read, and how.
    uri: of the database, a secret; None when the documents are here.
    home: local folder of the database's caches.
    documents: by the name of their set; None when the other side reads them.
    outside: of these documents, the _ids of those in neither fold.
    transform: the person's function.
    show: _ids of rows to show.
    """

    spec: ModelSpec
    config: TrainConfig
    uri: str | None = field(default=None, repr=False)
    home: str = ""
    documents: Mapping[str, Sequence[Mapping[str, Any]]] | None = field(default=None, repr=False)
    outside: tuple[str, ...] = ()
    transform: Callable[..., Any] | None = None
    show: tuple[str, ...] = ()


def inspect(
    store: Store, spec: ModelSpec, config: TrainConfig, transform: Callable[..., Any] | None = None
) -> Inspection:
    """What a training would see. Waits for it.

    Args:
        store: has the documents.
        spec: the model; its weights are not loaded.
        config: of the trainer, frozen.
        transform: the trainer's function.

    Raises:
        LlmnbError: the selection is empty; the tokenizer cannot be loaded; the settings do not go together.
        ModelError: the process ended.
    """

    def ask(show: Sequence[str]) -> dict[str, Any]:
        documents = None
        outside: list[str] = []
        if store.in_process:
            data, outside = _data(store, config)
            documents = {name: list(found) for name, found in data.items()}
        uri = None if store.in_process else store.uri
        home = str(Path(store.home).expanduser().absolute())
        job = InspectJob(spec, config, uri, home, documents, tuple(outside), transform, tuple(show))
        return dict(Errand("inspecting", "inspection", _MEMORY).carry_out(job))

    def look(ids: list[str]) -> tuple[ShownRow, ...]:
        return Inspection.from_dict(ask(ids)).shown

    return Inspection.from_dict(ask(()), look)


Documents = Iterable[Mapping[str, Any]]


def _data(store: Store, config: TrainConfig) -> tuple[dict[str, Documents], list[str]]:
    """Documents by set, those that train first, and the _ids of those in neither fold.

    A selection is read once: what validates of it is kept meanwhile, so the lists fill while the first set is read.
    """
    select = config.select
    assert select is not None
    outside: list[str] = []
    if config.eval_selects:
        others = {name: store.rows(chosen) for name, chosen in config.eval_selects.items()}
        return {"train": store.rows(select, fold="train"), **others}, outside
    valid: list[Mapping[str, Any]] = []

    def train() -> Iterator[Mapping[str, Any]]:
        for document in store.rows(select):
            if document["_fold"] == "train":
                yield document
            elif document["_fold"] == "valid":
                valid.append(document)
            else:
                outside.append(str(document.get("_id")))

    return {"train": train(), "valid": valid}, outside


# --- the other end --------------------------------------------------------------------------------------------


def _answered(job: InspectJob) -> dict[str, Any]:
    from ..engine.inspecting import inspect_rows
    from ..inspection.report import plain

    config = job.config
    with contextlib.ExitStack() as stack:
        if job.documents is not None:
            data: Mapping[str, Documents] = job.documents
            outside: Sequence[str] = job.outside
        else:
            from ..store import open_store

            data, outside = _data(stack.enter_context(open_store(job.uri, home=job.home)), config)
        name = config.select.collection if config.select is not None else ""
        found = inspect_rows(
            data,
            job.spec,
            config,
            transform=job.transform,
            show=job.show,
            collection=name,
            outside=outside,
        )
        return plain(found)


def main() -> None:
    """``python -m llmnb.launch.inspecting``."""
    collector.seldom()
    serve(lambda job, _say: _answered(job), lambda error: own(error, "The documents could not be inspected.", _MEMORY))


if __name__ == "__main__":
    main()
