"""Tokens per CPU second of the training step, against transformers.Trainer on the same rows.

Run by hand: ``python tests/bench/bench_step.py [--vocabulary 8192] [--full] [--equal]``. Every round starts each
contestant in a process of its own, one thread, interleaved; the medians and the losses of the first ten steps are
printed. The work is that of a small Llama (6 layers, width 256) on rows whose lengths are log-normal, the first 40 % of
each a prompt without loss. Real tokens are counted, not padding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

CONTESTANTS = ("trainer", "trainer-grouped", "padded", "padding-free")
BATCH = 8


def rows_of(vocabulary: int, equal: bool) -> list[dict[str, list[int]]]:
    """2 000 rows: lengths log-normal (median 150, sigma 0.9, 16 to 1 024), or all 256."""
    import numpy as np

    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(np.log(150), 0.9, 2000)), 16, 1024).astype(int)
    rows = []
    for length in [256] * 2000 if equal else lengths:
        ids = random.integers(5, vocabulary, length).tolist()
        prompt = max(int(length * 0.4), 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def contest(known: argparse.Namespace) -> dict[str, Any]:
    """One contestant, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    torch.set_num_threads(1)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=known.vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    model: Any = LlamaForCausalLM(config)
    if not known.full:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    rows = rows_of(known.vocabulary, known.equal)
    clock: dict[str, Any] = {"losses": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:  # the first steps warm up
                clock["start"] = time.process_time()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                clock["losses"].append(logs["loss"])

    folder = tempfile.mkdtemp()
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        max_steps=known.steps,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        train_sampling_strategy="group_by_length" if known.contestant == "trainer-grouped" else "random",
    )
    if known.contestant.startswith("trainer"):
        from tokenizers import Tokenizer, models
        from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer: Any = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[Clock()])
    else:
        trainer = _ours(model, args, rows, known.contestant, Clock())
    trainer.train()
    seconds = time.process_time() - clock["start"]
    seen = _tokens(rows, trainer, known.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / 1024
    return {"rate": seen / seconds, "peak": peak, "losses": clock["losses"][:10]}


def _ours(model: Any, args: Any, rows: list[dict[str, list[int]]], contestant: str, clock: Any) -> Any:
    from llmnb.engine.hooks import Hooks
    from llmnb.engine.loop import Loop
    from llmnb.engine.losses import HeadLoss, agrees
    from llmnb.engine.order import Order
    from llmnb.engine.packing import FlatCollator, keep_apart
    from llmnb.engine.rows import Collator

    class Tokens:
        pad_token_id = 0

    more: dict[str, Any] = {}
    if contestant == "padding-free":
        assert keep_apart(model) is None
        loss = HeadLoss(model)
        assert agrees(model, loss)
        more = {"train_collator": FlatCollator(), "compute_loss_func": loss}
    order = Order([len(row["input_ids"]) for row in rows], "random", args.seed)
    card = {"kind": "adapter", "base_fingerprint": ""}
    return Loop(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Collator(Tokens()),
        hooks=Hooks(),
        card=card,
        order=order,
        callbacks=[clock],
        **more,
    )


def _tokens(rows: list[dict[str, list[int]]], trainer: Any, steps: int) -> int:
    """Real tokens of the measured steps."""
    order = list(iter(trainer._get_train_sampler(rows)))
    if hasattr(trainer, "order") and trainer.order is not None:
        trainer.order.set_epoch(0)
        order = list(iter(trainer.order))
    return sum(len(rows[i]["input_ids"]) for i in order[2 * BATCH : steps * BATCH])


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--full", action="store_true", help="all weights instead of LoRA")
    parser.add_argument("--equal", action="store_true", help="rows of equal length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.contestant:
        print(json.dumps(contest(known)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(known.rounds):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name]
            out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
    plain = statistics.median(run["rate"] for run in found["trainer"])
    for name, runs in found.items():
        rate = statistics.median(run["rate"] for run in runs)
        peak = statistics.median(run["peak"] for run in runs)
        print(f"{name:16} {rate:8,.0f} tokens per CPU second  {rate / plain:5.2f}x   peak {peak:5.2f} GB")
    ours, theirs = found["padding-free"][0]["losses"], found["padded"][0]["losses"]
    gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference of a loss, padding-free against padded: {gap:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
