"""LLM: a language model as a person holds it — described, trained, asked, merged.

An ``LLM`` is cheap until it is asked something: weights are loaded on the first ``predict``. It knows the engine and
the checkpoint it answers with. The database that trained it hands itself over as an object; this room imports none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks
from .checkpoint import Checkpoint
from .config import ModelSpec, thaw
from .errors import ConfigError, Fault, ModelError, near
from .model import Model, databases, plain_kwargs
from .trainer import LLMTrainer

if TYPE_CHECKING:
    from .engine.generation import Answerer
    from .engine.proof import MergeReport

__all__ = ["LLM"]


Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


class LLM(Model):
    """A causal language model.

    Args:
        identifier: its name in the database.
        model_name_or_path: hub id or folder of the base model.
        bits: None, 4 or 8: how the base is quantised when loaded (bitsandbytes).
        adapter_id: an adapter on the base: a folder, a hub id, a ``Checkpoint``, or ``"experiment"`` /
            ``"experiment/step"`` of the database.
        model_kwargs: passed to ``transformers.AutoModelForCausalLM.from_pretrained``; ``trust_remote_code`` is off
            unless it says so.
        tokenizer_kwargs: passed to ``transformers.AutoTokenizer.from_pretrained``.
        prompt_template: text around a prompt; ``{input}`` is the prompt.
        predict_kwargs: defaults of ``predict``.
        trainer: an ``LLMTrainer``; ``db.apply(llm)`` then trains.

    Raises:
        ConfigError: with every wrong argument.
    """

    task = "causal-lm"

    def __init__(
        self,
        identifier: str = "llm",
        model_name_or_path: str | Path | None = None,
        *,
        bits: int | None = None,
        adapter_id: str | Path | Checkpoint | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        prompt_template: str = "{input}",
        predict_kwargs: Mapping[str, Any] | None = None,
        trainer: LLMTrainer | None = None,
        **more: Any,
    ) -> None:
        trainer = more.pop("configuration", trainer)
        faults = [_unknown(name) for name in more]
        fault = checks.model_fault(bits)
        if fault:
            faults.append(fault)
        if not identifier or not isinstance(identifier, str) or "/" in identifier:
            faults.append(Fault("identifier", f"must be a name without '/', not {identifier!r}"))
        if not model_name_or_path:
            faults.append(Fault("model_name_or_path", "is needed", "a hub id or a folder"))
        if "{input}" not in prompt_template:
            faults.append(Fault("prompt_template", "has no {input} in it", "put {input} where the prompt goes"))
        if faults:
            raise ConfigError(faults)
        self.adapter_id = adapter_id
        self._answerer: Answerer | None = None
        spec = ModelSpec(
            identifier=identifier,
            model_name_or_path=str(model_name_or_path),
            task=self.task,
            bits=bits,
            adapter_id=_adapter_name(adapter_id),
            model_kwargs=plain_kwargs("model_kwargs", model_kwargs),
            tokenizer_kwargs=plain_kwargs("tokenizer_kwargs", tokenizer_kwargs),
            prompt_template=prompt_template,
            predict_kwargs=plain_kwargs("predict_kwargs", predict_kwargs),
        )
        super().__init__(spec, trainer)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | Path, **kwargs: Any) -> LLM:
        """An LLM by hub id or folder; keywords that are not LLM's own go to ``model_kwargs``."""
        own = {"identifier", "bits", "adapter_id", "tokenizer_kwargs", "prompt_template", "predict_kwargs", "trainer"}
        mine = {k: kwargs.pop(k) for k in list(kwargs) if k in own}
        given = dict(kwargs.pop("model_kwargs", None) or {})
        mine.setdefault("identifier", Path(str(model_name_or_path)).name or "llm")
        return cls(model_name_or_path=model_name_or_path, model_kwargs={**given, **kwargs}, **mine)

    @classmethod
    def from_spec(cls, spec: ModelSpec, trainer: LLMTrainer | None = None) -> LLM:
        """The model that a stored description describes."""
        return cls(
            spec.identifier,
            spec.model_name_or_path,
            bits=spec.bits,
            adapter_id=spec.adapter_id,
            model_kwargs=thaw(spec.model_kwargs),
            tokenizer_kwargs=thaw(spec.tokenizer_kwargs),
            prompt_template=spec.prompt_template,
            predict_kwargs=thaw(spec.predict_kwargs),
            trainer=trainer,
        )

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int | None:
        """4, 8 or None."""
        return self._spec.bits

    def __repr__(self) -> str:
        parts = [repr(self.identifier), repr(self.model_name_or_path)]
        if self.bits:
            parts.append(f"bits={self.bits}")
        tuned = self._tuned or self.adapter_id
        if tuned:
            parts.append(f"adapter={str(tuned)!r}")
        return f"LLM({', '.join(parts)})"

    # -- asking ----------------------------------------------------------------------------------------------

    def predict(self, X: Prompt | Sequence[Prompt] | None = None, **kwargs: Any) -> Any:
        """Answers: a str for a prompt or a chat, a list for a list of them.

        Args:
            X: a text; a chat (a list of ``{"role", "content"}``); or a list of texts or of chats.
            **kwargs: passed to ``generate`` (``max_new_tokens``, ``do_sample``, ``temperature``, …), over
                ``predict_kwargs``. Greedy unless it says otherwise.

        Returns:
            Only the new text, without the prompt.

        Raises:
            ModelError: the model cannot be loaded, or the input is of no known form.
        """
        prompts, single = _prompts(X)
        if not prompts:
            return []
        answers = self._loaded().answer(prompts, **{**thaw(self._spec.predict_kwargs), **kwargs})
        return answers[0] if single else answers

    def predict_one(self, X: Prompt, **kwargs: Any) -> str:
        """``predict`` of one prompt or chat."""
        return str(self.predict(X, **kwargs))

    def predict_batches(self, dataset: Sequence[Prompt], **kwargs: Any) -> list[str]:
        """``predict`` of a list."""
        return list(self.predict(list(dataset), **kwargs))

    def stream(self, X: Prompt, **kwargs: Any) -> Iterator[str]:
        """Answers one prompt or chat piece by piece."""
        prompts, _ = _prompts(X)
        yield from self._loaded().stream(prompts[0], **{**thaw(self._spec.predict_kwargs), **kwargs})

    def __call__(self, X: Prompt | Sequence[Prompt], **kwargs: Any) -> Any:
        return self.predict(X, **kwargs)

    def close(self) -> None:
        """Gives the memory of the weights back. The next ``predict`` loads them again."""
        if self._answerer is not None:
            self._answerer.close()
            self._answerer = None

    def merge(self, path: str | Path) -> MergeReport:
        """Merges the adapter into the full-precision base and saves the whole model as safetensors.

        ``db.merge`` does the same in a process of its own and measures on the run's own rows.

        Args:
            path: a folder that does not exist yet, or is empty.

        Returns:
            The proof, measured on a few sentences: ``report["max_logit_gap"]``, ``report.kl``, ….

        Raises:
            ModelError: there is no adapter.
            AdapterMismatch: the adapter was trained on another base.
            ArtifactError: the folder is in use or cannot be written.
        """
        from .engine.quiet import hushed

        spec, adapter = self._resolved()
        if adapter is None:
            raise ModelError("There is no adapter to merge.", seen=repr(self), todo="train, or give adapter_id")
        with hushed():
            from .engine import merging

            return merging.merge(spec, adapter, Path(path))

    # -- loading ---------------------------------------------------------------------------------------------

    def _loaded(self) -> Answerer:
        known = self._tuned
        if self.checkpoint != known:
            self.close()
        if self._answerer is None:
            from .engine.quiet import hushed

            spec, adapter = self._resolved()
            with hushed():
                from .engine.generation import Answerer

                self._answerer = Answerer(spec, adapter)
        return self._answerer

    def _resolved(self) -> tuple[ModelSpec, Path | None]:
        """The spec to load and the adapter's folder: a whole-model checkpoint takes the base's place."""
        adapter: Any = self.checkpoint or self.adapter_id
        if isinstance(adapter, str) and not Path(adapter).exists():
            for database in databases(self._database):
                found = database.find_checkpoint(adapter)
                if found is not None:
                    adapter = found
                    break
        if isinstance(adapter, Checkpoint):
            if adapter.path is None:
                known = databases(self._database)
                if not known:
                    raise ModelError(
                        f"The files of checkpoint {adapter} are not on this machine.",
                        todo=f"db.load('checkpoint', {adapter.experiment!r}, {adapter.step})",
                    )
                adapter = known[0].fetch(adapter)
            path = Path(str(adapter.path))
            if adapter.kind != "adapter":
                return replace(self._spec, model_name_or_path=str(path), adapter_id=None), None
            return replace(self._spec, adapter_id=None), path
        if adapter is None:
            return self._spec, None
        return replace(self._spec, adapter_id=None), Path(adapter)


