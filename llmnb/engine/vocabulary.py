"""A row of the embeddings for every token, and a token to pad with. Knows models and tokenizers in memory only."""

from __future__ import annotations

import contextlib
from typing import Any

__all__ = ["ensure_pad", "fit_vocabulary", "stop_as_trained", "vocabulary_rows"]


def ensure_pad(tokenizer: Any, model: Any) -> str | None:
    """Gives the tokenizer a padding token, and the model rows for every token.

    The end-of-text token serves when there is one: rows are masked by position, so that it is still trained
    where it ends a row. A token is added only when there is nothing to serve.

    Returns:
        What was done, in a sentence; None when nothing was needed.
    """
    said = None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is not None:
            tokenizer.pad_token = tokenizer.eos_token
            said = (
                f"The tokenizer has no padding token; {tokenizer.eos_token!r} serves (padding is masked by position)."
            )
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            said = "The tokenizer has neither a padding nor an end-of-text token; '<|pad|>' was added."
    if model is not None:
        new = fit_vocabulary(model, tokenizer)
        if new:
            said = f"{said or ''} The embeddings grew by {new} rows, to fit the tokenizer.".strip()
        model.config.pad_token_id = tokenizer.pad_token_id
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    return said


def fit_vocabulary(model: Any, tokenizer: Any, rows: int | None = None) -> int:
    """Grows the embeddings to the tokenizer's size; never shrinks them.

    A new row is the mean of the old ones, which is the same each time the same base is loaded: an adapter does not
    have to carry the embeddings.

    Args:
        model: whose embeddings (and head) grow in place.
        tokenizer: whose highest id must have a row.
        rows: that many rows instead.

    Returns:
        How many rows were added.
    """
    import torch

    have = vocabulary_rows(model)
    need = rows or max(tokenizer.get_vocab().values(), default=-1) + 1
    if need <= have:
        return 0
    model.resize_token_embeddings(need, mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    parts = [part for layer in layers for part in (layer.weight, getattr(layer, "bias", None)) if part is not None]
    with torch.no_grad(), _gathered(parts):
        for part in parts:
            if part.shape[0] == need:  # with ZeRO-3, on the rank that changes it
                part[have:] = part[:have].float().mean(dim=0).to(part.dtype)
    return need - have


def vocabulary_rows(model: Any) -> int:
    """Rows of the embeddings, also when ZeRO-3 has taken them apart."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _gathered(parts: list[Any]) -> contextlib.AbstractContextManager[Any]:
    if not any(hasattr(part, "ds_id") for part in parts):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts, modifier_rank=0)


def stop_as_trained(model: Any, tokenizer: Any, chat: bool) -> None:
    """Saved with the model, for whoever generates with plain transformers: the tokens that end an answer.

    Args:
        model: its ``generation_config`` is changed; one without it stays as it is.
        tokenizer: with the chat template that was trained with.
        chat: it was trained on chats, whose turns end with a token of the template.
    """
    from .templates import stops

    config = getattr(model, "generation_config", None)
    if config is not None:
        ids, _ = stops(tokenizer, config.eos_token_id, chat)
        if ids:
            config.eos_token_id = ids[0] if len(ids) == 1 else ids
