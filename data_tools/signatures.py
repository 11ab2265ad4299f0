"""What makes two answers the same path: the sequence of calculations, of words, or of a program's tokens.

    math   the calculations in their order: those in <<...>> where the text has any (GSM8K's way), else what stands
           around "=" in it; numbers in one spelling, units and words left out. An answer without any is compared by
           its words. 2 + 3 and 3 + 2 are two paths: nothing is worked out.
    text   the words, in one spelling (verify_text), case and punctuation left out
    code   Python's tokens without comments, docstrings and layout; of a fenced block where there is one

Which of two equal answers stays is decided in `dedup`. `wrong_calculations` checks what stands in <<...>>.
"""

import io
import re
import tokenize
import unicodedata
from fractions import Fraction
from typing import Literal, get_args

from data_tools.steps import FENCE
from data_tools.verify_text import ONE_SPELLING, normalise

Kind = Literal["math", "text", "code"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Signature = tuple[str, ...]

CALCULATION = re.compile(r"<<([^<>\n]{1,400}?)>>")
NUMBER = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
TOKEN = re.compile(
    rf"(?P<number>{NUMBER})|(?P<op>\*\*|//|[-+*/^%()])|(?P<equals>=)|(?P<money>[$€£¥])|(?P<word>[^\W\d_]+)"
)
TIMES = re.compile(r"\\times|\\cdot|[×·∙]|(?<=[\d)%])\s*[xX]\s*(?=[\d(.$])|(?<=\w)\s+[xX]\s+(?=[\d(.$])")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
BULLET = re.compile(r"^[^\S\n]*(?:[-*•+]|\(?\d{1,2}[.):])[^\S\n]+", re.MULTILINE)
MAX_UNIT_WORDS = 3
"""Words after a number that are taken for its unit: "3 pages * 2 hours per page = 6 hours"."""
MAX_EXPONENT = 64
DROPPED = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


def signature(text: str, kind: Kind) -> Signature:
    """What equal paths have in common."""
    if kind == "code":
        return ("code", *code_tokens(text))
    found = calculations(text) if kind == "math" else ()
    return ("math", *found) if found else ("text", *words(text))


def words(text: str) -> list[str]:
    """Words and numbers in one spelling."""
    return re.findall(r"\w+", normalise(text).casefold())


def calculations(text: str) -> tuple[str, ...]:
    """Every calculation as one string without spaces, like "3*2=6"."""
    spelt = _spelt(text)
    marked = CALCULATION.findall(spelt)
    found = ["".join(_tokens(own)) for own in marked] if marked else _around_equals(BULLET.sub("", spelt))
    return tuple(own for own in found if own)


def wrong_calculations(text: str) -> list[str]:
    """What stands in <<...>> and is not so: "2*3=7", or something that cannot be worked out.

    A value may be rounded to the digits that it shows: <<10/3=3.33>> is right, <<10/3=3.3333>> too.
    """
    return [own for own in CALCULATION.findall(_spelt(text)) if not _holds(own)]


def code_tokens(text: str) -> list[str]:
    """Tokens of a program; of one that Python cannot read, words and marks without comments."""
    fence = FENCE.search(text)
    program = fence["body"] if fence else text
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(program).readline))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return re.findall(r"\w+|[^\w\s]", re.sub(r"#.*", "", program))
    kept = [token for token in tokens if token.type not in DROPPED]
    found: list[str] = []
    for index, token in enumerate(kept):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            found.append(tokenize.tok_name[token.type])
        elif token.type == tokenize.NEWLINE:
            found += ["NEWLINE"] if found and found[-1] not in ("NEWLINE", "INDENT", "DEDENT") else []
        elif not _is_docstring(kept, index):
            found.append(token.string)
    return found


def _is_docstring(tokens: list[tokenize.TokenInfo], index: int) -> bool:
    """A string that is a line by itself says nothing to Python, wherever it stands."""
    starts = index == 0 or tokens[index - 1].type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    ends = index + 1 == len(tokens) or tokens[index + 1].type == tokenize.NEWLINE
    return tokens[index].type == tokenize.STRING and starts and ends


def _spelt(text: str) -> str:
    spelt = unicodedata.normalize("NFKC", text.translate(ONE_SPELLING)).translate(ONE_SPELLING)
    return TIMES.sub("*", FRACTION.sub(r"(\1)/(\2)", spelt))


def _tokens(text: str) -> list[str]:
    """Numbers and operators of a short text; words and currencies left out."""
    kept = (match for match in TOKEN.finditer(text) if match.lastgroup in ("number", "op", "equals"))
    return [_one_number(match.group()) if match.lastgroup == "number" else match.group() for match in kept]


