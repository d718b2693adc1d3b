"""An adapter into its base, and the proof that the result says the same.

The base is always loaded in its own 16- or 32-bit weights: an adapter that was merged into rounded weights would carry
the rounding with it. Knows no database.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ModelSpec
from ..errors import ModelError
from . import adapters, bases, manifest
from .memory import forget, give_back

__all__ = ["BOUNDS", "merge"]

# Largest gap between logits, as a share of the largest logit: what the dtype's rounding explains, with some room.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_SIZES = ("load_in_4bit", "load_in_8bit", "quantization_config", "device_map")
_TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return a +",
    "Question: What is 17 + 25?\nAnswer:",
    "Es war einmal ein kleines Mädchen, das",
    '{"name": "Ada", "year": 1815, "fields": ["',
)
_TOKENS = 64  # of each text


def merge(spec: ModelSpec, adapter: str | Path, out: str | Path) -> dict[str, Any]:
    """Merges an adapter into its base and saves the whole model as safetensors.

    The saved folder is loaded again and compared with the adapter on its base, token by token.

    Args:
        spec: the base. ``bits`` and a quantization_config are set aside: the base is loaded in full precision.
        adapter: a folder or hub id.
        out: a folder that is not there, or empty.

    Returns:
        ``max_logit_gap``, ``mean_logit_gap``, ``top_token_agreement`` (share of positions), ``bound``,
        ``max_logit``, ``moved`` (largest change against the base), ``tokens`` compared, ``dtype``, ``modules``,
        ``base_fingerprint`` and ``folder``.

    Raises:
        AdapterMismatch: the adapter was trained on another base, or its keys do not fit.
        ModelError: there is no full-precision base, or the merged model does not say what the adapter says.
    """
    folder, out = adapters.find_adapter(adapter), Path(out)
    if manifest.kind_of(folder) != "adapter":
        raise ModelError(f"{folder} is a whole model already.", todo="load it as it is")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty.", todo="give a new folder")
    try:
        return _merge(_plain(spec), folder, out)
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


def _merge(spec: ModelSpec, folder: Path, out: Path) -> dict[str, Any]:
    fingerprint = bases.fingerprint(spec.model_name_or_path, **bases.where(spec.model_kwargs))
    adapters.check_base(folder, spec.model_name_or_path, fingerprint)
    card = manifest.read(folder)
    model, _ = bases.load_base(spec)
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"The files of {spec.model_name_or_path} are quantised.",
            todo="merge into the model they were made from",
        )
    tokenizer = bases.load_tokenizer(spec, folder)
    bases.ensure_pad(tokenizer, None)
    if card.get("vocabulary"):
        bases.fit_vocabulary(model, tokenizer, rows=card["vocabulary"])
    model.eval()
    rows = _rows(tokenizer)
    before = _logits(model, rows)
    model = adapters.load_adapter(model, folder)
    modules = len(adapters.lora_modules(model))
    wanted = _logits(model, rows)
    model = model.merge_and_unload(safe_merge=True)
    model.config.use_cache = True
    dtype = str(model.dtype).removeprefix("torch.")
    with bases.quiet():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    del model
    give_back()
    report = _compare(_logits(_reload(out, spec), rows), wanted, before)
    report |= {"dtype": dtype, "modules": modules, "base_fingerprint": fingerprint, "folder": str(out)}
    report["bound"] = BOUNDS.get(dtype, BOUNDS["bfloat16"]) * report["max_logit"]
    manifest.write(out, _merged_card(card, report, out))
    if report["max_logit_gap"] > report["bound"]:
        raise ModelError(
            "The merged model does not say what the adapter says.",
            seen=f"logits differ by up to {report['max_logit_gap']:.3g}; {report['bound']:.3g} is rounding ({dtype})",
            todo=f"the folder {out} was kept for inspection; keep using the adapter",
        )
    return report


def _merged_card(card: dict[str, Any], report: dict[str, Any], out: Path) -> dict[str, Any]:
    return {
        "base": str(out),
        "base_fingerprint": bases.fingerprint(str(out)),
        "kind": "model",
        "step": card.get("step"),
        "chat_template": card.get("chat_template"),
        "prompt_template": card.get("prompt_template"),
        "merged": {"from": card.get("base"), **{k: v for k, v in report.items() if k != "folder"}},
        "versions": manifest.versions(),
    }


def _reload(out: Path, spec: ModelSpec) -> Any:
    """The saved model; keys that are missing or belong nowhere raise."""
    from transformers import AutoModelForCausalLM

    kwargs = {k: v for k, v in bases.translate_kwargs(spec.model_kwargs).items() if k not in bases.HUB}
    kwargs["dtype"] = "auto"
    with bases.quiet():
        model, info = AutoModelForCausalLM.from_pretrained(str(out), output_loading_info=True, **kwargs)
    wrong = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ()), *info.get("mismatched_keys", ())]
    if wrong:
        raise ModelError("The merged model was not saved whole.", seen=", ".join(map(str, wrong[:6])))
    return model.eval()


def _rows(tokenizer: Any) -> list[list[int]]:
    return [ids for text in _TEXTS if (ids := tokenizer(text)["input_ids"][:_TOKENS])]


def _logits(model: Any, rows: list[list[int]]) -> list[Any]:
    """Logits of each row, float32 on the CPU, (seq, vocab)."""
    import torch

    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in rows]


def _compare(merged: list[Any], wanted: list[Any], before: list[Any]) -> dict[str, Any]:
    gaps = [(a - b).abs() for a, b in zip(merged, wanted)]
    count = sum(gap.numel() for gap in gaps)
    positions = sum(len(row) for row in wanted)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(merged, wanted))
    return {
        "max_logit_gap": max(float(gap.max()) for gap in gaps),
        "mean_logit_gap": sum(float(gap.sum()) for gap in gaps) / count,
        "top_token_agreement": same / positions,
        "max_logit": max(float(row.abs().max()) for row in wanted),
        "moved": max(float((a - b).abs().max()) for a, b in zip(merged, before)),
        "tokens": positions,
    }
