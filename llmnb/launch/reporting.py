"""What a run says, stores and reads, in the process that its rank 0 lives in: the join of engine and store.

The engine calls out (``Hooks``): events go to the spool, checkpoints to the store, letters from upstream to it. What
the engine needs (rows, an adapter, a state to resume from) comes from the store. Who ends the run is not known here.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..config import thaw
from ..errors import AdapterMismatch, DatabaseError, DataError, InUse, LlmnbError, NotFound
from ..events import CheckpointSaved, Event, Note, StateChanged
from ..job import TrainJob
from .heart import Heart, patiently
from .keeping import to_remove
from .masking import Mask
from .said import Said
from .spool import Shipper, Spool, read
from .storing import Storer
from .streaming import streamed

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["OnEvent", "Reporter", "own_folder", "told_of", "tokens_of"]

OnEvent = Callable[[Event], Any]


def own_folder(output_dir: str | Path, run: str) -> Path:
    """The folder of one run beneath an output folder that runs may share: never the same for two runs."""
    path = Path(output_dir).expanduser().absolute()
    return path if path.name == run else path / run


class Reporter:
    """One run's mouth and hands.

    Args:
        job: the run.
        store: the database.
        on_event: called with each event, on the thread that says it.
        patience: seconds to wait for a database that is away.

    Attributes:
        mask: takes the job's secrets out of texts.
        folder: the run's own.
        spool: once opened.
        heart: beats, and brings letters.
        said: what was said before this process began to tell.
        before: the counts of the attempt before, or from before Ray started these workers again.
        restarts: how often Ray started them again.
        tells: True in the process whose spool is open.
        training: True from step 1 on.
        interrupted: True when the letter to stop came as a signal.
    """

    def __init__(self, job: TrainJob, store: Store, on_event: OnEvent | None, patience: float) -> None:
        self.job, self.store, self.patience = job, store, patience
        self._on_event = on_event
        self._follower_broke = False
        self._warning: str | None = None
        self._recount: dict[str, Any] | None = None
        self.mask = Mask([job.uri, getattr(store, "uri", None), job.artifacts, *tokens_of(job)])
        self.folder = own_folder(job.workdir, job.run)
        self.spool: Spool
        self.shipper: Shipper | None = None
        self.heart = Heart(store, job.run, job.attempt, on_letter=self._stopping, each_beat=self._settle)
        self.said = Said()
        self.before: Mapping[str, Any] = {}
        self.restarts = 0
        self.tells = self.training = self.interrupted = False
        self.best: int | None = None
        self._storer: Storer | None = None
        given = thaw(job.config.arguments)
        self.limit: int | None = given.get("save_total_limit")
        self.chooses_best = bool(
            given.get("load_best_model_at_end")
            or given.get("metric_for_best_model")
            or job.config.early_stopping_patience is not None
        )

    def open_spool(self) -> None:
        """Numbers go on where the file, or the database, ends."""
        run, attempt = self.job.run, self.job.attempt
        record = self._patiently(lambda: self.store.runs.get(run))
        known = self._patiently(lambda: self.store.events.last_seq(run))
        # With log_to_db=False only the record knows what was said elsewhere.
        self.spool = Spool(self.folder / "events.jsonl", at_least=known or int(record.get("last_seq") or 0))
        self.tells = True
        if self.job.config.log_to_db or self.job.away:  # away, the courier brings them home
            self.shipper = Shipper(
                self.spool,
                lambda events: self.store.events.append(run, events, attempt),
                start_after=known,
                every=1.0 if self.job.away else 0.25,
                describe=self.mask,
            )

    def ship(self, patience: float) -> None:
        """Ends the shipping; everything said is in the database when it is there within ``patience`` seconds."""
        if self.shipper is not None:
            self.shipper.close(patience)
        self.spool.settle()
        with contextlib.suppress(DatabaseError):  # it is among the events, too
            self._warn()

    def train(self) -> Any:
        """Trains in this process; the engine's ``TrainResult``."""
        from ..engine.hooks import Hooks

        newest = self._newest()
        adapter = self._adapter()
        resume = None if newest is None else self._fetch(str(newest.experiment), newest.step, resume=True)
        if self.tells:
            self._recall(newest, resume)
        data = self._data()
        hooks = Hooks(
            say=self.say,
            checkpoint=self._checkpoint,
            control=self._control,
            read=self._same,
            started=self._started,
            counted=self._counted,
        )
        from ..engine.training import train  # heavy, so after everything that can fail quickly

        try:
            result = train(
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
        except BaseException:
            with contextlib.suppress(Exception):  # the training's own fault is the one to tell
                self._finish_storing(min(self.patience, 30.0))
            raise
        self._finish_storing(self.patience)
        return result

    def _finish_storing(self, patience: float) -> None:
        if self._storer is not None:
            self._storer.finish(patience)

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

    def _newest(self) -> Checkpoint | None:
        """The run's own newest checkpoint that it can go on from, wherever and however often it was started before."""
        kept = [c for c in self._patiently(lambda: self.store.checkpoints.list(self.job.run)) if c.resumable]
        return kept[-1] if kept else None

    def remember(self) -> None:
        """From now on nothing is said that the spool or the database holds."""
        events = {event.seq: event for event in read(self.spool.path)}
        stored = self._patiently(lambda: self.store.events.since(self.job.run))
        self.said = Said((events | {event.seq: event for event in stored}).values())

    def _recall(self, newest: Checkpoint | None, folder: Path | None) -> None:
        """What this run said before this process: nothing of it is said again, and nothing is left unsaid."""
        run = self.job.run
        self.remember()
        self.before = self._patiently(lambda: self.store.runs.get(run)).get("counts") or {}
        checkpoints = self._patiently(lambda: self.store.checkpoints.list(run))
        self.best = next((c.step for c in checkpoints if c.best), None)
        if folder is not None:
            # A worker that is killed may take the end of its spool with it; the checkpoint remembers its metrics.
            from ..engine.manifest import metrics_of

            for metric in metrics_of(folder):
                self.say(metric)
        for saved in self.said.unsaid(checkpoints):
            self.say(saved)
        if checkpoints:
            self._point()
        if self.job.attempt > 1 or self.restarts:
            self.say(self._picked_up(newest))

    def _picked_up(self, newest: Checkpoint | None) -> Note:
        where = "from its beginning: there is no checkpoint to go on from"
        step = 0
        if newest is not None:
            where, step = f"after step {newest.step}", newest.step
        if self.restarts:
            what = f"A worker died or failed; Ray started the workers again ({self.restarts}). The run goes on {where}."
            return Note(level="warning", text=what, data={"restart": self.restarts, "step": step})
        text = f"Resumed (attempt {self.job.attempt}): the run goes on {where}."
        return Note(text=text, data={"attempt": self.job.attempt, "step": step})

    def _fetch(self, experiment: str, step: int | None, resume: bool = False) -> Path:
        checkpoint = self._patiently(lambda: self.store.checkpoints.get(experiment, step))
        return Path(self._patiently(lambda: self.store.checkpoints.fetch(checkpoint, resume=resume)))

    def _data(self) -> dict[str, Callable[[], Iterable[Mapping[str, Any]]]]:
        config, store = self.job.config, self.store
        # Rows stay in a cache on the person's own machine only.
        source = store.source if self.job.ray_address is None else partial(partial, store.rows)
        select = config.select
        if select is None:
            raise DataError("There is nothing to train on.", todo="LLMTrainer(select=Collection('…').find(), …)")
        folds = streamed(self.job, store, self._patiently)
        data: dict[str, Callable[[], Iterable[Mapping[str, Any]]]]
        data = {"train": folds.get("train") or source(select, "train")}
        for name, chosen in config.eval_selects.items():
            data[name] = source(chosen)
        if not config.eval_selects:
            if "valid" in folds:
                data["valid"] = folds["valid"]
            elif not folds and self._patiently(lambda: any(True for _ in store.rows(select, fold="valid", limit=1))):
                data["valid"] = source(select, "valid")
        return data

    def _move(self, frm: str | Sequence[str], to: str, **fields: Any) -> bool:
        """A transition of this attempt."""
        return self.store.runs.transition(self.job.run, frm, to, attempt=self.job.attempt, **fields)

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        return patiently(ask, self.patience)

    # -- what the engine calls -------------------------------------------------------------------------------

    def say(self, event: Event) -> None:
        """Spools an event and hands it to the follower, unless it was said before. Never raises, never waits."""
        if self.said.knows(event):
            return
        said = self.spool.say(event)
        if isinstance(event, Note) and event.data.get("causes"):  # NaN: whoever lists runs must see it
            self._warning = event.text
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

    def _same(self, counts: Mapping[str, Any]) -> None:
        """Refuses to go on with other rows or another base than the run began with.

        Raises:
            DataError: the rows are others, and nobody said that they may be.
            AdapterMismatch: the base is another.
        """
        then, now = self.before.get("rows_digest"), counts.get("rows_digest")
        if then and now and then != now:
            rows = f"{self.before.get('rows')} rows then, {counts.get('rows')} now"
            if self.before.get("rows") == counts.get("rows"):
                rows = f"{counts.get('rows')} rows then and now, with other tokens or in another order"
            if not self.job.changed_data:
                raise DataError(
                    f"The rows are not those that run {self.job.run} trained on, so it cannot go on as if nothing was.",
                    seen=rows,
                    todo="run.resume(changed_data=True) goes on with these; a new run with "
                    f"adapter_id={self.job.run!r} starts from its weights",
                )
            self.say(Note(level="warning", text=f"The run goes on with other rows, as was asked for: {rows}."))
        then, now = self.before.get("base_fingerprint"), counts.get("base_fingerprint")
        if then and now and then != now:
            raise AdapterMismatch(
                f"The base model is not the one that run {self.job.run} trained.",
                seen=f"{self.job.model.model_name_or_path}: {then} then, {now} now",
                todo="put the former base back, or start a new run",
            )

    def _started(self, counts: dict[str, Any]) -> None:
        self._same(counts)
        self.training = True
        if self._patiently(lambda: self._move("starting", "running", counts=counts)):
            self.say(StateChanged(state="running"))
        else:  # somebody pressed Stop meanwhile
            self._patiently(lambda: self.store.runs.update(self.job.run, counts=counts))
        first = self._patiently(lambda: self.store.runs.get(self.job.run)).get("reproduces")
        if first:
            from .reproducing import changed_rows  # it starts runs, and so knows this module

            self.say(changed_rows(first, counts))
        steps = counts.get("steps")
        rows = counts.get("rows")
        self.say(Note(text=f"{rows} rows, {steps} steps" if rows is not None else f"{steps} steps", data=counts))

    def _counted(self, counts: dict[str, Any]) -> None:
        self._recount = counts

    def _checkpoint(
        self, folder: Path, step: int, metrics: dict[str, float], kind: str, base_fingerprint: str, best: bool
    ) -> None:
        if self._storer is None:
            self._storer = Storer(self._store, self.folder / "storing", lambda: self.heart.letter == "kill")
        facts = {"step": step, "metrics": metrics, "kind": kind, "base_fingerprint": base_fingerprint, "best": best}
        self._storer.take(Path(folder), **facts)

    def _store(
        self, folder: Path, step: int, metrics: dict[str, float], kind: str, base_fingerprint: str, best: bool
    ) -> None:
        """On the storer's thread."""
        run = self.job.run
        if not self._patiently(lambda: self.store.runs.holds(run, self.job.attempt)):
            return  # another worker carries the run out by now, and these steps are its
        saved = self._patiently(
            lambda: self.store.checkpoints.put(
                run,
                step,
                folder,
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

    # -- letters ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        self.spool.settle()
        self._warn()

    def _warn(self) -> None:
        """What a person should know of the run without reading it goes on its record."""
        if self._warning is not None:
            self.store.runs.update(self.job.run, warning=self._warning)
            self._warning = None
        if self._recount is not None:  # rows that were read while they were trained
            counts, self._recount = self._recount, None
            try:
                self.store.runs.update(self.job.run, counts=counts)
            except DatabaseError:
                self._recount = counts
                raise

    def _stopping(self, letter: str) -> None:
        """On the heart's thread: a letter came."""
        if self._move(("starting", "running"), "stopping"):
            self.say(StateChanged(state="stopping", reason=self.why_stopped()))

    def why_stopped(self) -> str:
        """In words."""
        if self.interrupted:
            return "interrupted"
        return "killed" if self.heart.letter == "kill" else "stopped on request"


def told_of(error: BaseException, mask: Mask) -> dict[str, Any]:
    """What is written on the run about an error: ``{type, what, seen, todo, traceback}``, without secrets."""
    if isinstance(getattr(error, "told", None), dict):
        return dict(error.told)  # type: ignore[attr-defined] # it was told where it happened
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


def tokens_of(job: TrainJob) -> list[str]:
    """Tokens that a person may have given as options."""
    found = [thaw(job.config.arguments).get("hub_token")]
    for kwargs in (job.model.model_kwargs, job.model.tokenizer_kwargs):
        found.append(thaw(kwargs).get("token"))
    return [str(token) for token in found if isinstance(token, str)]
