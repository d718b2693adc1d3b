"""An inspection in a process of its own: the caller loads neither torch nor a tokenizer, and no row passes through it.

``inspect`` is the caller's end; ``python -m llmnb.launch.inspecting`` is the other, which is given one job through its
standard input, reads the documents itself, answers once, and ends. Documents of a database that only the caller can
reach (mongomock, a Database object) travel in the job.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..config import ModelSpec, TrainConfig
from ..errors import LlmnbError, ModelError
from ..inspection import Inspection, ShownRow
from . import aside

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["inspect"]


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
        return _carried_out(InspectJob(spec, config, uri, home, documents, tuple(outside), transform, tuple(show)))

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


def _carried_out(job: InspectJob) -> dict[str, Any]:
    import cloudpickle

    with tempfile.TemporaryFile() as log:
        process = aside.start("inspecting", log)
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):  # it has ended: its last words say why
                process.stdin.write(cloudpickle.dumps(job))  # a notebook's own transform travels by value
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            aside.finish(process)
            if process.stdout is not None:
                process.stdout.close()
        if not line:
            raise _ended(process, log)
    answer = json.loads(line)
    if "error" in answer:
        raise pickle.loads(base64.b64decode(answer["error"]))  # our own child wrote it, through a private pipe
    return dict(answer["facts"])


def _ended(process: subprocess.Popen[bytes], log: IO[bytes]) -> ModelError:
    log.seek(0)
    seen = log.read()[-800:].decode("utf-8", "replace").strip() or f"exit status {process.poll()}"
    return ModelError("The inspection's process has ended.", seen=seen, todo="when memory was short: select less")


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
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand before the answer
    source = os.fdopen(os.dup(0), "rb")
    job = pickle.load(source)  # our own parent wrote it
    threading.Thread(target=lambda: (source.read(), os._exit(0)), daemon=True).start()  # whoever asked is gone
    try:
        answer: dict[str, Any] = {"facts": _answered(job)}
    except Exception as error:  # noqa: BLE001 - the border of the process: the caller raises it
        own = error
        if not isinstance(error, LlmnbError):  # the caller may have no torch, so only errors of our own cross
            own = ModelError("The documents could not be inspected.", seen=f"{type(error).__name__}: {error}")
        answer = {"error": base64.b64encode(pickle.dumps(own)).decode()}
    out.write(json.dumps(answer).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
