"""The table of training options: names, types, choices, synonyms.

The options are those of the installed ``transformers.TrainingArguments``. They are read from its source text
with ``ast``, because importing it would load torch into the notebook's kernel. Synonyms and names that
transformers 5 renamed or removed stand in one table here. This room knows no values of any run.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, Fault, MissingPackage

__all__ = ["Option", "canonical", "check", "named", "parse", "training_arguments"]


@dataclass(frozen=True)
class Option:
    """One option of TrainingArguments.

    Attributes:
        name: as written.
        types: accepted types by name: "bool", "int", "float", "str", "list", "dict", "None".
        default: the default value, or None where the default is computed.
        help: one or more sentences.
        choices: allowed words, empty when any value of the type will do.
    """

    name: str
    types: frozenset[str]
    default: Any
    help: str
    choices: tuple[str, ...] = ()


_ENUM_FILES = {"training_args.py", "trainer_utils.py", "debug_utils.py"}
_PLAIN = {"bool", "int", "float", "str", "dict", "list", "None"}
# A switch, declared as text so that its older words are still read on a command line.
_SWITCHES = {"fsdp"}
# The Trainer's own business: a run has its own folder, its own database, its own processes.
_OURS = frozenset(
    {
        "output_dir",  # a field of TrainConfig
        "deepspeed",  # likewise
        "resume_from_checkpoint",  # run.resume() and `llmnb resume`
        "local_rank",  # set by the launcher
        "do_train",
        "do_eval",
        "do_predict",
    }
)


def _transformers_folder() -> Path:
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("transformers", "train", "Checking training options")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def training_arguments() -> Mapping[str, Option]:
    """Every field of the installed ``transformers.TrainingArguments``, by name.

    Source: transformers/training_args.py (https://huggingface.co/docs/transformers/main_classes/trainer).

    Raises:
        MissingPackage: transformers is not installed.
    """
    folder = _transformers_folder()
    enums: dict[str, tuple[str, ...]] = {}
    for name in _ENUM_FILES:
        for node in ast.parse((folder / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                enums[node.name] = _enum_values(node)
    tree = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    options = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            option = _read_field(node.target.id, node, enums)
            options[option.name] = option
    return options


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    values = []
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant):
            values.append(str(item.value.value))
    return tuple(values)


def _read_field(name: str, node: ast.AnnAssign, enums: Mapping[str, tuple[str, ...]]) -> Option:
    types: set[str] = {"bool"} if name in _SWITCHES else set()
    choices: list[str] = []

    def walk(part: ast.expr) -> None:
        if isinstance(part, ast.BinOp):
            walk(part.left)
            walk(part.right)
        elif isinstance(part, ast.Constant):
            types.add("None" if part.value is None else type(part.value).__name__)
        elif isinstance(part, ast.Subscript):
            walk(part.value)
        elif isinstance(part, ast.Name):
            if part.id in enums:
                types.add("str")
                choices.extend(enums[part.id])
            elif part.id == "Literal":
                types.add("bool")
            elif part.id in _PLAIN:
                types.add(part.id)
            else:
                types.update({"dict"})  # a config class of transformers: given as a dict

    walk(node.annotation)
    default, text = None, ""
    if isinstance(node.value, ast.Call):
        for keyword in node.value.keywords:
            if keyword.arg == "default":
                default = _literal(keyword.value)
            elif keyword.arg == "metadata":
                metadata = _literal(keyword.value) or {}
                text = str(metadata.get("help", ""))
                choices.extend(metadata.get("choices", ()))
    if "list" in types:
        choices = []  # a list of words is checked by TrainingArguments itself
    return Option(name, frozenset(types), default, text, tuple(dict.fromkeys(choices)))


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


# --- synonyms -----------------------------------------------------------------------------------------------

_SAME = {  # another spelling of the same thing
    "evaluation_strategy": "eval_strategy",
    "max_length": "max_seq_length",
    "X": "key",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "torchdynamo": "torch_compile_backend",
    "warmup_ratio": "warmup_steps",
    "bits_and_bytes": "bits",
}

# Removed from transformers 5, where today's meaning is not a plain rename. The function gives the settings
# that say the same today, or a Fault.
_Translated = Callable[[Any], "dict[str, Any] | Fault"]
_GONE: dict[str, _Translated] = {
    # A run always has a folder of its own, so there is never anything to overwrite, or to keep.
    "overwrite_output_dir": lambda v: {},
    "group_by_length": lambda v: {"train_sampling_strategy": "group_by_length"} if v else {},
    "adafactor": lambda v: {"optim": "adafactor"} if v else {},
    "include_inputs_for_metrics": lambda v: {"include_for_metrics": ["inputs"]} if v else {},
    "save_safetensors": lambda v: (
        {} if v else Fault("save_safetensors", "weights are always saved as safetensors", "leave it out")
    ),
    "use_mps_device": lambda v: {},  # the device is found by itself since transformers 4.30
    "evaluate_during_training": lambda v: {"eval_strategy": "steps" if v else "no"},
    "fp16_backend": lambda v: _only("fp16_backend", v, ("auto", "cuda_amp", "cpu_amp")),
    "half_precision_backend": lambda v: _only("half_precision_backend", v, ("auto", "cuda_amp", "cpu_amp")),
    "logging_dir": lambda v: (
        {} if v is None else Fault("logging_dir", "transformers 5 has no logging_dir", "set TENSORBOARD_LOGGING_DIR")
    ),
    "dispatch_batches": lambda v: {} if v is None else {"accelerator_config": {"dispatch_batches": v}},
    "split_batches": lambda v: {} if v is None else {"accelerator_config": {"split_batches": v}},
    "use_ipex": lambda v: _must_be_off("use_ipex", v),
    "jit_mode_eval": lambda v: _must_be_off("jit_mode_eval", v),
    "use_legacy_prediction_loop": lambda v: _must_be_off("use_legacy_prediction_loop", v),
    "past_index": lambda v: {} if v in (None, -1) else Fault("past_index", "transformers 5 has no past_index"),
    "tpu_num_cores": lambda v: _must_be_off("tpu_num_cores", v),
    "tpu_metrics_debug": lambda v: _must_be_off("tpu_metrics_debug", v),
    "fp16_opt_level": lambda v: {} if v in (None, "O1") else Fault("fp16_opt_level", "apex is no longer supported"),
    "ray_scope": lambda v: {} if v in (None, "last") else Fault("ray_scope", "belongs to hyperparameter search"),
}


def _only(name: str, value: Any, allowed: tuple[str, ...]) -> dict[str, Any] | Fault:
    return {} if value in allowed else Fault(name, f"{value!r} is gone", "leave it out: torch's autocast is used")


def _must_be_off(name: str, value: Any) -> dict[str, Any] | Fault:
    return {} if not value else Fault(name, "transformers 5 no longer has it", "leave it out")


def canonical(name: str, value: Any) -> dict[str, Any] | Fault:
    """Today's spelling of a setting: ``{"eval_strategy": "steps"}`` for ``evaluation_strategy="steps"``.

    A name that needs no change comes back as it is, known or not.
    """
    if name in _SAME:
        return {_SAME[name]: value}
    if name in _GONE:
        return _GONE[name](value)
    return {name: value}


def synonyms() -> frozenset[str]:
    """Every old or other spelling that is understood."""
    return frozenset(_SAME) | frozenset(_GONE)


# --- checking -----------------------------------------------------------------------------------------------

_ABOVE_ZERO = {
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "adam_epsilon",
}
_NOT_NEGATIVE = {"weight_decay", "warmup_steps", "max_grad_norm", "label_smoothing_factor", "dataloader_num_workers"}


def check(name: str, value: Any) -> tuple[Any, Fault | None]:
    """A TrainingArguments value, checked: ``(value, None)`` or ``(value, fault)``.

    An int is taken where a float is asked for, an enum member where its word is; nothing else is converted.
    """
    option = training_arguments()[name]
    if name in _OURS - {"deepspeed", "output_dir"}:
        return value, Fault(name, "is set by llmnb itself", "leave it out (to resume a run: run.resume())")
    if name == "hub_token" and value is not None:
        todo = "log in with `hf auth login`, or set HF_TOKEN; background runs see it too"
        return value, Fault(name, "is a secret, and would be stored with the run", todo)
    plain = getattr(value, "value", value) if type(value).__module__.startswith("transformers") else value
    kind = "None" if plain is None else type(plain).__name__
    if kind in ("tuple", "set"):
        plain, kind = list(plain), "list"
    if kind == "int" and "int" not in option.types and "float" in option.types:
        plain, kind = float(plain), "float"
    if kind == "float" and "float" not in option.types and "int" in option.types and float(plain).is_integer():
        plain, kind = int(plain), "int"
    if kind not in option.types:
        if isinstance(plain, Mapping):
            plain, kind = dict(plain), "dict"
        if kind not in option.types:
            wanted = " or ".join(sorted(option.types - {"None"})) or "nothing"
            return value, Fault(name, f"must be {wanted}, not {kind} {value!r:.40}", _hint(name, plain, option))
    if option.choices and isinstance(plain, str) and plain not in option.choices:
        close = difflib.get_close_matches(plain, option.choices, n=3, cutoff=0.4)
        return value, Fault(name, f"{plain!r} is not a choice", "one of " + ", ".join(close or option.choices))
    return plain, _range_fault(name, plain)


def _range_fault(name: str, value: Any) -> Fault | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return Fault(name, f"must be a finite number, not {value}")
    if name in _ABOVE_ZERO and value <= 0:
        return Fault(name, f"must be above 0, not {value}")
    if name in _NOT_NEGATIVE and value < 0:
        return Fault(name, f"must not be negative, not {value}")
    return None


def _hint(name: str, value: Any, option: Option) -> str:
    if isinstance(value, str) and option.types & {"int", "float"}:
        try:
            return f"write {name}={float(value):g} without quotes"
        except ValueError:
            return ""
    return ""


def parse(name: str, text: str, types: frozenset[str] | None = None) -> Any:
    """A value typed as text (a magic, a form, the command line) as Python.

    ``"2e-4"`` → 0.0002, ``"true"`` → True, ``"none"`` → None, ``'{"a": 1}'`` → a dict; a word stays a word.

    Args:
        name: the option; its types decide.
        text: what was typed.
        types: the accepted types, when the option is not one of TrainingArguments.
    """
    if types is None:
        option = training_arguments().get(name)
        types = option.types if option else frozenset(_PLAIN)
    low = text.strip().lower()
    if low in ("none", "null") and "None" in types:
        return None
    if (
        "bool" in types
        and low in ("true", "false", "yes", "no", "on", "off")
        and ("str" not in types or low in ("true", "false"))
    ):
        return low in ("true", "yes", "on")
    if "int" in types:
        try:
            return int(text)
        except ValueError:
            pass
    if "float" in types:
        try:
            return float(text)
        except ValueError:
            pass
    if types & {"dict", "list"} and text.strip()[:1] in "[{(":
        try:
            import json

            return json.loads(text)
        except ValueError:
            try:
                return ast.literal_eval(text)
            except (ValueError, SyntaxError):
                return text
    if "list" in types and "str" not in types:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def named(words: Sequence[str]) -> dict[str, str | None]:
    """``["--lr=1", "--fp16", "--key", "text"]`` as ``{"lr": "1", "fp16": None, "key": "text"}``.

    Raises:
        ConfigError: a word that belongs to no option, or an option given twice.
    """
    out: dict[str, str | None] = {}
    faults: list[Fault] = []
    name: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in out:
                faults.append(Fault(f"--{name}", "is given twice", "leave one out"))
            out[name] = value if equals else None
            name = None if equals else name
        elif name is not None:
            out[name], name = word, None
        else:
            faults.append(Fault(word, "belongs to no option", "write --name value; quote a value that has spaces"))
    if faults:
        raise ConfigError(faults)
    return out


# --- resuming -----------------------------------------------------------------------------------------------

#: How long a run trains.
LONGER = ("num_train_epochs", "max_steps")
#: What may change when a run is resumed: how long it trains, and what its mathematics does not see.
CHANGEABLE = (
    *LONGER,
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "eval_delay",
    "eval_steps",
    "eval_strategy",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "output_dir",
    "per_device_eval_batch_size",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)
