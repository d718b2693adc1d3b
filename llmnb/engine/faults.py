"""NaN and Inf in a run: the step where they began and what is likely behind them.

The look at each step stays on the device; only a log brings it to the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..events import Note

__all__ = ["FaultWatch"]


class FaultWatch:
    """Remembers the first step at which a number was not finite."""

    def __init__(self, device: Any) -> None:
        self._first: dict[str, torch.Tensor] = {}
        self._device = device
        self._said: set[str] = set()

    def look(self, name: str, value: Any, step: int) -> None:
        """Takes the ``name`` of one step: a number, or a tensor of one element."""
        if isinstance(value, float) and math.isfinite(value):
            return
        value = torch.as_tensor(value, device=self._device).detach()
        first = self._first.setdefault(name, torch.full((), -1, dtype=torch.long, device=self._device))
        began = (first < 0) & ~torch.isfinite(value.reshape(-1)).all()
        self._first[name] = torch.where(began, torch.full_like(first, step), first)

    def notes(self, args: Any, state: Any) -> list[Note]:
        """One note for each kind of fault, once."""
        steps = {name: int(first.item()) for name, first in self._first.items() if name not in self._said}
        steps = {name: step for name, step in steps.items() if step >= 0}
        self._said |= set(steps)
        if not steps:
            return []
        step = min(steps.values())
        names = sorted(name for name, at in steps.items() if at == step)
        what = " and ".join({"loss": "the loss", "grad_norm": "the gradient norm"}[n] for n in names)
        causes = _causes(args, names)
        text = f"At step {step} {what} became NaN or infinite. Likely: {'; '.join(causes)}."
        return [Note(level="warning", text=text, data={"step": step, "what": names, "causes": causes})]


def _causes(args: Any, names: list[str]) -> list[str]:
    """What usually is behind it, the likeliest first, with the setting to change."""
    causes = []
    rate = float(args.learning_rate)
    causes.append(
        f"the learning rate ({rate:g}) is too high" if rate > 1e-3 else f"the learning rate ({rate:g}) for this model"
    )
    if args.fp16:
        causes.append("float16 overflows (try bf16=True)")
    if args.max_grad_norm <= 0 or args.max_grad_norm > 10:
        causes.append("gradients are not clipped (max_grad_norm=1.0)")
    if args.get_warmup_steps(1000) == 0:
        causes.append("no warm-up (warmup_steps)")
    causes.append("weights of the base are not finite" if "loss" in names else "rows with very few trained tokens")
    return causes
