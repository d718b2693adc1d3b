"""One run, from its rows to its last checkpoint, in this process: ``work(job)`` or ``python -m llmnb.launch.worker``.

It joins engine and store: the engine calls out (``Hooks``), and what it says goes to the spool, its checkpoints to the
store, the letters from upstream to it. The record's state is true at every moment, whatever ends the run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..checkpoint import Checkpoint
from ..config import thaw
from ..errors import ArtifactError, DatabaseError, DataError, InUse, LaunchError, LlmnbError, NotFound, RunError
from ..events import CheckpointSaved, Event, Note, StateChanged
from ..job import TrainJob
from .heart import Heart, patiently
from .keeping import to_remove
from .masking import Mask
from .spool import Shipper, Spool

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["own_folder", "work"]

OnEvent = Callable[[Event], Any]
ACTIVE = ("queued", "starting", "running", "stopping", "lost")  # "lost" by mistake: we are here
# How long a run waits for a database that is away before it gives up. A person waits for less than a job does.
_PATIENCE_JOB_S, _PATIENCE_HERE_S = 900.0, 60.0


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
    from ..store import open_store

    own = patiently(lambda: open_store(job.uri, artifacts=job.artifacts), _PATIENCE_JOB_S)
    try:
        _Work(job, own, on_event, _PATIENCE_JOB_S).carry_out()
    finally:
        own.close()


def own_folder(output_dir: str | Path, run: str) -> Path:
    """The folder of one run beneath an output folder that runs may share: never the same for two runs."""
    path = Path(output_dir).expanduser().absolute()
    return path if path.name == run else path / run


class _Work:
    """The state of one run while it is carried out."""

    def __init__(self, job: TrainJob, store: Store, on_event: OnEvent | None, patience: float) -> None:
        self.job, self.store, self.patience = job, store, patience
        self._on_event = on_event
        self._follower_broke = False
        self.mask = Mask([job.uri, getattr(store, "uri", None), job.artifacts, *_tokens(job)])
        self.folder = own_folder(job.workdir, job.run)
        self.spool: Spool
        self.shipper: Shipper | None = None
        self.heart = Heart(store, job.run, on_letter=self._stopping, each_beat=self._settle)
        self.training = self._interrupted = False
        self.best: int | None = None
        given = thaw(job.config.arguments)
        self.limit: int | None = given.get("save_total_limit")
        self.chooses_best = bool(
            given.get("load_best_model_at_end")
            or given.get("metric_for_best_model")
            or job.config.early_stopping_patience is not None
        )

    # -- the whole -------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """All of it."""
        try:
            self._begin()
        except (LaunchError, ArtifactError) as error:  # before there is a spool to say it in
            told = told_of(error, self.mask)
            self.store.runs.transition(self.job.run, ("queued", "starting"), "failed", error=told)
            raise
        try:
            with _interrupts(self._interrupt):
                result = self._train()
        except BaseException as error:  # a border: whatever ended it, the record says so
            self._end_with(error)
            raise
        if result.stopped:
            self._end("stopped", self._why_stopped())
        else:  # also when a letter came after the last step
            self._end("done", "")
        if self._interrupted:
            raise KeyboardInterrupt

    def _begin(self) -> None:
        run, runs = self.job.run, self.store.runs
        if self.job.workers > 1:
            raise LaunchError("This worker carries a run of one process.", seen=f"{self.job.workers} workers")
        _claim(self.folder, run)
        me = psutil.Process()
        owner = {"host": socket.gethostname(), "pid": me.pid, "born": me.create_time()}
        moved = self._patiently(
            lambda: runs.transition(run, "queued", "starting", owner=owner, workdir=str(self.folder))
        )
        if not moved:
            state = runs.get(run)["state"]
            raise RunError(f"Run {run} cannot begin.", seen=f"state {state}", todo="a run begins once, from queued")
        known = self._patiently(lambda: self.store.events.last_seq(run))
        self.spool = Spool(self.folder / "events.jsonl", at_least=known)
        if self.job.config.log_to_db:
            self.shipper = Shipper(
                self.spool,
                lambda events: self.store.events.append(run, events),
                start_after=known,
                describe=self.mask,
            )
        self.say(StateChanged(state="starting"))
        self.heart.start()

    def _train(self) -> Any:
        from ..engine.hooks import Hooks

        adapter, resume = self._adapter(), self._resume()
        data = self._data()
        hooks = Hooks(say=self.say, checkpoint=self._checkpoint, control=self._control, started=self._started)
        from ..engine.training import train  # heavy, so after everything that can fail quickly

        return train(
            self.job.model,
            self.job.config,
            data,
            hooks,
            workdir=self.folder,
            adapter=adapter,
            resume=resume,
            transform=self.job.transform,
            trainer_kwargs=dict(self.job.trainer_kwargs) or None,
        )

    # -- what it needs ---------------------------------------------------------------------------------------

    def _adapter(self) -> Path | None:
        name = self.job.model.adapter_id
        if not name:
            return None
        if isinstance(name, Checkpoint):
            return self._fetch(name.experiment, name.step)
        if Path(str(name)).exists():
            return Path(str(name)).absolute()
        experiments = self._patiently(self.store.checkpoints.experiments)
        if name in experiments:
            return self._fetch(name, None)
        experiment, _, step = str(name).rpartition("/")
        if experiment in experiments and step.isdigit():
            return self._fetch(experiment, int(step))
        return Path(str(name))  # a hub id; the engine says so when it is none

    def _resume(self) -> Path | None:
        if not self.job.resume_from:
            return None
        experiment, _, step = self.job.resume_from.rpartition("/")
        return self._fetch(experiment, int(step), resume=True)

    def _fetch(self, experiment: str, step: int | None, resume: bool = False) -> Path:
        checkpoint = self._patiently(lambda: self.store.checkpoints.get(experiment, step))
        return Path(self._patiently(lambda: self.store.checkpoints.fetch(checkpoint, resume=resume)))

    def _data(self) -> dict[str, Callable[[], Iterable[Mapping[str, Any]]]]:
        config, store = self.job.config, self.store
        select = config.select
        if select is None:
            raise DataError("There is nothing to train on.", todo="LLMTrainer(select=Collection('…').find(), …)")
        data: dict[str, Callable[[], Iterable[Mapping[str, Any]]]] = {"train": lambda: store.rows(select, fold="train")}
        for name, chosen in config.eval_selects.items():
            data[name] = lambda chosen=chosen: store.rows(chosen)  # type: ignore[misc]
        if not config.eval_selects:
            some = self._patiently(lambda: next(iter(store.rows(select, fold="valid", limit=1)), None))
            if some is not None:
                data["valid"] = lambda: store.rows(select, fold="valid")
        return data

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        return patiently(ask, self.patience)

    # -- what the engine calls -------------------------------------------------------------------------------

    def say(self, event: Event) -> None:
        """Spools an event and hands it to the follower. Never raises, never waits."""
        said = self.spool.say(event)
        if self._on_event is None or self._follower_broke:
            return
        try:
            self._on_event(said)
        except Exception as error:  # noqa: BLE001 - a border: a broken display must not end a training
            self._follower_broke = True
            print(f"llmnb: on_event raised {type(error).__name__}: {error}; it is not called again", file=sys.stderr)

    def _control(self) -> str | None:
        # An attribute that another thread sets: no network here.
        return self.heart.letter

    def _started(self, counts: dict[str, Any]) -> None:
        self.training = True
        run = self.job.run
        if self._patiently(lambda: self.store.runs.transition(run, "starting", "running", counts=counts)):
            self.say(StateChanged(state="running"))
        else:  # somebody pressed Stop meanwhile
            self._patiently(lambda: self.store.runs.update(run, counts=counts))
        steps = counts.get("steps")
        rows = counts.get("rows")
        self.say(Note(text=f"{rows} rows, {steps} steps" if rows is not None else f"{steps} steps", data=counts))

    def _checkpoint(
        self, folder: Path, step: int, metrics: dict[str, float], kind: str, base_fingerprint: str, best: bool
    ) -> None:
        run = self.job.run
        saved = self._patiently(
            lambda: self.store.checkpoints.put(
                run,
                step,
                Path(folder),
                kind=kind,
                metrics=metrics,
                base=self.job.model.model_name_or_path,
                base_fingerprint=base_fingerprint,
                best=best,
            )
        )
        if best:
            self.best = step
        self._point()
        self._remove_old()
        self.say(CheckpointSaved(step=step, digest=saved.digest, size=saved.size, metrics=dict(metrics), best=best))

    def _point(self) -> None:
        """The model version answers with the best step when the run chooses one, else with the last."""
        steps = [c.step for c in self._patiently(lambda: self.store.checkpoints.list(self.job.run))]
        if not steps:
            return
        step = self.best if self.chooses_best and self.best in steps else max(steps)
        model, version = self.job.model.identifier, self.job.version
        try:
            self._patiently(lambda: self.store.models.point(model, version, f"{self.job.run}/{step}"))
        except NotFound:  # the person removed the version while it was trained; the checkpoint stays
            self.say(Note(level="warning", text=f"Version {version} of {model} is gone; checkpoint {step} is kept."))

    def _remove_old(self) -> None:
        kept = [c.step for c in self._patiently(lambda: self.store.checkpoints.list(self.job.run))]
        for step in to_remove(kept, self.limit, self.best if self.chooses_best else None):
            try:
                self._patiently(partial(self.store.checkpoints.remove, self.job.run, step))
            except InUse as error:
                self.say(Note(text=f"Checkpoint {step} stays beyond save_total_limit: {error.what}"))
            except NotFound:
                pass  # a person was faster

    # -- stopping and ending ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        self.spool.settle()

    def _stopping(self, letter: str) -> None:
        """On the heart's thread: a letter came."""
        if self.store.runs.transition(self.job.run, ("starting", "running"), "stopping"):
            self.say(StateChanged(state="stopping", reason=self._why_stopped()))

    def _why_stopped(self) -> str:
        if self._interrupted:
            return "interrupted"
        return "killed" if self.heart.letter == "kill" else "stopped on request"

    def _interrupt(self, number: int) -> None:
        """A signal: SIGTERM, or the person's interrupt. In a signal handler, so it only leaves a letter."""
        if number == signal.SIGINT:
            if not self.training or self._interrupted:
                raise KeyboardInterrupt  # nothing to save yet; or asked twice
            print("llmnb: stopping with a checkpoint; interrupt again to end at once", file=sys.stderr)
        self._interrupted = True
        self.heart.ask("stop")

    def _end_with(self, error: BaseException) -> None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._interrupted = True
            self._end("stopped", "interrupted")
            return
        told = told_of(error, self.mask)
        self._end("failed", told["what"], error=told)

    def _end(self, state: str, reason: str, *, error: dict[str, Any] | None = None) -> None:
        """Everything said is in the database before the final state is, so that who sees the state has it all."""
        self.heart.stop()
        self.say(StateChanged(state=state, reason=reason))
        if self.shipper is not None:
            self.shipper.close(self.patience if state == "done" else min(self.patience, 30.0))
        self.spool.settle()
        fields: dict[str, Any] = {"error": error, "reason": reason}
        if self.shipper is None:
            fields["last_seq"] = self.spool.last_seq
        try:
            self._patiently(lambda: self.store.runs.transition(self.job.run, ACTIVE, state, **fields))
        except DatabaseError as trouble:
            print(
                f"llmnb: run {self.job.run} ended {state}, the database is away: {self.mask(trouble)}", file=sys.stderr
            )
            if error is None:
                raise
        finally:
            self.spool.close()


