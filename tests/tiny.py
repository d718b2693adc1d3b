"""Tiny models and tokenizers, built in code: real classes of real families, random weights, no network.

``make_model("llama", folder)`` writes a folder that ``from_pretrained`` loads in a few milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "opt", "gpt2", "gpt_neox")

VOCAB = 512
HIDDEN = 64
LAYERS = 2
CONTEXT = 256

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = (
    "the cat sat on the mat and the dog ran to the park. question answer hello world what is your name? "
    "my name is model. one two three four five six seven eight nine ten. red green blue yellow. "
    "a good day, a long night, a short story about a small town by the sea. yes no maybe. system user assistant "
)


def make_tokenizer(
    *, bos: bool = True, pad: bool = True, eos: bool = True, chat_template: str | None = CHATML, vocab: int = VOCAB
) -> Any:
    """A byte-level BPE tokenizer of at most ``vocab`` tokens: every text encodes, and decodes to itself.

    Args:
        bos: one ``<s>`` before every text, as the Llama family does.
        pad: has a padding token of its own.
        eos: has an end-of-text token.
        chat_template: ChatML unless told otherwise; None for a tokenizer without one.
        vocab: tokens, the special ones included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"] + (["<pad>"] if pad else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    names: dict[str, Any] = {"unk_token": "<unk>"}
    if bos:
        names["bos_token"] = "<s>"
    if eos:
        names["eos_token"] = "</s>"
    if pad:
        names["pad_token"] = "<pad>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = chat_template
    return fast


def make_config(family: str, **changes: Any) -> Any:
    """The family's real config class, at toy size; ``changes`` overwrite its fields."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    rope = {"intermediate_size": 128}
    grouped = {**rope, "num_key_value_heads": 2}
    own: dict[str, dict[str, Any]] = {
        "llama": grouped,
        "mistral": {**grouped, "sliding_window": None},
        "qwen2": grouped,
        "qwen3": {**grouped, "head_dim": 16},
        "gemma": {**grouped, "head_dim": 16},
        "phi": {**rope, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "do_layer_norm_before": True},
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "gpt_neox": {**rope, "rotary_pct": 0.25},
    }
    return AutoConfig.for_model(family, **{**common, **own[family], **changes})


def make_model(
    family: str,
    folder: str | Path,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    dtype: str = "float32",
    **changes: Any,
) -> Path:
    """Writes a tiny random model of ``family`` and its tokenizer to ``folder``.

    Args:
        family: one of ``FAMILIES``.
        folder: made when it is not there.
        seed: other seeds, other weights.
        tokenizer: one of ``make_tokenizer``; None for the usual one.
        dtype: of the weights on disk.
        changes: fields of the config, e.g. ``num_hidden_layers=1``.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    tokenizer = tokenizer if tokenizer is not None else make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, **changes))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
