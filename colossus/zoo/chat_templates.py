"""How families of models write a conversation: for directories that bring no template of their own.

Forms as published with the models' cards; each template is written here for messages of `role` and `content`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """`jinja` ends where the assistant's answer begins."""

    name: str
    jinja: str
    controls: tuple[str, ...] = ()
    """Tokens that a tokenizer of this family has."""
    ends: tuple[str, ...] = ()
    """Tokens that end an answer, beside the tokenizer's own."""
    stop: tuple[str, ...] = ()
    """Texts that an answer ends before."""
    names: str | None = None
    """Where `controls` do not tell: names of models, as a regular expression."""


_GROK_2 = """\
{% for message in messages %}
{{ {'user': 'Human', 'system': 'System', 'assistant': 'Assistant'}[message.role] + ': ' -}}
{{ message.content.strip() + '<|separator|>\\n\\n' -}}
{% endfor %}
{{- 'Assistant:' }}"""

_HARMONY = """\
{% for message in messages %}
{% if message.role == 'system' or message.role == 'developer' %}
{{ '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' -}}
{% elif message.role == 'assistant' %}
{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' -}}
{% else %}
{{ '<|start|>user<|message|>' + message.content + '<|end|>' -}}
{% endif %}
{% endfor %}
{{- '<|start|>assistant<|channel|>final<|message|>' }}"""

_DEEPSEEK = """\
{{ '<｜begin▁of▁sentence｜>' -}}
{% for message in messages %}
{% if message.role == 'assistant' %}
{{ '<｜Assistant｜>' + message.content + '<｜end▁of▁sentence｜>' -}}
{% elif message.role == 'system' %}
{{ message.content -}}
{% else %}
{{ '<｜User｜>' + message.content -}}
{% endif %}
{% endfor %}
{{- '<｜Assistant｜>' }}"""

_LLAMA_3 = """\
{{ '<|begin_of_text|>' -}}
{% for message in messages %}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content.strip() + '<|eot_id|>' -}}
{% endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""

_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{% endfor %}
{{- '<|im_start|>assistant\\n' }}"""

_LLAMA_2 = """\
{% set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}
{% set ns.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' %}
{% elif message.role == 'assistant' %}
{{ ' ' + message.content.strip() + ' </s>' -}}
{% else %}
{{ '<s>[INST] ' + ns.system + message.content.strip() + ' [/INST]' -}}
{% set ns.system = '' %}
{% endif %}
{% endfor %}"""

_MIXTRAL = """\
{{ '<s>' -}}
{% set ns = namespace(system='') %}
{% for message in messages %}
{% if message.role == 'system' %}
{% set ns.system = message.content + '\\n\\n' %}
{% elif message.role == 'assistant' %}
{{ ' ' + message.content.strip() + '</s>' -}}
{% else %}
{{ ' [INST] ' + ns.system + message.content + ' [/INST]' -}}
{% set ns.system = '' %}
{% endif %}
{% endfor %}"""

_OLMO_2 = """\
{{ '<|endoftext|>' -}}
{% for message in messages %}
{{ '<|' + message.role + '|>\\n' + message.content -}}
{{ '<|endoftext|>\\n' if message.role == 'assistant' else '\\n' -}}
{% endfor %}
{{- '<|assistant|>\\n' }}"""

_TRANSCRIPT = """\
{% for message in messages %}
{% if message.role == 'system' %}
{{ message.content + '\\n\\n' -}}
{% else %}
{{ ('Assistant: ' if message.role == 'assistant' else 'User: ') + message.content.strip() + '\\n\\n' -}}
{% endif %}
{% endfor %}
{{- 'Assistant:' }}"""

TRANSCRIPT = ChatTemplate("transcript", _TRANSCRIPT, stop=("\nUser:", "\nAssistant:"))
"""For a model that was never taught to converse."""

CHAT_TEMPLATES = (
    ChatTemplate(
        "gpt-oss",
        _HARMONY,
        ("<|start|>", "<|message|>", "<|channel|>"),
        ("<|return|>", "<|end|>", "<|call|>"),
    ),
    ChatTemplate("deepseek", _DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>"), ("<｜end▁of▁sentence｜>",)),
    ChatTemplate("llama-3", _LLAMA_3, ("<|start_header_id|>", "<|eot_id|>"), ("<|eot_id|>",)),
    ChatTemplate("chatml", _CHATML, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",)),
    ChatTemplate("grok-2", _GROK_2, ("<|separator|>",), ("<|separator|>",)),
    ChatTemplate("olmo-2", _OLMO_2, ("<|endoftext|>",), names=r"olmo-?2.*(instruct|sft|dpo)"),
    ChatTemplate("llama-2", _LLAMA_2, ("<s>", "</s>"), names=r"llama-?2.*chat"),
    ChatTemplate("mixtral", _MIXTRAL, ("<s>", "</s>"), names=r"mi[sx]tral.*instruct"),
)


def chat_template_of(name: str, controls: Collection[str]) -> ChatTemplate:
    """The family's, by the control tokens of the tokenizer and the model's name; else a plain transcript."""
    for template in CHAT_TEMPLATES:
        named = template.names is None or re.search(template.names, name, re.IGNORECASE)
        if named and all(control in controls for control in template.controls):
            return template
    return TRANSCRIPT
