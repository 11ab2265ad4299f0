"""One configuration value at a time: from command-line text or TOML to the field's type, and back to TOML.

Works on type hints only and knows no key; which keys exist and what range they allow is `trainer.config`. Imports no
torch: `--help` and errors must come at once.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterable
from difflib import SequenceMatcher
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from trainer.errors import ConfigError

LARGEST_INT = 2**63 - 1
"""Whole numbers beyond this fit neither TOML nor a tensor."""


def parse_text(key: str, text: str, hint: Any) -> object:
    """The value that `text` on the command line means for a field of type `hint`; raises ConfigError.

    Only the spelling is settled here; the result still goes through `typed`.
    """
    kind, optional = _split_optional(hint)
    if optional and text == "none":
        return None
    if get_origin(kind) is tuple:
        return _parse_list(key, text, get_args(kind)[0])
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is int and re.fullmatch(r"[+-]?\d{1,20}", text, re.ASCII):
        return int(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def typed(key: str, value: object, hint: Any, *, blank: bool = False) -> Any:
    """`value` as the field's type: a single item becomes a list of one, a whole number a float, "none" None. blank: a
    text may be white space, though not empty.

    Raises ConfigError naming the key, the value and what is expected.
    """
    kind, optional = _split_optional(hint)
    if optional and (value is None or value == "none"):
        return None
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(typed(key, item, get_args(kind)[0], blank=blank) for item in items)
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INT:
            return value
    elif kind is str:
        if isinstance(value, str) and value and (blank or value.strip()) and _is_unicode(value):
            return value
    elif isinstance(value, kind):
        return value
    raise ConfigError(key, value, f"expected {describe(hint)}{_nearest_choice(value, kind)}")


def describe(hint: Any) -> str:
    """What a field of this type takes, for messages and --help."""
    kind, optional = _split_optional(hint)
    if get_origin(kind) is Literal:
        text = " | ".join(get_args(kind))
    elif get_origin(kind) is tuple:
        text = {str: "text or a list of texts", float: "a number or a list of numbers"}[get_args(kind)[0]]
    else:
        text = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[kind]
    return f"{text} or none" if optional else text


def toml_value(value: object) -> str:
    """A typed value as TOML; None, which TOML lacks, as "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`."""
    return max(known, key=lambda candidate: SequenceMatcher(None, name.lower(), candidate).ratio())


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """(T, True) of `T | None`, (T, False) of any other T."""
    if isinstance(hint, UnionType):
        (kind,) = (arg for arg in get_args(hint) if arg is not NoneType)
        return kind, True
    return hint, False


def _parse_list(key: str, text: str, item_hint: Any) -> list[object]:
    """Items separated by commas, or a TOML list where an item holds a comma itself."""
    if not text.startswith("["):
        return [parse_text(key, item.strip(), item_hint) for item in text.split(",")]
    try:
        items = tomllib.loads(f"list = {text}")["list"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(key, text, 'starts like a list but is none; write ["a", "b"] or a,b') from error
    if not isinstance(items, list):
        raise ConfigError(key, text, 'starts like a list but is none; write ["a", "b"] or a,b')
    return items


def _nearest_choice(value: object, kind: Any) -> str:
    if get_origin(kind) is not Literal or not isinstance(value, str):
        return ""
    return f"; did you mean {nearest(value, get_args(kind))}?"


def _is_unicode(text: str) -> bool:
    """False for a path with bytes that are not UTF-8: it could be written neither to config.toml nor to JSON."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