def told_of(error: BaseException, mask: Mask) -> dict[str, Any]:
    """What is written on the run about an error: ``{type, what, seen, todo, traceback}``, without secrets."""
    seen, todo = getattr(error, "seen", None), getattr(error, "todo", None)
    what = error.what if isinstance(error, LlmnbError) else str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno == 28:
        todo = todo or "make room on the disk, or choose another output_dir"
    return {
        "type": type(error).__name__,
        "what": mask(what),
        "seen": mask(seen) if isinstance(error, LlmnbError) and seen is not None else None,
        "todo": mask(todo) if todo is not None else None,
        "traceback": mask("".join(traceback.format_exception(type(error), error, error.__traceback__))),
    }


def _tokens(job: TrainJob) -> list[str]:
    """Tokens that a person may have given as options."""
    found = [thaw(job.config.arguments).get("hub_token")]
    for kwargs in (job.model.model_kwargs, job.model.tokenizer_kwargs):
        found.append(thaw(kwargs).get("token"))
    return [str(token) for token in found if isinstance(token, str)]


def _claim(folder: Path, run: str) -> None:
    """Makes the run's folder. A folder in which another run has written is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "run"
        if mark.exists() and mark.read_text(encoding="utf-8").strip() != run:
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
    job = TrainJob.read(path)
    path.unlink(missing_ok=True)  # it holds the database's password, and was for one reader
    console = _to_log_file(own_folder(job.workdir, job.run))
    mask = Mask([job.uri, job.artifacts, *_tokens(job)])
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


def _to_log_file(folder: Path) -> int:
    """Standard output and error go to a file: nobody has to drain a pipe for the training to go on.

    Returns:
        A descriptor of what standard error was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    console = os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


if __name__ == "__main__":
    sys.exit(main())
