"""Tab completion on the lines of our magics: options, their choices, runs, checkpoints, collections.

It looks into the database only when one is connected already, and it never raises into the person's typing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import LlmnbError

__all__ = ["Matcher"]

_OURS = re.compile(r"^\s*(?:[A-Za-z_][\w, ]*=\s*)?%{1,2}(llm_\w+)\s+(.*)$", re.DOTALL)
_ENOUGH = 200  # completions; more than that nobody reads


class Matcher:
    """The completer's matcher for one session. Callable with IPython's ``CompletionContext``."""

    def __init__(self, session: Any, magics: Any) -> None:
        self._session, self._magics = session, magics

    def install(self) -> None:
        """Adds the matcher to the shell."""
        from IPython.core.completer import context_matcher

        def llmnb_matcher(context: Any) -> dict[str, Any]:
            return self.complete(context.line_with_cursor.split("\n")[-1][: context.cursor_position])

        self._matcher = context_matcher()(llmnb_matcher)
        self._session.shell.Completer.custom_matchers.append(self._matcher)

    def remove(self) -> None:
        """Takes it out again."""
        matchers = self._session.shell.Completer.custom_matchers
        if self._matcher in matchers:
            matchers.remove(self._matcher)

    def complete(self, line: str) -> dict[str, Any]:
        """The completions at the end of ``line``, in IPython's form."""
        found = _OURS.match(line)
        if not found:
            return {"completions": []}
        from IPython.core.completer import SimpleCompletion

        magic, rest = found.groups()
        fragment = "" if rest[-1:].isspace() else (rest.split() or [""])[-1]
        before = rest[: len(rest) - len(fragment)].split()
        try:
            words = self._words(magic, before, fragment)
        except LlmnbError:
            words = []
        matches = [w for w in words if w.startswith(fragment)][:_ENOUGH]
        return {
            "completions": [SimpleCompletion(text=word, type="magic") for word in matches],
            "suppress": True,
            "matched_fragment": fragment,
        }

    def _words(self, magic: str, before: list[str], fragment: str) -> Iterable[str]:
        if fragment.startswith("--"):
            return self._options(magic)
        last = before[-1] if before else ""
        if last.startswith("--"):
            values = self._values(magic, last[2:].replace("-", "_"))
            if values is not None:
                return values
        if not before:
            return self._positional(magic) or (self._options(magic) if not fragment else ())
        return self._options(magic) if not fragment else ()

    def _options(self, magic: str) -> list[str]:
        from .arguments import known_settings, option_names

        function = getattr(self._magics, magic, None)
        names = option_names(function.parser) if function is not None else []
        if magic == "llm_train":
            names = [*names, *(f"--{name}" for name in known_settings())]
        return sorted({*names, "--help"} - {"-h"})

    def _values(self, magic: str, option: str) -> list[str] | None:
        from .. import options
        from .arguments import types_of

        if option == "collection":
            return self._positional("llm_data")
        if option == "checkpoint":
            return self._positional("llm_checkpoints", steps=True)
        if option == "compare":
            return ["base"]
        if magic not in ("llm_train", "llm_resume"):
            return None
        known = options.training_arguments().get(option)
        if known is not None and known.choices:
            return list(known.choices)
        if "bool" in (types_of(option) or ()):
            return ["true", "false"]
        return None

    def _positional(self, magic: str, steps: bool = False) -> list[str]:
        if not self._session.connected:
            return []
        store = self._session.database().store
        if magic in ("llm_watch", "llm_stop", "llm_resume"):
            return [record["_id"] for record in store.runs.list(limit=50)]
        if magic == "llm_data":
            return sorted(store.collections())
        if magic == "llm_checkpoints":
            names = store.checkpoints.experiments()[::-1]
            if steps:
                return [*names, *(f"{name}/{c.step}" for name in names[:10] for c in store.checkpoints.list(name))]
            return names
        return []
