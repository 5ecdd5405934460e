"""Chat templates: published renderings, sandbox, one-line errors."""

import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte.formats.errors import UsageError
from halfbyte.runtime import chat, template_sandbox
from halfbyte.runtime.chat import render

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]

# The conversation that the published expectations were made of.
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you"},
    {"role": "assistant", "content": "   I am an assistant   "},
    {"role": "user", "content": "Another question"},
]
# A template that reads further special tokens of its tokenizer.
FURTHER: dict[str, dict[str, Any]] = {
    "ai-sage/GigaChat-20B-A3B-instruct": {
        "bos_token": "<s>",
        "additional_special_tokens": ["<|role_sep|>", "<|message_sep|>", "[", "]"],
    }
}
# Templates for tools only, which cannot do without: the values that they loop over.
NEEDS_TOOLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use": {},
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": {},
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": {},
    "fireworks-ai-llama-3-firefunction-v2": {"functions": "[]", "datetime": "today"},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Where."}},
            "required": ["place"],
        },
    },
}


def test_every_published_rendering(shared_data: Path) -> None:
    vectors = json.loads((shared_data / "chat-templates" / "chat-template.vectors.json").read_text("utf-8"))
    assert len(vectors) == 36
    failed = []
    for case in vectors:
        extra = [{"role": role, "content": text} for role, text in case.get("extra_conversation", [])]
        values = {"bos_token": case.get("bos_token", ""), "eos_token": case.get("eos_token", "")}
        values |= FURTHER.get(case["name"], {})
        expected = case["expected_output_jinja"] or case["expected_output"]
        if render(case["template"], CONVERSATION + extra, **values) != expected:
            failed.append(case["name"])
    assert failed == []


def test_every_real_template_renders_the_conversation(shared_data: Path) -> None:
    templates = sorted((shared_data / "chat-templates").glob("*.jinja"))
    assert len(templates) > 60
    for path in templates:
        tools = [WEATHER] if path.stem in NEEDS_TOOLS else None
        text = render(
            path.read_text("utf-8"),
            CONVERSATION,
            bos_token="<s>",
            eos_token="</s>",
            tools=tools,
            **NEEDS_TOOLS.get(path.stem, {}),
        )
        assert "helpful assistant" in text and "Another question" in text, path.stem


def test_generation_prompt_is_optional() -> None:
    assert render(CHATML, HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_blocks_are_trimmed() -> None:
    assert render("  {% if true %}\n  x\n  {% endif %}\ny", HELLO) == "  x\ny"


def test_tojson_is_plain() -> None:
    template = "{{ messages | tojson }}"
    text = render(template, [{"role": "user", "content": "<é'&>"}])
    assert text == '[{"role": "user", "content": "<é\'&>"}]'
    assert (
        render("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", HELLO)
        == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'
    )


def test_loop_controls_and_generation_blocks() -> None:
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}"
        "{{ i }}{% endfor %}{% generation %}-{{ messages[0].content }}{% endgeneration %}"
    )
    assert render(template, HELLO) == "02-Hello"


def test_strftime_now_and_further_variables() -> None:
    assert (
        render("{{ strftime_now('%Y') | length }}{{ enable_thinking }}", HELLO, enable_thinking=False)
        == "4False"
    )


def test_tools_reach_the_template() -> None:
    assert (
        render("{% for t in tools %}{{ t.function.name }}{% endfor %}", HELLO, tools=[WEATHER]) == "weather"
    )


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ m.content }};{% endfor %}"
)
DROPPING = "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}"


