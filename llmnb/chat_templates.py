"""Chat templates of common families, by name, for a tokenizer that has none. Jinja, as transformers reads it.

A template names tokens: one that a tokenizer does not have is read as plain letters, which the rows' notes say.
"zephyr" needs none but the tokenizer's own EOS. Source of the format:
https://huggingface.co/docs/transformers/chat_templating .
"""

from __future__ import annotations

__all__ = ["PRESETS"]

_LOOP, _END = "{% for message in messages %}", "{% endfor %}"
_ANSWER = "{% if add_generation_prompt %}"
# A system message that the format has no place for stands before the first question.
_FOLDED = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('questions and answers must alternate, a question first') }}{% endif %}"
)

PRESETS = {
    "chatml": (
        _LOOP
        + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        + _END
        + _ANSWER
        # opens an answer
        + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "zephyr": (
        _LOOP
        + "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        + _END
        + _ANSWER
        + "{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}" + _LOOP + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}"
        + _END
        + _ANSWER
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "phi3": (
        _LOOP
        + "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        + _END
        + _ANSWER
        + "{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}"
        + _FOLDED
        + "{% for message in turns %}"
        + _ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
        "+ (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}"
        + _END
        + _ANSWER
        + "{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        + _FOLDED
        + "{% for message in turns %}"
        + _ALTERNATE
        + "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] "
        "+ '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}" + _END
    ),
}
