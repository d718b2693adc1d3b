"""What is wrong with a trainer's settings: each function gives the faults of one kind, and ``freeze`` gathers them.

They read settings as they were given, by name; they need neither torch nor a database.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .chat_templates import PRESETS
from .config import DPO_LOSSES, ModelSpec, TrainConfig, unstreamable
from .errors import Fault, near
from .query import Select

__all__ = [
    "cross_faults",
    "dpo_faults",
    "lora_faults",
    "model_fault",
    "own_faults",
    "passed_on_faults",
    "streaming_faults",
]

_DEFAULTS = TrainConfig()
_RAY_BUILT = ("train_loop_per_worker", "train_loop_config", "datasets")
_TRAINER_BUILT = ("model", "args", "train_dataset", "eval_dataset", "processing_class", "data_collator", "model_init")
_TRAINER_OPEN = (
    "callbacks",
    "compute_metrics",
    "compute_loss_func",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "preprocess_logits_for_metrics",
)
_BITS = (None, 4, 8)
_INTEGERS = {"max_seq_length": 2, "lora_r": 1, "lora_alpha": 1, "num_gpus": 1}
_INTEGERS |= {"early_stopping_patience": 1, "max_tokens_per_batch": 1}
_OPTIONAL = {"num_gpus", "early_stopping_patience", "max_tokens_per_batch"}
_SHARES = {"lora_dropout": (0.0, 1.0), "max_cut_share": (0.0, 1.0)}
_WORDS = {
    "lora_bias": ("none", "all", "lora_only"),
    "train_on": (None, "answers", "all"),
    "key_kind": (None, "text", "pair", "messages"),
    "method": ("sft", "dpo"),
    "dpo_loss_type": DPO_LOSSES,
    "use_lora": (True, False),
    "log_to_db": (True, False),
    "padding_free": (None, True, False),
    "fused_lora": (None, True, False),
    "cache_rows": (True, False),
    "streaming": (None, True, False),
    "use_rslora": (True, False),
    "use_dora": (True, False),
    "on_ray": (None, True, False),
}
_TEXTS = {"identifier", "output_dir", "chat_template", "prompt_template"}


def model_fault(model_bits: Any, trainer_bits: Any = None) -> Fault | None:
    """What is wrong with ``bits``, or None. The trainer's wins, and two different values are a fault."""
    for bits in (model_bits, trainer_bits):
        if isinstance(bits, bool) or bits not in _BITS:
            return Fault("bits", f"{bits!r} is not possible", "use 4, 8 or None (full precision)")
    if model_bits is not None and trainer_bits is not None and model_bits != trainer_bits:
        return Fault("bits", f"the model says {model_bits}, the trainer {trainer_bits}", "give one of them")
    return None


def lora_faults(mine: Mapping[str, Any], trainer_kwargs: Mapping[str, Any]) -> list[Fault]:
    """Variants of LoRA that were asked for without LoRA, or beside an optimizer of the person's own."""
    init = mine.get("lora_init", "default")
    asked = [name for name in ("use_rslora", "use_dora", "loraplus_lr_ratio") if mine.get(name)]
    asked += ["lora_init"] if init != "default" else []
    todo = "set use_lora=True, or leave it out"
    if mine.get("use_lora", True):
        asked = []
    faults = [Fault(name, "is a kind of LoRA, and use_lora is False", todo) for name in asked]
    if init != "default" and mine.get("use_dora"):
        faults.append(Fault("lora_init", f"{init!r} and use_dora both take a weight apart", "give one of them"))
    if init != "default" and mine.get("bits"):
        what = f"{init!r} decomposes whole weights, and the base is in {mine['bits']} bits"
        faults.append(Fault("lora_init", what, "'default', or bits=None"))
    own = sorted({"optimizers", "optimizer_cls_and_kwargs"} & set(trainer_kwargs))
    if own and mine.get("loraplus_lr_ratio"):
        faults.append(Fault("loraplus_lr_ratio", f"sets the optimizer up, and so does {own[0]}", "give one of them"))
    return faults


def streaming_faults(mine: Mapping[str, Any], arguments: Mapping[str, Any], model: ModelSpec | None) -> list[Fault]:
    """``streaming=True`` where documents must all be read before the training."""
    why = unstreamable(mine, arguments, model.task if model is not None else "causal-lm")
    return [Fault("streaming", f"is not possible: {why}", "leave it out")] if mine.get("streaming") and why else []


