"""What workers ask of a cluster, and whether it has it. Pure: a ``ScalingConfig`` is only looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NODE", "asked_by", "lacking"]

NODE = "node"
_NAMES = {"CPU": ("CPU", "CPUs"), "GPU": ("GPU", "GPUs"), NODE: ("node", "nodes")}


def asked_by(scaling: Any) -> dict[str, float]:
    """Everything that the workers of a ``ScalingConfig`` ask for together; ``node`` when each needs one of its own."""
    workers = scaling.num_workers
    each = scaling.resources_per_worker or {"GPU" if scaling.use_gpu else "CPU": 1}
    asked = {name: float(count) * workers for name, count in each.items() if count}
    if getattr(scaling, "placement_strategy", "PACK") == "STRICT_SPREAD":
        asked[NODE] = float(workers)
    return asked


def lacking(asked: Mapping[str, float], there: Mapping[str, float], free: Mapping[str, float]) -> tuple[str, bool]:
    """What workers wait for.

    Args:
        asked: by the workers, together.
        there: in the cluster.
        free: of it, now.

    Returns:
        In words, "" when nothing is missing; and True when the cluster could never have it as it is.
    """
    never = [name for name in asked if asked[name] > there.get(name, 0.0)]
    if never:
        return f"{_listed(never, asked)}, and the cluster has {_listed(never, there)}", True
    later = [name for name in asked if name in free and asked[name] > free[name]]
    if later:
        return (
            f"{_listed(later, asked)}, and of the cluster's {_listed(later, there)} are free: {_plain(later, free)}",
            False,
        )
    return "", False


def _listed(names: list[str], counts: Mapping[str, float]) -> str:
    found = []
    for name in names:
        count = counts.get(name, 0.0)
        one, many = _NAMES.get(name, (name, name))
        found.append(f"{count:g} {one if count == 1 else many}")
    return " and ".join(found)


def _plain(names: list[str], counts: Mapping[str, float]) -> str:
    return " and ".join(f"{max(counts.get(name, 0.0), 0.0):g}" for name in names)
