"""One run, from its rows to its last checkpoint, in this process: ``work(job)`` or ``python -m llmnb.launch.worker``.

Here a run begins and ends; what lies between is told by a ``Reporter``, in this process or, when the run has several
workers, in that of rank 0. The record's state is true at every moment, whatever ends the run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, DatabaseError, LaunchError, RunError
from ..events import StateChanged
from ..job import TrainJob
from . import cluster, machine
from .away import open_for
from .heart import patiently
from .layout import spread
from .masking import Mask
from .reporting import OnEvent, Reporter, own_folder, tokens_of, told_of

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["own_folder", "work"]

ACTIVE = ("queued", "starting", "running", "stopping", "lost")  # "lost" by mistake: we are here
# How long a run waits for a database that is away before it gives up. A person waits for less than a job does.
_PATIENCE_JOB_S, _PATIENCE_HERE_S = 900.0, 60.0
_PATIENCE_AT_ONCE_S = 1.0  # a person who interrupted twice
# A worker that was given up and still lives learns it at its next beat, and ends after the step it is at.
_RELEASE_S = 30.0


def work(job: TrainJob, *, store: Store | None = None, on_event: OnEvent | None = None) -> None:
    """Runs a job to its end in this process.

    Args:
        job: what to do.
        store: the caller's database; None opens the job's own.
        on_event: called with each event, on the thread that says it.

    Raises:
        LlmnbError: why it failed, after the reason was written on the run. Also any other exception of the training.
        KeyboardInterrupt: the run was interrupted; it is stopped, with a checkpoint when there was time for one.
    """
    if store is not None:
        _Work(job, store, on_event, _PATIENCE_HERE_S).carry_out()
        return
    own: Any = patiently(lambda: open_for(job), _PATIENCE_JOB_S)
    try:
        _Work(job, own, on_event, _PATIENCE_JOB_S).carry_out()
    finally:
        own.close()


class _Work(Reporter):
    """One run while it is carried out.

    Attributes:
        handed_over: True while rank 0 tells, in another process; letters are passed on to it.
    """

    handed_over = False

    # -- the whole -------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """All of it."""
        try:
            self._begin()
        except (LaunchError, ArtifactError) as error:  # before there is a spool to say it in
            told = told_of(error, self.mask)
            self._move(("queued", "starting"), "failed", error=told)
            raise
        try:
            with self.listening():
                result = self._result()
        except BaseException as error:  # a border: whatever ended it, the record says so
            self._end_with(error)
            raise
        if result.stopped:
            self._end("stopped", self.why_stopped())
        else:  # also when a letter came after the last step
            self._end("done", "")
        if self.interrupted:
            raise KeyboardInterrupt

    def _begin(self) -> None:
        run = self.job.run
        _claim(self.folder, run)
        owner = machine.this_process()
        if not self._patiently(lambda: self._move("queued", "starting", owner=owner, workdir=str(self.folder))):
            record = self.store.runs.get(run)
            seen = f"state {record['state']}, attempt {record.get('attempt', 1)}; this is attempt {self.job.attempt}"
            raise RunError(f"Run {run} cannot begin.", seen=seen, todo="an attempt begins once, from queued")
        self._open_spool_soon()
        if self.job.attempt > 1:
            self.remember()
        self.say(StateChanged(state="starting"))
        self.heart.start()

    def _open_spool_soon(self) -> None:
        """A worker of the attempt before that still lives lets go of the spool at its next beat."""
        end = time.monotonic() + (_RELEASE_S if self.job.attempt > 1 else 0.0)
        while True:
            try:
                self.open_spool()
                return
            except LaunchError:
                if time.monotonic() >= end:
                    raise
            time.sleep(0.2)

    def _result(self) -> Any:
        if not spread(self.job):
            return self.train()
        from .workers import train_on_workers

        return train_on_workers(self)

    # -- while rank 0 is elsewhere -----------------------------------------------------------------------------

    def hand_over(self) -> None:
        """From now on rank 0 tells; a letter that came before goes with it."""
        self.ship(min(self.patience, 30.0))
        self.spool.close()
        self.handed_over = True
        if self.heart.letter:
            self._stopping(self.heart.letter)

    def take_back(self) -> None:
        """Rank 0 has ended, or was: its numbers go on here, and what it could not ship is shipped."""
        self.open_spool()
        self.handed_over = False

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Signals are letters meanwhile."""
        return _interrupts(self._interrupt)

    def _settle(self) -> None:
        if not self.handed_over:
            super()._settle()

    def _stopping(self, letter: str) -> None:
        if self.handed_over:
            self.store.runs.ask(self.job.run, letter)  # rank 0 reads it there
        else:
            super()._stopping(letter)

    # -- stopping and ending ---------------------------------------------------------------------------------

    def _interrupt(self, number: int) -> None:
        """A signal: SIGTERM, or the person's interrupt. In a signal handler, so it only leaves a letter."""
        if number == signal.SIGINT:
            if not self.training or self.interrupted:  # nothing to save yet; or asked twice
                self.patience = min(self.patience, _PATIENCE_AT_ONCE_S)
                raise KeyboardInterrupt
            print("llmnb: stopping with a checkpoint; interrupt again to end at once", file=sys.stderr)
        self.interrupted = True
        self.heart.ask("stop")

    def _end_with(self, error: BaseException) -> None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.interrupted = True
            self._end("stopped", "interrupted")
            return
        told = told_of(error, self.mask)
        self._end("failed", told["what"], error=told)

    def _end(self, state: str, reason: str, *, error: dict[str, Any] | None = None) -> None:
        """Everything said is in the database before the final state is, so that who sees the state has it all."""
        self.heart.stop()
        if self.heart.superseded:
            print(f"llmnb: run {self.job.run} goes on elsewhere; this was attempt {self.job.attempt}", file=sys.stderr)
            self.ship(0.0)
            self.spool.close()
            return
        self.say(StateChanged(state=state, reason=reason))
        self.ship(self.patience if state == "done" else min(self.patience, 30.0))
        fields: dict[str, Any] = {"error": error, "reason": reason}
        if self.shipper is None:
            fields["last_seq"] = self.spool.last_seq
        try:
            self._patiently(lambda: self._move(ACTIVE, state, **fields))
        except DatabaseError as trouble:
            print(
                f"llmnb: run {self.job.run} ended {state}, the database is away: {self.mask(trouble)}", file=sys.stderr
            )
            if error is None and not self.interrupted:
                raise
        finally:
            self.spool.close()


