"""A conversation as a value: what was asked, what each model answered, and the documents it makes for training.

Knows neither models nor databases; JSON both ways.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import ConfigError, DataError, Fault

__all__ = ["Conversation", "Form", "Reply", "Saved", "Turn"]


@dataclass(frozen=True)
class Form:
    """How a model was trained, and so how it is spoken to and how a conversation becomes its data.

    Attributes:
        kind: "messages", "pair" or "text".
        key: the fields of a document: one name, or the prompt's and the response's.
        collection: the documents it was trained on; "" when that is not known.
        template: text around a prompt; {input} is the prompt.
        transformed: the documents went through a function first, so that their own fields are another matter.
    """

    kind: str = "text"
    key: str | tuple[str, ...] | None = None
    collection: str = ""
    template: str = "{input}"
    transformed: bool = False


@dataclass
class Reply:
    """One model's answer.

    Attributes:
        speaker: "base" or "EXPERIMENT/STEP".
        head: what it is, in words.
        text: as far as it came.
        note: speed and what else is to be said of it.
        state: "waiting", "loading", "answering", "done", "stopped" or "failed".
    """

    speaker: str
    head: str
    text: str = ""
    note: str = ""
    state: str = "waiting"

    @property
    def counts(self) -> bool:
        """True when there is something to go on from."""
        return self.state in ("done", "stopped") and bool(self.text)


@dataclass
class Turn:
    """A question and its answers, with the sampling settings in words."""

    prompt: str
    replies: list[Reply] = field(default_factory=list)
    sampling: str = ""


@dataclass
class Saved:
    """What was written.

    Attributes:
        collection: where.
        ids: of the new documents.
        folds: fold → how many of them.
        left_out: sentences about turns that were not written, or not wholly.
    """

    collection: str
    ids: list[Any]
    folds: dict[str, int]
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.ids)
        parts = [f"{n} {fold}" for fold, n in sorted(self.folds.items())]
        fold = f"its fold is {next(iter(self.folds))}" if count == 1 else f"folds: {', '.join(parts)}"
        said = f"{count} {'document' if count == 1 else 'documents'} into {self.collection}; {fold}"
        return ". ".join([said, *self.left_out]) + ("." if self.left_out else "")


@dataclass
class Conversation:
    """Questions and answers in their order.

    Attributes:
        id: stays the same while it goes on.
        name: under which it is kept in the database; "" when it is not.
        form: how the newest model that answered was trained.
    """

    turns: list[Turn] = field(default_factory=list)
    form: Form = field(default_factory=Form)
    name: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Conversation:
        """Reads ``to_json``; an answer that was still being given counts as stopped."""
        turns = []
        for turn in data.get("turns", ()):
            replies = [Reply(**{k: str(v) for k, v in reply.items()}) for reply in turn.get("replies", ())]
            for reply in replies:
                if reply.state not in ("done", "failed"):
                    reply.state, reply.note = "stopped", reply.note if reply.state == "stopped" else "stopped"
            turns.append(Turn(str(turn["prompt"]), replies, str(turn.get("sampling", ""))))
        form = dict(data.get("form") or {})
        key = form.get("key")
        form["key"] = tuple(key) if isinstance(key, (list, tuple)) else key
        return cls(turns, Form(**form), str(data.get("name", "")), str(data["id"]))

    def speakers(self) -> list[str]:
        """Who has answered, newest turn first, trained ones before the base."""
        found = [reply.speaker for turn in reversed(self.turns) for reply in turn.replies]
        return sorted(dict.fromkeys(found), key=lambda name: name == "base")

    def messages(self, speaker: str, before: int | None = None) -> list[dict[str, str]]:
        """The history as one model sees it: its own answers; where it gave none, those of the first that did."""
        out: list[dict[str, str]] = []
        for turn in self.turns[:before]:
            reply = _reply_of(turn, speaker) or next((r for r in turn.replies if r.counts), None)
            if reply is not None:
                out += [_message("user", turn.prompt), _message("assistant", reply.text)]
        return out

    def documents(
        self, speaker: str | None = None, key: str | Sequence[str] | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The conversation as documents of the kind that the model was trained on.

        Args:
            speaker: whose answers; None: those of the trained model that answered last.
            key: the fields to write; None: those that it was trained on.

        Returns:
            The documents, and sentences about what is not in them.

        Raises:
            DataError: there is no answer, or the model's documents went through a transform and no key is given.
            ConfigError: the key does not fit.
        """
        speaker = speaker or next(iter(self.speakers()), "")
        pairs, left_out = self._answered(speaker)
        if not pairs:
            who = f" from {speaker}" if speaker else ""
            raise DataError(f"There is no answer{who} to save.", todo="ask first; a failed answer is not saved")
        kind = self.form.kind
        if key is None and self.form.transformed:
            fields = {"messages": "messages", "pair": "prompt,response", "text": "text"}[kind]
            raise DataError(
                "The model was trained through a transform, so the fields of its documents are not those of its rows.",
                todo=f"name the fields to write: key={fields!r}",
            )
        names = _names(kind, key if key is not None else self.form.key)
        if kind == "messages":
            said = [message for prompt, text in pairs for message in _both(prompt, text)]
            return [{names[0]: said}], left_out
        if kind == "pair":
            return [{names[0]: prompt, names[1]: text} for prompt, text in pairs], left_out
        texts = [self.form.template.replace("{input}", prompt) + text for prompt, text in pairs]
        return [{names[0]: text} for text in texts], left_out

    def _answered(self, speaker: str) -> tuple[list[tuple[str, str]], list[str]]:
        pairs, without, stopped = [], 0, 0
        for turn in self.turns:
            reply = _reply_of(turn, speaker)
            if reply is None:
                without += 1
                continue
            stopped += reply.state == "stopped" or "cut at" in reply.note
            pairs.append((turn.prompt, reply.text))
        said = []
        if without:
            said.append(f"{_count(without, 'question')} without an answer of it left out")
        if stopped:
            said.append(f"{_count(stopped, 'answer')} written only as far as it came")
        return pairs, said


def _reply_of(turn: Turn, speaker: str) -> Reply | None:
    return next((reply for reply in turn.replies if reply.speaker == speaker and reply.counts), None)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _both(prompt: str, text: str) -> Iterable[dict[str, str]]:
    return _message("user", prompt), _message("assistant", text)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _names(kind: str, key: str | Sequence[str] | None) -> tuple[str, ...]:
    usual = {"messages": ("messages",), "pair": ("prompt", "response")}.get(kind, ("text",))
    if key is None:
        return usual
    names = tuple(part.strip() for part in key.split(",")) if isinstance(key, str) else tuple(map(str, key))
    said = ",".join(names)
    if len(names) != len(usual) or not all(names):
        raise ConfigError([Fault("key", f"{said} does not fit rows of kind {kind}", f"like {','.join(usual)}")])
    if any("." in name or name.startswith(("$", "_")) for name in names):
        raise ConfigError([Fault("key", f"{said} is not a plain field of a document", "give key= another name")])
    return names
