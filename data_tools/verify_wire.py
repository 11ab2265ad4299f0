"""Plain data as JSON, between the tests and the tested program, which run in two processes.

What the program returns arrives as numbers, strings, lists and so on of exact built-in types: a value whose `==` always
says yes cannot cross. Anything else crosses as a reference: the other side gets an object to call and to ask for
attributes. Only the standard library; the tested program's process gets this file as source.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import types
from collections.abc import Callable, Iterator
from typing import Any

MAX_ITEMS = 1_000_000  # taken from an iterator that the program returns
SMALL_INT = 1 << 53
SEQUENCES: dict[str, type] = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": collections.deque}
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
TIMES: dict[str, Any] = {"dt": datetime.datetime, "da": datetime.date, "ti": datetime.time}


def encode(value: Any, refer: Callable[[Any], list[Any]]) -> Any:
    """`value` as JSON data; `refer` gives the reference for what is not plain. Subclasses become their plain base."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -SMALL_INT < number < SMALL_INT else ["i", hex(number)]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return ["f", float.hex(value)]
    for tag, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, [encode(item, refer) for item in kind.__iter__(value)]]  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return ["d", [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]]
    return _encode_rare(value, refer)


def _encode_rare(value: Any, refer: Callable[[Any], list[Any]]) -> Any:
    if isinstance(value, bytes | bytearray):
        return ["b", bytes(value).hex()]
    if isinstance(value, complex):
        return ["c", value.real.hex(), value.imag.hex()]
    if type(value) is range:
        return ["r", [hex(part) for part in (value.start, value.stop, value.step)]]
    if isinstance(value, decimal.Decimal):
        return ["D", decimal.Decimal.__str__(value)]
    if isinstance(value, fractions.Fraction):
        return ["F", hex(value.numerator), hex(value.denominator)]
    for tag, kind in TIMES.items():
        if type(value) is kind:
            return [tag, kind.isoformat(value)]
    if isinstance(value, Iterator) and not isinstance(value, types.FunctionType):
        items = []
        for item in value:
            items.append(encode(item, refer))
            if len(items) > MAX_ITEMS:
                raise ValueError(f"an iterator of more than {MAX_ITEMS} items")
        return ["n", items]
    if type(value) in VIEWS:
        return ["l", [encode(item, refer) for item in value]]
    if type(value) is type:
        name = str(type.__getattribute__(value, "__name__"))
        if vars(builtins).get(name) is value:
            return ["k", name]
    return refer(value)


def decode(data: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """The value that `encode` wrote; `resolve` makes something of a reference. Raises ValueError for anything else."""
    if not isinstance(data, list):
        if data is None or isinstance(data, bool | int | str):
            return data
        raise ValueError("not a value")
    tag, rest = data[0], data[1:]
    if tag in SEQUENCES:
        return SEQUENCES[tag](decode(item, resolve) for item in rest[0])
    if tag == "d":
        return {decode(key, resolve): decode(item, resolve) for key, item in rest[0]}
    if tag == "n":
        return iter([decode(item, resolve) for item in rest[0]])
    if tag in TIMES:
        return TIMES[tag].fromisoformat(rest[0])
    if tag == "k" and isinstance(getattr(builtins, rest[0]), type):
        return getattr(builtins, rest[0])
    readers: dict[str, Callable[..., Any]] = {
        "i": lambda text: int(text, 16),
        "f": float.fromhex,
        "b": bytes.fromhex,
        "c": lambda real, imag: complex(float.fromhex(real), float.fromhex(imag)),
        "r": lambda parts: range(*(int(part, 16) for part in parts)),
        "D": decimal.Decimal,
        "F": lambda top, bottom: fractions.Fraction(int(top, 16), int(bottom, 16)),
    }
    if tag in readers:
        return readers[tag](*rest)
    return resolve(data)
