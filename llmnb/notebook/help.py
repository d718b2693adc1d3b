"""``%llm_help``: what to type first, then every magic with its arguments and one sentence.

Text in a terminal, HTML in a notebook, and one screen in both. This module knows the magics' parsers, and no database.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .tables import Table

__all__ = ["Help", "magic_words", "training_in_a_terminal", "usage_of"]

_WIDE = 52  # characters of a usage; a longer one is told by --help
# Magics that take more than their parser lists.
_WRITTEN = {
    "llm_train": "[--model M --collection C [--OPTION VALUE …] [--start]]",
    "llm_resume": "[RUN] [--num_train_epochs N] [--OPTION VALUE …]",
}
_NO_DATA = "what is in it; nothing yet: from llmnb import demo; demo.load_documents(db)"
_IN_TERMINAL = ("%llm_train --model M --collection C --start", "trains in the background; %llm_watch says how far")


class Help:
    """The help of a shell's magics.

    Args:
        magics: name → the magic's function, in the order to show them.
        in_notebook: False in a terminal, where there is no panel.
    """

    def __init__(self, magics: Sequence[tuple[str, Callable[..., Any]]], in_notebook: bool) -> None:
        self.first = [
            ("db = %llm_connect", "opens the database of this folder; a server of yours: %llm_connect mongodb://…"),
            ("%llm_data", _NO_DATA),
            ("%llm_train", "the panel: choose model and documents, press Start") if in_notebook else _IN_TERMINAL,
        ]
        rows = [
            (_sign(name) + name, usage_of(name, magic), _first_sentence(magic_words(magic))) for name, magic in magics
        ]
        note = "Each takes --help. Tab completes options, and the names in your database."
        self.table = Table(("magic", "arguments", ""), rows, note=note)

    def __repr__(self) -> str:
        wide = max(len(typed) for typed, _ in self.first)
        lines = [f"{'first:' if not i else '':7}{typed:{wide}}  {what}" for i, (typed, what) in enumerate(self.first)]
        return "\n".join([*lines, "", repr(self.table)])

    def _repr_html_(self) -> str:
        rows = [f"<li><code>{html.escape(typed)}</code> &nbsp; {html.escape(what)}</li>" for typed, what in self.first]
        font = "font-family:var(--jp-ui-font-family,var(--vscode-font-family,sans-serif))"
        listed = f'<ol style="margin:4px 0 10px">{"".join(rows)}</ol>'
        head = f'<div style="{font}">Type first, each in a cell of its own:{listed}</div>'
        return f'<div class="llmnb-help">{head}{self.table._repr_html_()}</div>'


def training_in_a_terminal(collections: Mapping[str, int]) -> str:
    """What ``%llm_train`` alone says where no panel can be shown: lines to type.

    Args:
        collections: name → documents, of the connected database.
    """
    chosen = max(collections, key=lambda name: collections[name], default="COLLECTION")
    line = f"%llm_train --model facebook/opt-350m --collection {chosen}"
    listed = ", ".join(f"{name} ({count} documents)" for name, count in sorted(collections.items()))
    none = "none yet: db.execute(Collection('docs').insert_many([…]))"
    rows = (
        (line, "the plan, and the same in Python"),
        (f"{line} --start", "trains in the background"),
        ("%llm_watch", "how far it is"),
        ("%llm_train --help", "every option"),
    )
    wide = max(len(typed) for typed, _ in rows)
    return "\n".join(
        [
            "The training panel needs a notebook (`llmnb lab` opens one). Here, type a line:",
            *(f"  {typed:{wide}}  {what}" for typed, what in rows),
            f"Collections: {listed or none}",
        ]
    )


def usage_of(name: str, magic: Any) -> str:
    """The arguments of a magic as one writes them: ``[COLLECTION] [--filter F] …``."""
    if name in _WRITTEN:
        return _WRITTEN[name]
    parts = []
    for action in sorted(magic.parser._actions, key=lambda a: bool(a.option_strings)):
        if "--help" in action.option_strings or action.help == "==SUPPRESS==":
            continue
        parts.append(_one(action))
    usage = ""
    for part in parts:
        if len(usage) + len(part) > _WIDE:
            return f"{usage} …"
        usage = f"{usage} {part}".strip()
    return usage


def _one(action: Any) -> str:
    if not action.option_strings:
        word = str(action.metavar or action.dest).upper()
        return {"?": f"[{word}]", "*": f"[{word} …]"}.get(str(action.nargs), word)
    value = ""
    if action.nargs != 0:
        some = "|".join(map(str, action.choices)) if action.choices else ""
        value = f" {some or str(action.metavar or action.dest).upper()}"
    return f"[{action.option_strings[0]}{value}]"


def magic_words(function: Any) -> str:
    """A magic's own docstring, without the usage that IPython puts before it."""
    return str(function.parser.description or "")


def _sign(name: str) -> str:
    return "%%" if name == "llm_chat" else "%"


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].rstrip(".") + "."
