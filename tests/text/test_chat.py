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


GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}%s"
BIG = "{% set x = 'a' * 500000 %}"
STATIC = "a" * 100_000


@pytest.mark.parametrize(
    "source",
    [
        # Exponential in their depth.
        "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% for x in [1] recursive %}{% if loop.depth < 40 %}{{ loop([x]) }}{{ loop([x]) }}{% endif %}"
        "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call m() %}" * 15
        + STATIC
        + "{% endcall %}" * 15,
        GROW % ("'ab'", "ns.x ~ ns.x", ""),
        GROW % ("'ab'", "ns.x + ns.x", ""),
        GROW % ("'ab'", "ns.x.replace('a', 'aaaaaaaaaaaaaaaaaa')", ""),
        GROW % ("[1]", "ns.x + ns.x", ""),
        GROW % ("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
        GROW % ("1", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
        GROW % ("1", "{'a': ns.x, 'b': ns.x}", "{{ ns.x == ns.x }}"),
        GROW % ("9", "ns.x * ns.x", ""),
        "".join("{% set x %}{{ x }}{{ x }}a{% endset %}" for _ in range(60)),
        # Deep.
        GROW % ("1", "(ns.x,)", "{{ {ns.x: 1} }}"),
        # Loops over what is there.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) if i < 0 %}{% endfor %}" * 50,
        BIG + "{% for i in range(99999) %}{% if x == x ~ i %}{% endif %}{% endfor %}",
        BIG + "{{ range(99999) | map('string') | select('in', x) | list }}",
        BIG + "{% for i in range(99999) %}{{ x }}{% endfor %}",
        "{% set y %}{% for i in range(99999) %}" + STATIC + "{% endfor %}{% endset %}",
        "{% filter upper %}{% for i in range(99999) %}" + STATIC + "{% endfor %}{% endfilter %}",
        # One operation.
        BIG + "{{ x.replace('a', x) }}",
        BIG + "{{ x | replace('a', x) }}",
        BIG + "{{ x.join(x) }}",
        BIG + "{{ range(9999) | join(x) }}",
        BIG + "{{ ('%(x)s' * 1000) % {'x': x} }}",
        BIG + "{{ ('{0}' * 1000).format(x) }}",
        BIG + "{{ 'a'.translate({97: x}) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ '\t'.expandtabs(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000d}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ 'a'.encode().ljust(1000000000) }}",
        "{{ ('\n' * 9999) | indent(10 ** 6) }}",
        "{{ ([1] * 9999) | tojson(indent=10 ** 6) }}",
        "{{ ([1] * 9999) | tojson(separators=('a' * 9999, '')) }}",
        "{{ 1.5 | round(10 ** 9, 'ceil') }}",
        "{{ ([[1]] * 500000) | sum(start=[]) }}",
        "{{ strftime_now('%c' * 100000) }}",
        "{{ raise_exception('x' * 10 ** 7) }}",
        # What is not there.
        "{{ lipsum(n=1000000) }}",
        "{{ dict().fromkeys([1]) }}",
        "{{ messages[0].keys().isdisjoint }}{{ self.x() }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_templates_end_as_a_typed_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellm.text.budget.MAX_SECONDS", 0.05)
    with pytest.raises(BadRequest) as caught:
        _render(source)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' | center(1000000000) }}",  # jinja computes constants when it compiles
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,  # Python has a limit of its own
        "{{ " + " ~ ".join("a" * 9000) + " or ".join("a" * 9000) + "}}",
        "{{ " + "(" * 9000,
        "a" * 300_000,
    ],
)
def test_what_does_not_compile_in_other_ways(source: str) -> None:
    with pytest.raises(EngineError, match="chat template"):
        ChatTemplate(source, bos="", eos="")


def test_long_conversations_are_within_the_budget() -> None:
    turns = [{"role": ("user", "assistant")[turn % 2], "content": "words " * 40} for turn in range(4095)]
    assert _render(LLAMA2, turns).count("[INST]") == 2048
    megabyte = [{"role": "user", "content": "word\n" * 200_000}]
    assert len(_render(LLAMA2, megabyte)) > 900_000


def test_what_newer_templates_use() -> None:
    assert _render("{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x }}") == "a"
    assert _render("{{ strftime_now('%Y') }}").isdigit()
    assert _render("{{ [1, {'b': 'ä'}] | tojson(indent=2) }}") == '[\n  1,\n  {\n    "b": "ä"\n  }\n]'
    roles = "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role') | count }}"
    assert _render(roles) == "user1"
    assert (
        _render(
            "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.cycle('a', 'b') }}{% endfor %}"
        )
        == "1Truea"
    )
    assert (
        _render("{{ '{} {x:>4}'.format(1, x='a') }}{{ '%03d' % 7 }}{{ 'a' ~ 1 ~ none }}") == "1    a007a1None"
    )
    assert _render("{% set ns = namespace(a=1) %}{{ ns }}{{ 'abc'[::-1] }}{{ {'a': 1}.items() | list }}") == (
        "<Namespace>cba[('a', 1)]"
    )


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
