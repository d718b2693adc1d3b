"""The rows of the training form: one for each setting, by tab, with its unit and its consequence.

The options of ``TrainingArguments`` that no table here names stand under Advanced, with the help of the installed
transformers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .. import options
from ..config import DPO_LOSSES, ModelSpec, TrainConfig, thaw

__all__ = ["NOT_ROWS", "PRESETS", "TABS", "Preset", "Row", "rows", "text_of", "types_of"]

TABS = ("Model & data", "LoRA", "QLoRA", "DeepSpeed", "Multi-GPU", "Schedule", "Advanced")
_ALL = frozenset({"bool", "int", "float", "str", "list", "dict", "None"})
_BESIDE = {"ray_address": frozenset({"str", "None"}), "ray_configs": _ALL, "training_kwargs": _ALL, "transform": _ALL}


@dataclass(frozen=True)
class Row:
    """One line of the form.

    Attributes:
        tab: where it stands, one of ``TABS``.
        name: the setting; also ``collection``, ``filter`` and ``limit``, which together are ``select``.
        label: what a person reads.
        kind: "text", "number", "yes" (a checkbox), "choice", "json", "collection" or "key".
        unit: what the number counts, or "".
        help: one sentence with the consequence.
        default: the text, True or False that means "not given".
        choices: the words of a choice; texts to offer elsewhere.
        needs: (row, word, reason): without it the row has no effect, and the form says the reason; or None.
    """

    tab: str
    name: str
    label: str
    kind: str
    unit: str = ""
    help: str = ""
    default: Any = ""
    choices: tuple[str, ...] = ()
    needs: tuple[str, Any, str] | None = None


@dataclass(frozen=True)
class Preset:
    """Settings that go together, and why one would choose them."""

    name: str
    reason: str
    values: Mapping[str, Any]


PRESETS = (
    Preset(
        "Quick look",
        "A few minutes: shows whether the data is read as you think and whether the loss falls.",
        {"max_steps": "40", "learning_rate": "2e-4", "max_seq_length": "256", "logging_steps": "1"},
    ),
    Preset(
        "LoRA",
        "The usual choice: about 1 % of the weights are trained, and a checkpoint is a few megabytes.",
        {"lora_r": "16", "lora_alpha": "32", "learning_rate": "2e-4", "warmup_steps": "0.03", "logging_steps": "5"},
    ),
    Preset(
        "QLoRA, small GPU",
        "LoRA on a base in 4 bits, one row at a time: a quarter of the memory, and slower.",
        {
            "bits": "4",
            "lora_r": "16",
            "lora_alpha": "32",
            "learning_rate": "2e-4",
            "warmup_steps": "0.03",
            "per_device_train_batch_size": "1",
            "gradient_accumulation_steps": "16",
            "gradient_checkpointing": "true",
            "logging_steps": "5",
        },
    ),
    Preset(
        "Preferences",
        "DPO on documents with a chosen and a rejected answer, best after a training on good answers: small steps.",
        {
            "method": "dpo",
            "lora_r": "16",
            "lora_alpha": "32",
            "learning_rate": "2e-5",
            "warmup_steps": "0.1",
            "logging_steps": "5",
        },
    ),
    Preset(
        "Full",
        "Trains all weights: the most capacity, about 16 bytes of memory for each weight, and whole-model checkpoints.",
        {"use_lora": False, "learning_rate": "2e-5", "warmup_steps": "0.03", "logging_steps": "5"},
    ),
)

_LORA = ("use_lora", True, "LoRA is off: all weights are trained")
_DPO = ("method", "dpo", "Method is sft: documents have one answer")
_NUMBERED = {"int", "float"}
_STAGES = ('{"zero_optimization": {"stage": 2}}', '{"zero_optimization": {"stage": 3}}')

# name, label, unit, consequence; then what differs from what the setting's own table says
_Line = tuple[Any, ...]
_TABLE: Mapping[str, Sequence[_Line]] = {
    "Model & data": (
        ("model_name_or_path", "Model", "", "hub id or folder of the base model"),
        ("collection", "Collection", "", "the documents to train on", {"kind": "collection"}),
        (
            "key",
            "Key",
            "",
            "a field, two with a comma (prompt,response), or chats (messages); for dpo: prompt,chosen,rejected",
            {"kind": "key"},
        ),
        ("filter", "Filter", "", 'only these documents, like {"lang": "en"}', {"kind": "json"}),
        ("limit", "Limit", "documents", "at most so many: fewer are faster", {"kind": "number"}),
        ("max_seq_length", "Sequence", "tokens", "longer rows are cut and counted; lower: less memory, faster"),
        (
            "train_on",
            "Train on",
            "",
            "which tokens carry loss: only answers, or prompts too",
            {"choices": ("", "answers", "all"), "kind": "choice"},
        ),
        (
            "method",
            "Method",
            "",
            "sft learns what documents say; dpo learns which of two answers is preferred, at about twice the cost",
            {"choices": ("sft", "dpo"), "kind": "choice"},
        ),
        ("dpo_beta", "DPO beta", "", "higher: stays nearer to the model it began from", {"needs": _DPO}),
        (
            "dpo_loss_type",
            "DPO loss",
            "",
            "sigmoid is the paper's; the others are variants of it",
            {"needs": _DPO, "kind": "choice", "choices": DPO_LOSSES},
        ),
        ("prompt_template", "Prompt", "", "text around a prompt; {input} is the prompt, \\n a line's end"),
        ("identifier", "Name", "", "the model's name in the database; the same name again is its next version"),
        ("adapter_id", "Go on from", "", "an adapter on this base, experiment/step, to train further"),
    ),
    "LoRA": (
        ("use_lora", "LoRA", "", "off: all weights are trained; more memory, whole-model checkpoints"),
        ("lora_r", "r", "rank", "higher: more capacity and memory", {"needs": _LORA}),
        ("lora_alpha", "alpha", "", "the update is scaled by alpha / r; higher: stronger", {"needs": _LORA}),
        ("lora_dropout", "Dropout", "probability", "above 0: a little regularisation, slower", {"needs": _LORA}),
        (
            "lora_target_modules",
            "Targets",
            "",
            "modules to adapt, with commas; all-linear: every linear layer but the head",
            {"needs": _LORA, "choices": ("all-linear", "q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj")},
        ),
        (
            "lora_bias",
            "Bias",
            "",
            "train biases too: a little more capacity; the base then changes with the adapter",
            {"needs": _LORA, "kind": "choice", "choices": ("none", "all", "lora_only")},
        ),
        ("use_rslora", "rsLoRA", "", "scales by alpha / √r: high ranks learn as low ones do", {"needs": _LORA}),
        (
            "use_dora",
            "DoRA",
            "",
            "size and direction of a weight apart: often a little better, slower",
            {"needs": _LORA},
        ),
        (
            "lora_init",
            "Begins with",
            "",
            "pissa: a weight's largest singular values, learns faster; niter_16 finds them in seconds; twice the file",
            {"needs": _LORA, "choices": ("default", "pissa", "pissa_niter_16"), "kind": "choice"},
        ),
        ("loraplus_lr_ratio", "LoRA+", "times", "B learns so many times faster than A; 16 is usual", {"needs": _LORA}),
        ("neftune_noise_alpha", "NEFTune", "", "noise on embeddings while training, 5 is usual: less learnt by heart"),
    ),
    "QLoRA": (
        (
            "bits",
            "Base in",
            "bits",
            "4 or 8: a quarter or half of the weights' memory, slower; needs bitsandbytes",
            {"kind": "choice", "choices": ("", "4", "8")},
        ),
        (
            "gradient_checkpointing",
            "Recompute",
            "",
            "activations are computed again: less memory, about a third slower",
        ),
        ("optim", "Optimizer", "", "paged and 8-bit ones keep less in the GPU's memory"),
    ),
    "DeepSpeed": (
        (
            "deepspeed",
            "Configuration",
            "",
            "JSON, or the path of a JSON file; stage 2 shares gradients among the workers, stage 3 also weights",
            {"kind": "json", "choices": _STAGES},
        ),
    ),
    "Multi-GPU": (
        ("num_gpus", "Workers", "", "exactly so many GPUs; processes on the CPU where there is none"),
        ("ray_address", "Ray cluster", "", "where the training runs, like http://head:8265"),
        ("ddp_backend", "Backend", "", "how workers talk: nccl on GPUs, gloo on CPUs"),
        ("ddp_timeout", "Timeout", "seconds", "how long a worker waits for the others"),
        ("ddp_find_unused_parameters", "Unused weights", "", "needed when a step leaves weights out; slower"),
    ),
    "Schedule": (
        ("num_train_epochs", "Epochs", "epochs", "passes over the rows; more: longer, and sooner or later overfitting"),
        ("max_steps", "Steps", "optimizer steps", "exactly so many, whatever the epochs", {"default": ""}),
        (
            "learning_rate",
            "Learning rate",
            "",
            "higher: faster, until the loss jumps; LoRA takes ten times a full run's",
        ),
        ("lr_scheduler_type", "Schedule", "", "how the learning rate falls until the end"),
        ("warmup_steps", "Warm-up", "steps, or share", "the rate rises so long; below 1: a share of all steps"),
        ("per_device_train_batch_size", "Batch", "rows", "rows at once for each worker: more memory, steadier steps"),
        (
            "gradient_accumulation_steps",
            "Accumulate",
            "batches",
            "batches for one step: a larger batch, no more memory",
        ),
        ("logging_steps", "Log every", "steps", "a point of the curve"),
        ("eval_strategy", "Evaluate", "", "measures the valid fold: shows overfitting, costs time"),
        (
            "eval_steps",
            "Evaluate every",
            "steps",
            "fewer: a finer curve, more time",
            {"needs": ("eval_strategy", "steps", "Evaluate is not by steps")},
        ),
        ("save_strategy", "Checkpoint", "", "what a run can be resumed from and chatted with"),
        (
            "save_steps",
            "Checkpoint every",
            "steps",
            "more often: less is lost, more is stored",
            {"needs": ("save_strategy", "steps", "Checkpoint is not by steps")},
        ),
        ("save_total_limit", "Keep", "checkpoints", "older ones are removed: less is stored"),
        ("load_best_model_at_end", "Keep the best", "", "the model answers with the lowest evaluation, not the last"),
        ("early_stopping_patience", "Stop early", "evaluations", "after so many without a better one; needs Evaluate"),
        ("seed", "Seed", "", "the same seed and rows give the same run"),
    ),
}
# Ours elsewhere, or objects that only Python can give.
NOT_ROWS = {
    "arguments",
    "deepspeed",
    "do_eval",
    "do_predict",
    "do_train",
    "eval_selects",
    "functions",
    "hub_token",
    "local_rank",
    "output_dir",
    "ray_configs",
    "resume_from_checkpoint",
    "select",
    "task",
    "training_kwargs",
    "transform",
}


# --- rows -----------------------------------------------------------------------------------------------------


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every row, by tab. The options of the installed transformers that stand nowhere else are under Advanced."""
    found = [_row(tab, *words) for tab, table in _TABLE.items() for words in table]
    named = {row.name for row in found} | NOT_ROWS
    for cls in (TrainConfig, ModelSpec):
        for f in fields(cls):
            if f.name not in named:
                named.add(f.name)
                found.append(_row("Advanced", f.name, _label(f.name), "", str(f.metadata.get("help", ""))))
    for option in options.training_arguments().values():
        if option.name not in named:
            found.append(_row("Advanced", option.name, _label(option.name), "", _first_sentence(option.help)))
    return tuple(found)


