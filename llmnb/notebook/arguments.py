"""The line behind a magic, read: quotes, Python variables, and ``--name value`` for every training option.

Faults are ``ConfigError``s with near names, all at once. This module knows neither database nor display.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

from .. import options
from ..errors import ConfigError, Fault, LlmnbError, near
from ..form import MODEL_ONLY, typed, types_of
from ..options import named
from .faults import mark

__all__ = ["OBJECTS", "bordered", "expanded", "named", "settings", "split", "types_of"]

# A name that stands for a Python object of the notebook. Plain words ("text", "steps") are never looked up.
OBJECTS = frozenset(
    {
        "select",
        "transform",
        "eval_selects",
        "deepspeed",
        "ray_configs",
        "training_kwargs",
        "model_kwargs",
        "tokenizer_kwargs",
        "predict_kwargs",
    }
)
_SHORT = {"model": "model_name_or_path"}
_VARIABLE = re.compile(r"\$\$|\$([A-Za-z_]\w*)|\{([A-Za-z_][\w.]*)\}")


def split(line: str) -> list[str]:
    """The words of a line, quotes taken off.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError([Fault(line.strip()[:60], str(error).lower(), "close the quote")]) from None


def expanded(line: str, names: Mapping[str, Any]) -> str:
    """``$name`` and ``{name}`` and ``{name.field}`` replaced by the notebook's variables; ``$$`` is a dollar.

    Unlike IPython's own expansion it leaves JSON alone: ``{"a": 1}`` stays what it is.
    """

    def value(match: re.Match[str]) -> str:
        if match.group() == "$$":
            return "$"
        first, *rest = (match.group(1) or match.group(2)).split(".")
        if first not in names:
            return match.group()
        found = names[first]
        for part in rest:
            if not hasattr(found, part):
                return match.group()
            found = getattr(found, part)
        return str(found)

    return _VARIABLE.sub(value, line)


def bordered(magic: Callable[..., Any]) -> Callable[..., Any]:
    """The border of a magic: reads the line for it, answers ``--help``, and marks its errors to be shown short.

    The magic is called with the parsed arguments, the words that were not understood, and the cell's text. It gets
    the unread words only when its parser is open (``%llm_train``, ``%%llm_chat``); else they are faults.
    """

    @wraps(magic)
    def run(self: Any, line: str = "", cell: str | None = None) -> Any:
        parser = run.parser  # type: ignore[attr-defined]
        try:
            words = split(expanded(line, self.shell.user_ns))
            if "--help" in words or "-h" in words:
                print(parser.format_help().replace("::\n\n", "").strip())
                self.more_help(magic.__name__)
                return None
            parser.allow_abbrev = False
            parser.error = _refuse
            known, rest = parser.parse_known_args(words)
            if rest and not getattr(run, "open", False):
                raise ConfigError(_unread(rest, option_names(parser)))
            return magic(self, known, rest, cell)
        except LlmnbError as error:
            raise mark(error)  # noqa: B904 - the same error, not another

    return run


def _refuse(message: str) -> None:
    name, _, what = message.rpartition(": ")
    raise ConfigError([Fault(name.removeprefix("argument ") or "the line", what, "--help shows what is possible")])


def option_names(parser: Any) -> list[str]:
    """The options of a parser, as they are typed."""
    return [name for action in parser._actions for name in action.option_strings]


def _unread(words: Sequence[str], known: Iterable[str]) -> list[Fault]:
    known = [*known, "--help"]
    faults = []
    for before, word in zip(["", *words], words):
        if before.startswith("--") and "=" not in before and not word.startswith("-"):
            continue  # the value of the option that is told already
        close = near(word.split("=")[0], known)
        hint = "did you mean " + " or ".join(close) + "?" if close else "--help shows what is possible"
        faults.append(Fault(word, "is not understood", hint))
    return faults


def known_settings() -> list[str]:
    """Every name that ``%llm_train`` takes."""
    from ..trainer import LLMTrainer

    return sorted(LLMTrainer.names() | MODEL_ONLY | set(_SHORT) | options.synonyms())


def settings(given: Mapping[str, str | None], names: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Typed words as the keyword arguments of ``LLM`` and of ``LLMTrainer``.

    Args:
        given: option → text, None for an option without a value (True for a yes-or-no option).
        names: the notebook's variables, for options that take an object by name.

    Raises:
        ConfigError: every unknown option with near names, every missing value.
    """
    model: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    faults: list[Fault] = []
    for written, text in given.items():
        name = _SHORT.get(written, written)
        types = types_of(name)
        if types is None:
            close = near(written, known_settings())
            hint = "did you mean " + " or ".join(f"--{c}" for c in close) + "?" if close else "%llm_train --help"
            faults.append(Fault(f"--{written}", "is not an option", hint))
            continue
        if text is None:
            if "bool" not in types:
                faults.append(Fault(f"--{written}", "needs a value", f"--{written} VALUE"))
                continue
            value: Any = True
        else:
            value = _value(name, text, names)
        (model if name in MODEL_ONLY else trainer)[name] = value
    if faults:
        raise ConfigError(faults)
    return model, trainer


def _value(name: str, text: str, names: Mapping[str, Any]) -> Any:
    return names[text] if name in OBJECTS and text.isidentifier() and text in names else typed(name, text)
