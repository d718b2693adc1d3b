"""Burial: what is done for a run whose process ended without a word (kill -9, a crash, memory that ran out).

What it had said is shipped from its spool to the database, its end is said after that, and its record tells the truth.
The spool's lock is the proof that nobody speaks for the run any more. The same is done at once by the runner, in a
process of its own (``python -m llmnb.launch.burial TICKET CAUSE``), and by whoever looks at the run later.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LaunchError
from ..events import Event, StateChanged
from . import machine, spool, tickets
from .heart import patiently
from .masking import Mask

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["Cause", "bury"]

_FINAL = ("done", "failed", "stopped", "lost")
_BATCH = 500
# A rank of a killed driver holds the spool until Ray has ended it.
_RELEASE_S = 20.0
_PATIENCE_S = 24 * 3600.0
_LOG_BYTES = 2000


@dataclass(frozen=True)
class Cause:
    """What is known about the end of a process.

    Attributes:
        status: its exit code, -N when signal N ended it; None when nobody saw it.
        memory: the system killed a process at that time because memory ran out.
        stopped: why, when its end was asked for.
    """

    status: int | None = None
    memory: bool = False
    stopped: str | None = None


def bury(store: Store, record: dict[str, Any], cause: Cause | None = None) -> bool:
    """Records the truth about a run whose process is gone. Doing it twice, or at the same time, does no harm.

    Args:
        store: the database.
        record: the run's record, as it was seen. Nothing is changed when the run is in another attempt by now.
        cause: what is known.

    Returns:
        False when the run is over, or lives.
    """
    cause = cause or Cause()
    if record["state"] in _FINAL or machine.found(record.get("owner") or {}):
        return False
    run, attempt = record["_id"], int(record.get("attempt") or 1)
    if record["state"] == "queued":
        return _never_began(store, record, attempt, cause)
    state, told, reason = _verdict(record, cause)
    with _spool_of(store, record) as own:
        if own is not None:
            last = _last_words(own, record)
            if last is not None:
                state, reason = last.state, last.reason
                told = told if state in ("failed", "lost") else None
            else:
                own.say(StateChanged(state=state, reason=reason))
            if (record.get("config") or {}).get("log_to_db", True):
                _ship(store, own, run)
    fields: dict[str, Any] = {"error": told, "reason": reason}
    if own is not None:
        fields["last_seq"] = own.last_seq
    return bool(store.runs.transition(run, record["state"], state, attempt=attempt, **fields))


def _never_began(store: Store, record: dict[str, Any], attempt: int, cause: Cause) -> bool:
    run = record["_id"]
    if cause.stopped is not None:
        state, told, reason = "stopped", None, cause.stopped
    elif cause.status is None or cause.status < 0:
        state, reason = "lost", f"The run's process {_how(cause)} before the run began"
        told = _told("WorkerLost", f"{reason}.", _end_of_log(record), "run.resume() starts it again")
    else:
        state, reason = "failed", "The run's process ended before the run began"
        told = _told("LaunchError", f"{reason}.", _end_of_log(record), "see run.logs()")
    if not store.runs.transition(run, "queued", state, attempt=attempt, error=told, reason=reason):
        return False
    # No worker can begin any more, so nobody else numbers its events.
    said = StateChanged(state=state, reason=reason, seq=store.events.last_seq(run) + 1)
    store.events.append(run, [said])
    return True


def _verdict(record: dict[str, Any], cause: Cause) -> tuple[str, dict[str, Any] | None, str]:
    if record.get("control") == "kill" or cause.stopped is not None:
        return "stopped", None, cause.stopped or "killed"
    how = _how(cause)
    what = "Memory ran out, and the system killed the run's process." if cause.memory else f"The run's process {how}."
    advice = "run.resume() goes on from its newest checkpoint"
    if cause.memory or cause.status in (None, -signal.SIGKILL):
        advice += "; if memory ran out: a smaller batch or max_seq_length, bits=4, activation_checkpointing=True"
    owner = record.get("owner") or {}
    seen = f"host {owner.get('host')}, process {owner.get('pid')}"
    tail = _end_of_log(record)
    return "lost", _told("WorkerLost", what, f"{seen}\n{tail}".strip(), advice), what.rstrip(".")


def _how(cause: Cause) -> str:
    if cause.status is None:
        return "is gone without a word"
    if cause.status >= 0:
        return f"ended with exit code {cause.status}, and could not say why"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-cause.status).name}"
    return f"was ended by signal {-cause.status}"


def _told(kind: str, what: str, seen: str, todo: str) -> dict[str, Any]:
    return {"type": kind, "what": what, "seen": seen or None, "todo": todo, "traceback": None}


def _end_of_log(record: dict[str, Any]) -> str:
    path = Path(record.get("workdir") or "/nowhere") / "worker.log"
    with contextlib.suppress(OSError):
        return path.read_bytes()[-_LOG_BYTES:].decode("utf-8", "replace").strip()
    return ""


# --- what it had said -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _spool_of(store: Store, record: dict[str, Any]) -> Any:
    """The run's spool, held by us alone; None when it is not on this machine, or somebody still speaks."""
    path = Path(record.get("workdir") or "/nowhere") / "events.jsonl"
    found, end = None, time.monotonic() + _RELEASE_S
    while path.exists() and found is None:
        try:
            found = spool.Spool(path, at_least=store.events.last_seq(record["_id"]))
        except LaunchError:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


def _last_words(own: spool.Spool, record: dict[str, Any]) -> StateChanged | None:
    """The end that this attempt itself said before its record could be written."""
    events = spool.read(own.path)
    last = events[-1] if events else None
    if not isinstance(last, StateChanged) or last.state not in _FINAL:
        return None
    earlier = int(record.get("attempt") or 1) > 1 and last.time < record["started"].timestamp()
    return None if earlier else last


def _ship(store: Store, own: spool.Spool, run: str) -> None:
    waiting: list[Event] = spool.read(own.path, store.events.last_seq(run))
    for start in range(0, len(waiting), _BATCH):
        store.events.append(run, waiting[start : start + _BATCH])


# --- as a process of its own ----------------------------------------------------------------------------------


def main() -> int:
    """``python -m llmnb.launch.burial TICKET CAUSE``, started by the keeper."""
    from ..store import open_store

    ticket, cause = tickets.read(Path(sys.argv[1])), Cause(**json.loads(sys.argv[2]))
    mask = Mask([ticket.uri, ticket.artifacts])
    try:
        with patiently(lambda: open_store(ticket.uri), _PATIENCE_S) as store:
            record = patiently(lambda: store.runs.get(ticket.run), _PATIENCE_S)
            if int(record.get("attempt") or 1) == ticket.attempt:
                patiently(lambda: bury(store, store.runs.get(ticket.run), cause), _PATIENCE_S)
    except Exception as error:  # noqa: BLE001 - the border of the process: the database's password must not reach the log
        print(f"llmnb: run {ticket.run} could not be recorded: {mask(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
