"""Who can answer in a chat: the base and every checkpoint of the database, by name, as they were trained.

This module knows the database, and neither processes nor widgets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint import Checkpoint
from ..config import ModelSpec
from ..conversation import Form
from ..errors import ConfigError, Fault, NotFound
from .tables import local_time
from .words import figure

__all__ = ["MOST", "Speaker", "choices", "named", "newest", "settled", "speaker"]

MOST = 4  # models that answer side by side


@dataclass(frozen=True)
class Speaker:
    """Who answers.

    Attributes:
        name: "base" or "EXPERIMENT/STEP".
        head: what it is, in words: "base", "tickets step 300 (best)".
        spec: the model whose process it is.
        adapter: folder of the adapter, None for the model as it is.
        form: how it was trained; kind "messages" goes through the tokenizer's chat template.
    """

    name: str
    head: str
    spec: ModelSpec
    adapter: str | None
    form: Form = field(default_factory=Form)

    @property
    def chat(self) -> bool:
        """True when the history goes along; else each prompt stands alone."""
        return self.form.kind == "messages"


def newest(database: Any) -> str:
    """The checkpoint that the newest run's model answers with, as "EXPERIMENT/STEP".

    Raises:
        NotFound: there is none at all.
    """
    experiments = database.show("checkpoint")
    if not experiments:
        raise NotFound("checkpoint", "latest", todo="train first: %llm_train --help; then %llm_checkpoints lists them")
    try:
        record = database.store.runs.get(experiments[-1])
        version = database.store.models.get(record["model"], record["version"])
        if version.get("checkpoint"):
            return str(version["checkpoint"])
    except NotFound:
        pass  # the run's record was removed; its checkpoints stay
    return f"{experiments[-1]}/{database.show('checkpoint', experiments[-1])[-1]}"


def speaker(database: Any, name: str, beside: Sequence[str] = (), form: str | None = None) -> Speaker:
    """One who answers; the files of its checkpoint are fetched.

    Args:
        database: the connected ``Datalayer``.
        name: "base", "EXPERIMENT/STEP", or "EXPERIMENT" for its last step.
        beside: the others who answer: "base" is the base of the first checkpoint among them, else of the newest run's.
        form: "text" or "chat"; None: as the run was trained.

    Raises:
        NotFound: no such checkpoint, or none at all.
        ArtifactError: its stored bytes are not what their digest says.
    """
    if name == "base":
        found = _first(database, [other for other in beside if other != "base"])
    else:
        found = database.load("checkpoint", name)
    spec, trained = database.trained_as(found)
    if form is not None:
        trained = replace(trained, kind="messages" if form == "chat" else _unless_chat(trained.kind))
    if name == "base":
        return Speaker("base", "base", spec, None, trained)
    head = f"{spec.identifier} step {found.step}{' (best)' if found.best else ''}"
    name = f"{found.experiment}/{found.step}"
    if found.kind == "adapter":
        return Speaker(name, head, spec, str(found.path), trained)
    return Speaker(name, head, replace(spec, model_name_or_path=str(found.path)), None, trained)


def _first(database: Any, names: Sequence[str]) -> Checkpoint:
    for name in names:
        with contextlib.suppress(NotFound):  # it was removed, and says so in its own column
            return _record(database, name)
    return _record(database, newest(database))


def _record(database: Any, name: str) -> Checkpoint:
    """As ``database.load`` finds it, without its files."""
    return database.store.checkpoints.get(name)


def _unless_chat(kind: str) -> str:
    return "text" if kind == "messages" else kind


def named(database: Any, checkpoint: str | None, compare: Sequence[str] = ()) -> list[str]:
    """The columns' names: the base first when it is compared with, then the checkpoint, then the others.

    Args:
        database: the connected ``Datalayer``.
        checkpoint: "EXPERIMENT" or "EXPERIMENT/STEP"; None: what the newest run's model answers with.
        compare: "base" and others.

    Raises:
        NotFound: no such checkpoint, or none at all.
        ConfigError: they are too many.
    """
    first = _name(database, checkpoint) if checkpoint else newest(database)
    others = [_name(database, name) for name in compare if name != "base"]
    names = list(dict.fromkeys([*(["base"] if "base" in compare else []), first, *others]))
    if len(names) > MOST:
        raise ConfigError([Fault("--compare", f"makes {len(names)} columns", f"at most {MOST}")])
    return names


def _name(database: Any, name: str) -> str:
    if name == "base":
        return name
    found = _record(database, name)
    return f"{found.experiment}/{found.step}"


def choices(database: Any) -> list[tuple[str, str, str]]:
    """Everyone who can answer, as (name, words, run): the base, then checkpoints, newest experiment first."""
    runs = {record["_id"]: record for record in database.store.runs.list()}
    found = [("base", "base", "")]
    for experiment in database.show("checkpoint")[::-1]:
        record = runs.get(experiment) or {}
        model = str(record.get("model") or experiment)
        run = f"{model} · {local_time(record.get('created'))}" if record else experiment
        for saved in reversed(database.checkpoints(experiment)):
            loss = saved.metrics.get("eval_loss")
            facts = ["best"] if saved.best else []
            facts += [f"eval {figure(loss)}"] if loss is not None else []
            words = f" ({', '.join(facts)})" if facts else ""
            found.append((f"{experiment}/{saved.step}", f"{model} step {saved.step}{words}", run))
    return found


def settled(name: str, known: Sequence[tuple[str, str, str]]) -> str:
    """A name that can be asked: of an experiment alone its best step, else its last; while it has none, as it is."""
    if name == "base" or "/" in name:
        return name
    steps = [(other, words) for other, words, _ in known if other.rpartition("/")[0] == name]
    best = [other for other, words in steps if "(best" in words]
    return (best or [other for other, _ in steps] or [name])[0]
