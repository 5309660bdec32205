"""jinja's sandbox with a budget: whatever a template does, it ends, and memory stays in proportion.

Every statement, call, comparison and step of a loop is paid for, and every value that is made: the template's
Python is generated with the payments in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from edgellm.text.budget import Excess, made, spend, weigh
from edgellm.text.sandbox_filters import (
    FILTERS,
    MAX_PADDING,
    TESTS,
    TEXT_METHODS,
    pay_format,
    pay_text_method,
)

MAX_SOURCE_CHARACTERS: Final = 256_000
"""The longest published templates have some 30,000."""

_METHODS: Final[dict[type, frozenset[str]]] = {
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    LoopContext: frozenset({"changed", "cycle"}),
}
"""What may be called, beside macros, global functions and `TEXT_METHODS`."""


class Refusal(Exception):
    """The template called raise_exception."""


class _CodeGenerator(CodeGenerator):
    """Writes the payments into the template's Python; `environment` is a local variable there."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        """The statements of a body: they run as often as a loop or a macro has them."""
        nodes_ = list(nodes_)
        parts = (part for node in nodes_ if isinstance(node, nodes.Output) for part in node.nodes)
        size = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
        self.writeline(f"environment.spend({size})")
        super().blockvisit(nodes_, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - the node's name
        """`a ~ b`: written as text, so weighed first."""
        self.write("environment.concat_all((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802 - the node's name
        """`[a, b]`."""
        self._pay(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802 - the node's name
        """`{a: b}`."""
        self._pay(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802 - the node's name
        """`(a, b)`, unless it is assigned to."""
        if node.ctx == "load":
            self._pay(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802 - the node's name
        """`a[b]`; a slice is a copy."""
        if isinstance(node.arg, nodes.Slice):
            self._pay(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802 - the node's name
        """`a < b`, `a in b`."""
        self.write("(environment.spend() or ")
        super().visit_Compare(node, frame)
        self.write(")")

    def _pay(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; here its body is all there is to it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """jinja's, but for its text, which could be of any size: attributes are set without payment."""

    def __repr__(self) -> str:
        return "<Namespace>"


@jinja2.pass_context
def _written(_context: Context, value: Any) -> str:
    """What `{{ value }}` writes. That it wants the context keeps jinja from running it when it compiles."""
    if not isinstance(value, str):
        weigh(value)
        value = str(value)
    text: str = value
    spend(len(text))
    return text


class SandboxedEnvironment(ImmutableSandboxedEnvironment):
    """jinja as transformers sets it up for chat templates, under a budget: see `within`."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    spend = staticmethod(spend)
    made = staticmethod(made)

    def __init__(self) -> None:
        # Optimized, constants would be computed when the template is compiled, which no budget covers.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_written,
            extensions=[loopcontrols, _Generation],
        )
        self.filters, self.tests = dict(FILTERS), dict(TESTS)
        self.globals = {
            "dict": dict,
            "namespace": _Namespace,
            "range": safe_range,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._callable = frozenset(self.globals.values())

    def concat_all(self, parts: tuple[Any, ...]) -> str:
        """`a ~ b ~ c`."""
        weigh(parts)
        text = "".join(map(str, parts))
        spend(len(text))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation of arithmetic, or on texts and lists."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if hasattr(value, "__len__") and isinstance(times, int):
                    spend(weigh(value) * max(times, 0))
        elif operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise Excess("it computes a huge power")
        elif operator == "%" and isinstance(left, str):
            pay_format(left, right)
        return made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a macro, a global function, or a method that is known to be harmless."""
        __self._pay_call(__obj, args, kwargs)
        return made(super().call(__context, __obj, *args, **kwargs))

    def _pay_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        spend()
        if isinstance(function, (Macro, LoopContext, BlockReference, jinja2.Undefined)):
            return
        function = getattr(function, "__wrapped__", function)  # as the sandbox has str.format
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name in TEXT_METHODS:
            pay_text_method(owner, name, args, kwargs)
            return
        for kind, methods in _METHODS.items():
            if isinstance(owner, kind) and name in methods:
                return
        try:
            known = function in self._callable
        except TypeError:  # what has no hash
            known = False
        if not known:
            raise SecurityError(f"it calls {name or type(function).__name__}, which no chat template needs")


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(text: str) -> str:
    """Today, as some templates tell the model."""
    if len(text) > 100 or any(int(digits[:9]) > MAX_PADDING for digits in re.findall(r"\d+", text)):
        raise Excess("it formats the date at length")
    return datetime.now().strftime(text)
