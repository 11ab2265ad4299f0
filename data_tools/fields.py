"""Replies in fields: `<question>...</question>`, as prompts ask for them and as they are read back.

A field's two tags hold its text, each field once; what stands outside of all fields is passed over, so that a model may
say a word before and after. Nothing else is forgiven: a field that is missing, empty, there twice or inside another, or
whose end is missing (the reply was cut off) makes the reply unreadable. Only the names that are asked for are tags: any
other `<x>` is text.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from data_tools.verify_text import THINK_END, THINK_START


class BadReply(ValueError):
    """A reply that is not what was asked for; `str()` says why, in words that can be counted."""


def write_fields(values: Mapping[str, str]) -> str:
    """The fields as a prompt shows them, one below the other."""
    return "\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in values.items())


def read_fields(text: str, names: Sequence[str], *, optional: Collection[str] = ()) -> dict[str, str]:
    """The fields of a reply, in the order of `names`, without white space around them. Raises BadReply."""
    tag = re.compile("<(/?)(" + "|".join(map(re.escape, names)) + ")>")
    found: dict[str, str] = {}
    inside: tuple[str, int] | None = None
    for match in tag.finditer(without_thinking(text)):
        name = match[2]
        if match[1]:
            if inside is None or inside[0] != name:
                raise BadReply(f"an end without a beginning: {name}")
            found[name] = match.string[inside[1] : match.start()].strip()
            inside = None
        elif inside is not None:
            raise BadReply(f"a field inside another: {name}")
        elif name in found:
            raise BadReply(f"a field twice: {name}")
        else:
            inside = name, match.end()
    if inside is not None:
        raise BadReply(f"a field without end: {inside[0]}")
    for name in names:
        if not found.get(name) and (name in found or name not in optional):
            raise BadReply(f"a field {'empty' if name in found else 'missing'}: {name}")
    return {name: found[name] for name in names if name in found}


def without_thinking(text: str) -> str:
    """What follows `</think>`. Raises BadReply for a text that ends inside its thinking."""
    ends = list(THINK_END.finditer(text))
    if not ends and THINK_START.search(text):
        raise BadReply("ends inside its thinking")
    return text[ends[-1].end() :] if ends else text
