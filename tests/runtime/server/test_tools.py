"""Tool calls of the families, parsed however they are cut into pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.chat import render
from halfbyte.runtime.server.tools import FORMATS, CallParser, Format, format_of, with_tools

GET = ("get", {"city": "Rome", "days": 2})
ARGUMENTS = json.dumps(GET[1])
OBJECT = '{"name": "get", "arguments": ' + ARGUMENTS + "}"
LLAMA = '{"name": "get", "parameters": ' + ARGUMENTS + "}"
ANSWERS = {
    "hermes": [f"<tool_call>\n{OBJECT}\n</tool_call>"],
    "qwen3-coder": [
        "<tool_call>\n<function=get>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
    ],
    "glm": [
        "<tool_call>get\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    ],
    "gemma": ['<|tool_call>call:get{city:<|"|>Rome<|"|>,days:2}<tool_call|>'],
    "functiongemma": ["<start_function_call>call:get{city:<escape>Rome<escape>,days:2}<end_function_call>"],
    "mistral": [
        f"[TOOL_CALLS] [{OBJECT}]",
        f"[TOOL_CALLS]get[ARGS]{ARGUMENTS}",
        f"[TOOL_CALLS]get[CALL_ID]a1[ARGS]{ARGUMENTS}",
    ],
    "phi": [f"<|tool_call|>[{OBJECT}]<|/tool_call|>"],
    "granite": [f"<|tool_call|>[{OBJECT}]"],
    "lfm": ["<|tool_call_start|>[get(city='Rome', days=2)]<|tool_call_end|>"],
    "functionary": [f"<function=get>{ARGUMENTS}</function>"],
    "llama3": [LLAMA, f"<|python_tag|>{LLAMA}"],
}
SEVERAL = {
    "hermes": ANSWERS["hermes"][0] + "\n" + ANSWERS["hermes"][0],
    "mistral": ANSWERS["mistral"][1] * 2,
    "llama3": f"{LLAMA}; {LLAMA}",
    "granite": f"<|tool_call|>[{OBJECT}, {OBJECT}]",
    "lfm": "<|tool_call_start|>[get(city='Rome', days=2), get(city='Rome', days=2)]<|tool_call_end|>",
}


def by_name(name: str) -> Format:
    return next(f for f in FORMATS if f.name == name)


def parsed(how: Format, pieces: list[str]) -> tuple[str, list[tuple[str, dict]]]:
    parser, text, calls = CallParser(how), "", []
    for piece in pieces:
        shown, found = parser.push(piece)
        text, calls = text + shown, calls + found
    shown, found = parser.flush()
    assert len({c.id for c in [*calls, *found]}) == len(calls) + len(found)
    return text + shown, [(c.name, json.loads(c.arguments)) for c in [*calls, *found]]


def test_every_format_is_tried() -> None:
    assert set(ANSWERS) == {f.name for f in FORMATS}


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, several in ANSWERS.items() for a in several])
def test_calls_at_every_cut(name: str, answer: str) -> None:
    how = by_name(name)
    for cut in range(len(answer) + 1):
        assert parsed(how, [answer[:cut], answer[cut:]]) == ("", [GET])
    assert parsed(how, list(answer)) == ("", [GET])
    if how.open:
        assert parsed(how, ["Let me see. ", *answer]) == ("Let me see. ", [GET])


@pytest.mark.parametrize("name", SEVERAL)
def test_several_calls(name: str) -> None:
    assert parsed(by_name(name), list(SEVERAL[name])) == ("", [GET, GET])


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_no_call_is_text(name: str) -> None:
    how = by_name(name)
    for text in ("hello there", "a < b and {c}", "", " [1] ", "{not json", '{"a": 1}'):
        assert parsed(how, list(text)) == (text, [])
        broken = f"{how.open}{text}{how.close}"
        if how.close != how.open:
            assert parsed(how, list(broken)) == (broken, [])
    for cut in range(1, len(how.open)):
        assert parsed(how, ["x", how.open[:cut]]) == ("x" + how.open[:cut], [])


def test_formats_of_real_templates(shared_data: Path) -> None:
    known = {
        "Qwen-Qwen2.5-7B-Instruct": "hermes",
        "Qwen-Qwen3-0.6B": "hermes",
        "Qwen3-Coder": "qwen3-coder",
        "GLM-4.6": "glm",
        "google-gemma-4-31B-it": "gemma",
        "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
        "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
        "ibm-granite-granite-3.3-2B-Instruct": "granite",
        "ibm-granite-granite-4.0": "hermes",
        "meta-llama-Llama-3.1-8B-Instruct": "llama3",
        "meta-llama-Llama-3.2-3B-Instruct": "llama3",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
        "meetkai-functionary-medium-v3.1": "functionary",
        "LFM2.5-8B-A1B": "lfm",
    }
    folder = shared_data / "chat-templates"
    assert {n: format_of((folder / f"{n}.jinja").read_text("utf-8")).name for n in known} == known
    with pytest.raises(UsageError, match="knows no tools"):
        format_of((folder / "google-gemma-2-2b-it.jinja").read_text("utf-8"))


PHI_4 = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not"
    " none %}{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)


def test_phi_4_reads_tools_of_the_system_message() -> None:
    assert format_of(PHI_4).name == "phi"
    user = {"role": "user", "content": "x"}
    tools = [{"type": "function", "function": {"name": "get"}}]
    for system, text in (([], ""), ([{"role": "system", "content": "Be."}], "Be.")):
        shown = render(PHI_4, with_tools([*system, user], tools, PHI_4), tools=tools)
        assert shown == f'<|system|>{text}<|tool|>[{{"name": "get"}}]<|/tool|><|end|><|user|>x<|end|>'
    assert with_tools([user], tools, "{{ tools }}") == [user] == with_tools([user], [], PHI_4)
