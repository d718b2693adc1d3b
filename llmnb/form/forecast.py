"""What a training will take: steps, tokens, memory and time, from settings, a sample of the rows and a model's shape.

The figures are for a person who decides whether to start: memory within about a third, time within about a factor of
two, and both are said with "about".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import options
from ..config import TrainConfig

__all__ = ["Forecast", "forecast", "steps"]

_USE = 0.4  # share of a matrix product's pace that a training reaches
_STEP = 0.03  # seconds that a forward and a backward pass take, however small the model is
_START = 0.64e9  # bytes that a process has in use with a model of almost nothing: 638 MB were measured on a CPU


@dataclass(frozen=True)
class Forecast:
    """Attributes:

    steps: optimizer steps.
    tokens: that are read, over all epochs.
    memory: bytes on each device, None while the model's shape is unknown.
    seconds: of training, None while the machine's pace is unknown.
    """

    steps: int
    tokens: int
    memory: float | None = None
    seconds: float | None = None


def _argument(config: TrainConfig, name: str) -> Any:
    return config.arguments.get(name, options.training_arguments()[name].default)


def steps(config: TrainConfig, found: int, workers: int = 1) -> int:
    """Optimizer steps of a run on ``found`` rows, as ``transformers.Trainer`` counts them."""
    if _argument(config, "max_steps") > 0:
        return int(_argument(config, "max_steps"))
    batches = math.ceil(found / (_argument(config, "per_device_train_batch_size") * max(workers, 1)))
    each = max(1, math.ceil(batches / _argument(config, "gradient_accumulation_steps")))
    return math.ceil(_argument(config, "num_train_epochs") * each)


def forecast(
    config: TrainConfig,
    found: int,
    sample: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    pace: float | None = None,
) -> Forecast:
    """The forecast of one run.

    Args:
        config: its settings.
        found: rows it will train on.
        sample: ``used``, ``tokens`` and ``longest`` of a sample of the rows.
        model: the fields of ``engine.shape.Shape``, or None.
        pace: floating-point operations in a second of each device, or None.
    """
    workers = config.num_gpus or 1
    count = steps(config, found, workers)
    batch = _argument(config, "per_device_train_batch_size")
    rows_read = count * batch * workers * _argument(config, "gradient_accumulation_steps")
    rows_read = min(rows_read, math.ceil(found * _argument(config, "num_train_epochs")) if found else rows_read)
    if _argument(config, "max_steps") > 0:
        rows_read = count * min(batch * workers * _argument(config, "gradient_accumulation_steps"), max(found, 1))
    tokens = round(rows_read * sample["tokens"] / max(sample["used"], 1))
    if model is None:
        return Forecast(count, tokens)
    again = bool(_argument(config, "gradient_checkpointing"))
    memory = _memory(config, model, batch, int(sample["longest"]), again)
    if not pace:
        return Forecast(count, tokens, memory)
    # Forward 2, backward 4 per weight and token (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361); a frozen weight
    # has no gradient of its own, and recomputing is one more forward pass, as is DPO's look at the reference.
    each = (6 if not config.use_lora else 4) + (2 if again else 0) + (2 if config.method == "dpo" else 0)
    passes = count * _argument(config, "gradient_accumulation_steps")
    seconds = max(each * model["total"] * tokens / workers / (pace * _USE), passes * _STEP)
    return Forecast(count, tokens, memory, seconds)


def _memory(config: TrainConfig, model: Mapping[str, Any], batch: int, longest: int, again: bool) -> float:
    """Weights, gradients, Adam's two moments, activations and the logits with their gradient.

    Activations: 34 bytes per layer, token and unit of width in 16 bits, 2 when they are computed again (Korthikanti et
    al. 2022, https://arxiv.org/abs/2205.05198).
    """
    trained = model["trained"]
    frozen = (model["total"] - trained) * model["width"]
    held = trained * (4 + 4 + 8) if config.use_lora else trained * (model["width"] + 4 + 8)
    narrow = 1 if model["width"] <= 2 else 2
    tokens = batch * longest * (2 if config.method == "dpo" else 1)
    if config.method == "dpo" and not config.use_lora:
        frozen += model["total"] * model["width"]  # a second copy to compare with
    activations = tokens * model["hidden"] * model["layers"] * (2 if again else 34) * narrow
    return float(_START + frozen + held + activations + tokens * model["vocabulary"] * 4 * 3)
