"""Tab completion on the lines of our magics: options, their choices, runs, checkpoints, collections.

It looks into the database only when one is connected already, and it never raises into the person's typing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import LlmnbError, NotFound

__all__ = ["Matcher"]

_OURS = re.compile(r"^\s*(?:[A-Za-z_][\w, ]*=\s*)?%{1,2}(llm_\w+)\s+(.*)$", re.DOTALL)
_STATES = ("queued", "starting", "running", "stopping", "done", "failed", "stopped", "lost")
# Option → the class of what it takes; all others take a dict.
_TYPES = {"llm": "LLM", "select": "Query", "uri": "Datalayer"}
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
        function = getattr(self._magics, magic, None)
        actions = function.parser._actions if function is not None else []
        if fragment.startswith("--"):
            return self._options(magic)
        option = _open_option(before, actions)
        if option is not None:
            values = self._values(magic, option, before, actions)
            return values or []  # what nobody knows is IPython's to complete: a folder
        options = self._options(magic) if not fragment else []
        several = any(not action.option_strings and action.nargs == "*" for action in actions)
        if _positionals(before, actions) and not several:
            return options
        found = [word for word in self._positional(magic, fragment) if word not in before]
        return [*found, *options] if before or not found else found

    def _options(self, magic: str) -> list[str]:
        from .arguments import known_settings, option_names

        function = getattr(self._magics, magic, None)
        names = option_names(function.parser) if function is not None else []
        if magic == "llm_train":
            names = [*names, *(f"--{name}" for name in known_settings())]
        return sorted({*names, "--help"} - {"-h"})

    def _values(self, magic: str, option: str, before: list[str], actions: Sequence[Any]) -> list[str] | None:
        """What can stand after ``--option``; None when that is anything, or the option takes nothing."""
        from .. import options
        from .arguments import OBJECTS, types_of

        if option in ("metrics", "rank_by"):
            from ..evaluation.measures import GROUPS, KNOWN

            return [*KNOWN, *(() if option == "rank_by" else GROUPS), *self._variables("transform")]
        if option in OBJECTS or option == "llm":
            return self._variables(option)
        if option in ("checkpoint", "compare", "adapter_id"):
            return [*(["base"] if option == "compare" else []), *self._checkpoints(steps=True)]
        named = {"collection": self._collections, "model": self._bases, "model_name_or_path": self._bases}
        named.update(
            save=self._collections,
            history=self._chats,
            keep=self._chats,
            identifier=self._models,
            key=lambda: self._columns(before),
        )
        if option in named:
            return named[option]()
        if option == "state":
            return list(_STATES)
        for action in actions:
            if f"--{option}" in action.option_strings and action.choices:
                return [str(choice) for choice in action.choices]
        if magic not in ("llm_train", "llm_resume"):
            return None
        known = options.training_arguments().get(option)
        if known is not None and known.choices:
            return list(known.choices)
        if "bool" in (types_of(option) or ()):
            return ["true", "false"]
        return None

    def _positional(self, magic: str, fragment: str) -> list[str]:
        if magic in ("llm_watch", "llm_stop", "llm_resume"):
            store = self._store()
            return [record["_id"] for record in store.runs.list(limit=50)] if store else []
        if magic == "llm_data":
            return self._collections()
        if magic == "llm_evaluate":
            return self._checkpoints(steps=True)
        if magic == "llm_checkpoints":
            return self._checkpoints(steps="/" in fragment)
        return self._variables("uri") if magic == "llm_connect" else []

    # -- names in the database, none before it is connected -----------------------------------------------------

    def _store(self) -> Any:
        return self._session.database().store if self._session.connected else None

    def _chats(self) -> list[str]:
        store = self._store()
        return [record["_id"] for record in store.chats.list()] if store else []

    def _collections(self) -> list[str]:
        store = self._store()
        return sorted(store.collections()) if store else []

    def _models(self) -> list[str]:
        store = self._store()
        return list(store.models.identifiers()) if store else []

    def _bases(self) -> list[str]:
        """The bases that models of this database stand on."""
        store, found = self._store(), set()
        for name in self._models()[:50]:
            try:
                found.add(str(store.models.get(name)["spec"]["model_name_or_path"]))
            except NotFound:  # it has no version that can be loaded yet
                continue
        return sorted(found)

    def _checkpoints(self, steps: bool = False) -> list[str]:
        store = self._store()
        if not store:
            return []
        names = store.checkpoints.experiments()[::-1]
        if steps:
            return [*names, *(f"{name}/{c.step}" for name in names[:10] for c in store.checkpoints.list(name))]
        return list(names)

    def _columns(self, before: list[str]) -> list[str]:
        """The columns of the collection that is named on the line."""
        store = self._store()
        if not store or "--collection" not in before[:-1]:
            return []
        from ..query import Collection

        rows = store.rows(Collection(before[before.index("--collection") + 1]).find(), limit=20)
        return sorted({name for row in rows for name in row if not name.startswith("_")})

    # -- names in the notebook ----------------------------------------------------------------------------------

    def _variables(self, option: str) -> list[str]:
        """Variables that hold what the option takes: told by their types' names, so that nothing is imported."""
        names = self._session.shell.user_ns
        hidden = getattr(self._session.shell, "user_ns_hidden", {})
        mine = [(n, v) for n, v in names.items() if not n.startswith("_") and n not in hidden]
        wanted = _TYPES.get(option, "dict")
        if option == "transform":
            return sorted(n for n, v in mine if type(v).__name__ == "function")
        return sorted(n for n, v in mine if wanted in {cls.__name__ for cls in type(v).__mro__})


def _open_option(before: list[str], actions: Sequence[Any]) -> str | None:
    """The option whose value is being typed: the last word, or a few words back when it takes several."""
    several = {name for action in actions if action.nargs in ("+", "*") for name in action.option_strings}
    for word in reversed(before):
        if word.startswith("--"):
            open_ = word not in _bare(actions) and "=" not in word and (word is before[-1] or word in several)
            return word[2:].replace("-", "_") if open_ else None
    return None


def _bare(actions: Sequence[Any]) -> set[str]:
    """The options that take nothing."""
    return {name for action in actions if action.nargs == 0 for name in action.option_strings}


def _positionals(before: list[str], actions: Sequence[Any]) -> int:
    """How many words belong to no option."""
    bare = _bare(actions)
    count, takes = 0, False
    for word in before:
        if word.startswith("--"):
            takes = word not in bare and "=" not in word
        else:
            count, takes = count + (not takes), False
    return count
