"""What the training panel shows, as plain data: the form, the database's names, the check, the sample, the forecast.

Functions of the store and of what was typed; none of them sees a widget, and each may be called from any thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import form
from ..config import ModelSpec, TrainConfig
from ..errors import ConfigError, LlmnbError, NotFound, near
from ..query import Collection, Select
from . import words
from .plan import Plan
from .session import place
from .tables import local_time

__all__ = [
    "START",
    "WELCOME",
    "Checked",
    "check",
    "described",
    "fields",
    "form_of",
    "loaded",
    "names",
    "outlook",
    "sample",
    "seen",
    "shaped",
]

START = dict(form.PRESETS[1].values)  # what an untouched form holds
WELCOME = f"{form.PRESETS[1].name}: {form.PRESETS[1].reason}"
_SAMPLE_ROWS, _SAMPLE_CHARS = 200, 2_000_000
# What decides how rows look, and which model they are for.
_SEEN = (
    "model_name_or_path",
    "model_kwargs",
    "tokenizer_kwargs",
    "collection",
    "filter",
    "limit",
    "key",
    "key_kind",
    "method",
    "max_seq_length",
    "train_on",
    "prompt_template",
    "chat_template",
)
_SHAPED = ("use_lora", "lora_r", "lora_target_modules", "lora_bias", "bits")
_FIRST, _SECOND = ("prompt", "instruction", "question", "input"), ("response", "completion", "output", "answer")


def form_of() -> dict[str, Any]:
    """The form itself: tabs, rows, presets."""
    return {
        "tabs": list(form.TABS),
        "rows": [asdict(row) for row in form.rows()],
        "presets": [{"name": p.name, "reason": p.reason, "values": dict(p.values)} for p in form.PRESETS],
    }


def names(store: Any) -> dict[str, Any]:
    """What can be chosen: collections with their counts; bases, models and adapters of this database; past runs.

    A model is chosen by its name, and means its base with the adapter that answers.
    """
    experiments = store.checkpoints.experiments()[::-1][:20]
    adapters = [f"{name}/{c.step}" for name in experiments for c in store.checkpoints.list(name) if c.kind == "adapter"]
    bases: dict[str, str] = {}
    models: dict[str, dict[str, str]] = {}
    for identifier in store.models.identifiers():
        with contextlib.suppress(NotFound):  # none of its versions was ever ready
            record = store.models.get(identifier)
            base = str(record["spec"].get("model_name_or_path"))
            bases.setdefault(base, f"base of {identifier}")
            if record.get("checkpoint") in adapters:
                models[identifier] = {"model_name_or_path": base, "adapter_id": record["checkpoint"]}
    runs = [
        (r["_id"], f"{r.get('model')} · {local_time(r.get('created'))} · {r['state']}")
        for r in store.runs.list(limit=20)
    ]
    return {
        "place": place(store),
        "collections": sorted(store.collections().items()),
        "bases": sorted(bases.items()),
        "models": models,
        "adapters": adapters[::-1],
        "runs": runs,
    }


def fields(store: Any, collection: str) -> list[tuple[str, str]]:
    """Keys that a collection's documents offer, each with what it holds; pairs of fields first."""
    kinds: dict[str, str] = {}
    for document in store.rows(Collection(collection).find(), limit=50):
        for name, value in document.items():
            if not name.startswith("_") and value is not None:
                kinds.setdefault(name, _kind(value))
    texts = [name for name, kind in kinds.items() if kind == "text"]
    pairs = [(f"{a},{b}", "prompt and answer") for a in _FIRST for b in _SECOND if a in texts and b in texts]
    preferred = [name for name in ("chosen", "rejected") if kinds.get(name) in ("text", "chats")]
    if len(preferred) == 2:
        first = [name for name in _FIRST if name in kinds][:1]
        if first or kinds["chosen"] == "chats":
            pairs.insert(0, (",".join([*first, *preferred]), "two answers, for the method dpo"))
    return [*pairs, *((name, kind) for name, kind in kinds.items() if kind in ("text", "chats"))]


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return "chats"
    return type(value).__name__


@dataclass(frozen=True)
class Checked:
    """What was typed, checked.

    Attributes:
        faults: row → what is wrong with it.
        rest: faults of no row.
        plan: what would be trained; None when there are faults.
    """

    faults: Mapping[str, str]
    rest: Sequence[str]
    plan: Plan | None

    def to_page(self, values: form.Values) -> dict[str, Any]:
        """For the page: the faults, and the lines that do the same as the form."""
        lines = {"python": self.plan.python(), "magic": form.line(values)} if self.plan else {}
        return {"faults": dict(self.faults), "rest": list(self.rest), **lines}


