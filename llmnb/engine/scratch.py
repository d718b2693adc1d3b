"""A base model from nothing: a tokenizer learned from texts, and a Llama with random weights.

For demos and tests on machines that reach no model hub. It writes a folder that loads like any other base; training
it is not done here. Knows no documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["CHATML", "new_llama"]

PAD, OPEN, CLOSE = "<|pad|>", "<|im_start|>", "<|im_end|>"
# Source of the format: https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_llama(
    folder: Path,
    texts: Iterable[str],
    *,
    vocabulary: int = 4096,
    hidden: int = 128,
    layers: int = 4,
    context: int = 512,
    spread: float = 0.05,
    seed: int = 0,
) -> Path:
    """Writes a tokenizer and an untrained Llama to ``folder``.

    The tokenizer is a byte-level BPE (https://arxiv.org/abs/1909.03341) with a ChatML template; its end of turn is
    also the end of a text, so that a model that was trained on plain text knows how to stop.

    Args:
        folder: made when it is not there.
        texts: what the tokenizer is learned from.
        vocabulary: tokens at most; few texts give fewer.
        hidden: width; a multiple of 32, the width of a head.
        layers: of them.
        context: longest row, in tokens.
        spread: standard deviation of the first weights. 0.05 learned faster than 0.02 at this size (measured).
        seed: of the random weights.

    Returns:
        ``folder``.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from .bases import quiet

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, OPEN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, learner)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=CLOSE, model_max_length=context, padding_side="left"
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(folder)
