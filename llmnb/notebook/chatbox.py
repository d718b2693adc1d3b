"""The chat in a page: who answers, questions and answers side by side, and what becomes of the conversation.

The page says ``ready``, ``ask``, ``stop``, ``new``, ``choose``, ``sampling``, ``draft``, ``save``, ``keep``, ``open``,
``release`` and ``look``; the box says what it knows, and all of it again at each ``ready``. What takes longer than a
moment runs on threads. The conversation lives here, so that a page that is loaded again shows what it showed before.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
from IPython.display import DisplayHandle, display

from ..conversation import Conversation, Reply, Saved, Turn
from ..errors import ConfigError, DataError, Fault, LlmnbError
from . import chat as chats
from . import speakers as who_can
from . import still
from .errands import Errands
from .page import script, style
from .sampling import Typed, sampled, sampling_words

__all__ = ["ChatBox", "ChatWidget"]

_EVERY = 0.1  # seconds between two messages about one answer
_UNHEARD = 0.25  # seconds between two messages with everything, while no page has said that it listens
_KEEP_EVERY = 5.0  # seconds between two pictures for the saved file


class ChatWidget(anywidget.AnyWidget):
    """The widget. Only its ``send`` is used from threads; it has no traits of its own."""

    _esm = script("chatbox.js")
    _css = style("chatbox.css")


class ChatBox:
    """One conversation in a page. All of its state sits under one lock; its methods may be called from any thread.

    Args:
        session: the shell's; it holds the chat processes, and the last conversation.
        database: the connected ``Datalayer``.
        speakers: who answers, "base", "EXPERIMENT/STEP", or "EXPERIMENT" for its best step, else its last, also when it
            has none yet; up to four. None: what the newest run's model answers with.
        chat: a conversation to go on with.
        sampling: options of ``generate``; those without a field of their own go along as they are.
        form: "text" or "chat"; None: as each model was trained.
    """

    def __init__(
        self,
        session: Any,
        database: Any,
        speakers: Sequence[str] | None = None,
        *,
        chat: Conversation | None = None,
        sampling: Mapping[str, Any] | None = None,
        form: str | None = None,
    ) -> None:
        self._session, self._database, self._form = session, database, form
        self._lock = threading.RLock()
        self.widget = ChatWidget()
        self.widget.on_msg(self._heard)
        self.chat = chat or Conversation()
        self._typed = Typed(sampling or {})
        self._chosen = list(speakers or ())
        self._choices: list[tuple[str, str, str]] = []
        self._collections: list[str] = []
        self._kept_names: list[str] = []
        self._phase, self._blocking, self._alone = "idle", False, False
        self._said = self._trouble = self._draft = ""
        self._error: LlmnbError | None = None
        self._stopping = False
        self._answer: Any = None
        self._done = threading.Event()
        self._done.set()
        self._listens = self._looked = False
        self._errands = Errands("llmnb-chat", self._carry_out)
        self._kept: DisplayHandle | None = None
        self.kept_by: Callable[[], None] | None = None  # where another view keeps the chat with its own picture
        self._kept_at = self._all_at = 0.0
        self._session.chats().watch(self._state)

    def display(self) -> None:
        """Puts the box into the cell's output, and a picture for the saved file behind it. On the cell's thread."""
        display(self.widget)
        self._kept = display(self._keepsake(), raw=True, display_id=True)

    # -- what a person does ----------------------------------------------------------------------------------

    def ask(self, prompt: str) -> None:
        """Asks everyone who is chosen. Answers come on a thread; ``wait`` waits for them.

        Raises:
            ConfigError: the prompt is empty, a setting is wrong, or an answer is still being given.
        """
        prompt = prompt.strip()
        if not prompt:
            raise ConfigError([Fault("prompt", "is empty", "type a question")])
        with self._lock:
            if self._phase != "idle":
                raise ConfigError([Fault("prompt", "cannot be asked while an answer is being given", "press Stop")])
            sampling = self._typed.options()
            turn = Turn(prompt)
            self.chat.turns.append(turn)
            self._phase, self._stopping, self._draft, self._error = "answering", False, "", None
            self._said = self._trouble = ""
            self._done.clear()
            self._session.last_chat = self.chat
            self._all()
        threading.Thread(target=self._carry_out, args=(self._answers, turn, sampling), daemon=True).start()

    def wait(self) -> None:
        """Waits for the answers on the cell's thread; an interrupt stops them, and what came stays.

        Raises:
            LlmnbError: one of them failed.
        """
        with self._lock:
            self._blocking = True
            self._state()
        try:
            while not self._done.wait(0.1):
                pass
        except KeyboardInterrupt:
            self.stop()
            self._done.wait(10.0)
        finally:
            with self._lock:
                self._blocking = False
                self._state()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends the answers that are being given; what came stays."""
        with self._lock:
            if self._phase != "answering":
                return
            self._phase, self._stopping = "stopping", True
            answer = self._answer
            self._state()
        if answer is not None:
            answer.stop()

    def new(self) -> None:
        """Begins another conversation. One that is kept stays where it is."""
        with self._lock:
            self._idle()
            self.chat = Conversation()
            self._said = self._trouble = ""
            self._session.last_chat = self.chat
            self._all()

    def choose(self, speakers: Sequence[str]) -> None:
        """Sets who answers from the next question on, and puts the cursor there: one to four names, as at the start."""
        self._choose(speakers)
        self.widget.send({"kind": "focus"})

    def _choose(self, speakers: Sequence[str]) -> None:
        names = list(dict.fromkeys(map(str, speakers)))
        if not 1 <= len(names) <= who_can.MOST:
            raise ConfigError([Fault("speakers", f"are {len(names)}", f"choose 1 to {who_can.MOST}")])
        with self._lock:
            self._chosen, self._trouble = names, ""
            self._state()
        self._errands.add(self._look, self._prepare)

    def _prepare(self) -> None:
        """While a question is being typed. What cannot be read is said when it is asked."""
        with self._lock:
            names = list(self._chosen)
        if not len(self._session.chats()):
            return
        for name in names:
            with contextlib.suppress(LlmnbError):
                self._session.chats().prepare(who_can.speaker(self._database, name, names, self._form))

    def refresh(self) -> None:
        """Looks again at who can be asked; called when a checkpoint was saved."""
        self._errands.add(self._look)

    def save(self, collection: str | None = None, speaker: str | None = None) -> Saved:
        """Writes the conversation into a collection as documents to train on; see ``Datalayer.save_chat``."""
        with self._lock:
            self._idle()
        saved = self._database.save_chat(self.chat, collection, speaker=speaker)
        self._say(str(saved))
        self._errands.add(self._look)
        return saved

    def keep(self, name: str | None = None) -> None:
        """Keeps the conversation in the database under a name, from now on after each answer. None: no longer."""
        if name is None:
            with self._lock:
                before, self.chat.name = self.chat.name, ""
                if before:
                    self._said = f"No longer kept: {before} stays in the database as it is now."
                self._state()
            return
        self._database.keep_chat(self.chat, name)
        self._say(f"Kept as {self.chat.name}: %%llm_chat --history {self.chat.name} goes on with it.")
        self._errands.add(self._look)

    def open(self, name: str) -> None:
        """Goes on with a conversation that was kept."""
        found = self._database.chat(name)
        with self._lock:
            self._idle()
            self.chat = found
            self._session.last_chat = found
            if found.turns:
                self._chosen = [reply.speaker for reply in found.turns[-1].replies][: who_can.MOST]
            self._said = self._trouble = ""
            self._all()

    def release(self) -> None:
        """Ends the model's processes and so gives their memory back; the next question starts one anew."""
        self.stop()
        self._done.wait(5.0)
        self._session.chats().close()
        self._say("The memory is free; the next question loads the model again.")

    def close(self) -> None:
        """Nothing more is asked. What is shown stays."""
        self.stop()
        self._session.chats().unwatch(self._state)

    # -- the page's side -------------------------------------------------------------------------------------

    def _heard(self, _widget: Any, message: Any, _buffers: Any) -> None:
        kind = message.get("kind") if isinstance(message, dict) else None
        if kind == "ready":
            with self._lock:
                first, self._listens = not self._listens, True
                self._all()
            if first:
                self._errands.add(self._look)
        elif kind == "draft":
            self._draft = str(message.get("text") or "")
        elif kind == "sampling":
            with self._lock:
                self._typed.take(message.get("values") or {})
                self._state()
        elif kind == "ask":
            self._at_once(lambda: self.ask(str(message.get("text") or "")))
        elif kind == "stop":
            if self._phase == "idle":  # the page takes something to be answered that was lost on its way
                self._all()
            self.stop()
        elif kind == "new":
            self._at_once(self.new)
        elif kind == "choose":
            self._at_once(lambda: self._choose(list(message.get("names") or ())))
        elif kind == "look":
            self._errands.add(self._look)
        elif kind == "save":
            collection, speaker = str(message.get("collection") or ""), str(message.get("speaker") or "")
            self._errands.add(lambda: self._discard(self.save(collection, speaker or None)))
        elif kind == "keep":
            name = str(message.get("name") or "") if message.get("on") else None
            self._errands.add(lambda: self.keep(name))
        elif kind == "open":
            self._errands.add(lambda: self.open(str(message.get("name"))))
        elif kind == "release":
            self._errands.add(self.release)

    def _at_once(self, step: Callable[[], None]) -> None:
        """On the kernel's thread: nothing here takes longer than a moment."""
        self._carry_out(step)

    @staticmethod
    def _discard(_result: Any) -> None:
        """A step gives nothing."""

    def _say(self, words: str) -> None:
        with self._lock:
            self._said, self._trouble = words, ""
            self._state()

    def _state(self) -> None:
        """Everything but the conversation."""
        with self._lock:
            self.widget.send({"kind": "state", "content": self._content()})

    def _all(self) -> None:
        with self._lock:
            self._all_at = time.monotonic()
            turns = [_turn(turn) for turn in self.chat.turns]
            self.widget.send({"kind": "all", "content": {**self._content(), "turns": turns, "draft": self._draft}})

    def _content(self) -> dict[str, Any]:
        answered = [(name, words) for name, words in self._speakers_of_chat()]
        return {
            "phase": self._phase,
            "blocking": self._blocking,
            "chosen": self._chosen or ["base"],
            "choices": self._choices,
            "sampling": self._typed.fields,
            "more": self._typed.more(),
            "faults": self._typed.faults,
            "said": self._said,
            "trouble": self._trouble,
            "alone": self._alone,
            "keep": self.chat.name,
            "kept": self._kept_names,
            "collection": self.chat.form.collection,
            "collections": self._collections,
            "speakers": answered,
            "empty": self._looked and len(self._choices) < 2 and not self.chat.turns,
            "memory": len(self._session.chats()) > 0,
        }

    def _speakers_of_chat(self) -> list[tuple[str, str]]:
        heads = {r.speaker: r.head for turn in self.chat.turns for r in turn.replies if r.counts}
        return [(name, heads[name]) for name in self.chat.speakers() if name in heads]

    # -- on threads ------------------------------------------------------------------------------------------

    def _carry_out(self, step: Callable[..., None], *given: Any) -> None:
        """The border of a thread, or of what the page said: what goes wrong is shown."""
        try:
            step(*given)
        except LlmnbError as error:
            self._fail(chats.error_words(error))
        except Exception as error:  # noqa: BLE001 - the box shows it, and can be used on
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, words: str) -> None:
        with self._lock:
            self._trouble, self._said = words, ""
            self._state()

    def _look(self) -> None:
        """What there is to choose from."""
        choices = who_can.choices(self._database)
        collections = sorted(self._database.store.collections())
        kept = [record["name"] for record in self._database.chats()]
        with self._lock:
            if not self._chosen and len(choices) > 1:
                self._chosen = [who_can.newest(self._database)]
            self._chosen = list(dict.fromkeys(who_can.settled(name, choices) for name in self._chosen))
            self._choices, self._collections, self._kept_names = choices, collections, kept
            chosen = [name for name in self._chosen if name in {n for n, *_ in choices}]
        if chosen and len(choices) > 1:
            found = next((name for name in chosen if name != "base"), None) or who_can.newest(self._database)
            _, form = self._database.trained_as(self._database.store.checkpoints.get(found))
            self._alone = (form.kind != "messages") if self._form is None else self._form == "text"
            with self._lock:
                if not self.chat.turns:
                    self.chat.form = form
        self._looked = True
        self._state()

    def _answers(self, turn: Turn, sampling: dict[str, Any]) -> None:
        try:
            with self._lock:
                names = list(self._chosen)
            if not names:
                names = self._chosen = [who_can.newest(self._database)]
            if sampled(sampling):
                sampling.setdefault("seed", random.randrange(100_000))  # the same for every column
            turn.sampling = sampling_words(sampling)
            words = {name: words for name, words, _ in self._choices}
            turn.replies = [Reply(name, words.get(name, name), note="waiting") for name in names]
            self._all()
            for column, name in enumerate(names):
                self._answer_in(turn, column, name, names, sampling)
        except LlmnbError as error:
            self._error = error
            raise
        finally:
            with self._lock:
                self._phase, self._answer = "idle", None
                self._keep_still(now=True)
                self._all()
                self._done.set()
        if self.chat.name:
            self._database.keep_chat(self.chat)

    def _answer_in(self, turn: Turn, column: int, name: str, names: list[str], sampling: dict[str, Any]) -> None:
        reply = turn.replies[column]
        if self._stopping:
            reply.state, reply.note = "stopped", "not asked"
            return
        reply.state, reply.note = "loading", "fetching the checkpoint…" if name != "base" else "loading the model…"
        self._column(turn, column)
        sent = time.monotonic()
        try:
            who = who_can.speaker(self._database, name, names, self._form)
            reply.speaker, reply.head = who.name, who.head
            if name != "base" or len(names) == 1:
                self.chat.form = who.form
            self._alone = not who.chat
            question = chats.question(self.chat, who, self.chat.turns.index(turn))
            for _ in chats.answer(self._session.chats(), who, question, sampling, reply, self._hold):
                if time.monotonic() - sent > _EVERY:
                    sent = time.monotonic()
                    self._column(turn, column)
        except LlmnbError as error:
            reply.state, reply.note = "failed", chats.error_words(error)
            self._error = self._error or error
        if self._stopping and reply.state == "done":
            reply.state, reply.note = "stopped", f"stopped · {reply.note}" if reply.text else "stopped"
        self._column(turn, column)

    def _hold(self, answer: Any) -> None:
        with self._lock:
            self._answer = answer
            stopping = self._stopping
        if stopping:
            answer.stop()

    def _column(self, turn: Turn, column: int) -> None:
        """What has changed in one column; everything, while no page has said that it listens."""
        with self._lock:
            self._keep_still()
            if not self._listens:
                if time.monotonic() - self._all_at > _UNHEARD:
                    self._all()
                return
            content = {"turn": self.chat.turns.index(turn), "column": column, "reply": _reply(turn.replies[column])}
            self.widget.send({"kind": "reply", "content": content})

    # -- the rest --------------------------------------------------------------------------------------------

    def _idle(self) -> None:
        if self._phase != "idle":
            raise DataError("An answer is still being given.", todo="press Stop first")

    def _keep_still(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._kept_at <= _KEEP_EVERY:
            return
        if self._kept is not None:
            self._kept.update(self._keepsake(), raw=True)
        elif self.kept_by is not None and self.chat.turns:
            self._kept_at = time.monotonic()
            self.kept_by()

    def said(self) -> dict[str, str]:
        """The chat as text and as HTML; {} before the first question."""
        if not self.chat.turns:
            return {}
        return {"text/plain": chats.plain(self.chat), "text/html": chats.page(self.chat)}

    def _keepsake(self) -> dict[str, str]:
        self._kept_at = time.monotonic()
        said = self.said()
        if not said:
            text = "The chat: run this cell to open it."
            said = {"text/plain": text, "text/html": f"<pre>{text}</pre>"}
        return {**said, "text/html": still.kept(said["text/html"])}


def _turn(turn: Turn) -> dict[str, Any]:
    return {"prompt": turn.prompt, "sampling": turn.sampling, "replies": [_reply(r) for r in turn.replies]}


def _reply(reply: Reply) -> dict[str, str]:
    return {"head": reply.head, "text": reply.text, "note": reply.note, "state": reply.state}
