"""The chat in real JupyterLab: asked by keyboard, compared, stopped, saved, kept, reloaded, and without a kernel."""

from __future__ import annotations

import contextlib
import os
import re

import pytest

pytest.importorskip("playwright")
pytest.importorskip("jupyterlab")

from lab import CHROMIUM, lab, notebook

from llmnb import LLM, Collection, LLMTrainer, connect

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.mongod, pytest.mark.timeout(1200)]
if CHROMIUM is None:
    pytestmark.append(pytest.mark.skip(reason="no Chromium on this machine: apt-get install chromium"))

QUESTION = "what is your name?"
MARKUP = "<img src=x onerror=window.evil=1> <b>my name is model.</b>"
# A control of which the accessibility tree knows no name.
NAMELESS = re.compile(
    r"^\s*- (?:textbox|combobox|checkbox|button|spinbutton|option|log|group)(?: \[[^\]]*\])*:?$", re.M
)
LONG = "--max_new_tokens 6000 --min_new_tokens 6000"  # time to press Stop


@pytest.fixture
def trained(mongo_uri, tmp_path):
    """(the database, the run's id): a chat model that has learned to answer with markup, and two earlier steps."""
    from tiny import make_model

    base = make_model("llama", tmp_path / "base", max_position_embeddings=8192)
    db = connect(mongo_uri, home=tmp_path / "home")
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": MARKUP}]
    db.execute(Collection("tickets").insert_many([{"messages": said, "_fold": "train"} for _ in range(24)]))
    trainer = LLMTrainer(
        "t",
        select=Collection("tickets").find(),
        key="messages",
        output_dir=str(tmp_path / "out"),
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        max_steps=60,
        save_steps=20,
        per_device_train_batch_size=4,
        lora_r=16,
        lora_dropout=0.0,
        use_cpu=True,
    )
    run = db.apply(LLM("tickets", str(base), trainer=trainer))
    yield db, run.id
    db.close()


# A broken connection: one question never reaches the kernel.
LOST = """from llmnb.notebook.chatbox import ChatBox; heard = ChatBox._heard
ChatBox._heard = lambda self, w, m, b: "lost" in str(m.get("text")) and m["kind"] == "ask" or heard(self, w, m, b)"""


def cells(run):
    return [
        f"%load_ext llmnb\n{LOST}",
        "db = %llm_connect",
        f"%%llm_chat --compare base {run}/20 --max_new_tokens 60\n{QUESTION}",
        f"%%llm_chat {LONG}\none two three",
        "import sys; print('torch' in sys.modules)",
        f"view = %llm_watch {run}",
    ]


class Chat:
    """The chat of one cell, as a person sees it."""

    def __init__(self, page, cell):
        self.page, self.box = page, page.output(cell).locator(".llmnb-chat")
        self.keys = page.page.keyboard

    def texts(self):
        return self.box.locator(".llmnb-turn").last.locator(".llmnb-chat-text").all_inner_texts()

    def notes(self):
        return self.box.locator(".llmnb-turn").last.locator(".llmnb-reply-note").all_inner_texts()

    def status(self):
        return self.box.locator(".llmnb-status").inner_text()

    def phase(self, wanted, patience=120):
        self.box.and_(self.page.page.locator(f"[data-phase={wanted}]")).wait_for(timeout=patience * 1000)

    def says(self, part, patience=60):
        self.box.locator(".llmnb-status").filter(has_text=part).wait_for(timeout=patience * 1000)

    def ask(self, text):
        self.box.get_by_role("textbox", name="Question").focus()
        self.keys.type(text)
        self.keys.press("Enter")


