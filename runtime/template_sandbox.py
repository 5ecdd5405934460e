"""The Jinja of chat templates, for templates that nobody trusts: what one rendering may compute is bounded.

jinja2's immutable sandbox keeps a template from Python's internals and from changing the messages. On top of it every
loop, call, filter, operator and output of a rendering draws on a `Budget` of steps, bytes and processor time; what
could make a huge value of a short template is measured before it runs, and lists that hold themselves many times are
weighed as the trees that they print as.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1 << 20
MAX_BYTES = 1 << 28
MAX_SECONDS = 3.0
"""Of one rendering: loop turns, calls and filters; bytes of all values made; processor time."""

MAX_VALUE = 1 << 22
"""Characters or items of one value that an operator, a method or a filter makes."""

_MAX_WEIGHT = 1 << 20  # of a value that holds others: its parts, counted as often as they are printed
_MAX_FORMAT = 4096  # characters of a text that formats others
_MAX_BITS = 4096  # of whole numbers
_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape from_json groupby indent int items
    join last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string
    striptags sum title tojson trim truncate unique upper wordcount
"""
_METHODS_REFUSED = frozenset(("ljust", "rjust", "center", "zfill", "expandtabs", "translate", "format_map"))
_WIDE = re.compile(r"\d{4,}|\*|\{[^{}]*\{")  # in a format: a width of thousands, or one that is computed
_WIDE_TIME = re.compile(r"%[^A-Za-z%]*[0-9]")

_budget: ContextVar[Any] = ContextVar("budget")


class Budget:
    """What is left for one rendering. Use it as a context; `template` is the source's length in characters."""

    def __init__(self, template: int):
        self.template = template
        self._steps, self._bytes = MAX_STEPS, MAX_BYTES
        self._until = time.thread_time() + MAX_SECONDS
        self._weights: dict[int, tuple[Any, int]] = {}  # by id, with the value, which keeps the id its own

    def __enter__(self) -> Budget:
        self._token = _budget.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _budget.reset(self._token)

    def step(self) -> None:
        """Something is about to run."""
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self._until:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def charge(self, nbytes: int) -> None:
        """Something was made."""
        self._bytes -= nbytes
        if self._bytes < 0:
            raise SecurityError(f"it makes more than {MAX_BYTES} bytes")

    def kept(self, value: Any) -> Any:
        """A value that was made, charged and weighed."""
        if isinstance(value, (str, bytes)):
            self.charge(sys.getsizeof(value))
        elif isinstance(value, (list, tuple, dict)):
            self.charge(sys.getsizeof(value) + 56 * len(value))
            self.weigh(value)
        return value

    def weigh(self, value: Any) -> int:
        """Parts of a value, counted as often as they would be printed."""
        if isinstance(value, (str, bytes)):
            return 1 + len(value) // 64
        if isinstance(value, Namespace):
            raise SecurityError("it prints a namespace, or puts one in a list")
        if not isinstance(value, (list, tuple, dict)):
            return 1
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        weight = 1 + sum(map(self.weigh, parts))
        if weight > _MAX_WEIGHT:
            raise SecurityError("it makes a value of too many parts")
        self._weights[id(value)] = value, weight
        return weight

    def each(self, values: Iterable[Any], body: int = 0) -> Iterator[Any]:
        """Values one by one, each a step that writes up to `body` characters."""
        for value in values:
            self.step()
            self.charge(body)
            yield value


