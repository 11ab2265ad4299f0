"""What the filters of a chat template may do: which there are, and what each counts before it makes something.

`Counter` is the budget that `template_sandbox` keeps; a check here raises LimitError before anything large exists.
"""

import json
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import jinja2
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.tests import TESTS

MAX_WIDTH = 1000
"""Of padding, indentation and number formats."""
ITEM = 8
"""Characters that one place of a list counts as: a pointer has eight bytes."""

# Filters whose result is made of what they are given; those that make text are listed apart, see GUARDS.
PICKING_FILTERS = "abs attr count d default first float int items last length safe".split()
LISTING_FILTERS = "dictsort list map reject rejectattr reverse select selectattr".split()  # of a string a list
COMPARING_FILTERS = "groupby max min sort unique".split()
TEXT_FILTERS = (
    "capitalize e escape filesizeformat forceescape lower string title trim truncate upper urlencode wordcount"
).split()
# Tests that look at all of a value; the others at its type.
READING_TESTS = frozenset("lower upper in == eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le".split())


class LimitError(jinja2.TemplateError):
    """A template goes beyond what it may use."""


class Counter(Protocol):
    """The environment, as a budget."""

    def step(self, chars: int = 0) -> None: ...
    def charge(self, chars: int) -> None: ...
    def charge_text_of(self, *values: object) -> None: ...
    def charge_result(self, value: object) -> None: ...
    def check_replace(self, text: Any, old: Any = "", new: Any = "", count: Any = None) -> None: ...
    def check_percent(self, pattern: str, values: Any) -> None: ...


def counted_filter(counter: Counter, name: str) -> Callable[..., Any]:
    """A filter of jinja2's that counts what it makes before it does."""
    original, guard = FILTERS[name], GUARDS.get(name)
    skipped = 1 if hasattr(original, "jinja_pass_arg") else 0  # the environment or context comes first

    @wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counter.step()
        counter.charge_text_of(*args[skipped + 1 :], *kwargs.values())
        value = args[skipped]
        if name in COMPARING_FILTERS:
            value = list(value)
            args = (*args[:skipped], value, *args[skipped + 1 :])
        if name in TEXT_FILTERS or name in COMPARING_FILTERS:
            counter.charge_text_of(value)
        elif name in LISTING_FILTERS and isinstance(value, str):
            counter.charge(ITEM * len(value))
        if guard is not None:
            checked = guard(counter, *args[skipped:], **kwargs)
            if checked is not None:
                args, kwargs = (*args[:skipped], *checked), {}
        result = original(*args, **kwargs)
        counter.charge_result(result)
        return result

    return counted


def counted_test(counter: Counter, name: str) -> Callable[..., bool]:
    """A test of jinja2's that counts the text it looks through."""
    original = TESTS[name]
    skipped = 1 if hasattr(original, "jinja_pass_arg") else 0

    @wraps(original)
    def counted(*args: Any, **kwargs: Any) -> bool:
        counter.step()
        looks = skipped if name in READING_TESTS else skipped + 1
        counter.charge_text_of(*args[looks:], *kwargs.values())
        return original(*args, **kwargs)

    return counted


def counted_json(counter: Counter) -> Callable[..., str]:
    """A filter that writes JSON piece by piece; jinja2's own escapes characters for HTML, which a prompt must not."""

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        check_width(len(indent) if isinstance(indent, str) else indent or 0)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        pieces = []
        for piece in encoder.iterencode(value):
            counter.step(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    return tojson


def check_width(width: Any) -> None:
    if not isinstance(width, int) or abs(width) > MAX_WIDTH:
        raise LimitError(f"pads to a width of {str(width)[:20]}; {MAX_WIDTH} is the most")


def _guard_center(counter: Counter, value: Any, width: Any = 80) -> None:
    counter.charge_text_of(value)
    check_width(width)


def _guard_format(counter: Counter, value: Any, *args: Any, **kwargs: Any) -> None:
    counter.charge_text_of(value)
    counter.check_percent(str(value), kwargs or args)


def _guard_indent(counter: Counter, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> None:
    check_width(len(width) if isinstance(width, str) else width)
    counter.charge_text_of(s, width)
    lines = str(s).count("\n") + 1
    counter.charge(lines * (len(width) if isinstance(width, str) else width))


def _guard_join(counter: Counter, value: Any, d: Any = "", attribute: Any = None) -> tuple[Any, ...]:
    get = make_attrgetter(counter, attribute) if attribute is not None else None
    items = list(value) if get is None else [get(item) for item in value]
    counter.charge_text_of(*items)
    for _ in items:
        counter.charge_text_of(d)
    return items, d


def _guard_replace(counter: Counter, s: Any, old: Any, new: Any, count: Any = None) -> None:
    counter.charge_text_of(s, old, new)
    counter.check_replace(str(s), str(old), str(new))


def _guard_round(counter: Counter, value: Any, precision: Any = 0, method: Any = "common") -> None:
    if not isinstance(precision, int) or abs(precision) > 20:
        raise LimitError("rounds to more than 20 digits")


def _guard_batch(counter: Counter, value: Any, linecount: Any, fill_with: Any = None) -> None:
    check_width(linecount)


def _guard_slice(counter: Counter, value: Any, slices: Any, fill_with: Any = None) -> None:
    check_width(slices)


def _guard_sum(counter: Counter, iterable: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise LimitError("sums what are no numbers")


GUARDS: dict[str, Callable[..., tuple[Any, ...] | None]] = {
    "batch": _guard_batch,
    "center": _guard_center,
    "format": _guard_format,
    "indent": _guard_indent,
    "join": _guard_join,
    "replace": _guard_replace,
    "round": _guard_round,
    "slice": _guard_slice,
    "sum": _guard_sum,
}
FILTER_NAMES = (*PICKING_FILTERS, *LISTING_FILTERS, *COMPARING_FILTERS, *TEXT_FILTERS, *GUARDS)
