"""What the live view costs: the page, the wire, the kernel; and how late a loss point is seen.

Run by hand: ``python tests/bench/bench_view.py [--points 100000] [--seconds 10]``. A real mongod, real JupyterLab in
headless Chromium, runs whose events are written by another process. Beside each figure of time stands the same
measurement with nothing to show, because the machine's other work is in both.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1]), str(HERE.parents[1] / "browser")]

from lab import lab, notebook
from playwright.sync_api import sync_playwright
from tiny import make_model

from llmnb import Collection, connect
from llmnb.events import Metric, StateChanged
from llmnb.launch import runner
from llmnb.store import embedded

EACH, EVERY = 10, 0.25  # points, seconds: the pace of the live updates
# When the views that come from now on have drawn what, by the newest event in it.
DRAWN = """() => {
    const before = new Set(document.querySelectorAll('.llmnb-live')), drawn = window.drawn = {};
    const look = () => {
        for (const view of document.querySelectorAll('.llmnb-live')) {
            const { seq, points } = view.dataset;
            const key = seq + '/' + points;
            if (seq && !before.has(view) && !(key in drawn)) {
                drawn[key] = null;
                requestAnimationFrame(() => setTimeout(() => { drawn[key] = [Date.now() / 1000, +points]; }));
            }
        }
    };
    window.looker?.disconnect();
    window.looker = new MutationObserver(look);
    window.looker.observe(document.body, {subtree: true, childList: true, attributes: true,
        attributeFilter: ['data-seq', 'data-points']});
}"""
# Time between two turns of the page's event loop above 4 ms is time in which it could not answer, by the second.
BLOCKED = """(seconds) => new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    const begin = performance.now(), blocked = Array(seconds).fill(0);
    let last = begin;
    port1.onmessage = () => {
        const now = performance.now(), second = Math.floor((last - begin) / 1000);
        if (now - last > 4 && second < seconds) blocked[second] += now - last;
        last = now;
        if (now - begin < 1000 * seconds) port2.postMessage(0);
        else done(blocked);
    };
    port2.postMessage(0);
})"""
# The same in the kernel: its main thread counts how long it did not get to run. And what the view's thread took.
KERNEL = """
import threading, time, psutil
def gaps(seconds):
    begin = last = time.perf_counter()
    found = [0.0] * seconds
    while last - begin < seconds:
        now = time.perf_counter()
        if now - last > 0.001:
            found[min(seconds - 1, int(last - begin))] += now - last
        last = now
    return [round(1000 * gap, 1) for gap in found]
def taken():
    ids = {thread.native_id for thread in threading.enumerate() if thread.name == "llmnb-watch"}
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in ids)
def measured(seconds):
    before, said = taken(), gaps(seconds)
    print(said, 1000 * (taken() - before) / seconds)
