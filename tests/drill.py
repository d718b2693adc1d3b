"""One training run of a tiny model inside a test: what it is given, and everything it said."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import make_model, make_tokenizer

from llmnb.config import ModelSpec, TrainConfig
from llmnb.events import Metric, Note

_HERE = Path(tempfile.mkdtemp(prefix="llmnb-test-"))
atexit.register(shutil.rmtree, _HERE, ignore_errors=True)

PIECES = ("the cat sat", "on the mat and", "a dog ran to the park", "one two three", "red green")


@functools.cache
def folder_of(family: str = "llama", *, pad: bool = True, eos: bool = True, bos: bool = True, **changes: Any) -> Path:
    """A tiny model's folder, made once."""
    folder = Path(tempfile.mkdtemp(dir=_HERE))
    return make_model(family, folder, tokenizer=make_tokenizer(pad=pad, eos=eos, bos=bos), **changes)


def texts(count: int = 12) -> list[dict[str, Any]]:
    """Documents of uneven length."""
    return [{"_id": i, "text": " ".join(PIECES[(i + j) % 5] for j in range(1 + (i * 7) % 5))} for i in range(count)]


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Prompts and responses of uneven length."""
    return [{"_id": i, "prompt": d["text"], "response": PIECES[i % 5]} for i, d in enumerate(texts(count))]


def chats(count: int = 8) -> list[dict[str, Any]]:
    """One question and its answer, again and again."""
    said = [
        {"role": "user", "content": "what is your name?"},
        {"role": "assistant", "content": "my name is model."},
    ]
    return [{"_id": i, "messages": said} for i in range(count)]


@dataclass
class Drill:
    """What a run said.

    Attributes:
        result: of ``train``; None when it raised.
        counts: said before step 1.
        recounted: said when rows that are read while they are trained were counted.
        events: metrics and notes.
        saved: one dict for each finished checkpoint; ``files`` are the names in its folder at that time.
    """

    result: Any = None
    counts: dict[str, Any] = field(default_factory=dict)
    recounted: dict[str, Any] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    saved: list[dict[str, Any]] = field(default_factory=list)

    @property
    def metrics(self) -> list[Metric]:
        return [e for e in self.events if isinstance(e, Metric)]

    @property
    def notes(self) -> list[Note]:
        return [e for e in self.events if isinstance(e, Note)]

    def losses(self) -> dict[int, float]:
        """Step → loss."""
        return {e.step: e.values["loss"] for e in self.metrics if "loss" in e.values}

    def series(self, name: str) -> dict[int, float]:
        """Step → any metric."""
        return {e.step: e.values[name] for e in self.metrics if name in e.values}

    @property
    def last(self) -> Path:
        """The last checkpoint's folder."""
        return self.saved[-1]["folder"]


def train(
    workdir: Path,
    *,
    base: Path | str | None = None,
    documents: list[dict[str, Any]] | None = None,
    sets: dict[str, list[dict[str, Any]]] | None = None,
    control: Any = None,
    spec: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    drill: Drill | None = None,
    adapter: Path | None = None,
    resume: Path | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **arguments: Any,
) -> Drill:
    """Trains a tiny model; ``arguments`` are TrainingArguments."""
    from llmnb.engine.hooks import Hooks
    from llmnb.engine.training import train as go

    drill = drill if drill is not None else Drill()

    def checkpoint(folder: Path, step: int, metrics: Any, kind: str, base_fingerprint: str, best: bool) -> None:
        files = sorted(path.name for path in folder.iterdir())
        drill.saved.append(
            dict(folder=folder, step=step, metrics=metrics, kind=kind, base=base_fingerprint, best=best, files=files)
        )

    hooks = Hooks(
        say=drill.events.append,
        checkpoint=checkpoint,
        control=control or (lambda: None),
        started=drill.counts.update,
        counted=drill.recounted.update,
    )
    documents = texts() if documents is None else documents
    source = documents if hasattr(documents, "fetch") else lambda: documents
    data = {"train": source, **{name: (lambda rows=rows: rows) for name, rows in (sets or {}).items()}}
    given = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "save_strategy": "no",
        **arguments,
    }
    given = {name: value for name, value in given.items() if value is not None}
    drill.result = go(
        ModelSpec(model_name_or_path=str(base or folder_of()), **(spec or {})),
        TrainConfig(**{"max_seq_length": 128, "lora_dropout": 0.0, **(config or {}), "arguments": given}),
        data,
        hooks,
        workdir=workdir,
        adapter=adapter,
        resume=resume,
        trainer_kwargs=trainer_kwargs,
    )
    return drill


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / name)


__all__ = ["Drill", "chats", "folder_of", "pairs", "texts", "train", "weights"]


def gradients_of_steps() -> Any:
    """A callback whose ``gradients`` are those of each step, by the parameter's name."""
    from transformers import TrainerCallback

    class Watched(TrainerCallback):
        def __init__(self) -> None:
            self.gradients: list[dict[str, Any]] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
            self.gradients.append(found)

    return Watched()
