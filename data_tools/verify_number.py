"""Which number does a text give as its answer, and is it the right one? English, Persian and Chinese, exact fractions.

Where the answer is read, strongest first: the last of `\\boxed{}`, `#### 42`, {"answer": 42} and sentences such as "the
answer is 42", پاسخ برابر ۴۲ است, 答案是42; else the last sentence with a number in it, if it holds one number or an "="
(then what follows the last one). Several different numbers as one answer ("3 or 4", two boxes in one paragraph) and
an expression that is not worked out ("2\\sqrt{3}", "3 + 4") are `invalid`, and so is a number in words.

How a number is read: 1,234.5 and 1 234 are thousands; 1.234,5 and 3,14 have a decimal comma; 1.234 is a decimal and
1,234 is thousands. A slash is a fraction, 1 1/2 is one and a half; million, هزار and 万 multiply; units and currencies
are passed over. A percentage equals its number and its hundredth part (25% is 25 and 0.25).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from data_tools.errors import UserError
from data_tools.verify_result import Verdict, invalid
from data_tools.verify_text import MAX_STATEMENTS, boxed, denied, final_part, normalise

DEFAULT_REL_TOL = 1e-6
MAX_DIGITS = 400  # more are no answer; and an exponent of a million digits must not be worked out
MAX_EXPONENT = 400

GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?"
DECIMAL_COMMA = r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?: \d{3})+,\d+(?!,)|0,\d+(?!,\d)|\d+,(?:\d{1,2}|\d{4,})(?![,\d])"
PLAIN = rf"(?:{DECIMAL_COMMA}|{GROUPED}|\d{{1,3}}(?:'\d{{3}})+(?:\.\d+)?|\d{{1,3}}(?:\.\d{{3}}){{2,}}(?!\d)|"
PLAIN += r"\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
FRACTION = r"\\[dt]?frac\s*(?:\{\s*(-?[\d., ]+?)\s*\}\s*\{\s*([\d., ]+?)\s*\}|(\d)\s*(\d))"
POWER = r"\s*(?:\\times|\\cdot|×|x|·|\*)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))"
CURRENCY = r"(?:US\$|USD|EUR|GBP|RMB|CNY|HK\$|[$€£¥₹]|Rs\.?)"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-+]\s?|(?:\b(?:minus|negative)|منفی|负)\s*)?(?:{CURRENCY}\s*)?(?P<sign2>-)?"
    rf"(?:(?P<whole>\d+)\s*{FRACTION}|{FRACTION}|(?P<mixed>\d+)(?: and)? (?P<num>\d+)/(?P<den>\d+)(?![\d/])"
    rf"|(?P<over>{PLAIN})\s?/\s?(?P<under>\d[\d.]*)(?![\d/])"
    rf"|10\s?(?:\^|\*\*)\s*(?:\{{\s*(?P<ten>[-+]?\d+)\s*\}}|(?P<ten2>[-+]?\d+))"
    rf"|(?P<plain>{PLAIN})(?:[eE](?P<exp>[-+]?\d+)(?!\w)|{POWER})?)",
    re.IGNORECASE,
)
SCALES = (
    (re.compile(r"\s*(?:million|mio\.?|میلیون|百万)(?![a-z])", re.IGNORECASE), 10**6),
    (re.compile(r"\s*(?:billion|میلیارد|十亿)(?![a-z])", re.IGNORECASE), 10**9),
    (re.compile(r"\s*(?:trillion|万亿)(?![a-z])", re.IGNORECASE), 10**12),
    (re.compile(r"\s*(?:thousand|هزار)(?![a-z])", re.IGNORECASE), 10**3),
    (re.compile(r"\s*亿"), 10**8),
    (re.compile(r"\s*万"), 10**4),
    (re.compile(r"\s*千(?![克米瓦卡赫焦伏帕])"), 10**3),
)
PERCENT = re.compile(r"\s*(?:%|\bper ?cent\b|درصد)", re.IGNORECASE)
PERCENT_BEFORE = re.compile(r"百分之\s*$")
EXPRESSION_AFTER = re.compile(
    r"\s*(?:\\sqrt|√|\\?pi(?![a-z])|π|\^|!(?=\s*$)|\\overline|(?:\+|\*|×|÷|\\times|\\cdot|\\div|\s-\s|/)\s*[\d(\\])"
)
EXPRESSION_BEFORE = re.compile(
    r"(?:√|\\sqrt\s*\{?|\^\{?|\\(?:log|ln|sin|cos|tan)\s*|\d\s*(?:\+|\*|×|÷|\\times|\\cdot)\s*)$"
)
DENIED_BEFORE = re.compile(r"(?:\bnot|n't|不是|(?<!\w)نه)\s*$", re.IGNORECASE)
TAKEN_WORD = re.compile(r"(?:[A-Za-z_]|[A-Za-z]-|第)$")
ORDINAL_AFTER = re.compile(r"(?:st|nd|rd|th)\b", re.IGNORECASE)

LEADS = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        r"\b(?:ans(?:wer)?|result|solution)s?\b[\"']?(?: (?:to|for|of|in) (?:the |this |that "
        r"|your |my )?\w+(?: \d+)?| here)?\s*(?:is|are|was|'s|(?:would|should|must|will) be|=|:|[-=]?>|→|⇒)",
        r"####",
        r"(?<!\w)(?:پاسخ|جواب|نتیجه)(?:\s+(?:ی|صحیح|درست|نهایی|من|این|سوال|پرسش|مسئله|مساله|برای|ما))*\s*"
        r"(?:عبارت است از|برابر است با|برابر با|برابر|می شود|میشود|است|:|=|,|یعنی)?(?=\W)",
        r"(?<!\w)(?:الاجابه|الجواب|الناتج|الحل)(?:\s+(?:الصحیحه|الصحیح|النهائیه|النهایی|هو|هی))*\s*:?",
        r"(?:答案?|结果)(?:应该|应当|应|就)?(?:是|为|等于|:|=)+|答[:,]",
    )
)
SENTENCE_STOP = re.compile(r"[.!?](?=\s|$)|[。！？;]|\n")
JOINED = re.compile(
    r"(?:[^\d.\n]{0,20}?(?:\band\b|\bor\b|(?<!\w)(?:و|یا|او)(?!\w)|[和或与、])|\s*[,:]|\s*(?:to|-|~)\s?)[^\d.\n]{0,12}?(?=-?[\d\\.$€£¥])",
    re.IGNORECASE,
)
CORRECTION = re.compile(
    r"\b(?:wait|however|actually|sorry|correction|mistake|re-?(?:check|calculat)\w*|instead|let me)\b"
    r"|(?<!\w)(?:نه|صبر|اصلاح|اما|ولی|بلکه|ببخشید)(?!\w)|等等|不对|更正|重新|抱歉|然而",
    re.IGNORECASE,
)
LIST_MARK = re.compile(r"^\s*(?:\(?\d+[.)](?=\s)|step \d+\W|第\S+步\W?)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as read: its exact value, whether a percent sign went with it, and its place in the text."""

    value: Fraction
    percent: bool
    start: int
    end: int