"""


def a_run(db, points: int, steps: int) -> str:
    """A run in state running that has said so many losses."""
    run = db.store.runs.create("long", model="long", version=1, config={}, counts={"steps": steps})["_id"]
    db.store.runs.transition(run, "queued", "starting")
    db.store.runs.transition(run, "starting", "running")
    db.store.events.append(run, [StateChanged(seq=1, state="running")])
    # Nobody beats for it between the parts of this bench, and the view would call it lost.
    db.store.runs.update(run, heartbeat=dt.datetime.now(dt.timezone.utc) + dt.timedelta(hours=1))
    for start in range(1, points + 1, 5000):
        db.store.events.append(run, [_metric(step) for step in range(start, min(start + 5000, points + 1))])
    return run


def _metric(step: int) -> Metric:
    noise = (step * 7919 % 1000) / 1000
    more = {"learning_rate": 1e-4, "grad_norm": 1 + noise, "tokens": step * 512.0, "memory": 6e9}
    said = {"loss": 1.2 + 2 / (1 + step / 2000) + noise / 5, "tokens_per_second": 1700 + noise, **more}
    return Metric(seq=step + 1, step=step, epoch=step / 1000, values=said)


def go_on(uri: str, run: str, after: int, seconds: float) -> None:
    """In a process of its own: says ten points four times a second, as a shipper brings them."""
    with connect(uri).store as store:
        begin = time.monotonic()
        for i in range(int(seconds / EVERY)):
            time.sleep(max(0.0, begin + i * EVERY - time.monotonic()))
            store.events.append(run, [_metric(after + i * EACH + k) for k in range(1, EACH + 1)])


def writer(uri: str, run: str, after: int, seconds: float) -> subprocess.Popen[bytes]:
    code = f"import bench_view; bench_view.go_on({uri!r}, {run!r}, {after}, {seconds})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parent)


def line(what: str, figure: str, limit: str = "", beside: str = "") -> None:
    print(f"{what:62s} {figure:>22s}  {limit:10s} {beside}", flush=True)


def first_draw(page, cell: int, points: int) -> tuple[float, float]:
    """Seconds from the key press to the frame that shows the curve, and to the one that has every point in it."""
    page.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".cm-content").first.click()
    page.page.evaluate(DRAWN)
    begin = time.time()
    page.page.keyboard.press("Control+Enter")
    page.until(f"() => Object.values(window.drawn).some((d) => d && d[1] >= {points})", 120)
    drawn = [d for d in page.page.evaluate("() => Object.values(window.drawn)") if d]
    page.page.wait_for_timeout(1000)
    page.idle()
    first = min(at for at, count in drawn if count >= min(points, 1000))
    return first - begin, min(at for at, count in drawn if count >= points) - begin


def clear(page) -> None:
    """Removes the views that were drawn, as closing their cells does."""
    page.page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.page.wait_for_timeout(500)


def _tasks(page, seconds: int) -> list[float]:
    """CPU of the page's main thread in tasks, ms in each second."""
    devtools = page.page.context.new_cdp_session(page.page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    found: list[tuple[float, float]] = []
    for _ in range(seconds + 1):
        metrics = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
        found.append((time.monotonic(), metrics["TaskDuration"]))
        page.page.wait_for_timeout(1000)
    devtools.detach()
    return [1000 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(found)]


def live(page, uri: str, run: str, points: int, seconds: int) -> None:
    """The page, the wire and the kernel while points come in."""
    quiet, idle = page.page.evaluate(BLOCKED, seconds), _tasks(page, seconds)
    still = _kernel(page, 7)
    count = {"bytes": 0, "on": False}

    def add(payload) -> None:
        count["bytes"] += len(payload) if count["on"] else 0

    for socket in page.sockets:
        socket.on("framereceived", add)
        socket.on("framesent", add)
    process = writer(uri, run, points, 3 * seconds + 60)
    try:
        page.until(f"() => +document.querySelector('.llmnb-live').dataset.points > {points + 20}", 60)
        count["on"] = True
        busy = _tasks(page, seconds)
        count["on"] = False
        blocked = page.page.evaluate(BLOCKED, seconds)
        kernel = _kernel(page, 7)
    finally:
        process.terminate()
        process.wait()

    def each(found: list[float]) -> str:
        return f"{statistics.median(found):.0f} ({max(found):.0f})"

    line("CPU of the page's main thread, ms in each second: median (worst)", each(busy), "< 50", f"idle: {each(idle)}")
    line("page did not answer, ms in each second", each(blocked), "", f"idle: {each(quiet)}")
    line(f"websocket traffic in {seconds} s", f"{count['bytes'] / 1e6:.3f} MB", "< 0.2")
    line(
        "CPU of the view's thread in the kernel, ms in each second", f"{kernel[1]:.1f}", "< 20", f"idle: {still[1]:.1f}"
    )
    line("kernel's main thread did not run, ms in each second", each(kernel[0]), "", f"idle: {each(still[0])}")


def _kernel(page, cell: int) -> tuple[list[float], float]:
    page.run(cell)
    page.until("(n) => document.querySelectorAll('.jp-Cell')[n].querySelector('.jp-OutputArea pre')", 120, cell)
    text = page.output(cell).inner_text().strip()
    gaps, _, mean = text.rpartition("] ")
    return eval(gaps + "]"), float(mean)


def lateness(page, db, base: Path) -> None:
    """From the moment the engine says a loss to the frame that shows it, while a training uses both cores."""
    db.execute(Collection("docs").insert_many([{"text": f"{i} and {i * 7} make {i * 8} " * 6} for i in range(200)]))
    page.page.evaluate(DRAWN)
    page.run(8)
    page.until("() => document.querySelector('.llmnb-live')", 120)
    page.until("() => document.querySelector('.llmnb-live').dataset.points >= 5", 240)
    page.page.wait_for_timeout(20_000)
    drawn = page.page.evaluate("() => Object.entries(window.drawn)")
    run = db.run("latest")
    run.kill()
    at = {int(key.partition("/")[0]): when[0] for key, when in drawn if when}
    said = {event.seq: event.time for event in run.events() if isinstance(event, Metric) and "loss" in event.values}
    first = min(at)
    late = [min(t for seq_, t in at.items() if seq_ >= seq) - said[seq] for seq in said if first < seq <= max(at)]
    line(
        "a loss drawn after it was said, s: median (95 %, worst)",
        f"{statistics.median(late):.2f} ({sorted(late)[int(len(late) * 0.95)]:.2f}, {max(late):.2f})",
        "< 1",
        f"{len(late)} losses",
    )


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=10)
    known = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="llmnb-view-") as folder, sync_playwright() as driver:
        home = Path(folder) / "home"
        server = embedded.start(home)
        scheme, _, rest = server.uri.partition("://")
        host, _, tail = rest.partition("/")
        uri = f"{scheme}://{host}/view?{tail.partition('?')[2]}"
        base = make_model("llama", Path(folder) / "base", hidden_size=256, intermediate_size=512)
        db = connect(uri, home=home)
        try:
            small, first, run = (a_run(db, points, 3 * points) for points in (10, known.points, known.points))
            start = (
                f"r = %llm_train --model {base} --identifier busy --collection docs --key text --max_steps 5000 "
                "--logging_steps 1 --per_device_train_batch_size 4 --save_strategy no --start"
            )
            views = [f"w = %llm_watch {one}" for one in (small, first, run, run)]
            cells = ["%load_ext llmnb", "c = %llm_connect", KERNEL, *views, f"measured({known.seconds})", start]
            env = {"LLMNB_URI": uri, "LLMNB_HOME": str(home), "OMP_NUM_THREADS": "2"}
            with lab(driver, Path(folder) / "lab", **env) as page:
                page.sockets = []
                page.page.on("websocket", lambda socket: page.sockets.append(socket))
                page.open("bench.ipynb", notebook(*cells))
                for cell in range(3):
                    page.run(cell)
                print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
                took = [first_draw(page, 3 + i, n) for i, n in enumerate((10, *[known.points] * 3))]
                line("10 points drawn after the cell was started, in a new kernel, s", f"{took[0][0]:.2f}")
                line(
                    f"{known.points} points, never read before: drawn (with every point), s",
                    ", ".join(f"{first:.2f} ({whole:.2f})" for first, whole in took[1:3]),
                    "< 1",
                )
                line(f"{known.points} points drawn once more, s", f"{took[3][1]:.2f}")
                clear(page)
                for one in (small, first):  # one run is watched from here on
                    db.store.runs.transition(one, "running", "done")
                page.page.wait_for_timeout(5000)
                page.run(6)
                page.page.wait_for_timeout(3000)
                live(page, uri, run, known.points, known.seconds)
                clear(page)
                lateness(page, db, base)
        finally:
            runner.stop(home, patience=5.0)
            db.close()
            embedded.stop(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
