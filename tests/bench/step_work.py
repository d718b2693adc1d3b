"""What every contestant of ``bench_step`` carries: the model that it trains, and the clock."""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

WARM = 2  # steps before the clock runs
RATE = 1e-4
RANK = 16


def load(known: argparse.Namespace) -> tuple[Any, Any]:
    """The model as the peers train it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(known.base)
    if not known.full:
        from peft import LoraConfig, get_peft_model

        wanted = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, wanted)
    return model, AutoTokenizer.from_pretrained(known.base)


def same_start(model: Any) -> None:
    """Draws the A of every LoRA module anew, by name: the contestants draw theirs at different moments."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_A" in name:
                weight.copy_(torch.empty(weight.shape).uniform_(-1, 1, generator=generator) / weight.shape[1] ** 0.5)


class Clock:
    """Seconds and real tokens of the steps after the first ones, and the losses of the first ten."""

    def __init__(self, steps: int) -> None:
        self.steps, self.losses, self.tokens, self.done = steps, [], 0, 0
        self._began: tuple[float, float, int] | None = None
        self.seconds = self.wall = float("nan")
        self.counted = 0

    def step_ended(self) -> None:
        """An optimizer step is done; its tokens are in ``tokens`` already."""
        self.done += 1
        now = (time.process_time(), time.perf_counter(), self.tokens)
        if self.done == WARM:
            self._began = now
        if self.done == self.steps and self._began is not None:
            self.seconds, self.wall, self.counted = (b - a for a, b in zip(self._began, now))

    def result(self) -> dict[str, Any]:
        return {
            "rate": self.counted / self.seconds,
            "wall": self.counted / self.wall,
            "tokens": self.counted,
            "peak": peak(),
            "losses": self.losses[:10],
        }


def callback_of(clock: Clock) -> Any:
    """The clock as a callback of ``transformers.Trainer``."""
    from transformers import TrainerCallback

    class Ticking(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            same_start(model)

        def on_step_end(self, *args: Any, **more: Any) -> None:
            clock.step_ended()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    return Ticking()


def counted(kind: type, clock: Clock) -> type:
    """A trainer class that counts the real tokens which pass through it."""

    class Counting(kind):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.tokens += real_tokens(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    return Counting


def real_tokens(batch: Any) -> int:
    """Tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def peak() -> float:
    """GB of memory that this process held at most. Not ``ru_maxrss`` where it can be helped: that begins with the
    parent's."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024 / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / 1024