class _NotANumber(Exception):
    """Something that looks like the answer and is no single number."""


def verify_number(text: str, gold: str | int | float, *, rel_tol: float = DEFAULT_REL_TOL) -> Verdict:
    """Whether `text` ends in the number `gold`. `extracted` is that number as `show_number` writes it.

    rel_tol: allowed |answer - gold| / |gold|; 0 compares exact fractions.
    Raises UserError for a gold that is no number.
    """
    right = parse_number(str(gold))
    if right is None:
        raise UserError(f"gold {gold!r} is no number")
    body = final_part(text)
    if body is None:
        return invalid("the text ends inside its thinking")
    try:
        number, why = find_number(_spelt(body))
    except _NotANumber as problem:
        return invalid(str(problem))
    same = any(_close(a, b, rel_tol) for a in _meanings(number) for b in _meanings(right))
    return Verdict("correct" if same else "wrong", show_number(number), why)


def parse_number(text: str) -> Number | None:
    """The number that a short text is, units and currency aside; None when it is none or more than one."""
    spelt = _spelt(text).strip()
    try:
        number, _ = _first(spelt, 0, len(spelt))
    except _NotANumber:
        return None
    return number


def _spelt(text: str) -> str:
    return normalise(text).replace("{,}", ",")


def show_number(number: Number) -> str:
    """A whole number, a short decimal, or a fraction: the same value is always written the same way."""
    value, sign = number.value, "%" if number.percent else ""
    if value.denominator == 1:
        return f"{value.numerator}{sign}"
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest == 1 and value.denominator < 10**12:
        digits = next(d for d in range(1, 41) if (value * 10**d).denominator == 1)
        scaled = f"{abs(value) * 10**digits}".rjust(digits + 1, "0")
        return f"{'-' if value < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}{sign}"
    return f"{value}{sign}"


