"""The published `openai` client, unchanged, against a server on loopback."""

from __future__ import annotations

import json
import re
from typing import Literal

import numpy as np
import openai
import pydantic
import pytest
from serving import Running, greedy, serial

from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.embed import embed
from halfbyte.runtime.model import Model

ONCE = "Once upon a time there was a big"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["rome", "oslo"]},
                "days": {"type": "integer", "maximum": 9, "minimum": 0},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def story(stories: Running) -> openai.OpenAI:
    """A client of the story model."""
    return client(stories)


@pytest.fixture
def tool(talk: Running) -> openai.OpenAI:
    """A client of the model whose template knows tools."""
    return client(talk)


def expected(model: Model, text: str, tokens: int) -> str:
    return serial(model, greedy(prompt_ids(model, [{"role": "user", "content": text}]), tokens))[0]


def test_models(story: openai.OpenAI) -> None:
    (only,) = story.models.list()
    assert only.id == "tiny" and story.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        story.models.retrieve("other")


def test_chat(story: openai.OpenAI, demo: Model) -> None:
    answer = story.chat.completions.create(
        model="any", messages=[{"role": "user", "content": ONCE}], temperature=0, max_tokens=24
    )
    choice = answer.choices[0]
    assert choice.message.content == expected(demo, ONCE, 24) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == len(prompt_ids(demo, [{"role": "user", "content": ONCE}]))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_chat_stream_is_the_same_text(story: openai.OpenAI, demo: Model) -> None:
    chunks = list(
        story.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": [{"type": "text", "text": ONCE}]}],
            temperature=0,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(demo, ONCE, 24)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24
    timings = chunks[-1].model_extra["timings"]
    assert timings["predicted_n"] == 24 and timings["predicted_ms"] > 0 and timings["prompt_ms"] > 0
    assert abs(timings["predicted_per_second"] * timings["predicted_ms"] / 1e3 - 23) < 0.5
    assert len({c.id for c in chunks}) == 1 and len(chunks) > 20


def test_seed_stop_n_and_bias(story: openai.OpenAI) -> None:
    def ask(**options):
        options = {"temperature": 1.0, "max_tokens": 20, "seed": 5, **options}
        return story.chat.completions.create(
            model="any", messages=[{"role": "user", "content": ONCE}], **options
        )

    one, three = ask(), ask(n=3)
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert three.choices[0].message.content == one.choices[0].message.content
    assert len({c.message.content for c in three.choices}) == 3
    text = one.choices[0].message.content or ""
    cut = ask(stop=[text[10:13]])
    assert cut.choices[0].message.content == text[: text.index(text[10:13])]
    assert cut.choices[0].finish_reason == "stop"
    assert ask(logit_bias={"2": 100}).choices[0].message.content == ""
    streamed = list(ask(n=3, stream=True))
    for i in range(3):
        mine = [c.choices[0] for c in streamed if c.choices[0].index == i]
        assert "".join(c.delta.content or "" for c in mine) == three.choices[i].message.content


def test_logprobs(story: openai.OpenAI, demo: Model) -> None:
    options = {"temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    messages = [{"role": "user", "content": ONCE}]
    answer = story.chat.completions.create(model="any", messages=messages, **options)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6 and all(len(t.top_logprobs) == 3 for t in content)
    assert all(t.logprob == t.top_logprobs[0].logprob <= 0 for t in content)
    assert b"".join(bytes(t.bytes) for t in content).decode() == answer.choices[0].message.content
    streamed = story.chat.completions.create(model="any", messages=messages, stream=True, **options)
    told = [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.logprob for t in told] == [t.logprob for t in content]


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(story: openai.OpenAI, stream: bool) -> None:
    for seed in range(4):
        answer = story.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "Give JSON."}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "t", "schema": SCHEMA, "strict": True},
            },
            seed=seed,
            max_tokens=200,
            stream=stream,
        )
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in answer)
        else:
            text = answer.choices[0].message.content
            assert answer.choices[0].finish_reason == "stop"
        found = json.loads(text)
        assert set(found) == {"a", "b"} and isinstance(found["a"], bool) and found["b"] in ("x", "yy")


