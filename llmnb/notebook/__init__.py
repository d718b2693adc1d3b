"""The notebook: magics, completion, errors in four lines, the training panel, and the live view of a run.

``load`` puts all of it into an IPython shell and ``unload`` takes all of it out again. Nothing heavy is imported
before it is used: the kernel never needs torch, and the database is opened by the first magic that needs it. This
room is the only one that knows IPython, widgets and plotly.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load", "unload"]

_SLOT = "_llmnb_loaded"


class _Loaded:
    """What was put into a shell, to be taken out again."""

    def __init__(self, shell: Any) -> None:
        from .completion import Matcher
        from .faults import Hook
        from .magics import NAMES, LlmMagics
        from .session import Session

        self._shell = shell
        self.session = Session(shell)
        table = shell.magics_manager.magics
        self._before = {(kind, name): table[kind].get(name) for kind in ("line", "cell") for name in NAMES}
        magics = LlmMagics(shell, self.session)
        shell.register_magics(magics)
        self._owner = type(magics).__name__
        self._matcher = Matcher(self.session, magics)
        self._matcher.install()
        self._hook = Hook(shell)

    def remove(self) -> None:
        self._hook.remove()
        self._matcher.remove()
        table = self._shell.magics_manager.magics
        for (kind, name), before in self._before.items():
            if before is None:
                table[kind].pop(name, None)
            else:
                table[kind][name] = before
        self._shell.magics_manager.registry.pop(self._owner, None)
        self.session.close()


def load(ipython: Any) -> None:
    """Puts the magics, the completion and the error hook into a shell. Twice does nothing more."""
    if getattr(ipython, _SLOT, None) is None:
        setattr(ipython, _SLOT, _Loaded(ipython))


def unload(ipython: Any) -> None:
    """Takes everything out again, and ends the thread and the chat processes. Running jobs go on."""
    loaded = getattr(ipython, _SLOT, None)
    if loaded is not None:
        setattr(ipython, _SLOT, None)
        loaded.remove()
