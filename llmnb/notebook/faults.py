"""Errors of a magic in four lines: what happened, what was seen, what to do. ``%tb`` shows the whole traceback.

Only errors raised inside a magic are shortened; the same error from Python code keeps its traceback. IPython has one
slot for such a handler, so whoever held it before is called for all else, and gets the slot back.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from ..errors import LlmnbError

__all__ = ["Hook", "mark"]

_MARK = "_shown_short"


def mark(error: LlmnbError) -> LlmnbError:
    """Says that this error came out of a magic."""
    setattr(error, _MARK, True)
    return error


class Hook:
    """Our part of the shell's handler for exceptions."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._before = (shell.custom_exceptions, shell.CustomTB)
        exceptions, handler = self._before

        def ours(shell: Any, kind: type, value: BaseException, trace: TracebackType, tb_offset: Any = None) -> Any:
            if exceptions and issubclass(kind, exceptions):
                return handler(kind, value, trace, tb_offset=tb_offset)
            short = bool(getattr(value, _MARK, False))
            shell.showtraceback((kind, value, trace), tb_offset=tb_offset, exception_only=short)
            return None

        shell.set_custom_exc((*exceptions, LlmnbError), ours)
        self._mine = (shell.custom_exceptions, shell.CustomTB)

    def remove(self) -> None:
        """Gives the slot back, unless somebody else has taken it since."""
        if (self._shell.custom_exceptions, self._shell.CustomTB) == self._mine:
            self._shell.custom_exceptions, self._shell.CustomTB = self._before
