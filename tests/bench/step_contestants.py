"""Who trains in ``bench_step``: each function trains the same rows for the same steps and returns what its clock saw.

TRL scores every position on CPUs: ``SFTTrainer``'s fused output layer runs over prompts and padding too, and computes
entropy and accuracy beside the loss. Packed, its rows are kept apart by transformers' stock attention, with a
mask over the whole pack.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_work import RANK, RATE, Clock, callback_of, counted, load, real_tokens, same_start
from uneven import BATCH, LONGEST, documents_of, first_batches, rows_of

CONTESTANTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {}
# What they do by their own settings is slow beyond use, so it is shown, and never the headline.
AT_DEFAULTS = ("trl-defaults", "trl-packed-defaults")


def contestant(name: str) -> Callable[[Any], Any]:
    def enter(function: Any) -> Any:
        CONTESTANTS[name] = function
        return function

    return enter


def _arguments(known: argparse.Namespace) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": BATCH,
        "max_steps": known.steps,
        "learning_rate": RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }


# --- transformers.Trainer -------------------------------------------------------------------------------------------


@contestant("trainer")
def trainer(known: argparse.Namespace, sampling: str = "random") -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = load(known)
    clock = Clock(known.steps)
    args = TrainingArguments(tempfile.mkdtemp(), train_sampling_strategy=sampling, **_arguments(known))
    counted(Trainer, clock)(
        model,
        args,
        train_dataset=rows_of(known.vocabulary, known.equal),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback_of(clock)],
    ).train()
    return clock.result()


@contestant("trainer-grouped")
def trainer_grouped(known: argparse.Namespace) -> dict[str, Any]:
    return trainer(known, "group_by_length")


# --- TRL ------------------------------------------------------------------------------------------------------------


def _trl(known: argparse.Namespace, packed: bool, tuned: bool) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(known)
    clock = Clock(known.steps)
    rows = rows_of(known.vocabulary, known.equal)
    options = _arguments(known) | {"max_length": LONGEST, "dataset_num_proc": None}
    if tuned:
        options |= {"bf16": False, "gradient_checkpointing": False}
    if packed:
        # As many packs as hold the tokens of a step of 8 rows.
        tokens = BATCH * sum(len(row["input_ids"]) for row in rows) / len(rows)
        options |= {"packing": True, "packing_strategy": "bfd"}
        options |= {"per_device_train_batch_size": max(round(tokens / LONGEST), 1)}
    counted(SFTTrainer, clock)(
        model,
        args=SFTConfig(tempfile.mkdtemp(), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback_of(clock)],
    ).train()
    return clock.result()


@contestant("trl")
def trl_padded(known: argparse.Namespace) -> dict[str, Any]:
    return _trl(known, packed=False, tuned=True)


@contestant("trl-packed")
def trl_packed(known: argparse.Namespace) -> dict[str, Any]:
    return _trl(known, packed=True, tuned=True)


@contestant("trl-defaults")
def trl_defaults(known: argparse.Namespace) -> dict[str, Any]:
    return _trl(known, packed=False, tuned=False)


@contestant("trl-packed-defaults")
def trl_packed_defaults(known: argparse.Namespace) -> dict[str, Any]:
    return _trl(known, packed=True, tuned=False)


# --- plain loops ----------------------------------------------------------------------------------------------------


def _loop(known: argparse.Namespace, model: Any, collate: Any, loss_of: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """What ``Trainer`` computes, without it: AdamW, a falling rate, gradients clipped at 1."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    clock = Clock(known.steps)
    same_start(model)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, known.steps)
    for rows in first_batches(rows_of(known.vocabulary, known.equal), known.steps):
        batch = collate(rows)
        loss = loss_of(batch, (batch["labels"][:, 1:] != -100).sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.losses.append(loss.item())
        clock.tokens += real_tokens(batch)
        clock.step_ended()
    return clock.result()


@contestant("bare")
def bare(known: argparse.Namespace) -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer = load(known)

    def loss_of(batch: Any, count: Any) -> Any:
        return model(**batch, num_items_in_batch=count).loss

    return _loop(known, model, DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"), loss_of)


class _Taken(Exception):
    """The engine's model was used; its own loop need not run."""


@contestant("bare-tricks")
def bare_tricks(known: argparse.Namespace) -> dict[str, Any]:
    """A plain loop over the model that the engine made ready: what the engine changes in it is in this loop, too."""
    from transformers import TrainerCallback

    from llmnb.engine import attention
    from llmnb.engine.losses import HeadLoss
    from llmnb.engine.packing import FlatCollator

    found: dict[str, Any] = {}

    class Take(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            head = HeadLoss(model)

            def loss_of(batch: Any, count: Any) -> Any:
                with attention.rows(batch["position_ids"]), head.instead_of_logits(batch) as inputs:
                    outputs = model(**{**inputs, "use_cache": False, "labels": None})
                    return head(outputs, batch["labels"], count)

            found.update(_loop(known, model, FlatCollator(), loss_of))
            raise _Taken

    try:
        _engine(known, True, Take(), {})
    except _Taken:
        pass
    return found


# --- ours -----------------------------------------------------------------------------------------------------------


def _engine(known: argparse.Namespace, padding_free: bool, callback: Any, counts: dict[str, Any]) -> None:
    """The engine's public way, from documents on."""
    from llmnb.config import ModelSpec, TrainConfig
    from llmnb.engine.hooks import Hooks
    from llmnb.engine.training import train

    rows = rows_of(known.vocabulary, known.equal)
    config = TrainConfig(
        key=("prompt", "response"),
        train_on="answers",
        max_seq_length=LONGEST,
        padding_free=None if padding_free else False,
        fused_lora=None if padding_free else False,
        use_lora=not known.full,
        lora_r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        arguments=_arguments(known),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(
            ModelSpec(model_name_or_path=str(known.base)),
            config,
            {"train": lambda: documents_of(rows)},
            Hooks(started=counts.update),
            workdir=Path(folder),
            trainer_kwargs={"callbacks": [callback]},
        )


def _ours(known: argparse.Namespace, padding_free: bool) -> dict[str, Any]:
    clock, counts = Clock(known.steps), {}
    ticking = callback_of(clock)
    rows = rows_of(known.vocabulary, known.equal)
    lengths = [len(row["input_ids"]) for row in rows]
    order = first_batches(lengths, known.steps)

    def counting(*args: Any, **more: Any) -> None:
        clock.tokens += sum(order[clock.done])

    ticking.on_step_begin = counting
    _engine(known, padding_free, ticking, counts)
    assert counts["tokens"] == sum(lengths), f"{counts['tokens']} tokens in our rows, {sum(lengths)} in the peers'"
    assert counts.get("padding_free", False) is padding_free
    return clock.result()


@contestant("ours-padded")
def ours_padded(known: argparse.Namespace) -> dict[str, Any]:
    return _ours(known, False)


@contestant("ours")
def ours(known: argparse.Namespace) -> dict[str, Any]:
    return _ours(known, True)
