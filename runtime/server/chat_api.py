"""/v1/chat/completions: messages in, choices out."""

from __future__ import annotations

import json
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.constrain import Grammar
from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.server import fields as read
from halfbyte.runtime.server.answer import Finished, Request, Token
from halfbyte.runtime.server.fields import ApiError, Fields
from halfbyte.runtime.server.reply import REASONS, Reply, Service
from halfbyte.runtime.server.splitter import Piece, Splitter, Splitting
from halfbyte.runtime.server.tools import Call, Format, format_of, grammar_of, with_tools

EFFORTS = ("", "none", "minimal", "low", "medium", "high", "xhigh")
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES, MAX_TOOLS, MAX_VARIABLES = 4096, 128, 16


def content_of(fields: Fields, kinds: tuple[str, ...] = ("text",)) -> str:
    """A message's content: text, or a list of parts of text."""
    value = fields.values.get("content")
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in fields.objects("content"):
        kind = part.text("type", "text")
        if kind not in kinds:
            raise part.wrong("type", f"is {kind[:40]!r}, but this model reads text only")
        texts.append(part.text("text"))
    return "".join(texts)


def messages_of(body: Fields, developer: bool) -> list[dict[str, Any]]:
    """Checked messages, as templates expect them. developer: whether the template knows that role."""
    given = body.objects("messages")
    if not given:
        raise body.wrong("messages", "must hold at least one message")
    if len(given) > MAX_MESSAGES:
        raise body.wrong("messages", f"may hold {MAX_MESSAGES} messages at most")
    messages = []
    for fields in given:
        role = fields.choice("role", ROLES, "")
        if role == "developer" and not developer:
            role = "system"
        if role in ("user", "tool") and not fields.has("content"):
            raise fields.wrong("content", "is missing")
        message: dict[str, Any] = {"role": role, "content": content_of(fields)}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if fields.has(name):
                message[name] = fields.text(name)
        calls = [call_of(call) for call in fields.objects("tool_calls")]
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def call_of(call: Fields) -> dict[str, Any]:
    """A call that an earlier answer made; templates take its arguments as an object."""
    function = call.object("function")
    if function is None:
        raise call.wrong("function", "is missing")
    arguments: Any = function.text("arguments", "{}")
    try:
        arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        raise function.wrong("arguments", "must be JSON text") from None
    named = {"name": function.text("name"), "arguments": arguments}
    return {"id": call.text("id", ""), "type": "function", "function": named}


def tools_of(body: Fields) -> list[dict[str, Any]]:
    """Checked tools: functions with names."""
    given = body.objects("tools")
    if len(given) > MAX_TOOLS:
        raise body.wrong("tools", f"may hold {MAX_TOOLS} tools at most")
    tools = []
    for tool in given:
        tool.choice("type", ("function",), "function")
        function = tool.object("function")
        if function is None:
            raise tool.wrong("function", "is missing")
        function.text("name")
        function.text("description", "")
        function.object("parameters")
        tools.append({"type": "function", "function": dict(function.values)})
    return tools


def tool_plan(
    service: Service, body: Fields, tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Format | None, Grammar | None]:
    """(tools that the template shows, format to parse, grammar that forces a call), by tool_choice."""
    holder, word = None, ""
    if isinstance(body.values.get("tool_choice"), dict):
        holder = body.object("tool_choice")
        assert holder is not None
        if holder.text("type", "function") == "allowed_tools":
            tools, word = _allowed(body, holder.object("allowed_tools") or holder, tools)
            holder = None
    if holder is not None:
        name = (holder.object("function") or holder).text("name")
        forced = [t for t in tools if t["function"]["name"] == name]
        if not forced:
            raise body.wrong("tool_choice", "names a function that 'tools' does not have")
    else:
        word = word or body.choice("tool_choice", ("none", "auto", "required"), "auto")
        if word == "none" or not tools:
            if word == "required":
                raise body.wrong("tool_choice", "is 'required', but there are no tools")
            return [], None, None
        forced = tools if word == "required" else []
    try:
        how = format_of(service.model.chat_template)
        source = grammar_of(service.model, how, forced) if forced else None
    except UsageError as error:
        raise ApiError(str(error), "tools") from None
    return tools, how, None if source is None else service.grammar("lark", source, "tools")


def variables_of(body: Fields, effort: str) -> dict[str, Any]:
    """Variables of the template: chat_template_kwargs, and what an effort to think means to templates."""
    given = body.object("chat_template_kwargs")
    variables = dict(given.values) if given else {}
    if len(variables) > MAX_VARIABLES or not all(k.isidentifier() and k not in _RESERVED for k in variables):
        raise body.wrong("chat_template_kwargs", "must name variables of the template")
    told = {"reasoning_effort": effort, "enable_thinking": effort != "none"} if effort else {}
    return {**told, **variables}


