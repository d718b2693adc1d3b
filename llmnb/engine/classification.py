"""Training of text classifiers: the same run as for language models, with labels of rows instead of tokens.

A row is (text, label). A label is a whole number, or a word; words are numbered in sorted order unless the model's
``id2label`` or ``label2id`` says otherwise. Knows no database.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from ..config import thaw
from ..errors import ConfigError, DataError, Fault, near
from . import bases
from .arguments import Plan
from .loop import Loop
from .losses import TokenLoss
from .training import Source, TrainingRun

__all__ = ["ClassifierRun", "Labels"]

_NAMED = 5


class Labels:
    """The label of each class, and back.

    Args:
        model_kwargs: ``num_labels``, ``id2label`` and ``label2id`` are honoured.

    Attributes:
        names: the word for each number, in order; None until the rows said which there are.
    """

    def __init__(self, model_kwargs: Mapping[str, Any]) -> None:
        given = thaw(dict(model_kwargs))
        self.names: list[str] | None = None
        self.count: int | None = given.get("num_labels")
        if given.get("id2label"):
            numbered = {int(number): str(name) for number, name in given["id2label"].items()}
            self.names = [numbered[number] for number in sorted(numbered)]
        elif given.get("label2id"):
            self.names = sorted(given["label2id"], key=lambda name: int(given["label2id"][name]))
        if self.names is not None and self.count not in (None, len(self.names)):
            fault = Fault("model_kwargs['num_labels']", f"is {self.count}, but {len(self.names)} labels are named")
            raise ConfigError([fault])

    def learn(self, seen: Iterable[Any]) -> None:
        """Takes the classes from the training rows where the person named none.

        Raises:
            DataError: the rows hold more classes than ``num_labels``, words and numbers mixed, or one class only.
        """
        found = set(seen)
        words = {label for label in found if isinstance(label, str)}
        if words and words != found:
            raise DataError("Some labels are words and some are numbers.", seen=sorted(map(repr, found))[:8])
        if self.names is None:
            if words:
                self.names = sorted(words)
            else:
                count = self.count or max(found) + 1
                self.names = [f"LABEL_{number}" for number in range(count)]
        if self.count is not None and len(self.names) > self.count:
            raise DataError(
                f"The documents have {len(self.names)} labels, but num_labels is {self.count}.",
                seen=", ".join(self.names[:8]),
                todo=f"model_kwargs={{'num_labels': {len(self.names)}}}, or narrow the selection",
            )
        if self.count is not None:
            self.names += [f"LABEL_{number}" for number in range(len(self.names), self.count)]
        if len(self.names) < 2:
            raise DataError("A classifier needs at least two labels.", seen=", ".join(self.names))

    def number(self, label: Any) -> int | None:
        """The class of a label; None for a label that there is not."""
        assert self.names is not None
        if isinstance(label, bool) or not isinstance(label, int):
            return self.names.index(str(label)) if str(label) in self.names else None
        return label if 0 <= label < len(self.names) else None

    def kwargs(self) -> dict[str, Any]:
        """What ``from_pretrained`` needs to know."""
        assert self.names is not None
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }


class LabelledRows(Sequence[dict[str, Any]]):
    """Rows of ``{"input_ids": list[int], "labels": int}``."""

    def __init__(self, ids: list[list[int]], labels: list[int]) -> None:
        self._ids, self._labels = ids, labels
        self.lengths = [len(row) for row in ids]

    def __len__(self) -> int:
        return len(self._ids)

    def digest(self) -> str:
        """Identifies the rows, their labels and their order: 32 hexadecimal digits."""
        found = hashlib.blake2b(digest_size=16)
        for ids, label in zip(self._ids, self._labels, strict=True):
            found.update(f"{label}:{ids}".encode())
        return found.hexdigest()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {"input_ids": self._ids[index], "labels": self._labels[index]}


class LabelCollator:
    """Rows to a batch: ``input_ids`` and ``attention_mask`` (batch, seq), ``labels`` (batch,), int64."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"], dtype=torch.long) for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad(ones, batch_first=True, padding_value=0),
            "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.long),
        }


class RowLoss(TokenLoss):
    """Cross entropy summed over rows and divided by their number in the whole optimizer step."""

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Args: ``outputs["logits"]``: (batch, classes); ``labels``: (batch,)."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.smoothing)
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


class ClassifierLoop(Loop):
    """The loop with a loss over rows, whatever the architecture's own does with accumulation."""

    def __init__(self, **kwargs: Any) -> None:
        own = kwargs.get("compute_loss_func") is None
        super().__init__(**kwargs)
        self._loss_shifts_labels = False
        if own:
            self.compute_loss_func = RowLoss(self.args.label_smoothing_factor)
            self.mean_over_tokens = True


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of rows whose largest logit is the label's."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


