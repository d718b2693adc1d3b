"""The processes that answer in a chat, the settings of an answer, and a conversation as text and as HTML.

The models sit in processes of their own (``launch.chat``). A process stays warm for the next question and ends with the
kernel, with ``%llm_chat --close``, when another database is connected, or after 15 minutes without a question.
"""

from __future__ import annotations

import contextlib
import html
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..config import ModelSpec, thaw
from ..conversation import Conversation, Reply
from ..errors import LlmnbError, ModelError
from .speakers import Speaker, speaker
from .words import number

__all__ = [
    "Chats",
    "answer",
    "error_words",
    "page",
    "plain",
    "print_answers",
    "question",
]

_PROCESSES = 2  # base models in memory at once, each in its process


# --- the processes --------------------------------------------------------------------------------------------


class Chats:
    """The chat processes of one session, one for each base model; the one that was not used for longest gives way."""

    def __init__(self) -> None:
        self._processes: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], None]] = []

    def ask(self, speaker: Speaker, question: Any, sampling: Mapping[str, Any]) -> Any:
        """The answer, to be read piece by piece; its ``told`` says how fast it was."""
        wanted = {**thaw(speaker.spec.predict_kwargs), **sampling}
        return self._process(speaker.spec).ask(question, adapter=speaker.adapter, **wanted)

    def prepare(self, speaker: Speaker) -> None:
        """Reads its adapter beside a base that is in memory; loads no base."""
        if self.ready(speaker):
            self._process(speaker.spec).prepare(speaker.adapter)

    def ready(self, speaker: Speaker) -> bool:
        """True when its base is in memory."""
        with self._lock:
            process = self._processes.get(_key(speaker.spec))
        return process is not None and process.alive

    def _process(self, spec: ModelSpec) -> Any:
        from ..launch.chat import ChatProcess

        key, old = _key(spec), []
        with self._lock:
            if key not in self._processes:
                self._processes[key] = ChatProcess(spec, ended=self._tell)
            self._processes.move_to_end(key)
            while len(self._processes) > _PROCESSES:
                old.append(self._processes.popitem(last=False)[1])
            process = self._processes[key]
        for one in old:
            one.close()
        return process

    def watch(self, watcher: Callable[[], None]) -> None:
        """Calls the watcher, from any thread, when memory was given back."""
        self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """No longer."""
        with contextlib.suppress(ValueError):
            self._watchers.remove(watcher)

    def _tell(self) -> None:
        for watcher in list(self._watchers):
            watcher()

    def close(self) -> None:
        """Ends all of them and gives their memory back. The next question starts a new one."""
        with self._lock:
            processes = list(self._processes.values())
            self._processes.clear()
        for process in processes:
            process.close()
        self._tell()

    def __len__(self) -> int:
        """How many are in memory."""
        with self._lock:
            return sum(process.alive for process in self._processes.values())


def _key(spec: ModelSpec) -> str:
    return json.dumps(spec.to_json(), sort_keys=True)


def question(chat: Conversation, who: Speaker, turn: int) -> Any:
    """What a model is asked in a turn: the history and the prompt as messages, or the prompt alone."""
    prompt = chat.turns[turn].prompt
    return [*chat.messages(who.name, turn), {"role": "user", "content": prompt}] if who.chat else prompt


def print_answers(
    database: Any, chats: Chats, chat: Conversation, names: Sequence[str], sampling: Mapping[str, Any], form: str | None
) -> None:
    """The newest turn in a terminal, as plain text while it comes. An interrupt stops it."""
    turn = chat.turns[-1]
    for name in names:
        who = speaker(database, name, names, form)
        reply = Reply(who.name, who.head)
        turn.replies.append(reply)
        if name != "base" or len(names) == 1:
            chat.form = who.form
        held: list[Any] = []
        print(f"[{who.head}]", flush=True)
        try:
            shown = 0
            for _ in answer(chats, who, question(chat, who, len(chat.turns) - 1), sampling, reply, held.append):
                print(reply.text[shown:], end="", flush=True)
                shown = len(reply.text)
        except KeyboardInterrupt:
            held[-1].stop() if held else None
            reply.state, reply.note = "stopped", "stopped"
        print(f"\n{reply.note}\n", flush=True)
        if reply.state == "stopped":
            return


