"""The options of one answer: which there are, which are ours, and greedy unless sampling is asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, Fault, near

__all__ = ["known_options", "split_options"]

_OURS = frozenset({"prompt_template", "batch_size", "seed"})
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@functools.cache
def known_options() -> frozenset[str]:
    """Every option that ``generate`` takes, and ours."""
    import inspect

    from transformers import GenerationConfig, GenerationMixin

    hidden = {"self", "kwargs", "inputs", "streamer", "input_ids", "attention_mask", "tokenizer"}
    own = set(inspect.signature(GenerationMixin.generate).parameters)
    return frozenset((set(GenerationConfig().to_dict()) | own) - hidden) | _OURS


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(ours, generate's)``.

    Without ``do_sample`` an answer is greedy, whatever the base's own generation_config says, unless an option that
    only sampling has (``temperature``, ``top_p``, …) is given: it could not be honoured otherwise.
    ``temperature=0`` is greedy.

    Raises:
        ConfigError: options that do not exist, all of them, with near names.
    """
    options = dict(given)
    faults = []
    for name in options:
        if name not in known_options():
            close = near(name, known_options())
            faults.append(Fault(name, "is not an option of generate", f"did you mean {close[0]}?" if close else ""))
    if faults:
        raise ConfigError(faults)
    ours = {name: options.pop(name) for name in _OURS & options.keys()}
    if options.get("temperature") == 0:
        del options["temperature"]
        options.setdefault("do_sample", False)
    options.setdefault("do_sample", any(options.get(name) is not None for name in _SAMPLING))
    if not options["do_sample"]:
        options.update({name: None for name in _SAMPLING})
    return ours, options
