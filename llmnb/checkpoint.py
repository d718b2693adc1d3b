"""A checkpoint: a name for weights, never the bytes themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step of one experiment.

    Attributes:
        experiment: the run that wrote it; sorts by time.
        step: optimizer steps done.
        digest: sha256 of the manifest (file names and the sha256 of each file's bytes).
        metrics: the newest evaluation at that step, e.g. ``{"eval_loss": 1.9}``.
        kind: "adapter" (PEFT), "model" (whole causal model) or "classifier".
        base: the base model's hub id or path as the person gave it.
        base_fingerprint: identifies the base's weights; an adapter loads only onto an equal one.
        size: bytes of the files that loading needs.
        created: seconds since the epoch (UTC).
        best: True when it was the run's best by its own metric.
        resumable: True while optimizer, scheduler and RNG state are kept for it.
        path: local folder with the verified files, once fetched; not part of its identity.
    """

    experiment: str
    step: int
    digest: str
    metrics: Mapping[str, float] = field(default_factory=dict, compare=False)
    kind: str = "adapter"
    base: str = ""
    base_fingerprint: str = ""
    size: int = field(default=0, compare=False)
    created: float = field(default=0.0, compare=False)
    best: bool = field(default=False, compare=False)
    resumable: bool = field(default=False, compare=False)
    path: str | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.experiment}/{self.step}"

    def at(self, path: str) -> Checkpoint:
        """The same checkpoint with its files at ``path``."""
        return replace(self, path=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain data without ``path``."""
        data = asdict(self)
        del data["path"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Checkpoint:
        """Reads ``to_dict``; unknown fields are passed over."""
        return cls(**{k: v for k, v in data.items() if k in cls.__dataclass_fields__})