def find_number(text: str) -> tuple[Number, str]:
    """The number that a normalised text gives as its answer, and where it was read. Raises _NotANumber."""
    found = sorted(_statements(text), key=lambda item: item[0])
    if not found:
        return _unstated(text)
    _, start, end, whole = found[-1]
    last, said = _first(text, start, end, whole=whole)
    for _, other_start, other_end, other_whole in found[-MAX_STATEMENTS:-1]:
        between = text[other_end:start]
        if other_end > start or "\n\n" in between or CORRECTION.search(between):
            continue
        try:
            other, _ = _first(text, other_start, other_end, whole=other_whole)
        except _NotANumber:
            continue
        if not any(_close(a, b, DEFAULT_REL_TOL) for a in _meanings(other) for b in _meanings(last)):
            raise _NotANumber(f"gives several different numbers: {show_number(other)} and {show_number(last)}")
    return last, f"statement: {said!r}"


def _meanings(number: Number) -> tuple[Fraction, ...]:
    return (number.value, number.value / 100) if number.percent else (number.value,)


def _close(a: Fraction, b: Fraction, rel_tol: float) -> bool:
    return abs(a - b) <= Fraction(rel_tol) * abs(b)


def _statements(text: str) -> list[tuple[int, int, int, bool]]:
    """(position, start, end, whole?) of each stretch of text that is said to be the answer and has a number in it.

    whole: the stretch is nothing but the answer (a box), so that what is no number there must not be passed over.
    """
    found = [(start, end - len(content) - (text[end - 1] == "}"), end, True) for start, end, content in boxed(text)]
    for lead in LEADS:
        for match in lead.finditer(text):
            end = _stop(text, match.end())
            taken_by_box = any(match.end() <= start < end for start, _, _, whole in found if whole)
            if taken_by_box or denied(text, match.start()) or not re.search(r"\d", text[match.end() : end]):
                continue
            found.append((match.end(), match.end(), end, False))
    return found


def _stop(text: str, start: int) -> int:
    """The end of the sentence from `start`; a line break right after the lead is none."""
    begin = start + len(text[start:]) - len(text[start:].lstrip(" \n:"))
    match = SENTENCE_STOP.search(text, begin)
    return match.start() if match else len(text)


def _unstated(text: str) -> tuple[Number, str]:
    """The number of the last line, or of its last sentence, that has one; several without "=" are no answer."""
    blank = LIST_MARK.sub(lambda match: " " * len(match.group()), text)
    lines = [(m.start(), m.end()) for m in re.finditer(r"[^\n]+", blank) if NUMBER.search(m.group())]
    if not lines:
        raise _NotANumber("no number found")
    start, end = lines[-1]
    for stop in SENTENCE_STOP.finditer(blank, start, end):
        if any(_numbers(blank, stop.end(), end)):
            start = stop.end()
    if not _numbers(blank, start, end):
        raise _NotANumber("no number found")
    values = {_value(number) for number in _numbers(blank, start, end)}
    if len(values) > 1 and not re.search(r"[=≈]", blank[start:end]):
        raise _NotANumber("states no answer, and its last sentence with numbers has several different ones")
    number, said = _first(blank, start, end)
    return number, f"last number: {said!r}"


def _value(number: Number) -> tuple[Fraction, bool]:
    return number.value, number.percent


