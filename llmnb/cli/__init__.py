"""The ``llmnb`` command: the same words as the magics, for a terminal.

Every sub-command is a thin line over the Python API and prints at most about a screen. This room knows no driver, no
torch, no Ray and no notebook. Nothing heavy is loaded before a sub-command needs it, so ``llmnb --help`` answers at
once.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        words: the arguments; those of this process when not given.

    Returns:
        The exit status: 0, 1 after an error, 2 for a line that is not understood, 130 after Ctrl-C.
    """
    from ..errors import ConfigError, LlmnbError
    from .parsing import parse

    if words is None and any(_has_password(word) for word in sys.argv[1:]):
        print("llmnb: A password on a command line can be read by every user of this machine.", file=sys.stderr)
        print("  To do: give the address in LLMNB_URI instead of --uri", file=sys.stderr)
        return 2
    words = list(sys.argv[1:] if words is None else words)
    try:
        known = parse(words)
    except SystemExit as ending:  # argparse has said why
        return int(ending.code or 0)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(f".{known.module}", __name__)
        return int(getattr(command, known.function)(known) or 0)
    except LlmnbError as error:
        if known.debug:
            traceback.print_exc()
        else:
            print(f"llmnb: {error}", file=sys.stderr)
            remote = getattr(error, "remote_traceback", None)
            if remote:
                print("  --debug shows the worker's traceback", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if known.debug:
            traceback.print_exc()
        print("\nllmnb: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `llmnb runs | head`
        sys.stderr.close()
        return 0


def _has_password(word: str) -> bool:
    scheme, found, rest = word.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    return bool(found and at and ":" in user and "mongodb" in scheme)
