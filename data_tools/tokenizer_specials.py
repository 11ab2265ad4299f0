"""Control tokens that a text spells: found, marked before a template sees them, and cut apart from the template's own.

A row may say "<|im_end|>" without meaning the end of a turn. Such spellings are marked in the messages by a character
that the row does not use; after rendering, control tokens without a mark are the template's, and what lies between them
is text. Rows that spell no control token never come here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# White space as the `tokenizers` library sees it; Python also counts the separators 1c to 1f.
SPACE = r"[^\S\x1c-\x1f]*"
MARKS = range(0xE000, 0xF900)
"""Private-use characters: one that a row does not contain marks the spellings in it."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of text before any other rule.

    special: a control token (end of turn, BOS, ...), else a piece of text that is kept whole. lstrip, rstrip: it takes
    the white space before or after it with it. single_word: only where no letter or digit touches it. normalized: it is
    looked for after the text has been normalized (letter case, width, ...).
    """

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class ControlTokens:
    """The control tokens of a tokenizer as they stand in text."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self.ids = frozenset(i for i, token in tokens.items() if token.special)
        by_content = {token.content: token for token in tokens.values() if token.special and token.content}
        self._tokens = [by_content[content] for content in longest_first(by_content)]
        self._spelled = re.compile("|".join(re.escape(token.content) for token in self._tokens) or "(?!)")
        self._starts = re.compile(f"(?={self._spelled.pattern})")
        self._cut_at: dict[str, re.Pattern[str]] = {}

    def first(self, text: str) -> str | None:
        """The first control token that a text spells."""
        found = self._spelled.search(text)
        return None if found is None else found.group()

    def mark(self, text: str, mark: str) -> str:
        """The text with `mark` before everything that spells a control token, also where two overlap."""
        return self._starts.sub(mark, text)

    def cut(self, text: str, mark: str) -> list[tuple[str, bool]]:
        """A marked text as (part, is it a control token) in order; the white space a token takes is in its part."""
        if mark not in self._cut_at:
            patterns = [_pattern(token, mark) for token in self._tokens]
            self._cut_at[mark] = re.compile(f"({'|'.join(patterns) or '(?!)'})")
        return [(part, k % 2 == 1) for k, part in enumerate(self._cut_at[mark].split(text)) if part]


def longest_first(texts: Iterable[str]) -> list[str]:
    """Distinct texts, so ordered that an alternation of them finds the longest at each place."""
    return sorted(set(texts), key=lambda text: (-len(text), text))


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of one group that finds the longest of the texts at each place (nothing if there are none)."""
    choices = "|".join(map(re.escape, longest_first(texts)))
    return re.compile(f"({choices})" if choices else "((?!))")


def free_mark(texts: Iterable[str]) -> str:
    """A private-use character that none of the texts contains."""
    used = set().union(*texts)
    return next(chr(code) for code in MARKS if chr(code) not in used)


def _pattern(token: AddedToken, mark: str) -> str:
    """A pattern for a control token in marked text, where it is not one that a row spells."""
    before, after = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    left, right = (SPACE if takes else "" for takes in (token.lstrip, token.rstrip))
    return f"{left}(?<!{mark}){before}{re.escape(token.content)}{after}{right}"
