"""What can be measured: the names of the metrics, which way is better, how a figure is written.

Pure tables and checks; nothing is computed here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, Fault, near

__all__ = ["GROUPS", "KNOWN", "Measure", "Settings", "chosen", "figure", "gap", "measure", "takes_document"]


@dataclass(frozen=True)
class Measure:
    """A metric.

    Attributes:
        name: as it is asked for.
        answers: it compares generated answers with references; plain texts have none.
        lower: lower is better.
        scale: "share" (0 to 1, written as a percentage), "points" (0 to 100), or "" (a plain number).
        package: what computes it, when that is an optional package.
    """

    name: str
    answers: bool = True
    lower: bool = False
    scale: str = ""
    package: str = ""


KNOWN: Mapping[str, Measure] = {
    m.name: m
    for m in (
        Measure("perplexity", answers=False, lower=True),
        Measure("token_accuracy", answers=False, scale="share"),
        Measure("exact_match", scale="share"),
        Measure("rouge1", package="torchmetrics"),
        Measure("rouge2", package="torchmetrics"),
        Measure("rougeL", package="torchmetrics"),
        Measure("bleu", scale="points", package="sacrebleu"),
        Measure("chrf", scale="points", package="sacrebleu"),
    )
}
GROUPS: Mapping[str, tuple[str, ...]] = {"rouge": ("rouge1", "rouge2", "rougeL")}
USUAL = tuple(name for name in KNOWN if name != "chrf")
_SPELLED = {name.lower(): name for name in (*KNOWN, *GROUPS)}
# What rows are put in order by, when nobody says: what tells single answers apart best comes first.
_RANKING = ("rougeL", "chrf", "rouge1", "rouge2", "bleu", "exact_match", "perplexity", "token_accuracy")


def measure(name: str) -> Measure:
    """The metric of a name; a person's own is a plain number of which more is better."""
    return KNOWN.get(name) or Measure(name)


@dataclass(frozen=True)
class Settings:
    """How answers are made and shown.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        batch_size: rows at a time.
        rank_by: the metric that best and worst rows are told by; None: chosen, and said.
        shown: best and worst rows of each model.
    """

    max_new_tokens: int = 128
    batch_size: int = 8
    rank_by: str | None = None
    shown: int = 5

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> Settings:
        """The settings of keywords.

        Raises:
            ConfigError: unknown ones (with near names) and impossible values, all at once.
        """
        faults = []
        for name, value in given.items():
            if name not in cls.__dataclass_fields__:
                close = near(name, cls.__dataclass_fields__)
                known = ", ".join(cls.__dataclass_fields__)
                todo = f"did you mean {close[0]}?" if close else f"there are {known}"
                faults.append(Fault(name, "is not a setting of an evaluation", todo))
            elif name != "rank_by":
                least = 0 if name == "shown" else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    faults.append(Fault(name, f"must be a whole number from {least} on, not {value!r}"))
        if faults:
            raise ConfigError(faults)
        return cls(**given)


Function = Callable[..., Any]


def chosen(metrics: Any) -> tuple[tuple[str, ...] | None, dict[str, Function]]:
    """The metrics that a person asked for.

    Args:
        metrics: None, a name, a function, or several of them; names also in one string, parted by commas. "rouge"
            means its three.

    Returns:
        (names in order, own functions by name). Names are None for None: all that the rows allow.

    Raises:
        ConfigError: an unknown name (with near ones), two of one name, a function that takes too little.
    """
    if metrics is None:
        return None, {}
    if isinstance(metrics, str):
        metrics = [part.strip() for part in metrics.split(",") if part.strip()]
    items = list(metrics) if isinstance(metrics, Iterable) else [metrics]
    names: list[str] = []
    functions: dict[str, Function] = {}
    faults: list[Fault] = [] if items else [Fault("metrics", "holds nothing", "leave it out for the usual ones")]
    for item in items:
        if isinstance(item, str):
            item = _SPELLED.get(item.lower(), item)
        if callable(item):
            faults += _add_function(item, functions, names)
        elif not isinstance(item, str):
            faults.append(Fault("metrics", f"{item!r:.60} is neither a name nor a function"))
        elif item in KNOWN or item in GROUPS:
            names += [name for name in GROUPS.get(item, (item,)) if name not in names]
        else:
            close = near(item, [*KNOWN, *GROUPS])
            todo = f"did you mean {close[0]}?" if close else f"there are {', '.join(KNOWN)}, and functions of your own"
            faults.append(Fault("metrics", f"there is no metric {item!r}", todo))
    if faults:
        raise ConfigError(faults)
    return tuple(names), functions


def _add_function(item: Function, functions: dict[str, Function], names: list[str]) -> list[Fault]:
    name = getattr(item, "__name__", type(item).__name__).strip("<>")
    if name in KNOWN or name in GROUPS or functions.get(name, item) is not item:
        return [Fault("metrics", f"two metrics are called {name}", "give the function another name")]
    try:
        takes_document(item)
    except TypeError as error:
        return [
            Fault("metrics", f"{name}: {error}", "write it as f(answer, reference) or f(answer, reference, document)")
        ]
    functions[name] = item
    if name not in names:
        names.append(name)
    return []


def takes_document(function: Function) -> bool:
    """True for ``f(answer, reference, document)``, False for ``f(answer, reference)``.

    Raises:
        TypeError: it can be called with neither.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # one that is written in C and does not say
        return False
    for count in (3, 2):
        try:
            signature.bind(*(None,) * count)
            return count == 3
        except TypeError:
            continue
    raise TypeError(f"it takes {signature}")


def ranking(names: Sequence[str], functions: Iterable[str], asked: str | None) -> str:
    """What rows are put in order by: what was asked for, else a function of the person's own, else the finest metric.

    Raises:
        ConfigError: it is not among those that are measured.
    """
    if asked is None:
        return next((name for name in [*functions, *_RANKING] if name in names), names[0])
    if asked not in names:
        close = near(asked, names)
        todo = f"did you mean {close[0]}?" if close else f"measured are {', '.join(names)}"
        raise ConfigError([Fault("rank_by", f"{asked!r} is not measured", todo)])
    return asked


def figure(name: str, value: float | None) -> str:
    """A value as it is written in a table."""
    if value is None:
        return ""
    if math.isnan(value):
        return "NaN"
    scale = measure(name).scale
    if scale == "share":
        return f"{value * 100:.1f} %"
    if scale == "points":
        return f"{value:.1f}"
    if name in KNOWN and name != "perplexity":
        return f"{value:.3f}"
    return f"{value:.4g}"


def gap(name: str, value: float | None, base: float | None) -> str:
    """The difference to the base with its sign, "" where there is none to tell."""
    if value is None or base is None or not math.isfinite(value - base):
        return ""
    scale = measure(name).scale
    sign, size = ("−" if value < base else "+"), abs(value - base)
    if value == base:
        return "±0"
    if scale == "share":
        return f"{sign}{size * 100:.1f}"
    return sign + figure(name, size)
