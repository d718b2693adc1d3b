"""Rows of uneven length, as instructions have them, and a small Llama that trains on them: to be timed and counted.

A token is a word here (``t5 t9 …``), so that the rows which the engine makes of documents are, token for token, those
that a peer is given ready-made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BATCH = 8
LONGEST = 1024
EOS = 2
# The steps that are measured (3 to 12 of 250, and the first 3) are padded as much as all of them: 0.38 of a batch is
# real. With most seeds they are not (0.44 with seed 0), and a bench of ten steps would show luck.
SEED = 183


def rows_of(vocabulary: int, equal: bool) -> list[dict[str, list[int]]]:
    """2 000 rows: lengths log-normal (median 150, sigma 0.9, 16 to 1 024), or all 256; 40 % of each a prompt."""
    import numpy as np

    random = np.random.default_rng(SEED)
    lengths = np.clip(np.exp(random.normal(np.log(150), 0.9, 2000)), 16, LONGEST).astype(int)
    rows = []
    for length in [256] * 2000 if equal else lengths:
        ids = [*random.integers(5, vocabulary, length - 1).tolist(), EOS]
        prompt = max(int(length * 0.4), 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def documents_of(rows: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """The same rows as a person's documents; the engine adds the token that ends a row."""
    documents = []
    for number, row in enumerate(rows):
        prompt = row["labels"].count(-100)
        words = [f"t{token}" for token in row["input_ids"][:-1]]
        documents.append(
            {"_id": number, "prompt": " ".join(words[:prompt]), "response": " " + " ".join(words[prompt:])}
        )
    return documents


def make_base(folder: Path | str, vocabulary: int) -> None:
    """Writes the base: a Llama of 6 layers, width 256, random weights, always the same."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<unk>": 0, "<pad>": 1, "</s>": EOS, "<a>": 3, "<b>": 4, **{f"t{i}": i for i in range(5, vocabulary)}}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=LONGEST, **names).save_pretrained(folder)


def first_batches(rows: list[Any], steps: int) -> list[list[Any]]:
    """Batches in the order that ``transformers.Trainer`` draws from seed 0."""
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [[rows[i] for i in order[step * BATCH : (step + 1) * BATCH]] for step in range(steps)]
