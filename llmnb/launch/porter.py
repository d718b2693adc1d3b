"""The first thing that a job does on a cluster that is not ours. It travels with the job and needs Python alone.

It looks whether what the run needs is there, says what is not, in the job's log and where it can on the run's record,
and hands over to ``llmnb.launch.worker``. Until it has looked, it imports nothing of llmnb.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmnb.job import TrainJob

__all__ = ["SAYS", "main", "missing"]

SAYS = "llmnb-says: "
# How long the database may take to answer the first time, seconds. Later a run waits much longer for it.
_FIRST_ANSWER_S = 10.0
# How long the end of the job waits for its parcel to be overwritten, seconds.
_FORGET_S = 60.0


def main() -> int:
    """Runs in the folder that the parcel was unpacked into."""
    here = Path(__file__).resolve().parent
    path = here / "note.json"
    note = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()  # it names the database
    path = here / "job.pickle"
    fault = missing(note) or _unready(path)
    cleaner = threading.Thread(target=_forget, args=(note["package"],), daemon=True)
    cleaner.start()
    if fault is None:
        from llmnb.launch.worker import main as work

        job = _read(path)
        os.chdir(Path.home())  # the parcel's folder is Ray's, which may remove it once nobody asks for the parcel
        code = work([str(path)])
        if code == 0:
            _tidy(job)
        cleaner.join(_FORGET_S)
        return code
    for left in (path, here / "job.env"):
        left.unlink(missing_ok=True)
    print(SAYS + json.dumps(fault), flush=True)
    _record(note, fault)
    cleaner.join(_FORGET_S)
    return 1


def missing(note: dict[str, Any]) -> dict[str, Any] | None:
    """What this machine's Python lacks for a job, as an error for the run's record; None when nothing."""
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if ours != note["python"]:
        return _fault(
            "The cluster's Python is another one than the caller's.",
            f"Python {ours} on the cluster, {note['python']} where the run was started",
            "use the same Python on both: a function that travels is made for one",
        )
    exact = f"pip install 'llmnb[{','.join(note['extras'])}]=={note['llmnb']}' on every node of the cluster"
    if importlib.util.find_spec("llmnb") is None:
        return _fault("The cluster has no llmnb.", f"{sys.executable} cannot import it", exact)
    there = getattr(importlib.import_module("llmnb"), "__version__", "?")
    if there != note["llmnb"]:
        return _fault(
            "The cluster's llmnb is another version than the caller's.",
            f"llmnb {there} on the cluster, {note['llmnb']} where the run was started",
            exact,
        )
    absent = [name for name in note["needs"] if importlib.util.find_spec(name) is None]
    if absent:
        return _fault("The cluster lacks packages that this run needs.", ", ".join(absent), exact)
    return None


def _read(path: Path) -> TrainJob:
    from llmnb.job import TrainJob

    return TrainJob.read(path)


def _unready(path: Path) -> dict[str, Any] | None:
    """The parcel can be opened here, and the database be reached; else why not."""
    from llmnb.errors import DatabaseError
    from llmnb.launch.away import hidden_folder, open_for
    from llmnb.launch.heart import patiently
    from llmnb.launch.parcel import take_environment

    take_environment(path)
    try:
        job = _read(path)
    except ModuleNotFoundError as error:
        return _fault(
            "The cluster lacks a package that this run needs.",
            str(error.name),
            "install it on every node, or define the function that needs it without it",
        )
    except (pickle.UnpicklingError, AttributeError, TypeError, ImportError) as error:
        return _fault("The cluster cannot read the job.", str(error), "use the same versions of packages on both")
    try:
        with patiently(lambda: open_for(job), _FIRST_ANSWER_S) as store:
            hidden = None if job.away else hidden_folder(store.settings.artifacts)
    except DatabaseError as error:
        return _fault(
            "The cluster cannot reach the database.",
            f"{error.what} {error.seen or ''}".strip(),
            "give connect() an address that the cluster reaches; or log_to_db=False, which needs none",
        )
    if hidden:
        return _fault(
            "The cluster does not see the folder in which this database keeps checkpoints.",
            hidden,
            "connect(artifacts='gridfs') or 's3://…'; or mount that folder there; or log_to_db=False",
        )
    return None


def _tidy(job: TrainJob) -> None:
    """Nothing stays on somebody else's machine once everything that the run said is stored."""
    from llmnb.errors import LlmnbError, NotFound
    from llmnb.launch.away import open_for
    from llmnb.launch.spool import read
    from llmnb.launch.worker import own_folder

    folder = own_folder(job.workdir, job.run)
    said = read(folder / "events.jsonl")
    try:
        with open_for(job) as store:
            store.runs.get(job.run)
            stored = store.events.last_seq(job.run)
    except NotFound:  # the courier has brought all of it home
        stored = said[-1].seq if said else 0
    except LlmnbError:
        return
    if not said or stored >= said[-1].seq:
        shutil.rmtree(folder, ignore_errors=True)


def _fault(what: str, seen: str, todo: str) -> dict[str, Any]:
    return {"type": "LaunchError", "what": what, "seen": seen, "todo": todo, "traceback": None}


def _record(note: dict[str, Any], fault: dict[str, Any]) -> None:
    try:
        from llmnb.store import open_folder, open_store

        with open_folder(note["away"]) if note["away"] else open_store(note["uri"]) as store:
            store.runs.transition(note["run"], "queued", "failed", error=fault)
    except Exception as error:  # noqa: BLE001 - the border of a process that ends; whoever watches reads its log
        print(f"the record could not be written: {type(error).__name__}", file=sys.stderr)


def _forget(package: str) -> None:
    """The parcel is read: what the cluster keeps of it is replaced by nothing."""
    try:
        from llmnb.launch.remote import forget

        forget(package)
    except Exception as error:  # noqa: BLE001 - the border of a thread; Ray drops the package when the job has ended
        print(f"the parcel stays with Ray until the job ends: {type(error).__name__}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