class ClassifierRun(TrainingRun):
    """A run of a text classifier."""

    tasks = ("text-classification",)
    lora_task = "SEQ_CLS"
    whole_kind = "classifier"
    loop_class = ClassifierLoop

    def _collator(self) -> Any:
        return LabelCollator(int(self.tokenizer.pad_token_id or 0))

    def _train_collator(self) -> Any:
        if self.config.padding_free:
            fault = "is for language models; a classifier reads one label a row"
            raise ConfigError([Fault("padding_free", fault, "leave it out")])
        return None

    def _options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"compute_metrics": accuracy, **super()._options(given)}

    def _card(self, plan: Plan, fingerprint: str) -> dict[str, Any]:
        return {**super()._card(plan, fingerprint), "labels": self.labels.names}

    def _rows(self, data: Mapping[str, Source], plan: Plan, transform: Any) -> dict[str, Any]:
        self.tokenizer = bases.load_tokenizer(self.spec)
        self._note(bases.ensure_pad(self.tokenizer, None))
        problem = self.spec.model_kwargs.get("problem_type")
        if problem not in (None, "single_label_classification"):
            raise ConfigError([Fault("model_kwargs['problem_type']", f"{problem!r} is not trained here")])
        self.labels = Labels(self.spec.model_kwargs)
        reader = _Reader(self.config.key, transform, self.config.max_cut_share)
        evaluates = str(plan.arguments.eval_strategy.value) != "no" or plan.arguments.eval_on_start
        read = {name: reader.read(source(), name) for name, source in data.items() if name == "train" or evaluates}
        self.labels.learn(label for _, label in read["train"])
        rows = {name: self._encode(pairs, name) for name, pairs in read.items()}
        for note in reader.notes:
            self._note(note, "warning")
        train = rows["train"]
        self.counts.update(
            found=reader.found["train"],
            rows=len(train),
            dropped=reader.found["train"] - len(train),
            tokens=sum(train.lengths),
            trained_tokens=len(train),
            key=list(reader.columns),
            kind="labels",
            labels=self.labels.names,
            eval_rows={name: len(found) for name, found in rows.items() if name != "train"},
        )
        self.spec = replace(self.spec, model_kwargs={**thaw(self.spec.model_kwargs), **self.labels.kwargs()})
        return rows

    def _encode(self, pairs: list[tuple[str, Any]], name: str) -> LabelledRows:
        limit = min(self.config.max_seq_length, bases.context_of(self.spec) or self.config.max_seq_length)
        numbers = []
        for _, label in pairs:
            number = self.labels.number(label)
            if number is None:
                raise DataError(
                    f"The label {label!r} of the {name} documents is not one of the classes.",
                    seen=", ".join(map(str, self.labels.names or [])),
                    todo="train on all labels, or name them in model_kwargs={'id2label': …}",
                )
            numbers.append(number)
        encoded = self.tokenizer([text for text, _ in pairs])["input_ids"]
        cut = sum(len(ids) > limit for ids in encoded)
        if name == "train":
            self.counts["cut"] = cut
        if cut:
            self._note(f"{cut} of {len(pairs)} {name} rows have more than {limit} tokens and were cut", "warning")
        return LabelledRows([ids[:limit] for ids in encoded], numbers)


class _Reader:
    """Documents to (text, label); what cannot be read is counted."""

    def __init__(self, key: Any, transform: Callable[..., Any] | None, most: float) -> None:
        self.columns: tuple[str, ...] = (
            ("text", "label") if key is None else tuple(key) if not isinstance(key, str) else (key,)
        )
        if transform is None and len(self.columns) != 2:
            raise ConfigError([Fault("key", f"{key!r} is not a pair", "key=('text', 'label') for a classifier")])
        self.transform, self.most = transform, most
        self.notes: list[str] = []
        if key is None:
            self.notes.append("key was not given; ('text', 'label') was chosen")
        self.found: dict[str, int] = {}

    def read(self, documents: Iterable[Mapping[str, Any]], name: str) -> list[tuple[str, Any]]:
        """Raises: DataError: too little can be read."""
        pairs: list[tuple[str, Any]] = []
        bad: list[str] = []
        fields: set[str] = set()
        for document in documents:
            fields.update(field for field in document if not field.startswith("_"))
            pair = self._pair(document)
            if pair is None:
                bad.append(str(document.get("_id")))
            else:
                pairs.append(pair)
        self.found[name] = count = len(pairs) + len(bad)
        if not pairs or len(bad) > self.most * count:
            offers = {c: near(c, fields) for c in self.columns if c not in fields}
            hints = [f"{column!r} → {found[0]!r}" for column, found in offers.items() if found]
            raise DataError(
                f"{len(bad)} of {count} {name} documents have no text with a label (a whole number or a word).",
                seen=f"fields: {', '.join(sorted(fields)) or 'none'}; _id {', '.join(bad[:_NAMED])}",
                todo="did you mean " + ", ".join(hints) + "?" if hints else "change key, or give a transform",
            )
        if bad:
            self.notes.append(f"{len(bad)} of {count} {name} documents are left out (_id {', '.join(bad[:_NAMED])})")
        return pairs

    def _pair(self, document: Mapping[str, Any]) -> tuple[str, Any] | None:
        values = [document.get(column) for column in self.columns]
        if self.transform is not None:
            if any(column not in document for column in self.columns):
                return None
            result = self.transform(*values)
            values = [result.get("text"), result.get("label")] if isinstance(result, Mapping) else list(result)
        text, label = values
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(text, str) or not text.strip() or not isinstance(label, (int, str)) or label == "":
            return None
        return text, label
