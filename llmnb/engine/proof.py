"""What a merge was measured on, and what was found: numbers, and the words for them. No torch here.

The proof is written into the merged folder twice: ``merge_report.json`` is for programs, ``README.md`` for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig

__all__ = ["MergeReport", "Probe"]

FILE = "merge_report.json"


@dataclass(frozen=True)
class Probe:
    """What a merge is measured on.

    Attributes:
        documents: of the run's own data.
        config: how the run made rows of them.
        words: where they are from: "the valid fold of tickets".
        transform: the run's function, when it had one.
    """

    documents: tuple[Mapping[str, Any], ...]
    config: TrainConfig
    words: str
    transform: Callable[..., Any] | None = None


@dataclass(frozen=True)
class MergeReport:
    """The proof of a merge: the merged model against the adapter on its base, in one dtype. ``dict(report)`` works.

    Attributes:
        folder: the merged model.
        base: the base model as it was named.
        base_fingerprint: identifies its weights.
        dtype: of the merged weights, and of what was compared.
        modules: how many carried the adapter.
        size: bytes of the folder.
        rows_from: what it was measured on, in words.
        rows: how many rows.
        tokens: positions whose logits were compared.
        trained_tokens: positions that perplexity is taken over.
        max_logit_gap, mean_logit_gap: absolute differences between logits.
        bound: the largest gap that rounding explains; above it the merge fails.
        max_logit: the largest logit, for scale.
        kl: of the adapter's distribution from the merged one, nats per position, mean.
        top_token_agreement: share of positions at which both put the same token first.
        perplexity_base, perplexity_adapter, perplexity_merged: over the trained tokens; None without any.
        moved: the largest change of a logit against the base.
        bits: 4 or 8 when the adapter was trained on a quantised base.
        quantised: then, the adapter on that base against the merged model: ``max_logit_gap``, ``mean_logit_gap``,
            ``kl``, ``top_token_agreement``, ``perplexity``; or ``why`` it was not measured.
    """

    folder: str
    base: str
    base_fingerprint: str
    dtype: str
    modules: int
    size: int
    rows_from: str
    rows: int
    tokens: int
    trained_tokens: int
    max_logit_gap: float
    mean_logit_gap: float
    bound: float
    max_logit: float
    kl: float
    top_token_agreement: float
    perplexity_base: float | None
    perplexity_adapter: float | None
    perplexity_merged: float | None
    moved: float
    bits: int | None = None
    quantised: Mapping[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def keys(self) -> list[str]:
        """The names of its fields."""
        return list(self.__dataclass_fields__)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def measured(self) -> dict[str, Any]:
        """All but where the folder is, which is nobody else's business."""
        return {name: value for name, value in self.to_dict().items() if name != "folder"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MergeReport:
        """Reads ``to_dict``."""
        return cls(**data)

    def lines(self) -> list[tuple[str, str]]:
        """The proof as (what, figure), ready to be shown as text."""
        found = [
            ("largest logit difference", f"{self.max_logit_gap:.3g} (up to {self.bound:.3g} is rounding)"),
            ("mean logit difference", f"{self.mean_logit_gap:.3g}"),
            ("KL divergence", f"{self.kl:.3g} nats"),
            ("same top token", _percent(self.top_token_agreement)),
            ("perplexity", self._perplexities()),
            ("measured on", f"{self.rows_from}: {self.tokens} tokens, in {self.dtype}"),
        ]
        return found + (self._quantised_lines() if self.quantised else [])

    def _perplexities(self) -> str:
        if self.perplexity_merged is None:
            return "not measured: no trained token"
        found = (
            ("base", self.perplexity_base),
            ("adapter", self.perplexity_adapter),
            ("merged", self.perplexity_merged),
        )
        return ", ".join(f"{name} {_figure(value)}" for name, value in found)

    def _quantised_lines(self) -> list[tuple[str, str]]:
        found = self.quantised or {}
        name = f"adapter on the {self.bits}-bit base"
        if "why" in found:
            return [(name, f"not measured: {found['why']}")]
        return [
            (
                name,
                f"perplexity {_figure(found['perplexity'])}; against the merged model: logits differ by up to "
                f"{found['max_logit_gap']:.3g} (mean {found['mean_logit_gap']:.3g}), same top token "
                f"{_percent(found['top_token_agreement'])}",
            )
        ]

    def __repr__(self) -> str:
        width = max(len(name) for name, _ in self.lines())
        head = f"Merged into {self.folder}, on {self.base}: it says what the adapter says."
        return "\n".join([head, *(f"  {name:<{width}}  {figure}" for name, figure in self.lines())])

    def write(self, folder: Path, card: Mapping[str, Any]) -> None:
        """Puts the proof into a folder, for programs and for people. No path of this machine is in it but the base's.

        Args:
            folder: holds the merged model.
            card: of the adapter's checkpoint.
        """
        (folder / FILE).write_text(json.dumps(self.measured(), indent=1), encoding="utf-8")
        (folder / "README.md").write_text(self._page(card), encoding="utf-8")

    def _page(self, card: Mapping[str, Any]) -> str:
        rows = [f"| {name} | {_cell(figure)} |" for name, figure in self.lines()]
        step = f", step {card['step']}" if card.get("step") is not None else ""
        template = "with the chat template of the training" if card.get("chat_template") else "of the base"
        return "\n".join(
            [
                "# A merged model",
                "",
                f"A LoRA adapter{step}, merged into `{self.base}` ({self.dtype}, fingerprint {self.base_fingerprint}). "
                f"The tokenizer is in the folder, {template}.",
                "",
                "```python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                'model = AutoModelForCausalLM.from_pretrained("this folder")',
                'tokenizer = AutoTokenizer.from_pretrained("this folder")',
                "```",
                "",
                "Loaded again from these files and compared with the adapter on its base:",
                "",
                "| | |",
                "|---|---|",
                *rows,
                "",
            ]
        )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{math.floor(share * 10000) / 100:.2f} %"


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
