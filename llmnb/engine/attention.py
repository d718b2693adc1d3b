"""Attention by row: in a batch without padding each row attends to itself, and nothing else is computed.

The stock attention keeps the rows of a pack apart with a mask over the whole pack, and computes every masked product:
the cost grows with the square of the pack. Here each row is its own call of torch's
``scaled_dot_product_attention``; on a GPU, in half precision, all rows are one call of its ``varlen_attn``
(https://docs.pytorch.org/docs/stable/nn.attention.varlen.html). It is registered under a name of its own in
transformers' attention interface (https://huggingface.co/docs/transformers/attention_interface), so every architecture
that goes through there can use it; whether one does so rightly is measured by ``packing.leak``. Outside a pack it is
the stock attention.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["NAME", "rows", "suits"]

NAME = "llmnb_rows"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Where the rows of the pack begin and end, while one is computed. Not a context variable: the backward pass recomputes
# checkpointed layers on threads of its own.
_bounds: list[int] | None = None
_ends: torch.Tensor | None = None  # the same, (rows + 1,) int32, where the pack is


@contextlib.contextmanager
def rows(position_ids: torch.Tensor | None) -> Iterator[None]:
    """Meanwhile attention is by row, for the pack with these positions.

    Args:
        position_ids: (1, seq), beginning at 0 with each row; None for a padded batch.
    """
    global _bounds, _ends
    if position_ids is None or position_ids.shape[0] != 1:
        yield
        return
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    before = _bounds, _ends
    _bounds = [*starts, position_ids.shape[1]]
    _ends = torch.tensor(_bounds, dtype=torch.int32, device=position_ids.device)
    try:
        yield
    finally:
        _bounds, _ends = before


def suits(model: Any) -> bool:
    """May ``NAME`` be tried on this model? Its layers see all of a row, or a window of it."""
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ())
    plain = layers <= _KNOWN_LAYERS and not getattr(config, "attention_chunk_size", None)
    return plain and config._attn_implementation == "sdpa" and model.device.type in ("cpu", "cuda")


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Args: query (1, heads, seq, dim); key, value (1, key-value heads, seq, dim). Returns (1, seq, heads, dim)."""
    if _bounds is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise ValueError(f"attention by row knows no {name}")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _at_once(query, key, value, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = [end - begin for begin, end in itertools.pairwise(_bounds)]
    out = []
    # One split, not a slice a row: the gradient of a slice is as large as the pack.
    for q, k, v in zip(*(part.split(lengths, 2) for part in (query, key, value)), strict=True):
        window = _window(q.shape[2], sliding_window, query.device)
        row = F.scaled_dot_product_attention(
            q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling
        )
        out.append(row.transpose(1, 2))
    return torch.cat(out, dim=1), None


def _at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """``_attend`` for all rows in one call. The device is not waited for: lengths are known on the host."""
    from torch.nn.attention.varlen import varlen_attn

    assert _bounds is not None and _ends is not None
    longest = max(end - begin for begin, end in itertools.pairwise(_bounds))
    flat = (part[0].transpose(0, 1) for part in (query, key, value))  # (seq, heads, dim)
    back = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        *flat,
        _ends,
        _ends,
        longest,
        longest,
        scale=scaling,
        window_size=(back, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def _window(length: int, size: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length), True where a token is seen; None when every token before is."""
    if size is None or length <= size:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places[None, :]
    return (back >= 0) & (back < size)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _bounds is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
