"""The live view in real JupyterLab: it grows, survives a reload, follows the theme, and stays in the saved file."""

from __future__ import annotations

import re
import statistics

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")

from lab import CHROMIUM, lab, notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]
if CHROMIUM is None:
    pytestmark.append(pytest.mark.skip(reason="no Chromium on this machine: apt-get install chromium"))

# A run without training: a thread in the kernel says what a worker would say, so these tests are about the view.
WRITER = """
import math, random, threading, time, warnings
warnings.simplefilter("ignore")
from llmnb import connect
from llmnb.events import CheckpointSaved, Metric, StateChanged
db = connect("mongomock://view")
run_id = db.store.runs.create("tickets", model="tickets", version=1, config={}, counts={})["_id"]
goes_on = threading.Event()
def work(steps=STEPS, every=EVERY, seq=[0]):
    def say(*events):
        numbered = []
        for event in events:
            seq[0] += 1
            numbered.append(event.numbered(seq[0]))
        db.store.events.append(run_id, numbered)
    db.store.runs.transition(run_id, "queued", "starting")
    db.store.runs.update(run_id, counts={"steps": steps})
    db.store.runs.transition(run_id, "starting", "running")
    say(StateChanged(state="running"))
    best = 9.0
    for step in range(1, steps + 1):
        time.sleep(every)
        db.store.runs.beat(run_id)
        loss = float("nan") if 30 <= step < 34 else 1.2 + 2.6 * math.exp(-step / 90) + random.gauss(0, 0.12)
        more = {"learning_rate": 2e-4 * (1 - step / steps), "grad_norm": 1 + random.random(), "memory": 6.0e9}
        say(Metric(step=step, values={"loss": loss, "tokens_per_second": 1720.0, **more}))
        if step % 50 == 0:
            value = 1.25 + 2.6 * math.exp(-step / 100)
            said = {"eval_loss": value}
            saved = CheckpointSaved(step=step, digest="x", size=18_000_000, metrics=said, best=value < best)
            say(Metric(step=step, values=said), saved)
            best = min(best, value)
        while step == PAUSE and not goes_on.is_set() and not db.store.runs.control(run_id):
            goes_on.wait(0.1)
        if db.store.runs.control(run_id):
            db.store.runs.transition(run_id, "running", "stopped", reason="stopped on request")
            return say(StateChanged(state="stopped"))
    db.store.runs.transition(run_id, "running", "done")
    say(StateChanged(state="done"))
threading.Thread(target=work, daemon=True).start()
"""
POINTS = "(n) => +(document.querySelector('.llmnb-live')?.dataset.points || 0) >= n"
DRAWN = """() => {
    const canvas = document.querySelector('.llmnb-live canvas');
    if (!canvas) return 0;
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let seen = 0;
    for (let i = 3; i < data.length; i += 4) if (data[i] > 0) seen++;
    return seen;
}"""


STATUS = "(word) => document.querySelector('.llmnb-live')?.dataset.status === word"
OTHERS = """
for version, rank in ((2, 8), (3, 16)):
    other = db.store.runs.create("tickets", model="tickets", version=version, config={"lora_r": rank})["_id"]
    told = [Metric(seq=i, step=i, values={"loss": 1.4 + 2.6 * math.exp(-i / 30)}) for i in range(1, 61)]
    db.store.events.append(other, told)
    for frm, to in (("queued", "starting"), ("starting", "running"), ("running", "done")):
        db.store.runs.transition(other, frm, to)
"""
# A control of which the accessibility tree knows no name.
NAMELESS = re.compile(r"^\s*- (?:textbox|combobox|checkbox|button|progressbar|img|group)(?: \[[^\]]*\])*:?$", re.M)


def middle(page):
    page.page.locator(".llmnb-plot").first.scroll_into_view_if_needed()
    box = page.page.locator(".llmnb-plot").first.bounding_box()
    return box["x"] + 300, box["y"] + 100


def zoom(page):
    """Draws over some steps in the loss chart."""
    x, y = middle(page)
    page.page.mouse.move(x - 100, y)
    page.page.mouse.down()
    page.page.mouse.move(x + 100, y + 10, steps=5)
    page.page.mouse.up()
    page.page.get_by_role("button", name="Show all steps").wait_for(state="visible", timeout=5000)


def again(page):
    page.page.reload()
    page.page.wait_for_selector(".jp-Notebook")
    page.idle()


