"""The first journey, whole: from an empty notebook to a model that was asked, with two lines of code and no mouse.

Choose data, set LoRA, start, see the curve move, load a checkpoint while it trains, chat with it, compare with the
base, stop, resume. Real mongod, runner, training and chat.
"""

from __future__ import annotations

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")

from lab import CHROMIUM, lab, notebook
from test_panel import NAMELESS, Hands

pytestmark = [pytest.mark.browser, pytest.mark.mongod, pytest.mark.slow, pytest.mark.timeout(900)]
if CHROMIUM is None:
    pytestmark.append(pytest.mark.skip(reason="no Chromium on this machine: apt-get install chromium"))

STATE = "(state) => document.querySelector('.llmnb-live')?.dataset.status === state"
POINTS = "(n) => +(document.querySelector('.llmnb-live')?.dataset.points || 0) >= n"
ANSWERED = """(n) => {
    const turn = [...document.querySelectorAll('.llmnb-chat .llmnb-turn')].pop();
    const replies = turn ? [...turn.querySelectorAll('.llmnb-reply')] : [];
    const said = (reply) => reply.dataset.state === 'done' && reply.querySelector('.llmnb-chat-text').textContent;
    return replies.length === n && replies.every(said);
}"""


@pytest.fixture
def tickets(mongo_uri):
    """The URI of a database with chats; what was learned must be seen in the answers."""
    from llmnb import Collection, connect

    db = connect(mongo_uri)
    chats = [
        [{"role": "user", "content": f"Card {i} was declined."}, {"role": "assistant", "content": "Check the limit."}]
        for i in range(80)
    ]
    db.execute(Collection("tickets").insert_many([{"messages": chat} for chat in chats]))
    db.close()
    return mongo_uri


class Journey(Hands):
    """One step of the story a method."""

    def __init__(self, page):
        super().__init__(page)
        self.lab = page
        self.until = page.until

    def write(self, code):
        """Into the cell that has the cursor, and runs it; a new cell follows."""
        self.keys.type(code)
        self.press("Escape")  # of a completion that offers itself
        self.press("Enter")
        self.press("Shift+Enter")
        self.page.wait_for_timeout(300)
        self.lab.idle()

    def set(self, tab, **fields):
        """Opens a tab with the arrow keys and types into its fields."""
        self.page.locator(".llmnb-panel").get_by_role("tab", selected=True).focus()
        self.to(tab, "ArrowRight")
        for name, text in fields.items():
            self.to(name.replace("_", " "))
            self.fill(text)
            self.press("Tab")

    def button(self, name, where):
        """Goes to a button within a part of the page and presses it with the keyboard."""
        found = self.page.locator(where).get_by_role("button", name=name, exact=True)
        found.focus()
        self.press("Enter")

    def asks(self, text, answers):
        self.page.locator(".llmnb-chat").get_by_role("textbox", name="Question").focus()
        self.keys.type(text)
        self.press("Enter")
        self.until(ANSWERED, 240, answers)
        return self.page.locator(".llmnb-chat .llmnb-turn").last.locator(".llmnb-chat-text").all_inner_texts()


def test_from_an_empty_notebook_to_a_model_that_was_asked(driver, tmp_path, tickets, tiny_llama):
    from llmnb import connect
    from llmnb.launch import runner

    home = tmp_path / "home"
    env = {"LLMNB_URI": tickets, "LLMNB_HOME": str(home), "OMP_NUM_THREADS": "1"}
    try:
        with lab(driver, tmp_path / "lab", **env) as page:
            page.open("empty.ipynb", notebook(""))
            page.page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
            me = Journey(page)
            me.write("%load_ext llmnb")
            me.write("%llm_train")
            page.page.wait_for_selector(".llmnb-panel .llmnb-row input", timeout=60_000)
            page.until("() => document.querySelector('.llmnb-place').textContent.includes('@')")

            # the data, as the model will see it; LoRA; how long
            me.set("Model & data", Model=tiny_llama)
            page.until("() => document.querySelectorAll('.llmnb-trained').length > 3", 120)
            me.set("LoRA", r="8")
            me.set("Schedule", Steps="20000", Learning_rate="1e-2", Log_every="1", Checkpoint_every="200")
            page.until("() => !document.querySelector('.llmnb-reason').textContent", 60)
            page.picture(tmp_path / "1_panel.png")
            me.button("Start training", ".llmnb-panel")

            # the curve moves
            page.until(POINTS, 240, 20)
            before = int(page.attribute("data-points", ".llmnb-live"))
            page.until(POINTS, 60, before + 20)
            assert page.attribute("data-status", ".llmnb-live") == "running"

            # a checkpoint, while it trains
            page.until("() => +(document.querySelector('.llmnb-picker-box')?.dataset.rows || 0) >= 1", 120)
            page.page.locator(".llmnb-picker-box tbody input[type=checkbox]").first.focus()
            me.press("Space")
            me.button("Chat", ".llmnb-picker-box")
            page.until("() => document.querySelector('.llmnb-chat')?.dataset.phase === 'idle'", 120)
            (answer,) = me.asks("Card 7 was declined.", 1)
            assert answer.startswith("Check the l"), "a tiny model learns that much"
            assert page.attribute("data-status", ".llmnb-live") == "running", "it trains all the while"
            page.picture(tmp_path / "2_chat.png")

            # beside the base
            me.button("Compare with base", ".llmnb-picker-box")
            page.until("() => document.querySelectorAll('.llmnb-chat .llmnb-who select').length === 2", 30)
            base, tuned = me.asks("Card 8 was declined.", 2)
            assert tuned.startswith("Check the l") and not base.startswith("Check")
            assert NAMELESS.findall(page.output(1).aria_snapshot()) == []

            # stop with a checkpoint, and go on
            me.button("Stop and keep", ".llmnb-live")
            page.until(STATE, 120, "stopped")
            stopped = int(page.attribute("data-points", ".llmnb-live"))
            page.set_theme("JupyterLab Dark")
            page.page.wait_for_timeout(800)
            page.picture(tmp_path / "3_stopped_dark.png")
            me.button("Resume", ".llmnb-live")
            page.until(STATE, 120, "running")
            page.until(POINTS, 120, stopped + 20)
            me.button("Stop and keep", ".llmnb-live")
            page.until(STATE, 120, "stopped")
            assert page.faults() == []
    finally:
        runner.stop(home)
    with connect(tickets).store as store:
        (run,) = store.runs.list()
        assert (run["state"], run["attempt"], run["config"]["lora_r"]) == ("stopped", 2, 8)
        steps = [event.step for event in store.events.since(run["_id"]) if event.kind == "metric"]
        assert steps == list(range(1, steps[-1] + 1)), "nothing said twice, nothing left unsaid"
