"""Run: the handle a person holds on a training run. It reads the database each time it is asked.

The run itself lives elsewhere, in this process or in a job; a handle can be made for it anywhere, any time, by id.
"""

from __future__ import annotations

import datetime as dt
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..errors import NotFound, RunError
from ..events import CheckpointSaved, Event, Metric, Note, StateChanged
from . import away, machine, runner, spool
from .burial import bury
from .jobs import at
from .progress import Progress
from .remote import lost_because, why_it_ended, withdraw

if TYPE_CHECKING:
    from ..series import Columns
    from ..store import Store
    from .reproducing import Sameness

__all__ = ["FINAL", "Run", "WorkerTraceback"]

FINAL = frozenset({"done", "failed", "stopped", "lost"})
# How often a waiting handle looks whether the worker is still there, seconds.
_LOOK_EVERY_S = 5.0
# How long it may take to hand a run over to a cluster that takes none at once, seconds.
_HANDING_OVER_S = 3600.0
_NOT_METRICS = (CheckpointSaved.kind, Note.kind, StateChanged.kind)


class WorkerTraceback(Exception):
    """Stands as the cause of a ``RunError``, so that a traceback shows the worker's own above it."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}" if self.args else ""


class Run:
    """A training run.

    Args:
        store: the database that it is recorded in.
        id: the run's id; also the id of its experiment.
    """

    def __init__(self, store: Store, id: str) -> None:
        self._store = store
        self.id = id

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        """What the database holds about it."""
        return dict(self._store.runs.get(self.id))

    @property
    def state(self) -> str:
        """queued, starting, running, stopping, done, failed, stopped or lost."""
        return str(self.record["state"])

    @property
    def error(self) -> dict[str, Any] | None:
        """``{type, what, seen, todo, traceback}`` of a failed run, else None."""
        return self.record.get("error")

    def __repr__(self) -> str:
        try:
            record = self.record
        except NotFound:
            return f"<Run {self.id}: removed>"
        parts = [record["state"]]
        if record["state"] == "queued" and record.get("waits_for"):
            parts.append(f"waits for {', '.join(record['waits_for'])}")
        # The newest few events are enough: a long run has many.
        last = next(reversed(_points(self.events(max(int(record.get("last_seq") or 0) - 20, 0)))), None)
        if last:
            steps = (record.get("counts") or {}).get("steps")
            parts.append(f"step {last['step']}" + (f"/{steps}" if steps else ""))
            parts += [f"{name} {last[name]:.4g}" for name in ("loss", "eval_loss") if name in last]
        if record.get("error"):
            parts.append(str(record["error"].get("what", ""))[:80])
        return f"<Run {self.id}: {', '.join(parts)}>"

    # -- what it said ----------------------------------------------------------------------------------------

    def events(self, after: int = 0) -> list[Event]:
        """Its events numbered above ``after``, oldest first.

        A run with ``log_to_db=False`` keeps them in a file beside its output; they can be read on that machine.
        """
        found = self._store.events.since(self.id, after)
        return found or self._spooled(after)

    def glance(self, until: int, count: int = 2000) -> list[Event]:
        """About ``count`` of its events up to ``until``, evenly spread: a long run at a glance."""
        return self._store.events.at(self.id, range(1, until + 1, max(1, until // count)))

    def columns(self, names: Sequence[str], after: int, until: int) -> tuple[Columns, list[Event]] | None:
        """Its metrics after ``after`` up to ``until`` as columns, and its other events in between.

        For long runs: see ``store.Events.columns``. None where the database cannot do it.
        """
        found = self._store.events.columns(self.id, names, after, until)
        if found is None:
            return None
        others = self._store.events.since(self.id, after, kinds=_NOT_METRICS)
        return found, [event for event in others if event.seq <= until]

    def _spooled(self, after: int) -> list[Event]:
        record = self.record
        if (record.get("config") or {}).get("log_to_db", True):
            return []
        if record.get("away"):
            away.ensure_courier(self._store, self.id)  # it brings them into the database
            return []
        path = self._workdir(record)
        return spool.read(path / "events.jsonl", after) if path is not None else []

    def _workdir(self, record: dict[str, Any]) -> Path | None:
        """Its folder, when it is on this machine."""
        where = record.get("workdir")
        return Path(where) if where and Path(where).is_dir() else None

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per logged point: step, epoch, time (seconds since the epoch), and the numbers of that point."""
        return _points(self._store.events.since(self.id, kinds=["metric"]) or self._spooled(0))

    def checkpoints(self) -> list[Checkpoint]:
        """Its checkpoints by step."""
        return self._store.checkpoints.list(self.id)

    def logs(self, n: int = 50) -> str:
        """The last ``n`` lines that its process printed; "" where they cannot be reached from here."""
        record = self.record
        path = self._workdir(record)
        text = ""
        if path is not None and (path / "worker.log").exists():
            text = (path / "worker.log").read_text(encoding="utf-8", errors="replace")
        elif record.get("job"):
            jobs = self._jobs(record)
            text = jobs.logs(record["job"]) if jobs is not None else ""
        return "\n".join(text.splitlines()[-n:])

    def plot(self, *, compare: Sequence[Run] = (), smooth: float = 0.6, log: bool = False) -> Any:
        """A plotly figure: loss, evaluations, checkpoints, learning rate and gradient norm.

        Args:
            compare: other runs, whose smoothed losses are drawn over this one's.
            smooth: the share of the past in the smoothed lines, 0 to below 1.
            log: draws the losses on a logarithmic scale.

        Raises:
            MissingPackage: plotly is not installed.
        """
        # The package's public name: this room knows nothing that draws, and no worker calls this.
        return importlib.import_module("llmnb").plot(self, compare=compare, smooth=smooth, log=log)

    # -- waiting ---------------------------------------------------------------------------------------------

    def wait(
        self,
        timeout: float | None = None,
        progress: bool = False,
        on_event: Callable[[Event], None] | None = None,
        after: int = 0,
    ) -> Run:
        """Waits for its end.

        Args:
            timeout: seconds; None for as long as it takes.
            progress: shows a progress bar.
            on_event: called with each event as it arrives.
            after: events numbered up to this one are not told again.

        Returns:
            This run, in state done or stopped.

        Raises:
            RunError: it failed or was lost (the worker's traceback is the cause), or the time was not enough.
        """
        followers = [on_event] if on_event is not None else []
        shown = Progress(self.id) if progress else None
        if shown is not None:
            followers.append(shown)
        try:
            record = self._follow(timeout, followers, after)
        finally:
            if shown is not None:
                shown.close()
        if record["state"] in ("failed", "lost"):
            self._raise(record)
        return self

    def _follow(self, timeout: float | None, followers: list[Callable[[Event], None]], seen: int = 0) -> dict[str, Any]:
        end = None if timeout is None else time.monotonic() + timeout
        look_at, pause = time.monotonic() + _LOOK_EVERY_S, 0.1
        while True:
            record = self.record
            if followers:
                fresh = self.events(seen)
                for event in fresh:
                    for follower in followers:
                        follower(event)
                    seen = event.seq
                pause = 0.1 if fresh else pause
            if record["state"] in FINAL:
                return record
            now = time.monotonic()
            if end is not None and now >= end:
                raise RunError(
                    f"Run {self.id} has not ended after {timeout:g} s.",
                    seen=f"state {record['state']}",
                    todo="it goes on; wait again, or run.stop()",
                )
            if now >= look_at:
                self.look()
                look_at = now + _LOOK_EVERY_S
            time.sleep(pause)
            pause = min(pause * 1.3, 1.0)

    def _raise(self, record: dict[str, Any]) -> None:
        error = record.get("error") or {}
        text = error.get("traceback") or ""
        head = {"failed": "failed", "lost": "was lost: its worker is gone"}[record["state"]]
        what = f"Run {self.id} {head}."
        if error.get("what"):
            what = f"Run {self.id} {head}. {error.get('type', 'Error')}: {error['what']}"
        raise RunError(
            what,
            seen=error.get("seen"),
            todo=error.get("todo") or f"db.run({self.id!r}).logs() shows what its process printed",
            remote_traceback=text or None,
        ) from (WorkerTraceback(text) if text else None)

    # -- steering --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Asks it to save a checkpoint and end. Returns at once; ``wait()`` waits for it. Twice does nothing more.

        Raises:
            RunError: it has ended already.
        """
        self._ask("stop")

    def kill(self, patience: float = 10.0) -> None:
        """Ends it now, without a checkpoint: by asking, and when nobody listens, through Ray and the process.

        Raises:
            RunError: it has ended already.
        """
        self._ask("kill")
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self.state in FINAL:
                return
            time.sleep(0.2)
        record = self.record
        attempt = record.get("attempt", 1)
        process = machine.found(record.get("owner") or {})
        if process is not None:
            process.kill()
            process.wait(5.0)
            bury(self._store, self.record)
        elif record.get("job"):
            jobs = self._jobs(record)
            if jobs is not None:
                jobs.stop(record["job"])
        alive = ("queued", "starting", "running", "stopping")
        self._store.runs.transition(self.id, alive, "stopped", attempt=attempt, reason="killed", ended=_now())

    # -- going on --------------------------------------------------------------------------------------------

    def resume(
        self,
        *,
        wait: bool | None = None,
        progress: bool = True,
        on_event: Callable[[Event], None] | None = None,
        transform: Callable[..., Any] | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
        ray_configs: Mapping[str, Any] | None = None,
        ray_address: str | None = None,
        changed_data: bool = False,
        **changes: Any,
    ) -> Run:
        """Goes on from the newest checkpoint, as the same run: also on another machine, from the database alone.

        What the run did after that checkpoint is done again, exactly as it was; nothing of it is said twice. Without a
        checkpoint the run starts again from its beginning.

        Args:
            wait: False returns at once, and the run goes on in the background. None: as the run was started.
            progress: shows a progress bar while waiting, when standard error is a terminal.
            on_event: called with each new event of a run that is waited for.
            transform: the run's function, when it has one: a function is never loaded from the database.
            trainer_kwargs: the run's ``training_kwargs``, when it has some.
            ray_configs: of TorchTrainer; None for those that the run was started with.
            ray_address: of the cluster; None for the one that it was started on, "local" for this machine's own.
            changed_data: True goes on although the rows, or the transform, are not those that it trained on.
            **changes: ``num_train_epochs`` or ``max_steps`` train a run further, as if it had been planned so: the
                learning rate takes the value that the longer plan has at that step. What does not change the
                mathematics can be changed, too (``save_steps``, ``eval_steps``, ``logging_steps``, ``output_dir``, …).

        Returns:
            This run.

        Raises:
            RunError: it still goes on, somebody else resumes it at this moment, or nothing is left to do.
            ConfigError: what must be given again is missing or another; a setting that cannot change.
        """
        from .resuming import Given, resume  # it starts runs, and so knows this module

        given = Given(transform, trainer_kwargs, ray_configs, ray_address, changed_data)
        return resume(self._store, self.id, given, changes, wait=wait, progress=progress, on_event=on_event)

    def reproduce(
        self,
        *,
        identifier: str | None = None,
        wait: bool | None = None,
        progress: bool = True,
        on_event: Callable[[Event], None] | None = None,
        transform: Callable[..., Any] | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
        ray_configs: Mapping[str, Any] | None = None,
        ray_address: str | None = None,
    ) -> Run:
        """Runs it again from its beginning, as a run of its own: same query, settings, seed and base.

        What changed since is said first, on the new run: package versions, rows, base. On one CPU worker of the same
        machine the losses come out equal to the last bit; ``new.same_as(run)`` compares them.

        Args:
            identifier: the new model's name; None: this one's with ``-again``, so that what ``db.load`` gives stays.
            wait, progress, on_event, transform, trainer_kwargs, ray_configs, ray_address: as for ``resume``.

        Returns:
            The new run.

        Raises:
            RunError: it never began to train, or the model that it fills was removed.
            ConfigError: what must be given again is missing or another.
        """
        from .reproducing import reproduce  # it starts runs, and so knows this module
        from .resuming import Given

        given = Given(transform, trainer_kwargs, ray_configs, ray_address, verb="reproduce")
        return reproduce(
            self._store, self.id, given, identifier=identifier, wait=wait, progress=progress, on_event=on_event
        )

    def same_as(self, other: Run) -> Sameness:
        """Compares this run's training losses with another's, step by step."""
        from .reproducing import sameness

        return sameness(self, other)

    def _ask(self, what: str) -> None:
        record = self.record
        if record.get("away"):  # it may have begun, for all that is known here; the letter says it there
            away.ensure_courier(self._store, self.id)
        elif self._store.runs.transition(self.id, "queued", "stopped", reason="stopped before it began", ended=_now()):
            jobs = self._jobs(record)
            if jobs is not None:
                jobs.stop(record["job"])
                withdraw(jobs, record)
            runner.take_back(record)
            # No worker can begin any more, so nobody else numbers events of this run.
            seq = self._store.events.last_seq(self.id) + 1
            said = StateChanged(state="stopped", reason="stopped before it began", seq=seq)
            self._store.events.append(self.id, [said])
            return
        state = self.state
        if state in FINAL:
            raise RunError(f"Run {self.id} has ended already.", seen=f"state {state}")
        self._store.runs.ask(self.id, what)

    def look(self) -> str:
        """Looks whether its worker is still there, and records it as lost or failed when it is not.

        Returns:
            The state.
        """
        self._store.runs.find_lost()
        record = self.record
        state = record["state"]
        if record.get("away"):  # only its courier knows how it is
            away.ensure_courier(self._store, self.id)
            return self.state
        if state in FINAL:
            return str(state)
        if record.get("job"):
            self._look_at_job(record)
        if state == "queued":
            if runner.forgot(record) or _dropped(record):
                bury(self._store, record)
        elif machine.gone(record.get("owner") or {}):
            # Its last words may be on their way: the process ends a moment after it wrote its last state.
            time.sleep(0.5)
            bury(self._store, self.record)
        return self.state

    def _look_at_job(self, record: dict[str, Any]) -> None:
        """A job that ended while its run has not: it never came to life (wrong Python, …), or was killed."""
        jobs = self._jobs(record)
        why = why_it_ended(jobs, record["job"]) if jobs is not None else None
        if why is None:
            return
        state, to = record["state"], "failed"
        if state != "queued":
            time.sleep(0.5)  # its last words may be on their way
            to, why = "lost", lost_because(why)
        attempt = record.get("attempt", 1)
        self._store.runs.transition(self.id, state, to, attempt=attempt, ended=_now(), error=why)
        withdraw(jobs, record)

    def _jobs(self, record: dict[str, Any]) -> Any:
        address = record.get("ray_address")
        return at(address) if address else None


def _dropped(record: Mapping[str, Any]) -> bool:
    """True when the process that was about to hand a queued run over is gone, and nobody else has it."""
    starter = record.get("starter")
    if not starter or record.get("runner") or record.get("job") or record.get("ray_address"):
        return False
    return machine.gone(starter) or time.time() - float(starter["since"]) > _HANDING_OVER_S


def _points(events: list[Event]) -> list[dict[str, Any]]:
    return [
        {"step": event.step, "epoch": event.epoch, "time": event.time, **event.values}
        for event in events
        if isinstance(event, Metric)
    ]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)
