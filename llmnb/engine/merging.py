"""An adapter into its base, and the proof that the result says the same.

The base is always loaded in its own 16- or 32-bit weights: an adapter that was merged into rounded weights would carry
the rounding with it. What was written is loaded again and compared. Knows no database.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import ModelSpec
from ..errors import LlmnbError, ModelError
from ..folders import new_folder, place, room
from . import adapters, bases, manifest
from .memory import forget, give_back
from .proof import MergeReport, Probe
from .templates import begins_as_trained

__all__ = ["BOUNDS", "merge"]

# Largest gap between logits, as a share of the largest logit: what the dtype's rounding explains, with some room.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_SIZES = ("load_in_4bit", "load_in_8bit", "quantization_config", "device_map")
# What a merge is measured on when the rows of its run are not at hand.
_TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return a +",
    "Question: What is 17 + 25?\nAnswer:",
    "Es war einmal ein kleines Mädchen, das",
    '{"name": "Ada", "year": 1815, "fields": ["',
)
_ROWS, _TOKENS = 64, 2048
# Logits are kept once, on the host: at most half a gigabyte of float32.
_ELEMENTS = 2**27
_PIECE = 64  # positions that are compared at once

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Row:
    """Token ids, and at which of them there is loss."""

    ids: list[int]
    labels: list[int]


@dataclass
class _Said:
    """What a model said to the rows: logits of each, (seq, vocab), on the CPU; and the loss of each trained token."""

    logits: list[Any]
    losses: list[float]

    @property
    def dtype(self) -> str:
        return str(self.logits[0].dtype).removeprefix("torch.")

    @property
    def perplexity(self) -> float | None:
        return math.exp(min(math.fsum(self.losses) / len(self.losses), 700.0)) if self.losses else None


def merge(
    spec: ModelSpec, adapter: str | Path, out: str | Path, *, probe: Probe | None = None, say: Say | None = None
) -> MergeReport:
    """Merges an adapter into its base and saves the whole model as safetensors.

    The saved folder is loaded again and compared with the adapter on its base, token by token. It takes its name only
    after that.

    Args:
        spec: the base. ``bits`` and a quantization_config are set aside: the base is loaded in full precision.
        adapter: a folder or hub id.
        out: a folder that is not there, or empty.
        probe: what to measure on; None: a few sentences.
        say: told what is being done, in a few words.

    Raises:
        AdapterMismatch: the adapter was trained on another base, or its keys do not fit.
        ArtifactError: the folder is in use or cannot be written; no space left.
        ModelError: there is no full-precision base, or the merged model does not say what the adapter says.
    """
    place(out)
    folder = adapters.find_adapter(adapter)
    if manifest.kind_of(folder) != "adapter":
        raise ModelError(f"{folder} is a whole model already: nothing to merge.", todo="load or export it as it is")
    try:
        with new_folder(out) as part:
            return _Merge(spec, folder, say or (lambda words: None)).into(part, str(out), probe)
    except BaseException as error:
        forget(error)
        raise
    finally:
        give_back()


def _plain(spec: ModelSpec) -> ModelSpec:
    """The same base without quantisation."""
    kwargs = bases.translate_kwargs(spec.model_kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _SIZES}
    kwargs.setdefault("dtype", "auto")
    return replace(spec, bits=None, model_kwargs=kwargs)


class _Merge:
    """One merge."""

    def __init__(self, spec: ModelSpec, folder: Path, say: Say) -> None:
        self.spec, self.given, self.folder, self.say = _plain(spec), spec, folder, say
        self.card = manifest.read(folder)

    def into(self, part: Path, out: str, probe: Probe | None) -> MergeReport:
        self.say("checking the base")
        bases.check_path(self.spec.model_name_or_path)
        fingerprint = bases.fingerprint(self.spec.model_name_or_path, **bases.where(self.spec.model_kwargs))
        adapters.check_base(self.folder, self.spec.model_name_or_path, fingerprint)
        self.say("loading the base")
        model, tokenizer = self._base(self.spec, None)
        if getattr(model, "is_quantized", False):
            raise ModelError(
                f"The files of {self.spec.model_name_or_path} are quantised.",
                todo="merge into the model they were made from",
            )
        room(part, model.get_memory_footprint())
        rows, words = _rows(tokenizer, self.spec, probe, bases.vocabulary_rows(model))
        self.say(f"asking the base, {len(rows)} rows")
        before = _ask(model, rows)
        model = adapters.load_adapter(model, self.folder)
        modules = len(adapters.lora_modules(model))
        self.say(f"asking the adapter, {len(rows)} rows")
        wanted, moved = _ask_again(model, rows, before)
        self.say("merging and writing")
        model = model.merge_and_unload(safe_merge=True)
        self._write(model, tokenizer, part)
        del model
        give_back()
        self.say("loading what was written, and comparing")
        merged = _ask(_reload(part, self.spec), rows)
        give_back()
        found = self._compared(part, merged, wanted)
        report = MergeReport(
            folder=out,
            base=self.spec.model_name_or_path,
            base_fingerprint=fingerprint,
            modules=modules,
            size=sum(path.stat().st_size for path in part.rglob("*") if path.is_file()),
            rows_from=words,
            rows=len(rows),
            trained_tokens=len(wanted.losses),
            perplexity_base=before.perplexity,
            perplexity_adapter=wanted.perplexity,
            perplexity_merged=merged.perplexity,
            moved=moved,
            bits=self.card.get("bits"),
            quantised=self._quantised(rows, merged),
            **found,
        )
        report.write(part, self.card)
        manifest.write(part, self._merged_card(report, part))
        return report

    def _base(self, spec: ModelSpec, bits: int | None) -> tuple[Any, Any]:
        """The base, with a row for each token that the adapter knows, and the tokenizer that it was trained with."""
        model, _ = bases.load_base(spec, bits=bits)
        tokenizer = bases.load_tokenizer(spec, self.folder)
        bases.ensure_pad(tokenizer, None)
        if self.card.get("rows_kind") == "messages":
            tokenizer = begins_as_trained(tokenizer)  # an adapter of an earlier version may not
            self.card["chat_template"] = tokenizer.chat_template
        if self.card.get("vocabulary"):
            bases.fit_vocabulary(model, tokenizer, rows=self.card["vocabulary"])
        return model.eval(), tokenizer

    def _write(self, model: Any, tokenizer: Any, part: Path) -> None:
        model.config.use_cache = True
        bases.stop_as_trained(model, tokenizer, self.card.get("rows_kind") == "messages")
        with bases.quiet():
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)

    def _compared(self, part: Path, merged: _Said, wanted: _Said) -> dict[str, Any]:
        """The gaps, in one dtype.

        Raises:
            ModelError: they are larger than what rounding explains.
        """
        found = _gaps(merged, wanted)
        dtype = wanted.dtype
        scale = max(float(row.abs().max()) for row in wanted.logits)
        bound = BOUNDS.get(dtype, BOUNDS["bfloat16"]) * scale
        if not found["max_logit_gap"] <= bound:  # not a number is no proof
            raise ModelError(
                "The merged model does not say what the adapter says.",
                seen=f"logits differ by up to {found['max_logit_gap']:.3g}; {bound:.3g} is rounding ({dtype})",
                todo="nothing was kept; use the adapter on its base",
            )
        return {**found, "max_logit": scale, "bound": bound, "dtype": dtype}

    def _quantised(self, rows: list[_Row], merged: _Said) -> dict[str, Any] | None:
        """The gap to what was trained, when that was an adapter on a base in 4 or 8 bits."""
        bits = self.card.get("bits")
        if bits is None:
            return None
        self.say(f"asking the adapter on the {bits}-bit base")
        try:
            model, _ = self._base(self.given, bits)
            said = _ask(adapters.load_adapter(model, self.folder), rows)
        except (LlmnbError, RuntimeError, NotImplementedError) as error:  # no bitsandbytes, no room for it
            return {"why": str(error).splitlines()[0]}
        found = _gaps(merged, said)
        del found["tokens"]
        return {**found, "perplexity": said.perplexity}

    def _merged_card(self, report: MergeReport, part: Path) -> dict[str, Any]:
        return {
            "base": report.folder,
            "base_fingerprint": bases.fingerprint(str(part)),
            "kind": "model",
            "step": self.card.get("step"),
            "chat_template": self.card.get("chat_template"),
            "prompt_template": self.card.get("prompt_template"),
            "rows_kind": self.card.get("rows_kind"),
            "merged": {"from": self.card.get("base"), **report.measured()},
            "versions": manifest.versions(),
        }


def _reload(part: Path, spec: ModelSpec) -> Any:
    """The saved model; keys that are missing or belong nowhere raise."""
    from transformers import AutoModelForCausalLM

    kwargs = {k: v for k, v in bases.translate_kwargs(spec.model_kwargs).items() if k not in bases.HUB}
    kwargs["dtype"] = "auto"
    with bases.quiet():
        model, info = AutoModelForCausalLM.from_pretrained(str(part), output_loading_info=True, **kwargs)
    wrong = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ()), *info.get("mismatched_keys", ())]
    if wrong:
        raise ModelError("The merged model was not saved whole.", seen=", ".join(map(str, wrong[:6])))
    return model.eval()


# --- what is asked ------------------------------------------------------------------------------------------


def _rows(tokenizer: Any, spec: ModelSpec, probe: Probe | None, vocabulary: int) -> tuple[list[_Row], str]:
    """The rows to measure on, and where they are from, in words."""
    room = max(16, min(_TOKENS, _ELEMENTS // max(vocabulary, 1)))
    why = ""
    if probe is not None and probe.config.transform and probe.transform is None:
        why = "the run's transform is not at hand"
    elif probe is not None and probe.documents:
        try:
            return _own_rows(tokenizer, spec, probe, room)
        except LlmnbError as error:
            why = error.what.rstrip(".")
    texts = [list(tokenizer(text)["input_ids"])[:64] for text in _TEXTS]
    found = [_Row(ids, [-100, *ids[1:]]) for ids in texts if len(ids) > 1]
    return found, f"{len(found)} sentences of our own" + (f" ({why})" if why else "")


def _own_rows(tokenizer: Any, spec: ModelSpec, probe: Probe, room: int) -> tuple[list[_Row], str]:
    from .rows import make_rows

    made = make_rows(
        probe.documents,
        tokenizer,
        replace(probe.config, max_cut_share=1.0),  # it was the training's to refuse
        prompt_template=spec.prompt_template,
        transform=probe.transform,
        context=bases.context_of(spec),
        name="measured",
    )
    found: list[_Row] = []
    cut = ""
    for at in range(len(made)):
        row = _Row(made.ids(at).tolist(), made.labels(at).tolist())
        if not found and len(row.ids) > room:
            row, cut = _Row(row.ids[-room:], row.labels[-room:]), f", its last {room} tokens"
        if len(row.ids) <= room and len(row.ids) > 1 and len(found) < _ROWS:
            found.append(row)
            room -= len(row.ids)
    words = "1 row" if len(found) == 1 else f"{len(found)} rows"
    return found, f"{words} of {probe.words}{cut}"


def _ask(model: Any, rows: list[_Row]) -> _Said:
    said = _Said([], [])
    for row in rows:
        logits, losses = _ask_row(model, row)
        said.logits.append(logits)
        said.losses += losses
    return said


def _ask_again(model: Any, rows: list[_Row], before: _Said) -> tuple[_Said, float]:
    """The same questions to a changed model, and the largest change; the logits of before are let go one by one."""
    said, moved = _Said([], []), 0.0
    for at, row in enumerate(rows):
        logits, losses = _ask_row(model, row)
        moved = max(moved, float((logits.float() - before.logits[at].float()).abs().max()))
        before.logits[at] = None
        said.logits.append(logits)
        said.losses += losses
    return said, moved


def _ask_row(model: Any, row: _Row) -> tuple[Any, list[float]]:
    """Logits in the model's dtype on the CPU, (seq, vocab), and the loss of each trained token."""
    import torch

    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([row.ids], device=device)).logits[0].cpu()
        labels = torch.tensor(row.labels[1:])
        at = torch.nonzero(labels >= 0)[:, 0]
        losses: list[float] = []
        for piece in at.split(_PIECE):
            losses += torch.nn.functional.cross_entropy(logits[piece].float(), labels[piece], reduction="none").tolist()
    return logits, losses


def _gaps(merged: _Said, other: _Said) -> dict[str, Any]:
    """How far two models are apart: ``tokens`` compared, and the fields of ``MergeReport`` that say the gap."""
    largest, total, count, kl, same, positions = 0.0, 0.0, 0, 0.0, 0, 0
    for ours, theirs in zip(merged.logits, other.logits):
        positions += len(ours)
        for a, b in zip(ours.split(_PIECE), theirs.split(_PIECE)):
            gap = (a.float() - b.float()).abs()
            largest = max(largest, float(gap.max())) if gap.isfinite().all() else math.nan
            total += float(gap.double().sum())
            count += gap.numel()
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            p, q = b.double().log_softmax(-1), a.double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
    return {
        "tokens": positions,
        "max_logit_gap": largest,
        "mean_logit_gap": total / count,
        "kl": max(kl / positions, 0.0),
        "top_token_agreement": same / positions,
    }