def writer(steps=240, every=0.04, pause=0):
    return WRITER.replace("STEPS", str(steps)).replace("EVERY", str(every)).replace("PAUSE", str(pause))


def begin(page, *more, **options):
    page.open(
        "view.ipynb", notebook("%load_ext llmnb", writer(**options), "c = %llm_connect db", "w = %llm_watch", *more)
    )
    for cell in range(4):
        page.run(cell)


@pytest.fixture(scope="module")
def page(driver, tmp_path_factory):
    with lab(driver, tmp_path_factory.mktemp("lab")) as found:
        yield found


def test_the_curve_grows_while_another_cell_runs(page, tmp_path):
    begin(page, "import time; time.sleep(4)")
    page.until(POINTS, 30, 3)
    page.run(4, wait=False)
    before = int(page.attribute("data-points"))
    page.until(POINTS, 30, before + 30)
    assert (
        page.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status") == "busy"
    )
    assert page.attribute("data-status", ".llmnb-live") == "running"
    assert page.page.evaluate(DRAWN) > 500, "something is drawn"
    assert "left" in page.output(3).inner_text() and "step" in page.output(3).inner_text()
    assert page.picture(tmp_path / "growing.png").stat().st_size > 10_000
    page.until(STATUS, 60, "done")
    assert page.attribute("data-points", ".llmnb-live") == "240", "the view stays after the end"
    page.until("() => document.querySelectorAll('.llmnb-kept img').length === 1", 10)
    still = page.page.locator(".llmnb-kept")
    assert not still.is_visible() and page.attribute("data-points", ".llmnb-kept [data-run]") == "240"
    assert page.page.evaluate("() => document.querySelector('.llmnb-kept img').naturalWidth") > 500
    assert NAMELESS.findall(page.page.locator(".llmnb-live").aria_snapshot()) == []
    assert page.faults() == []


def test_a_reload_in_mid_run_and_after_the_end_shows_what_was_there(page):
    begin(page, "goes_on.set()", pause=60)
    page.until(POINTS, 30, 60)
    live = page.page.locator(".llmnb-live")
    live.get_by_label("smooth").fill("0.9")
    live.get_by_label("smooth").press("Enter")
    live.get_by_label("log scale").check()
    live.get_by_role("button", name="log ▸").click()
    zoom(page)
    page.save()
    again(page)
    page.until(POINTS, 30, 60)
    page.until("() => document.querySelector('.llmnb-live input[type=text]').value === '0.9'", 10)
    assert live.get_by_label("log scale").is_checked() and live.locator(".llmnb-printed").is_visible()
    live.get_by_role("button", name="Show all steps").click()
    live.get_by_role("button", name="Show all steps").wait_for(state="hidden", timeout=5000)
    assert page.page.evaluate(DRAWN) > 500
    page.run(4)
    page.until(POINTS, 60, 240)
    page.until(STATUS, 30, "done")
    page.save()
    again(page)
    page.until(POINTS, 30, 240)
    page.until(STATUS, 30, "done")
    assert live.get_by_label("smooth").input_value() == "0.9" and page.page.evaluate(DRAWN) > 500
    assert live.get_by_role("button", name="Resume").is_visible()
    assert page.faults() == []


def test_stop_is_answered_at_once_while_a_cell_runs(page):
    begin(page, "import time; time.sleep(25); print('slept')", pause=50)
    page.until(POINTS, 30, 50)
    page.run(4, wait=False)
    page.page.wait_for_timeout(500)
    live = page.page.locator(".llmnb-live")
    kill = live.get_by_role("button", name="Kill")
    kill.click()
    assert kill.inner_text() == "Kill: press again to lose what came after step 50"
    answered = """() => {
        const buttons = [...document.querySelectorAll('.llmnb-live button')];
        const button = buttons.find((b) => b.textContent === 'Stop and keep');
        const begin = performance.now();
        button.click();
        return [button.textContent, performance.now() - begin];
    }"""
    text, took = page.page.evaluate(answered)
    assert text == "Stopping …" and took < 100
    page.until(STATUS, 15, "stopped")
    assert "slept" not in page.output(4).inner_text(), "the cell still runs"
    assert "the run has ended (stopped)" in live.locator(".llmnb-why").inner_text()
    assert live.get_by_role("button", name="Stop and keep").get_attribute("aria-disabled") == "true"
    live.get_by_role("button", name="Resume").click()
    page.until("() => document.querySelector('.llmnb-live [role=alert]:not(:empty)')", 20)
    page.idle()
    assert page.faults() == []


