"""LLMTrainer: settings while a person still changes them; ``freeze()`` checks them all and makes a TrainConfig.

``freeze()`` is the only validation. It needs neither torch nor a database: option names and types are read from
the installed transformers' source text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from . import checks, options
from .chat_templates import PRESETS
from .config import ModelSpec, TrainConfig, thaw
from .errors import ConfigError, Fault, LlmnbError, near
from .job import source_text
from .query import Select

__all__ = ["LLMTrainer", "LLMTrainingConfiguration", "Parcel"]

# Fields of TrainConfig that are written another way on the trainer.
_DERIVED = {"arguments"}
# Settings that live beside the config: they may hold objects or addresses.
_BESIDE: dict[str, Any] = {"ray_address": None, "transform": None, "training_kwargs": {}, "ray_configs": {}}


@dataclass(frozen=True)
class Parcel:
    """What ``freeze`` gives: the config, and the objects that travel beside it."""

    config: TrainConfig
    transform: Callable[..., Any] | None = None
    trainer_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)
    ray_configs: dict[str, Any] = field(default_factory=dict, repr=False)
    ray_address: str | None = None
    notes: tuple[str, ...] = ()


class LLMTrainer:
    """How to fine-tune a language model.

    Every option of the installed ``transformers.TrainingArguments`` is accepted by name, and the older names of
    many of them (``evaluation_strategy``, ``warmup_ratio``, ``no_cuda``, …). Attributes may be set until the
    training starts.

    Args:
        identifier: the trainer's name in the database.
        **settings: see ``llmnb.config.TrainConfig`` for those of our own; all others belong to
            TrainingArguments (https://huggingface.co/docs/transformers/main_classes/trainer).
            ``transform`` is a function ``(*values) -> dict`` run on every row; ``training_kwargs`` are keyword
            arguments of ``transformers.Trainer`` (``callbacks``, ``compute_metrics``, …); ``ray_configs`` those of
            ``ray.train.torch.TorchTrainer``.

    Raises:
        ConfigError: a name that is not known, with near names.
    """

    _own: Mapping[str, Any]

    def __init__(self, identifier: str = "llm-trainer", **settings: Any) -> None:
        object.__setattr__(self, "_values", {})
        object.__setattr__(self, "_faults", {})
        self._set_all({"identifier": identifier, **settings})

    # -- attributes ------------------------------------------------------------------------------------------

    def _set_all(self, settings: Mapping[str, Any]) -> None:
        unknown: list[Fault] = []
        for name, value in settings.items():
            fault = self._set(name, value)
            if fault:
                unknown.append(fault)
        if unknown:
            raise ConfigError(unknown)

    def _set(self, name: str, value: Any) -> Fault | None:
        today = options.canonical(name, value)
        self._faults.pop(name, None)
        if isinstance(today, Fault):
            self._faults[name] = today  # reported with all others by freeze()
            return None
        for real, real_value in today.items():
            if real not in self.names():
                close = near(name, sorted(self.names() | options.synonyms()))
                hint = "did you mean " + " or ".join(close) + "?" if close else "LLMTrainer.names() lists them all"
                return Fault(name, "is not an option of LLMTrainer", hint)
            self._values[real] = real_value
        return None

    @staticmethod
    def names() -> frozenset[str]:
        """Every option's name."""
        own = {f.name for f in fields(TrainConfig)} - _DERIVED
        return frozenset(own | set(_BESIDE) | set(options.training_arguments()))

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._set_all({name: value})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        today = options.canonical(name, None)
        if isinstance(today, dict) and today:
            name = next(iter(today))
        if name in self._values:
            return self._values[name]
        for f in fields(TrainConfig):
            if f.name == name and name not in _DERIVED:
                return getattr(_DEFAULTS, name)
        if name in _BESIDE:
            return _BESIDE[name]
        if name in options.training_arguments():
            return options.training_arguments()[name].default
        close = near(name, sorted(self.names()))
        raise AttributeError(f"LLMTrainer has no option {name!r}" + (f"; near: {', '.join(close)}" if close else ""))

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self.names()})

    def __repr__(self) -> str:
        hidden = {"ray_address"}
        shown = ", ".join(f"{k}={v!r}" for k, v in self._values.items() if k not in hidden)
        return f"LLMTrainer({shown})"

    def given(self) -> dict[str, Any]:
        """The settings that were given, in today's names."""
        return dict(self._values)

    def copy(self, **changes: Any) -> LLMTrainer:
        """A trainer with the same settings, some of them changed."""
        twin = LLMTrainer()
        twin._set_all({**self._values, **changes})
        return twin

    # -- freezing --------------------------------------------------------------------------------------------

    def freeze(self, model: ModelSpec | None = None) -> Parcel:
        """Checks every setting, once, and gives the frozen config.

        Args:
            model: the model to be trained; its ``bits`` must not contradict the trainer's.

        Raises:
            ConfigError: with all faults together.
        """
        faults = list(self._faults.values())
        values = dict(self._values)
        own = {f.name for f in fields(TrainConfig)} - _DERIVED
        arguments: dict[str, Any] = {}
        mine: dict[str, Any] = {}
        for name, value in values.items():
            if name in own or name in _BESIDE:
                mine[name] = value
                continue
            checked, fault = options.check(name, value)
            if fault:
                faults.append(fault)
            arguments[name] = checked
        faults += checks.own_faults(mine)
        faults += checks.cross_faults(mine, arguments)
        transform, note = mine.pop("transform", None), []
        if transform is not None:
            mine["transform"] = source_text(transform)
        ray_address = mine.pop("ray_address", None)
        trainer_kwargs = dict(mine.pop("training_kwargs", None) or {})
        ray_configs = dict(mine.pop("ray_configs", None) or {})
        faults += checks.passed_on_faults(trainer_kwargs, ray_configs)
        if trainer_kwargs:
            mine["training_kwargs"] = ", ".join(sorted(trainer_kwargs))
        if ray_configs:
            mine["ray_configs"] = ", ".join(sorted(ray_configs))
        if model is not None:
            fault = checks.model_fault(model.bits, mine.get("bits"))
            if fault:
                faults.append(fault)
            elif mine.get("bits") is None and model.bits is not None:
                mine["bits"] = model.bits
        if mine.get("bits") in (4, 8) and mine.get("use_lora") is False:
            faults.append(Fault("bits", "quantised weights cannot be trained", "set use_lora=True, or leave bits out"))
        faults += checks.lora_faults(mine, trainer_kwargs)
        faults += checks.dpo_faults(mine, arguments, trainer_kwargs, model)
        faults += checks.streaming_faults(mine, arguments, model)
        if faults:
            raise ConfigError(faults)
        mine["chat_template"] = PRESETS.get(mine.get("chat_template") or "", mine.get("chat_template"))
        if "overwrite_output_dir" in self._values:
            note.append("overwrite_output_dir: each run has a folder of its own, so nothing is overwritten")
        config = TrainConfig(**mine, arguments=arguments)
        return Parcel(config, transform, trainer_kwargs, ray_configs, ray_address, tuple(note))

    @classmethod
    def from_config(cls, config: TrainConfig) -> LLMTrainer:
        """A trainer with a recorded config's settings (without the objects that were never stored)."""
        data = {
            f.name: thaw(getattr(config, f.name))
            if not isinstance(getattr(config, f.name), Select)
            else getattr(config, f.name)
            for f in fields(TrainConfig)
            if f.name not in _DERIVED | set(_BESIDE) and getattr(config, f.name) != getattr(_DEFAULTS, f.name)
        }
        for name in ("key",):
            if isinstance(data.get(name), list):
                data[name] = tuple(data[name])
        data["eval_selects"] = dict(config.eval_selects)
        trainer = cls()
        trainer._set_all({**{k: v for k, v in data.items() if v or k != "eval_selects"}, **thaw(config.arguments)})
        return trainer


_DEFAULTS = TrainConfig()


class LLMTrainingConfiguration(LLMTrainer):
    """An older name of ``LLMTrainer``."""


def settle(trainer: Any, model: ModelSpec) -> Parcel:
    """Freezes whatever a person gave as a trainer.

    Raises:
        LlmnbError: it is no trainer.
    """
    if isinstance(trainer, LLMTrainer):
        return trainer.freeze(model)
    if isinstance(trainer, TrainConfig):
        return Parcel(trainer)
    raise LlmnbError(
        "The trainer of a model must be an LLMTrainer.",
        seen=type(trainer).__name__,
        todo="trainer=LLMTrainer(select=Collection(…).find(), key=…)",
    )
