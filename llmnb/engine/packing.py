"""Rows end to end: a batch without padding, in which no row sees another.

The rows of a batch follow each other in one long sequence whose positions begin anew at each row; the attention of
transformers keeps rows apart by these positions
(https://huggingface.co/docs/transformers/main/en/llm_tutorial_optimization, ``DataCollatorWithFlattening``). Rows,
order and optimizer steps are those of the padded batch, so the loss is the same. Not every model honours positions
so (convolutions and state spaces run on across a seam): ``leak`` measures it on the very model that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .bases import vocabulary_rows

__all__ = ["FlatCollator", "leak"]

# Rounding of half precision and of quantised products stays below this; a seam that leaks is far above it.
MOST_LEAK = 0.02


class FlatCollator:
    """Rows to one sequence. The label of a row's first token is -100 already (``Rows``), so no seam is trained."""

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """``input_ids``, ``labels`` and ``position_ids``, each (1, tokens of all rows), int64."""
        columns = {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "labels": [label for row in rows for label in row["labels"]],
            "position_ids": [place for row in rows for place in range(len(row["input_ids"]))],
        }
        return {name: torch.tensor([values], dtype=torch.int64) for name, values in columns.items()}


@torch.no_grad()
def leak(model: Any) -> float:
    """How far the logits of a row move when another row stands before it.

    Two short rows of fixed tokens go through the model together, one after another in a pack; the second is compared
    with itself alone, and with itself behind a different first row. Neither weights nor random numbers are touched.

    Returns:
        The largest difference of a logit, in standard deviations of the logits. 0 for rows that are kept apart.
    """
    device = next(model.parameters()).device
    tokens = torch.randint(vocabulary_rows(model), (3, 9), generator=torch.Generator().manual_seed(0)).to(device)
    first, other, second = tokens
    training = model.training
    model.eval()
    try:
        alone = _logits(model, second[None], torch.arange(9, device=device)[None])
        places = torch.arange(9, device=device).repeat(2)[None]
        packs = [_logits(model, torch.cat([before, second])[None], places)[:, 9:] for before in (first, other)]
    finally:
        model.train(training)
    gap = max(float((pack - alone).abs().max()) for pack in packs)
    return gap / max(float(alone.std()), 1e-9)


def _logits(model: Any, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
