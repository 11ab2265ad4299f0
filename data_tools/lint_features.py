"""Numbers of a text that say how it is written, not what it says: in groups, for the lint's classifier.

    length       characters, words, lines, sentences, word length
    case         upper-case letters, words, beginnings
    punctuation  each kind of mark for each character
    language     scripts of letters and digits, joiners, letter forms
    format       Markdown, lists, LaTeX, tags, JSON, line breaks
    answer       which option letters are named, which is the last; how large the last number is
    ending       how the last characters look; end-of-text tokens that were left in the text

Words that one side alone has are `lint_phrases`. Shares are for each character, letter or line, so that a long text has
no more of anything for being long; but where both texts of a pair have as many of something, they are equal in it,
whatever their lengths: else every share would tell what length tells. Nothing here depends on a language; a script
without case has case features of 0.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

MARKS = {
    "full stops": ".。۔।",
    "commas": ",،，、",
    "colons": ":：",
    "semicolons": ";؛；",
    "exclamation marks": "!！",
    "question marks": "?？؟",
    "round brackets": "()（）",
    "square brackets": "[]【】",
    "straight quotes": "\"'",
    "typographic quotes": "“”‘’„«»「」『』",
    "hyphens": "-",
    "dashes": "–—―",
    "dots of ellipsis": "…",
    "slashes": "/\\",
    "signs of calculation": "+=*×÷<>^~",
    "percent and currency signs": "%٪$€£¥₹",
}
SCRIPTS = (
    "LATIN",
    "ARABIC",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "CYRILLIC",
    "GREEK",
    "DEVANAGARI",
    "HEBREW",
    "THAI",
)
LAYOUT = {
    "bullets": r"^[ \t]*[-*•·●][ \t]",
    "numbered lines": r"^[ \t]*[(（]?[\d۰-۹٠-٩]{1,2}[.)）、][ \t]?",
    "headings": r"^#{1,6} ",
    "bold": r"\*\*|__",
    "code": r"`",
    "table bars": r"\|",
    "LaTeX commands": r"\\[a-zA-Z]+|\\[()\[\]]",
    "dollar signs": r"\$",
    "tags": r"</?[a-zA-Z][\w-]*>",
    "double angle brackets": r"<<|>>",
    "JSON keys": r'"\w+"\s*:',
    "line breaks": r"\n",
    "blank lines": r"\n[ \t]*\n",
    "double spaces": r"  ",
    "links": r"https?://",
    "emoji": r"[\U0001f300-\U0001faff\u2600-\u27bf]",
    "digits": r"\d",
}
LAYOUT_PATTERNS = tuple(re.compile(pattern, re.MULTILINE) for pattern in LAYOUT.values())
SENTENCE_ENDS = ".!?。！？؟।"
END_TOKEN = re.compile(
    r"(?:</s>|<\|?(?:im_end|endoftext|eot_id|end_of_text|end|eos|eot|end_of_turn|end_of_sentence)\|?>|<｜end▁of▁sentence｜>"
    r"|\[(?:EOS|END)\]|\[/INST\])"
)
"""End-of-turn and end-of-text tokens as text; the template writes them itself."""
CAPITAL_LABEL = re.compile(r"(?<!\w)[A-E](?!\w)")
SMALL_LABEL = re.compile(r"[(\[（【][a-e][)\]）】]|(?<!\w)[b-e](?!\w)")
LABEL = re.compile(r"(?<![\w'’])[A-E](?!\w)|[(\[（【][a-e][)\]）】]|(?<![\w'’])[b-e](?!\w)")
NUMBER = re.compile(r"\d[\d,]*(?:[.٫]\d+)?")
SENTENCE_START = re.compile(r"(?:^|[.!?]\s+|\n\s*)(\w)")
SHOUTED = re.compile(r"\b[A-Z]{2,}\b")

Measure = Callable[[str, Counter[str]], Sequence[tuple[float, float]]]
"""Of a text and its characters' counts: each feature's count and what it is a share of (1: it is no share)."""


@cache
def script_of(char: str) -> str:
    """First word of a letter's name in Unicode: LATIN, ARABIC, CJK, ...; "" for what is no letter."""
    return unicodedata.name(char, "OTHER").split()[0] if char.isalpha() else ""


def _length(text: str, counts: Counter[str]) -> Sequence[tuple[float, float]]:
    words = max(1, len(text.split()))
    sentences = sum(counts[mark] for mark in SENTENCE_ENDS)
    return (
        (math.log(max(1, len(text))), 1),
        (math.log(words), 1),
        (math.log(1 + counts["\n"]), 1),
        (math.log(1 + sentences), 1),
        (len(text), words),
    )


def _case(text: str, counts: Counter[str]) -> Sequence[tuple[float, float]]:
    upper = sum(count for char, count in counts.items() if char.isupper())
    cased = max(1, upper + sum(count for char, count in counts.items() if char.islower()))
    starts = [char for char in SENTENCE_START.findall(text) if char.isupper() or char.islower()]
    first = text.lstrip()[:1]
    return (
        (upper, cased),
        (float(upper > 0), 1),
        (float(first.isupper()) - float(first.islower()), 1),
        (sum(map(str.islower, starts)), max(1, len(starts))),
        (len(SHOUTED.findall(text)), cased),
    )


def _punctuation(text: str, counts: Counter[str]) -> Sequence[tuple[float, float]]:
    return [(sum(counts[mark] for mark in marks), max(1, len(text))) for marks in MARKS.values()]


