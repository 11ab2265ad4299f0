"""An answer cut into steps: by lines, sentences, a pattern, or a program's statements. Pure functions of the text.

Steps are pieces of the text itself: put together they are the text again, character by character, so that the beginning
of an answer up to any step is one that a model could have written. In the white space between two steps the cut comes
after the last line break, or before the first space where there is none: that is where tokenizers begin new tokens.
A piece that is only white space belongs to the one before it. What a step is worth is not judged here (`rollouts`).
"""

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from data_tools.errors import UserError

Unit = Literal["line", "sentence", "regex", "code"]
UNITS: tuple[Unit, ...] = get_args(Unit)

CLOSING = "\"'”’»)\\]}）」』】›*_"
SENTENCE_END = re.compile(rf"(?P<wide>[。！？｡]+[{CLOSING}]*)|(?P<mark>[.!?؟۔…]+[{CLOSING}]*)(?=\s)")
"""Chinese marks end a sentence wherever they stand, the others before white space (so 3.5 and x.py end none)."""
TITLES = {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "e.g", "i.e", "cf", "fig", "figs", "eq", "approx", "resp"}
TITLES |= {"ca", "viz", "ر.ک", "ق.م", "ه.ش", "ه.ق"}
"""Abbreviations in the middle of a sentence whatever follows; others (etc., a.m., Inc.) only before a small letter."""
NUMBERED = {"no", "nos", "p", "pp", "sec", "ch", "vol"}
"""Abbreviations before a number only: "No. 5", but "No. That is wrong"."""
LAST_WORD = re.compile(r"[^\s\"'“‘(\[（«]+$")
LIST_MARK = re.compile(r"\s*[*_#]*\(?(?:\d{1,3}|[A-Za-z])$")
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(?P<body>.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)

ANSWER_LINE = re.compile(
    r"\s*(?:[#>*_\s]|\\\[)*(?:"
    r"####"
    r"|(?:(?:so|thus|therefore|hence|finally)\b[,:\s]*)?(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|best)\s+)*"
    r"(?:answer|option)\b[^.\n]{0,40}?(?:\bis\b|\bare\b|:|=)"
    r"|\\boxed\b|<answer>"
    r"|(?:(?:پس|بنابراین|در\s?نتیجه)[،,:\s]*)?(?:پاسخ|جواب|گزینه)(?=\W)"
    r"|(?:(?:所以|因此|故)[，,:：]?)?(?:最终|正确)*(?:的)?(?:答案?|选项)\s*(?:应该|应|就)?(?:是|为|选|：|:|=)"
    r"|(?:所以|因此|故)[，,]?(?:应)?选"
    r")",
    re.IGNORECASE,
)
"""How a line that only says the answer begins, in English, Persian and Chinese."""


@dataclass(frozen=True, slots=True)
class Steps:
    """steps: pieces that follow one another; rest: what is behind the last one ("" or the line with the answer)."""

    steps: tuple[str, ...]
    rest: str = ""

    def prefix(self, step: int) -> str:
        """The text up to the end of a step, counted from 0."""
        return "".join(self.steps[: step + 1])


def split_steps(
    text: str, unit: Unit, *, pattern: re.Pattern[str] | None = None, answer_line: re.Pattern[str] | None = None
) -> Steps:
    """Cut a text. pattern, for unit regex: each match ends a step. answer_line: pieces at the end that begin like this
    are no steps but the rest. Raises UserError for unit regex without a pattern."""
    if unit == "regex" and pattern is None:
        raise UserError("steps by regex need a pattern")
    if unit == "code":
        cuts: Iterator[int] = _code_cuts(text)
    elif unit == "regex" and pattern is not None:
        cuts = (match.end() for match in pattern.finditer(text))
    else:
        cuts = _line_cuts(text) if unit == "line" else _sentence_cuts(text)
    pieces = _pieces(text, cuts)
    kept = len(pieces)
    while answer_line is not None and kept and answer_line.match(pieces[kept - 1]):
        kept -= 1
    return Steps(tuple(pieces[:kept]), "".join(pieces[kept:]))