def _row(tab: str, name: str, label: str, unit: str, help: str, more: Mapping[str, Any] | None = None) -> Row:
    default = _default_of(name)
    option = None if name in _own() else options.training_arguments().get(name)
    types = types_of(name) or frozenset({"str"})
    choices: tuple[str, ...] = option.choices if option else ()
    if types == {"bool"}:
        kind = "yes"
    elif types == {"bool", "None"}:
        kind, choices = "choice", ("", "true", "false")
    elif choices:
        kind, choices = "choice", choices if default else ("", *choices)
    elif types - {"None"} and types - {"None"} <= _NUMBERED:
        kind = "number"
    else:
        kind = "json" if types & {"dict", "list"} and name not in ("adapter_id", "lora_target_modules") else "text"
    return Row(**{**vars(Row(tab, name, label, kind, unit or _unit(name), help, default, choices)), **(more or {})})


def _label(name: str) -> str:
    return name[0].upper() + name[1:].replace("_", " ")


def _first_sentence(text: str) -> str:
    text = re.split(r"(?<=[a-z)`])\. ", " ".join(text.split()))[0].rstrip(".")
    return text if len(text) <= 160 else text[:159].rsplit(" ", 1)[0] + " …"


@functools.cache
def _own() -> Mapping[str, Any]:
    """Our own settings with their defaults."""
    return {f.name: getattr(cls(), f.name) for cls in (TrainConfig, ModelSpec) for f in fields(cls)}


