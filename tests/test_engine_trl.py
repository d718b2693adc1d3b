"""Our rows beside TRL's for the same messages and templates: ids equal, masks equal up to the stop of each answer.

TRL is the field's reference for supervised fine-tuning (https://huggingface.co/docs/trl/sft_trainer). Its own trainer
prepares the rows here. Where the two differ the test says who is right: we train what a model writes when it answers,
which is the answer and the token that stops it, and nothing that stands before or behind.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from chat_families import FAMILIES, ZEPHYR, make_tokenizer
from tiny import make_config

from llmnb.config import TrainConfig
from llmnb.engine.rows import make_rows

# Llama 3's own rule: line ends are cut off from what follows them.
LLAMA3 = replace(
    FAMILIES[1], rule=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIX = (FAMILIES[0], LLAMA3, *FAMILIES[2:])
by_family = pytest.mark.parametrize("family", SIX, ids=lambda family: family.name)

ASK = {"role": "user", "content": "why is the sky blue?"}
SAY = {"role": "assistant", "content": "because light scatters\nthanks"}
SYSTEM = {"role": "system", "content": "be brief"}
CHAT = [
    {"role": "user", "content": "hello there, what is your name?"},
    {"role": "assistant", "content": "my name is model."},
    ASK,
    SAY,
]


def by_trl(tokenizer, rows, tmp_path, **settings):
    """Ids and labels as TRL's trainer would train them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_config(make_config("llama", vocab_size=len(tokenizer)))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=None, **settings)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def by_us(tokenizer, documents, key, **settings):
    rows = make_rows(documents, tokenizer, TrainConfig(key=key, max_seq_length=2048, **settings))
    return [(row["input_ids"], row["labels"]) for row in rows]


def padded(family, family_tokenizer):
    family_tokenizer.pad_token = family.eos
    return family_tokenizer


def without_bos(row, tokenizer):
    ids, labels = row
    assert ids[0] == tokenizer.bos_token_id
    return ids[1:], labels[1:]


def trained_apart(ours, theirs, tokenizer):
    """What only they train and what only we train, as text."""
    ids = ours[0]
    assert theirs[0] == ids
    more = [i for i, a, b in zip(ids, theirs[1], ours[1], strict=True) if a != -100 and b == -100]
    less = [i for i, a, b in zip(ids, theirs[1], ours[1], strict=True) if a == -100 and b != -100]
    return tokenizer.decode(more), tokenizer.decode(less)


@by_family
def test_a_question_and_its_answer_have_trls_ids(family, tmp_path):
    tokenizer = padded(family, make_tokenizer(family))
    for before in [[]] + [[SYSTEM]] * family.system:
        (theirs,) = by_trl(tokenizer, [{"prompt": [*before, ASK], "completion": [SAY]}], tmp_path)
        (ours,) = by_us(tokenizer, [{"messages": [*before, ASK, SAY]}], "messages")
        if family is ZEPHYR:
            # TRL is wrong: this tokenizer begins every text with a BOS, and its template writes none.
            ours = without_bos(ours, tokenizer)
        more, less = trained_apart(ours, theirs, tokenizer)
        # TRL is wrong to train what stands behind the stop: a model that has said it is not asked for more.
        assert less == "" and more in ("", "\n", "<|endoftext|>"), "we are right, and differ in nothing else"
        stop = max(i for i, label in enumerate(ours[1]) if label != -100)
        assert tokenizer.decode(ours[0][stop]).strip() == family.stop


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "cohere", "lfm2"])
def test_every_answer_of_a_chat_has_trls_mask(name, tmp_path):
    """TRL's copies of six published templates. It trains with versions of them that mark the answers; we find them."""
    from trl import chat_template_utils

    family = {"llama3": LLAMA3, "gemma": FAMILIES[3], "phi3": FAMILIES[4]}.get(name, FAMILIES[0])
    tokenizer = padded(family, make_tokenizer(family, template=getattr(chat_template_utils, f"{name}_chat_template")))
    (theirs,) = by_trl(tokenizer, [{"messages": CHAT}], tmp_path, assistant_only_loss=True)
    (ours,) = by_us(tokenizer, [{"messages": CHAT}], "messages")
    more, less = trained_apart(ours, theirs, tokenizer)
    # TRL is wrong to train the line end behind a stop, and Qwen's before an answer, which asking has sent already.
    assert less == "" and more.replace("<|endoftext|>", "").strip() == "", "we are right, and differ in nothing else"


def test_trls_own_qwen3_is_another_text(tmp_path):
    """TRL is wrong: to mark the answers it writes thinking blocks that the tokenizer's own template leaves out."""
    from trl import chat_template_utils

    tokenizer = padded(SIX[0], make_tokenizer(SIX[0], template=chat_template_utils.qwen3_chat_template))
    (theirs,) = by_trl(tokenizer, [{"messages": CHAT}], tmp_path, assistant_only_loss=True)
    (ours,) = by_us(tokenizer, [{"messages": CHAT}], "messages")
    assert ours[0] == tokenizer.apply_chat_template(CHAT)["input_ids"] != theirs[0]


@by_family
def test_texts_have_trls_ids(family, tmp_path):
    tokenizer = padded(family, make_tokenizer(family))
    (theirs,) = by_trl(tokenizer, [{"text": "why is the sky blue?"}], tmp_path)
    (ours,) = by_us(tokenizer, [{"text": "why is the sky blue?"}], "text")
    # The label of a first token is never asked for: nothing comes before it. TRL leaves it in; the loss shifts it away.
    assert ours[0] == theirs[0] and ours[1][1:] == theirs[1][1:]


@by_family
def test_pairs_have_trls_ids(family, tmp_path):
    tokenizer = padded(family, make_tokenizer(family))
    pair = {"prompt": "why is the sky blue?", "completion": " because light scatters"}
    (theirs,) = by_trl(tokenizer, [pair], tmp_path)
    (ours,) = by_us(tokenizer, [pair], ("prompt", "completion"))
    assert ours == theirs


def test_a_token_over_the_seam_is_where_trl_leaves_the_prompt(tmp_path):
    """TRL is wrong: it trains on a context that asking does not send, and says so in a warning. We tokenise apart."""
    tokenizer = padded(SIX[0], make_tokenizer(SIX[0]))
    pair = {"prompt": "the answer is forty tw", "completion": "o"}
    (theirs,) = by_trl(tokenizer, [pair], tmp_path)
    (ours,) = by_us(tokenizer, [pair], ("prompt", "completion"))
    asked = tokenizer(pair["prompt"])["input_ids"]
    assert ours[0][: len(asked)] == asked and theirs[0][: len(asked)] != asked
    # The same in a template: by GPT-2's rule the second line end of Llama 3's header goes to the word behind it.
    tokenizer = padded(FAMILIES[1], make_tokenizer(FAMILIES[1]))
    (theirs,) = by_trl(tokenizer, [{"prompt": [ASK], "completion": [SAY]}], tmp_path)
    (ours,) = by_us(tokenizer, [{"messages": [ASK, SAY]}], "messages")
    asked = tokenizer.apply_chat_template([ASK], add_generation_prompt=True)["input_ids"]
    assert ours[0][: len(asked)] == asked and theirs[0][: len(asked)] != asked