def test_other_runs_are_drawn_over_it(page, tmp_path):
    begin(page, OTHERS, "v = %llm_watch $run_id $other", steps=60, every=0.01)
    page.until(STATUS, 60, "done")
    page.run(4)
    live = page.output(3).locator(".llmnb-live")
    live.get_by_role("button", name="compare with").click()
    live.get_by_role("checkbox", name="tickets v3").check()
    live.locator(".llmnb-other").nth(0).wait_for(timeout=10_000)
    assert "tickets v3" in live.locator(".llmnb-other").inner_text()
    table = live.locator(".llmnb-table")
    assert "lora_r" in table.inner_text() and "16" in table.inner_text()
    page.picture(tmp_path / "compared.png")
    live.get_by_role("checkbox", name="tickets v3").uncheck()
    live.locator(".llmnb-other").nth(0).wait_for(state="detached", timeout=10_000)
    page.run(5)
    page.output(5).locator(".llmnb-other").nth(0).wait_for(timeout=10_000)
    assert page.faults() == []


def test_a_saved_notebook_shows_the_curve_without_a_kernel(page, tmp_path):
    begin(page, steps=60, every=0.02)
    page.until(STATUS, 60, "done")
    page.until("() => document.querySelector('.llmnb-kept [data-run]')?.dataset.status === 'done'", 10)
    page.save()
    page.shut_kernel()
    page.open("view.ipynb", kernel=False)
    page.page.wait_for_selector(".llmnb-kept img", timeout=30_000)
    assert page.page.locator(".llmnb-kept").is_visible() and page.attribute("data-points", "[data-run]") == "60"
    assert "not found" not in page.output(3).inner_text()
    page.picture(tmp_path / "reopened.png")


def test_a_notebook_saved_in_mid_run_keeps_the_last_picture(page):
    begin(page, pause=70)
    page.until(POINTS, 30, 70)
    page.page.wait_for_timeout(11_000)  # a picture is kept every ten seconds
    hidden = page.page.locator(".llmnb-kept")
    assert hidden.count() == 1 and not hidden.first.is_visible(), "out of sight while the live view is there"
    page.save()
    page.shut_kernel()
    page.open("view.ipynb", kernel=False)
    page.page.wait_for_selector(".llmnb-kept img", timeout=30_000)
    assert page.page.locator(".llmnb-kept").first.is_visible()
    assert int(page.attribute("data-points", ".llmnb-kept [data-run]")) == 70


def test_the_view_follows_the_theme(page, tmp_path):
    begin(page, pause=50)
    page.until(POINTS, 30, 50)
    colour = "() => getComputedStyle(document.querySelector('.llmnb-live')).color"
    light = page.page.evaluate(colour)
    ink = "() => document.querySelector('.llmnb-live canvas').toDataURL()"
    drawn = page.page.evaluate(ink)
    page.set_theme("JupyterLab Dark")
    page.until(f"(old) => ({colour})() !== old", 10, light)
    page.until(f"(old) => ({ink})() !== old", 10, drawn)
    page.picture(tmp_path / "dark.png")
    page.set_theme("JupyterLab Light")


def test_zoom_and_back(page):
    begin(page, pause=100, every=0.01)
    page.until(POINTS, 30, 100)
    zoom(page)
    reset = page.page.get_by_role("button", name="Show all steps")
    reset.wait_for(state="visible", timeout=5000)
    page.page.mouse.move(*middle(page))
    page.until("() => [...document.querySelectorAll('.llmnb-at')].every((e) => e.textContent.startsWith('at step'))", 5)
    reset.click()
    reset.wait_for(state="hidden", timeout=5000)
    assert page.faults() == []


