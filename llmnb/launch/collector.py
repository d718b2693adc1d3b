"""Python's garbage collector in processes that import for seconds: what is imported stays, and need not be walked.

While a process imports, every full collection walks all that it has imported so far; torch's world and Ray's have ten
of them, a fifth of the time that they take. A training asks for three more, each of which walks all of it again.
"""

from __future__ import annotations

import gc

__all__ = ["as_usual", "seldom"]


def seldom() -> None:
    """No full collections for a while; what is young is collected as ever. Ray calls this in each process of a run."""
    gc.set_threshold(*gc.get_threshold()[:2], 1000)


def as_usual() -> None:
    """From here on full collections again, which leave alone what is there: for a process that has imported."""
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 10)