class Cat(pydantic.BaseModel, extra="forbid"):
    kind: Literal["cat"]
    lives: int = pydantic.Field(ge=0, le=9)


class Dog(pydantic.BaseModel, extra="forbid"):
    kind: Literal["dog"]
    color: Literal["red", "blue"] | None = None


class Zoo(pydantic.BaseModel, extra="forbid"):
    pet: Cat | Dog = pydantic.Field(discriminator="kind")
    fed: dict[Literal["am", "pm"], bool]


def test_pydantic_models(tool: openai.OpenAI) -> None:
    """What the client makes of classes: oneOf with a discriminator, propertyNames, references, optional members."""
    schema = {"name": "zoo", "schema": Zoo.model_json_schema()}
    messages = [{"role": "user", "content": "x"}]
    for seed in range(4):
        answer = tool.chat.completions.create(
            model="any",
            messages=messages,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": schema},
        )
        assert isinstance(Zoo.model_validate_json(answer.choices[0].message.content), Zoo)
    parsed = tool.chat.completions.parse(model="any", messages=messages, response_format=Cat)
    assert isinstance(parsed.choices[0].message.parsed, Cat)
    assert isinstance(tool.responses.parse(model="any", input="x", text_format=Dog).output_parsed, Dog)
    options = {"tools": [openai.pydantic_function_tool(Cat)], "tool_choice": "required"}
    with tool.chat.completions.stream(model="any", messages=messages, **options) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds and isinstance(call.function.parsed_arguments, Cat)


def test_json_object_and_grammars(story: openai.OpenAI) -> None:
    def ask(**form) -> tuple[str, str]:
        messages = [{"role": "user", "content": "Go"}]
        choice = story.chat.completions.create(
            model="any", messages=messages, seed=1, response_format=form, max_tokens=400, temperature=0.7
        ).choices[0]
        return choice.message.content, choice.finish_reason

    assert ask(type="text")[0]
    text, reason = ask(type="json_object")
    assert text.startswith("{") and (reason == "length" or isinstance(json.loads(text), dict))
    text, reason = ask(type="grammar", syntax="regex", definition="(dog|cat){3}")
    assert re.fullmatch("(dog|cat){3}", text) and reason == "stop"
    assert ask(type="grammar", syntax="lark", definition='start: "yes" | "no"')[0] in ("yes", "no")
    text, reason = ask(type="grammar", syntax="gbnf", definition='root ::= ("a" | "b")+ "!"')
    assert re.fullmatch("[ab]+!", text) if reason == "stop" else re.fullmatch("[ab]+", text)


def test_unsupported_keywords_are_said(story: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        story.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "x"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "t", "schema": {"uniqueItems": True}},
            },
        )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tool_calls(tool: openai.OpenAI, choice: object) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": NOTHING}}
    messages = [{"role": "user", "content": "the weather?"}]
    options = {
        "tools": [WEATHER, other],
        "tool_choice": choice,
        "max_tokens": 300,
        "seed": 3,
        "temperature": 0.5,
    }
    answer = tool.chat.completions.create(model="any", messages=messages, **options).choices[0]
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather" or choice == "required"
    if call.function.name == "weather":
        assert arguments["place"] in ("rome", "oslo") and 0 <= arguments["days"] <= 9
    chunks = list(tool.chat.completions.create(model="any", messages=messages, stream=True, **options))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert [(d.index, d.function.name, d.function.arguments) for d in deltas] == [
        (0, call.function.name, call.function.arguments)
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    after = tool.chat.completions.create(model="any", messages=messages, tools=[WEATHER], max_tokens=5)
    assert after.choices[0].message.role == "assistant"


def test_allowed_tools(tool: openai.OpenAI) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": NOTHING}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}
    options = {"tools": [other, WEATHER], "max_tokens": 300, "seed": 3}
    messages = [{"role": "user", "content": "the weather?"}]
    answer = tool.chat.completions.create(
        model="any",
        messages=messages,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        **options,
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    tools = [{"type": "function", **t["function"]} for t in (other, WEATHER)]
    response = tool.responses.create(
        model="any", input="the weather?", tools=tools, tool_choice=flat, max_output_tokens=300
    )
    assert response.output[0].name == "weather"
    allowed["tools"][0]["function"]["name"] = "nothing"
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        tool.chat.completions.create(
            model="any",
            messages=messages,
            tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
            **options,
        )


def test_tools_need_a_template_that_knows_them(story: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        story.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "x"}], tools=[WEATHER]
        )


