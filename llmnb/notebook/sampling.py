"""How an answer is drawn: what a person typed into four fields, as options of ``generate`` and in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError, Fault

__all__ = ["Typed", "sampled", "sampling_of", "sampling_words"]

_FIELDS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda v: v > 0, "a whole number from 1"),
    "temperature": (float, lambda v: 0 <= v < 100, "a number from 0; 0 is greedy"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0, up to 1"),
    "seed": (int, lambda v: 0 <= v < 2**63, "a whole number from 0"),
}


def sampling_of(typed: Mapping[str, str]) -> dict[str, Any]:
    """The typed settings as numbers; an empty field is not among them.

    Raises:
        ConfigError: with every fault.
    """
    found: dict[str, Any] = {}
    faults = []
    for name, (kind, fits, hint) in _FIELDS.items():
        text = str(typed.get(name) or "").strip()
        if not text:
            continue
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            faults.append(Fault(name, f"cannot be {text}", hint))
        else:
            found[name] = value
    if faults:
        raise ConfigError(faults)
    return found


def sampled(sampling: Mapping[str, Any]) -> bool:
    """True when answers are drawn, not greedy."""
    if "do_sample" in sampling:
        return bool(sampling["do_sample"])
    return any(sampling.get(n) for n in ("temperature", "top_p", "top_k", "min_p", "typical_p"))


def sampling_words(sampling: Mapping[str, Any]) -> str:
    """The settings in words: "greedy", or each of them."""
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in sampling.items()]
    return " · ".join(parts if sampled(sampling) else ["greedy", *(p for p in parts if not p.startswith("seed"))])


class Typed:
    """The fields as they are typed, and the options that have none.

    Attributes:
        fields: text by name.
        faults: what is wrong with a field, by name.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.fields = {name: "" if given.get(name) is None else str(given[name]) for name in _FIELDS}
        self.faults: dict[str, str] = {}
        self._more = {name: value for name, value in given.items() if name not in _FIELDS}

    def take(self, values: Mapping[str, Any]) -> None:
        """What the page says now."""
        self.fields = {name: str(values.get(name) or "") for name in _FIELDS}
        self._check()

    def options(self) -> dict[str, Any]:
        """Options of ``generate``.

        Raises:
            ConfigError: with every fault.
        """
        self._check()
        if self.faults:
            raise ConfigError([Fault(name, words) for name, words in self.faults.items()])
        return {**sampling_of(self.fields), **self._more}

    def more(self) -> str:
        """The options without a field, in words."""
        return sampling_words(self._more).removeprefix("greedy").strip(" ·") if self._more else ""

    def _check(self) -> None:
        self.faults = {}
        try:
            sampling_of(self.fields)
        except ConfigError as error:
            self.faults = {f.option: f"{f.what}: {f.todo}" for f in error.faults}
