"""Tool calls in the model families' own formats: recognised by the chat template, parsed while the answer streams.

A format is a row of FORMATS: the texts between which a call stands, and a reader of what is between them.
Text that only looks like a call and cannot be read as one is given to the client as it is.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.model import Model
from halfbyte.runtime.stopping import overlap

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Call:
    """One call: the function's name, its arguments as JSON text, and an id (nine letters, as Mistral's want)."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "".join(secrets.choice(_ALPHABET) for _ in range(9)))


@dataclass(frozen=True)
class Format:
    """How a family writes calls.

    name        of the family
    signs       texts that a chat template of the family has, all of them
    open        before a call; '' for an answer that starts with a brace or bracket and is a call as a whole
    close       after it; '' where the answer ends with it
    read        text between them -> calls; raises ValueError and its like for anything else
    arguments   the key of arguments, where calls are JSON objects with a name; '' where they are not
    many        whether the JSON is a list
    """

    name: str
    signs: tuple[str, ...]
    open: str
    close: str
    read: Callable[[str], list[Call]]
    arguments: str = ""
    many: bool = False


def _of_object(value: Any) -> Call:
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value["name"]
    given = value["arguments"] if "arguments" in value else value.get("parameters", {})
    if isinstance(given, str):
        given = json.loads(given)
    if not isinstance(name, str) or not isinstance(given, dict):
        raise ValueError("not a call")
    return Call(name, json.dumps(given, ensure_ascii=False))


def _read_json(text: str) -> list[Call]:
    """{"name": ..., "arguments" or "parameters": {...}}, several with ';' or line ends between, or a list."""
    text, calls, at = text.strip(), [], 0
    decoder = json.JSONDecoder()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        calls += [_of_object(v) for v in (value if isinstance(value, list) else [value])]
        while at < len(text) and text[at] in "; \t\r\n":
            at += 1
    if not calls:
        raise ValueError("no call")
    return calls


def _read_mistral(text: str) -> list[Call]:
    """A JSON list; or NAME[ARGS]{...}, with [CALL_ID] perhaps between."""
    found = re.fullmatch(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\](.*)", text, re.DOTALL)
    if not found:
        return _read_json(text)
    return [_of_object({"name": found[1], "arguments": found[2]})]


def _read_named(text: str) -> list[Call]:
    """NAME>{...}: what stands after '<function='."""
    name, _, given = text.partition(">")
    return [_of_object({"name": name.strip(), "arguments": given})]


def _read_parameters(text: str) -> list[Call]:
    """<function=NAME> with <parameter=KEY> VALUE </parameter> inside."""
    calls = []
    for name, body in re.findall(r"<function=([^>\n]+)>(.*?)</function>", text, re.DOTALL):
        pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
        calls.append(_of_object({"name": name.strip(), "arguments": {k: _value(v) for k, v in pairs}}))
    if not calls:
        raise ValueError("no call")
    return calls


def _read_pairs(text: str) -> list[Call]:
    """NAME and then <arg_key>KEY</arg_key><arg_value>VALUE</arg_value>."""
    name, _, _ = text.partition("<arg_key>")
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", text, re.DOTALL)
    if not re.fullmatch(r"[\w.-]+", name.strip()):
        raise ValueError("no name")
    return [_of_object({"name": name.strip(), "arguments": {k.strip(): _value(v) for k, v in pairs}})]


def _read_gemma(text: str) -> list[Call]:
    """call:NAME{key:value,...} with strings between <|"|> (Gemma 4) or <escape> (FunctionGemma)."""
    text = text.replace("<escape>", '<|"|>')
    found = re.fullmatch(r"\s*call:([\w.-]+)(\{.*\})\s*", text, re.DOTALL)
    if not found:
        raise ValueError("no call")
    parts = found[2].split('<|"|>')
    parts[1::2] = [json.dumps(p) for p in parts[1::2]]
    parts[::2] = [re.sub(r"([{,]\s*)([A-Za-z_][\w.-]*)\s*:", r'\1"\2":', p) for p in parts[::2]]
    return [_of_object({"name": found[1], "arguments": json.loads("".join(parts))})]


def _read_python(text: str) -> list[Call]:
    """[name(key=value, ...), ...]."""
    tree = ast.parse(text.strip(), mode="eval").body
    calls = []
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            raise ValueError("not a call")
        given = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        calls.append(_of_object({"name": ast.unparse(node.func), "arguments": given}))
    return calls


