"""What makes a step cheaper, chosen for the model at hand: packs, the loss in chunks, LoRA in one piece.

Each of them gives the loss and the gradients of the plain way, so each is on wherever that was seen to hold on this
very model, and off elsewhere; a run's counts say which (``padding_free``, ``chunked_loss``, ``fused_lora``). Who asks
for one by name is told why it cannot be; who does not, is told too, in fewer words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import TrainConfig

__all__ = ["fuse_lora", "take_chunked_loss", "take_packs"]

Say = Callable[[str, str], None]


def take_packs(model: Any, config: TrainConfig, counts: dict[str, Any], say: Say) -> Any:
    """The collator that lays rows end to end, when this model keeps them apart; None: batches are padded.

    Args:
        model: ready to train; its attention is set to what keeps rows apart.
        config: ``padding_free`` and NEFTune's option are read.
        counts: of the run; ``padding_free`` is set.
        say: takes a text and a level.
    """
    if config.padding_free is False:
        return None
    from transformers.integrations import is_deepspeed_zero3_enabled

    from .packing import FlatCollator, keep_apart

    why: str | None = "ZeRO-3 takes the model apart before it can be seen whether rows are kept apart in it"
    if config.arguments.get("neftune_noise_alpha"):
        why = "NEFTune's noise depends on how long a row of the batch is"
    elif not is_deepspeed_zero3_enabled():
        why = keep_apart(model)
    counts["padding_free"] = why is None
    if why is None:
        return FlatCollator()
    say(f"padding_free is off: {why}. Batches are padded.", "warning" if config.padding_free else "info")
    return None


def take_chunked_loss(model: Any, args: Any, options: dict[str, Any], counts: dict[str, Any]) -> None:
    """In packs the loss is computed without whole logits, where that gives the same and nobody has another."""
    from .losses import HeadLoss, agrees

    if "compute_loss_func" in options or getattr(model.config, "output_router_logits", False) or args.fsdp:
        return  # FSDP holds a part of the output layer only
    loss = HeadLoss(model, args.label_smoothing_factor)
    counts["chunked_loss"] = agrees(model, loss)
    if counts["chunked_loss"]:
        options["compute_loss_func"] = loss


def fuse_lora(model: Any, config: TrainConfig, args: Any, counts: dict[str, Any], say: Say) -> None:
    """LoRA's products in one piece, where peft does no more than these.

    Args:
        model: with its adapter.
        config: ``fused_lora`` and what LoRA does beside are read.
        args: of the trainer.
        counts: of the run; ``fused_lora`` is set to the number of layers.
        say: takes a text and a level.
    """
    if config.fused_lora is False or not config.use_lora:
        return
    from transformers.integrations import is_deepspeed_zero3_enabled

    from .fused import fuse

    if is_deepspeed_zero3_enabled() or args.fsdp:
        counts["fused_lora"], why = 0, "the weights are shared out over the workers"
    else:
        counts["fused_lora"] = fuse(model)
        why = "these layers do more than two products: " + (
            f"lora_dropout is {config.lora_dropout:g}" if config.lora_dropout else "DoRA, biases, or a kind of layer"
        )
    if config.fused_lora and not counts["fused_lora"]:
        say(f"fused_lora is off: {why}. LoRA is computed by peft.", "warning")
