"""A jinja2 environment for chat templates of strangers: a sandbox with a budget of work, characters and seconds.

jinja2's own sandbox keeps a template from Python's internals. It does not keep it from running for hours, filling the
memory or crashing Python, so here everything that repeats, grows or looks through much is counted: each run of a block,
each call, filter and test, each string or list that an operator, a method or a filter makes, each value that is
compared, printed or used as a key. Sizes are known before anything is made, and nothing is computed while a template is
compiled. What is left of methods and filters is a list of those that chat templates use.

Counting costs a template some tens of microseconds and needs no process, signal or trace. One environment renders one
text at a time.
"""

import re
import time
import types
from collections.abc import Callable, Iterable, Mapping, Set, ValuesView
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.tests import TESTS
from jinja2.utils import pass_context

from data_tools.template_filters import (
    FILTER_NAMES,
    ITEM,
    MAX_WIDTH,
    LimitError,
    check_width,
    counted_filter,
    counted_test,
)

MAX_SOURCE = 100_000
"""Characters of a template; the longest ones known have a third of it."""
MAX_STEPS = 500_000
"""Runs of a block, calls and filters in one rendering."""
MAX_CHARS = 4_000_000
"""Characters made in one rendering, beside those that the messages' own length grants."""
CHARS_PER_CHAR = 64
"""Characters that may be made for each character of the messages."""
MAX_SECONDS = 10.0
MAX_DEPTH = 100
"""Of lists in lists."""
MAX_BITS = 4096
"""Of a whole number."""
STRING_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
    "startswith strip swapcase title upper zfill".split()
)
OTHER_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (dict, frozenset({"copy", "get", "items", "keys", "values"})),
    ((list, tuple), frozenset({"copy", "count", "index"})),
    ((int, float, complex, bytes, range, types.GeneratorType), frozenset()),
)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)` of a template; names that begin with an underscore are refused, as elsewhere."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  # so that `namespace(self=...)` works
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment. `start` sets what one rendering may use."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize, **options)
        self.code_generator_class = _CountingGenerator
        self.start(0)
        self.filters = {name: counted_filter(self, name) for name in FILTER_NAMES}
        self.tests = {name: counted_test(self, name) for name in TESTS}
        self.globals |= {"namespace": Namespace, "dict": _make_dict, "range": self._range}
        del self.globals["lipsum"]

    def start(self, input_chars: int) -> None:
        """Grant the budget of one rendering of messages with so many characters."""
        self._steps = MAX_STEPS
        self._chars = MAX_CHARS + CHARS_PER_CHAR * input_chars
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self, chars: int = 0) -> None:
        """Count one step and the characters that it makes. Raises LimitError."""
        self._steps -= 1
        self.charge(chars)
        if self._steps < 0:
            raise LimitError(f"does more than {MAX_STEPS} steps for one text")
        if time.monotonic() > self._deadline:
            raise LimitError(f"takes longer than {MAX_SECONDS:g} seconds for one text")

    def charge(self, chars: int) -> None:
        """Count characters that are about to be made. Raises LimitError."""
        self._chars -= chars
        if self._chars < 0:
            raise LimitError("makes much more text than the messages hold")

    def charge_text_of(self, *values: object) -> None:
        """Count the text of values of any kind as far as it may be made, compared or hashed. Raises LimitError.

        Nesting is limited too: Python's hash of a deep tuple has no guard of its own and would end the process.
        """
        level: list[object] = list(values)
        for _ in range(MAX_DEPTH):
            if not level:
                return
            inner: list[object] = []
            for value in level:
                if isinstance(value, str):
                    self.charge(len(value))
                elif isinstance(value, Mapping):
                    self.charge(ITEM * len(value))
                    inner += [*value.keys(), *value.values()]
                elif isinstance(value, list | tuple | Set | ValuesView):
                    self.charge(ITEM * len(value))
                    inner += value
                else:
                    self.charge(ITEM)
            level = inner
        raise LimitError(f"nests values deeper than {MAX_DEPTH}")

    def seen(self, value: Any) -> Any:
        """A value that is about to be compared, hashed or printed."""
        if type(value) is str:
            self.charge(len(value))
        elif value is not None and type(value) not in (int, bool, float):
            self.charge_text_of(value)
        return value

    def charge_result(self, value: object) -> None:
        """Count a string or list that was made from values of about its size."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, list | tuple | dict):
            self.charge(ITEM * len(value))

    def cut(self, value: Any) -> Any:
        """A value that is about to be sliced."""
        self.charge_result(value)
        return value

    def join(self, join: Callable[[tuple[object, ...]], str], parts: tuple[object, ...]) -> str:
        """The operator `~`."""
        self.charge_text_of(*parts)
        return join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that make something larger than what they are given."""
        if operator == "+" and type(left) is type(right) is str:
            self.charge(len(left) + len(right))
            return left + right
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
                raise LimitError(f"makes a number of more than {MAX_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            self.check_percent(left, right)
        elif operator == "+":
            self.charge_result(left)
            self.charge_result(right)
        return self.binop_table[operator](left, right)

    def _check_product(self, left: Any, right: Any) -> None:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                self.charge(max(times, 0) * len(value) * (1 if isinstance(value, str) else ITEM))
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
            raise LimitError(f"makes a number of more than {MAX_BITS} bits")

    def check_percent(self, pattern: str, values: Any) -> None:
        """Count what `pattern % values` may make."""
        for found in _PERCENT.finditer(pattern):
            for width in filter(None, found.groups()):
                if width == "*" or len(width) > 9:
                    raise LimitError(f"formats with a width of {width[:9]}")
                check_width(int(width))
        self.charge(len(pattern) + MAX_WIDTH)
        for _ in range(pattern.count("%")):
            self.charge_text_of(values)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of Python's own types only the methods that are listed above."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, str):
            return attr in STRING_METHODS
        for kind, names in OTHER_METHODS:
            if isinstance(obj, kind):
                return attr in names
        return True

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `str.format_map` by a formatter that counts."""
        if not isinstance(value, types.BuiltinMethodType) or value.__name__ not in ("format", "format_map"):
            return None
        pattern = value.__self__
        if not isinstance(pattern, str):
            return None
        by_map = value.__name__ == "format_map"

        def format(*args: Any, **kwargs: Any) -> str:
            if by_map and (kwargs or len(args) != 1):
                raise TypeError("format_map() takes exactly one argument")
            formatter = _CountingFormatter(self)
            return formatter.vformat(pattern, () if by_map else args, args[0] if by_map else kwargs)

        return format

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A subscript: its key is hashed, or printed in an error."""
        return super().getitem(obj, self.seen(argument))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        """Every call in a template."""
        __self.step()
        if not isinstance(__obj, Macro):
            __self.charge_text_of(*args, *kwargs.values())
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            args = __self._check_method(__obj.__self__, __obj.__name__, args)
        elif isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, list | tuple):
            __self.seen(__obj.__self__)  # it is searched
        result = super().call(__context, __obj, *args, **kwargs)
        __self.charge_result(result)
        return result

    def _check_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Count what a string's method makes, if that may be more than the string; returns the arguments to use."""
        if name == "replace":
            self.check_replace(text, *args)
        elif name == "join" and args:
            parts = list(args[0])
            self.charge_text_of(*parts)
            self.charge(len(text) * len(parts))
            return (parts, *args[1:])
        elif name in ("center", "ljust", "rjust", "zfill") and args:
            check_width(args[0])
        elif name == "expandtabs" and args:
            check_width(args[0])
            self.charge(text.count("\t") * int(args[0]))
        elif name in ("split", "rsplit", "splitlines"):
            self.charge(len(text))
        return args

    def check_replace(self, text: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
        """Count what `text.replace(old, new)` may make."""
        self.charge_text_of(text, old, new)
        if isinstance(text, str) and isinstance(old, str):
            self.charge((text.count(old) if old else len(text) + 1) * len(str(new)))

    def _range(self, *args: int) -> range:
        found = safe_range(*args)
        self.charge(len(found))
        return found


class _CountingFormatter(SandboxedFormatter):
    """`str.format` with fields that are counted and widths that are limited."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self._sandbox = sandbox

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        if conversion:
            self._sandbox.charge_text_of(value)
        return super().convert_field(value, conversion)  # type: ignore[arg-type]

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._sandbox.step()
        self._sandbox.charge_text_of(value, format_spec)
        for digits in re.findall(r"\d+", format_spec):
            check_width(int(digits[:9]))
        return super().format_field(value, format_spec)


class _CountingGenerator(CodeGenerator):
    """Code in which every run of a block is counted, with the text that stands in it, every slice and every `~`."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        body = list(nodes_)
        outputs = [child for node in body if isinstance(node, nodes.Output) for child in node.nodes]
        text = sum(len(child.data) for child in outputs if isinstance(child, nodes.TemplateData))
        self.writeline(f"environment.step({text})")
        super().blockvisit(body, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.join(")
        self.write("markup_join" if frame.eval_ctx.volatile or frame.eval_ctx.autoescape else "str_join")
        self.write(", (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(")
        self._visit_seen(node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._visit_seen(operand.expr, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("{")
        for item in node.items:
            self._visit_seen(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def _visit_seen(self, node: nodes.Expr, frame: Frame) -> None:
        if isinstance(node, nodes.Const):
            return self.visit(node, frame)
        self.write("environment.seen(")
        self.visit(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node, frame)
        self.write("environment.cut(")
        self.visit(node.node, frame)
        self.write(")[")
        self.visit(node.arg, frame)
        self.write("]")


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Counts what is printed; with a context, so that jinja2 does not evaluate it while it compiles."""
    sandbox = context.environment
    assert isinstance(sandbox, Sandbox)
    return sandbox.seen(value)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace holds no names that begin with an underscore: {name[:40]}")