def _language(text: str, counts: Counter[str]) -> Sequence[tuple[float, float]]:
    by_script: Counter[str] = Counter()
    digits = foreign = wide = accented = 0
    for char, count in counts.items():
        if script := script_of(char):
            by_script[script] += count
            accented += count * (script == "LATIN" and not char.isascii())
        elif char.isdigit():
            digits += count
            foreign += count * (not char.isascii())
        wide += count * ("\uff00" <= char <= "\uffef")
    letters = max(1, sum(by_script.values()))
    others = sum(count for script, count in by_script.items() if script not in SCRIPTS)
    # Shares of one whole: a script has more of it only where another has less.
    whole = [(by_script[script] / letters, 1) for script in SCRIPTS]
    return (
        *whole,
        (others / letters, 1),
        (accented, letters),
        (foreign, max(1, digits)),
        (wide, max(1, len(text))),
        (counts["\u200c"], letters),
        (counts["ي"] + counts["ك"], letters),
    )


def _format(text: str, counts: Counter[str]) -> Sequence[tuple[float, float]]:
    size = max(1, len(text))
    return (
        *((len(pattern.findall(text)), size) for pattern in LAYOUT_PATTERNS),
        (float(text[:1].isspace()), 1),
        (float(text.lstrip()[:1] in ("{", "[")), 1),
    )


def _answer(text: str, counts: Counter[str]) -> Sequence[tuple[float, float]]:
    size = max(1, len(text))
    labels = LABEL.findall(text[-400:])
    last = labels[-1].strip("()[]（）【】").upper() if labels else ""
    numbers = NUMBER.findall(text[-400:])
    number = numbers[-1].replace("٫", ".") if numbers else ""
    value = float(number.replace(",", "")[:15]) if number else 0.0
    return (
        (len(CAPITAL_LABEL.findall(text)), size),
        (len(SMALL_LABEL.findall(text)), size),
        *((float(last == label), 1) for label in "ABCDE"),
        (math.log1p(value), 1),
        (float("." in number), 1),
        (float(bool(number) and value > 0 and value % 10 == 0), 1),
    )


def _ending(text: str, counts: Counter[str]) -> Sequence[tuple[float, float]]:
    body = text.rstrip()
    token = END_TOKEN.search(body, max(0, len(body) - 40))
    before = body[: token.start()].rstrip() if token else body
    last = before[-1:] or " "
    line = before.rsplit("\n", 1)[-1]
    values = (
        last in SENTENCE_ENDS,
        last in ")]}\"'”’»」』）】*",
        last.isalpha(),
        last.isdigit(),
        last in ",:;،؛：；，-–—([",
        text[-1:].isspace(),
        token is not None,
        len(END_TOKEN.findall(text)),
        text.count("```") % 2 or counts["("] > counts[")"] or counts["{"] > counts["}"],
        math.log(max(1, len(line))),
    )
    return [(float(value), 1) for value in values]


_PER_CHARACTER = " for each character"
MEASURES: dict[str, tuple[Measure, tuple[str, ...]]] = {
    "length": (_length, ("characters (log)", "words (log)", "lines (log)", "sentences (log)", "characters a word")),
    "case": (
        _case,
        (
            "upper-case letters for each letter",
            "any upper-case letter",
            "an upper-case first letter",
            "lower-case beginnings of sentences",
            "words in capitals",
        ),
    ),
    "punctuation": (_punctuation, tuple(f"{name}{_PER_CHARACTER}" for name in MARKS)),
    "language": (
        _language,
        (
            *(f"letters that are {script}" for script in SCRIPTS),
            "letters of other scripts",
            "accented letters",
            "digits that are not ASCII",
            "full-width characters",
            "zero-width non-joiners",
            "Arabic forms of ye and kaf",
        ),
    ),
    "format": (
        _format,
        (*(f"{name}{_PER_CHARACTER}" for name in LAYOUT), "white space at the beginning", "a bracket at the beginning"),
    ),
    "answer": (
        _answer,
        (
            "capital option letters for each character",
            "small option letters for each character",
            *(f"{label} as the last letter named" for label in "ABCDE"),
            "size of the last number (log)",
            "a decimal point in the last number",
            "a last number that ends in 0",
        ),
    ),
    "ending": (
        _ending,
        (
            "an end of a sentence at the end",
            "a closing bracket, quote or star at the end",
            "a letter at the end",
            "a digit at the end",
            "a comma, colon or open bracket at the end",
            "white space at the end",
            "an end token as text at the end",
            "end tokens as text",
            "an open bracket or code block",
            "characters of the last line (log)",
        ),
    ),
}  # fmt: skip
GROUPS = ("length", "case", "punctuation", "language", "format", "answer", "phrase", "ending")
"""In the order of reports. `phrase` and a part of `ending` are words, found by `lint_phrases`."""


def without_end_tokens(text: str) -> str:
    """A text without the end tokens left in it: its ending tells them, not the marks and letters they are made of."""
    return END_TOKEN.sub("", text) if "<" in text or "[" in text else text


def measure(texts: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Group to (values, counts), each (texts, features of the group) float64; a value is a count by its size."""
    bare = list(map(without_end_tokens, texts))
    counts = [Counter(text) for text in bare]
    found = {}
    for group, (function, _) in MEASURES.items():
        measured = texts if group == "ending" else bare
        pairs = np.array([function(text, own) for text, own in zip(measured, counts, strict=True)], dtype=np.float64)
        found[group] = (pairs[..., 0] / pairs[..., 1], pairs[..., 0])
    return found


def names_of(group: str) -> tuple[str, ...]:
    """Names of a group's features, in the order of `measure`."""
    return MEASURES[group][1] if group in MEASURES else ()