@pytest.mark.parametrize("template", [REFUSING, DROPPING])
def test_a_system_message_is_never_lost(template: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert render(template, messages) == "Be brief.\nHello;"
    assert messages[1] == {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must\nalternate') }}",
        "{% if %}",
        "{{ nothing.at.all }}",
        "{{ messages[0] + 1 }}",
        "{{ messages[99].content }}",
        "{% for x in none %}{% endfor %}",
        "{{ unknown() }}",
        "{% include 'file' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ 9 ** 99999999 }}",
        "{{ [0] * 1000000000 }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999999999) %}{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_broken_and_hostile_templates_are_one_line_errors(template: str) -> None:
    with pytest.raises(UsageError) as caught:
        render(template, [dict(m) for m in HELLO])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the chat template ")


DOUBLED = "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
EXPENSIVE = {
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "loops over a text": "{% set s = 'ab' * 100000 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "joined by tildes": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a block that repeats": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "text in a loop in a block": "{% set x %}{% for i in range(1000000) %}"
    + "y" * 100_000
    + "{% endfor %}{% endset %}",
    "many long texts": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + ['a' * 4000000] %}"
    "{% endfor %}",
    "a list that holds itself often": DOUBLED + "{{ n.x }}",
    "the same as JSON": DOUBLED + "{{ n.x | tojson }}",
    "the same compared": DOUBLED + "{{ n.x == n.x }}",
    "namespaces": "{% set a = namespace() %}" + "{% set a = namespace(x=a, y=a) %}" * 60 + "{{ a }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a computed width": "{{ '%*d' % (1000000000, 1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "a nested format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ ('a\n' * 1000000) | indent(1000000) }}",
    "tojson": "{{ [1] | tojson(indent=1000000000) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "str.replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "str.join": "{{ ('a' * 1000000).join(['b'] * 1000000) }}",
    "join": "{{ (['b'] * 1000000) | join('a' * 1000000) }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "strftime": "{{ strftime_now('%1000000000d') }}",
    "range": "{{ range(1000000000000) | list }}",
    "whole numbers": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "lists of lists": "{{ [[[['a'] * 1000] * 1000] * 1000] * 1000 }}",
    "slices": "{% set s = 'ab' * 2000000 %}{% for i in range(100000) %}{% set t = s[1:] %}{% endfor %}",
    "sorting": "{% set s = 'ab' * 50000 %}{% for i in range(100000) %}{{ s | sort | length }}{% endfor %}",
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_templates_are_refused_before_they_cost_much(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(UsageError) as caught:
        render(EXPENSIVE[name], HELLO)
    assert "\n" not in str(caught.value) and "sequence item" not in str(caught.value)
    assert time.thread_time() - start < 5  # one operation may be running when the time is over
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * template_sandbox.MAX_BYTES // 1024
    )


def test_what_real_templates_compute_is_allowed() -> None:
    long = [{"role": "user", "content": "word " * 100_000}, {"role": "assistant", "content": "x" * 1000}] * 10
    template = (
        "{% set ns = namespace(out='') %}{% for m in messages %}{% set ns.out = ns.out + m.role ~ m.content | trim %}"
        "{% endfor %}{{ ns.out }}{{ '%s-%03d' % ('a', 7) }}{{ '{}{:>4}'.format(1, 2) }}{{ messages[1:] | length }}"
        "{{ '[1]' | from_json }}{{ loop_is }}"
    )
    assert render(template, long).endswith("a-0071   219[1]")
    assert render(
        "{% for x in 'abc' %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% else %}-{% endfor %}", HELLO
    ) == ("1False32False33True3")
    assert render("{% for k, v in {'a': (1, 2)}.items() %}{{ k }}{{ v }}{% endfor %}", HELLO) == "a(1, 2)"


def test_renderings_do_not_share_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 50)
    for _ in range(5):
        assert render("{% for i in range(40) %}{% endfor %}", HELLO) == ""
    with pytest.raises(UsageError, match="50 steps"):
        render("{% for i in range(20) %}{% for j in range(20) %}{% endfor %}{% endfor %}", HELLO)


def test_the_template_says_why_it_refuses() -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", HELLO)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_OUTPUT", 100)
    assert len(render("{% for i in range(100) %}a{% endfor %}", HELLO)) == 100
    with pytest.raises(UsageError, match="more than 100 characters"):
        render("{% for i in range(101) %}a{% endfor %}", HELLO)


def test_a_template_cannot_change_the_messages() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": ["x"]}]
    with pytest.raises(UsageError):
        render("{{ messages[0].content.append('y') }}", messages)
    assert messages == [{"role": "user", "content": ["x"]}]


PIECES = ("{{", "}}", "{%", "%}", "{#", "|", "*1000000", "**99", "[::-1]", "|tojson", "|reverse|list", "range(10**9)",
          "{% for a in messages %}", "{% endfor %}", "{% endif %}", "{% set x = x ~ x %}", ".__class__", "|join(',')",
          "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "namespace()", "|attr('__class__')", "|replace('', 'aa')",
          "|center(999999999)", "{% include 'x' %}", "\ud800", "\x00", "raise_exception('x')")  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_damaged_templates_render_or_are_refused(shared_data: Path, seed: int) -> None:
    """Real templates with pieces dropped, repeated, exchanged and put in."""
    sources = [p.read_text("utf-8") for p in sorted((shared_data / "chat-templates").glob("*.jinja"))]
    rng, rendered = random.Random(seed), 0
    for _ in range(60):
        text = rng.choice(sources)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text))
            end, other = at + rng.randrange(40), rng.choice(sources)
            there = rng.randrange(len(other))
            put = ("", text[at:end] * 3, rng.choice(PIECES), other[there : there + rng.randrange(80)])
            text = text[:at] + rng.choice(put) + text[end:]
        try:
            chat.render(text, CONVERSATION, tools=rng.choice((None, [WEATHER])))
            rendered += 1
        except UsageError as error:
            assert "\n" not in str(error)
    assert 0 < rendered < 60
