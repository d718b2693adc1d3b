"""How many workers a run has and what they need: decided, and refused, before anything is started.

Pure functions of the settings. Neither Ray nor torch is loaded: a ``ScalingConfig`` is only looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..config import TrainConfig
from ..errors import ConfigError, Fault, MissingPackage, near
from ..job import TrainJob
from . import machine
from .room import NODE, asked_by, lacking
from .sharing import faults_of

__all__ = ["SLOT", "Layout", "plan", "spread"]

# A resource that our own cluster has plenty of: its jobs hold all CPUs, so that runs take turns, and their workers ask
# for this instead.
SLOT = "llmnb_worker"

_PASSED_ON = ("dataset_config", "run_config", "scaling_config", "torch_config", "validation_config")


@dataclass(frozen=True)
class Layout:
    """Attributes:

    workers: how many.
    on_ray: True when they are started by Ray's ``TorchTrainer``: more than one, DeepSpeed, or ray_configs.
    """

    workers: int
    on_ray: bool


def spread(job: TrainJob) -> bool:
    """True when the run's training happens in processes of its own, started by ``TorchTrainer``."""
    return _on_ray(job.config, job.workers, job.ray_configs)


def _on_ray(config: TrainConfig, workers: int, ray_configs: Mapping[str, Any]) -> bool:
    return workers > 1 or config.deepspeed is not None or bool(ray_configs)


def plan(
    config: TrainConfig, ray_configs: Mapping[str, Any], *, bits: int | None, gpus: int | None, background: bool
) -> Layout:
    """Decides the number of workers, and checks what can be checked without starting anything.

    Args:
        config: how to train.
        ray_configs: keyword arguments of ``TorchTrainer``.
        bits: of the base, the model's or the trainer's.
        gpus: CUDA devices of the machine that will train; None when that is another machine.
        background: False when the run would be in this process.

    Raises:
        ConfigError: all that is wrong, together.
        MissingPackage: DeepSpeed is asked for and not installed where it is needed.
    """
    faults = [*_name_faults(ray_configs)]
    workers, more = _workers(config, ray_configs, gpus, background)
    faults += more
    on_ray = _on_ray(config, workers, ray_configs)
    if on_ray and not background:
        asked = "deepspeed" if config.deepspeed is not None else "ray_configs" if ray_configs else "num_gpus"
        faults.append(Fault("on_ray", f"is False, and {asked} needs Ray", "leave on_ray out"))
    faults += faults_of(config, bits=bits, gpus=gpus, workers=workers)
    if faults:
        raise ConfigError(faults)
    if config.deepspeed is not None and gpus is not None and find_spec("deepspeed") is None:
        raise MissingPackage("deepspeed", "deepspeed", "Training with a DeepSpeed configuration")
    return Layout(workers, on_ray)


def _name_faults(ray_configs: Mapping[str, Any]) -> list[Fault]:
    faults = []
    for name in ray_configs:
        if name not in _PASSED_ON:
            close = near(name, _PASSED_ON)
            todo = ("did you mean " if close else "known: ") + ", ".join(close or _PASSED_ON)
            faults.append(Fault(f"ray_configs[{name!r}]", "is not an argument of ray.train.torch.TorchTrainer", todo))
    return faults


def _workers(
    config: TrainConfig, ray_configs: Mapping[str, Any], gpus: int | None, background: bool
) -> tuple[int, list[Fault]]:
    asked, scaling = config.num_gpus, ray_configs.get("scaling_config")
    faults = []
    if scaling is not None:
        where = "ray_configs['scaling_config']"
        named = getattr(scaling, "num_workers", None)
        if isinstance(named, (tuple, list)):
            todo = "give one number: the size of an optimizer step depends on it"
            return 1, [Fault(where, f"num_workers={named!r} may change while the run goes on", todo)]
        if isinstance(named, bool) or not isinstance(named, int):
            return 1, [Fault(where, f"must be a ray.train.ScalingConfig, not {type(scaling).__name__}")]
        if named < 1:
            return 1, [Fault(where, f"num_workers={named}: a run has 1 worker or more")]
        if asked is not None and asked != named:
            faults.append(Fault("num_gpus", f"says {asked}, {where} says {named}", "give one of them"))
        asked = named
        on_gpus = bool(getattr(scaling, "use_gpu", False))
    else:
        on_gpus = not config.arguments.get("use_cpu")
    if asked is None:
        asked = max(gpus or 1, 1) if background and on_gpus else 1
    if gpus and on_gpus and asked > gpus:
        faults.append(Fault("num_gpus", f"{asked} GPUs are asked for, and this machine has {gpus}"))
    elif scaling is not None and gpus is not None:
        faults += _room_faults(scaling, gpus)
    return asked, faults


def _room_faults(scaling: Any, gpus: int) -> list[Fault]:
    """What this machine's own cluster will never have: it is one node."""
    there = {"CPU": float(machine.cpus()), "GPU": float(gpus), NODE: 1.0, SLOT: 1000.0}
    asked = asked_by(scaling)
    if scaling.resources_per_worker is None:
        asked.pop("CPU", None)  # they ask for slots there
    if scaling.use_gpu and not gpus:
        asked.pop("GPU", None)  # they train on CPUs then, and the run says so
    text, never = lacking(asked, there, {})
    if not never:
        return []
    what = "workers ask for " + text.replace("the cluster", "this machine")
    return [Fault("ray_configs['scaling_config']", what, "ask for less, or give the ray_address of a larger cluster")]