def dpo_faults(
    mine: Mapping[str, Any], arguments: Mapping[str, Any], trainer_kwargs: Mapping[str, Any], model: ModelSpec | None
) -> list[Fault]:
    """What does not go with ``method="dpo"``, and settings of DPO without it."""
    if mine.get("method", "sft") != "dpo":
        asked = [name for name in ("dpo_beta", "dpo_loss_type") if name in mine]
        asked = [name for name in asked if mine[name] != getattr(_DEFAULTS, name)]
        return [
            Fault(name, "has no effect without method='dpo'", "set method='dpo', or leave it out") for name in asked
        ]
    faults = []
    if model is not None and model.task != "causal-lm":
        faults.append(
            Fault("method", f"'dpo' trains language models, and this is a {model.task} model", "leave it out")
        )
    without = {
        "key_kind": (mine.get("key_kind"), "both answers are read as their fields are"),
        "train_on": (mine.get("train_on") == "all", "only answers can be preferred"),
        "padding_free": (mine.get("padding_free"), "both answers of a pair are one padded batch"),
        "label_smoothing_factor": (arguments.get("label_smoothing_factor"), "its loss is not over tokens"),
    }
    faults += [
        Fault(name, f"does not go with 'dpo': {why}", "leave it out") for name, (on, why) in without.items() if on
    ]
    if mine.get("use_lora", True) and mine.get("lora_bias", "none") != "none":
        what = "changes the base, and DPO compares with the base as it was"
        faults.append(Fault("lora_bias", what, "'none'"))
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if trainer_kwargs.get(name) is not None:
            what = "does not go with 'dpo', whose loss and metrics are those of pairs"
            faults.append(Fault(f"training_kwargs[{name!r}]", what, "leave it out"))
    key = mine.get("key")
    if mine.get("transform") is None and key is not None and (isinstance(key, str) or len(key) not in (2, 3)):
        what = f"{key!r:.60} does not name the prompt and both answers"
        faults.append(Fault("key", what, "key=('prompt', 'chosen', 'rejected'); chats need no prompt"))
    return faults


