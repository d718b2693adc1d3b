"""Models: load, train, generate, merge. The only room that imports torch, transformers, peft, bitsandbytes.

It knows no database, no Ray and no notebook: it is given rows and functions to call out (``Hooks``), and
folders to write to. Importing this package loads nothing heavy; its modules do.

============== =========================================================================
module         what it is for
============== =========================================================================
bases          base models and tokenizers, from a folder or the hub, plain or quantised
vocabulary     a row for every token, and a token to pad with
fingerprints   which weights a base has, without reading them all
adapters       LoRA: attach, load, count; says which modules there are
pissa          LoRA that begins with the principal part of each weight
manifest       ``llmnb.json``, the card in every checkpoint folder
rows           documents → token rows with labels (with ``samples`` and ``encoding``)
preferences    documents with two answers → pairs of rows
dpo            TRL's loss over pairs of rows, in the same loop
inspecting     what a training would see of documents (with ``watching`` and ``looking``)
templates      chat templates and prompts, for training and for answering
arguments      the settings of a run → ``transformers.TrainingArguments``
streaming      rows that are made while they are trained, of documents read a little ahead
tally          what became of these documents, said when an epoch ends
order          which rows come when, on how many ranks
loop           our subclass of ``transformers.Trainer``
callbacks      what happens between steps: counts, stop, kill, patience
explaining     full memory and full disks, in words
faults         NaN and Inf: where they began, and why
hooks          what a run calls out, and what it gives back
training       ``train``: everything above, in order
generation     ``Answerer``: prompts → text
voices         adapters on one base, swapped
sampling       the options of one answer
evaluating     the base and checkpoints on the same documents
questions      documents → rows, and for each its prompt and right answer
reading        rows → the loss of each
scores         answers against references
merging        an adapter into its base
proof          what a merge was measured on, and what was found
memory         how much is in use, and giving it back
classification text classifiers: labels of rows in place of tokens
shape          a model's shape from its config alone, and this machine's pace
scratch        a new tokenizer and a new, random Llama
pipes          any other transformers pipeline
============== =========================================================================
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Answerer": "generation",
    "Hooks": "hooks",
    "TrainResult": "hooks",
    "fingerprint": "fingerprints",
    "load_base": "bases",
    "make_rows": "rows",
    "merge": "merging",
    "train": "training",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
