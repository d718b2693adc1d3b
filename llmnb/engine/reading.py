"""Rows to the loss of each: what a model makes of text that is given to it.

Logits exist for one batch at a time, and of a row that is too long for that for a part of its positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import bases
from .generation import Answerer
from .rows import Collator, Rows

__all__ = ["Loss", "figures", "read"]

# Logits that exist at a time, numbers: half a gigabyte of float32.
_ELEMENTS = 2**27
_PIECE = 64  # positions whose loss is computed at once


@dataclass
class Loss:
    """Of each row, (rows,): summed loss in nats, trained tokens, and how many of those the model put first."""

    nats: Any
    tokens: Any
    hits: Any


def read(answerer: Answerer, rows: Rows, batch_size: int) -> Loss:
    """The loss of each row, in their order, from what answers now.

    Args:
        answerer: its adapter is on.
        rows: made with its tokenizer.
        batch_size: rows at a time; fewer where their logits would not fit.
    """
    return _Reader(answerer, batch_size).read(rows)


def figures(loss: Loss) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Perplexity (exp of the mean loss) and token accuracy over all trained tokens; and those of each row."""
    total = int(loss.tokens.sum())
    whole = {
        "perplexity": _perplexity(math.fsum(loss.nats), total),
        "token_accuracy": float(loss.hits.sum()) / total,
    }
    each = [
        {"perplexity": _perplexity(float(nats), int(tokens)), "token_accuracy": float(hits) / int(tokens)}
        for nats, tokens, hits in zip(loss.nats, loss.tokens, loss.hits)
    ]
    return whole, each


def _perplexity(nats: float, tokens: int) -> float:
    return math.exp(min(nats / tokens, 700.0))  # NaN stays what it is


class _Reader:
    """Reads rows with a model, and remembers of each only its loss."""

    def __init__(self, answerer: Answerer, batch_size: int) -> None:
        self._model, self._vocabulary, self._size = answerer.model, answerer.vocabulary, batch_size
        self._collate = Collator(answerer.tokenizer)
        self._device = self._model.get_input_embeddings().weight.device
        self._head: Any = None

    def read(self, rows: Rows) -> Loss:
        """The loss of each row, in the order of the rows."""
        import torch

        loss = Loss(np.zeros(len(rows)), np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64))
        wide = bases.vocabulary_rows(self._model)
        with torch.inference_mode():
            for group in _batches(rows.lengths, self._size, _ELEMENTS // max(wide, 1)):
                batch = self._collate([rows[at] for at in group])
                if len(group) == 1 and batch["labels"].numel() * wide > _ELEMENTS and self._chunked():
                    parts = [self._long(batch)]
                else:
                    parts = self._whole(batch)
                for at, (nats, tokens, hits) in zip(group, parts, strict=True):
                    loss.nats[at], loss.tokens[at], loss.hits[at] = nats, tokens, hits
        return loss

    def _whole(self, batch: Mapping[str, Any]) -> list[tuple[float, int, int]]:
        """Logits of a batch, (batch, seq, vocab), then the loss of each row."""
        import torch

        labels = batch["labels"]
        inputs = {name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")}
        logits = self._model(**inputs, use_cache=False).logits
        found = []
        for row in range(len(labels)):
            places = torch.nonzero(labels[row, 1:] >= 0)[:, 0]
            targets = labels[row, 1:][places]
            found.append(
                self._marked((logits[row, piece.to(logits.device)] for piece in places.split(_PIECE)), targets)
            )
        return found

    def _long(self, batch: Mapping[str, Any]) -> tuple[float, int, int]:
        """Of a row whose logits would not fit: the output layer runs on a part of its positions at a time."""
        inputs = {name: batch[name].to(self._device) for name in ("input_ids", "labels")}
        with self._head.instead_of_logits({**inputs, "use_cache": False}) as given:
            given.pop("labels")
            self._model(**given)
            hidden = self._head.hidden
            targets = batch["labels"][0, 1:]
            parts = (self._head.logits(piece) for piece in hidden.split(_PIECE))
            return self._marked(parts, targets[targets >= 0])

    def _marked(self, parts: Iterator[Any], targets: Any) -> tuple[float, int, int]:
        """(summed loss, tokens, how many were put first) of logits that come in pieces, (piece, vocab)."""
        from torch.nn import functional as F

        nats, hits = 0.0, 0
        for logits, labels in zip(parts, targets.split(_PIECE), strict=True):
            scores_ = logits[:, : self._vocabulary].float()
            labels = labels.to(scores_.device)
            nats += float(F.cross_entropy(scores_, labels, reduction="none").double().sum())
            hits += int((scores_.argmax(-1) == labels).sum())
        return nats, len(targets), hits

    def _chunked(self) -> bool:
        """True when this model's output layer can be run apart; that is measured, not assumed."""
        if self._head is None:
            from .losses import HeadLoss, agrees

            head = HeadLoss(self._model)
            self._head = head if agrees(self._model, head) else False
        return bool(self._head)


def _batches(lengths: Any, size: int, room: int) -> Iterator[list[int]]:
    """Places of rows by length, at most ``size`` at a time and at most ``room`` positions, padding counted."""
    order = sorted(range(len(lengths)), key=lambda at: int(lengths[at]))
    group: list[int] = []
    for at in order:
        if group and (len(group) >= size or (len(group) + 1) * int(lengths[at]) > room):
            yield group
            group = []
        group.append(at)
    if group:
        yield group
