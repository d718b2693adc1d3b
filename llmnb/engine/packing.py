"""Rows end to end: a batch without padding, in which no row sees another.

The rows of a batch follow each other in one long sequence whose positions begin anew at each row; the attention of
transformers keeps rows apart by these positions
(https://huggingface.co/docs/transformers/main/en/llm_tutorial_optimization, ``DataCollatorWithFlattening``). Rows,
order and optimizer steps are those of the padded batch, so the loss is the same. Not every model honours positions
so (convolutions and state spaces run on across a seam): it is measured on the very model that is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .attention import NAME, rows, suits
from .bases import quantised_bits, vocabulary_rows

__all__ = ["FlatCollator", "divide", "keep_apart", "leak"]

# The same products of the same numbers differ by nothing. In 8 bits the columns of outliers are chosen over all tokens.
MOST_BETWEEN, MOST_BETWEEN_8BIT = 1e-5, 0.05
# Rounding of half precision and of quantised products stays below this.
MOST_BESIDE = 0.2


class FlatCollator:
    """Rows to one sequence. The label of a row's first token is -100 already (``Rows``), so no seam is trained."""

    def __call__(self, batch: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """``input_ids``, ``labels`` and ``position_ids``, each (1, tokens of all rows), int64."""
        columns = {
            "input_ids": [token for row in batch for token in row["input_ids"]],
            "labels": [label for row in batch for label in row["labels"]],
            "position_ids": [place for row in batch for place in range(len(row["input_ids"]))],
        }
        return {name: torch.tensor([values], dtype=torch.int64) for name, values in columns.items()}


def divide(pack: Mapping[str, Any], most: int) -> list[Mapping[str, Any]]:
    """A pack in parts of whole rows, each of at most ``most`` tokens or one row; their losses add up to the pack's.

    Args:
        pack: of ``FlatCollator``; anything else is given back as it is.
        most: tokens.
    """
    places = pack.get("position_ids")
    if places is None or places.shape[0] != 1 or places.shape[1] <= most:
        return [pack]
    starts = (places[0] == 0).nonzero().flatten().tolist()
    cuts = [0]
    for start, end in itertools.pairwise([*starts, places.shape[1]]):
        if end - cuts[-1] > most and start > cuts[-1]:
            cuts.append(start)
    bounds = itertools.pairwise([*cuts, places.shape[1]])
    return [{name: value[:, begin:end] for name, value in pack.items()} for begin, end in bounds]


@torch.no_grad()
def leak(model: Any) -> tuple[float, float]:
    """How much of a row's logits comes from elsewhere in its pack.

    A short row of fixed tokens goes through the model alone, and twice in a pack, each time behind another row. Neither
    weights nor random numbers are touched.

    Returns:
        The largest differences of a logit, in standard deviations of the logits: between the two packs, which is 0 to
        the last bit where rows are kept apart, and between pack and alone, which is rounding where the positions of a
        row begin anew.

    Raises:
        TypeError: the model takes no positions.
        ValueError: its attention cannot be computed by row.
    """
    device = next(model.parameters()).device
    tokens = torch.randint(vocabulary_rows(model), (3, 9), generator=torch.Generator().manual_seed(0)).to(device)
    first, other, second = tokens
    training = model.training
    model.eval()
    try:
        alone = _logits(model, second[None], torch.arange(9, device=device)[None])
        places = torch.arange(9, device=device).repeat(2)[None]
        with rows(places):
            one, two = (_logits(model, torch.cat([before, second])[None], places)[:, 9:] for before in (first, other))
    finally:
        model.train(training)
    scale = max(float(alone.std()), 1e-9)
    return float((one - two).abs().max()) / scale, float((one - alone).abs().max()) / scale


def _logits(model: Any, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=places, use_cache=False).logits.float()


def keep_apart(model: Any) -> str | None:
    """Makes the model ready for packs: attention by row where that is right, else its own if that is.

    Returns:
        None, or why its rows cannot be packed.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    why = None
    own = whole.config._attn_implementation
    most = MOST_BETWEEN_8BIT if quantised_bits(model) == 8 else MOST_BETWEEN
    for name in (NAME, own) if suits(whole) else (own,):
        whole.set_attn_implementation(name)
        try:
            between, beside = leak(model)
        except (TypeError, ValueError, RuntimeError) as error:  # also a GPU without these kernels
            why = str(error)
            continue
        if between <= most and beside <= MOST_BESIDE:
            return None
        moved = max(between, beside)
        why = f"a row sees the row before it: its logits move by {moved:.2g} standard deviations"
    return why
