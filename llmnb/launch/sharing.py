"""How workers can share a model, and which models they can share: a table, and what is wrong with a configuration.

Pure functions of the settings, with one look at this machine: whether it can build what DeepSpeed builds. What the
table allows was seen on two CPU workers, with the losses and checkpoints of one (``tests/test_engine_sharing.py``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig, thaw
from ..errors import Fault, near

__all__ = ["KINDS", "WAYS", "faults_of", "impossible", "way_of", "with_files_read"]

WAYS = ("DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP")
KINDS = ("full", "LoRA", "8-bit", "4-bit")  # the last two: LoRA over a base of so many bits

# (way, kind) → why not, and what to do instead. Everything else is possible.
_IMPOSSIBLE = {
    ("ZeRO-3", "8-bit"): ("ZeRO stage 3 takes weights apart, and 8-bit weights cannot be", "stage 2; or bits=None"),
    ("ZeRO-3", "4-bit"): ("ZeRO stage 3 takes weights apart, and 4-bit weights cannot be", "stage 2; or bits=None"),
    ("FSDP", "8-bit"): ("shares weights out, and 8-bit weights lose their scales by it", "bits=4, or leave fsdp out"),
}
_FSDP_BOTH = (
    "activation_checkpointing",
    "auto_wrap_policy",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "min_num_params",
    "reshard_after_forward",
    "state_dict_type",
    "transformer_layer_cls_to_wrap",
    "version",
)
_FSDP_1 = ("backward_prefetch", "forward_prefetch", "limit_all_gathers", "sync_module_states", "use_orig_params")
_FSDP_WORDS = ("full_shard", "shard_grad_op", "auto_wrap", "offload")
_FSDP_1_WORDS = ("no_shard", "hybrid_shard", "hybrid_shard_zero2")
_A_FILE = "a dict, or the path of a JSON file"


def impossible(way: str, kind: str) -> tuple[str, str] | None:
    """Why workers cannot share so, and what to do instead; None when they can.

    Args:
        way: one of ``WAYS``.
        kind: one of ``KINDS``.
    """
    return _IMPOSSIBLE.get((way, kind))


def way_of(config: TrainConfig) -> str:
    """One of ``WAYS``. DDP also stands for one worker."""
    if config.deepspeed is not None:
        stage = _stage(_settings("deepspeed", config.deepspeed)[0])
        return f"ZeRO-{stage}" if f"ZeRO-{stage}" in WAYS else "ZeRO-0"
    return "FSDP" if config.arguments.get("fsdp") else "DDP"


def faults_of(config: TrainConfig, *, bits: int | None, gpus: int | None, workers: int) -> list[Fault]:
    """Everything that is wrong with how the workers are to share the model.

    Args:
        config: how to train.
        bits: of the base, the model's or the trainer's.
        gpus: CUDA devices of the machine that will train; None when that is another machine.
        workers: how many.
    """
    asked = "the run is on CPUs" if config.arguments.get("use_cpu") else ""
    on_cpus = "this machine has no GPU" if gpus == 0 else asked
    kind = f"{bits}-bit" if bits is not None else "LoRA" if config.use_lora else "full"
    faults = []
    why = impossible(way_of(config), kind)
    if config.use_dora and way_of(config) in ("ZeRO-3", "FSDP"):
        what = f"{way_of(config)} takes weights apart, and DoRA needs the length of whole ones"
        faults.append(Fault("use_dora", what, "ZeRO stage 2 or DDP; or leave it out"))
    faults += _dpo(config)
    if config.lora_init != "default" and way_of(config) in ("ZeRO-3", "FSDP"):
        what = f"{way_of(config)} takes weights apart, and PiSSA decomposes whole ones"
        faults.append(Fault("lora_init", what, "ZeRO stage 2 or DDP; or 'default'"))
    if why is not None:
        faults.append(Fault("fsdp" if config.deepspeed is None else "deepspeed", *why))
    if config.deepspeed is not None:
        faults += _deepspeed(config.deepspeed, on_cpus, here=gpus is not None)
    faults += _fsdp(config, on_cpus, workers)
    return faults


def _dpo(config: TrainConfig) -> list[Fault]:
    """DPO looks at the model a second time, as it was before the training."""
    if config.method != "dpo":
        return []
    if way_of(config) == "ZeRO-3":
        what = "'dpo' does not go with ZeRO stage 3, which holds no whole model to compare with"
        return [Fault("method", what, "stage 2, or fsdp=True")]
    given = _settings("fsdp_config", config.arguments.get("fsdp_config") or {})[0]
    if way_of(config) == "FSDP" and 1 in (given.get("version"), given.get("fsdp_version")):
        return [Fault("method", "'dpo' was not seen to work with FSDP 1", "leave version out of fsdp_config: 2")]
    return []


def with_files_read(config: TrainConfig) -> TrainConfig:
    """The config with a DeepSpeed or FSDP configuration in place of the path of its file, which other machines do
    not have. A configuration that cannot be read stays as it is; ``faults_of`` says why."""
    settings, fault = _settings("deepspeed", config.deepspeed or {})
    if config.deepspeed is not None and fault is None:
        config = replace(config, deepspeed=settings)
    given = config.arguments.get("fsdp_config")
    settings, fault = _settings("fsdp_config", given or {})
    if given and fault is None:
        config = replace(config, arguments={**thaw(config.arguments), "fsdp_config": settings})
    return config


def _settings(name: str, given: Any) -> tuple[dict[str, Any], Fault | None]:
    """A configuration as a dict: one that is given, written as JSON, or read from a file."""
    if isinstance(given, Mapping):
        return thaw(given), None
    text = str(given)
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        return {}, Fault(name, f"{text} cannot be read: {error}", _A_FILE)
    return (found, None) if isinstance(found, dict) else ({}, Fault(name, f"{text} holds no object", _A_FILE))


# --- DeepSpeed ------------------------------------------------------------------------------------------------


def _stage(settings: Mapping[str, Any]) -> Any:
    zero = settings.get("zero_optimization") or {}
    return zero.get("stage", 0) if isinstance(zero, Mapping) else zero


def _deepspeed(given: Any, on_cpus: str, here: bool) -> list[Fault]:
    settings, fault = _settings("deepspeed", given)
    if fault is not None:
        return [fault]
    stage = _stage(settings)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        return [Fault("deepspeed", f"zero_optimization.stage is {stage!r}", "0, 1, 2 or 3")]
    faults = []
    zero = settings.get("zero_optimization")
    if isinstance(zero, Mapping):
        faults += _offload(settings, zero, stage, here)
        if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is False:
            what = "stage3_gather_16bit_weights_on_model_save is False, and checkpoints would hold no whole model"
            faults.append(Fault("deepspeed", what, "leave it out"))
    for name in ("fp16", "bf16") if on_cpus else ():
        part = settings.get(name) or {}
        if isinstance(part, Mapping) and part.get("enabled") is True:
            faults.append(Fault("deepspeed", f"{name} is on, and {on_cpus}", f"{name}: 'auto'"))
    return faults


def _offload(settings: Mapping[str, Any], zero: Mapping[str, Any], stage: int, here: bool) -> list[Fault]:
    faults = []
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        part: Any = zero.get(name)
        device = part.get("device", "cpu") if isinstance(part, Mapping) else part
        if device in (None, "none"):
            continue
        if device not in ("cpu", "nvme"):
            faults.append(Fault("deepspeed", f"{name}.device is {device!r}", "'cpu', 'nvme' or 'none'"))
        elif stage < lowest:
            todo = f"zero_optimization.stage={lowest}" + (" or above" if lowest < 3 else "") + f", or no {name}"
            faults.append(Fault("deepspeed", f"{name} needs ZeRO stage {lowest}, and the stage is {stage}", todo))
        elif device == "nvme" and (stage < 3 or not part.get("nvme_path")):
            faults.append(Fault("deepspeed", f"{name} to nvme needs ZeRO stage 3 and an nvme_path", "device: 'cpu'"))
        elif name == "offload_optimizer" and here and not _can_build(settings):
            what = "offload_optimizer has DeepSpeed build its Adam for CPUs, and this machine has no C++ compiler"
            todo = "install g++; or zero_force_ds_cpu_optimizer: false, which steps with PyTorch's own and is slower"
            faults.append(Fault("deepspeed", what, todo))
    return faults


def _can_build(settings: Mapping[str, Any]) -> bool:
    """False when DeepSpeed would have to build its CPU Adam and could not."""
    if settings.get("zero_force_ds_cpu_optimizer", True) is False:
        return True
    compiler = os.environ.get("CXX") or "c++"
    return shutil.which(compiler) is not None or shutil.which("g++") is not None


# --- FSDP -----------------------------------------------------------------------------------------------------


def _fsdp(config: TrainConfig, on_cpus: str, workers: int) -> list[Fault]:
    wanted, given = config.arguments.get("fsdp"), config.arguments.get("fsdp_config")
    if not wanted:
        return [Fault("fsdp_config", "is given, and fsdp is off", "fsdp=True")] if given else []
    settings, fault = _settings("fsdp_config", given or {})
    faults = [fault] if fault is not None else []
    if config.deepspeed is not None:
        faults.append(Fault("fsdp", "and deepspeed both share the model out", "give one of them"))
    if workers == 1:
        faults.append(Fault("fsdp", "shares a model among workers, and there is 1", "num_gpus=2 or more; or no fsdp"))
    settings = {name.removeprefix("fsdp_"): value for name, value in settings.items()}
    version = settings.get("version", 2)
    if version not in (1, 2):
        faults.append(Fault("fsdp_config", f"version is {version!r}", "2, or 1 on GPUs"))
    faults += _fsdp_names(settings, version)
    words = () if isinstance(wanted, bool) else str(wanted).split()
    for word in words:
        if word not in _FSDP_WORDS and not (version == 1 and word in _FSDP_1_WORDS):
            faults.append(Fault("fsdp", f"{word!r} is not known to FSDP {version}", "fsdp=True, and fsdp_config"))
    if on_cpus and version == 1:
        faults.append(Fault("fsdp_config", "version 1 needs GPUs", "leave version out: 2 works on CPUs too"))
    if on_cpus and (settings.get("cpu_offload") or "offload" in words):
        what = f"cpu_offload moves weights off GPUs, and {on_cpus}"
        faults.append(Fault("fsdp_config", what, "leave it out"))
    if str(settings.get("state_dict_type", "FULL_STATE_DICT")).upper() != "FULL_STATE_DICT":
        what = f"state_dict_type is {settings['state_dict_type']!r}, and checkpoints would hold no whole model"
        faults.append(Fault("fsdp_config", what, "leave it out"))
    return faults


def _fsdp_names(settings: Mapping[str, Any], version: Any) -> list[Fault]:
    """transformers passes over names that it does not know."""
    faults = []
    known = (*_FSDP_BOTH, *_FSDP_1) if version == 1 else _FSDP_BOTH
    for name in settings:
        if name in known:
            continue
        if name in _FSDP_1:
            faults.append(Fault("fsdp_config", f"{name} belongs to FSDP 1", "leave it out"))
        else:
            close = near(name, known)
            todo = f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
            faults.append(Fault("fsdp_config", f"{name!r} is not known", todo))
    return faults
