"""``llmnb chat``: one question, or a conversation. The model sits in a process that ends with this one."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..config import ModelSpec, thaw
from ..conversation import Conversation, Form, Reply, Turn
from ..errors import ConfigError, Fault, NotFound
from . import paper
from .quiet import hush
from .settings import named, values

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..db import Datalayer
    from ..launch.chat import ChatProcess

__all__ = ["chat"]


@dataclass(frozen=True)
class _Speaker:
    """Who answers: a base, or one with an adapter on it."""

    name: str
    head: str
    spec: ModelSpec
    adapter: str | None = None
    form: Form = field(default_factory=Form)


def chat(known: argparse.Namespace) -> int:
    """Answers the prompt, or each line that is typed."""
    sampling = values(named(known.more))
    hush()
    from ..db import connect

    database = connect(known.uri, home=known.home)
    talk = database.chat(known.history) if known.history else Conversation()
    if known.save is not None and known.prompt is None and known.history:
        print(database.save_chat(talk, known.save or None))
        return 0
    if known.keep:
        database.keep_chat(talk, known.keep)
    with ExitStack() as processes:
        box = _Box(database, talk, _speakers(database, known), sampling, processes)
        if known.prompt is not None:
            box.answer(sys.stdin.read().strip() if known.prompt == "-" else known.prompt)
        else:
            _converse(box)
    if known.save is not None:
        print(database.save_chat(talk, known.save or None), file=sys.stderr)
    return 0


# --- who answers ----------------------------------------------------------------------------------------------


def _speakers(database: Datalayer, known: argparse.Namespace) -> list[_Speaker]:
    """The base first when it is compared with, then the one that is asked, then the others."""
    first, base = _model(database, known.model) if known.model else _of_checkpoint(database, known.checkpoint)
    compared = [*(["base"] if known.base else []), *known.compare]
    found = [*([base] if "base" in compared else []), first]
    found += [_of_checkpoint(database, name)[0] for name in compared if name != "base"]
    if known.form:
        kind = "messages" if known.form == "chat" else "text"
        found = [replace(one, form=replace(one.form, kind=kind)) for one in found]
    return found


def _model(database: Datalayer, name: str) -> tuple[_Speaker, _Speaker]:
    """A model of the database with the weights it answers with, or a base by its hub id or folder; and its base."""
    if name not in database.show("model"):
        spec = ModelSpec(identifier="chat", model_name_or_path=name)
        return _Speaker(name, name, spec), _Speaker("base", "base", spec)
    record = database.store.models.get(name)
    if record.get("checkpoint"):
        return _with(database, database.load("checkpoint", record["checkpoint"]), name)
    spec = ModelSpec.from_json(record["spec"])
    own = replace(spec, adapter_id=None)
    found = database.find_checkpoint(spec.adapter_id) if spec.adapter_id else None
    adapter = str(found.path) if found is not None else spec.adapter_id
    return _Speaker(name, name, own, adapter), _Speaker("base", "base", own)


def _of_checkpoint(database: Datalayer, name: str | None) -> tuple[_Speaker, _Speaker]:
    """A checkpoint, of an experiment alone its best one or its last; and its base."""
    if name is None:
        experiments = database.show("checkpoint")
        if not experiments:
            raise NotFound("checkpoint", "latest", [], todo="llmnb quickstart makes one; or --model NAME asks a base")
        name = experiments[-1]
    checkpoint = database.named(name)
    if "/" not in name:  # the best step when the run chose one
        best = [c for c in database.checkpoints(name) if c.best]
        checkpoint = best[-1] if best else checkpoint
    return _with(database, database.fetch(checkpoint), str(checkpoint))


def _with(database: Datalayer, checkpoint: Checkpoint, head: str) -> tuple[_Speaker, _Speaker]:
    spec, form = database.trained_as(checkpoint)
    print(f"{checkpoint} on {spec.model_name_or_path}", file=sys.stderr)
    base = _Speaker("base", "base", spec, None, form)
    if checkpoint.kind == "adapter":
        return _Speaker(str(checkpoint), head, spec, str(checkpoint.path), form), base
    return _Speaker(str(checkpoint), head, replace(spec, model_name_or_path=str(checkpoint.path)), None, form), base


# --- asking ---------------------------------------------------------------------------------------------------


class _Box:
    """A conversation in a terminal, with one process for each base."""

    def __init__(
        self,
        database: Datalayer,
        talk: Conversation,
        speakers: list[_Speaker],
        sampling: Mapping[str, Any],
        processes: ExitStack,
    ) -> None:
        drawn = sampling.get("do_sample") or any(sampling.get(name) for name in ("temperature", "top_p", "top_k"))
        if drawn and len(speakers) > 1 and "seed" not in sampling:  # the same for all, or nothing can be compared
            sampling = {**sampling, "seed": random.randrange(100_000)}
            print(f"seed {sampling['seed']}", file=sys.stderr)
        self.database, self.talk, self.speakers, self.sampling = database, talk, speakers, sampling
        self._stack = processes
        self._processes: dict[str, ChatProcess] = {}
        talk.form = speakers[-1].form

    def answer(self, prompt: str) -> None:
        """One turn. An interrupt ends it, and what came stays."""
        if not prompt.strip():
            raise ConfigError([Fault("prompt", "is empty", "type a question")])
        turn = Turn(prompt)
        self.talk.turns.append(turn)
        try:
            for speaker in self.speakers:
                reply = Reply(speaker.name, speaker.head, state="stopped")
                turn.replies.append(reply)
                if len(self.speakers) > 1:
                    print(f"{speaker.head}:")
                self._print(speaker, reply, len(self.talk.turns) - 1)
        finally:
            if self.talk.name:
                self.database.keep_chat(self.talk)

    def _print(self, speaker: _Speaker, reply: Reply, turn: int) -> None:
        question: Any = self.talk.turns[turn].prompt
        if speaker.form.kind == "messages":
            question = [*self.talk.messages(speaker.name, turn), {"role": "user", "content": question}]
        wanted = {**thaw(speaker.spec.predict_kwargs), **self.sampling}
        began = time.monotonic()
        answer = self._process(speaker.spec).ask(question, adapter=speaker.adapter, **wanted)
        for piece in _shown(answer):
            reply.text += piece
        reply.state = "done"
        for note in answer.told.get("notes") or []:
            print(f"  {note}", file=sys.stderr)
        if sys.stderr.isatty():
            cut = f", cut at {answer.told['tokens']} tokens" if answer.told.get("cut") else ""
            seconds = f"{time.monotonic() - began:.1f} s"
            print(f"  {paper.count(len(reply.text))} characters in {seconds}{cut}", file=sys.stderr)

    def _process(self, spec: ModelSpec) -> ChatProcess:
        from ..launch.chat import ChatProcess

        key = str(spec.to_json())
        if key not in self._processes:
            self._processes[key] = self._stack.enter_context(ChatProcess(spec, idle=None))
        return self._processes[key]


def _shown(pieces: Iterator[str]) -> Iterator[str]:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            yield piece
    finally:
        print(flush=True)


def _converse(box: _Box) -> None:
    if sys.stdin.isatty():
        alone = any(speaker.form.kind != "messages" for speaker in box.speakers)
        print("Ask; an empty line or Ctrl-D ends." + (" Each question stands alone." if alone else ""))
        import readline  # noqa: F401 - gives input() its editing keys
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        try:
            box.answer(line)
        except KeyboardInterrupt:  # ends this answer, not the conversation
            print()