def _allowed(body: Fields, given: Fields, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """(tools, mode) of a tool_choice that allows some of them."""
    names = {(tool.object("function") or tool).text("name") for tool in given.objects("tools")}
    if not names <= {t["function"]["name"] for t in tools}:
        raise body.wrong("tool_choice", "names a function that 'tools' does not have")
    return [t for t in tools if t["function"]["name"] in names], given.choice(
        "mode", ("auto", "required"), "auto"
    )


class ChatReply(Reply):
    """An answer of /v1/chat/completions."""

    def __init__(self, service: Service, body: Fields):
        model = service.model
        body.unsupported("audio", "functions", "prediction", "web_search_options")
        tools, how, forced = tool_plan(service, body, tools_of(body))
        messages = with_tools(
            messages_of(body, "developer" in model.chat_template), tools, model.chat_template
        )
        extra = variables_of(body, body.choice("reasoning_effort", EFFORTS, ""))
        ids = service.checked_prompt(prompt_ids(model, messages, tools or None, **extra))
        top = body.whole("top_logprobs", 0, 0, read.MAX_TOP)
        wanted = body.flag("logprobs")
        if top and not wanted:
            raise body.wrong("top_logprobs", "needs 'logprobs' to be true")
        grammar = forced or service.response_format(body.object("response_format"))
        many = body.flag("parallel_tool_calls", True)
        splitting = Splitting(model, ids, how, grammar is not None, many)
        request = Request(
            ids,
            service.tokens_allowed(body, ("max_completion_tokens", "max_tokens"), len(ids), None),
            read.sampling(body),
            read.stops(body),
            body.whole("n", 1, 1, service.max_n),
            top if wanted else None,
            grammar,
            service.lookup,
            splitting.shown,
        )
        super().__init__(service, request, body.flag("stream"), "chatcmpl-")
        options = body.object("stream_options")
        self._tell_usage = bool(options and options.flag("include_usage"))
        self._choices = [_Choice(splitting.splitter()) for _ in range(request.n)]

    def begin(self) -> list[Any]:
        """The role of every choice."""
        return [self._chunk(i, {"role": "assistant", "content": ""}, None) for i in range(len(self._choices))]

    def token(self, event: Token) -> list[Any]:
        """A piece of text, a call, or nothing yet."""
        choice = self._choices[event.choice]
        logprobs = None
        if event.logprob is not None:
            logprobs = logprob_body(self.service, event)
            choice.logprobs.append(logprobs)
        self.usage.thought += choice.splitter.thinking
        return self._deltas(event.choice, choice.splitter.push(event.text), logprobs)

    def finished(self, event: Finished) -> list[Any]:
        """The rest of the text and the reason."""
        choice = self._choices[event.choice]
        found = self._deltas(event.choice, choice.splitter.push(event.text), None)
        found += self._deltas(event.choice, choice.splitter.flush(), None)
        choice.reason = "tool_calls" if choice.splitter.calls else REASONS[event.reason]
        return [*found, self._chunk(event.choice, {}, choice.reason)]

    def end(self) -> list[Any]:
        """Usage, where it was asked for."""
        if not self._tell_usage:
            return []
        facts = {"usage": self.usage.body(), "timings": self.usage.timings()}
        return [{**self._head("chat.completion.chunk"), "choices": [], **facts}]

    def whole(self) -> Any:
        """The chat completion."""
        choices = []
        for i, choice in enumerate(self._choices):
            found = choice.splitter
            message: dict[str, Any] = {"role": "assistant", "content": found.text, "refusal": None}
            if found.thought:
                message["reasoning_content"] = found.thought
            if found.calls:
                message["content"] = found.text or None
                message["tool_calls"] = [call_body(call) for call in found.calls]
            logprobs = {"content": choice.logprobs} if self.request.top_logprobs is not None else None
            choices.append(
                {"index": i, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}
            )
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": self.usage.body(),
            "timings": self.usage.timings(),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}

    def _deltas(self, i: int, piece: Piece, logprobs: Any) -> list[Any]:
        found = []
        if piece.thought:
            found.append(self._chunk(i, {"reasoning_content": piece.thought}, None, logprobs))
            logprobs = None
        if piece.text or logprobs:
            found.append(self._chunk(i, {"content": piece.text}, None, logprobs))
        first = len(self._choices[i].splitter.calls) - len(piece.calls)
        for at, call in enumerate(piece.calls):
            found.append(self._chunk(i, {"tool_calls": [{"index": first + at, **call_body(call)}]}, None))
        return found

    def _chunk(self, i: int, delta: Any, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "finish_reason": reason, "logprobs": None}
        if logprobs:
            choice["logprobs"] = {"content": [logprobs]}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


_RESERVED = (
    "messages",
    "tools",
    "documents",
    "bos_token",
    "eos_token",
    "add_generation_prompt",
    "template",
    "model",
)


class _Choice:
    def __init__(self, splitter: Splitter):
        self.splitter, self.reason = splitter, ""
        self.logprobs: list[Any] = []


def call_body(call: Call) -> dict[str, Any]:
    """A call as the API tells it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def logprob_body(service: Service, event: Token) -> dict[str, Any]:
    """A token with its log probability and the likeliest ones."""

    def one(token: int, value: float) -> dict[str, Any]:
        raw = service.model.tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(raw)}

    assert event.logprob is not None
    return {**one(event.id, event.logprob), "top_logprobs": [one(*pair) for pair in event.top]}


def finite(value: float) -> float:
    """A log probability that JSON can tell; OpenAI says -9999 for a token that cannot be."""
    return max(value, -9999.0)