class _Instrument(NodeTransformer):
    """Rewrites a template so that its loops, joins, slices and literals pass through filters of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (the name is jinja2's)
        self.generic_visit(node)
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _filtered(node.iter, "_each", nodes.Const(size))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (the name is jinja2's)
        self.generic_visit(node)
        joined = _filtered(node.nodes[0], "string")
        for part in node.nodes[1:]:
            joined = nodes.Add(joined, _filtered(part, "string"), lineno=node.lineno)
        return joined

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802 (the name is jinja2's)
        self.generic_visit(node)
        return _filtered(node, "_kept") if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filtered(node, "_kept")

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815


def _filtered(node: Any, name: str, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class Generation(Extension):
    """`{% generation %}` marks text of the assistant for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 (the name and type are jinja2's)

    def parse(self, parser: Any) -> Any:
        """The block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment; render only inside a `Budget`."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Instrument().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that could make a huge value, after a look at its operands."""
        budget = _budget.get()
        budget.step()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and abs(left).bit_length() * abs(right) > _MAX_BITS:
            raise SecurityError("a power that is too large")
        if operator == "*":
            if numbers and left.bit_length() + right.bit_length() > _MAX_BITS:
                raise SecurityError("a product that is too large")
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                    _check_length(len(value) * times)
                    if budget.weigh(value) * times > 2 * _MAX_WEIGHT:
                        raise SecurityError("a repetition that is too long")
        if operator == "+" and isinstance(left, (str, bytes, list, tuple)) and isinstance(right, type(left)):
            _check_sum(len(left), len(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            budget.weigh(right)
        return budget.kept(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kw: Any) -> Any:  # type: ignore[override]
        """A call, after a look at what it would make."""
        budget = _budget.get()
        budget.step()
        if isinstance(obj, Macro):
            budget.charge(budget.template)
        method = getattr(obj, "__wrapped__", obj)
        text = getattr(method, "__self__", None)
        if isinstance(text, (str, bytes)):
            name = method.__name__
            if name in _METHODS_REFUSED:
                raise SecurityError(f"{name}() is not allowed in chat templates")
            if name == "replace" and len(args) >= 2:
                _check_replaced(text, *args[:2])
            if name == "join" and args:
                args = (_checked_join(text, args[0]),)
            if name == "format":
                _check_format(str(text))
                budget.weigh([*args, *kw.values()])
        return budget.kept(super().call(context, obj, *args, **kw))


@lru_cache(maxsize=1)
def environment() -> Sandbox:
    """The environment as the transformers library sets it up: blocks trimmed, loop controls, its functions."""
    found = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=_finalized
    )
    filters = {n: f for n, f in found.filters.items() if n in _FILTERS.split()}
    filters |= {"tojson": _to_json, "from_json": _from_json}
    found.filters = {n: _bounded(n, f) for n, f in filters.items()}
    found.filters["_each"] = pass_context(lambda _, values, body: _budget.get().each(values, body))
    found.filters["_kept"] = pass_context(lambda _, value: _budget.get().kept(value))
    found.globals = {n: v for n, v in found.globals.items() if n in ("dict", "namespace", "cycler", "joiner")}
    found.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "range": _range}
    return found


@pass_context
def _finalized(_: Any, value: Any) -> Any:
    """Every value that a template writes."""
    budget = _budget.get()
    budget.step()
    budget.weigh(value)
    return budget.kept(value)


def _bounded(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that draws on the budget; as it takes the context, jinja2 never runs it while compiling."""
    wants = _PassArg.from_obj(act)

    @pass_context
    def bounded(context: Any, value: Any, *args: Any, **kw: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if name == "join":
            value = _checked_join(args[0] if args else kw.get("d", ""), value)
        elif name == "indent":
            width = args[0] if args else kw.get("width", 4)
            _check_length(
                (str(value).count("\n") + 1) * (width if isinstance(width, int) else len(str(width)))
            )
        elif name == "replace":
            _check_replaced(str(value), *(str(a) for a in (*args, kw.get("old", ""), kw.get("new", ""))[:2]))
        elif name in ("string", "tojson"):
            budget.weigh(value)
        given: dict[Any, tuple[Any, ...]] = {
            _PassArg.context: (context,),
            _PassArg.eval_context: (context.eval_ctx,),
            _PassArg.environment: (context.environment,),
        }
        found = act(*given.get(wants, ()), value, *args, **kw)
        return budget.each(found) if isinstance(found, Iterator) else budget.kept(found)

    return bounded


def _checked_join(separator: Any, values: Any) -> list[Any]:
    budget = _budget.get()
    found = list(budget.each(values))
    size = sum(len(v) if isinstance(v, str) else 64 * budget.weigh(v) for v in found)
    _check_sum(size, len(found) * len(str(separator)))
    return found


def _check_replaced(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, type(old)) and isinstance(new, type(text)):
        _check_length(text.count(old) * len(new) if len(new) > len(old) else 0)


def _check_format(text: str) -> None:
    if len(text) > _MAX_FORMAT or _WIDE.search(text):
        raise SecurityError("a text is formatted to too many characters")


def _check_length(length: int) -> None:
    if length > MAX_VALUE:
        raise SecurityError(f"a value of more than {MAX_VALUE} characters or items")


def _check_sum(left: int, right: int) -> None:
    """A text of the user's may be longer than MAX_VALUE, and may be continued."""
    if min(left, right) > MAX_VALUE or left + right > 4 * MAX_VALUE:
        _check_length(left + right)


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 256 or _WIDE_TIME.search(form):
        raise SecurityError("strftime_now() is given a format that is too long")
    return datetime.now().strftime(form)


def _range(*limits: int) -> range:
    numbers = range(*limits)
    if len(numbers) > MAX_STEPS:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")
    return numbers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter would escape <, >, & and '."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError("tojson takes an indent of 0 to 16")
    if separators is not None and sum(map(len, separators)) > 16:
        raise SecurityError("tojson takes short separators")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _from_json(text: str) -> Any:
    return json.loads(text)
