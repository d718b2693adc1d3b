"""Builds transformers pipelines from a ``ModelSpec``. Knows no database and no custom types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ModelSpec, thaw
from ..errors import ModelError, near
from . import bases, manifest

__all__ = ["build"]


def build(spec: ModelSpec, tuned: Path | None = None) -> Any:
    """A ready ``transformers.pipeline`` for ``spec.task``.

    Args:
        spec: which base.
        tuned: folder of a checkpoint that takes the base's place, or of an adapter that is merged into it.

    Source: https://huggingface.co/docs/transformers/main_classes/pipelines.

    Raises:
        ModelError: the task is unknown, or the model cannot be loaded.
        AdapterMismatch: the adapter was trained on another base.
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
    kwargs = thaw(spec.model_kwargs)
    options: dict[str, Any] = {k: kwargs.pop(k) for k in ("trust_remote_code", "revision", "device") if k in kwargs}
    if tuned is not None:
        model, tokenizer = _trained(spec, tuned)
        return transformers.pipeline(spec.task, model=model, tokenizer=tokenizer, **options)
    bases.check_path(spec.model_name_or_path)
    source = spec.model_name_or_path
    try:
        if spec.tokenizer_kwargs:  # else the pipeline loads what its task needs: a tokenizer, a processor, …
            options["tokenizer"] = transformers.AutoTokenizer.from_pretrained(source, **thaw(spec.tokenizer_kwargs))
        return transformers.pipeline(spec.task, model=source, model_kwargs=kwargs, **options)
    except (OSError, ValueError) as error:
        raise bases.explain(source, error, "model") from error


def _trained(spec: ModelSpec, folder: Path) -> tuple[Any, Any]:
    """The classifier of a checkpoint folder, ready to answer, and its tokenizer."""
    from . import adapters

    card = manifest.read(folder)
    names = card.get("labels") or []
    labels = {"num_labels": len(names), "id2label": dict(enumerate(names))} if names else {}
    spec = replace(spec, model_kwargs={**thaw(spec.model_kwargs), **labels})
    if manifest.kind_of(folder) != "adapter":
        model, tokenizer = bases.load_base(replace(spec, model_name_or_path=str(folder)))
        return model.eval(), tokenizer
    fingerprint = bases.fingerprint(spec.model_name_or_path, **bases.where(spec.model_kwargs))
    adapters.check_base(folder, spec.model_name_or_path, fingerprint)
    model, _ = bases.load_base(spec)
    tokenizer = bases.load_tokenizer(spec, folder)
    bases.ensure_pad(tokenizer, model)
    return adapters.load_adapter(model, folder, trainable=False).merge_and_unload().eval(), tokenizer
