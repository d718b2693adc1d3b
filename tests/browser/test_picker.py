"""The checkpoint picker in real JupyterLab: listed, chosen by keyboard, merged with its proof, exported, removed."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")

from lab import CHROMIUM, lab, notebook
from test_panel import NAMELESS

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.mongod]
if CHROMIUM is None:
    pytestmark.append(pytest.mark.skip(reason="no Chromium on this machine: apt-get install chromium"))

# A chat that a busy machine draws four seconds after it was asked for.
# The first press of Export is lost on its way.
LATE = """from llmnb.notebook.picker import Picker; heard, lost = Picker._heard, []
def hear(self, widget, message, buffers):
    lost.append(message) if message["kind"] == "export" and not lost else heard(self, widget, message, buffers)
Picker._heard = hear
import threading; from llmnb.notebook.picker import PickerView; ask = PickerView._ask
PickerView._ask = lambda self, names: threading.Timer(4.0, ask, (self, names)).start()"""
CELLS = [
    f"%load_ext llmnb\n{LATE}",
    "c = %llm_connect",
    "%llm_checkpoints",
    "import sys; print('torch' in sys.modules)",
]
ROWS = "(n) => +(document.querySelector('.llmnb-picker-box')?.dataset.rows || 0) === n"
RESULT = "(t) => document.querySelector('.llmnb-picker-result')?.textContent.includes(t)"
ANSWERING = """(names) => {
    const chosen = [...document.querySelectorAll('.llmnb-who select')].map((e) => e.value);
    return JSON.stringify(chosen) === JSON.stringify(names);
}"""
FAULT = "(t) => [...document.querySelectorAll('.llmnb-picker-box .llmnb-alert')].some((e) => e.textContent.includes(t))"


@pytest.fixture
def runs(mongo_uri, tiny_llama, tmp_path):
    """The URI of a database with a LoRA run of three checkpoints and a run of all weights; and the runs' ids."""
    from llmnb import LLM, Collection, LLMTrainer, connect

    db = connect(mongo_uri, home=tmp_path / "home")
    said = [{"role": "user", "content": "what is your name?"}, {"role": "assistant", "content": "my name is model."}]
    folds = ["valid" if i < 3 else "train" for i in range(24)]
    db.execute(Collection("chats").insert_many([{"messages": said, "_fold": fold} for fold in folds]))
    settings = {
        "select": Collection("chats").find(),
        "key": "messages",
        "eval_strategy": "steps",
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    every = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "learning_rate": 1e-2, "load_best_model_at_end": True}
    lora = db.apply(LLM("names", tiny_llama, trainer=LLMTrainer(**settings, **every)))
    whole = db.apply(LLM("whole", tiny_llama, trainer=LLMTrainer(**settings, use_lora=False, max_steps=1)))
    yield mongo_uri, db, lora.id, whole.id
    db.close()


def focused(page):
    """What has the focus, as a screen reader says it."""
    script = """() => {
        const e = document.activeElement;
        return e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent || '';
    }"""
    return page.page.evaluate(script)


def to(page, name, key="Tab"):
    """Goes on by a key until something has the focus."""
    for _ in range(40):
        if focused(page) == name:
            return
        page.page.keyboard.press(key)
    raise AssertionError(f"{name} cannot be reached with {key}; at {focused(page)!r}")


