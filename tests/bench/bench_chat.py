"""Swapping adapters under the chat, against loading the model again.

Run by hand: ``python tests/bench/bench_chat.py [--rounds 9]``. A Llama of 110 M parameters with random weights and
adapters of rank 16 on all linear layers, their B random too, are made on the spot. Each round, in one warm process with
the files in the page cache, takes the median of: a load of base and adapter (until it could answer, and with its first
token, because weights are mapped and read only when they are used), a swap to an adapter that is here, to one that
must be read, to one of another rank that must be read, and to the base and back. Every swapped adapter must answer as
the freshly loaded one, token for token, and its logits must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPT = "the cat sat on the mat"


def make(root: Path) -> None:
    """The base, three adapters of one run and one of another rank."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tiny import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    model.save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    for rank, names in ((16, ("a", "b", "c")), (8, ("other",))):
        settings: dict[str, Any] = {"r": rank, "lora_alpha": 16, "target_modules": "all-linear"}
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name in names:
            for weights, parameter in wrapped.named_parameters():
                if "lora_" in weights:
                    torch.nn.init.normal_(parameter, std=0.02)
            wrapped.save_pretrained(root / name)
            make_tokenizer().save_pretrained(root / name)
        model = wrapped.unload()


def took(work: Callable[..., Any], *given: Any, **options: Any) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    work(*given, **options)
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    root = Path(tempfile.mkdtemp())
    try:
        make(root)
        measure(root, rounds)
        process(root)
    finally:
        shutil.rmtree(root)


def measure(root: Path, rounds: int) -> None:
    import torch

    from llmnb.config import ModelSpec
    from llmnb.engine.generation import Answerer

    spec = ModelSpec(model_name_or_path=str(root / "base"))
    folders: dict[str, Path | None] = {name: root / name for name in ("a", "b", "c", "other")} | {"base": None}
    one = {"max_new_tokens": 1, "eos_token_id": []}

    def logits(answerer: Answerer) -> Any:
        with torch.inference_mode():
            return answerer._model(input_ids=torch.tensor([answerer._ids(PROMPT, {})])).logits

    fresh = {}
    for name, folder in folders.items():
        with Answerer(spec, folder) as answerer:
            fresh[name] = logits(answerer), answerer.answer([PROMPT], max_new_tokens=8)
    times: dict[str, list[float]] = {}

    def note(what: str, milliseconds: float) -> None:
        times.setdefault(what, []).append(milliseconds)

    for _ in range(rounds):
        begun = time.perf_counter()
        answerer = Answerer(spec, root / "a")
        loading = 1000 * (time.perf_counter() - begun)
        note("load", loading)
        note("load, with the first token", loading + took(answerer.answer, [PROMPT], **one))
        note("the first token alone", took(answerer.answer, [PROMPT], **one))
        note("swap to one that must be read", took(answerer.swap, root / "b"))
        note("swap to one that must be read", took(answerer.swap, root / "c"))
        for name in "abcacb":
            note("swap to one that is here", took(answerer.swap, root / name))
        for _ in range(3):
            note("swap to the base", took(answerer.swap, None))
            note("swap from the base", took(answerer.swap, root / "a"))
        note("swap to another rank, that must be read", took(answerer.swap, root / "other"))
        note("swap between ranks", took(answerer.swap, root / "a"))
        for name in ("a", "b", "a", "base", "other", "b", "c", "base", "a"):
            answerer.swap(folders[name])
            assert torch.equal(logits(answerer), fresh[name][0]), name
        for name in ("b", "base", "other", "a"):
            answerer.swap(folders[name])
            assert answerer.answer([PROMPT], max_new_tokens=8) == fresh[name][1], name
        answerer.close()
    whole = statistics.median(times["load, with the first token"]) - statistics.median(times["the first token alone"])
    for what, found in times.items():
        median = statistics.median(found)
        print(f"{what:42} {median:8.2f} ms  ({min(found):.2f}–{max(found):.2f}){100 * median / whole:8.2f} % of a load")
    print(f"a load is {whole:.0f} ms: with its first token, less a token; logits equal to the last bit, answers too")


def process(root: Path) -> None:
    """What a person would wait without swapping: a process of its own for each."""
    from llmnb.config import ModelSpec
    from llmnb.launch.chat import ChatProcess

    with ChatProcess(ModelSpec(model_name_or_path=str(root / "base"))) as chat:

        def ask(name: str) -> None:
            list(chat.ask(PROMPT, adapter=root / name, max_new_tokens=1))

        starting = took(ask, "a")
        asked = [took(ask, name) for name in "bcabcabc"]
    print(f"through the chat's process: the first answer of one token {starting:.0f} ms, later ones, each by another")
    print(f"adapter, {statistics.median(asked):.0f} ms ({min(asked):.0f}–{max(asked):.0f})")


if __name__ == "__main__":
    main()