def own_faults(mine: Mapping[str, Any]) -> list[Fault]:
    """Settings of ours that are wrong on their own: of another type, out of range, an unknown word."""
    faults = []
    for name, value in mine.items():
        if name in _INTEGERS and not (value is None and name in _OPTIONAL):
            if isinstance(value, bool) or not isinstance(value, int) or value < _INTEGERS[name]:
                faults.append(Fault(name, f"must be a whole number from {_INTEGERS[name]}, not {value!r:.40}"))
        elif name in _SHARES:
            low, high = _SHARES[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                faults.append(Fault(name, f"must be a number from {low:g} to {high:g}, not {value!r:.40}"))
        elif name == "loraplus_lr_ratio" and value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
                faults.append(Fault(name, f"must be a number from 1, not {value!r:.40}", "16"))
        elif name == "lora_init":
            if not isinstance(value, str) or not re.fullmatch(r"default|pissa(_niter_[1-9]\d?)?", value):
                faults.append(
                    Fault(name, f"must be 'default', 'pissa' or 'pissa_niter_N', not {value!r:.40}", "'pissa'")
                )
        elif name == "dpo_beta":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                faults.append(Fault(name, f"must be a number above 0, not {value!r:.40}", "0.1"))
        elif name in _WORDS and (value not in _WORDS[name] or (isinstance(value, int) and not isinstance(value, bool))):
            words = " or ".join(repr(w) for w in _WORDS[name])
            faults.append(Fault(name, f"must be {words}, not {value!r:.40}"))
        elif name == "chat_template" and isinstance(value, str) and "{" not in value and value not in PRESETS:
            close = near(value, PRESETS)
            todo = f"did you mean {close[0]!r}?" if close else f"a Jinja template, or one of {', '.join(PRESETS)}"
            faults.append(Fault(name, f"{value!r:.40} is neither a Jinja template nor the name of one", todo))
        elif name in _TEXTS and value is not None and not isinstance(value, str):
            faults.append(Fault(name, f"must be text, not {type(value).__name__}"))
        elif name == "select" and value is not None and not _is_rows(value):
            faults.append(Fault(name, f"must be a find or an aggregation, not {value!r:.60}", "Collection(…).find()"))
        elif name == "eval_selects":
            bad = [k for k, v in dict(value or {}).items() if not _is_rows(v)]
            faults += [Fault(f"eval_selects[{k!r}]", "must be a find or an aggregation") for k in bad]
        elif name == "transform" and value is not None and not callable(value):
            faults.append(Fault(name, f"must be a function, not {type(value).__name__}"))
        elif name == "key":
            faults += _key_faults(value)
        elif name == "prompt_template" and value is not None and "{input}" not in value:
            faults.append(Fault(name, "has no {input} in it", "put {input} where the prompt goes"))
        elif name == "deepspeed" and value is not None and not isinstance(value, (str, Mapping)):
            faults.append(Fault(name, "must be a dict or the path of a JSON file"))
        elif name == "bits":
            continue  # checked with the model's
    fault = model_fault(None, mine.get("bits"))
    return [*faults, fault] if fault else faults


def _is_rows(value: Any) -> bool:
    return isinstance(value, Select) and not value.one and not value.count


def _key_faults(key: Any) -> list[Fault]:
    if key is None or (isinstance(key, str) and key):
        return []
    if isinstance(key, (tuple, list)) and key and all(isinstance(k, str) and k for k in key):
        return []
    return [Fault("key", f"must be a column name or a tuple of column names, not {key!r:.40}")]


def cross_faults(mine: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Fault]:
    """Faults of two settings together; the same rules as TrainingArguments', found before any work."""
    faults = []
    if arguments.get("fp16") is True and arguments.get("bf16") is True:
        faults.append(Fault("fp16", "and bf16 cannot both be on", "choose one"))
    steps = arguments.get("max_steps", -1)
    if isinstance(steps, int) and (steps == 0 or steps < -1):
        faults.append(Fault("max_steps", f"must be above 0, or -1 for whole epochs, not {steps}"))
    evaluates = arguments.get("eval_strategy", "no")
    if arguments.get("load_best_model_at_end"):
        saves = arguments.get("save_strategy", "steps")
        if evaluates == "no":
            todo = "set eval_strategy='steps' or 'epoch'"
            faults.append(Fault("load_best_model_at_end", "needs evaluations to choose by", todo))
        elif saves not in (evaluates, "best"):
            faults.append(
                Fault("load_best_model_at_end", f"evaluates by {evaluates} but saves by {saves}", "make both the same")
            )
        elif evaluates == "steps":
            every = arguments.get("eval_steps") or arguments.get("logging_steps", 500)
            kept = arguments.get("save_steps", 500)
            if isinstance(every, (int, float)) and isinstance(kept, (int, float)) and every >= 1 and kept % every:
                faults.append(Fault("save_steps", f"{kept:g} is no multiple of eval_steps {every:g}", "make it one"))
    if mine.get("early_stopping_patience") and evaluates == "no":
        faults.append(Fault("early_stopping_patience", "needs evaluations", "set eval_strategy='steps' or 'epoch'"))
    if mine.get("on_ray") is False and (mine.get("ray_configs") or mine.get("ray_address")):
        faults.append(Fault("on_ray", "is False, but ray_configs or ray_address is given", "leave one out"))
    if arguments.get("deepspeed"):
        faults.append(Fault("deepspeed", "given twice"))
    return faults


def passed_on_faults(trainer_kwargs: Mapping[str, Any], ray_configs: Mapping[str, Any]) -> list[Fault]:
    """What cannot be passed on to transformers' Trainer or to Ray, because it is built here or unknown there."""
    faults = []
    for name in trainer_kwargs:
        if name in _TRAINER_BUILT:
            faults.append(Fault(f"training_kwargs[{name!r}]", "is built by llmnb", "leave it out"))
        elif name not in _TRAINER_OPEN:
            close = near(name, _TRAINER_OPEN)
            todo = ("did you mean " if close else "known: ") + ", ".join(close or _TRAINER_OPEN)
            faults.append(Fault(f"training_kwargs[{name!r}]", "is not an argument of transformers.Trainer", todo))
    for name in ray_configs:
        if name in _RAY_BUILT:
            faults.append(Fault(f"ray_configs[{name!r}]", "is built by llmnb", "leave it out"))
    return faults
