"""A run whose cluster never reaches the database (``log_to_db=False``): its store is a folder that both sides see.

The launcher puts there what the run needs: its record, its rows, the checkpoint it starts from. The worker works with
the folder as with a database (``store.folder``). What it says and stores there is brought home by a *courier*, a
process of its own on the caller's machine (``courier``), which also carries letters out.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..errors import ConfigError, Fault, LlmnbError
from .parcel import import_paths
from .rayconfigs import storage_path

try:
    import fcntl
except ImportError:  # Windows: two couriers are not kept apart; what they bring is stored once all the same
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from ..job import TrainJob
    from ..store import FolderStore, Store

__all__ = [
    "carry",
    "ensure_courier",
    "furnish",
    "furnished",
    "hidden_folder",
    "is_s3",
    "open_for",
    "show_folder",
    "there_for",
]

# A courier that ends at once (its folder cannot be reached from here) is not started again and again.
_AGAIN_S = 30.0
_started: dict[str, float] = {}


def is_s3(url: str | None) -> bool:
    """True for an address of S3."""
    return str(url or "").startswith(("s3://", "s3a://"))


def there_for(job: TrainJob, near: bool) -> str | None:
    """Where a run lives that must not need the database; None for one that may.

    Args:
        job: with ``workdir`` on this machine.
        near: True when the cluster is on this machine.

    Raises:
        ConfigError: there is no folder that both see.
    """
    if job.config.log_to_db:
        return None
    path = storage_path(job.ray_configs.get("run_config"))
    if path is None and not near:
        todo = "ray_configs={'run_config': RunConfig(storage_path='s3://bucket/folder')}, or a folder that both mount"
        raise ConfigError([Fault("log_to_db", "is False, and no storage is given that the cluster shares", todo)])
    root = path or job.workdir
    url = root if "://" in root else f"file://{os.path.abspath(os.path.expanduser(root))}"
    return f"{url.rstrip('/')}/llmnb/{job.submission}"


def furnish(job: TrainJob, store: Store, url: str) -> None:
    """Puts into the folder what the run needs of the database.

    Args:
        job: the run; recorded.
        store: the database.
        url: the folder.
    """
    from ..store import open_folder

    with open_folder(url, home=store.home) as folder:
        checkpoints = [store.checkpoints.record(job.run, c.step) for c in store.checkpoints.list(job.run)]
        model = store.models.get(job.model.identifier, job.version)
        folder.adopt(store.runs.get(job.run), model, checkpoints)
        folder.events.append(job.run, store.events.since(job.run))
        for experiment, step, resume in _needed(job, store):
            carry(store, folder, experiment, step, resume=resume)
        select = job.config.select
        if select is not None:
            for fold in ("train", "valid"):
                folder.put_rows(select, fold, store.rows(select, fold=fold))
        for chosen in job.config.eval_selects.values():
            folder.put_rows(chosen, None, store.rows(chosen))


@contextlib.contextmanager
def furnished(job: TrainJob, store: Store, url: str | None) -> Iterator[None]:
    """``furnish``; what fails meanwhile leaves no rows behind. Without a folder there is nothing to do."""
    from ..store import open_folder

    if url is None:
        yield
        return
    try:
        furnish(job, store, url)
        yield
    except BaseException:
        with contextlib.suppress(LlmnbError):  # the error that is on its way says more
            open_folder(url, home=store.home).remove()
        raise


def show_folder(artifacts: str | None) -> None:
    """Makes the folder that a database keeps artifacts in, so that a worker can tell whether it sees it."""
    if str(artifacts or "").startswith("file://"):
        Path(str(artifacts).removeprefix("file://")).mkdir(parents=True, exist_ok=True)


def hidden_folder(artifacts: str | None) -> str | None:
    """In a worker: the folder of the database's artifacts when it is not seen from here."""
    path = str(artifacts or "")
    return path if path.startswith("file://") and not Path(path.removeprefix("file://")).is_dir() else None


def _needed(job: TrainJob, store: Store) -> Iterator[tuple[str, int, bool]]:
    """(experiment, step, with what resuming needs) of the checkpoints that the run starts from."""
    name = job.model.adapter_id
    if isinstance(name, Checkpoint):
        yield name.experiment, name.step, False
    elif name:
        experiment, _, step = str(name).rpartition("/")
        known = store.checkpoints.experiments()
        if str(name) in known:
            yield str(name), store.checkpoints.get(str(name)).step, False
        elif experiment in known and step.isdigit():
            yield experiment, int(step), False
    resumable = [c.step for c in store.checkpoints.list(job.run) if c.resumable]
    if resumable:
        yield job.run, max(resumable), True


def carry(source: Any, target: Any, experiment: str, step: int, *, resume: bool) -> None:
    """Copies a checkpoint from one store to another, proved by its digests on the way.

    Args:
        source: a Store or a FolderStore.
        target: the other.
        experiment: of the checkpoint.
        step: of the checkpoint.
        resume: with what resuming needs.
    """
    found = source.checkpoints.get(experiment, step)
    target.checkpoints.put(
        experiment,
        step,
        source.checkpoints.fetch(found, resume=resume),
        kind=found.kind,
        metrics=found.metrics,
        base=found.base,
        base_fingerprint=found.base_fingerprint,
        best=found.best,
    )


def open_for(job: TrainJob) -> Store | FolderStore:
    """In a worker: the store of its job."""
    from ..store import open_folder, open_store

    return open_folder(job.away) if job.away else open_store(job.uri, artifacts=job.artifacts)


# --- the courier ----------------------------------------------------------------------------------------------


def ensure_courier(store: Store, run: str) -> None:
    """Starts the courier of a run on this machine, unless there is one."""
    from .courier import FINISHED

    now = time.monotonic()
    if store.uri is None or now - _started.get(run, -_AGAIN_S) < _AGAIN_S:
        return
    record = store.runs.get(run)
    if not record.get("away") or record.get("courier") == FINISHED:
        return
    folder = Path(store.home).expanduser().absolute() / "couriers"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / f"{run}.lock", "w", encoding="ascii") as lock:
        if not _taken(lock):
            return
        _started[run] = now
        note = folder / f"{run}.json"
        handle = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"run": run, "uri": store.uri, "home": str(folder.parent)}, file)
        with open(folder / f"{run}.log", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "llmnb.launch.courier", str(note)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(import_paths())},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=() if fcntl is None else (lock.fileno(),),  # the lock is the courier's from now on
            )


def _taken(file: IO[str]) -> bool:
    """Locks a file until the last process that has it open ends; False when it is locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