def _one_number(text: str) -> str:
    value = Fraction(text.replace(",", ""))
    return str(value.numerator) if value.denominator == 1 else str(float(value))


def _around_equals(text: str) -> list[str]:
    """The stretches of numbers and operators that have an "=" in them and something on both its sides. Linear."""
    found: list[str] = []
    run: list[str] = []
    last, units, before = "", 0, 0
    for match in TOKEN.finditer(text):
        kind, between = str(match.lastgroup), text[before : match.start()]
        before = match.end()
        after_number = last in ("number", "unit") and not between.strip() and "\n" not in between
        per_unit = kind == "word" and last == "op" and run[-1] == "/"  # 30 km/hour
        if kind == "word" and (per_unit or (after_number and units < MAX_UNIT_WORDS)):
            if per_unit:
                run.pop()
            last, units = "unit", units + 1
            continue
        goes_on = not between.strip() and "\n" not in between and kind != "word"
        if not goes_on or (kind == "number" and last in ("number", "unit")):
            found += _equation(run)
            run, last, units = [], "", 0
        if kind in ("number", "op", "equals"):
            run.append(_one_number(match.group()) if kind == "number" else match.group())
            last, units = kind, 0
    return found + _equation(run)


def _equation(run: list[str]) -> list[str]:
    """The stretch as one string, if it is an equation, else nothing."""
    sides = [_balanced(side) for side in "".join(run).lstrip("=+*/^%)").rstrip("=+-*/^(").split("=")]
    return ["=".join(sides)] if len(sides) > 1 and all(any(map(str.isdigit, side)) for side in sides) else []


def _balanced(side: str) -> str:
    """Without a parenthesis at an end that nothing closes: of a calculation in parentheses."""
    while side.count("(") > side.count(")") and side.startswith("("):
        side = side[1:]
    while side.count(")") > side.count("(") and side.endswith(")"):
        side = side[:-1]
    return side


class _NoNumber(Exception):
    """An expression that cannot be worked out."""


def _holds(calculation: str) -> bool:
    sides = re.sub(r"[\s$€£¥]|(?<=\d),(?=\d{3})", "", calculation).split("=")
    if len(sides) < 2:
        return False
    try:
        values = [_Expression(side).value() for side in sides]
    except _NoNumber:
        return False
    pairs = zip(values, values[1:], sides[1:], strict=False)
    return all(left == right or abs(left - right) < _rounding(side) for left, right, side in pairs)


def _rounding(side: str) -> Fraction:
    """How far off a value may be: less than one in its last digit (cut off or rounded). Whole numbers: not at all."""
    match = re.fullmatch(r"-?\d*\.(\d+)(%?)", side)
    if match is None:
        return Fraction(0)
    return Fraction(1, 10 ** len(match[1])) / (100 if match[2] else 1)


class _Expression:
    """Numbers with + - * / // ^ ** % and parentheses, in exact fractions; 20% is a fifth."""

    def __init__(self, text: str) -> None:
        self.tokens = [match.group() for match in TOKEN.finditer(text) if match.lastgroup in ("number", "op")]
        if "".join(self.tokens) != text:
            raise _NoNumber
        self.place = 0

    def value(self) -> Fraction:
        try:
            found = self._sum()
        except (ZeroDivisionError, RecursionError):
            raise _NoNumber from None
        if self.place < len(self.tokens):
            raise _NoNumber
        return found

    def _next(self, *wanted: str) -> str | None:
        if self.place < len(self.tokens) and self.tokens[self.place] in wanted:
            self.place += 1
            return self.tokens[self.place - 1]
        return None

    def _sum(self) -> Fraction:
        total = self._product()
        while op := self._next("+", "-"):
            right = self._product()
            total = total + right if op == "+" else total - right
        return total

    def _product(self) -> Fraction:
        total = self._power()
        while op := self._next("*", "/", "//"):
            right = self._power()
            total = total * right if op == "*" else total / right if op == "/" else Fraction(total // right)
        return total

    def _power(self) -> Fraction:
        if self._next("-"):
            return -self._power()
        self._next("+")
        base = self._atom()
        if self._next("^", "**"):
            exponent = self._power()
            if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT or len(str(base)) > MAX_EXPONENT:
                raise _NoNumber
            return base**exponent.numerator
        return base

    def _atom(self) -> Fraction:
        if self._next("("):
            found = self._sum()
            if not self._next(")"):
                raise _NoNumber
        elif self.place < len(self.tokens) and self.tokens[self.place][-1].isdigit():
            found = Fraction(self.tokens[self.place])
            self.place += 1
        else:
            raise _NoNumber
        return found / 100 if self._next("%") else found
