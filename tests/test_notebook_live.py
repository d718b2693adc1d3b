"""The live view and its thread: what is sent to the page and when, the still that stays, and what is vendored."""

from __future__ import annotations

import hashlib
import math
import struct
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("anywidget")

import llmnb.notebook.live as live
from llmnb import series
from llmnb.errors import DatabaseError
from llmnb.events import CheckpointSaved, Metric, StateChanged
from llmnb.notebook import poller, still
from llmnb.series import Curve

STATIC = Path(live.__file__).parent / "static"


class FakeRun:
    """A run's handle with a life in memory."""

    def __init__(self, steps=100, id="20261121-180412-345-tickets"):
        self.id = id
        self.said, self.trouble, self.looks = [], None, 0
        self._record = {"_id": id, "model": "tickets", "version": 2, "state": "running", "counts": {"steps": steps}}

    @property
    def record(self):
        self.looks += 1
        if self.trouble:
            raise self.trouble
        return dict(self._record)

    def events(self, after=0):
        return [e for e in self.said if e.seq > after]

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

    def display(first, display_id=False, raw=False):
        found.handles.append(Handle(first))
        return found.handles[-1]

    monkeypatch.setattr(live, "display", display)
    return found


def shown(run, view, curve=None):
    curve, record = poller.read(run, curve)
    view.show(curve, record, "")
    return curve


def opened(run, page):
    view = live.LiveView(run.id)
    curve = shown(run, view)
    view.display()
    return view, curve


# --- what goes to the page ------------------------------------------------------------------------------------


def test_the_page_gets_snapshots_until_it_listens_then_only_what_is_new(page):
    run = FakeRun()
    run.losses(3.0, 2.5)
    view, curve = opened(run, page)
    run.losses(2.0)
    curve = shown(run, view, curve)
    assert page.kinds() == ["snapshot", "snapshot"], "nobody has said that it listens"
    view._heard(None, {"kind": "ready"}, [])
    run.losses(1.5)
    shown(run, view, curve)
    assert page.kinds()[2:] == ["snapshot", "append"]
    message, (steps, loss, smooth, eval_steps, eval_loss) = page.last()
    assert steps == (4.0,) and loss == (1.5,) and len(smooth) == 1 and eval_steps == eval_loss == ()
    assert message["base"] == 3 and message["seq"] == 4
    assert message["status"]["points"] == 4 and message["status"]["step"] == "step 4 / 100"


def test_nothing_new_sends_nothing(page):
    run = FakeRun()
    run.losses(3.0)
    view, curve = opened(run, page)
    view._heard(None, {"kind": "ready"}, [])
    count = len(page.messages)
    for _ in range(5):
        curve = shown(run, view, curve)
    assert len(page.messages) == count


def test_snapshot_and_appends_together_are_the_whole_curve(page):
    run = FakeRun()
    view, curve = opened(run, page)
    view._heard(None, {"kind": "ready"}, [])
    for i in range(30):
        run.losses(3.0 - i / 20, math.nan if i == 7 else 2.0)
        curve = shown(run, view, curve)
    columns = [[], [], [], [], []]
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
    view._heard(None, {"kind": "ready"}, [])
    run.losses(2.6, start=2)
    shown(run, view, curve)
    assert page.kinds()[-1] == "snapshot" and page.last()[1][0] == (1.0, 2.0)


def test_a_long_run_stays_small_in_the_page(page):
    run = FakeRun(steps=200_000)
    run.losses(*([1.0] * 50_000))
    view, curve = opened(run, page)
    view._heard(None, {"kind": "ready"}, [])
    assert len(page.last()[1][0]) <= 2100
    run.losses(*([1.0] * 5000))
    curve = shown(run, view, curve)
    run.losses(1.0)
    curve = shown(run, view, curve)
    assert page.kinds()[-1] == "snapshot" and len(page.last()[1][0]) <= 2100
    assert page.last()[0]["status"]["points"] == 55_001


def test_zooming_gets_the_range_in_detail(page):
    run = FakeRun(steps=50_000)
    run.losses(*(1.0 + (i == 12_345) for i in range(50_000)))
    view, _ = opened(run, page)
    view._heard(None, {"kind": "range", "range": [12_000, 12_500], "view": "v1"}, [])
    message, (steps, loss, *_rest) = page.last()
    assert message == {"kind": "detail", "view": "v1"}
    assert len(steps) == 503 and max(loss) == 2.0


