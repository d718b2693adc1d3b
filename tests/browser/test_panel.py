"""The training panel in real JupyterLab: from an empty notebook to a curve, with the keyboard."""

from __future__ import annotations

import re
import time

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")

from lab import CHROMIUM, lab, notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.mongod, pytest.mark.ray]
if CHROMIUM is None:
    pytestmark.append(pytest.mark.skip(reason="no Chromium on this machine: apt-get install chromium"))

CELLS = ["%load_ext llmnb", "c = %llm_connect", "%llm_train", "import sys; print('torch' in sys.modules)"]
# A control of which the accessibility tree knows no name.
NAMELESS = re.compile(
    r"^\s*- (?:textbox|combobox|checkbox|button|tab|spinbutton|option|tabpanel)(?: \[[^\]]*\])*:?$", re.M
)
STARTED = """() => {
    const button = document.querySelector('.llmnb-start');
    button.click();
    button.click();
    return button.textContent;
}"""


@pytest.fixture
def tickets(mongo_uri):
    """The URI of a database with chats."""
    from llmnb import Collection, connect

    db = connect(mongo_uri)
    say = "Please check the limit of card"
    chats = [
        [{"role": "user", "content": f"Card {i} was declined."}, {"role": "assistant", "content": f"{say} {i}."}]
        for i in range(80)
    ]
    db.execute(Collection("tickets").insert_many([{"messages": chat, "lang": "en"} for chat in chats]))
    db.execute(Collection("faq").insert_many([{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]))
    db.close()
    return mongo_uri


class Hands:
    """A person at the keyboard."""

    def __init__(self, page):
        self.page, self.keys = page.page, page.page.keyboard

    def press(self, *keys):
        for key in keys:
            self.keys.press(key)

    def fill(self, text):
        self.press("Control+a")
        self.keys.type(text)

    def name(self):
        """What has the focus, as a screen reader says it."""
        script = "() => { const e = document.activeElement; return e.labels?.[0]?.textContent || e.textContent || ''; }"
        return self.page.evaluate(script)

    def to(self, name, key="Tab"):
        """Goes on until something has the focus."""
        for _ in range(60):
            if self.name() == name:
                return
            self.press(key)
        raise AssertionError(f"{name} cannot be reached with {key}; at {self.name()!r}")


def opened_in(page):
    """Runs the panel's cell; seconds until its first field can be typed into."""
    page.page.locator(".jp-Notebook .jp-Cell").nth(2).locator(".cm-content").first.click()
    page.page.evaluate("() => document.querySelectorAll('.llmnb-panel').forEach((e) => e.remove())")
    begin = time.monotonic()
    page.page.keyboard.press("Control+Enter")
    page.page.wait_for_selector(".llmnb-row input", timeout=60_000)
    return time.monotonic() - begin


def test_from_an_empty_notebook_to_a_curve_with_the_keyboard(driver, tmp_path, tickets, tiny_llama):
    from llmnb.launch import runner

    home = tmp_path / "home"
    try:
        env = {"LLMNB_URI": tickets, "LLMNB_HOME": str(home), "OMP_NUM_THREADS": "1"}
        with lab(driver, tmp_path / "lab", **env) as page:
            page.open("panel.ipynb", notebook(*CELLS))
            page.run(0)
            page.run(1)
            took = [opened_in(page) for _ in range(3)]
            print("the panel opens in " + ", ".join(f"{seconds:.2f} s" for seconds in took))
            assert min(took) < 1.0
            hands = Hands(page)
            panel = page.page.locator(".llmnb-panel")
            page.until("() => document.querySelector('.llmnb-place').textContent.includes('@')")

            # data, by keyboard from the tabs on
            panel.get_by_role("tab", name="Model & data").focus()
            hands.to("Model")
            hands.fill(tiny_llama)
            hands.press("Tab")
            hands.press("t")
            assert hands.name().startswith("Collection")
            hands.to("Key")
            hands.fill("messages")
            hands.press("Tab")
            page.until("() => document.querySelectorAll('.llmnb-trained').length > 3", 90)
            trained = "".join(panel.locator(".llmnb-trained").all_inner_texts())
            assert "Please check the limit of card" in trained and "declined" not in trained
            assert NAMELESS.findall(panel.aria_snapshot()) == []

            # a fault on its row, on its tab and under the form
            panel.get_by_role("tab", name="Model & data").focus()
            hands.press("ArrowRight")
            hands.to("r")
            hands.fill("0")
            hands.press("Tab")
            page.until("() => document.querySelector('[data-row=lora_r] .llmnb-fault').textContent.includes('from 1')")
            assert panel.get_by_role("tab", name="LoRA, 1 fault").count() == 1
            assert "1 fault: LoRA › r must be a whole number" in panel.locator(".llmnb-reason").inner_text()
            assert panel.get_by_role("button", name="Start training").get_attribute("aria-disabled") == "true"
            panel.get_by_role("tab", name="Model & data").click()
            panel.get_by_role("button", name="1 fault").click()
            assert hands.name() == "r", "the fault leads to its row"
            hands.fill("4")
            hands.press("Tab")
            page.until("() => !document.querySelector('.llmnb-reason').textContent")
            for tab in ("QLoRA", "DeepSpeed", "Multi-GPU", "Schedule", "Advanced"):
                panel.get_by_role("tab", name=tab, exact=True).click()
                assert NAMELESS.findall(panel.aria_snapshot()) == [], tab

            # what was typed outlives the page
            panel.get_by_role("tab", name="Schedule").click()
            panel.get_by_label("Steps", exact=True).fill("40")
            panel.get_by_label("Log every").fill("1")
            panel.get_by_label("Log every").press("Tab")
            page.until("() => document.querySelector('.llmnb-outlook').textContent.includes('40 steps')")
            page.save()
            page.page.reload()
            page.page.wait_for_selector(".llmnb-panel .llmnb-tab", timeout=60_000)
            page.idle()
            assert panel.get_by_label("Steps", exact=True).input_value() == "40"
            panel.get_by_role("tab", name="LoRA", exact=True).click()
            assert panel.get_by_label("r", exact=True).input_value() == "4"
            page.set_theme("JupyterLab Dark")
            page.page.wait_for_timeout(800)
            page.picture(tmp_path / "panel_dark.png")

            # started once, answered at once, and the same place shows the curve
            assert page.page.evaluate(STARTED) == "Starting …"
            page.until("(n) => +(document.querySelector('.llmnb-live')?.dataset.points || 0) >= n", 240, 3)
            assert page.output(2).locator(".llmnb-panel").count() == 0
            page.picture(tmp_path / "panel_run.png")
            page.run(3)
            assert page.output(3).inner_text().strip() == "False", "the kernel needs no torch"
            page.until("() => document.querySelector('.llmnb-live')?.dataset.status === 'done'", 240)

            # the next panel begins where the last one ended, and knows the run
            opened_in(page)
            page.until("() => document.querySelector('.llmnb-place').textContent.includes('@')")
            panel.get_by_role("tab", name="LoRA", exact=True).click()
            assert panel.get_by_label("r", exact=True).input_value() == "4"
            panel.get_by_role("combobox", name="Preset").select_option("Full")
            assert panel.get_by_label("r", exact=True).is_disabled()
            panel.get_by_role("combobox", name="Load settings").select_option(index=1)
            page.until("() => document.querySelector('.llmnb-said-line').textContent.startsWith('Settings of')")
            assert panel.get_by_label("r", exact=True).input_value() == "4"

            # what stays in the file
            page.page.wait_for_timeout(500)
            page.save()
            page.shut_kernel()
            page.open("panel.ipynb", kernel=False)
            page.page.wait_for_selector(".llmnb-kept", timeout=30_000)
            stays = page.output(2).inner_text()
            assert "%llm_train --model" in stays and "not found" not in stays
            assert page.faults() == []
    finally:
        runner.stop(home)
    from llmnb import connect

    with connect(tickets).store as store:
        (run,) = store.runs.list()
        assert (run["config"]["lora_r"], run["config"]["key"]) == (4, "messages")
