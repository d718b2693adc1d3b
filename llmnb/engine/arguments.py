"""The settings of a run as ``transformers.TrainingArguments``, with the machine's limits taken into account.

Knows which precision a machine can do, and which settings need each other. Loads no model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig, thaw
from ..errors import ConfigError, DataError, Fault, RunError, near
from ..events import Event, Note
from .speedups import take_kernels

__all__ = ["Plan", "make_plan", "trainer_options"]

# What a run builds itself; giving it would be ignored or would break the run.
_OURS = (
    "model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "tokenizer",
    "model_init",
)


@dataclass(frozen=True)
class Plan:
    """How a run will compute.

    Attributes:
        arguments: ``transformers.TrainingArguments``.
        precision: of the products: "float32", "bfloat16" or "float16".
        base_dtype: of the base's weights, when the person named none.
        chooses_best: whether the run compares its checkpoints.
        own_logging: False when the person gave logging_steps.
    """

    arguments: Any
    precision: str
    base_dtype: str
    chooses_best: bool
    own_logging: bool


def make_plan(config: TrainConfig, output: Path, *, eval_names: tuple[str, ...], say: Callable[[Event], None]) -> Plan:
    """Settings, defaults and limits in one.

    Args:
        config: ``config.arguments`` are in today's names.
        output: the run's own folder for checkpoints.
        eval_names: the evaluation sets there are ("valid", or the person's names).
        say: takes a note for each thing that this machine cannot do.

    Raises:
        ConfigError: settings that transformers refuses.
        DataError: an evaluation is asked for and there are no rows for it.
        RunError: several ranks that do not find each other.
    """
    import torch
    from transformers import TrainingArguments

    given: dict[str, Any] = thaw(dict(config.arguments))
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    check_names("arguments", given, known)
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if old in given and new in known:
            given.setdefault(new, given.pop(old))
    cuda = torch.cuda.is_available() and not given.get("use_cpu")
    precision = _precision(given, cuda, say, by_default=config.deepspeed is None)
    take_kernels(given, cuda)
    _evaluation(given, config, eval_names)
    own_logging = "logging_steps" not in given and given.get("logging_strategy", "steps") == "steps"
    values = {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "logging_first_step": True,
        # A NaN is shown, not replaced by a mean.
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": cuda,
        **given,
        "output_dir": str(output),
    }
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.deepspeed is not None:
        values["deepspeed"] = _deepspeed(thaw(config.deepspeed))
        _start_deepspeed(cuda)
    if not cuda and (ranks > 1 or config.deepspeed is not None):
        # Unless it is told so, Trainer sees no ranks on a machine without a GPU, and each would train alone.
        values["use_cpu"] = True
    try:
        arguments = TrainingArguments(**values)
    except (TypeError, ValueError, KeyError, ImportError) as error:
        raise ConfigError([Fault("arguments", str(error))]) from error
    arguments.n_gpu  # noqa: B018 - found out now, so that it can be set: one process trains on one device
    arguments._n_gpu = min(arguments._n_gpu, 1)
    if arguments.world_size != ranks:
        raise RunError(
            f"There are {ranks} ranks, and each would train alone.",
            seen=f"WORLD_SIZE={ranks}; transformers sees {arguments.world_size}",
            todo="set LOCAL_RANK, RANK, MASTER_ADDR and MASTER_PORT for every rank",
        )
    # LoRA's frozen base may be in 16 bits; weights that are trained never are.
    base_dtype = precision if config.use_lora else "float32"
    chooses = arguments.metric_for_best_model is not None
    return Plan(arguments, precision, base_dtype, chooses, own_logging)


def check_names(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Raises for names that are not known, all at once, with near ones.

    Raises:
        ConfigError: one fault for each.
    """
    faults = []
    for name in given:
        if name not in known:
            close = near(name, known)
            faults.append(Fault(name, f"is not known to {where}", f"did you mean {close[0]}?" if close else ""))
    if faults:
        raise ConfigError(faults)


def _precision(given: dict[str, Any], cuda: bool, say: Callable[[Event], None], by_default: bool) -> str:
    """Takes what the machine cannot do out of ``given``, and says so. bfloat16 is the default where a GPU has it."""
    import torch

    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    on_cpu = bool(given.get("use_cpu"))
    unable = {
        "fp16": not cuda,
        "fp16_full_eval": not cuda,
        "bf16": not (bf16 or on_cpu),
        "bf16_full_eval": not (bf16 or on_cpu),
        "tf32": not cuda or torch.cuda.get_device_capability()[0] < 8,
    }
    asked = [name for name, cannot in unable.items() if cannot and given.get(name)]
    for name in asked:
        given.pop(name)
    if asked:
        machine = "this GPU" if cuda else "this machine, which has no GPU"
        say(
            Note(
                level="warning",
                text=f"{' and '.join(asked)} cannot be used on {machine}; float32 is used instead.",
                data={"asked": asked, "used": "float32"},
            )
        )
        return "float32"
    if given.get("fp16"):
        return "float16"
    if given.get("bf16") is None and bf16 and by_default:
        given["bf16"] = True
    return "bfloat16" if given.get("bf16") else "float32"


def _evaluation(given: dict[str, Any], config: TrainConfig, names: tuple[str, ...]) -> None:
    """Settings that need evaluations get them; what cannot be evaluated raises."""
    patience = config.early_stopping_patience
    wants_best = given.get("load_best_model_at_end") or given.get("save_strategy") == "best" or patience is not None
    wants_metric = wants_best or given.get("metric_for_best_model") is not None
    if wants_metric and given.get("eval_strategy", "no") == "no":
        if "eval_strategy" in given:
            cause = "early_stopping_patience" if patience is not None else "choosing the best checkpoint"
            raise ConfigError([Fault("eval_strategy", f"'no', but {cause} needs evaluations", "'steps' or 'epoch'")])
        save = given.get("save_strategy", "steps")
        given["eval_strategy"] = save if save in ("steps", "epoch") else "epoch"
        if given["eval_strategy"] == "steps":
            given.setdefault("eval_steps", given.get("save_steps", 500))
    if given.get("load_best_model_at_end") and "save_strategy" not in given:
        given["save_strategy"] = given["eval_strategy"]
        if given["eval_strategy"] == "steps" and "save_steps" not in given and given.get("eval_steps"):
            given["save_steps"] = given["eval_steps"]
    if (given.get("eval_strategy", "no") != "no" or given.get("eval_on_start")) and not names:
        raise DataError(
            "An evaluation is asked for, and there are no rows for it.",
            seen=f"eval_strategy={given.get('eval_strategy')!r}; no document is in the valid fold",
            todo="put documents in the valid fold (_fold='valid'), name validation sets, or set eval_strategy='no'",
        )
    metric = given.get("metric_for_best_model")
    if wants_best and metric is None:
        metric = given["metric_for_best_model"] = "loss"
    if metric in ("loss", "eval_loss") and names and names != ("valid",):
        # With named sets there is no plain eval_loss; the first name is the one to go by.
        given["metric_for_best_model"] = f"eval_{names[0]}_loss"
        given.setdefault("greater_is_better", False)


def _deepspeed(given: Any) -> Any:
    """A DeepSpeed configuration whose ZeRO-3 checkpoints are whole models: shards alone could not be loaded again.

    Raises:
        ConfigError: the file is not there or not JSON.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError([Fault("deepspeed", str(error), "a dict, or the path of a JSON file")]) from error
    # DeepSpeed clips gradients in Trainer's place, and without a word on it would not heed max_grad_norm.
    given.setdefault("gradient_clipping", "auto")
    zero = given.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return given


def _start_deepspeed(cuda: bool) -> None:
    """ZeRO-3 shards a model while it is loaded, so DeepSpeed must know all ranks before that."""
    import importlib.util

    from ..errors import MissingPackage

    if importlib.util.find_spec("deepspeed") is None:
        raise MissingPackage("deepspeed", "deepspeed", "Training with a DeepSpeed configuration")
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    from . import building

    building.prepare(deepspeed, cuda)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")


def trainer_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments for ``transformers.Trainer`` that a person gave, checked.

    Raises:
        ConfigError: one that the run builds itself, or one that Trainer does not have.
    """
    import inspect

    from transformers import Trainer

    given = dict(given or {})
    faults = [
        Fault(f"training_kwargs[{name!r}]", "is built by the run itself", "leave it out")
        for name in _OURS
        if name in given
    ]
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    for name in given:
        if name not in known and name not in _OURS:
            close = near(name, known)
            todo = f"did you mean {close[0]}?" if close else "one of " + ", ".join(sorted(known - set(_OURS)))
            faults.append(Fault(f"training_kwargs[{name!r}]", "is not an argument of transformers.Trainer", todo))
    if faults:
        raise ConfigError(faults)
    return given
