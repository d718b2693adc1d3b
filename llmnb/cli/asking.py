"""``llmnb chat``: one question, or a conversation. This process holds the model, and its end gives the memory back."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import NotFound
from . import paper
from .quiet import hush
from .settings import named, values

if TYPE_CHECKING:
    from ..db import Datalayer
    from ..llm import LLM

__all__ = ["chat"]


def chat(known: argparse.Namespace) -> int:
    """Answers the prompt, or each line that is typed."""
    sampling = values(named(known.more))
    hush()
    from ..db import connect

    database = connect(known.uri, home=known.home)
    model, form = _model(database, known)
    form = known.form or form
    base = _base_of(model) if known.base else None
    if known.prompt is not None:
        prompt = sys.stdin.read().strip() if known.prompt == "-" else known.prompt
        _answer(model, base, [{"role": "user", "content": prompt}], form, sampling)
        return 0
    return _converse(model, base, form, sampling)


def _model(database: Datalayer, known: argparse.Namespace) -> tuple[LLM, str]:
    """The model that answers, and how it was trained: "chat" or "text"."""
    if known.model:
        if known.model in database.show("model"):
            model = database.load("model", known.model)
            record = database.store.models.get(known.model)
            return model, _form(record.get("config") or {})
        from ..llm import LLM

        return LLM("chat", known.model), "text"
    return _of_checkpoint(database, known.checkpoint)


def _of_checkpoint(database: Datalayer, name: str | None) -> tuple[LLM, str]:
    from ..config import ModelSpec
    from ..llm import LLM

    if name is None:
        experiments = database.show("checkpoint")
        if not experiments:
            raise NotFound("checkpoint", "latest", [], todo="llmnb quickstart makes one; or --model NAME asks a base")
        name = experiments[-1]
    experiment = name.rpartition("/")[0] or name
    checkpoint = database.load("checkpoint", name)
    if "/" not in name:  # the best step when the run chose one
        best = [c for c in database.checkpoints(name) if c.best]
        checkpoint = database.fetch(best[-1]) if best else checkpoint
    record = database.store.runs.get(experiment)
    stored = database.store.models.get(record["model"], record["version"])
    config = record.get("config") or {}
    spec = ModelSpec.from_json(stored["spec"])
    if config.get("prompt_template"):
        spec = replace(spec, prompt_template=config["prompt_template"])
    model = LLM.from_spec(replace(spec, adapter_id=None))
    model.adapter_id = checkpoint
    print(f"{checkpoint} on {spec.model_name_or_path}", file=sys.stderr)
    return model, _form(config)


def _form(config: dict[str, Any]) -> str:
    return "chat" if config.get("key_kind") == "messages" or config.get("key") == "messages" else "text"


def _base_of(model: LLM) -> LLM:
    from ..llm import LLM

    return LLM.from_spec(replace(model.spec(), adapter_id=None))


def _answer(model: LLM, base: LLM | None, said: list[dict[str, str]], form: str, sampling: dict[str, Any]) -> str:
    prompt: Any = said if form == "chat" else said[-1]["content"]
    if base is not None:
        print("base:")
        _print(base.stream(prompt, **sampling))
        print("trained:")
    return _print(model.stream(prompt, **sampling))


def _print(pieces: Iterator[str]) -> str:
    began, text = time.monotonic(), ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print(flush=True)
    if sys.stderr.isatty():
        print(f"  {paper.count(len(text))} characters in {time.monotonic() - began:.1f} s", file=sys.stderr)
    return text


def _converse(model: LLM, base: LLM | None, form: str, sampling: dict[str, Any]) -> int:
    if sys.stdin.isatty():
        print("Ask; an empty line or Ctrl-D ends." + ("" if form == "chat" else " Each question stands alone."))
        import readline  # noqa: F401 - gives input() its editing keys
    said: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        said.append({"role": "user", "content": line})
        try:
            said.append({"role": "assistant", "content": _answer(model, base, said, form, sampling)})
        except KeyboardInterrupt:  # ends this answer, not the conversation
            print()
            said.pop()
