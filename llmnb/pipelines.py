"""Any transformers pipeline as a model of the database, with custom input and output types.

``TextClassification`` can also be trained. A pipeline's ``preprocess`` and ``postprocess`` are the person's own
functions: their source text is recorded, but what the database holds is never run, so whoever loads the pipeline
gives them again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import ModelSpec, thaw
from .errors import ConfigError, Fault, ModelError
from .model import Model, plain_kwargs
from .trainer import LLMTrainer

__all__ = ["Pipeline", "TextClassification"]

_FUNCTIONS = ("preprocess", "postprocess")


class Pipeline(Model):
    """A transformers pipeline (https://huggingface.co/docs/transformers/main_classes/pipelines).

    Args:
        identifier: its name in the database.
        task: a task name of ``transformers.pipeline`` ("fill-mask", "feature-extraction", …).
        model_name_or_path: hub id or folder.
        model_kwargs: passed to the model's ``from_pretrained`` (``num_labels``, ``dtype``, …).
        tokenizer_kwargs: passed to ``AutoTokenizer.from_pretrained``.
        preprocess: turns one value of the person's own type into the pipeline's input.
        postprocess: turns the pipeline's output for one input into the person's own type.
        predict_kwargs: defaults of every call.
        trainer: only tasks that can be trained take one.

    Raises:
        ConfigError: with every wrong argument.
    """

    trainable = False

    def __init__(
        self,
        identifier: str,
        task: str,
        model_name_or_path: str | Path,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        postprocess: Callable[[Any], Any] | None = None,
        predict_kwargs: Mapping[str, Any] | None = None,
        trainer: LLMTrainer | None = None,
    ) -> None:
        faults = []
        if not identifier or "/" in identifier:
            faults.append(Fault("identifier", f"must be a name without '/', not {identifier!r}"))
        if not model_name_or_path:
            faults.append(Fault("model_name_or_path", "is needed", "a hub id or a folder"))
        if trainer is not None and not self.trainable:
            what = f"a {task} pipeline cannot be trained here"
            faults.append(Fault("trainer", what, "use TextClassification or LLM"))
        if faults:
            raise ConfigError(faults)
        self.preprocess, self.postprocess = preprocess, postprocess
        self._missing: dict[str, str] = {}
        self._pipe: Any = None
        spec = ModelSpec(
            identifier=identifier,
            model_name_or_path=str(model_name_or_path),
            task=task,
            model_kwargs=plain_kwargs("model_kwargs", model_kwargs),
            tokenizer_kwargs=plain_kwargs("tokenizer_kwargs", tokenizer_kwargs),
            predict_kwargs=plain_kwargs("predict_kwargs", predict_kwargs),
        )
        super().__init__(spec, trainer)

    @classmethod
    def from_spec(cls, spec: ModelSpec, trainer: LLMTrainer | None = None) -> Pipeline:
        """The pipeline that a stored description describes; its functions are to be given again."""
        model = cls.__new__(cls)
        Pipeline.__init__(
            model,
            spec.identifier,
            spec.task,
            spec.model_name_or_path,
            model_kwargs=thaw(spec.model_kwargs),
            tokenizer_kwargs=thaw(spec.tokenizer_kwargs),
            predict_kwargs=thaw(spec.predict_kwargs),
            trainer=trainer,
        )
        model._missing = dict(spec.functions)
        return model

    def spec(self) -> ModelSpec:
        """The description that is stored."""
        functions = {name: _source(getattr(self, name)) for name in _FUNCTIONS if getattr(self, name) is not None}
        return replace(self._spec, functions={**self._missing, **functions})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.identifier!r}, {self._spec.task!r}, {self._spec.model_name_or_path!r})"

    def predict(self, X: Any = None, **kwargs: Any) -> Any:
        """The pipeline's output for one input, or a list of outputs for a list of inputs.

        Raises:
            ModelError: the model cannot be loaded, or a function it was stored with was not given again.
        """
        if isinstance(X, list):
            return self._run_on(X, kwargs)
        return self._run_on([X], kwargs)[0]

    def predict_one(self, X: Any, **kwargs: Any) -> Any:
        """``predict`` of one input."""
        return self._run_on([X], kwargs)[0]

    def predict_batches(self, dataset: Any, **kwargs: Any) -> list[Any]:
        """``predict`` of many inputs."""
        return self._run_on(list(dataset), kwargs)

    def _run_on(self, inputs: list[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        for name, source in self._missing.items():
            if getattr(self, name) is None:
                raise ModelError(
                    f"This pipeline was stored with a {name} function of your own.",
                    seen=source[:200],
                    todo=f"define it again and set model.{name} = …; code from a database is never run",
                )
        prepared = [self.preprocess(x) for x in inputs] if self.preprocess else inputs
        pipe, options = self._loaded(), {**thaw(self._spec.predict_kwargs), **kwargs}
        # Of a list of one, most pipelines give the bare answer; of one bare text, this one gives a list.
        alone = len(prepared) == 1 and self._spec.task != "text-classification"
        outputs = [pipe(prepared[0], **options)] if alone else pipe(prepared, **options)
        return [self.postprocess(o) for o in outputs] if self.postprocess else list(outputs)

    def _loaded(self) -> Any:
        tuned = self.checkpoint
        if self._pipe is None:
            from .engine.pipes import build

            self._pipe = build(self._spec, Path(str(tuned.path)) if tuned is not None else None)
        return self._pipe

    def close(self) -> None:
        """Gives the memory of the weights back."""
        self._pipe = None


class TextClassification(Pipeline):
    """A text classifier that can be trained.

    Args:
        identifier: its name in the database.
        model_name_or_path: hub id or folder.
        model_kwargs: ``num_labels``, ``id2label``, … are honoured.
        trainer: an ``LLMTrainer`` whose ``key`` is a pair of columns (text, label). A label is a whole number, or a
            word; words are numbered in sorted order unless ``id2label`` says otherwise.
        **more: as on ``Pipeline``.

    ``predict("…")`` gives ``{"label": …, "score": …}``.
    """

    trainable = True

    def __init__(
        self,
        identifier: str = "classifier",
        model_name_or_path: str | Path = "",
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        trainer: LLMTrainer | None = None,
        **more: Any,
    ) -> None:
        super().__init__(
            identifier,
            "text-classification",
            model_name_or_path,
            model_kwargs=model_kwargs,
            trainer=trainer,
            **more,
        )


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return f"<{getattr(function, '__qualname__', 'function')}: no source text>"
