"""Prompts to text: one base model in memory, adapters swapped on it.

Knows how to generate, not who asks. A prompt is a string (put into the prompt template) or a list of chat messages (put
into the chat template); both become exactly the tokens that a training row would begin with.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import ModelSpec, thaw
from ..errors import ConfigError, DataError, Fault
from . import adapters, bases, manifest
from .memory import forget, give_back
from .sampling import split_options

__all__ = ["Answerer"]

Prompt = str | Sequence[Mapping[str, Any]]

_NEW_TOKENS = 256  # when the person says nothing
_KEPT = 4  # adapters in memory at once


@dataclass
class _Voice:
    """What answers at the moment: the base (``peft`` None) or an adapter, with its own tokenizer and templates."""

    peft: str | None
    tokenizer: Any
    prompt_template: str


class Answerer:
    """A model that answers.

    Args:
        spec: the base; ``spec.predict_kwargs`` are the defaults of every call.
        adapter: a checkpoint folder, an adapter's hub id, or None for the base itself. The folder of a whole
            model is loaded in the base's place.
        bits: 4 or 8; None takes ``spec.bits``.

    Raises:
        ModelError: the model or adapter cannot be loaded.
        AdapterMismatch: the adapter was trained on another base.
    """

    def __init__(self, spec: ModelSpec, adapter: str | Path | None = None, *, bits: int | None = None) -> None:
        self._spec, self._bits = spec, bits
        self._lock = threading.RLock()
        self._voices: OrderedDict[str, _Voice] = OrderedDict()
        self._count = 0
        self._model: Any = None
        self._fingerprint = ""
        self._loaded = ""  # folder or hub id of the base in memory
        self.name: str | None = None
        try:
            if adapter is None:
                self._load(spec)
            else:
                self.swap(adapter)
        except BaseException as error:
            self.close()
            forget(error)
            raise

    # --- models ---------------------------------------------------------------------------------------------

    def _load(self, spec: ModelSpec) -> None:
        if self._model is not None:
            self._drop()
        model, tokenizer = bases.load_base(spec, bits=self._bits)
        bases.ensure_pad(tokenizer, model)
        model.config.use_cache = True
        if model.generation_config is not None:
            model.generation_config.use_cache = True
        model.eval()
        model.requires_grad_(False)
        self._model, self._loaded = model, spec.model_name_or_path
        self._fingerprint = bases.fingerprint(spec.model_name_or_path, **bases.where(spec.model_kwargs))
        template = (
            manifest.read(spec.model_name_or_path).get("prompt_template") if Path(self._loaded).is_dir() else None
        )
        self._base = self._voice = _Voice(None, tokenizer, _template(spec, template))

    def swap(self, adapter: str | Path | None, name: str | None = None) -> None:
        """Answers from another adapter from now on; the base stays where it is.

        Args:
            adapter: a folder or hub id; None for the base itself.
            name: what ``self.name`` says afterwards.

        Raises:
            ModelError: it cannot be loaded; the one before stays.
            AdapterMismatch: it was trained on another base.
        """
        with self._lock:
            if adapter is None:
                if self._model is None or self._loaded != self._spec.model_name_or_path:
                    self._load(self._spec)
                self._voice, self.name = self._base, name
                return
            folder = adapters.find_adapter(adapter)
            if manifest.kind_of(folder) != "adapter":
                if self._loaded != str(folder):
                    self._load(replace(self._spec, model_name_or_path=str(folder)))
                self._voice, self.name = self._base, name
                return
            if self._model is None or self._loaded != self._spec.model_name_or_path:
                self._load(self._spec)
            self._voice, self.name = self._attach(folder), name

    def _attach(self, folder: Path) -> _Voice:
        key = str(folder.resolve())
        if key in self._voices:
            self._voices.move_to_end(key)
            voice = self._voices[key]
        else:
            adapters.check_base(folder, self._spec.model_name_or_path, self._fingerprint)
            card = manifest.read(folder)
            tokenizer = bases.load_tokenizer(self._spec, folder)
            bases.ensure_pad(tokenizer, None)
            if card.get("vocabulary"):
                inner = self._model.get_base_model() if hasattr(self._model, "peft_config") else self._model
                bases.fit_vocabulary(inner, tokenizer, rows=card["vocabulary"])
            while len(self._voices) >= _KEPT:
                _, oldest = self._voices.popitem(last=False)
                self._model.delete_adapter(oldest.peft)
            self._count += 1
            voice = _Voice(f"adapter{self._count}", tokenizer, _template(self._spec, card.get("prompt_template")))
            self._model = adapters.load_adapter(self._model, folder, name=str(voice.peft))
            self._voices[key] = voice
        self._model.set_adapter(voice.peft)
        self._model.requires_grad_(False)
        return voice

    def close(self) -> None:
        """Gives the memory back; the answerer is of no more use."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._model = None
        self._voices.clear()
        self._base = self._voice = None  # type: ignore[assignment]
        self._loaded = ""
        give_back()

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- answers --------------------------------------------------------------------------------------------

    def answer(self, prompts: Sequence[Prompt], **kwargs: Any) -> list[str]:
        """The new text for each prompt, in their order.

        Args:
            prompts: strings, or lists of messages (dicts with role and content).
            kwargs: of ``generate`` (max_new_tokens, do_sample, temperature, …), and ``batch_size`` (8),
                ``seed``, ``prompt_template``. Greedy unless sampling is asked for.

        Raises:
            ConfigError: an option that generation does not have.
            DataError: a prompt that is longer than the model's context.
        """
        try:
            return self._answer(list(prompts), kwargs)
        except BaseException as error:
            forget(error)
            raise

    def _answer(self, prompts: list[Prompt], kwargs: Mapping[str, Any]) -> list[str]:
        import torch

        with self._lock, torch.inference_mode():
            ours, options = self._options(kwargs)
            ids = [self._ids(prompt, ours) for prompt in prompts]
            chats = [not isinstance(prompt, str) for prompt in prompts]
            order = sorted(range(len(prompts)), key=lambda i: (chats[i], len(ids[i])))
            answers = [""] * len(prompts)
            size = max(1, int(ours.get("batch_size") or 8))
            with self._speaking(ours):
                for group in _groups(order, chats, size):
                    for place, text in zip(group, self._generate([ids[i] for i in group], chats[group[0]], options)):
                        answers[place] = text
            return answers

    def stream(self, prompt: Prompt, **kwargs: Any) -> Iterator[str]:
        """The new text of one prompt, piece by piece, as ``answer`` would give it.

        Closing the iterator ends the generation. Options are checked before the first piece is asked for.
        """
        ours, options = self._options(kwargs)
        ids = self._ids(prompt, ours)
        return self._stream(ids, not isinstance(prompt, str), ours, options)

    def _stream(self, ids: list[int], chat: bool, ours: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        enough = threading.Event()

        class Closed(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((input_ids.shape[0],), enough.is_set(), device=input_ids.device)

        stops, words = self._stops(chat)

        class Streamer(TextIteratorStreamer):
            def put(self, value: Any) -> None:
                # A stop token that the tokenizer does not call special would be shown.
                if value.numel() == 1 and int(value.reshape(-1)[0]) in stops and not self.next_tokens_are_prompt:
                    return
                super().put(value)

        streamer = Streamer(self._voice.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        def work() -> None:
            try:
                with self._lock, torch.inference_mode(), self._speaking(ours):
                    criteria = StoppingCriteriaList([*(options.get("stopping_criteria") or []), Closed()])
                    settings = {**options, "streamer": streamer, "stopping_criteria": criteria}
                    self._raw([ids], stops, words, settings)
            except BaseException as error:  # noqa: BLE001 - a thread's border: it is raised where the text is read
                forget(error)
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=work, name="llmnb-answer", daemon=True)
        thread.start()
        try:
            yield from _without_stop(streamer, words)
        finally:
            enough.set()
            thread.join()
        if failed:
            raise failed[0]

    def _generate(self, ids: list[list[int]], chat: bool, options: dict[str, Any]) -> list[str]:
        stops, words = self._stops(chat)
        new = self._raw(ids, stops, words, options)
        texts = []
        for row in new:
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            text = self._voice.tokenizer.decode(row[:end], skip_special_tokens=True)
            for word in words:
                text = text.split(word)[0]
            texts.append(text)
        return texts

    def _raw(
        self, ids: list[list[int]], stops: list[int], words: list[str], options: dict[str, Any]
    ) -> list[list[int]]:
        """New tokens of each row. The batch is padded on the left: every prompt ends where its answer begins."""
        import torch

        options = dict(options)
        tokenizer, model = self._voice.tokenizer, self._model
        longest = max(map(len, ids))
        self._limit(options, longest)
        pad = tokenizer.pad_token_id
        device = model.get_input_embeddings().weight.device
        tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)  # (batch, seq)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        options.setdefault("eos_token_id", stops or None)
        if words:
            options["stop_strings"] = [*(options.get("stop_strings") or []), *words]
        if options.get("stop_strings"):
            options["tokenizer"] = tokenizer
        out = model.generate(input_ids=tokens, attention_mask=mask, pad_token_id=pad, **options)
        out = out if isinstance(out, torch.Tensor) else out.sequences
        return out[:, longest:].tolist()

    @contextlib.contextmanager
    def _speaking(self, ours: Mapping[str, Any]) -> Iterator[None]:
        """The adapter on or off, and the random numbers of this call's own seed."""
        import torch

        with contextlib.ExitStack() as stack:
            if self._voice.peft is None and hasattr(self._model, "peft_config"):
                stack.enter_context(self._model.disable_adapter())
            if ours.get("seed") is not None:
                stack.enter_context(torch.random.fork_rng())
                torch.manual_seed(int(ours["seed"]))
            yield

    # --- settings -------------------------------------------------------------------------------------------

    def _options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Our settings and generate's, checked."""
        if self._model is None:
            raise ConfigError([Fault("Answerer", "was closed", "make a new one")])
        return split_options({**thaw(dict(self._spec.predict_kwargs)), **kwargs})

    def _ids(self, prompt: Prompt, ours: Mapping[str, Any]) -> list[int]:
        from .templates import chat_ids, prompt_ids

        if isinstance(prompt, str):
            return prompt_ids(prompt, self._voice.tokenizer, ours.get("prompt_template") or self._voice.prompt_template)
        return chat_ids(list(prompt), self._voice.tokenizer)

    def _limit(self, options: dict[str, Any], prompt: int) -> None:
        """Keeps prompt and answer within the model's context."""
        context = getattr(self._model.config, "max_position_embeddings", None)
        if context is not None and prompt >= context:
            raise DataError(
                f"The prompt has {prompt} tokens, and the model takes {context}.", todo="shorten it, or drop old turns"
            )
        if options.get("max_length") is not None and options.get("max_new_tokens") is None:
            return
        asked = options.get("max_new_tokens")
        room = asked if asked is not None else _NEW_TOKENS
        if context is not None and prompt + room > context:
            if asked is not None:
                text = f"max_new_tokens={asked} was lowered to {context - prompt}: the model takes {context} tokens"
                warnings.warn(text, stacklevel=2)
            room = context - prompt
        options["max_new_tokens"] = room
        options["max_length"] = None

    def _stops(self, chat: bool) -> tuple[list[int], list[str]]:
        """Token ids that end an answer, and strings that do where no single token does."""
        tokenizer = self._voice.tokenizer
        own = getattr(self._model.generation_config, "eos_token_id", None)
        ids = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
        words: list[str] = []
        if chat:
            from .templates import ChatTemplate

            closer = ChatTemplate(tokenizer).closer.strip()
            closing = tokenizer.encode(closer, add_special_tokens=False) if closer else []
            if len(closing) == 1:
                ids.add(closing[0])
            elif closing:
                words.append(closer)
        return sorted(i for i in ids if i is not None), words


def _template(spec: ModelSpec, recorded: str | None) -> str:
    """The person's prompt template when they gave one, else the one that the weights were trained with."""
    return spec.prompt_template if spec.prompt_template != "{input}" else recorded or spec.prompt_template


def _groups(order: Sequence[int], chats: Sequence[bool], size: int) -> Iterator[list[int]]:
    """Batches of prompts of one kind."""
    for kind in (False, True):
        same = [i for i in order if chats[i] == kind]
        for begin in range(0, len(same), size):
            yield same[begin : begin + size]


def _without_stop(pieces: Iterator[str], words: list[str]) -> Iterator[str]:
    """The pieces up to a stop string; what might be the beginning of one is held back."""
    if not words:
        yield from (piece for piece in pieces if piece)
        return
    held = ""
    done = False
    longest = max(map(len, words))
    for piece in pieces:
        if done:
            continue
        held += piece
        cut = min((held.find(word) for word in words if word in held), default=-1)
        if cut >= 0:
            held, done = held[:cut], True
        ready = held if done else held[: max(0, len(held) - longest + 1)]
        held = "" if done else held[len(ready) :]
        if ready:
            yield ready
    if held:
        yield held