def _value(text: str) -> Any:
    """JSON where it is some, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


FORMATS = (
    Format("qwen3-coder", ("<tool_call>", "<parameter="), "<tool_call>", "</tool_call>", _read_parameters),
    Format("glm", ("<tool_call>", "<arg_key>"), "<tool_call>", "</tool_call>", _read_pairs),
    Format("hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", _read_json, "arguments"),
    Format("gemma", ("<|tool_call>",), "<|tool_call>", "<tool_call|>", _read_gemma),
    Format("functiongemma", ("<start_function_call>",), "<start_function_call>", "<end_function_call>", _read_gemma),
    Format("mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", "[TOOL_CALLS]", _read_mistral, "arguments", True),
    Format(
        "phi", ("<|tool_call|>", "<|/tool_call|>"), "<|tool_call|>", "<|/tool_call|>", _read_json, "arguments", True
    ),
    Format(
        "phi", ("<|tool|>", "<|/tool|>"), "<|tool_call|>", "<|/tool_call|>", _read_json, "arguments", True
    ),
    Format("granite", ("<|tool_call|>",), "<|tool_call|>", "", _read_json, "arguments", True),
    Format("lfm", ("<|tool_call_start|>",), "<|tool_call_start|>", "<|tool_call_end|>", _read_python),
    Format("functionary", ("<function=",), "<function=", "</function>", _read_named),
    Format("llama3", ('"parameters"',), "", "", _read_json, "parameters"),
    Format("llama3", ("<|python_tag|>",), "", "", _read_json, "parameters"),
)  # fmt: skip
_READ_ERRORS = (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError)


def format_of(template: str) -> Format:
    """The format that a chat template asks for. Raises UsageError where it knows no tools."""
    if "tools" in template:
        for candidate in FORMATS:
            if all(sign in template for sign in candidate.signs):
                return candidate
        return next(f for f in FORMATS if f.name == "hermes")
    raise UsageError("this model's chat template knows no tools")


def with_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], template: str
) -> list[dict[str, Any]]:
    """Messages for templates that read tools of the system message, as JSON of the functions (Phi-4)."""
    if not tools or not any(word in template for word in ("message['tools']", "message.tools")):
        return list(messages)
    system, rest = {"role": "system", "content": ""}, list(messages)
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0)
    return [{**system, "tools": json.dumps([tool["function"] for tool in tools])}, *rest]


def shown_ids(model: Model, how: Format) -> frozenset[int]:
    """Special tokens of a format, which the parser must see."""
    words = ["[ARGS]", "[CALL_ID]", "<|python_tag|>", '<|"|>', "<escape>", how.open, how.close]
    ids = (model.tokenizer.id_of(word) for word in words if word)
    return frozenset(i for i in ids if i is not None)


def grammar_of(model: Model, how: Format, tools: Sequence[dict[str, Any]]) -> str:
    """A Lark grammar of an answer that calls one of these functions. Raises UsageError for formats without JSON."""
    if not how.arguments:
        raise UsageError(f"this server cannot force calls in the {how.name} format; use tool_choice 'auto'")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                how.arguments: tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", how.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if how.many:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    parts = ["call"]
    if how.open:
        parts.insert(0, _terminal(model, how.open))
    if how.close and how.close != how.open:
        parts.append(_terminal(model, how.close))
    line = ' "\\n" '.join(parts) if how.name == "hermes" else " ".join(parts)
    return f"start: {line}\ncall: %json {json.dumps(schema)}\n"


def _terminal(model: Model, text: str) -> str:
    token = model.tokenizer.id_of(text)
    if token is not None and token in model.tokenizer.special_ids:
        return f"<[{token}]>"
    return json.dumps(text)


class CallParser:
    """Splits an answer that arrives in pieces into text for the user and calls."""

    def __init__(self, how: Format):
        self._format = how
        self._held = ""  # text that is or could become a call
        self._inside = False
        self._plain = False  # an answer that is no call as a whole
        self._after = False  # a call, where white space says nothing
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Text to show, and calls that are complete."""
        how, shown, calls = self._format, "", list[Call]()
        self._held += text
        if not how.open:
            return self._push_whole(), calls
        while True:
            if not self._inside:
                before, sign, after = self._held.partition(how.open)
                if not sign:
                    end = len(before) - overlap(before, (how.open,))
                    shown, self._held = shown + self._text(before[:end]), before[end:]
                    break
                shown, self._held, self._inside = shown + self._text(before), after, True
            end = self._held.find(how.close) if how.close else -1
            if end < 0:
                break
            body, self._held = self._held[:end], self._held[end + len(how.close) :]
            self._inside = how.close == how.open
            text, found = self._read(body, how.close)
            shown, calls = shown + text, calls + found
        return shown, calls

    def flush(self) -> tuple[str, list[Call]]:
        """The same for what is left at the end of the answer."""
        held, self._held = self._held, ""
        if self._inside or (not self._format.open and not self._plain):
            self._inside = False
            return self._read(held, "")
        return self._text(held), []

    def _text(self, text: str) -> str:
        text = text.lstrip() if self._after else text
        self._after = self._after and not text
        return text

    def _push_whole(self) -> str:
        start = self._held.lstrip()
        tag = "<|python_tag|>"
        if not self._plain and (not start or start[0] in "{[" or start[: len(tag)] == tag[: len(start)]):
            return ""
        self._plain = True
        shown, self._held = self._held, ""
        return shown

    def _read(self, body: str, close: str) -> tuple[str, list[Call]]:
        try:
            calls = self._format.read(body.removeprefix("<|python_tag|>"))
        except _READ_ERRORS:
            self._after = False
            return self._format.open + body + close, []
        self.calls, self._after = self.calls + len(calls), True
        return "", calls
