"""What a second text must not give away: that it is a correction, or, in a critique, which option is right.

`Phrases` finds words that only one who saw another answer would write. `leak_of` says whether a critique names the
right answer: its label in any script that `verify_option_read` knows, its own words, what a verifier would read as it,
or all other options, which leaves one. Both look at a copy in one spelling; no text is changed. A paraphrase of the
right option is not seen.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools import verify_option_words as words
from data_tools.errors import UserError
from data_tools.pairs.leak_phrases import BUILT_IN, CHINESE_NTH, ORDINALS_OF_RANK
from data_tools.questions import Question
from data_tools.verify_number import parse_number
from data_tools.verify_option import LABEL_NAMED, verify_option
from data_tools.verify_option_read import Options, is_han, label_index, read_options, text_end
from data_tools.verify_text import folded, normalise

MAX_SHOWN = 5
"""Phrases named in a command's output."""
NUMBER = re.compile(r"[-+]?\d(?:[\d.,]*\d)?%?")


class Phrases:
    """Phrases of the built-in lists (English, Persian, Chinese) and the user's own, and how often each was found."""

    def __init__(self, own: Sequence[str] = ()) -> None:
        self._patterns: list[tuple[str | None, re.Pattern[str]]] = [
            (None, _bounded(pattern)) for patterns in BUILT_IN.values() for pattern in patterns
        ]
        for phrase in own:
            spelt = " ".join(normalise(phrase).casefold().split())
            if not spelt:
                raise UserError(f"phrase {phrase!r}: nothing is left of it to search for")
            self._patterns.append((phrase, _bounded(re.escape(spelt).replace("\\ ", r"\s+"))))
        self._found: Counter[str] = Counter()

    @classmethod
    def read(cls, path: str | None) -> "Phrases":
        """With a file's phrases, one a line, `#` begins a comment line. Raises UserError."""
        if path is None:
            return cls()
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8; save the file as UTF-8") from error
        return cls([line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")])

    def found_in(self, text: str) -> str | None:
        """The first phrase of the lists that stands in the text, as it stands there or as the user gave it."""
        spelt = normalise(text).casefold()
        for name, pattern in self._patterns:
            match = pattern.search(spelt)
            if match:
                found = name or " ".join(match.group().split())
                self._found[found] += 1
                return found
        return None

    def lines(self) -> list[str]:
        """What was found most often, for a person who wonders whether the lists are right; [] for nothing."""
        shown = [f"'{phrase}' {count}" for phrase, count in self._found.most_common(MAX_SHOWN)]
        return [f"phrases found: {', '.join(shown)}"] if shown else []


def add_phrases(parser: argparse.ArgumentParser) -> None:
    """`--phrases`."""
    parser.add_argument(
        "--phrases", help="further phrases by which a text reads as a correction: one a line, # begins a comment"
    )


def leak_of(text: str, question: Question) -> str | None:
    """How a critique gives the right answer away, in a few words; None where no rule sees that it does.

    option: see above. number: the right number stands in it. free: the reference answer stands in it, word for word.
    code: nothing is looked for.
    """
    if question.kind == "option":
        return _option_leak(text, question)
    if question.gold is None:
        return None
    if question.kind == "number":
        right = parse_number(question.gold)
        found = (parse_number(match.group()) for match in NUMBER.finditer(normalise(text)))
        return "the right number" if any(number is not None and number == right for number in found) else None
    reference = folded(question.gold)
    return "the reference answer" if reference and reference in folded(text) else None


def _option_leak(text: str, question: Question) -> str | None:
    options = read_options(question.options)
    right = options.labels.index(str(question.gold))
    spelt = normalise(text)
    low = _lower(spelt)
    named = set(_named(spelt, low, options, _lower(normalise(_known_text(question)))))
    if right in named:
        return "the right option's label"
    quoted = set(_quoted(low, options))
    if right in quoted:
        return "the right option's words"
    if verify_option(text, str(question.gold), question.options).verdict == "correct":
        return "reads as the right answer"
    others = set(range(len(options.labels))) - {right}
    return "all options but the right one" if len(others) > 1 and others <= named | quoted else None


def _known_text(question: Question) -> str:
    return "\n".join([str(question.values["question"]), *question.options.values()])


def _named(text: str, low: str, options: Options, known: str) -> Iterator[int]:
    """The options that a text names by a label. known: the question's own text, in lower case; "hepatitis b" names no
    option where the question speaks of it."""
    for match in LABEL_NAMED.finditer(low):
        name, label = next((name, found) for name, found in match.groupdict().items() if found)
        before, rest = match.group(), low[match.end() :]
        if label in ("و", "ی") and not re.match(r"\s*(?:[)\].,\"]|$|است|صحیح)", rest):
            continue  # "and", or the end of گزینه‌ی
        if rest[:1].isascii() and rest[:1].isalnum():
            continue
        counts_points = before.startswith("第") or before.startswith("مورد") and (name == "ordinal" or label.isdigit())
        if counts_points or (name == "nth" and label not in ORDINALS_OF_RANK):
            continue
        yield from _in_range(label, options)
    for pattern in (BRACKETED, CHINESE_NTH):
        for match in pattern.finditer(low):
            yield from _in_range(match["label"], options)
    for match in BARE.finditer(text):
        if not _is_word(low, match) and not _is_known(low, match, known):
            yield from _in_range(match["label"].lower(), options)
    for index, label in enumerate(options.labels):  # labels of the user's own making
        own = re.escape(_lower(normalise(label)))
        if len(label) > 1 or not re.fullmatch(r"[A-Za-z]|[\u0600-\u06ff]|\d|[甲乙丙丁戊己庚辛壬癸]", label):
            if not label.isdigit() and re.search(rf"(?<!\w){own}(?!\w)", low):
                yield index
        elif label.isdigit() and re.search(rf"(?<!^)(?<!\n)[(\[]{label}[)\]]", low):
            yield index


def _in_range(label: str, options: Options) -> Iterator[int]:
    index = label_index(label, options)
    if index is not None and index < len(options.labels):
        yield index


BRACKETED = re.compile(r"[(\[{\"']\s*(?P<label>[a-j]|الف|[بجدهوزحطی]|[甲乙丙丁戊己庚辛壬癸])\s*[)\]}\"']")
BARE = re.compile(
    r"(?<![A-Za-z\d_-])(?P<label>[A-J](?![A-Za-z\d_]|-\w|'(?!s\b))"
    r"|(?<!\w)(?:الف|[بجدزحط])(?!\w)|(?<![\u4e00-\u9fff])[甲乙丙丁戊己庚辛壬癸](?![\u4e00-\u9fff])"
    r"|[甲乙丙丁戊己庚辛壬癸](?=项)|(?<=选)[甲乙丙丁戊己庚辛壬癸])"
)
"""A label alone, as the text has it: a capital, a Persian letter that is no word, a stem that is no part of a word."""
AFTER_ARTICLE = re.compile(r"\s+(?![-–—])\w")


def _is_word(low: str, match: re.Match[str]) -> bool:
    """ "A patient", "I think": an article or a pronoun, unless what follows is what follows a label."""
    if match["label"] not in ("A", "I"):
        return False
    rest = low[match.end() :]
    return bool(AFTER_ARTICLE.match(rest)) and not words.AFTER_LATIN.match(rest)


def _is_known(low: str, match: re.Match[str], known: str) -> bool:
    """ "hepatitis B", "B cells": part of a term that the question itself uses."""
    label = match["label"].lower()
    before = re.search(r"([\u4e00-\u9fff]{2}|(?<!\w)\w{2,})\s*$", low[max(0, match.start() - 40) : match.start()])
    after = re.match(r"\s*([\u4e00-\u9fff]{1,2}|\w{2,})", low[match.end() :])
    terms = [rf"{re.escape(before[1])}\s*{label}(?![a-z\d])"] if before else []
    terms += [rf"(?<![a-z\d]){label}\s*{re.escape(after[1])}"] if after else []
    return any(re.search(term, known) for term in terms)


def _quoted(low: str, options: Options) -> Iterator[int]:
    """The options whose words stand in the text; the longest takes its place from shorter ones within it."""
    taken: list[tuple[int, int]] = []
    for index in options.by_length:
        wanted = options.folded[index]
        for match in options.patterns[index].finditer(low):
            start, end = match.span()
            before = low[max(0, start - 1) : start]
            inside = before.isalnum() and wanted[0].isalnum() and not is_han(before)
            inside = inside or (wanted[0].isdigit() and before in tuple(".,/-"))
            ends_here = is_han(wanted[-1]) or text_end(low, start, index, options) is not None
            if not inside and ends_here and not any(s < end and start < e for s, e in taken):
                taken.append((start, end))
                yield index


def _lower(text: str) -> str:
    """Lower case, character for character."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _bounded(pattern: str) -> re.Pattern[str]:
    """Not within a longer word; Chinese has no ends of words to see."""
    return re.compile(
        rf"(?:(?<!\w)|(?<=[\u4e00-\u9fff])|(?=[\u4e00-\u9fff]))(?:{pattern})(?:(?!\w)|(?<=[\u4e00-\u9fff:]))"
    )