def test_checkpoints_are_listed_merged_exported_and_removed_with_the_keyboard(driver, tmp_path, runs):
    uri, db, lora, whole = runs
    env = {"LLMNB_URI": uri, "LLMNB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    with lab(driver, tmp_path / "lab", **env) as page:
        page.open("picker.ipynb", notebook(*CELLS))
        for cell in range(3):
            page.run(cell)
        page.until(ROWS, 30, 4)
        box, keys = page.page.locator(".llmnb-picker-box"), page.page.keyboard
        assert page.output(2).locator("table:visible").count() == 1, "the list is not echoed beside the picker"
        text = box.locator("tbody").inner_text()
        assert text.index(whole) < text.index(lora) and ("ago" in text or "just now" in text)
        assert text.count("best") == 1 and text.rstrip().count("whole") == 2
        assert NAMELESS.findall(box.aria_snapshot()) == []
        merge = box.get_by_role("button", name="Merge", exact=False).first
        assert merge.get_attribute("aria-disabled") == "true" and merge.get_attribute("title") == "Select a checkpoint"

        # only one run, by its name; then the rows by keyboard
        box.get_by_role("combobox", name="Experiment").select_option(lora)
        assert box.locator("tbody tr").count() == 3
        box.get_by_role("combobox", name="Experiment").focus()
        keys.press("Tab")
        assert focused(page) == f"{lora} step 6"
        keys.press("ArrowDown")
        keys.press("Space")
        assert focused(page) == f"{lora} step 4" and box.locator("tr.llmnb-chosen").count() == 1
        page.picture(tmp_path / "chosen.png")

        # merged while the page answers; the proof is read, and outlives a reload
        to(page, "Merge …")
        keys.press("Enter")
        assert focused(page) == "Folder"
        assert NAMELESS.findall(box.aria_snapshot()) == []
        keys.press("Control+a")
        keys.type("merged/names")
        page.picture(tmp_path / "form.png")
        keys.press("Enter")
        page.until("() => document.querySelector('.llmnb-picker-busy span').textContent.includes('Merging')", 5)
        page.until("() => !document.querySelector('.llmnb-picker-busy button').hidden", 60)
        page.picture(tmp_path / "merging.png")
        page.until(RESULT, 180, "it says what the adapter says")
        proof = box.locator(".llmnb-picker-result")
        words = dict(zip(proof.locator("dt").all_inner_texts(), proof.locator("dd").all_inner_texts(), strict=True))
        assert words["same top token"] == "100 %" and "3 rows of the valid fold of chats" in words["measured on"]
        report = json.loads((page.work / "merged" / "names" / "merge_report.json").read_text())
        base, adapter, merged = (report[f"perplexity_{name}"] for name in ("base", "adapter", "merged"))
        assert words["perplexity"] == f"base {base:.4g}, adapter {adapter:.4g}, merged {merged:.4g}" and merged < base
        assert (page.work / "merged" / "names" / "model.safetensors").exists()
        page.picture(tmp_path / "merged.png")
        page.save()
        page.page.reload()
        page.page.wait_for_selector(".llmnb-picker-box tbody tr", timeout=60_000)
        page.idle()
        page.until(RESULT, 20, "it says what the adapter says")
        assert box.locator("tr.llmnb-chosen").count() == 1 and box.locator("tbody tr").count() == 3

        # evaluated against the base; the table and the rows are read, and outlive a reload
        to(page, "Evaluate")
        keys.press("Enter")
        page.until("() => document.querySelector('.llmnb-picker-busy span').textContent.includes('Evaluating')", 5)
        page.until("() => document.querySelector('.llmnb-picker-busy button').textContent === 'Stop evaluating'", 60)
        page.picture(tmp_path / "evaluating.png")
        page.until(RESULT, 180, "against the base")
        found = db.evaluation()
        figures = proof.locator(".llmnb-picker-figures tbody tr")
        assert figures.locator("th").all_inner_texts() == ["base", f"{lora}/4"]
        cells = figures.nth(1).locator("td").all_inner_texts()
        assert cells[0].startswith(f"{found[f'{lora}/4'].metrics['perplexity']:.4g}\n(−") and len(cells) == 7
        words = dict(zip(proof.locator("dt").all_inner_texts(), proof.locator("dd").all_inner_texts()))
        assert (
            words["measured on"].startswith("3 documents of the valid fold of chats") and words["kept as"] == found.id
        )
        proof.locator("summary").nth(1).focus()
        keys.press("Enter")
        opened = proof.locator("details").nth(1)
        assert "what is your name?" in opened.inner_text() and "my name is model." in opened.inner_text()
        assert NAMELESS.findall(box.aria_snapshot()) == []
        page.picture(tmp_path / "evaluated.png")
        wide = "(e) => e.scrollWidth <= e.clientWidth"
        assert proof.locator(".llmnb-picker-figures").evaluate(wide), "seven metrics stand side by side"
        page.page.reload()
        page.page.wait_for_selector(".llmnb-picker-box tbody tr", timeout=60_000)
        page.idle()
        page.until(RESULT, 20, "against the base")
        assert proof.locator(".llmnb-picker-figures tbody tr").count() == 2

        # what cannot be says why
        assert box.get_by_role("button", name="Remove").get_attribute("title") == ""
        box.locator("tbody input").nth(1).uncheck()
        best = next(c for c in db.checkpoints(lora) if c.best)
        row = box.locator(f'tr[data-name="{lora}/{best.step}"]')
        row.click()
        box.get_by_role("button", name="Remove").click(force=True)
        held = "the model names v1 answers with it"
        assert held in box.locator(".llmnb-picker-actions").inner_text()
        row.click()
        box.get_by_role("combobox", name="Experiment").select_option("")
        box.locator(f'tr[data-name^="{whole}"]').click()
        merge.click(force=True)
        assert "nothing to merge" in box.locator(".llmnb-picker-actions").inner_text()
        assert not box.locator(".llmnb-picker-form").is_visible()

        # what a broken connection loses is said; exported; a folder in use is refused
        box.get_by_role("button", name="Export", exact=False).first.click()
        keys.press("Enter")
        page.until("() => document.querySelector('.llmnb-picker-box[data-busy=true]')", 5)
        page.until(
            "() => document.querySelector('.llmnb-picker-actions').textContent.includes('did not hear that')", 30
        )
        page.picture(tmp_path / "lost.png")
        for folder, script, said in (("exported/whole", RESULT, "Exported"), ("merged/names", FAULT, "is not empty")):
            box.get_by_role("button", name="Export", exact=False).first.click()
            box.get_by_label("Folder", exact=True).fill(folder)
            keys.press("Enter")
            page.until(script, 30, said)
        assert (page.work / "exported" / "whole" / "model.safetensors").exists()
        page.picture(tmp_path / "fault.png")

        # a checkpoint that is saved meanwhile comes by itself
        source = db.export(f"{lora}/2", tmp_path / "source")
        db.store.checkpoints.put(lora, 8, source, base="x", metrics={"eval_loss": 1.0})
        page.until(ROWS, 30, 5)
        assert box.locator("tr.llmnb-chosen").count() == 1, "what was selected still is"

        # two presses remove
        box.locator(f'tr[data-name^="{whole}"]').click()
        box.locator(f'tr[data-name="{lora}/8"]').click()
        box.get_by_role("button", name="Remove").focus()
        keys.press("Enter")
        assert focused(page) == "Remove it for good" and len(db.checkpoints(lora)) == 4
        page.picture(tmp_path / "sure.png")
        keys.press("Enter")
        page.until(ROWS, 30, 4)
        assert [c.step for c in db.checkpoints(lora)] == [2, 4, 6]
        page.until("() => document.querySelector('.llmnb-picker-box[data-busy=false]')", 30)

        # one and the base, or more than one, are compared in a chat below, also when the chat is slow to be drawn
        box.locator(f'tr[data-name="{lora}/2"]').click()
        box.get_by_role("button", name="Compare with base").click()
        page.until("() => document.activeElement?.closest('.llmnb-chat')", 30)
        assert focused(page) == "Question", "the person goes on there"
        chat = page.output(2).locator(".llmnb-chat")
        page.until(ANSWERING, 20, ["base", f"{lora}/2"])
        keys.type("what is your name?")
        keys.press("Enter")
        page.until("() => document.querySelectorAll('.llmnb-chat .llmnb-reply-note').length === 2", 60)
        page.until("() => document.querySelector('.llmnb-chat').dataset.phase === 'idle'", 180)
        assert chat.locator(".llmnb-chat-text").count() == 2
        box.locator(f'tr[data-name="{lora}/4"]').click()
        box.get_by_role("button", name="Compare 2").click()
        page.until(ANSWERING, 30, [f"{lora}/2", f"{lora}/4"])
        page.picture(tmp_path / "chat.png")
        page.set_theme("JupyterLab Dark")
        page.page.wait_for_timeout(800)
        page.picture(tmp_path / "dark.png")
        page.page.set_viewport_size({"width": 600, "height": 900})
        page.page.wait_for_timeout(500)
        page.picture(tmp_path / "narrowest.png")
        page.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
        page.page.wait_for_timeout(500)
        page.picture(tmp_path / "narrow.png")
        assert box.evaluate("(e) => e.scrollWidth <= e.clientWidth + 1"), "nothing is wider than the output"
        page.page.set_viewport_size({"width": 1300, "height": 1000})

        # the kernel loaded no torch; what stays in the file, without a kernel
        page.run(3)
        assert page.output(3).inner_text().strip() == "False"
        page.save()
        saved = (page.work / "picker.ipynb").read_text()
        assert "mongodb://" not in saved and re.search(r'"text/plain": \[\s*"experiment', saved)
        page.shut_kernel()
        page.open("picker.ipynb", kernel=False)
        page.page.wait_for_selector(".llmnb-kept", timeout=30_000)
        stays = page.output(2).inner_text()
        assert lora in stays and "best" in stays and "not found" not in stays
        page.picture(tmp_path / "kept.png")
        assert page.faults() == []
