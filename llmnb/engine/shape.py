"""A model's shape without its weights, and this machine's pace: what a forecast of a training is made of.

The model is built on torch's ``meta`` device from its config alone: nothing but the config is downloaded, and nothing
but shapes is held. Knows no rows and no training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..config import ModelSpec, TrainConfig
from . import bases
from .adapters import attach_lora, count_parameters

__all__ = ["Shape", "pace", "ready", "room", "shape"]


@dataclass(frozen=True)
class Shape:
    """Attributes:

    total: weights of the base and of the adapter.
    trained: of these, those that are trained.
    layers: of the transformer.
    hidden: width of its residual stream.
    vocabulary: tokens that the head can say.
    width: bytes of a base weight in memory.
    """

    total: int
    trained: int
    layers: int
    hidden: int
    vocabulary: int
    width: float


def ready() -> None:
    """Imports what a tokenizer and a shape need: seconds that can be spent before the first question."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    del peft, torch, AutoConfig, AutoModelForCausalLM, AutoTokenizer


def shape(spec: ModelSpec, config: TrainConfig) -> Shape | None:
    """The shape of what would be trained; None when the model cannot be built from its config alone.

    Raises:
        ModelError: the config cannot be loaded, or a LoRA target matches no module.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kwargs = bases.translate_kwargs(spec.model_kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k in (*bases.HUB, "trust_remote_code")}
    try:
        found = AutoConfig.from_pretrained(spec.model_name_or_path, **kwargs)
        with torch.device("meta"), bases.quiet():
            model = AutoModelForCausalLM.from_config(found)
    except (OSError, ImportError) as error:
        raise bases.explain(spec.model_name_or_path, error, "model") from error
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError):
        return None  # a model of its own kind: it can be trained, and not be told beforehand
    if config.use_lora:
        try:
            with torch.device("meta"):
                model = attach_lora(model, config)
        except (RuntimeError, NotImplementedError):
            return None
    trained, total = count_parameters(model)
    text = found.get_text_config()
    bits = config.bits or spec.bits
    return Shape(
        total=total,
        trained=trained,
        layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        hidden=int(getattr(text, "hidden_size", 0) or 0),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        width=bits / 8 * 1.1 if bits else _width(spec, found),
    )


def _width(spec: ModelSpec, found: object) -> float:
    """Bytes of a weight, as ``bases.load_base`` chooses its dtype."""
    import torch

    dtype = bases.dtype_of(spec)
    if dtype is None:
        dtype = getattr(found, "dtype", None) if torch.cuda.is_available() else torch.float32
    return float((dtype or torch.float32).itemsize)


def pace() -> float:
    """Multiply-adds of this machine in a second, times two: one matrix product, measured for a tenth of a second."""
    import torch

    gpu = torch.cuda.is_available()
    side = 4096 if gpu else 512
    dtype = torch.bfloat16 if gpu else torch.float32
    matrix = torch.ones((side, side), dtype=dtype, device="cuda" if gpu else "cpu")
    matrix @ matrix
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < 0.1:
        matrix @ matrix
        if gpu:
            torch.cuda.synchronize()
        count += 1
    return 2.0 * side**3 * count / (time.perf_counter() - begin)


def room() -> int:
    """Bytes of memory that a training could take here: of the GPU when there is one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    import psutil

    return int(psutil.virtual_memory().total)
