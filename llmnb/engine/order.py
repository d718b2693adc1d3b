"""Which rows come when: the order of an epoch, the same on every rank, known from the seed alone.

A resumed run asks for epoch 3 and gets the order that epoch 3 always had. On several ranks an epoch is filled up
with blank rows that carry no loss, where others repeat rows: the last window then has the same gradient on two
ranks as on one. Knows no model and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["Filled", "Order", "blanks_for"]


def blanks_for(rows: int, batch: int, ranks: int) -> int:
    """Blank rows that make ``rows`` a multiple of ``batch × ranks``; none on one rank."""
    return 0 if ranks <= 1 else -rows % (batch * ranks)


class Filled(Sequence[dict[str, Any]]):
    """Rows, followed by blank ones: one token, no label."""

    def __init__(self, rows: Sequence[Any], blanks: int, token: int) -> None:
        self.rows = rows
        self.blanks = blanks
        self.blank = {"input_ids": [token], "labels": [-100]}

    def __len__(self) -> int:
        return len(self.rows) + self.blanks

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index] if index < len(self.rows) else dict(self.blank)


class Order(Sampler[int]):
    """The order of each epoch: ``random`` (equal to the one that ``Trainer`` draws from the same seed on one
    rank), ``sequential``, or ``group_by_length``. Blank rows come last.

    Args:
        lengths: tokens of each row.
        strategy: as ``TrainingArguments.train_sampling_strategy``.
        seed: epoch ``e`` is drawn from ``seed + e``.
        batch: rows per optimizer step, for grouping.
        blanks: blank rows at the end.
    """

    def __init__(self, lengths: Sequence[int], strategy: str, seed: int, batch: int = 1, blanks: int = 0) -> None:
        self.lengths = lengths
        self.strategy = strategy
        self.seed = seed
        self.batch = batch
        self.blanks = blanks
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of ``epoch``."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        count = len(self.lengths)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.strategy == "sequential":
            yield from range(count)
        elif self.strategy == "group_by_length":
            from transformers.trainer_pt_utils import get_length_grouped_indices

            yield from get_length_grouped_indices(list(self.lengths), self.batch, generator=generator)
        else:
            yield from torch.randperm(count, generator=generator).tolist()
        yield from range(count, count + self.blanks)