def test_a_message_of_no_known_kind_is_passed_over(page):
    view, _ = opened(FakeRun(), page)
    count = len(page.messages)
    for message in ("ready", None, {}, {"kind": "other"}):
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
    assert "geheim" not in repr(state) + repr(page.messages) + repr([h.shown for h in page.handles[1:]])


# --- what stays in the file --------------------------------------------------------------------------------------


def test_at_the_end_the_display_becomes_a_still(page):
    run = FakeRun(steps=3)
    run.losses(3.0, 2.0)
    view, curve = opened(run, page)
    widget, kept = page.handles
    assert isinstance(widget.shown[0], live.LiveChart) and "llmnb-kept" in kept.shown[0]["text/html"]
    run.losses(1.0)
    run.end()
    curve = shown(run, view, curve)
    curve = shown(run, view, curve)
    assert len(widget.shown) == 2, "once, not at every look"
    last = widget.shown[-1]
    assert set(last) == {"text/plain", "text/html", "image/svg+xml"}
    assert 'data-status="done"' in last["text/html"] and 'data-points="3"' in last["text/html"]
    assert "done" in last["text/plain"] and "step 3 / 3" in last["text/plain"]
    assert kept.shown[-1] == {"text/plain": "", "text/html": ""}, "the second picture is not needed any more"
    run.say(CheckpointSaved(step=3, digest="d", best=True))
    shown(run, view, curve)
    assert "checkpoints" in widget.shown[-1]["text/plain"], "what trickles in after the end is drawn, too"


def test_a_run_that_is_over_is_shown_as_a_still_at_once(page):
    run = FakeRun()
    run.losses(3.0, 2.0)
    run.end("failed", what="The learning rate was too high.")
    opened(run, page)
    (only,) = page.handles
    assert "The learning rate was too high." in only.shown[0]["text/plain"] and page.messages == []


def test_while_running_a_picture_is_kept_for_the_file(page, monkeypatch):
    monkeypatch.setattr(live, "_KEEP_EVERY", 0.0)
    run = FakeRun()
    run.losses(3.0)
    view, curve = opened(run, page)
    run.losses(2.0, 1.0)
    shown(run, view, curve)
    assert 'data-points="3"' in page.handles[1].shown[-1]["text/html"]


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


def until(true, patience=10.0):
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def watcher():
    found = poller.Poller()
    yield found
    found.stop()


def test_the_thread_shows_what_is_new_and_ends_with_the_run(watcher):
    run, view = FakeRun(), Recorder()
    run.losses(3.0)
    watcher.watch(run, view, list)
    assert view.seen == [(1, "running", "")], "at once"
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
    until(lambda: all(v.seen[-1][0] == 1 for v in views))
    assert [t.name for t in threading.enumerate()].count("llmnb-watch") == 1


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
    watcher.watch(run, view, list)
    run.trouble = DatabaseError("The server is gone.")
    until(lambda: "does not answer" in view.seen[-1][2])
    assert view.seen[-1][0] == 1, "what was drawn stays"
    run.losses(2.0)
    run.trouble = None
    until(lambda: view.seen[-1] == (2, "running", ""))


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
    until(lambda: good.seen[-1][0] == 1)


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
    from llmnb.notebook.plots import plot

    run = FakeRun()
    run.losses(3.0, 2.0, 1.0)
    run.say(Metric(step=3, values={"eval_loss": 1.5}), CheckpointSaved(step=3, digest="d", best=True))
    figure = plot(run)
    traces = {trace.name: trace for trace in figure.data}
    assert set(traces) == {"loss", "smoothed", "eval", "checkpoint"}
    assert list(traces["loss"].y) == [3.0, 2.0, 1.0] and list(traces["eval"].x) == [3]
    assert "tickets v2" in figure.layout.title.text


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
    ours = (STATIC / "live.js").read_text() + (STATIC / "live.css").read_text()
    assert "http://" not in ours and "https://" not in ours
    assert "import(" not in text and "@import" not in text
