"""Prompts to text: one base model in memory, adapters swapped on it.

Knows how to generate, not who asks. A prompt is a string (put into the prompt template) or a list of chat messages (put
into the chat template); both become exactly the tokens that a training row would begin with.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ModelSpec, thaw
from ..errors import ConfigError, DataError, Fault
from . import adapters, bases, manifest
from .memory import forget, give_back
from .sampling import split_options
from .voices import Anew, Voice, Voices, template_of

__all__ = ["Answerer"]

Prompt = str | Sequence[Mapping[str, Any]]

_NEW_TOKENS = 256  # when the person says nothing


class Answerer:
    """A model that answers.

    Args:
        spec: the base; ``spec.predict_kwargs`` are the defaults of every call.
        adapter: a checkpoint folder, an adapter's hub id, or None for the base itself. The folder of a whole
            model is loaded in the base's place.
        bits: 4 or 8; None takes ``spec.bits``.

    Attributes:
        told: of the last stream, once it has ended: ``tokens`` (new ones), ``seconds`` (from the prompt to the last of
            them), ``cut`` (True when it ended at its limit, not by itself), ``notes`` (what was changed in it).
        cut: how many of the last ``answer``'s ended at their limit, not by themselves.

    Raises:
        ModelError: the model or adapter cannot be loaded.
        AdapterMismatch: the adapter was trained on another base.
    """

    def __init__(self, spec: ModelSpec, adapter: str | Path | None = None, *, bits: int | None = None) -> None:
        self._spec, self._bits = spec, bits
        self._lock = threading.RLock()
        self._voices: Voices = None  # type: ignore[assignment]
        self._loaded = ""  # folder or hub id of the base in memory
        self.name: str | None = None
        self.told: dict[str, Any] = {}
        self.cut = 0
        self._notes: list[str] = []
        self._room: int | None = None  # new tokens of the last call at most
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
        self._loaded = spec.model_name_or_path
        fingerprint = bases.fingerprint(spec.model_name_or_path, **bases.where(spec.model_kwargs))
        card = manifest.read(self._loaded) if Path(self._loaded).is_dir() else {}
        template, turns = template_of(spec, card.get("prompt_template")), card.get("rows_kind") == "messages"
        self._voice = Voice(tokenizer, template, bases.vocabulary_rows(model), turns)
        self._voices = Voices(spec, model, self._voice, fingerprint)

    @property
    def model(self) -> Any:
        """What answers now, the adapter on it; another object after a ``swap``."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Of what answers now."""
        return self._voice.tokenizer

    @property
    def vocabulary(self) -> int:
        """Ids below it are those of what answers now; logits may have more, for the tokens of another adapter."""
        return self._voice.rows

    @property
    def _model(self) -> Any:
        return self._voices.model if self._voices is not None else None

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
            folder = None if adapter is None else adapters.find_adapter(adapter)
            if folder is not None and manifest.kind_of(folder) != "adapter":
                if self._loaded != str(folder):
                    self._load(replace(self._spec, model_name_or_path=str(folder)))
                voice = self._voices.base
            else:
                if self._voices is None or self._loaded != self._spec.model_name_or_path:
                    self._load(self._spec)
                voice = self._voices.base if folder is None else self._attach(folder)
            self._voices.use(voice)
            self._voice, self.name = voice, name

    def _attach(self, folder: Path) -> Voice:
        try:
            try:
                return self._voices.find(folder)
            except Anew:
                self._load(self._spec)
                return self._voices.find(folder)
        except BaseException as error:
            if self._voices.broken:
                forget(error)
                self._load(self._spec)
            raise

    def close(self) -> None:
        """Gives the memory back; the answerer is of no more use."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._voices = self._voice = None  # type: ignore[assignment]
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
            answers, self.cut = [""] * len(prompts), 0
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
        count = 0
        last = -1

        class Closed(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((input_ids.shape[0],), enough.is_set(), device=input_ids.device)

        stops, words = self._stops(chat)

        class Streamer(TextIteratorStreamer):
            def put(self, value: Any) -> None:
                nonlocal count, last
                if not self.next_tokens_are_prompt:
                    count, last = count + 1, int(value.reshape(-1)[-1])
                    if last in stops:  # one that the tokenizer does not call special would be shown
                        return
                super().put(value)

        streamer = Streamer(self._voice.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        begun = time.monotonic()

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
            cut = 0 < (self._room or 0) <= count and last not in stops
            self.told = {"tokens": count, "seconds": time.monotonic() - begun, "cut": cut, "notes": self._notes}
        if failed:
            raise failed[0]

    def _generate(self, ids: list[list[int]], chat: bool, options: dict[str, Any]) -> list[str]:
        stops, words = self._stops(chat)
        new = self._raw(ids, stops, words, options)
        texts = []
        for row in new:
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            text = self._voice.tokenizer.decode(row[:end], skip_special_tokens=True)
            stopped = end < len(row) or row[-1:] == [self._voice.tokenizer.pad_token_id]
            for word in words:
                stopped |= word in text
                text = text.split(word)[0]
            self.cut += not stopped and 0 < (self._room or 0) <= len(row)
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
        spare = range(self._voice.rows, self._voices.rows)  # rows that another adapter's tokens brought
        if spare:
            options["suppress_tokens"] = [*(options.get("suppress_tokens") or []), *spare]
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
        """The random numbers of this call's own seed."""
        import torch

        with contextlib.ExitStack() as stack:
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
        return chat_ids(prompt, self._voice.tokenizer)

    def _limit(self, options: dict[str, Any], prompt: int) -> None:
        """Keeps prompt and answer within the model's context."""
        self._notes, self._room = [], None
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
                self._notes.append(text)
            room = context - prompt
        self._room = room
        options["max_new_tokens"] = room
        options["max_length"] = None

    def _stops(self, chat: bool) -> tuple[list[int], list[str]]:
        """Token ids that end an answer, and strings that do where no single token does."""
        from .templates import stops

        own = getattr(self._model.generation_config, "eos_token_id", None)
        return stops(self._voice.tokenizer, own, chat or self._voice.turns)


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
