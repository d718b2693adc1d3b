"""What makes a step cheaper, chosen for the model at hand: packs, the loss in chunks, LoRA in one piece; on a GPU
Liger's kernels where they are installed, and a paged optimizer where another would not fit.

Each of them gives the loss and the gradients of the plain way, so each is on wherever that was seen to hold on this
very model, and off elsewhere; a run's counts say which (``padding_free``, ``chunked_loss``, ``fused_lora``). Who asks
for one by name is told why it cannot be; who does not, is told too, in fewer words.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from ..config import TrainConfig

__all__ = ["fuse_lora", "take_chunked_loss", "take_kernels", "take_optimizer", "take_packs"]

Say = Callable[[str, str], None]
# The loss is ours: it takes trained tokens only, which Liger's does not.
_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_PAGED = "paged_adamw_8bit"
# Bytes for each weight that is trained in float32: itself, its gradient, AdamW's two moments.
_ADAMW_BYTES = 16
_ROOM = 0.8  # of a GPU's memory; activations want the rest


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def take_kernels(given: dict[str, Any], cuda: bool) -> None:
    """On a GPU, Liger's kernels for norms, rotations and gates (https://arxiv.org/abs/2410.10989), where installed.

    Args:
        given: TrainingArguments by name; what the person said of ``use_liger_kernel`` stands.
        cuda: the run has a GPU.
    """
    if given.get("use_liger_kernel") is None and cuda and _installed("liger_kernel"):
        given["use_liger_kernel"] = True
    if given.get("use_liger_kernel"):
        given.setdefault("liger_kernel_config", dict(_LIGER))


def take_optimizer(args: Any, config: TrainConfig, trainable: int, memory: int | None, say: Say) -> None:
    """AdamW in 8 bits with pages in the host's memory, where AdamW itself would not fit the GPU.

    Args:
        args: of the trainer; ``optim`` is set.
        config: the person's own ``optim`` stands; so does what DeepSpeed and FSDP share out.
        trainable: weights that are trained.
        memory: bytes of the GPU; None without one.
        say: takes a text and a level.
    """
    needed = trainable * _ADAMW_BYTES
    if memory is None or needed <= _ROOM * memory or config.arguments.get("optim") or config.deepspeed or args.fsdp:
        return
    if not _installed("bitsandbytes"):
        return
    from transformers.training_args import OptimizerNames

    args.optim = OptimizerNames(_PAGED)
    say(
        f"The optimizer is {_PAGED}: with AdamW in 32 bits, weights, gradients and moments need {needed / 1e9:.0f} GB, "
        f"and this GPU has {memory / 1e9:.0f}. optim='adamw_torch' has it otherwise.",
        "warning",
    )


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
