"""/v1/responses: items in, items out. Nothing is stored: a conversation is sent whole each time."""

from __future__ import annotations

import secrets
from typing import Any

from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.server import fields as read
from halfbyte.runtime.server.answer import Finished, Request, Token
from halfbyte.runtime.server.chat_api import (
    EFFORTS,
    content_of,
    messages_of,
    tool_plan,
    tools_of,
    variables_of,
)
from halfbyte.runtime.server.fields import Fields, dump
from halfbyte.runtime.server.reply import Reply, Service
from halfbyte.runtime.server.splitter import Piece, Splitting
from halfbyte.runtime.server.tools import Call, with_tools

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
    """An answer of /v1/responses: its reasoning, a message, and a function_call for every call."""

    done = b""

    def __init__(self, service: Service, body: Fields):
        body.unsupported("previous_response_id", "conversation", "background", "prompt", "top_logprobs")
        tools, how, forced = tool_plan(service, body, _tools(body))
        reasoning = body.object("reasoning")
        variables = variables_of(body, reasoning.choice("effort", EFFORTS, "") if reasoning else "")
        messages = with_tools(_messages(service, body), tools, service.model.chat_template)
        ids = prompt_ids(service.model, messages, tools or None, **variables)
        service.checked_prompt(ids)
        text = body.object("text")
        grammar = forced or service.response_format(text.object("format") if text else None)
        many = body.flag("parallel_tool_calls", True)
        splitting = Splitting(service.model, ids, how, grammar is not None, many)
        request = Request(
            ids,
            service.tokens_allowed(body, ("max_output_tokens",), len(ids), None),
            read.sampling(body),
            grammar=grammar,
            lookup=service.lookup,
            shown=splitting.shown,
        )
        super().__init__(service, request, body.flag("stream"), "resp_")
        self._splitter = splitting.splitter()
        self._told: dict[str, Any] = {
            "instructions": body.text("instructions", "") or None,
            "max_output_tokens": body.values.get("max_output_tokens"),
            "metadata": {},
            "parallel_tool_calls": many,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "tool_choice": body.values.get("tool_choice") or "auto",
            "tools": body.array("tools"),
        }
        self._text = ""
        self._item: dict[str, Any] | None = None  # the message or reasoning that is open
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
        self.usage.thought += self._splitter.thinking
        return self._take(self._splitter.push(event.text))

    def finished(self, event: Finished) -> list[Any]:
        """The rest of the text, and the end of the message."""
        found = self._take(self._splitter.push(event.text)) + self._take(self._splitter.flush())
        self._status = "completed" if event.reason == "stop" else "incomplete"
        if not self._output:
            found += self._open("message")
        return found + self._close(self._status)

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
            "output_tokens_details": {"reasoning_tokens": self.usage.thought},
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

    def _take(self, piece: Piece) -> list[Any]:
        found: list[Any] = []
        for kind, text in (("reasoning", piece.thought), ("message", piece.text)):
            if text:
                found += self._open(kind)
                self._text += text
                found.append({**self._place("delta"), "delta": text, **_LOGPROBS[kind]})
        for call in piece.calls:
            found += self._close()
            found += self._call(call)
        return found

    def _place(self, what: str) -> dict[str, Any]:
        assert self._item is not None
        at = len(self._output) - 1
        place = {"item_id": self._item["id"], "output_index": at, "content_index": 0}
        return {"type": f"response.{_TEXT_KINDS[self._item['type']]}.{what}", **place}

    def _open(self, kind: str) -> list[Any]:
        """Open an item, unless one of its kind is open."""
        found: list[Any] = []
        if self._item is not None:
            if self._item["type"] == kind:
                return found
            found = self._close()
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        name = _ITEM_IDS[kind] + secrets.token_hex(12)
        self._item = {"id": name, "type": kind, "status": "in_progress", "content": [], **more}
        self._text = ""
        self._output.append(self._item)
        at = len(self._output) - 1
        added = {"type": "response.output_item.added", "output_index": at, "item": dict(self._item)}
        part = {**self._place(""), "type": "response.content_part.added", "part": _part(kind, "")}
        return [*found, added, part]

    def _close(self, status: str = "completed") -> list[Any]:
        """Close what is open."""
        if self._item is None:
            return []
        kind = self._item["type"]
        part = _part(kind, self._text)
        self._item.update(content=[part], status=status)
        done = {**self._place("done"), "text": self._text, **_LOGPROBS[kind]}
        ended = {**self._place(""), "type": "response.content_part.done", "part": part}
        at, item = len(self._output) - 1, dict(self._item)
        self._item = None
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


_TEXT_KINDS = {"message": "output_text", "reasoning": "reasoning_text"}
_ITEM_IDS = {"message": "msg_", "reasoning": "rs_"}
_LOGPROBS: dict[str, dict[str, Any]] = {"message": {"logprobs": []}, "reasoning": {}}


def _part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "message" else {}
    return {"type": _TEXT_KINDS[kind], "text": text, **more}
