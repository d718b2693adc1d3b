"""An engine without torch: it walks through the rows, says losses, writes small checkpoint folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from llmnb.engine.hooks import Hooks, TrainResult
from llmnb.events import Metric

LOSSES: list[float] = []  # for tests whose trainer takes real options only
BEGAN: list[int] = []  # the step that each training began after


def train(spec: Any, config: Any, data: Any, hooks: Hooks, *, workdir: Path, **more: Any) -> TrainResult:
    """Says one loss per step. ``config.arguments``: max_steps, save_steps, losses, pause_ms, say_much, die_at.

    ``die_at``: this process is killed with kill -9 before that step, once.
    """
    given = dict(config.arguments)
    transform = more.get("transform")
    rows = []
    for row in data["train"]():
        rows.append(transform(row["text"]) if transform else row["text"])
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    hooks.read({"rows": len(rows), "rows_digest": digest})
    steps = int(given.get("max_steps") or given.get("num_train_epochs", 1) * 4)
    pause = float(given.get("pause_ms") or os.environ.get("FAKE_ENGINE_PAUSE_MS", 0)) / 1000
    hooks.started({"rows": len(rows), "rows_digest": digest, "steps": steps, "cut": 0, "dropped": 0})
    begin = json.loads((more["resume"] / "llmnb.json").read_text())["step"] if more.get("resume") else 0
    BEGAN.append(begin)
    best_step, done = None, begin
    losses = given.get("losses") or LOSSES or [1.0 / (i + 1) for i in range(steps)]
    for step in range(begin + 1, steps + 1):
        letter = hooks.control()
        if letter:
            if letter == "stop" and not (workdir / f"checkpoint-{done}").exists():
                _save(hooks, workdir, spec, done, {}, False)
            return TrainResult(done, done, stopped=True, best_step=best_step)
        time.sleep(pause)
        if step == given.get("die_at") and not (workdir / "died").exists():
            (workdir / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        done = step
        print("x" * int(given.get("say_much", 0)), flush=True)
        hooks.say(Metric(step=step, epoch=step / steps, values={"loss": losses[step - 1], "learning_rate": 1e-4}))
        if step % int(given.get("save_steps", 1)) == 0:
            metrics = {"eval_loss": losses[step - 1]}
            best = losses[step - 1] == min(losses[:step])
            best_step = step if best else best_step
            _save(hooks, workdir, spec, step, metrics, best)
    return TrainResult(done, done, best_step=best_step)


def _save(hooks: Hooks, workdir: Path, spec: Any, step: int, metrics: dict[str, float], best: bool) -> None:
    folder = workdir / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(f"weights of {spec.identifier} at {step}".encode())
    (folder / "llmnb.json").write_text(json.dumps({"step": step}))
    (folder / "optimizer.pt").write_bytes(f"optimizer at {step}".encode())
    hooks.checkpoint(folder, step, metrics, "adapter", "fingerprint", best)
