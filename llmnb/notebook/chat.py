"""``%%llm_chat``: one prompt, one column for each model that answers, streaming.

The models sit in processes of their own (``launch.chat``); this module sends prompts, and shows what comes back as text
that is escaped. A process stays warm for the next cell and ends with the kernel, with ``%llm_chat --close``, or when
another database is connected.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from IPython.display import display

from ..checkpoint import Checkpoint
from ..config import ModelSpec, thaw
from ..errors import NotFound

__all__ = ["Answers", "Chats", "Speaker", "speakers"]

_EVERY = 0.1  # seconds between two updates of the output; the last one always comes


@dataclass(frozen=True)
class Speaker:
    """Who answers.

    Attributes:
        head: what it is, in words: "base", "tickets step 300 (best)".
        spec: the model whose process it is.
        adapter: folder of the adapter, None for the model as it is.
        chat: True when prompts go through the tokenizer's chat template.
    """

    head: str
    spec: ModelSpec
    adapter: str | None
    chat: bool


def speakers(database: Any, checkpoint: str | None, compare: str | None, form: str | None) -> list[Speaker]:
    """The columns: the base first when it is compared with, then the checkpoint.

    Args:
        database: the connected ``Datalayer``.
        checkpoint: "experiment" or "experiment/step"; None: what the newest run's model answers with.
        compare: "base" or None.
        form: "text" or "chat"; None: as the run was trained.

    Raises:
        NotFound: no such checkpoint, or none at all.
    """
    found = _find(database, checkpoint)
    spec, kind = _trained_as(database, found)
    chat = form == "chat" if form else kind == "messages"
    best = " (best)" if found.best else ""
    head = f"{spec.identifier} step {found.step}{best}"
    if found.kind == "adapter":
        tuned = Speaker(head, spec, found.path, chat)
    else:
        tuned = Speaker(head, replace(spec, model_name_or_path=str(found.path)), None, chat)
    return [Speaker("base", spec, None, chat), tuned] if compare else [tuned]


def _find(database: Any, name: str | None) -> Checkpoint:
    if name:
        return database.load("checkpoint", name)
    experiments = database.show("checkpoint")
    if not experiments:
        raise NotFound("checkpoint", "latest", todo="train first: %llm_train --help; then %llm_checkpoints lists them")
    found = None
    try:
        found = database.answering(experiments[-1])
    except NotFound:
        pass  # the run's record was removed; its checkpoints stay
    return found or database.load("checkpoint", experiments[-1])


def _trained_as(database: Any, checkpoint: Checkpoint) -> tuple[ModelSpec, str]:
    """The model that was trained, without any adapter, and the kind of its rows."""
    spec = ModelSpec(identifier=checkpoint.experiment, model_name_or_path=checkpoint.base)
    config: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    try:
        record = database.store.runs.get(checkpoint.experiment)
        config, counts = record.get("config") or {}, record.get("counts") or {}
        spec = ModelSpec.from_json(database.store.models.get(record["model"], record["version"])["spec"])
    except NotFound:
        pass  # the run or its model was removed; the checkpoint knows its base
    if config.get("prompt_template"):
        spec = replace(spec, prompt_template=config["prompt_template"])
    kind = config.get("key_kind") or counts.get("kind") or "text"
    return replace(spec, adapter_id=None, bits=spec.bits or config.get("bits")), kind


class Chats:
    """The chat processes of one session, one for each base model."""

    def __init__(self) -> None:
        self._processes: dict[str, Any] = {}

    def ask(self, speaker: Speaker, prompt: str, sampling: Mapping[str, Any]) -> Iterator[str]:
        """The answer piece by piece."""
        question: Any = [{"role": "user", "content": prompt}] if speaker.chat else prompt
        wanted = {**thaw(speaker.spec.predict_kwargs), **sampling}
        yield from self._process(speaker.spec).ask(question, adapter=speaker.adapter, **wanted)

    def stop(self, speaker: Speaker) -> None:
        """Ends the answer that is being given."""
        self._process(speaker.spec).stop()

    def _process(self, spec: ModelSpec) -> Any:
        from ..launch.chat import ChatProcess

        key = json.dumps(spec.to_json(), sort_keys=True)
        if key not in self._processes:
            self._processes[key] = ChatProcess(spec)
        return self._processes[key]

    def close(self) -> None:
        """Ends all of them and gives their memory back."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def __len__(self) -> int:
        return len(self._processes)


