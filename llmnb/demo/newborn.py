"""The demo's base model: a small Llama, made and pre-trained on this machine from the documentation's plain text.

It has never seen a question, so an adapter's effect on its answers is plain to see. This module knows the engine and a
cache folder, and no database.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ModelSpec, TrainConfig
from ..engine.hooks import Hooks
from ..errors import DataError
from ..events import Event, Note
from ..store import environment
from .library import passages

__all__ = ["RECIPE", "base_model"]

# Chosen by trying, for 2 cores and under two minutes. At this budget two layers and a small vocabulary learn to copy
# a name from the text before; four layers, a width of 192 or 256, or 4 096 tokens learn less per second and do not.
RECIPE: dict[str, Any] = {
    "vocabulary": 2048,
    "hidden": 128,
    "layers": 2,
    "context": 512,
    "steps": 1700,
    "rows_per_step": 8,
    "learning_rate": 3e-3,
    "format": 3,
}
LONGEST_S = 105.0  # of making it, imports included; a slower machine stops there, with what it has learned


def base_model(
    home: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
    *,
    steps: int | None = None,
    apart: bool = False,
) -> Path:
    """The folder of the demo's base model; made on the first call (under two minutes on 2 cores), then found again.

    Args:
        home: whose ``cache`` folder keeps it; ``LLMNB_HOME``, else ``./.llmnb``.
        progress: called with the events of the pre-training, while there is one.
        steps: of the pre-training, when not the recipe's own (a test takes few).
        apart: makes it in a process of its own, so that this one (a notebook's kernel) never loads torch.

    Raises:
        DataError: this Python's library has no documentation, or the process apart ended early.
        MissingPackage: torch or transformers is not installed.
    """
    folder, recipe, texts = _planned(home, steps)
    cache = folder.parent
    if (folder / "config.json").is_file():
        return folder
    if apart:
        return _made_apart(cache.parent.parent, folder, steps)
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    work = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    try:
        trained = _make(work, recipe, texts, progress or _nobody)
        try:
            os.rename(trained, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster, with the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _planned(home: str | Path | None, steps: int | None) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The folder that the base has, or will have; how it is made, and of which texts."""
    recipe = {**RECIPE, "steps": steps or RECIPE["steps"]}
    texts = passages()
    key = hashlib.sha256(json.dumps([recipe, texts]).encode()).hexdigest()[:16]
    cache = Path(home or environment.read().home).expanduser().absolute() / "cache" / "demo"
    return cache / f"stdlib-llama-{key}", recipe, texts


def _made_apart(home: Path, folder: Path, steps: int | None) -> Path:
    code = f"from llmnb.demo import base_model; base_model({str(home)!r}, steps={steps!r})"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0 or not folder.is_dir():
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise DataError(
            "The demo's base model could not be made.",
            seen=last[0] if last else f"exit status {done.returncode}",
            todo="make it in a terminal to see more: python -c 'from llmnb import demo; demo.base_model()'",
        )
    return folder


def _sweep(cache: Path) -> None:
    """Removes what processes that were killed have left half-made."""
    for left in cache.glob("making-*"):
        if time.time() - left.stat().st_mtime > 10 * LONGEST_S:
            shutil.rmtree(left, ignore_errors=True)


def _nobody(event: Event) -> None:
    return None


def _make(work: Path, recipe: dict[str, Any], texts: list[dict[str, Any]], say: Callable[[Event], None]) -> Path:
    end = time.monotonic() + LONGEST_S  # imports included
    from ..engine.scratch import new_llama
    from ..engine.training import train

    shape = {name: recipe[name] for name in ("vocabulary", "hidden", "layers", "context")}
    first = new_llama(work / "first", (text["text"] for text in texts), **shape)
    config = TrainConfig(
        identifier="stdlib-base",
        key="text",
        key_kind="text",
        max_seq_length=recipe["context"],
        use_lora=False,
        arguments={
            "max_steps": recipe["steps"],
            "per_device_train_batch_size": recipe["rows_per_step"],
            "learning_rate": recipe["learning_rate"],
            "lr_scheduler_type": "linear",
            "warmup_steps": 20,
            "adam_beta2": 0.95,
            "weight_decay": 0.01,
            "save_strategy": "no",
            "save_only_model": True,
            "logging_steps": 10,
            "use_cpu": True,  # the same weights with and without a GPU; it takes a minute
            "seed": 0,
        },
    )
    kept = work / "kept"

    def keep(folder: Path, step: int, metrics: Any, kind: str, base_fingerprint: str, best: bool) -> None:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)

    def started(counts: dict[str, Any]) -> None:
        say(Note(text=f"{counts['parameters'] / 1e6:.1f} M parameters, {counts['steps']} steps", data=counts))

    def control() -> str | None:
        return "stop" if time.monotonic() > end else None

    hooks = Hooks(say=say, checkpoint=keep, control=control, started=started)
    done = train(ModelSpec("stdlib-base", str(first)), config, {"train": lambda: texts}, hooks, workdir=work)
    if done.stopped:
        text = (
            f"This machine was too busy: the base was pre-trained for {done.last_step} of {recipe['steps']} steps, and "
            f"will answer worse. To make it again, delete {work.parent}."
        )
        say(Note(level="warning", text=text, data={"done": done.last_step}))
    for name in (
        "training_args.bin",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "llmnb.json",
    ):
        (kept / name).unlink(missing_ok=True)
    return kept
