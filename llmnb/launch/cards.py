"""A model card, filled from what the database knows of a run: how the weights came to be, and no name of the database.

Format: https://huggingface.co/docs/hub/model-cards . The documents' collection, its filter and paths of this machine
are not in it: a card is read by strangers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig, thaw
from ..engine.proof import FILE
from ..errors import ArtifactError, ConfigError, Fault, NotFound

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..store import Store

__all__ = ["base_for_others", "model_card", "proof_of", "without_paths"]

_SHOWN = ("learning_rate", "lr_scheduler_type", "num_train_epochs", "warmup_steps", "weight_decay", "optim")
_COUNTED = ("rows_per_step", "precision", "bits", "seed", "device")
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "loraplus_lr_ratio")


def base_for_others(checkpoint: Checkpoint, base: str | None) -> str:
    """The base under the name by which others find it.

    Raises:
        ConfigError: an adapter on a folder of this machine, and no other name is given.
    """
    name = base or checkpoint.base
    if checkpoint.kind == "adapter" and Path(name).expanduser().is_absolute():
        todo = "say where others find it: base='owner/name' (llmnb push --base)"
        raise ConfigError([Fault("base", "is a folder of this machine, which an adapter is of no use without", todo)])
    return Path(name).name if Path(name).expanduser().is_absolute() else name


def model_card(store: Store, checkpoint: Checkpoint, name: str, base: str, proof: str = "") -> str:
    """The card, in Markdown.

    Args:
        store: knows the run.
        checkpoint: what is described.
        name: of the model.
        base: as others know it.
        proof: what was measured when it was merged, in Markdown; "" for a checkpoint as it is.
    """
    try:
        record: Mapping[str, Any] = store.runs.get(checkpoint.experiment)
    except NotFound:
        record = {}
    adapter = checkpoint.kind == "adapter" and not proof
    head = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmnb", "lora"] if checkpoint.kind == "adapter" else ["llmnb"],
    }
    what = "A LoRA adapter on" if adapter else "A LoRA adapter merged into" if proof else "A model trained from"
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {name}", ""]
    lines += [f"{what} `{base}` (fingerprint {checkpoint.base_fingerprint}), after {checkpoint.step} steps.", ""]
    lines += [*_use(adapter, base, name), "", "## How it was trained", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in _facts(record, checkpoint) if value not in (None, "", {})]
    return "\n".join([*lines, "", *([proof, ""] if proof else [])])


def _use(adapter: bool, base: str, name: str) -> list[str]:
    if adapter:
        return [
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {name!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            "```",
        ]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        "```",
    ]


def _facts(record: Mapping[str, Any], checkpoint: Checkpoint) -> list[tuple[str, Any]]:
    counts = record.get("counts") or {}
    config = TrainConfig.from_json(record["config"]) if record.get("config") else None
    facts: list[tuple[str, Any]] = []
    if counts.get("rows"):
        digest = f", digest {counts['rows_digest']}" if counts.get("rows_digest") else ""
        facts.append(("rows", f"{counts['rows']:,} of kind {counts.get('kind', 'text')}{digest}"))
        if "tokens" in counts:  # a run that reads while it trains knows them at the end
            facts.append(("tokens", f"{counts['tokens']:,}, of them trained {counts.get('trained_tokens', 0):,}"))
            left = f"{counts.get('dropped', 0):,} documents left out, {counts.get('cut', 0):,} rows cut"
            facts.append(("left out", left))
    if config is not None:
        facts.append(("longest row", f"{config.max_seq_length:,} tokens"))
        if config.use_lora:
            lora = {key: getattr(config, key) for key in _LORA}
            facts.append(("LoRA", ", ".join(f"{key} {value}" for key, value in lora.items() if value)))
        arguments = thaw(config.arguments)
        facts += [(key.replace("_", " "), arguments[key]) for key in _SHOWN if key in arguments]
    facts += [(key.replace("_", " "), counts.get(key)) for key in _COUNTED]
    versions = counts.get("versions") or {}
    facts.append(("versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    facts += [(key, f"{value:.4g}") for key, value in checkpoint.metrics.items() if isinstance(value, float)]
    return facts


def proof_of(folder: Path, copy: Path) -> str:
    """Copies a folder that a merge wrote; gives what was measured then, in Markdown.

    Raises:
        ArtifactError: there is no report of a merge in it.
    """
    if not (folder / FILE).exists():
        todo = "db.merge(checkpoint, folder) writes one; without folder= the checkpoint itself goes up"
        raise ArtifactError(f"{folder} holds no model that a merge wrote.", seen=f"no {FILE}", todo=todo)
    shutil.copytree(folder, copy)
    measured = (folder / "README.md").read_text(encoding="utf-8").partition("Loaded again from these files")
    return "## What the merge was measured on\n\n" + "".join(measured[1:]).rstrip()


def without_paths(folder: Path, names: Mapping[str, str]) -> None:
    """Puts public names in place of this machine's paths, in every file of a folder that is text.

    Args:
        folder: holds copies.
        names: public name by path; a name that is no path is left alone.
    """
    paths = {path: name for path, name in names.items() if Path(path).is_absolute()}
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".md", ".txt", ".jinja"):
            text = file.read_text(encoding="utf-8")
            for path in sorted(paths, key=len, reverse=True):
                text = text.replace(path, paths[path])
            file.write_text(text, encoding="utf-8")
