"""The filters, tests and methods of text that chat templates use, paid for: see `edgellm.text.budget`.

What one operation could make huge (a replacement, a padding) is paid for before it is made. An operation
works on what has been paid for, so it cannot take long; what could nevertheless (regular expressions over a
whole text, sums of lists) is not there.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.tests import TESTS as JINJA_TESTS

from edgellm.text.budget import MAX_DEPTH, Excess, made, spend, weigh

MAX_PADDING: Final = 1_000

_TEXT_METHODS: Final = """
    capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust
    lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit
    rstrip split splitlines startswith strip swapcase title upper zfill
"""
TEXT_METHODS: Final = frozenset(_TEXT_METHODS.split())
"""Not: encode, format_map, maketrans, translate."""


def pay_text_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pay beforehand for what can be larger than the text. Wrong arguments are the method's to refuse."""
    match name, args:
        case "replace", (str(old), str(new), *more):
            limit = more[0] if more and isinstance(more[0], int) else kwargs.get("count", -1)
            _pay_replace(text, old, new, limit)
        case "join", (parts,):
            spend(weigh(parts) + len(text) * (len(parts) if hasattr(parts, "__len__") else 0))
        case (("center" | "ljust" | "rjust" | "zfill"), (int(width), *_)):
            spend(max(width, 0))
        case "expandtabs", _:
            sizes = [size for size in (*args, *kwargs.values()) if isinstance(size, int)]
            spend(text.count("\t") * max([8, *sizes]))
        case "format", _:
            if re.search(r":[^{}]*\{", text):
                raise Excess("it formats with a width of its own making")
            pay_format(text, (args, kwargs))
        case _:
            spend(len(text))


def _pay_replace(text: str, old: str, new: str, limit: int) -> None:
    count = text.count(old) if old else len(text) + 1
    count = min(count, limit) if limit >= 0 else count
    spend(len(text) + count * max(len(new) - len(old), 0))


def pay_format(text: str, values: Any) -> None:
    """Pay for `%` and `format`: each field may write all values, and a width."""
    if "*" in text or any(int(digits[:9]) > MAX_PADDING for digits in re.findall(r"\d+", text)):
        raise Excess("it pads a text widely")
    fields = text.count("%") + text.count("{")
    spend(len(text) + fields * (weigh(values) + MAX_PADDING // 10))


def _paid(function: Any) -> Any:
    """A filter whose result is paid for."""

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        spend()
        return made(function(*args, **kwargs))

    return paid


def _ticking(function: Any) -> Any:
    """A test that looks at the clock, as `select('in', text)` has thousands in one operation."""

    @functools.wraps(function)
    def ticking(*args: Any, **kwargs: Any) -> Any:
        spend()
        return function(*args, **kwargs)

    return ticking


@jinja2.pass_eval_context
def _join(eval_ctx: nodes.EvalContext, value: Any, d: str = "", attribute: Any = None) -> Any:
    value = made(value)
    if hasattr(value, "__len__"):
        spend(weigh(value) + len(str(d)) * len(value))
    return JINJA_FILTERS["join"](eval_ctx, value, d, attribute)


@jinja2.pass_eval_context
def _replace(eval_ctx: nodes.EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
    _pay_replace(str(s), str(old), str(new), -1 if count is None else count)
    return JINJA_FILTERS["replace"](eval_ctx, s, old, new, count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    lines = str(s).count("\n") + 1
    spend(lines * (len(width) if isinstance(width, str) else max(width, 0)))
    return JINJA_FILTERS["indent"](s, width, first, blank)


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    pay_format(str(value), (args, kwargs))
    return JINJA_FILTERS["format"](value, *args, **kwargs)


def _round(value: float, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > 30:
        raise Excess("it rounds to a huge precision")
    return JINJA_FILTERS["round"](value, precision, method)


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise Excess("it sums what are no numbers")  # each sum of lists would be another copy
    return JINJA_FILTERS["sum"](environment, iterable, attribute, start)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers'; jinja's own escapes HTML, which models have not been trained on."""
    each = MAX_DEPTH * (indent or 0) if isinstance(indent, int) else MAX_DEPTH * len(str(indent or ""))
    spend(weigh(value) * (1 + max(each, 0) + sum(map(len, separators or ()))))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_OURS: Final[dict[str, Any]] = {
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "tojson": _to_json,
}
_JINJAS: Final = """
    abs attr capitalize count d default dictsort e escape first float int items last length list lower map max
    min reject rejectattr reverse safe select selectattr sort string title trim truncate unique upper
"""
FILTERS: Final = {
    name: _paid(function)
    for name, function in ({name: JINJA_FILTERS[name] for name in _JINJAS.split()} | _OURS).items()
}
TESTS: Final = {name: _ticking(test) for name, test in JINJA_TESTS.items()}
