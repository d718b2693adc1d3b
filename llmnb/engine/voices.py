"""Adapters on one base in memory, swapped in a millisecond, each answering as if it were the only one.

Adapters of one shape (the same LoRA settings and tensors, as all checkpoints of a run have) share one place in the
model: a swap hands that place other tensors, nothing is copied, no module is made. Other shapes have other places.
What an adapter changes in the base itself (trained biases, rows for new tokens) is undone for the others. Knows nothing
of prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ModelSpec
from ..errors import ModelError
from . import adapters, bases, manifest

__all__ = ["Anew", "Voice", "Voices", "template_of"]

_KEPT = 4  # adapters in memory at once
_TOKENIZERS = 4
_TOKENIZER_FILES = ("*token*.json", "tokenizer.model", "*.jinja", "vocab.*", "merges.txt")
_NOT_SHAPE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


@dataclass
class Voice:
    """What answers: the base (``place`` None) or an adapter, with its own tokenizer and template.

    Attributes:
        rows: ids below it are this voice's; the embeddings may have more rows, for another one.
        turns: trained on chats, so that whatever it says ends as a turn does.
    """

    tokenizer: Any
    prompt_template: str
    rows: int
    turns: bool = False
    place: _Place | None = None
    weights: dict[str, Any] = field(default_factory=dict)
    biases: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Place:
    """One of peft's named adapters on the model, and the parameters that a swap hands other tensors."""

    name: str
    shape: str
    extras: set[str]
    parameters: dict[str, Any] = field(default_factory=dict)


class Anew(Exception):
    """The base must be loaded again, without the adapters that are on it."""