def _first(text: str, start: int, end: int, *, whole: bool = False) -> tuple[Number, str]:
    """The answer within text[start:end]: the first number after the last "=", else the first number of all."""
    equals = [m.end() for m in re.finditer(r"[=≈]", text[start:end])]
    said = " ".join(text[start:end].split())[:60]
    for begin in [start + offset for offset in reversed(equals)] + [start]:
        numbers = _numbers(text, begin, end)
        numbers = [n for n in numbers if not DENIED_BEFORE.search(_before(text, begin, n.start))] or numbers
        if numbers:
            break
    else:
        raise _NotANumber(f"no number in {said!r}")
    number = numbers[0]
    before, after = _before(text, start, number.start), text[number.end : end]
    if EXPRESSION_AFTER.match(after) or EXPRESSION_BEFORE.search(before) or (whole and "\\sqrt" in text[start:end]):
        raise _NotANumber(f"an expression that is not worked out: {said!r}")
    for other in numbers[1:2]:
        joined = JOINED.match(text, number.end, end)
        if joined and joined.end() >= other.start - 2 and _value(other) != _value(number):
            raise _NotANumber(f"gives several different numbers: {said!r}")
    return number, " ".join(text[number.start : number.end].split())


def _before(text: str, start: int, position: int) -> str:
    """The last characters before `position`: as many as any pattern for them needs."""
    return text[max(start, position - 20) : position]


def _numbers(text: str, start: int, end: int) -> list[Number]:
    """Every number in text[start:end]; digits that belong to a word (B12, COVID-19, 3rd) are none."""
    found: list[Number] = []
    position = start
    while match := NUMBER.search(text, position, end):
        position = max(match.end(), position + 1)
        digits = re.search(r"[\d.\\]", match.group())
        if (
            TAKEN_WORD.search(_before(text, start, match.start()))
            and not match["sign2"]
            and match.group()[:1] not in "$€£¥₹"
        ):
            continue
        if ORDINAL_AFTER.match(text, match.end(), end) or digits is None:
            continue
        value = _exact(match)
        if value is None:
            continue
        stop = match.end()
        for pattern, factor in SCALES:
            scaled = pattern.match(text, stop, end)
            if scaled:
                value, stop = value * factor, scaled.end()
                break
        sign = PERCENT.match(text, stop, end)
        percent = bool(sign or PERCENT_BEFORE.search(_before(text, start, match.start())))
        found.append(Number(value, percent, match.start(), sign.end() if sign else stop))
        position = max(position, found[-1].end)
    return found


def _exact(match: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER, exact; None for a zero denominator and for numbers too long to be answers."""
    groups = match.groupdict()
    if len(match.group()) > MAX_DIGITS:
        return None
    negative = bool(groups["sign"] and "+" not in groups["sign"]) != bool(groups["sign2"])
    # The fractions' groups have no names, since FRACTION stands twice: four each, in the order of the pattern.
    unnamed = [text for index, text in enumerate(match.groups(), 1) if index not in match.re.groupindex.values()]
    parts = [text for text in unnamed[:8] if text]
    power = next((text for text in unnamed[8:] if text), groups["exp"])
    try:
        if parts:
            value = Fraction(_decimal(parts[0])) / Fraction(_decimal(parts[1]))
            whole = int(groups["whole"] or 0)
            value = whole + value
        elif groups["mixed"]:
            value = int(groups["mixed"]) + Fraction(int(groups["num"]), int(groups["den"]))
        elif groups["over"]:
            value = Fraction(_decimal(groups["over"])) / Fraction(_decimal(groups["under"]))
        else:
            power = power or groups["ten"] or groups["ten2"]
            value = Fraction(_decimal(groups["plain"] or "1"))
            if power:
                if abs(int(power)) > MAX_EXPONENT:
                    return None
                value *= Fraction(10) ** int(power)
    except (ZeroDivisionError, ValueError):
        return None
    return -value if negative else value


def _decimal(text: str) -> str:
    """Digits with at most one point: thousands marks removed, a decimal comma turned into a point."""
    text = text.replace(" ", "").replace("'", "")
    comma, point = text.rfind(","), text.rfind(".")
    if re.fullmatch(GROUPED, text) and not text.startswith("0,"):
        text = text.replace(",", "")
    elif comma > point:
        text = text.replace(".", "").replace(",", ".")
    elif text.count(".") > 1:
        text = text.replace(".", "")
    return text.rstrip(".")
