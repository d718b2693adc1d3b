"""What a step of ours computes and keeps, counted instead of timed: a machine that is busy changes neither.

The engine's public way trains the bench's Llama (``uneven``) on rows of uneven length, and the operations of three
whole optimizer steps are counted beside those of plain padded batches of the same rows. torch's counter knows products
inside ``autograd.Function`` too, but not its CPU attention, whose formula is given here: every pair of query and key
counts, for both sides, though a causal kernel passes half of them over. Tensors that a function keeps without
``save_for_backward`` would not be seen; nothing of ours does that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from uneven import BATCH, LONGEST, documents_of, first_batches, make_base, rows_of

from llmnb.config import ModelSpec, TrainConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, STEPS, RANK = 8192, 3, 16


class _Nowhere(contextlib.nullcontext):
    """In place of the counter's own list of modules, whose hooks do not go with ``torch.autograd.grad``."""

    parents = ("Global",)


class Counts:
    """FLOPs of forward and backward passes, and the most bytes that were kept for a backward pass at one time."""

    def __init__(self) -> None:
        self.flops = self.kept = 0

    @contextlib.contextmanager
    def step(self, model: Any) -> Iterator[None]:
        from torch.multiprocessing.reductions import StorageWeakRef
        from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

        aten = torch.ops.aten
        formulas = {
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
            ),
        }
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        alive: dict[int, tuple[Any, int]] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                for gone in [key for key, (seen, _) in alive.items() if seen.expired()]:
                    del alive[gone]
                alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.kept = max(self.kept, sum(size for _, size in alive.values()))
            return tensor

        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        counter.mod_tracker = _Nowhere()
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.flops += counter.get_total_flops()


def plain(base: Path, lora: bool) -> Counts:
    """Padded batches through transformers' model, as it is."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    collate = transformers.DataCollatorForSeq2Seq(transformers.AutoTokenizer.from_pretrained(base))
    counts = Counts()
    for rows in first_batches(rows_of(VOCABULARY, False), STEPS):
        batch = collate(rows)
        with counts.step(model):
            model(**batch).loss.backward()
        model.zero_grad()
    return counts


def ours(base: Path, lora: bool, workdir: Path) -> Counts:
    """The engine, from documents on."""
    from llmnb.engine.hooks import Hooks
    from llmnb.engine.training import train

    counts, told = Counts(), {}

    class Count(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            self.open = counts.step(model)
            self.open.__enter__()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            self.open.__exit__(None, None, None)

    config = TrainConfig(
        key=("prompt", "response"),
        train_on="answers",
        max_seq_length=LONGEST,
        padding_free=True,
        use_lora=lora,
        lora_r=RANK,
        lora_dropout=0.0,
        arguments={
            "per_device_train_batch_size": BATCH,
            "max_steps": STEPS,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 0,
        },
    )
    rows = rows_of(VOCABULARY, False)
    train(
        ModelSpec(model_name_or_path=str(base)),
        config,
        {"train": lambda: documents_of(rows)},
        Hooks(started=told.update),
        workdir=workdir,
        trainer_kwargs={"callbacks": [Count()]},
    )
    assert told["tokens"] == sum(len(row["input_ids"]) for row in rows)
    return counts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted") / "base"
    make_base(folder, VOCABULARY)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_flops_and_kept_bytes_against_padded_batches(lora, base, tmp_path):
    padded, packed = plain(base, lora), ours(base, lora, tmp_path)
    tokens = sum(len(row["input_ids"]) for rows in first_batches(rows_of(VOCABULARY, False), STEPS) for row in rows)
    flops, kept = packed.flops / padded.flops, packed.kept / padded.kept
    print(f"\nFLOPs per real token {packed.flops / tokens:.4g}, padded {padded.flops / tokens:.4g}: {flops:.3f}")
    print(f"kept for backward {packed.kept / 1e6:.1f} MB, padded {padded.kept / 1e6:.1f} MB: {kept:.3f}")
    # The goals are 0.37 and 0.32. These rows gave 0.300 and 0.288 with LoRA, 0.306 and 0.291 without: a lever that is
    # lost is seen here, and a figure far below is a counter that no longer sees everything.
    assert 0.15 < flops <= 0.31
    assert 0.1 < kept <= 0.30