def test_the_chat_from_first_question_to_a_file_without_kernel(driver, tmp_path, trained, mongo_uri):
    db, run = trained
    env = {"LLMNB_URI": mongo_uri, "LLMNB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    with lab(driver, tmp_path / "lab", **env) as page:
        page.open("chat.ipynb", notebook(*cells(run)))
        page.run(0)
        page.run(1)
        asked_in_a_cell(page, run, tmp_path)
        goes_on_below(page)
        is_lost(page, tmp_path)
        is_stopped(page)
        chat = settings_and_choice(page, run)
        killed_and_released(page, chat, db)
        saved_and_kept(page, chat, db)
        under_the_run(page, tmp_path)
        stays_after_a_reload(page, tmp_path)
        page.run(4)
        assert page.output(4).inner_text().strip() == "False", "the kernel needs no torch"
        stays_in_the_file(page)
        assert page.faults() == []


def asked_in_a_cell(page, run, tmp_path):
    """The cell waits for its three answers; what a model writes is text."""
    page.run(2, wait=False)
    page.page.wait_for_selector(".llmnb-chat .llmnb-chat-text", timeout=90_000)
    page.page.evaluate(
        """() => { window.seen = new Set(); const look = () => {
            const texts = document.querySelectorAll('.llmnb-chat .llmnb-chat-text');
            texts.forEach((e, i) => window.seen.add(i + e.textContent.length * 10));
            requestAnimationFrame(look); }; look(); }"""
    )
    page.page.wait_for_timeout(300)
    page.idle(240)
    chat = Chat(page, 2)
    chat.phase("idle")
    heads = chat.box.locator(".llmnb-reply-head").all_inner_texts()
    assert heads == ["base", "tickets step 60", "tickets step 20"]
    base, tuned, early = chat.texts()
    assert tuned == MARKUP and base != tuned != early
    assert all("tokens/s" in note for note in chat.notes()), chat.notes()
    assert page.page.evaluate("() => window.seen.size") > 6, "they came piece by piece"
    assert chat.box.locator("img, .llmnb-chat-text *, script").count() == 0
    assert page.page.evaluate("() => window.evil") is None
    assert NAMELESS.findall(chat.box.aria_snapshot()) == []
    for theme, width in (("Light", 1300), ("Dark", 1300), ("Dark", 600), ("Light", 600)):
        page.page.set_viewport_size({"width": width, "height": 1000})
        page.set_theme(f"JupyterLab {theme}")
        page.page.wait_for_timeout(900)
        chat.box.scroll_into_view_if_needed()
        page.picture(tmp_path / f"chat_{theme.lower()}_{width}.png")
        assert chat.box.evaluate("(e) => e.scrollWidth <= e.clientWidth + 1"), (theme, width)
    page.page.set_viewport_size({"width": 1300, "height": 1000})


def goes_on_below(page):
    """By keyboard, in the same box, with the history."""
    chat = Chat(page, 2)
    chat.ask("")
    chat.says("Type a question first")
    chat.box.get_by_role("textbox", name="Question").focus()
    chat.keys.type("first line")
    chat.keys.press("Shift+Enter")
    chat.ask("second line")
    chat.box.locator(".llmnb-turn").nth(1).wait_for()
    chat.phase("idle")
    assert chat.box.locator(".llmnb-question").last.inner_text() == "first line\nsecond line"
    assert len(chat.texts()) == 3 and all("s" in note for note in chat.notes())
    assert chat.box.get_by_role("textbox", name="Question").input_value() == ""
    chat.box.get_by_role("textbox", name="Question").fill("the cat sat " * 3000)
    chat.keys.press("Enter")
    chat.box.locator(".llmnb-turn").nth(2).wait_for()
    chat.phase("idle")
    assert "the model takes 8192" in chat.notes()[1] and "To do" in chat.notes()[1]


def is_lost(page, tmp_path):
    """A question that the kernel never heard comes back, with its words."""
    chat = Chat(page, 2)
    turns = chat.box.locator(".llmnb-turn").count()
    chat.ask("Is this lost?")
    chat.phase("answering")
    chat.box.get_by_role("button", name="Stop", exact=True).click()
    chat.phase("idle")
    chat.says("did not hear the question")
    prompt = chat.box.get_by_role("textbox", name="Question")
    assert prompt.input_value() == "Is this lost?" and chat.box.locator(".llmnb-turn").count() == turns
    page.picture(tmp_path / "chat_lost.png")
    prompt.fill("")


def is_stopped(page):
    """While its cell runs, and afterwards; what came stays."""
    page.run(3, wait=False)
    chat = Chat(page, 3)
    chat.box.locator(".llmnb-chat-text").first.wait_for(timeout=90_000)
    page.until(
        "() => document.querySelectorAll('.llmnb-chat')[1]?.querySelector('.llmnb-chat-text').textContent.length > 5"
    )
    chat.box.get_by_role("button", name="Stop").click()
    page.idle(60)
    chat.phase("idle")
    (came,) = chat.texts()
    assert chat.notes()[0].startswith("stopped") and len(came) > 5
    assert page.output(3).locator(".jp-RenderedText[data-mime-type*=error]").count() == 0
    for once in range(2):  # in the page alone
        chat.ask("one two")
        page.until(
            "(n) => { const t = document.querySelectorAll('.llmnb-chat')[1].querySelectorAll('.llmnb-chat-text'); "
            "return t.length === n && t[n - 1].textContent.length > 3; }",
            arg=2 + once,
        )
        chat.box.get_by_role("button", name="Stop").click()
        assert chat.box.get_attribute("data-phase") in ("stopping", "idle"), "answered at once"
        chat.phase("idle", 30)
        assert chat.notes()[0].startswith("stopped") and len(chat.texts()[0]) > 3


def settings_and_choice(page, run):
    """Who answers and how they are drawn."""
    chat = Chat(page, 2)
    chat.box.get_by_role("button", name="New chat").click()
    chat.box.locator(".llmnb-turn").first.wait_for(state="detached")
    chat.box.get_by_role("button", name="Remove column 3").click()
    chat.box.get_by_role("combobox", name="Answers in column 1").select_option(f"{run}/40")
    field = chat.box.get_by_role("textbox", name="temperature")
    field.fill("hot")
    field.press("Tab")
    chat.box.get_by_role("alert").filter(has_text="temperature cannot be hot").wait_for()
    chat.ask(QUESTION)
    chat.says("temperature: cannot be hot")
    assert chat.box.get_by_role("textbox", name="Question").input_value() == QUESTION, "what was typed is not lost"
    field.fill("0.9")
    field.press("Tab")
    chat.box.get_by_role("combobox", name="Answers in column 1").select_option(f"{run}/60")  # twice the same: once
    page.until("() => document.querySelectorAll('.llmnb-chat')[0].querySelectorAll('.llmnb-who select').length === 1")
    chat.box.get_by_role("button", name="Compare with another").click()
    chat.box.get_by_role("combobox", name="Answers in column 2").select_option(f"{run}/40")
    chat.box.get_by_role("textbox", name="Question").press("Enter")
    chat.box.locator(".llmnb-turn").first.wait_for()
    chat.phase("idle")
    turn = chat.box.locator(".llmnb-turn").last
    assert re.search(r"temperature 0.9 · seed \d+", turn.inner_text()), "the seed that was drawn is said"
    assert turn.locator(".llmnb-reply-head").all_inner_texts() == ["tickets step 60", "tickets step 40"]
    return chat


def models(page):
    """The chat processes of this lab's kernels."""
    import psutil

    found = []
    for process in psutil.Process(page.server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "llmnb.launch.chat" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def killed_and_released(page, chat, db):
    """A process that is gone is said, and the next question starts another."""
    mine = models(page)
    assert len(mine) == 1, "one process for all columns and cells"
    os.kill(mine[0].pid, 9)
    chat.ask("one")
    chat.box.locator(".llmnb-turn").nth(1).wait_for()
    chat.phase("idle")
    if "failed" in chat.box.locator(".llmnb-turn").last.locator(".llmnb-reply").first.get_attribute("data-state"):
        assert "has ended" in chat.notes()[0]
    assert all("tokens/s" in n or "has ended" in n for n in chat.notes()) and "tokens/s" in chat.notes()[-1]
    chat.box.get_by_role("button", name="Release memory").click()
    chat.says("The memory is free")
    assert not models(page)


def saved_and_kept(page, chat, db):
    """The conversation as training data, and under a name."""
    chat.box.get_by_role("button", name="Save to collection").click()
    assert chat.box.get_by_role("combobox", name="into").input_value() == "tickets"
    chat.box.get_by_role("combobox", name="answers of").select_option(index=0)
    chat.box.locator(".llmnb-saving").get_by_role("button", name="Save").click()
    chat.says("1 document into tickets; its fold is ")
    newest = next(iter(db.execute(Collection("tickets").find().sort("_id", -1).limit(1))))
    assert [m["role"] for m in newest["messages"]][:2] == ["user", "assistant"] and newest["_fold"] in chat.status()
    assert newest["messages"][0]["content"] == QUESTION
    chat.box.get_by_role("textbox", name="Name to keep").fill("a good one")
    chat.box.get_by_role("checkbox", name="Keep").check()
    chat.says("Kept as a good one")
    chat.ask("and?")
    chat.box.locator(".llmnb-turn").nth(2).wait_for()
    chat.phase("idle")
    page.page.wait_for_timeout(1500)
    assert [(c["name"], c["turns"]) for c in db.chats()] == [("a good one", 3)]
    assert NAMELESS.findall(chat.box.aria_snapshot()) == []


def under_the_run(page, tmp_path):
    """Chosen in the picker, asked below it."""
    page.run(5)
    chat, picker = Chat(page, 5), page.output(5).locator(".llmnb-picker-box")
    chat.box.get_by_role("combobox", name="Answers").wait_for()
    picker.locator('tr[data-name$="/40"]').click()
    picker.get_by_role("button", name="Compare with base").click()
    chat.box.get_by_role("combobox", name="Answers in column 2").wait_for()
    page.until("() => document.activeElement.matches('.llmnb-prompt')")
    page.page.keyboard.type(QUESTION)
    page.page.keyboard.press("Enter")
    chat.box.locator(".llmnb-turn").wait_for()
    chat.phase("idle")
    heads = chat.box.locator(".llmnb-reply-head").all_inner_texts()
    assert sorted(heads) == ["base", "tickets step 40"] and all("tokens/s" in note for note in chat.notes())
    chat.box.scroll_into_view_if_needed()
    page.picture(tmp_path / "chat_run.png")


def stays_after_a_reload(page, tmp_path):
    chat = Chat(page, 2)
    before = chat.box.locator(".llmnb-chat-text").all_inner_texts()
    chat.box.get_by_role("textbox", name="Question").fill("half a thought")
    page.page.wait_for_timeout(700)
    page.save()
    page.page.reload()
    page.page.wait_for_selector(".llmnb-chat .llmnb-chat-text", timeout=90_000)
    page.idle()
    chat = Chat(page, 2)
    page.page.wait_for_timeout(500)
    assert chat.box.locator(".llmnb-chat-text").all_inner_texts() == before
    assert chat.box.get_by_role("textbox", name="Question").input_value() == "half a thought"
    assert chat.box.get_by_role("checkbox", name="Keep").is_checked()
    assert page.output(2).locator(".llmnb-kept").is_hidden()
    chat.box.get_by_role("button", name="New chat").click()
    chat.box.get_by_role("combobox", name="Open a kept chat").select_option("a good one")
    chat.box.locator(".llmnb-turn").nth(2).wait_for()
    page.picture(tmp_path / "chat_reloaded.png")


def stays_in_the_file(page):
    page.page.wait_for_timeout(500)
    page.save()
    page.shut_kernel()
    page.open("chat.ipynb", kernel=False)
    page.page.wait_for_selector(".llmnb-kept", timeout=30_000)
    stays = page.output(2).inner_text()
    assert QUESTION in stays and "tickets step 60" in stays and "not found" not in stays
    under = page.output(5).inner_text()
    assert QUESTION in under and "tickets step 40" in under and "base" in under, "the chat under a run's curve, too"
    assert page.page.evaluate("() => window.evil") is None
