"""What was typed into the form as settings, settings as what would be typed, and faults at their rows.

What was typed is a mapping from row names to texts (True or False for a yes-or-no row); only what differs from the
row's default counts.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from .. import options
from ..config import ModelSpec, TrainConfig, thaw
from ..errors import ConfigError, Fault
from ..query import Collection, Select
from .rows import rows, text_of, types_of

__all__ = ["MODEL_ONLY", "Values", "by_row", "filled", "line", "selection", "settings", "spell", "typed"]

Values = Mapping[str, Any]
# Settings of ``LLM``; all others are ``LLMTrainer``'s.
MODEL_ONLY = frozenset(f.name for f in fields(ModelSpec)) - {"bits", "task"}
_LINES = ("chat_template", "prompt_template")  # may have several lines; \n is typed for the end of one
_ALL = frozenset({"bool", "int", "float", "str", "list", "dict", "None"})


def typed(name: str, text: str) -> Any:
    """A setting that was typed as text, as Python: ``"2e-4"`` → 0.0002, a key ``"prompt,response"`` → a tuple."""
    if name in _LINES:
        text = text.replace("\\n", "\n")
    value = options.parse(name, text, types_of(name) or _ALL)
    if isinstance(value, float) and text.strip().lstrip("+-").isdigit():
        value = int(text)  # as it was typed; taken where a float is asked for
    if name in ("key", "X") and isinstance(value, str) and "," in value:
        return tuple(part.strip() for part in value.split(","))
    if name in ("key", "X") and isinstance(value, list):
        return tuple(value)
    if name == "lora_target_modules" and isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",")]
    return value


def settings(values: Values) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments of ``LLM`` and of ``LLMTrainer`` for what was typed.

    Raises:
        ConfigError: a filter or a limit that is none; no model; no collection.
        QueryError: the collection's name cannot be one.
    """
    model: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    given = _given(values)
    faults = [
        Fault(name, "is needed", todo)
        for name, todo in (
            ("model_name_or_path", "a hub id or a folder"),
            ("collection", "which documents to train on"),
        )
        if not given.get(name)
    ]
    for name, value in given.items():
        if name not in ("collection", "filter", "limit"):
            read = typed(name, value) if isinstance(value, str) else value
            (model if name in MODEL_ONLY else trainer)[name] = read
    limit = given.get("limit", "0")
    if "limit" in given and not (limit.isdigit() and int(limit)):
        faults.append(Fault("limit", f"must be a whole number from 1, not {limit!r:.40}", "leave it empty for all"))
    elif given.get("collection"):
        try:
            trainer = {"select": selection(given["collection"], given.get("filter"), int(limit)), **trainer}
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return model, trainer


def _given(values: Values) -> dict[str, Any]:
    """What differs from the defaults, in the order of the form."""
    given = {}
    for row in rows():
        value = values.get(row.name, row.default)
        value = value.strip() if isinstance(value, str) and row.name not in _LINES else value
        if value not in (row.default, ""):
            given[row.name] = value
    return given


def selection(collection: str, filter_text: str | None, limit: int | None) -> Select:
    """A collection, a filter and a limit as a query.

    Raises:
        ConfigError: the filter is not a dict.
        QueryError: the collection's name cannot be one.
    """
    found = options.parse("filter", filter_text, frozenset({"dict"})) if filter_text else {}
    if not isinstance(found, dict):
        raise ConfigError([Fault("--filter", f"is not a MongoDB filter: {filter_text}", """like '{"lang": "en"}'""")])
    select = Collection(collection).find(found)
    return select.limit(limit) if limit else select


def by_row(faults: Iterable[Fault]) -> tuple[dict[str, str], list[str]]:
    """Each fault at its row, and those that belong to none, as sentences."""
    names = {row.name for row in rows()}
    at: dict[str, str] = {}
    rest = []
    for fault in faults:
        name = options.canonical(re.split(r"\W", fault.option.lstrip("-"))[0], None)
        row = next(iter(name), "") if isinstance(name, dict) else ""
        row = "collection" if row == "select" else row
        words = fault.what + (f": {fault.todo}" if fault.todo else "")
        if row in names:
            at[row] = f"{at[row]}; {words}" if row in at else words
        else:
            rest.append(f"{fault.option} {words}")
    return at, rest


# --- back -----------------------------------------------------------------------------------------------------


def filled(spec: ModelSpec, config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """The values that a recorded training was made of, and what the form cannot say, by name."""
    recorded = {**{f.name: getattr(spec, f.name) for f in fields(spec)}, **thaw(config.arguments)}
    recorded.update({f.name: getattr(config, f.name) for f in fields(config) if f.name != "identifier"})
    recorded["prompt_template"] = config.prompt_template or (
        spec.prompt_template if spec.prompt_template != "{input}" else None
    )
    recorded["bits"] = config.bits if config.bits is not None else spec.bits
    left = [name for name in ("transform", "eval_selects", "ray_configs", "training_kwargs") if recorded.get(name)]
    select = config.select
    if select is not None:
        recorded["collection"] = select.collection
        recorded["filter"] = dict(select.filter) if select.filter else None
        recorded["limit"] = select.limit_to or None
        odd = (select.pipeline, select.projection, select.sort_by, select.skip_first)
        left += ["aggregation, projection, sort or skip"] if any(odd) else []
    values = {}
    for row in rows():
        text = text_of(recorded[row.name]) if row.name in recorded else row.default
        if text != row.default and not (row.kind == "yes" and text == ""):
            values[row.name] = text.replace("\n", "\\n") if row.name in _LINES else text
    return values, left


def spell(name: str, value: Any) -> str:
    """The words of a magic line for one setting: ``--learning_rate 0.0002``."""
    if value is True:
        return f"--{name}"
    if name == "key" and isinstance(value, tuple):
        text = ",".join(value)
    elif isinstance(value, (dict, list, tuple)):
        text = json.dumps(value)
    elif value is None:
        text = "none"
    else:
        text = str(value).replace("\n", "\\n") if name in _LINES else str(value)
    return f"--{name} {shlex.quote(text)}"


def line(values: Values) -> str:
    """The magic line that does the same as the form."""
    words = []
    for name, value in _given(values).items():
        option = "model" if name == "model_name_or_path" else name
        plain = value if isinstance(value, bool) or name in ("collection", "filter", "limit") else typed(name, value)
        words.append(spell(option, plain))
    return " ".join(["%llm_train", *words, "--start"])