def check(values: form.Values, collections: Sequence[str] = ()) -> Checked:
    """Checks what was typed, as ``freeze`` does; every fault stands at its row.

    Args:
        values: what was typed.
        collections: those of the database; a name that is not among them is a fault.
    """
    try:
        plan = Plan(*form.settings(values), names={})
    except ConfigError as error:
        return Checked(*form.by_row(error.faults), None)
    except LlmnbError as error:
        return Checked({"collection": error.what}, [], None)
    chosen = str(values.get("collection", ""))
    if chosen not in collections:
        close = near(chosen, collections)
        more = f": did you mean {close[0]}?" if close else ""
        return Checked({"collection": f"there is no collection {chosen!r}{more}"}, [], None)
    return Checked({}, [], plan)


def seen(values: form.Values) -> dict[str, Any]:
    """The part of what was typed that decides how rows look."""
    return {name: values[name] for name in _SEEN if name in values}


def shaped(values: form.Values) -> dict[str, Any]:
    """The part that decides which weights are trained."""
    return {name: values[name] for name in ("model_name_or_path", "model_kwargs", *_SHAPED) if name in values}


def described(values: form.Values) -> tuple[ModelSpec, TrainConfig] | None:
    """Model and config of a part of what was typed; None when that part has faults."""
    try:
        plan = Plan(*form.settings({"collection": "any", **values}), names={})
    except LlmnbError:
        return None
    return plan.llm.spec(), plan.parcel.config


def sample(store: Any, config: TrainConfig) -> tuple[list[dict[str, Any]], int]:
    """The first documents of the training fold, with the fields of the key; and about how many there are in all."""
    select = config.select
    assert select is not None
    key = config.key
    columns = None if key is None else {c.split(".")[0] for c in ((key,) if isinstance(key, str) else key)}
    documents: list[dict[str, Any]] = []
    size = 0
    for document in store.rows(select, fold="train", limit=_SAMPLE_ROWS):
        kept = {k: v for k, v in document.items() if columns is None or k in columns or k == "_id"}
        documents.append(kept)
        size += len(str(kept))
        if size > _SAMPLE_CHARS:
            break
    return documents, max(len(documents), _trained_on(store, select))


def _trained_on(store: Any, select: Select) -> int:
    """About how many of the selected documents are in the training fold."""
    total = int(store.estimate(select))
    if select.limit_to:
        return round(total * (1 - store.valid_share))
    valid = {"_fold": "valid"}
    narrowed = {"$and": [dict(select.filter), valid]} if select.filter else valid
    return total - int(store.execute(Collection(select.collection).count_documents(narrowed)))


def outlook(config: TrainConfig, found: int, rows: Mapping[str, Any] | None, shape: Mapping[str, Any] | None) -> str:
    """The sentence under the form: method, weights, steps, tokens, time, memory — as much as is known."""
    method = f"LoRA r {config.lora_r}" if config.use_lora else "all weights"
    parts = [f"QLoRA r {config.lora_r}, {config.bits} bits" if config.bits else method]
    parts = ["DPO", *parts] if config.method == "dpo" else parts
    model = shape.get("shape") if shape else None
    if model:
        parts.append(f"{_millions(model['trained'])} trained of {_millions(model['total'])}")
    if not rows:
        return " · ".join(parts)
    used = round(found * rows["used"] / max(rows["found"], 1))
    here = config.num_gpus in (None, 1) and config.deepspeed is None
    told = form.forecast(config, used, rows, model, shape["pace"] if shape and here else None)
    parts.append(f"{words.number(told.steps)} steps")
    parts.append(f"{_millions(told.tokens)} tokens")
    cost = [words.about(told.seconds)] if told.seconds is not None else []
    if told.memory is not None and shape:
        about = "" if cost else "about "
        cost.append(f"{about}{words.size(told.memory)} of {words.size(shape['room'])}")
    parts += [" and ".join(cost)] if cost else []
    if told.memory is not None and shape and told.memory > shape["room"]:
        parts.append("more than there is: QLoRA, a smaller batch or recomputing need less")
    return " · ".join(parts)


def _millions(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}" if value < 100 * scale else f"{value / scale:.0f} {unit}"
    return words.number(value)


def loaded(store: Any, run: str) -> tuple[dict[str, Any], list[str]]:
    """The values a past run was made of, and what the form cannot say of it.

    Raises:
        NotFound: the run was removed.
        ConfigError: it was recorded by a newer version.
    """
    record = store.runs.get(run)
    config = TrainConfig.from_json(record["config"])
    try:
        spec = ModelSpec.from_json(store.models.get(record["model"], record["version"])["spec"])
    except NotFound:
        spec = ModelSpec(identifier=record["model"])
    return form.filled(spec, config)