def compiled(pattern: str, option: str) -> re.Pattern[str]:
    """A user's pattern; ^ and $ are those of lines. Raises UserError that names the option."""
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise UserError(f"{option} {pattern!r}: is no regular expression ({error})") from None


def _pieces(text: str, cuts: Iterator[int]) -> list[str]:
    """The text cut there, without pieces of white space alone."""
    pieces: list[str] = []
    start = 0
    for cut in [*sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]:
        piece = text[start:cut]
        if piece.strip():
            pieces.append(piece)
        elif pieces:
            pieces[-1] += piece
        else:  # white space before the first step: it begins it
            continue
        start = cut
    return pieces


def _between(text: str, position: int) -> int:
    """Where to cut in the white space that begins at `position`."""
    end = position
    while end < len(text) and text[end].isspace():
        end += 1
    line_break = max(text.rfind("\n", position, end), text.rfind("\r", position, end))
    return position if line_break < 0 else line_break + 1


def _line_cuts(text: str) -> Iterator[int]:
    for match in re.finditer(r"[^\S\r\n]*[\r\n]", text):
        yield _between(text, match.start())


def _sentence_cuts(text: str) -> Iterator[int]:
    start = 0
    ends = [*SENTENCE_END.finditer(text), *re.finditer(r"[^\S\r\n]*[\r\n]", text)]
    for match in sorted(ends, key=lambda end: end.start()):
        if match.start() < start:
            continue
        marked = match.re is SENTENCE_END
        if marked and match["mark"] is not None and _goes_on(text, start, match):
            continue
        start = _between(text, match.end() if marked else match.start())
        yield start


def _goes_on(text: str, start: int, end: re.Match[str]) -> bool:
    """Whether the mark, with white space behind it, is within a sentence: an abbreviation, the number of an item."""
    after = text[end.end() :].lstrip()[:1]
    if end["mark"].strip(CLOSING + "\\") == "…" or end["mark"].startswith(".."):
        return after.islower()
    if not end["mark"].startswith("."):
        return False
    before = text[start : end.start()]
    if LIST_MARK.fullmatch(before):
        return True
    found = LAST_WORD.search(before)
    word = found.group().lower() if found else ""
    return word in TITLES or after.islower() or (word in NUMBERED and after.isdecimal())


def _code_cuts(text: str) -> Iterator[int]:
    """Of the first fenced block, else of the whole text. What stands around the block goes with its ends."""
    fence = FENCE.search(text)
    start, end = fence.span("body") if fence else (0, len(text))
    body = text[start:end]
    offsets = [0]
    for line in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n)", body):
        offsets.append(line.end())
    tree = _parsed(body)
    lines = list(_statement_lines(tree.body, body)) if tree is not None else list(_block_lines(body))
    for line in lines:
        yield start + offsets[line]


def _parsed(program: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the program's own strings
            return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _statement_lines(body: Sequence[ast.stmt], program: str) -> Iterator[int]:
    """Lines, counted from 0, at which a statement of a module, function or class follows another one of the same block.

    The first statement of a function goes with the line of its name, what is within a loop or branch with its head, and
    comments right before a statement with it.
    """
    lines = re.split(r"\r\n|\r|\n", program)
    for index, statement in enumerate(body):
        if index:
            first = min([statement.lineno, *(own.lineno for own in getattr(statement, "decorator_list", ()))]) - 1
            last = body[index - 1].end_lineno or first
            while first > last and lines[first - 1].lstrip().startswith("#"):
                first -= 1
            if first >= last:
                yield first
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statement_lines(statement.body, program)


def _block_lines(program: str) -> Iterator[int]:
    """Lines that follow a blank one."""
    lines = re.split(r"\r\n|\r|\n", program)
    for index in range(1, len(lines)):
        if lines[index].strip() and not lines[index - 1].strip():
            yield index
