"""/v1/responses: items in, items out. Nothing is stored: a conversation is sent whole each time."""

from __future__ import annotations

import secrets
from typing import Any

from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.server import fields as read
from halfbyte.runtime.server.answer import Finished, Request, Token
from halfbyte.runtime.server.chat_api import content_of, messages_of, tool_plan, tools_of
from halfbyte.runtime.server.fields import Fields, dump
from halfbyte.runtime.server.reply import Reply, Service
from halfbyte.runtime.server.tools import Call, CallParser, shown_ids

_TEXTS = ("input_text", "output_text", "text")


def _messages(service: Service, body: Fields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.has("instructions"):
        messages.append({"role": "system", "content": body.text("instructions")})
    if isinstance(body.values.get("input"), str):
        messages.append({"role": "user", "content": body.text("input")})
    else:
        for item in body.objects("input"):
            messages += _message(item, messages)
    return messages_of(Fields({"messages": messages}), "developer" in service.model.chat_template)


def _message(item: Fields, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An item as a message; a call joins the assistant's message before it."""
    kinds = ("message", "function_call", "function_call_output", "reasoning")
    kind = item.choice("type", kinds, "message")
    if kind == "reasoning":
        return []
    if kind == "function_call_output":
        return [{"role": "tool", "tool_call_id": item.text("call_id"), "content": item.text("output")}]
    if kind == "message":
        return [{"role": item.text("role"), "content": content_of(item, _TEXTS)}]
    function = {"name": item.text("name"), "arguments": item.text("arguments", "{}")}
    call = {"id": item.text("call_id"), "type": "function", "function": function}
    if before and before[-1]["role"] == "assistant":
        before[-1].setdefault("tool_calls", []).append(call)
        return []
    return [{"role": "assistant", "content": "", "tool_calls": [call]}]


def _tools(body: Fields) -> list[dict[str, Any]]:
    """Functions, which stand flat here, as the chat API has them."""
    tools = []
    for tool in body.objects("tools"):
        tool.choice("type", ("function",), "function")
        kept = {k: tool.values[k] for k in ("name", "description", "parameters") if tool.has(k)}
        tools.append({"type": "function", "function": kept})
    return tools_of(Fields({"tools": tools}))


class ResponseReply(Reply):
    """An answer of /v1/responses: a message, and a function_call for every call."""

    done = b""

    def __init__(self, service: Service, body: Fields):
        body.unsupported("previous_response_id", "conversation", "background", "prompt")
        tools, how, forced = tool_plan(service, body, _tools(body))
        ids = prompt_ids(service.model, _messages(service, body), tools or None)
        service.checked_prompt(ids)
        text = body.object("text")
        request = Request(
            ids,
            service.tokens_allowed(body, ("max_output_tokens",), len(ids), None),
            read.sampling(body),
            grammar=forced or service.response_format(text.object("format") if text else None),
            lookup=service.lookup,
            shown=shown_ids(service.model, how) if how else frozenset(),
        )
        super().__init__(service, request, body.flag("stream"), "resp_")
        self._parser = CallParser(how) if how else None
        self._told: dict[str, Any] = {
            "instructions": body.text("instructions", "") or None,
            "max_output_tokens": body.values.get("max_output_tokens"),
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "tool_choice": body.values.get("tool_choice") or "auto",
            "tools": body.array("tools"),
        }
        self._text = ""
        self._message: dict[str, Any] | None = None  # while it is open
        self._output: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._number = 0

    def frame(self, body: Any) -> bytes:
        """One server-sent event, with its name and number."""
        if "type" not in body:  # an error
            return super().frame(body)
        event = {"sequence_number": self._number, **body}
        self._number += 1
        return b"event: " + body["type"].encode() + b"\ndata: " + dump(event) + b"\n\n"

    def begin(self) -> list[Any]:
        """created and in_progress."""
        kinds = ("response.created", "response.in_progress")
        return [{"type": kind, "response": self.whole()} for kind in kinds]

    def token(self, event: Token) -> list[Any]:
        """A piece of text, a call, or nothing yet."""
        return self._take(*(self._parser.push(event.text) if self._parser else (event.text, [])))

    def finished(self, event: Finished) -> list[Any]:
        """The rest of the text, and the end of the message."""
        found = self._take(*(self._parser.push(event.text) if self._parser else (event.text, [])))
        if self._parser:
            found += self._take(*self._parser.flush())
        if not self._output:
            found += self._open_message()
        found += self._close_message()
        self._status = "completed" if event.reason == "stop" else "incomplete"
        return found

    def end(self) -> list[Any]:
        """The whole response."""
        return [{"type": f"response.{self._status}", "response": self.whole()}]

    def whole(self) -> Any:
        """The response as it is now."""
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        usage = {
            "input_tokens": self.usage.prompt,
            "input_tokens_details": {"cached_tokens": self.usage.cached},
            "output_tokens": self.usage.answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.usage.prompt + self.usage.answer,
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "error": None,
            "incomplete_details": incomplete,
            "model": self.service.name,
            "output": list(self._output),
            "usage": None if self._status == "in_progress" else usage,
            **self._told,
        }

    def _take(self, text: str, calls: list[Call]) -> list[Any]:
        found: list[Any] = []
        if text:
            found += self._open_message()
            self._text += text
            found.append({**self._place("response.output_text.delta"), "delta": text, "logprobs": []})
        for call in calls:
            found += self._close_message()
            found += self._call(call)
        return found

    def _place(self, kind: str) -> dict[str, Any]:
        assert self._message is not None
        at = len(self._output) - 1
        return {"type": kind, "item_id": self._message["id"], "output_index": at, "content_index": 0}

    def _open_message(self) -> list[Any]:
        if self._message is not None:
            return []
        self._message = {
            "id": "msg_" + secrets.token_hex(12),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._text = ""
        self._output.append(self._message)
        at = len(self._output) - 1
        added = {"type": "response.output_item.added", "output_index": at, "item": dict(self._message)}
        return [added, {**self._place("response.content_part.added"), "part": _part("")}]

    def _close_message(self) -> list[Any]:
        if self._message is None:
            return []
        part = _part(self._text)
        self._message.update(content=[part], status="completed")
        done = {**self._place("response.output_text.done"), "text": self._text, "logprobs": []}
        ended = {**self._place("response.content_part.done"), "part": part}
        at, item = len(self._output) - 1, dict(self._message)
        self._message = None
        return [done, ended, {"type": "response.output_item.done", "output_index": at, "item": item}]

    def _call(self, call: Call) -> list[Any]:
        item = {
            "id": "fc_" + secrets.token_hex(12),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        at = len(self._output)
        whole = {**item, "arguments": call.arguments, "status": "completed"}
        self._output.append(whole)
        place = {"item_id": item["id"], "output_index": at}
        return [
            {"type": "response.output_item.added", "output_index": at, "item": item},
            {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments},
            {
                "type": "response.function_call_arguments.done",
                **place,
                "name": call.name,
                "arguments": call.arguments,
            },
            {"type": "response.output_item.done", "output_index": at, "item": whole},
        ]


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
