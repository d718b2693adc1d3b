"""FSDP where ``accelerate`` leaves it unfinished: ranks that compute on CPUs, and 4-bit weights beside an adapter.

On CPUs it is passed over, without a word, and each rank would keep the whole model; ``fully_shard`` itself works
there, over gloo. Knows no Trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RunError

__all__ = ["check_shared", "keep_trained", "share_on_cpus"]

_WEIGHTS = "pytorch_model_fsdp.bin"  # accelerate's name


def share_on_cpus(arguments: Any) -> None:
    """Has the ``Accelerator`` that is made next shard the model, where it would not: on several CPU ranks.

    Its state is one for the whole process and is left alone by whoever comes second, so it is made here.

    Args:
        arguments: ``transformers.TrainingArguments``.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if not arguments.fsdp or arguments.device.type != "cpu":
        return
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    state = Accelerator(mixed_precision=arguments.mixed_precision, cpu=True, fsdp_plugin=plugin).state
    if arguments.mixed_precision != "no":
        plugin.set_mixed_precision(arguments.mixed_precision)
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP  # from where the next Accelerator takes it


def check_shared(model: Any) -> None:
    """Raises when FSDP was asked for and no weight is shared out.

    Raises:
        RunError: every rank would hold, and step, all of them.
    """
    from torch.distributed.tensor import DTensor

    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RunError("FSDP was asked for, and the model was not shared out.", todo="please report this")


def keep_trained(folder: Path, model: Any) -> None:
    """Leaves the trained weights alone in what FSDP goes on from.

    A frozen 4-bit base puts its scales in there too, and a model that is shared out does not take them back.
    """
    import torch

    path = folder / _WEIGHTS
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if name in trained}, path)
