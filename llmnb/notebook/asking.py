"""``%%llm_chat``, carried out: a question asked, or a chat written as documents."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, Fault
from ..options import named
from .sampling import sampling_words
from .session import Session

__all__ = ["ask", "save"]


def save(session: Session, known: Any) -> None:
    """Writes the last chat, or the one that a line names, as documents to train on.

    Raises:
        ConfigError: there is none.
    """
    database = session.database()
    chat = database.chat(known.history) if known.history else session.last_chat
    if chat is None:
        raise ConfigError([Fault("--save", "finds no chat in this session", "ask first, or name one: --history NAME")])
    print(database.save_chat(chat, known.save or None, speaker=known.checkpoint))


def ask(session: Session, known: Any, rest: list[str], prompt: str) -> None:
    """Asks what a line names, in a box that stays; in a terminal it prints the answers.

    Args:
        session: of the shell.
        known: the line's own options.
        rest: options of the answer.
        prompt: "" opens the box alone.
    """
    from .. import options
    from ..conversation import Conversation, Turn
    from . import chat as chats
    from . import speakers

    database = session.database()
    every = frozenset({"bool", "int", "float", "str", "list", "dict", "None"})
    sampling = {name: True if text is None else options.parse("", text, every) for name, text in named(rest).items()}
    chat = database.chat(known.history) if known.history else Conversation()
    if known.history and chat.turns and not (known.checkpoint or known.compare):
        names = [reply.speaker for reply in chat.turns[-1].replies]
    else:
        names = speakers.named(database, known.checkpoint, known.compare)
    if known.keep:
        database.keep_chat(chat, known.keep)
    session.last_chat = chat
    if session.in_notebook:
        from .chatbox import ChatBox

        box = ChatBox(session, database, names, chat=chat, sampling=sampling, form=known.form)
        box.display()
        if prompt:
            box.ask(prompt)
            box.wait()
        return
    chat.turns.append(Turn(prompt, sampling=sampling_words(sampling)))
    try:
        chats.print_answers(database, session.chats(), chat, names, sampling, known.form)
    finally:
        if chat.name:
            database.keep_chat(chat)