def _adapter_name(adapter: Any) -> str | None:
    if adapter is None:
        return None
    if isinstance(adapter, (str, Path, Checkpoint)):
        return str(adapter)
    raise ConfigError([Fault("adapter_id", f"must be a path, a name or a Checkpoint, not {type(adapter).__name__}")])


def _unknown(name: str) -> Fault:
    close = near(name, (*ModelSpec.__dataclass_fields__, "trainer", "configuration"))
    return Fault(name, "is not an argument of LLM", f"did you mean {close[0]}?" if close else "put it in model_kwargs")


def _chat(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A document's messages, with the tools beside them as they are read for training."""
    if not document.get("tools"):
        return list(document["messages"])
    from .engine.samples import Reader

    sample = Reader("messages", "messages", None, []).read(document)
    if isinstance(sample, str):
        raise ModelError("predict was given a chat that it cannot read.", seen=sample)
    chat: list[dict[str, Any]] = sample.value
    return chat


def _prompts(X: Any) -> tuple[list[Any], bool]:
    """(prompts, whether it was a single one)."""
    if isinstance(X, str):
        return [X], True
    if isinstance(X, Mapping) and "messages" in X:
        return [_chat(X)], True
    if isinstance(X, Sequence) and not isinstance(X, (bytes, bytearray)):
        items = list(X)
        if items and all(isinstance(i, Mapping) and "role" in i for i in items):
            return [items], True
        if all(isinstance(i, str) for i in items):
            return items, False
        if all(isinstance(i, Sequence) or (isinstance(i, Mapping) and "messages" in i) for i in items):
            return [_chat(i) if isinstance(i, Mapping) else i for i in items], False
    raise ModelError(
        "predict was given something it cannot read.",
        seen=f"{type(X).__name__}: {X!r:.80}",
        todo="a text, a list of texts, or chat messages [{'role': 'user', 'content': '…'}]",
    )
