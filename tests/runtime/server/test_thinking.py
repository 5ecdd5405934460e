"""Thoughts, text and calls told apart, however an answer is cut, in the chat and responses APIs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from serving import Running
from story import story_folder

import halfbyte
from halfbyte.runtime.model import Model
from halfbyte.runtime.server.answer import Finished, Token
from halfbyte.runtime.server.chat_api import ChatReply
from halfbyte.runtime.server.fields import Fields
from halfbyte.runtime.server.reply import Reply, Service
from halfbyte.runtime.server.responses_api import ResponseReply
from halfbyte.runtime.server.splitter import Splitter
from halfbyte.runtime.server.tools import format_of
from halfbyte.runtime.thoughts import Thoughts

TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n"
    "{% endfor %}assistant: {% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)
CALL = '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
ANSWER = f"a dog?</think>\n\nYes. {CALL}\n{CALL}"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny random model whose template opens a thought."""
    folder = tmp_path_factory.mktemp("thinker")
    return halfbyte.load(halfbyte.convert(story_folder(folder / "c", TEMPLATE), folder / "t.hb", recipe="q8"))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("many", [True, False])
def test_splitting(size: int, many: bool) -> None:
    splitter, order = Splitter(Thoughts("<think>"), format_of(TEMPLATE), many), ""
    pieces = [splitter.push(ANSWER[i : i + size]) for i in range(0, len(ANSWER), size)]
    for piece in [*pieces, splitter.flush()]:
        order += "t" * bool(piece.thought) + "s" * bool(piece.text) + "c" * len(piece.calls)
    assert (splitter.thought, splitter.text) == ("a dog?", "Yes. ")
    assert [c.name for c in splitter.calls] == ["get"] * (1 + many)
    assert "".join(sorted(order, key="tsc".index)) == order and not splitter.thinking


def told(reply: Reply, answer: str) -> list[Any]:
    """What a stream says when these characters come, each as a token."""
    events = [Token(0, 5, c) for c in answer]
    return [*reply.begin(), *reply.events([*events, Finished(0, "stop")]), *reply.end()]


TOOL = {"name": "get", "parameters": {"type": "object"}}


def test_chat(thinker: Model) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": TOOL}],
    }
    reply = ChatReply(Service(thinker, "t"), Fields(body))
    deltas = [c["choices"][0]["delta"] for c in told(reply, ANSWER)]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "a dog?"
    assert "".join(d.get("content", "") for d in deltas) == "Yes. "
    message = reply.whole()["choices"][0]["message"]
    assert message["reasoning_content"] == "a dog?" and message["content"] == "Yes. "
    assert len(message["tool_calls"]) == 2
    thought = reply.whole()["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert thought == len("a dog?</think>")
    one = ChatReply(Service(thinker, "t"), Fields({**body, "parallel_tool_calls": False}))
    assert sum("tool_calls" in c["choices"][0]["delta"] for c in told(one, ANSWER)) == 1


def test_responses(thinker: Model) -> None:
    reply = ResponseReply(
        Service(thinker, "t"), Fields({"input": "x", "tools": [{"type": "function", **TOOL}]})
    )
    events = told(reply, ANSWER)
    kinds = [e["type"].removeprefix("response.") for e in events]
    once = [k for i, k in enumerate(kinds) if k != kinds[i - 1]]
    item = [
        "output_item.added",
        "content_part.added",
        "{}.delta",
        "{}.done",
        "content_part.done",
        "output_item.done",
    ]
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    parts = [k.format(name) for name in ("reasoning_text", "output_text") for k in item]
    assert once == ["created", "in_progress", *parts, *call, *call, "completed"]
    output = reply.whole()["output"]
    assert [o["type"] for o in output] == ["reasoning", "message", "function_call", "function_call"]
    assert [o["content"][0]["text"] for o in output[:2]] == ["a dog?", "Yes. "]
    assert [e["output_index"] for e in events if e["type"] == "response.output_item.added"] == [0, 1, 2, 3]


def test_by_the_client(thinker: Model, start: Callable[..., Running]) -> None:
    client = openai.OpenAI(base_url=f"{start(thinker).url}/v1", api_key="none", max_retries=0, timeout=60)
    messages: Any = [{"role": "user", "content": "x"}]
    options: Any = {"model": "any", "messages": messages, "max_tokens": 9, "temperature": 0}
    message = client.chat.completions.create(**options).choices[0].message
    assert message.content == "" and message.reasoning_content  # type: ignore[attr-defined]
    plain = client.chat.completions.create(reasoning_effort="none", **options).choices[0].message
    assert plain.content and not hasattr(plain, "reasoning_content")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}}}
    bound = client.chat.completions.create(response_format=schema, **options).choices[0].message
    assert bound.content == "1"
    with client.responses.stream(model="any", input="x", max_output_tokens=9) as stream:
        events = list(stream)
    deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    (item,) = events[-1].response.output  # type: ignore[union-attr]
    assert item.type == "reasoning" and item.content and item.content[0].text == "".join(deltas) != ""
    assert item.status == "incomplete"
    again = client.responses.create(
        model="any", input=[item.to_dict(), {"role": "user", "content": "y"}], max_output_tokens=3
    )
    assert again.output