class Answers:
    """The output of one chat cell: a prompt and its columns, updated in place."""

    def __init__(self, prompt: str, columns: Sequence[Speaker], sampling: Mapping[str, Any]) -> None:
        self.prompt = prompt
        self.heads = [c.head for c in columns]
        self.texts = ["" for _ in columns]
        self.notes = ["waiting" if i else "loading the model…" for i in range(len(columns))]
        self.sampling = "  ".join(f"{k} {v}" for k, v in sampling.items())
        self._handle: Any = None
        self._shown = 0.0

    def show(self, *, now: bool = False) -> None:
        """Brings the output up to date, at most ten times a second unless ``now``."""
        if not now and time.monotonic() - self._shown < _EVERY:
            return
        self._shown = time.monotonic()
        bundle = {"text/plain": self.plain(), "text/html": self.page()}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def plain(self) -> str:
        """For a terminal and for the saved file's text."""
        return "\n\n".join(f"[{head}] {note}\n{text}" for head, note, text in zip(self.heads, self.notes, self.texts))

    def page(self) -> str:
        """As HTML: every word of a model is escaped."""
        dim = "color:var(--jp-content-font-color2,var(--vscode-descriptionForeground,#616161))"
        line = "1px solid var(--jp-border-color2,var(--vscode-widget-border,#bdbdbd))"
        font = "font-family:var(--jp-ui-font-family,var(--vscode-font-family,sans-serif))"
        columns = []
        for head, note, text in zip(self.heads, self.notes, self.texts):
            said = "white-space:pre-wrap;overflow-wrap:anywhere;word-break:break-word;min-height:1.5em"
            columns.append(
                f'<div style="flex:1 1 260px;min-width:0;border-top:{line};padding:4px 0 2px" class="llmnb-answer">'
                f'<div style="{dim}">{html.escape(head)}</div>'
                f'<div class="llmnb-said" style="{said}">{html.escape(text)}</div>'
                f'<div style="{dim};font-variant-numeric:tabular-nums" role="status">{html.escape(note)}</div></div>'
            )
        foot = f'<div style="{dim}">{html.escape(self.sampling)}</div>' if self.sampling else ""
        return (
            f'<div class="llmnb-words" style="{font}"><div style="display:flex;flex-wrap:wrap;gap:8px 28px">'
            + "".join(columns)
            + f"</div>{foot}</div>"
        )

    def stream(self, chats: Chats, columns: Sequence[Speaker], sampling: Mapping[str, Any]) -> None:
        """Asks each column in turn and shows what comes. An interrupt of the kernel stops the answer."""
        self.show(now=True)
        for i, speaker in enumerate(columns):
            start = time.monotonic()
            self.notes[i] = "answering…" if len(chats) else "loading the model…"
            self.show(now=True)
            try:
                for piece in chats.ask(speaker, self.prompt, sampling):
                    self.notes[i] = "answering…"
                    self.texts[i] = (self.texts[i] + piece).lstrip("\n")
                    self.show()
                self.texts[i] = self.texts[i].rstrip()
                empty = "" if self.texts[i] else "nothing but white space, "
                self.notes[i] = f"{empty}{time.monotonic() - start:.1f} s"
            except KeyboardInterrupt:
                chats.stop(speaker)
                self.notes[i] = "stopped"
                for rest in range(i + 1, len(columns)):
                    self.notes[rest] = "not asked"
                self.show(now=True)
                return
            except BaseException:
                self.notes[i] = "failed"
                self.show(now=True)
                raise
            self.show(now=True)