class Voices:
    """The adapters on one base.

    Args:
        spec: the base's.
        model: the base, frozen.
        base: its own voice.
        fingerprint: of its weights.
    """

    def __init__(self, spec: ModelSpec, model: Any, base: Voice, fingerprint: str) -> None:
        self.spec, self.model, self.base, self.fingerprint = spec, model, base, fingerprint
        self.wrapped = False
        self._kept: OrderedDict[tuple[Any, ...], Voice] = OrderedDict()
        self._places: list[_Place] = []
        self._count = 0
        self._layers: list[tuple[Any, bool]] = []
        self._biases: dict[str, tuple[Any, Any]] = {}  # name → (parameter, the base's own values)
        self._tokenizers: OrderedDict[str, Any] = OrderedDict()
        self._now: tuple[_Place | None, Voice] = (None, base)

    # --- choosing -------------------------------------------------------------------------------------------

    def use(self, voice: Voice) -> None:
        """This voice answers from now on."""
        place = voice.place
        if place is not None:
            for name, tensor in voice.weights.items():
                place.parameters[name].data = tensor
        for name, (parameter, own) in self._biases.items():
            parameter.data = voice.biases.get(name, own)
        if place is not self._now[0] and self.wrapped:
            self._switch(place)
        self._now = (place, voice)

    def _switch(self, place: _Place | None) -> None:
        """As ``set_adapter`` and ``disable_adapter`` do, without a walk through every module of the model."""
        for layer, auxiliary in self._layers:
            if place is None:
                layer.enable_adapters(False)
                continue
            mine = [place.name] if not auxiliary or place.name in layer._adapters else []
            if auxiliary and not mine:
                layer.enable_adapters(False)
                continue
            if layer.disable_adapters:
                layer.enable_adapters(True)
            layer.set_adapter(mine[0] if auxiliary else mine, inference_mode=True)
        if place is not None:
            self.model.active_adapter = place.name
            self.model.base_model.active_adapter = place.name

    def find(self, folder: Path) -> Voice:
        """The voice of an adapter's folder, loaded when it is not here.

        Raises:
            Anew: it changes the embeddings or whole modules, and cannot stand beside adapters of another shape.
            ModelError: it cannot be loaded; what answered before still does.
            AdapterMismatch: it was trained on another base.
        """
        key = (str(folder.resolve()), *_stamp(folder))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        adapters.check_base(folder, self.spec.model_name_or_path, self.fingerprint)
        card = manifest.read(folder)
        tokenizer = self._tokenizer(folder)
        template = template_of(self.spec, card.get("prompt_template"))
        rows, turns = max(self.base.rows, int(card.get("vocabulary") or 0)), card.get("rows_kind") == "messages"
        voice = Voice(tokenizer, template, rows, turns)
        weights = adapters.read_weights(folder)
        shape = _shape(folder, weights)
        while len(self._kept) >= _KEPT:
            self._drop_oldest()
        place = next((p for p in self._places if p.shape == shape), None)
        if place is None:
            more = adapters.extras(folder)
            if self.wrapped and (more or voice.rows > self.rows or any(p.extras for p in self._places)):
                raise Anew
            if voice.rows > self.rows:
                bases.fit_vocabulary(self.model, tokenizer, rows=voice.rows)
            self._new_place(voice, folder, _Place(f"adapter{self._count}", shape, more), weights)
        else:
            voice.place = place
            voice.weights = {name: _as(weights[name], place.parameters[name]) for name in place.parameters}
        self._kept[key] = voice
        return voice

    @property
    def rows(self) -> int:
        """Rows of the embeddings."""
        return bases.vocabulary_rows(self.model.get_base_model() if self.wrapped else self.model)

    @property
    def broken(self) -> bool:
        """True when the first adapter could not be put on the base and left its modules changed."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return not self.wrapped and any(isinstance(module, BaseTunerLayer) for module in self.model.modules())

    # --- loading --------------------------------------------------------------------------------------------

    def _new_place(self, voice: Voice, folder: Path, place: _Place, weights: Mapping[str, Any]) -> None:
        self._count += 1
        before = self._now[1]
        self.use(self.base)  # what the base has of its own is seen as it is
        if "bias" in place.extras:
            self._biases = {n: (p, p.data.clone()) for n, p in self.model.named_parameters() if n.endswith(".bias")}
        try:
            self.model = adapters.load_adapter(self.model, folder, name=place.name)
        except BaseException:
            self._undo(place.name, before)
            raise
        self.wrapped = True
        self._find_layers()
        voice.biases = {name: parameter.data.clone() for name, (parameter, _) in self._biases.items()}
        parameters = dict(self.model.named_parameters())
        found = {key: parameters.get(_named(key, place.name)) for key in weights}
        place.parameters = {k: p for k, p in found.items() if p is not None and p.shape == weights[k].shape}
        if len(place.parameters) < len(weights):
            place.shape += place.name  # no other adapter can take its place
        voice.place, voice.weights = place, {k: p.data for k, p in place.parameters.items()}
        self._places.append(place)
        self._switch(None)  # peft has turned on the new one's layers, and only those it has

    def _undo(self, name: str, before: Voice) -> None:
        if not self.wrapped:
            return  # ``broken`` says so
        if name in self.model.peft_config:
            self.model.delete_adapter(name)
        self._find_layers()
        self._now = (None, self.base)
        self._switch(None)
        self.use(before)

    def _find_layers(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = [
            (module, isinstance(module, AuxiliaryTrainingWrapper))
            for module in self.model.modules()
            if isinstance(module, kinds)
        ]

    def _drop_oldest(self) -> None:
        _, oldest = self._kept.popitem(last=False)
        place = oldest.place
        if place is None or any(v.place is place for v in self._kept.values()) or len(self._places) == 1:
            return
        if self._now[0] is place:
            self.use(self.base)
        self._places.remove(place)
        self.model.delete_adapter(place.name)
        self._find_layers()
        self._switch(self._now[0])

    def _tokenizer(self, folder: Path) -> Any:
        """Checkpoints of one run have the same tokenizer, and reading one may take longer than the adapter."""
        digest = hashlib.sha256()
        for pattern in _TOKENIZER_FILES:
            for file in sorted(folder.glob(pattern)):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
        key = digest.hexdigest()
        if key not in self._tokenizers:
            tokenizer = bases.load_tokenizer(self.spec, folder)
            bases.ensure_pad(tokenizer, None)
            self._tokenizers[key] = tokenizer
            while len(self._tokenizers) > _TOKENIZERS:
                self._tokenizers.popitem(last=False)
        self._tokenizers.move_to_end(key)
        return self._tokenizers[key]

    def __len__(self) -> int:
        return len(self._kept)


def template_of(spec: ModelSpec, recorded: str | None) -> str:
    """The person's prompt template when they gave one, else the one that the weights were trained with."""
    return spec.prompt_template if spec.prompt_template != "{input}" else recorded or spec.prompt_template


def _stamp(folder: Path) -> tuple[int, int]:
    """Another one after the adapter was written again."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            found = (folder / name).stat()
            return found.st_mtime_ns, found.st_size
    return 0, 0


def _shape(folder: Path, weights: Mapping[str, Any]) -> str:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The adapter in {folder} cannot be read.", seen=error) from error
    settings = {k: sorted(v) if _names(v) else v for k, v in config.items() if k not in _NOT_SHAPE}
    tensors = {key: (str(tensor.dtype), *tensor.shape) for key, tensor in weights.items()}
    return hashlib.sha256(json.dumps([settings, tensors], sort_keys=True, default=str).encode()).hexdigest()


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _named(key: str, name: str) -> str:
    """A key of an adapter's file as the model's parameter of that name."""
    head, dot, last = key.rpartition(".")
    return f"{head}.{name}.{last}" if last in ("weight", "bias") else f"{head}{dot}{last}.{name}"


def _as(tensor: Any, like: Any) -> Any:
    """A tensor of its own: files may change on the disk."""
    return tensor.to(device=like.device, dtype=like.dtype, copy=True)