def _unit(name: str) -> str:
    known = TrainConfig.__dataclass_fields__.get(name)
    return str(known.metadata.get("unit", "")) if known else ""


def _default_of(name: str) -> Any:
    if name in ("identifier", "prompt_template"):
        return ""  # made from the model's name; the model's own
    if name in _own():
        return text_of(_own()[name])
    option = options.training_arguments().get(name)
    return text_of(option.default) if option else ""


def text_of(value: Any) -> Any:
    """A setting as the form shows it: a text, True or False."""
    if value is None or isinstance(value, bool):
        return value or (False if value is False else "")
    if isinstance(value, Mapping):
        return json.dumps(thaw(value)) if value else ""
    if isinstance(value, (tuple, list)):
        plain = all(isinstance(item, str) and "," not in item for item in value)
        return ",".join(value) if plain else json.dumps(thaw(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def types_of(name: str) -> frozenset[str] | None:
    """The accepted types of a setting by name, or None when no such setting exists."""
    for cls in (TrainConfig, ModelSpec):
        for f in fields(cls):
            if f.name == name and name not in ("arguments", "functions", "task"):
                words = set(re.findall(r"\w+", str(f.type)))
                if words & {"Any", "Mapping", "Select"}:
                    return _ALL - {"bool", "int", "float"} if name != "deepspeed" else _ALL
                return frozenset(words & _ALL)
    if name in _BESIDE:
        return _BESIDE[name]
    option = options.training_arguments().get(name)
    if option is not None:
        return option.types
    return _ALL if name in options.synonyms() else None