def _claim(folder: Path, run: str) -> None:
    """Makes the run's folder. A folder in which another run has written is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "run"
        # An empty mark is one that a full disk refused: nobody's.
        if mark.exists() and mark.read_text(encoding="utf-8").strip() not in ("", run):
            raise LaunchError(f"The folder of run {run} belongs to another run.", seen=str(folder))
        mark.write_text(run + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            "The output folder cannot be written.", seen=f"{folder}: {error.strerror}", todo="choose another output_dir"
        ) from error


@contextlib.contextmanager
def _interrupts(handler: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT go to ``handler`` meanwhile; only the main thread can arrange that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda received, frame: handler(received))
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former if former is not None else signal.SIG_DFL)


# --- as a process of its own -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """``python -m llmnb.launch.worker JOBFILE``. Its output goes to ``worker.log`` in the run's folder."""
    from .parcel import take_environment

    path = Path((arguments or sys.argv[1:])[0])
    take_environment(path)
    home = os.environ.get("LLMNB_HOME")
    if home and "RAY_ADDRESS" not in os.environ:  # else this is a job on a cluster, which set its own
        cluster.before_ray(home)
    job = TrainJob.read(path)
    path.unlink(missing_ok=True)  # it holds the database's password, and was for one reader
    # On a cluster that is not ours Ray keeps what is printed, in a file, and gives it to who asks from elsewhere.
    foreign = job.ray_address is not None
    console = os.dup(2) if foreign else to_log_file(own_folder(job.workdir, job.run) / "worker.log")
    mask = Mask([job.uri, job.artifacts, *tokens_of(job)])
    try:
        work(job)
    except KeyboardInterrupt:
        return 0
    except BaseException as error:  # noqa: BLE001 - the border of the process: the reason is on the run; no secret in logs
        told = told_of(error, mask)
        print(told["traceback"], file=sys.stderr, flush=True)
        os.write(console, f"run {job.run} failed: {told['type']}: {told['what']}\n".encode())
        return 1
    return 0


def to_log_file(path: Path) -> int:
    """Standard output and error go to a file: nobody has to drain a pipe for the training to go on.

    Returns:
        A descriptor of what standard error was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    console = os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


if __name__ == "__main__":
    sys.exit(main())