def test_completions(story: openai.OpenAI, demo: Model) -> None:
    ids = demo.tokenizer.encode(ONCE)
    text, tokens, _ = serial(demo, greedy(ids, 16))
    for prompt in (ONCE, ids, [ONCE], [ids]):
        answer = story.completions.create(model="any", prompt=prompt, temperature=0, logprobs=2)
        assert answer.choices[0].text == text and answer.choices[0].finish_reason == "length"
        assert len(answer.choices[0].logprobs.token_logprobs) == len(tokens)
        assert answer.choices[0].logprobs.text_offset[0] == 0
    streamed = story.completions.create(model="any", prompt=ONCE, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text


def test_responses(story: openai.OpenAI, demo: Model) -> None:
    text = expected(demo, ONCE, 20)
    answer = story.responses.create(model="any", input=ONCE, temperature=0, max_output_tokens=20)
    assert answer.output_text == text and answer.status == "incomplete"
    assert answer.usage.output_tokens == 20
    items = [{"role": "user", "content": [{"type": "input_text", "text": ONCE}]}]
    events = list(
        story.responses.create(model="any", input=items, temperature=0, max_output_tokens=20, stream=True)
    )
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == text


def test_responses_with_schema_and_tools(tool: openai.OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "t", "schema": SCHEMA}}
    answer = tool.responses.create(model="any", input="x", text=form, max_output_tokens=300)
    assert answer.status == "completed" and set(json.loads(answer.output_text)) == {"a", "b"}
    with tool.responses.stream(model="any", input="x", text=form, max_output_tokens=300) as stream:
        for _ in stream:
            pass
        assert set(json.loads(stream.get_final_response().output_text)) == {"a", "b"}
    flat = {"type": "function", **WEATHER["function"]}
    options = {"model": "any", "tools": [flat], "tool_choice": "required", "max_output_tokens": 300}
    answer = tool.responses.create(input="weather?", **options)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "weather" and "place" in json.loads(call.arguments)
    events = list(tool.responses.create(input="weather?", stream=True, **options))
    assert "response.function_call_arguments.done" in [e.type for e in events]
    later = [
        {"role": "user", "content": "weather?"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    assert tool.responses.create(model="any", input=later, tools=[flat], max_output_tokens=5).output


def test_embeddings(story: openai.OpenAI, demo: Model) -> None:
    texts = ["the big dog", "a red tree", "the big dog " * 150]
    found = story.embeddings.create(model="any", input=texts)  # the client asks for base64
    vectors = np.array([d.embedding for d in found.data], np.float32)
    ids = [demo.tokenizer.encode(t) for t in texts]
    np.testing.assert_array_equal(vectors, embed(demo, ids))
    assert found.usage.prompt_tokens == sum(map(len, ids))
    plain = story.embeddings.create(model="any", input=ids[1], encoding_format="float")
    np.testing.assert_array_equal(np.float32(plain.data[0].embedding), vectors[1])
    for bad in ("", [], [[]], [10**9], ["x", 5], "dog " * 5000, [True], {"a": 1}):
        with pytest.raises(openai.BadRequestError) as caught:
            story.embeddings.create(model="any", input=bad)  # type: ignore[arg-type]
        assert caught.value.param is not None and caught.value.param.startswith("input")
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        story.embeddings.create(model="any", input="x", dimensions=3)


def test_too_long_a_prompt(story: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        story.chat.completions.create(model="any", messages=[{"role": "user", "content": "dog " * 2000}])
    assert caught.value.code == "context_length_exceeded"


def test_cached_tokens_are_told(stories: Running, story: openai.OpenAI) -> None:
    prompt = "The big red dog and the happy cat went to the park to play with a ball. " * 8
    for _ in range(2):
        answer = story.completions.create(model="any", prompt=prompt, max_tokens=2, temperature=0)
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1
    metrics = stories.client.get("/metrics").text
    assert "halfbyte_prefix_hits_total" in metrics and 'route="/v1/completions",status="200"' in metrics
