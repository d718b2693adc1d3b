"""Builds transformers pipelines from a ``ModelSpec``. Knows no database and no custom types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import ModelSpec, thaw
from ..errors import ModelError, near

__all__ = ["build"]


def build(spec: ModelSpec) -> Any:
    """A ready ``transformers.pipeline`` for ``spec.task``.

    Source: https://huggingface.co/docs/transformers/main_classes/pipelines.

    Raises:
        ModelError: the task is unknown, or the model cannot be loaded.
    """
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    tasks = PIPELINE_REGISTRY.get_supported_tasks()
    if spec.task not in tasks:
        close = near(spec.task, tasks)
        raise ModelError(
            f"transformers has no pipeline {spec.task!r}.",
            seen=", ".join(tasks),
            todo=f"did you mean {close[0]!r}?" if close else None,
        )
    source = spec.model_name_or_path
    kwargs = thaw(spec.model_kwargs)
    device = kwargs.pop("device", None)
    options: dict[str, Any] = {k: kwargs.pop(k) for k in ("trust_remote_code", "device_map", "revision") if k in kwargs}
    if device is not None:
        options["device"] = device
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **thaw(spec.tokenizer_kwargs))
        return transformers.pipeline(spec.task, model=source, tokenizer=tokenizer, model_kwargs=kwargs, **options)
    except (OSError, ValueError) as error:
        looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
        raise ModelError(
            f"The model {source!r} cannot be loaded as a {spec.task} pipeline.",
            seen=str(error).strip().splitlines()[0][:300],
            todo="check the folder" if looks_local else "check the hub id, and that this machine reaches the hub",
        ) from error