def answer(
    chats: Chats, who: Speaker, question: Any, sampling: Mapping[str, Any], reply: Reply, hold: Callable[[Any], None]
) -> Iterator[None]:
    """Fills a reply while the model answers; gives control back after each piece.

    Args:
        chats: the processes.
        who: answers.
        question: a text, or messages.
        sampling: options of ``generate``.
        reply: what is filled in.
        hold: gets the answer, so that somebody else can stop it.

    Raises:
        LlmnbError: what went wrong, also in words in ``reply.note``.
    """
    reply.state = "answering" if chats.ready(who) else "loading"
    reply.note = "answering…" if reply.state == "answering" else "loading the model…"
    yield
    begun = time.monotonic()
    try:
        pieces = chats.ask(who, question, sampling)
        hold(pieces)
        for piece in pieces:
            reply.state, reply.note = "answering", "answering…"
            reply.text = (reply.text + piece).lstrip("\n")
            yield
    except LlmnbError as error:
        error = _of_base(error, who)
        reply.state, reply.note = "failed", error_words(error)
        raise error from None
    finally:
        reply.text = reply.text.rstrip()
        if reply.state in ("loading", "answering"):
            reply.state = "done"
    reply.note = _figures(pieces.told, time.monotonic() - begun, reply.text)


def _of_base(error: LlmnbError, who: Speaker) -> LlmnbError:
    """A base that is not there is named as what it is."""
    gone = isinstance(error, ModelError) and str(who.spec.model_name_or_path) in error.what
    if not gone:
        return error
    return ModelError(
        f"The base model of {who.head if who.name != 'base' else 'this chat'} cannot be loaded: "
        f"{who.spec.model_name_or_path}.",
        seen=error.what,
        todo=error.todo
        if error.todo and "did you mean" in error.todo
        else "put the model back where it was trained "
        "from, or load it from where it is: LLM('name', 'FOLDER', adapter_id='EXPERIMENT/STEP')",
    )


def _figures(told: Mapping[str, Any], seconds: float, text: str) -> str:
    parts = [] if text else ["nothing but white space"]
    tokens, took = told.get("tokens"), told.get("seconds")
    if tokens and took:
        speed = tokens / took
        parts.append(f"{number(speed) if speed >= 20 else f'{speed:.1f}'} tokens/s")
        parts.append(f"{tokens} {'token' if tokens == 1 else 'tokens'}")
    spent = took or seconds
    parts.append(f"{spent:.1f} s" if spent >= 1 else f"{spent:.2f} s")
    if told.get("cut"):
        parts.append(f"cut at {tokens} tokens")
    parts += told.get("notes") or []
    return " · ".join(parts)


def error_words(error: LlmnbError) -> str:
    """An error in a few sentences."""
    faults = getattr(error, "faults", ())
    if faults:
        return "; ".join(str(fault) for fault in faults)
    seen = f" ({' '.join(str(error.seen).split())[:200]})" if error.seen else ""
    what = error.what.rstrip(".") + seen + "."
    return f"{what} To do: {error.todo}." if error.todo else what


# --- as text and as HTML --------------------------------------------------------------------------------------


def plain(chat: Conversation) -> str:
    """For the saved file's text and for a terminal."""
    blocks = []
    for turn in chat.turns:
        said = "\n\n".join(f"[{reply.head}] {reply.note}\n{reply.text}" for reply in turn.replies)
        blocks.append(f"> {turn.prompt}\n\n{said}")
    return "\n\n".join(blocks)


def page(chat: Conversation) -> str:
    """As HTML for the saved file: every word from outside is escaped."""
    dim = "color:var(--jp-content-font-color2,var(--vscode-descriptionForeground,#616161))"
    line = "1px solid var(--jp-border-color2,var(--vscode-widget-border,#bdbdbd))"
    font = "font-family:var(--jp-ui-font-family,var(--vscode-font-family,sans-serif))"
    said = "white-space:pre-wrap;overflow-wrap:anywhere;word-break:break-word;min-height:1.5em"
    parts = []
    for turn in chat.turns:
        columns = "".join(
            f'<div style="flex:1 1 260px;min-width:0;border-top:{line};padding:4px 0 2px" class="llmnb-answer">'
            f'<div style="{dim}">{html.escape(reply.head)}</div>'
            f'<div class="llmnb-said" style="{said}">{html.escape(reply.text)}</div>'
            f'<div style="{dim};font-variant-numeric:tabular-nums" role="status">{html.escape(reply.note)}</div></div>'
            for reply in turn.replies
        )
        foot = f'<div style="{dim}">{html.escape(turn.sampling)}</div>' if turn.sampling else ""
        parts.append(
            f'<div style="{said};margin:8px 0 4px;font-weight:600">{html.escape(turn.prompt)}</div>'
            f'<div style="display:flex;flex-wrap:wrap;gap:8px 28px">{columns}</div>{foot}'
        )
    return f'<div class="llmnb-words" style="{font}">{"".join(parts)}</div>'
