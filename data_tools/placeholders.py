"""`{name}` in a text of the user's, replaced by a value; `{{name}}` is `{name}` itself, other braces are left alone."""

import re
from collections.abc import Mapping
from typing import Any

PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")


def fill(text: str, values: Mapping[str, Any]) -> str:
    """`text` with its placeholders replaced, once: braces in a value stay. Raises KeyError for a name without value."""

    def value(match: re.Match[str]) -> str:
        if match[1] is not None:
            return "{" + match[1] + "}"
        found = values[match[2]]
        if found is None or isinstance(found, dict | list):
            raise KeyError(match[2])
        return str(found)

    return PLACEHOLDER.sub(value, text)


def names_in(text: str) -> set[str]:
    """The names that `fill` will ask for."""
    return {match[2] for match in PLACEHOLDER.finditer(text) if match[2] is not None}
