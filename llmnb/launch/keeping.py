"""Which checkpoints stay: the rule of transformers' ``save_total_limit``, as a pure function, and nothing else.

The best one and the newest ones stay. Source: transformers.trainer_utils.rotate_checkpoints
(https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments.save_total_limit).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["to_remove"]


def to_remove(steps: Sequence[int], limit: int | None, best: int | None) -> list[int]:
    """The steps to remove, oldest first.

    Args:
        steps: all steps that are stored.
        limit: how many may stay; None or below 1 for all.
        best: the best step when the run chooses one. It stays, and the newest stays beside it, also with limit 1:
            the best is what is used, the newest is what a run is resumed from.
    """
    if limit is None or limit < 1:
        return []
    ordered = sorted(set(steps))
    if best in ordered and best != ordered[-1]:
        limit = max(limit, 2)
        ordered.remove(best)
        ordered.insert(len(ordered) - 1, best)  # among the last two, which always stay
    return sorted(ordered[: max(len(ordered) - limit, 0)])
