"""What ``%llm_train`` was asked for, before anything starts: the model, its settings, the Python line.

A plan is checked as a whole (``freeze``) and shown in words. It knows options and models, no engine and no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .. import options
from ..config import ModelSpec, TrainConfig, unit_of
from ..errors import ConfigError, Fault
from ..query import Select
from .tables import Table, short

__all__ = ["Plan", "select_code"]

# Settings that a person wants to see even when they gave none of them.
_ALWAYS = (
    "use_lora",
    "lora_r",
    "max_seq_length",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "eval_strategy",
    "save_strategy",
)
_UNITS = {
    "learning_rate": "per step",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "save_steps": "steps",
    "eval_steps": "steps",
    "logging_steps": "steps",
    "warmup_steps": "steps",
    "per_device_train_batch_size": "rows",
    "per_device_eval_batch_size": "rows",
    "gradient_accumulation_steps": "batches per step",
}


class Plan:
    """One training, described.

    Args:
        model: keyword arguments of ``LLM``.
        trainer: keyword arguments of ``LLMTrainer``.
        llm: an ``LLM`` the person already has; then ``model`` must be empty, and ``trainer`` changes its trainer.
        names: variable name → object, for what was given by name; the Python line then says the name.
    """

    def __init__(
        self, model: Mapping[str, Any], trainer: Mapping[str, Any], *, llm: Any = None, names: Mapping[str, Any]
    ) -> None:
        from ..llm import LLM
        from ..trainer import LLMTrainer

        self._names = {id(value): name for name, value in names.items() if not name.startswith("_")}
        self.given = {**model, **trainer}
        if llm is not None:
            if model:
                todo = "leave --llm out, or change the LLM itself"
                raise ConfigError([Fault(f"--{name}", "cannot be given together with --llm", todo) for name in model])
            base = llm.trainer if llm.trainer is not None else LLMTrainer(f"{llm.identifier}-trainer")
            llm.trainer = base.copy(**trainer) if trainer else base
            self.llm = llm
        else:
            if not model.get("model_name_or_path"):
                raise ConfigError(
                    [Fault("--model", "is needed", "a hub id or a folder; or --llm NAME of an LLM you have")]
                )
            identifier = str(model.get("identifier") or _name_of(str(model["model_name_or_path"])))
            self._model = {"identifier": identifier, **model}
            self.llm = LLM(**self._model, trainer=LLMTrainer(f"{identifier}-trainer", **trainer))
        self.by_llm = llm is not None
        self.parcel = self.llm.trainer.freeze(self.llm.spec())
        if self.parcel.config.select is None:
            raise ConfigError([Fault("--collection", "is needed: which documents to train on", "%llm_data lists them")])

    # -- in words --------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """The settings that were given, and those a person wants to know, with their consequence."""
        spec, config = self.llm.spec(), self.parcel.config
        rows: list[Sequence[Any]] = [("model", spec.model_name_or_path, _help("model_name_or_path"))]
        rows.append(("documents", select_code(config.select), "which documents to train on"))
        given = [name for name in self.given if name not in ("model_name_or_path", "select")]
        always = [n for n in _ALWAYS if n not in given and not (n == "lora_r" and not config.use_lora)]
        for name in [*given, *always]:
            source = spec if name in {f.name for f in fields(ModelSpec)} - {"bits"} else self.llm.trainer
            by_name = self._names.get(id(self.given[name])) if callable(self.given.get(name)) else None
            value = short(by_name or _plain(getattr(source, name)), 40)
            unit = _unit(name) if value not in ("None", "none") else ""
            words = " ".join(part for part in (value, unit, "" if name in self.given else "(default)") if part)
            rows.append((name, words, _help(name)))
        said = "Nothing was started. The same line with --start trains in the background."
        return Table(("setting", "value", "what it does"), rows, caption=said)

    def python(self) -> str:
        """The Python lines that do the same."""
        if self.by_llm:
            name = self._names.get(id(self.llm), "llm")
            lines = [f"{name}.trainer.{key} = {self._code(value)}" for key, value in self.given.items()]
            return "\n".join([*lines, f"run = db.apply({name}, wait=False)"])
        model = dict(self._model)
        identifier, path = model.pop("identifier"), model.pop("model_name_or_path")
        trainer = {k: v for k, v in self.given.items() if k not in self._model}
        settings = [repr(f"{identifier}-trainer"), *(f"{key}={self._code(value)}" for key, value in trainer.items())]
        more = [f"{key}={self._code(value)}" for key, value in model.items()]
        return "\n".join(
            [
                "from llmnb import Collection, LLM, LLMTrainer",
                _call("trainer = LLMTrainer", settings),
                _call("llm = LLM", [repr(identifier), repr(path), *more, "trainer=trainer"]),
                "run = db.apply(llm, wait=False)",
            ]
        )

    def _code(self, value: Any) -> str:
        if isinstance(value, Select):
            return self._names.get(id(value)) or select_code(value)
        if callable(value) or not isinstance(value, (str, int, float, bool, type(None), dict, list, tuple)):
            return self._names.get(id(value), repr(value))
        return repr(value)


def _call(head: str, arguments: Sequence[str]) -> str:
    """A call in one line, or with one argument in each when that would be long."""
    line = f"{head}({', '.join(arguments)})"
    return line if len(line) <= 88 else head + "(\n" + "".join(f"    {a},\n" for a in arguments) + ")"


def _plain(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _name_of(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "llm"


def _unit(name: str) -> str:
    if name in TrainConfig.__dataclass_fields__:
        return unit_of(TrainConfig, name)
    return _UNITS.get(name, "")


def _help(name: str) -> str:
    for cls in (ModelSpec, TrainConfig):
        if name in cls.__dataclass_fields__:
            return str(cls.__dataclass_fields__[name].metadata.get("help", ""))
    option = options.training_arguments().get(name)
    return short(option.help.split(". ")[0].rstrip("."), 80) if option else ""


def select_code(select: Select | None) -> str:
    """A selection as the Python that makes it."""
    if select is None:
        return "None"
    name = f"Collection({select.collection!r})"
    if select.pipeline is not None:
        return f"{name}.aggregate({list(select.pipeline)!r})"
    filter_, projection = (dict(select.filter) if select.filter else None), select.projection
    words = [repr(filter_)] if filter_ or projection is not None else []
    words += [repr(projection)] if projection is not None else []
    code = f"{name}.find({', '.join(words)})"
    for pair in select.sort_by:
        code += f".sort({pair[0]!r}, {pair[1]})"
    if select.skip_first:
        code += f".skip({select.skip_first})"
    return code + (f".limit({select.limit_to})" if select.limit_to else "")