def test_a_point_is_drawn_soon_after_it_was_said(page, record_property):
    watch = """() => {
        window.drawnAt = {};
        new MutationObserver(() => {
            const live = document.querySelector('.llmnb-live');
            if (live) window.drawnAt[live.dataset.seq] = Date.now() / 1000;
        }).observe(document.body, {subtree: true, attributes: true, attributeFilter: ['data-seq']});
    }"""
    page.open(
        "view.ipynb",
        notebook(
            "%load_ext llmnb",
            writer(every=0.05),
            "c = %llm_connect db",
            "w = %llm_watch",
            "print([(e.seq, e.time) for e in w.events()])",
        ),
    )
    page.page.evaluate(watch)
    for cell in range(4):
        page.run(cell)
    page.until(POINTS, 60, 100)
    drawn = {int(k): v for k, v in page.page.evaluate("() => window.drawnAt").items()}
    page.run(4)
    said = dict(eval(page.output(4).inner_text()))
    # a point is in the page with the first picture of it or of a later one
    shown = {seq: min(at for newest, at in drawn.items() if newest >= seq) for seq in said if seq <= max(drawn)}
    late = [shown[seq] - said[seq] for seq in shown if said[seq] > min(drawn.values())]
    record_property("drawn_after_s_median", statistics.median(late))
    print(f"drawn after it was said: median {statistics.median(late):.2f} s, worst {max(late):.2f} s of {len(late)}")
    assert statistics.median(late) < 1.0


@pytest.mark.mongod
@pytest.mark.ray
def test_training_from_a_cell_is_seen_live(driver, tmp_path, mongo_uri, tiny_llama):
    """The main path of a notebook, with a real database and a real background job."""
    from llmnb.launch import runner

    home = tmp_path / "home"
    cells = [
        "%load_ext llmnb",
        "db = %llm_connect",
        "from llmnb import Collection\n"
        "rows = [{'text': f'{i}+1={i + 1}', '_fold': 'train' if i % 20 else 'valid'} for i in range(60)]\n"
        "_ = db.execute(Collection('docs').insert_many(rows))",
        "%llm_data docs",
        f"run = %llm_train --model {tiny_llama} --identifier sums --collection docs --key text --max_steps 900 "
        "--logging_steps 1 --per_device_train_batch_size 1 --eval_strategy steps --eval_steps 300 --save_steps 300 "
        "--start",
        "%llm_checkpoints",
        "%%llm_chat --compare base --max_new_tokens 12\n7+1=",
        "run = %llm_watch",
    ]
    try:
        env = {"LLMNB_URI": mongo_uri, "LLMNB_HOME": str(home), "OMP_NUM_THREADS": "1"}
        with lab(driver, tmp_path / "lab", **env) as page:
            page.open("train.ipynb", notebook(*cells))
            for cell in range(5):
                page.run(cell)
            page.until(POINTS, 180, 2)
            first = int(page.attribute("data-points"))
            page.until(POINTS, 60, first + 5)
            page.picture(tmp_path / "training.png")
            page.set_theme("JupyterLab Dark")
            page.page.wait_for_timeout(1000)
            page.picture(tmp_path / "training_dark.png")
            live = page.page.locator(".llmnb-live")
            live.get_by_role("button", name="Stop and keep").click()
            page.until(STATUS, 120, "stopped")
            seen = int(page.attribute("data-points"))
            assert seen < 900, "it was stopped in time"

            # a new kernel knows the run from its database, and goes on with it
            page.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
            page.page.wait_for_timeout(2000)
            page.idle()
            for cell in (0, 1, 7):
                page.run(cell)
            again = page.output(7).locator(".llmnb-live")
            page.until(
                "(n) => +([...document.querySelectorAll('.llmnb-live')].at(-1)?.dataset.points || 0) === n",
                60,
                seen,
            )
            page.page.set_viewport_size({"width": 900, "height": 1000})
            page.picture(tmp_path / "attached.png")
            page.page.set_viewport_size({"width": 1300, "height": 1000})
            again.get_by_role("button", name="Resume").click()
            page.until("() => [...document.querySelectorAll('.llmnb-live')].at(-1).dataset.status === 'done'", 180)
            assert again.get_attribute("data-points") == "900"
            rows = page.output(7).locator(".llmnb-picker-box")
            rows.locator('tbody tr[data-name$="/900"]').wait_for(timeout=30_000)  # it looks when one was saved
            assert rows.locator('tbody tr[data-name$="/300"]').count() == 1, "its checkpoints, under it"
            assert "all its steps are done" in again.locator(".llmnb-why").inner_text()
            page.run(5)
            assert "900" in page.output(5).inner_text()
            page.run(6)
            answers = page.output(6).locator(".llmnb-chat-text")
            assert answers.count() == 2
            answers.last.scroll_into_view_if_needed()
            page.picture(tmp_path / "chat.png")
            assert page.faults() == []
    finally:
        runner.stop(home)
