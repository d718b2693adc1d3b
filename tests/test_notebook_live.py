"""The live view and its thread: what is sent to the page and when, the still that stays, and what is vendored."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import struct
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("anywidget")

import llmnb.notebook.live as live
from llmnb import series
from llmnb.errors import DatabaseError, NotFound, RunError
from llmnb.events import CheckpointSaved, Metric, Note, StateChanged
from llmnb.notebook import comparison, poller, steering, still
from llmnb.series import Curve

STATIC = Path(live.__file__).parent / "static"


class FakeRun:
    """A run's handle with a life in memory."""

    def __init__(self, steps=100, id="20261121-180412-345-tickets"):
        self.id = id
        self.said, self.trouble, self.looks = [], None, 0
        self.asked, self.refusal = [], None
        self._record = {"_id": id, "model": "tickets", "version": 2, "state": "running", "counts": {"steps": steps}}

    @property
    def record(self):
        self.looks += 1
        if self.trouble:
            raise self.trouble
        return dict(self._record)

    def events(self, after=0):
        return [e for e in self.said if e.seq > after]

    def glance(self, until, count=2000):
        return self.said[: until : max(1, until // count)]

    def columns(self, names, after, until):
        return None

    def logs(self, n=50):
        return "<b>printed</b>"

    def stop(self):
        self.asked.append("stop")

    def kill(self):
        self.asked.append("kill")

    def resume(self, **words):
        self.asked.append("resume")
        if self.refusal:
            raise self.refusal

    def say(self, *events):
        for event in events:
            self.said.append(event.numbered(len(self.said) + 1))

    def losses(self, *values, start=None):
        first = start or sum(isinstance(e, Metric) for e in self.said) + 1
        self.say(*(Metric(step=first + i, time=1000.0 + first + i, values={"loss": v}) for i, v in enumerate(values)))

    def end(self, state="done", **error):
        self._record.update(state=state, error=error or None)
        self.say(StateChanged(state=state))


class Handle:
    def __init__(self, first):
        self.shown = [first]

    def update(self, data, raw=False):
        assert raw
        self.shown.append(data)


@pytest.fixture
def page(monkeypatch):
    """A stand-in for the browser: every message to it, every display."""

    class Page:
        def __init__(self):
            self.messages, self.handles = [], []

        def kinds(self):
            return [m["kind"] for m, _ in self.messages]

        def last(self):
            message, buffers = self.messages[-1]
            return message, [struct.unpack(f"<{len(b) // 8}d", b) for b in buffers]

    found = Page()
    monkeypatch.setattr(live.LiveChart, "send", lambda self, m, buffers=None: found.messages.append((m, buffers)))

    return found


def shown(run, view, curve=None):
    curve, record = poller.read(run, curve)
    view.show(curve, record, "")
    return curve


def opened(run, page, **options):
    view = live.LiveView(run, **options)
    view.keep(Handle({}))
    curve = shown(run, view)
    return view, curve


def ready(view):
    view._heard(None, {"kind": "ready"}, [])


def choose(view, **choices):
    view._heard(None, {"kind": "choose", "choices": choices}, [])


def status_of(page):
    """The words as the page has them: each message says what changed."""
    known = {}
    for message, _ in page.messages:
        if message["kind"] in ("snapshot", "append"):
            known.update(message["status"])
    return known


def until(true, patience=10.0):
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# --- what goes to the page ------------------------------------------------------------------------------------


def test_the_page_gets_snapshots_until_it_listens_then_only_what_is_new(page):
    run = FakeRun()
    run.losses(3.0, 2.5)
    view, curve = opened(run, page)
    run.losses(2.0)
    curve = shown(run, view, curve)
    assert page.kinds() == ["snapshot", "snapshot"], "nobody has said that it listens"
    ready(view)
    run.losses(1.5)
    shown(run, view, curve)
    assert page.kinds()[2:] == ["snapshot", "append"]
    message, (steps, loss, smooth, *rest) = page.last()
    assert steps == (4.0,) and loss == (1.5,) and len(smooth) == 1 and rest == [()] * 6
    assert message["base"] == 3 and message["seq"] == 4
    assert set(message["status"]) == {"points", "step", "share", "facts", "loses"}, "only what changed"
    assert status_of(page)["points"] == 4 and status_of(page)["step"] == "step 4 / 100"


def test_nothing_new_sends_nothing(page):
    run = FakeRun()
    run.losses(3.0)
    view, curve = opened(run, page)
    ready(view)
    count = len(page.messages)
    for _ in range(5):
        curve = shown(run, view, curve)
    assert len(page.messages) == count


def test_snapshot_and_appends_together_are_the_whole_curve(page):
    run = FakeRun()
    view, curve = opened(run, page)
    ready(view)
    for i in range(30):
        run.losses(3.0 - i / 20, math.nan if i == 7 else 2.0)
        curve = shown(run, view, curve)
    columns = [[] for _ in range(9)]
    for message, buffers in page.messages:
        new = [list(struct.unpack(f"<{len(b) // 8}d", b)) for b in buffers]
        columns = new if message["kind"] == "snapshot" else [a + b for a, b in zip(columns, new)]
    assert page.kinds().count("append") == 30
    whole = series.picture(curve)
    assert columns[0] == whole.steps.tolist()
    assert [repr(x) for x in columns[1]] == [repr(x) for x in whole.loss.tolist()], "NaN included"
    assert columns[2] == pytest.approx(whole.smooth.tolist(), nan_ok=True)


def test_a_resumed_run_is_drawn_anew(page):
    run = FakeRun()
    run.losses(3.0, 2.5, 2.0, 1.5)
    view, curve = opened(run, page)
    ready(view)
    run.losses(2.6, start=2)
    shown(run, view, curve)
    assert page.kinds()[-1] == "snapshot" and page.last()[1][0] == (1.0, 2.0)


def test_a_long_run_stays_small_in_the_page(page):
    run = FakeRun(steps=200_000)
    run.losses(*([1.0] * 50_000))
    view, curve = opened(run, page)
    ready(view)
    assert len(page.last()[1][0]) <= 2100
    run.losses(*([1.0] * 5000))
    curve = shown(run, view, curve)
    run.losses(1.0)
    curve = shown(run, view, curve)
    assert page.kinds()[-1] == "snapshot" and len(page.last()[1][0]) <= 2100
    assert status_of(page)["points"] == 55_001


def test_zooming_gets_the_range_in_detail(page):
    run = FakeRun(steps=50_000)
    run.losses(*(1.0 + (i == 12_345) for i in range(50_000)))
    view, _ = opened(run, page)
    choose(view, zoom=[12_000, 12_500])
    message, (steps, loss, *_rest) = page.last()
    assert message == {"kind": "detail", "zoom": [12_000, 12_500]}
    assert len(steps) == 503 and max(loss) == 2.0
    ready(view)
    assert page.kinds()[-2:] == ["snapshot", "detail"], "a page that is loaded again is as zoomed as it was"
    choose(view, zoom=None)
    assert page.kinds()[-1] == "detail" and status_of(page)["choices"]["zoom"] is None


def test_a_message_of_no_known_kind_is_passed_over(page):
    view, _ = opened(FakeRun(), page)
    count = len(page.messages)
    for message in ("ready", None, {}, {"kind": "other"}, {"kind": "press", "what": "burn"}, {"kind": "choose"}):
        view._heard(None, message, [])
    assert len(page.messages) == count


def test_the_widget_state_holds_the_run_id_and_nothing_secret(page):
    run = FakeRun()
    run._record["uri"] = "mongodb://u:geheim@h/x"
    run.losses(1.0)
    view, _ = opened(run, page)
    state = view.widget.get_state()
    ours = {k: v for k, v in state.items() if not k.startswith("_") and k not in ("layout", "tabbable", "tooltip")}
    assert ours == {"run": run.id}
    assert "geheim" not in repr(state) + repr(page.messages) + repr(view._kept.shown)


# --- what stays in the file --------------------------------------------------------------------------------------


def test_at_the_end_the_second_output_is_the_final_still(page):
    run = FakeRun(steps=3)
    run.losses(3.0, 2.0)
    view, curve = opened(run, page)
    kept = view._kept
    assert "llmnb-kept" in kept.shown[1]["text/html"]
    run.losses(1.0)
    run.end()
    curve = shown(run, view, curve)
    count = len(kept.shown)
    curve = shown(run, view, curve)
    assert len(kept.shown) == count, "once, not at every look"
    last = kept.shown[-1]
    assert set(last) == {"text/plain", "text/html", "image/svg+xml"}
    assert 'data-status="done"' in last["text/html"] and 'data-points="3"' in last["text/html"]
    assert "llmnb-kept" in last["text/html"], "out of sight while the widget lives"
    assert "done" in last["text/plain"] and "step 3 / 3" in last["text/plain"]
    assert status_of(page)["state"] == "done", "the page has the end, too"
    run.say(CheckpointSaved(step=3, digest="d", best=True))
    shown(run, view, curve)
    assert "checkpoints" in kept.shown[-1]["text/plain"], "what trickles in after the end is drawn, too"


def test_a_run_that_is_over_is_shown_with_its_still(page):
    run = FakeRun()
    run.losses(3.0, 2.0)
    run.end("failed", what="The learning rate was too high.")
    view, _ = opened(run, page)
    assert "The learning rate was too high." in view._kept.shown[-1]["text/plain"]
    assert status_of(page)["alert"] == "The learning rate was too high."


def test_while_running_a_picture_is_kept_for_the_file(page, monkeypatch):
    monkeypatch.setattr(live, "_KEEP_SELDOM", 0.0)
    run = FakeRun()
    run.losses(3.0)
    view, curve = opened(run, page)
    run.losses(2.0, 1.0)
    shown(run, view, curve)
    assert 'data-points="3"' in view._kept.shown[-1]["text/html"]


# --- what a person chooses ---------------------------------------------------------------------------------------


def test_choices_outlive_the_page(page):
    run = FakeRun()
    run.losses(3.0, 1.0, 2.0)
    view, _ = opened(run, page)
    ready(view)
    choose(view, smooth=0.0, log=True, nonsense=1)
    assert page.kinds()[-1] == "snapshot" and page.last()[1][2] == (3.0, 1.0, 2.0), "smoothed by nothing"
    count = len(page.messages)
    choose(view, smooth=0.0)
    assert len(page.messages) == count, "what was chosen before is not drawn again"
    ready(view)
    chosen = page.last()[0]["status"]["choices"]
    assert chosen == {"smooth": 0.0, "log": True, "zoom": None, "printed": False, "compare": []}


@pytest.mark.parametrize(
    ("name", "value"), [("smooth", 1), ("smooth", "x"), ("smooth", -0.1), ("zoom", [1]), ("zoom", [1, math.inf])]
)
def test_a_choice_that_makes_no_sense_is_the_default(page, name, value):
    view, _ = opened(FakeRun(), page)
    choose(view, smooth=0.9, zoom=[1, 2])
    choose(view, **{name: value})
    assert view.choices[name] == live.CHOICES[name]


def test_smoothing_goes_on_with_what_is_appended(page):
    run = FakeRun()
    run.losses(3.0, 1.0)
    view, curve = opened(run, page)
    ready(view)
    choose(view, smooth=0.9)
    run.losses(2.0)
    curve = shown(run, view, curve)
    assert page.kinds()[-1] == "append"
    assert page.last()[1][2][0] == pytest.approx(series.smooth(curve["loss"].values, 0.9)[-1])


def test_a_range_that_still_grows_is_sent_again(page, monkeypatch):
    monkeypatch.setattr(live, "_DETAIL_EVERY", 0.0)
    run = FakeRun()
    run.losses(3.0, 1.0)
    view, curve = opened(run, page)
    ready(view)
    choose(view, zoom=[1, 3])
    for expected in ("detail", "append"):
        run.losses(2.0)
        curve = shown(run, view, curve)
        assert page.kinds()[-1] == expected


def test_a_view_that_nobody_sees_sends_nothing_until_somebody_does(page):
    run = FakeRun()
    run.losses(3.0)
    view, curve = opened(run, page)
    ready(view)
    view._heard(None, {"kind": "gone"}, [])
    assert page.kinds()[-1] == "anyone", "another page may show it, too"
    count = len(page.messages)
    run.losses(2.0)
    shown(run, view, curve)
    assert len(page.messages) == count
    ready(view)
    assert page.kinds()[-1] == "snapshot" and page.last()[1][0] == (1.0, 2.0)


def test_the_log_is_read_while_it_is_open_only(page, monkeypatch):
    monkeypatch.setattr(live, "_LOG_EVERY", 0.05)
    run = FakeRun()
    run.say(Note(level="warning", text="12 rows were cut", time=1000.0))
    view, _ = opened(run, page)
    choose(view, printed=True)
    until(lambda: "log" in page.kinds())
    message = next(m for m, _ in page.messages if m["kind"] == "log")
    assert message["text"] == "<b>printed</b>" and message["notes"][0].endswith("warning: 12 rows were cut")
    time.sleep(0.3)
    assert page.kinds().count("log") == 1, "only when it says something new"
    choose(view, printed=False)
    until(lambda: not view._printing.is_alive())


# --- steering --------------------------------------------------------------------------------------------------------


def press(view, what):
    view._heard(None, {"kind": "press", "what": what}, [])


def test_stop_is_said_at_once_and_done_on_a_thread(page):
    run = FakeRun()
    run.losses(3.0)
    view, curve = opened(run, page)
    ready(view)
    press(view, "stop")
    assert status_of(page)["doing"] == "stop"
    press(view, "stop")
    until(lambda: run.asked == ["stop"])
    run._record.update(state="stopping")
    until(lambda: not view._steering._busy)
    shown(run, view, curve)
    found = status_of(page)
    assert (
        found["doing"] == "" and found["reasons"]["stop"] == "it is stopping already" and not found["reasons"]["kill"]
    )
    press(view, "kill")
    until(lambda: run.asked == ["stop", "kill"])


def test_what_a_button_could_not_do_is_said(page):
    run = FakeRun()
    run.losses(3.0)
    run.end("stopped")
    run.refusal = RunError("Nothing is left to do.", seen="step 3 of 3", todo="train it further")
    view, _ = opened(run, page)
    press(view, "resume")
    until(lambda: status_of(page)["said"])
    assert status_of(page)["said"] == "Nothing is left to do (step 3 of 3). To do: train it further."
    assert status_of(page)["doing"] == ""


def test_each_button_says_why_it_cannot_be_pressed():
    def why(state, **record):
        return steering.reasons(Curve(state=state, step=record.pop("step", 0), total=100), record)

    assert why("running") == {"stop": "", "kill": "", "resume": "the run goes on"}
    assert why("stopped")["resume"] == "" and "ended (stopped)" in why("stopped")["kill"]
    assert why("done", step=100)["resume"].startswith("all its steps are done")
    assert why("running", control="kill")["kill"] == "it is ending already"
    assert set(steering.reasons(Curve(), {}, gone=True).values()) == {"the run was removed"}


def test_a_kill_says_what_it_loses():
    curve = series.fold(Curve(), [Metric(seq=1, step=420, values={"loss": 1.0})])
    assert steering.loses(curve) == "lose all 420 steps: no checkpoint is saved yet"
    saved = series.fold(curve, [CheckpointSaved(seq=2, step=400, digest="d")])
    assert steering.loses(saved) == "lose what came after step 400"
    assert steering.loses(Curve()) == "end it before its first step"


# --- beside other runs -----------------------------------------------------------------------------------------------


def test_runs_are_compared_by_what_differs():
    one = {
        "_id": "a",
        "model": "t",
        "version": 1,
        "config": {
            "lora_r": 8,
            "use_lora": True,
            "output_dir": "x",
            "select": {"collection": "docs"},
            "arguments": {"learning_rate": 2e-4},
        },
    }
    other = {
        "_id": "b",
        "model": "t",
        "version": 2,
        "config": {
            "lora_r": 16,
            "use_lora": True,
            "output_dir": "y",
            "select": {"collection": "docs", "filter": {"lang": "en"}},
            "arguments": {"max_steps": 5},
        },
    }
    found = dict(comparison.differences([one, other]))
    assert found == {
        "lora_r": ["8", "16"],
        "learning_rate": ["0.0002", "default"],
        "max_steps": ["default", "5"],
        "filter": ["default", '{"lang": "en"}'],
    }
    curve = series.fold(Curve(state="done", total=3), [Metric(seq=1, step=3, values={"loss": 1.0, "eval_loss": 1.5})])
    rows = dict(comparison.outcomes([curve, Curve()]))
    assert rows["best eval"] == ["1.500 at 3", "–"] and rows["state"] == ["done", "queued"]
    assert comparison.table([one, other], [curve, Curve()])["heads"] == ["t v1", "t v2"]


class Shell:
    """A session with two runs, and a poller of its own."""

    def __init__(self, *runs):
        self.runs_ = {run.id: run for run in runs}
        self.poller_ = poller.Poller()
        self.store = self.runs = self

    def database(self):
        return self

    def poller(self):
        return self.poller_

    def run(self, id):
        return self.runs_[id]

    def list(self, limit=0):
        return [run.record for run in self.runs_.values()]

    def find_lost(self):
        return []


def test_other_runs_are_drawn_over_it(page):
    run, other = FakeRun(), FakeRun(id="20261121-190000-000-tickets")
    other._record.update(version=3, config={"lora_r": 16})
    other.losses(4.0, 3.0)
    run.losses(3.0)
    shell = Shell(run, other)
    view, _ = opened(run, page, session=shell)

    def others():
        return [m for m, _ in page.messages if m["kind"] == "others"]

    try:
        view._heard(None, {"kind": "runs"}, [])
        until(lambda: "runs" in page.kinds())
        assert page.messages[-1][0]["runs"] == [[other.id, "tickets v3 · running"]], "not itself"
        choose(view, compare=[other.id, run.id])
        until(lambda: any(m["runs"] for m in others()))
        message, buffers = next((m, b) for m, b in page.messages if m["kind"] == "others" and m["runs"])
        assert struct.unpack("<2d", buffers[0]) == (1.0, 2.0) and message["runs"][0]["title"] == "tickets v3"
        assert ["lora_r", "default", "16"] in message["table"]["rows"]
        ready(view)
        assert page.kinds()[-2:] == ["snapshot", "others"], "and again for a page that is loaded again"
        choose(view, compare=[])
        until(lambda: not others()[-1]["runs"])
        until(lambda: other.id not in shell.poller_.runs)
        choose(view, compare=["nosuch"])
        until(lambda: others()[-1]["trouble"])
    finally:
        shell.poller_.stop()


# --- stills ----------------------------------------------------------------------------------------------------------


def test_a_still_is_escaped_and_draws_gaps():
    run = FakeRun()
    run._record["model"] = "<img src=x onerror=alert(1)>"
    run.losses(3.0, 2.0, math.nan, 1.0, math.inf, 0.5)
    run.end("failed", what="<script>")
    curve, record = poller.read(run)
    out = still.bundle(curve, still.title_of(record), time.time())
    assert "<script>" not in out["text/html"] and "<img src=x" not in out["text/html"]
    assert "nan" not in out["image/svg+xml"].lower() and "inf" not in out["image/svg+xml"].lower()
    raw = out["image/svg+xml"].split("stroke-opacity")[0].rsplit('d="', 1)[1]
    assert raw.count("M") == 3, "three pieces, two gaps"


def test_a_still_of_nothing_has_words_and_no_picture():
    small = still.bundle(series.fold(Curve(), [Metric(seq=1, step=1, values={"loss": 1.0})]), "t", 0, small=True)
    assert set(small) == {"text/plain", "text/html"} and "<img" in small["text/html"]
    out = still.bundle(Curve(run="r", state="queued"), "tickets", 0)
    assert "image/svg+xml" not in out and "queued" in out["text/plain"]
    only = series.fold(Curve(), [Metric(seq=1, step=1, values={"loss": math.nan})])
    assert "<svg" in still.bundle(only, "t", 0)["image/svg+xml"]


# --- the thread --------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.seen, self.closed = [], False

    def show(self, curve, record, trouble):
        self.seen.append((curve.points, curve.state, trouble))

    def close(self):
        self.closed = True


@pytest.fixture
def watcher():
    found = poller.Poller()
    yield found
    found.stop()


def test_the_thread_shows_what_is_new_and_ends_with_the_run(watcher):
    run, view = FakeRun(), Recorder()
    run.losses(3.0)
    watcher.watch(run, view, list)
    until(lambda: view.seen == [(1, "running", "")])
    run.losses(2.0)
    until(lambda: view.seen[-1][0] == 2)
    run.end()
    until(lambda: view.seen[-1][1] == "done")
    until(lambda: not watcher.runs)
    until(lambda: "llmnb-watch" not in [t.name for t in threading.enumerate()])


def test_two_views_share_one_thread_and_one_look(watcher):
    run, views = FakeRun(), [Recorder(), Recorder()]
    for view in views:
        watcher.watch(run, view, list)
    run.losses(2.0)
    until(lambda: all(v.seen and v.seen[-1][0] == 1 for v in views))
    assert [t.name for t in threading.enumerate()].count("llmnb-watch") == 1


def test_a_long_run_is_shown_at_a_glance_first(watcher):
    run, view = FakeRun(), Recorder()
    run.losses(*([1.0] * 20_000))
    run._record["last_seq"] = 20_000
    watcher.watch(run, view, list, wait=20)
    until(lambda: len(view.seen) > 1)
    assert [points for points, *_ in view.seen[:2]] == [2000, 20_000]


def test_it_looks_at_most_four_times_a_second(watcher):
    run, view = FakeRun(), Recorder()
    watcher.watch(run, view, list)
    before = run.looks
    time.sleep(1.1)
    assert run.looks - before <= 5


def test_a_database_that_goes_away_is_said_and_waited_for(watcher, monkeypatch):
    monkeypatch.setattr(poller, "PATIENCE", 0.3)
    run, view = FakeRun(), Recorder()
    run.losses(3.0)
    watcher.watch(run, view, list, wait=5)
    run.trouble = DatabaseError("The server is gone.")
    until(lambda: "does not answer" in view.seen[-1][2])
    assert view.seen[-1][0] == 1, "what was drawn stays"
    run.losses(2.0)
    run.trouble = None
    until(lambda: view.seen[-1] == (2, "running", ""))


@pytest.mark.mongod
def test_a_real_database_goes_away_comes_back_and_loses_the_run(watcher, tmp_path):
    from llmnb import connect
    from llmnb.store import embedded

    home = tmp_path / "home"
    db = connect(home=home)
    try:
        runs, events = db.store.runs, db.store.events
        run = runs.create("x", model="x", version=1, config={}, counts={"steps": 9})["_id"]
        runs.transition(run, "queued", "starting")
        events.append(run, [Metric(seq=1, step=1, values={"loss": 2.0})])
        view = Recorder()
        watcher.watch(db.run(run), view, runs.find_lost, wait=10)
        assert view.seen[-1] == (1, "starting", "")
        os.kill(embedded.status(home).pid, signal.SIGKILL)
        until(lambda: "does not answer" in view.seen[-1][2], 60)
        assert view.seen[-1][0] == 1, "what was drawn stays"
        embedded.start(home)
        events.append(run, [Metric(seq=2, step=2, values={"loss": 1.0})])
        until(lambda: view.seen[-1] == (2, "starting", ""), 60)
        runs.transition(run, "starting", "stopped")
        runs.remove(run)
        until(lambda: "was removed" in view.seen[-1][2], 60)
        until(lambda: not watcher.runs)
    finally:
        watcher.stop()
        db.close()
        embedded.stop(home)


def test_a_run_that_is_removed_is_said_and_asked_for_no_more(watcher):
    run, view = FakeRun(), Recorder()
    run.losses(3.0)
    watcher.watch(run, view, list, wait=5)
    run.trouble = NotFound("run", run.id, [])
    until(lambda: "was removed" in view.seen[-1][2])
    until(lambda: not watcher.runs)
    looks = run.looks
    time.sleep(0.6)
    assert run.looks == looks


def test_a_resumed_run_goes_on_in_the_views_that_it_had(watcher):
    run, view = FakeRun(), Recorder()
    run.losses(3.0)
    run.end("stopped")
    watcher.watch(run, view, list)
    until(lambda: not watcher.runs)
    run._record.update(state="running")
    run.losses(2.0)
    later = Recorder()
    watcher.watch(run, later, list)
    until(lambda: view.seen[-1][:2] == (2, "running") and later.seen and later.seen[-1][:2] == (2, "running"))
    watcher.leave(run.id, later)
    run.losses(1.0)
    until(lambda: view.seen[-1][0] == 3)
    assert later.seen[-1][0] == 2


def test_a_run_that_no_page_shows_is_looked_at_seldom(watcher):
    run, view = FakeRun(), Recorder()
    view.asleep = True
    watcher.watch(run, view, list, wait=5)
    before = run.looks
    time.sleep(1.1)
    assert run.looks - before <= 1
    view.asleep = False
    until(lambda: run.looks - before > 4)


def test_a_view_that_fails_does_not_stop_the_others(watcher):
    run, good = FakeRun(), Recorder()

    class Bad(Recorder):
        def show(self, curve, record, trouble):
            super().show(curve, record, trouble)
            if len(self.seen) > 1:
                raise RuntimeError("the page went away")

    watcher.watch(run, Bad(), list)
    watcher.watch(run, good, list)
    run.losses(2.0)
    until(lambda: good.seen and good.seen[-1][0] == 1)


def test_lost_runs_are_looked_for_while_one_watches(watcher, monkeypatch):
    monkeypatch.setattr(poller, "LOST_EVERY", 0.3)
    calls = []
    watcher.watch(FakeRun(), Recorder(), lambda: calls.append(1))
    until(lambda: calls)


def test_stopping_ends_the_thread_and_closes_the_views():
    found, view = poller.Poller(), Recorder()
    found.watch(FakeRun(), view, list)
    found.stop()
    assert view.closed and not found.runs and "llmnb-watch" not in [t.name for t in threading.enumerate()]


# --- plotly ----------------------------------------------------------------------------------------------------------


def test_plot_draws_the_same_curve():
    pytest.importorskip("plotly")
    from llmnb.launch.run import Run

    run, other = FakeRun(), FakeRun(id="20261121-190000-000-tickets")
    run.losses(3.0, 2.0, 1.0)
    values = {"eval_loss": 1.5, "learning_rate": 1e-4, "grad_norm": 2.0}
    run.say(Metric(step=3, values=values), CheckpointSaved(step=3, digest="d", best=True))
    other._record.update(version=3)
    other.losses(4.0, 3.0)
    figure = Run.plot(run, compare=[other], smooth=0.0, log=True)
    traces = {trace.name: trace for trace in figure.data}
    ours = {"loss", "smoothed", "eval", "checkpoint", "learning rate", "gradient norm"}
    assert set(traces) == {*ours, "tickets v3"}
    assert list(traces["loss"].y) == [3.0, 2.0, 1.0] and list(traces["eval"].x) == [3]
    assert list(traces["tickets v3"].y) == [4.0, 3.0] and figure.layout.yaxis.type == "log"
    assert traces["gradient norm"].yaxis == "y3" and list(traces["checkpoint"].marker.symbol) == ["diamond"]
    assert "tickets v2" in figure.layout.title.text
    with pytest.raises(ValueError, match="below 1"):
        Run.plot(run, smooth=1.0)


# --- what is vendored ------------------------------------------------------------------------------------------------


def test_the_vendored_files_are_what_their_hashes_say():
    listed = {}
    for line in (STATIC / "uplot" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        listed[name] = digest
    assert set(listed) == {"LICENSE", "uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in listed.items():
        assert hashlib.sha256((STATIC / "uplot" / name).read_bytes()).hexdigest() == digest, name
    assert "MIT License" in (STATIC / "uplot" / "LICENSE").read_text()


def test_nothing_is_fetched_from_elsewhere():
    text = live.LiveChart._esm + live.LiveChart._css
    ours = "".join((STATIC / name).read_text() for name in ("live_charts.js", "live_parts.js", "live.js", "live.css"))
    assert "http://" not in ours and "https://" not in ours
    assert "import(" not in text and "@import" not in text
