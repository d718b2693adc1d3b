"""Which rows come when: the order of an epoch, the same on every rank, known from the seed alone.

A resumed run asks for epoch 3 and gets the order that epoch 3 always had. On several ranks an epoch is filled up
with blank rows that carry no loss, where others repeat rows: the last window then has the same gradient on two
ranks as on one. Knows no model and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["Filled", "Order", "blanks_for", "evaluated", "ordered", "seed_of"]


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


def seed_of(args: Any) -> int:
    """Where the order of the rows begins, of ``TrainingArguments``."""
    return int(args.data_seed if args.data_seed is not None else args.seed)


def ordered(rows: Any, args: Any, token: int) -> tuple[Any, Order | None]:
    """The training rows and their order, filled up with blank rows of ``token`` on several ranks."""
    if args.train_sampling_strategy == "batch_rebalance":
        return rows, None  # Trainer's own
    exact = args.average_tokens_across_devices and not args.dataloader_drop_last
    blanks = blanks_for(len(rows), args.train_batch_size, args.world_size) if exact else 0
    order = Order(
        rows.lengths,
        args.train_sampling_strategy,
        seed_of(args),
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        blanks=blanks,
    )
    return Filled(rows, blanks, token) if blanks else rows, order


def evaluated(rows: Mapping[str, Any], args: Any, token: int, keeps_logits: bool) -> Any:
    """One evaluation set for "valid" alone, a dict for several; None for none."""
    sets = {}
    for name, found in rows.items():
        if name == "train":
            continue
        blanks = 0 if keeps_logits else blanks_for(len(found), args.eval_batch_size, args.world_size)
        sets[name] = Filled(found, blanks, token) if blanks else found
    if not sets:
        return None
    return sets["valid"] if list(sets) == ["valid"] else sets
