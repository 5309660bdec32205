"""Chat templates: rendered as transformers renders them, and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.checkpoint import open_checkpoint
from edgellm.errors import BadRequest, EngineError
from edgellm.text.chat import ChatTemplate

CONVERSATION = [
    {"role": "user", "content": "Hi <b> & 'quotes' {{ 1 }}"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]

# Llama 2's published template: raise_exception, bos, strip, loop.index0.
LLAMA2 = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def _render(source: str, messages: list[dict[str, str]] | None = None) -> str:
    template = ChatTemplate(source, bos="<s>", eos="</s>")
    return template.render(CONVERSATION[:1] if messages is None else messages)


def test_llama2() -> None:
    assert _render(LLAMA2, CONVERSATION) == (
        "<s>[INST] Hi <b> & 'quotes' {{ 1 }} [/INST] Hello </s><s>[INST] Bye [/INST]"
    )


def test_refusal_is_the_templates_own_sentence() -> None:
    with pytest.raises(BadRequest, match="roles must alternate") as caught:
        _render(LLAMA2, CONVERSATION[1:])
    assert caught.value.field == "messages"
    with pytest.raises(BadRequest, match="Only user and assistant"):
        _render(LLAMA2, [{"role": "user", "content": ""}, {"role": "tool", "content": ""}])


def test_blocks_are_trimmed_as_transformers_does() -> None:
    source = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content }}]\n  {% endif %}\n{% endfor %}"
    )
    assert _render(source, CONVERSATION) == "[Hi <b> & 'quotes' {{ 1 }}]\n[Bye]\n"


def test_what_templates_use() -> None:
    assert _render("{{ {'k': 'ä<&>'} | tojson }}") == '{"k": "ä<&>"}'
    assert _render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    counted = "{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}"
    assert _render(counted + "{{ ns.n }}") == "6"
    assert _render("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 7 * 6 }}") == "---102442"
    assert _render("{% if tools %}t{% endif %}{% if not documents %}d{% endif %}") == "d"
    assert _render("{% if add_generation_prompt %}<go>{% endif %}") == "<go>"


def test_generation_prompt_can_be_left_out() -> None:
    template = ChatTemplate("{% if add_generation_prompt %}<go>{% endif %}", bos="", eos="")
    assert template.render(CONVERSATION, add_generation_prompt=False) == ""


@pytest.mark.parametrize("source", ["{% for %}", "{{ ", "{% endif %}", "{{ messages | nofilter }}"])
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(EngineError, match="does not compile"):
        ChatTemplate(source, bos="", eos="")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[99]['role'] }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing() }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * [0] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
    ],
)
def test_failing_and_excessive_templates_end_as_a_typed_error(source: str) -> None:
    with pytest.raises(BadRequest) as caught:
        _render(source)
    assert caught.value.field == "messages"


@pytest.mark.model
def test_real_template(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    assert checkpoint.chat_template is not None
    template = ChatTemplate(checkpoint.chat_template, bos=checkpoint.bos_token, eos=checkpoint.eos_token)
    assert template.render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
