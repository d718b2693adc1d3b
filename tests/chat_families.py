"""Small tokenizers and chat templates in the style of six families, built in code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

WORDS = (
    "hello there, what is your name? my name is model. the answer is forty two, and the question was long.\n\n"
    "user assistant system  be brief\n\nsky blue why because light scatters 1 2 3 4 5 6 7 8 9 0 yes no maybe thanks"
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and how a chat in it is written by hand (``pieces``)."""

    name: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    template: str
    stop: str  # what ends an answer
    system: bool = True
    rstrip: tuple[str, ...] = ()  # tokens that swallow the white space behind them
    adds_bos: bool = False
    head: str = ""  # what stands before the first turn
    tail: str = ""  # what stands after the last one
    # Where a text is cut into words. GPT-2's own rule, where white space before a word depends on what follows it.
    rule: str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def pieces(self, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        """The chat as (text, carries loss) pieces, written by hand."""
        out: list[tuple[str, bool]] = [(self.head, False)]
        system = ""
        for message in messages:
            role, content = message["role"], message["content"]
            if self.name == "mistral":
                if role == "system":
                    system = content + "\n\n"
                elif role == "user":
                    out.append((f"[INST] {system if message is messages[-2] else ''}{content}[/INST]", False))
                else:
                    out.append((f" {content}</s>", True))
                continue
            before, after = self.around(role)
            if self.rstrip:  # the token and the line end behind it are one
                out += [(before, False), (content + self.stop + after, role == "assistant")]
            elif role == "assistant":
                out += [(before, False), (content + self.stop, True), (after, False)]
            else:
                out.append((before + content + self.stop + after, False))
        return [*out, (self.tail, False)]

    def around(self, role: str) -> tuple[str, str]:
        """What stands before a turn, and after its stop."""
        if self.name == "chatml":
            return f"<|im_start|>{role}\n", "\n"
        if self.name == "llama3":
            return f"<|start_header_id|>{role}<|end_header_id|>\n\n", ""
        if self.name == "gemma":
            return f"<start_of_turn>{'model' if role == 'assistant' else role}\n", "\n"
        return f"<|{role}|>\n", "\n"  # phi and zephyr


CHATML = Family(
    "chatml",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    None,
    "<|im_end|>",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<|im_end|>",
)
LLAMA3 = Family(
    "llama3",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}"
    "{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "<|eot_id|>",
    adds_bos=True,
    head="<|begin_of_text|>",
)
MISTRAL = Family(
    "mistral",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    "<s>",
    "</s>",
    # The system message goes into the last question, so that earlier turns read otherwise once the chat goes on.
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in rest %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ bos_token }}"
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if loop.index0 == ns.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "</s>",
    adds_bos=True,
    head="<s>",
)
GEMMA = Family(
    "gemma",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<bos>",
    "<eos>",
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "<end_of_turn>",
    system=False,
    adds_bos=True,
    head="<bos>",
)
PHI = Family(
    "phi",
    ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "<s>",
    "<|endoftext|>",
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "<|end|>",
    rstrip=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    tail="<|endoftext|>",
)
ZEPHYR = Family(
    "zephyr",
    ("<s>", "</s>"),
    "<s>",
    "</s>",
    # The roles are plain words here, not special tokens, and no BOS is written.
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "</s>",
    adds_bos=True,
)
FAMILIES = (CHATML, LLAMA3, MISTRAL, GEMMA, PHI, ZEPHYR)


@cache
def _backend(specials: tuple[str, ...], rstrip: tuple[str, ...], bos: str | None, rule: str) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, rstrip=token in rstrip, normalized=False) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 4 + ["\n\n  \n"] * 20, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend.to_str()


def make_tokenizer(family: Family, *, template: str | None = "", pad: str | None = None) -> Any:
    """The family's tokenizer with its chat template, or with another one, or with none (None)."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(
        _backend(family.specials, family.rstrip, family.bos if family.adds_bos else None, family.rule)
    )
    names = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v})
    tokenizer.chat_template = family.template if template == "" else template
    return tokenizer
