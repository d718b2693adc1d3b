"""The courier: brings home what a run left in its folder, and carries letters out. ``python -m llmnb.launch.courier``.

It is a process of its own on the caller's machine, so that it survives the notebook; whoever looks at the run starts it
again when it died. Bringing something twice does nothing: an event has its number, a checkpoint its digest.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, DatabaseError, InUse, NotFound
from . import away
from .heart import patiently
from .jobs import at
from .remote import lost_because, why_it_ended, withdraw

if TYPE_CHECKING:
    from ..store import FolderStore, Store

__all__ = ["FINISHED", "Courier", "main"]

FINISHED = "finished"
_ALIVE = ("queued", "starting", "running", "stopping")
_EVERY_S, _EVERY_S3_S = 1.0, 3.0
# Without a beat of the worker for so long it is asked whether its job still runs, and then called lost.
_ASK_S, _LOST_S = 15.0, 90.0
_PATIENCE_S = 900.0


class Courier:
    """One run's.

    Args:
        store: the database.
        folder: the run's.
        run: its id.
    """

    def __init__(self, store: Store, folder: FolderStore, run: str) -> None:
        self.home, self.there, self.run = store, folder, run
        self._letter: str | None = None
        self._beat: Any = None
        self._beat_at = self._asked_at = time.monotonic()

    def round(self) -> bool:
        """Brings home what is there now.

        Returns:
            True when the run is over and everything is home.

        Raises:
            NotFound: the run, or its folder, is gone; or the run goes on in another one.
        LlmnbError: the database or the folder is away; nothing is lost, the next round does it again.
        """
        ours = self.home.runs.get(self.run)
        if ours.get("away") != self.there.url:
            raise NotFound("folder of this attempt; the run goes on in", ours.get("away"))
        theirs = self.there.runs.get(self.run)  # before the events: a final state comes after the last of them
        self._carry_letter(ours)
        said = self.there.events.since(self.run, self.home.events.last_seq(self.run))
        self._bring_checkpoints()  # before the events that tell of them
        self._bring_pointer(ours)
        self._drop_checkpoints()  # after the pointer has moved on
        self.home.events.append(self.run, said, ours.get("attempt", 1))
        over = theirs["state"] not in _ALIVE
        if ours["state"] in _ALIVE:
            self._bring_state(ours, theirs)
        return over or self._given_up(ours, theirs)

    # -- out -------------------------------------------------------------------------------------------------

    def _carry_letter(self, ours: dict[str, Any]) -> None:
        letter = ours.get("control") or (None if ours["state"] in _ALIVE else "kill")
        if not letter or letter == self._letter:
            return
        if self.there.runs.transition(self.run, "queued", "stopped", reason="stopped before it began"):
            jobs = at(ours["ray_address"])
            jobs.stop(ours["job"])
            withdraw(jobs, ours)
        else:
            self.there.runs.ask(self.run, letter)
        self._letter = letter

    # -- home ------------------------------------------------------------------------------------------------

    def _bring_checkpoints(self) -> None:
        ours = {c.step: c for c in self.home.checkpoints.list(self.run)}
        theirs = {c.step: c for c in self.there.checkpoints.list(self.run)}
        for step, found in theirs.items():
            mine = ours.get(step)
            if mine is None or mine.digest != found.digest or (found.resumable and not mine.resumable):
                self._bring(step, found)
            elif found.best and not mine.best:
                self.home.checkpoints.mark_best(self.run, step)

    def _drop_checkpoints(self) -> None:
        theirs = {c.step for c in self.there.checkpoints.list(self.run)}
        self.there.runs.get(self.run)  # raises when it is the folder that is gone, not a checkpoint
        for step in {c.step for c in self.home.checkpoints.list(self.run)} - theirs:
            with contextlib.suppress(InUse, NotFound):  # another model points at it: it stays
                self.home.checkpoints.remove(self.run, step)

    def _bring(self, step: int, found: Any) -> None:
        try:
            away.carry(self.there, self.home, self.run, step, resume=found.resumable)
        except (ArtifactError, NotFound):
            now = next((c for c in self.there.checkpoints.list(self.run) if c.step == step), None)
            if now is not None and (now.digest, now.resumable) == (found.digest, found.resumable):
                raise
            # The worker replaced or removed it meanwhile; the next round sees what is there.

    def _bring_pointer(self, ours: dict[str, Any]) -> None:
        model, version = ours["model"], ours["version"]
        with contextlib.suppress(NotFound):  # the person removed the version; the checkpoints stay
            pointed = self.there.models.get(model, version).get("checkpoint")
            if pointed and pointed != self.home.models.get(model, version).get("checkpoint"):
                self.home.models.point(model, version, pointed)

    def _bring_state(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        told = {k: theirs.get(k) for k in ("counts", "error", "reason", "rank0") if theirs.get(k)}
        if theirs["state"] != ours["state"]:
            attempt = ours.get("attempt", 1)
            self.home.runs.transition(self.run, _ALIVE, theirs["state"], attempt=attempt, **told)
        elif theirs.get("heartbeat") != self._beat and theirs["state"] != "queued":
            self.home.runs.beat(self.run)
            if any(ours.get(k) != value for k, value in told.items()):
                self.home.runs.update(self.run, **told)
        if theirs.get("heartbeat") != self._beat:
            self._beat, self._beat_at = theirs.get("heartbeat"), time.monotonic()

    # -- when nothing comes ----------------------------------------------------------------------------------

    def _given_up(self, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
        """The job ended without a word, or the person ended it."""
        if ours["state"] not in _ALIVE and theirs["state"] == "queued":
            return True
        silent = time.monotonic() - self._beat_at
        if silent < _ASK_S or time.monotonic() - self._asked_at < _ASK_S:
            return False
        self._asked_at = time.monotonic()
        if ours["state"] not in _ALIVE:
            return True
        jobs = at(ours["ray_address"])
        why = why_it_ended(jobs, ours["job"])
        if self.there.runs.get(self.run)["state"] != theirs["state"]:  # it spoke meanwhile
            return False
        if why is None and (theirs["state"] == "queued" or silent < _LOST_S):
            return False
        withdraw(jobs, ours)
        if self._letter is not None:
            self._end(ours, "stopped", None)
        elif theirs["state"] == "queued":
            self._end(ours, "failed", why)
        else:
            self._end(ours, "lost", lost_because(why or {"seen": f"no beat for {silent:.0f} s in {self.there.url}"}))
        return True

    def _end(self, ours: dict[str, Any], state: str, error: dict[str, Any] | None) -> None:
        # No event is said of it: the next number may be taken, in a spool that the worker left on its machine.
        self.home.runs.transition(self.run, _ALIVE, state, attempt=ours.get("attempt", 1), error=error)


def main(arguments: list[str] | None = None) -> int:
    """``python -m llmnb.launch.courier FILE``; the file names the run and the database, and is removed."""
    from ..store import open_folder, open_store

    path = Path((arguments or sys.argv[1:])[0])
    note = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    with patiently(lambda: open_store(note["uri"], home=note["home"]), _PATIENCE_S) as store:
        record = patiently(lambda: store.runs.get(note["run"]), _PATIENCE_S)
        with open_folder(record["away"], home=note["home"]) as folder:
            work(Courier(store, folder, note["run"]))
    return 0


def work(courier: Courier) -> None:
    """Round after round, until the run is over and home. While either side is away it waits and tries again."""
    every = _EVERY_S3_S if away.is_s3(courier.there.url) else _EVERY_S
    pause = every
    while True:
        try:
            if courier.round():
                courier.there.remove()
                courier.home.runs.update(courier.run, courier=FINISHED)
                return
            pause = every
        except NotFound as error:  # the run was removed, or its folder
            print(error, file=sys.stderr, flush=True)
            return
        except Exception as error:  # noqa: BLE001 - a border: whatever is away now may be back in a while
            told = "" if isinstance(error, DatabaseError) else traceback.format_exc(limit=-3)
            print(time.strftime("%FT%TZ", time.gmtime()), type(error).__name__, told, file=sys.stderr, flush=True)
            pause = min(pause * 2, 30.0)
        time.sleep(pause)


if __name__ == "__main__":
    sys.exit(main())
