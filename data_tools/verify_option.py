"""Which option of a multiple-choice question does a text choose? Labels in Latin, Persian, Chinese and digits, or the
option's own words.

What counts, strongest first: a statement ("the answer is (B)", `\\boxed{B}`, {"answer": "B"}, پاسخ گزینه ب است, 故选B;
the last one, so that a chain of thought may change its mind); a line that is a label; an option's words or name at the
end of the text. Two different options as one answer, a letter that no option has, "none of the above" where that is no
option: `invalid`. No model is asked and nothing is guessed: what is not understood is `invalid`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from data_tools import verify_option_words as words
from data_tools.errors import UserError
from data_tools.verify_option_read import (
    Options,
    Reading,
    is_han,
    label_index,
    read_at,
    read_options,
    refusal_at,
    skip_own_text,
    text_end,
)
from data_tools.verify_result import Verdict, invalid
from data_tools.verify_text import MAX_STATEMENTS, boxed, denied, final_part, normalise, sentence_before


def verify_option(text: str, gold: str, options: Mapping[str, str] | Sequence[str]) -> Verdict:
    """Whether `text` chooses the option whose label is `gold`. `extracted` is the chosen option's label.

    Raises UserError for a gold that is no label of the options.
    """
    given = read_options(options)
    right = _gold_index(gold, given)
    body = final_part(text)
    if body is None:
        return invalid("the text ends inside its thinking")
    reading, why = choose(normalise(body).replace("$", ""), given)
    if reading is None:
        return invalid(why)
    chosen = given.labels[reading.index]
    return Verdict("correct" if reading.index == right else "wrong", chosen, why)


def choose(text: str, options: Options) -> tuple[Reading | None, str]:
    """The option that a normalised text chooses and where that was read, or None and why not."""
    low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    for find, name in ((_statements, "statement"), (_label_lines, "a line of its own")):
        found = sorted(find(text, low, options), key=lambda reading: reading.end)
        if found:
            return _last(found, low, options, name)
    return _mentioned(text, low, options)


def _gold_index(gold: str, options: Options) -> int:
    if gold in options.labels:
        return options.labels.index(gold)
    index = label_index(normalise(gold).strip().casefold(), options)
    if index is None or index >= len(options.labels):
        raise UserError(f"gold {gold!r} is no label of the options ({', '.join(options.labels)})")
    return index


def _last(found: list[Reading], low: str, options: Options, name: str) -> tuple[Reading | None, str]:
    """The last reading counts; a different one in the same paragraph, not taken back, makes two answers of it."""
    last = found[-1]
    for other in found[-MAX_STATEMENTS:-1]:
        between = low[other.end : last.start]
        same = other.kind == last.kind and other.index == last.index
        if not same and not words.CORRECTION.search(between) and (name != "statement" or "\n\n" not in between):
            return None, "gives several different options as its answer"
    said = " ".join(low[last.start : last.end].split())
    problem = {
        "several": f"gives several options in one answer: {said!r}",
        "none": "says that none, or all, of the options is right, and no option says so",
        "outside": f"names {said!r}, which is no option",
        "contradiction": f"names one option's letter and another one's text: {said!r}",
    }.get(last.kind)
    return (None, problem) if problem else (last, f"{name}: {said!r}")


def _statements(text: str, low: str, options: Options) -> Iterator[Reading]:
    for start, end, content in boxed(text):
        inner = read_at(text, low, end - len(content) - (low[end - 1] == "}"), options, until=end)
        yield inner or Reading("outside", -1, start, end)
    for lead in words.LEADS:
        for match in lead.finditer(low):
            if denied(low, match.start()) or _supposed(low, match):
                continue
            reading = read_at(text, low, match.end(), options)
            if reading and not words.DENIED_AFTER.match(low, reading.end):
                yield reading
    yield from _trailed(text, low, options)
    for match in re.finditer(r"(?:\b(?:so|thus|hence|therefore)\b,?|->|→|=>|⇒)", low):
        reading = None if denied(low, match.start()) else read_at(text, low, match.end(), options)
        if reading and re.match(r"[\s)\].!]*(?:\n|$)", low[reading.end :]):
            yield reading


def _supposed(low: str, lead: re.Match[str]) -> bool:
    """ "if it were cold, the answer would be B" """
    return "would" in lead.group() and bool(re.search(r"\b(?:if|were)\b", sentence_before(low, lead.start())))


ORDINALS = "|".join(sorted(words.ORDINALS, key=len, reverse=True))
LABEL_NAMED = re.compile(
    words.OPTION_WORD
    + r"[\s:]*[(\[\"']*(?P<label>الف|[a-z]|\d{1,2}|(?!\w\w)[\u0600-\u06ff]|[甲乙丙丁戊己庚辛壬癸])[)\]\"']*"
    rf"|{words.OPTION_WORD}\s*(?P<ordinal>{ORDINALS})(?!\w)|\b(?P<nth>{ORDINALS}) (?:option|choice|alternative)\b"
    r"|\((?P<bracketed>الف|[a-z]|(?!\w\w)[\u0600-\u06ff]|[甲乙丙丁戊己庚辛壬癸])\)"
)
"""An option by name: "option b", گزینه ب, 选项b, or a letter in brackets."""


def _named(text: str, low: str, options: Options) -> Iterator[Reading]:
    """Places that name an option by its label, wherever they are."""
    for match in LABEL_NAMED.finditer(low):
        label = next(name for name in match.groups() if name)
        index = label_index(label, options)
        rest = low[match.end() :]
        if label in ("و", "ی") and not re.match(r"\s*(?:[)\].,\"]|$|است|صحیح است|درست است)", rest):
            continue  # "and", or the end of گزینه‌ی
        if index is not None and not (rest[:1].isalnum() and rest[:1].isascii()):
            yield Reading("option" if index < len(options.labels) else "outside", index, match.start(), match.end())


BARE_BEFORE = (
    r"(?:^|[.!?;:,\n]|\b(?:so|thus|therefore|hence|that|think|believe|conclude|answer)|[,。;因此所以故则即,])\s*"
)
BARE_LABEL = re.compile(BARE_BEFORE + r"(?P<label>[A-Z甲乙丙丁戊己庚辛壬癸])(?=[\s选项是为正对])", re.MULTILINE)


def _trailed(text: str, low: str, options: Options) -> Iterator[Reading]:
    """ "option B is correct", گزینه ب صحیح است, B项正确"""
    bare = []
    for match in BARE_LABEL.finditer(text):
        index = label_index(match["label"].lower(), options)
        if index is not None and index < len(options.labels):
            bare.append(Reading("option", index, match.start("label"), match.end()))
    done = 0
    for reading in sorted([*_named(text, low, options), *bare], key=lambda reading: reading.start):
        # The option's own words may stand between, and what they name is no option: گزینه ب (تب) صحیح است.
        if reading.start < done:
            continue
        end = done = skip_own_text(low, reading, options)
        if any(trail.match(low, end) for trail in words.TRAILS) and not denied(low, reading.start):
            yield reading


def _label_lines(text: str, low: str, options: Options) -> Iterator[Reading]:
    """The first and the last line, where they are a label, with or without the option's own words.

    A text that lists options, a line each, chooses none of them by that. Numbered steps are no labels.
    """
    lines = [(m.start(), m.end()) for m in re.finditer(r"[^\n]*\S[^\n]*", low)]
    starts = [(begin, end, _line_label(text, low, begin, end, options)) for begin, end in lines]
    whole = [reading for _, _, reading in starts if reading]
    if len({(r.kind, r.index) for r in whole}) > 2 or (len(lines) > 2 and len(whole) == len(lines)):
        return
    for _, _, reading in dict.fromkeys((starts[0], starts[-1])) if starts else ():
        if reading:
            yield reading


def _line_label(text: str, low: str, begin: int, end: int, options: Options) -> Reading | None:
    opening = re.compile(r"(?:[\s•>#]|-(?=\s))*").match(low, begin, end)
    assert opening is not None
    reading = read_at(text, low, opening.end(), options)
    if reading is None or reading.start > opening.end() + 12 or words.DENIED_AFTER.match(low, reading.end):
        return None
    rest = low[reading.end : end]
    if re.fullmatch(r"[\s)\]}\"'.:,!。|]*", rest) or reading.kind != "option":
        return reading
    own = skip_own_text(low, Reading("option", reading.index, reading.start, _after_mark(low, reading.end)), options)
    if own > _after_mark(low, reading.end) and re.fullmatch(r"[\s)\]}\"'.:,!。]*", low[own:end]):
        return reading
    letter = not low[reading.start].isdigit() and reading.end - reading.start <= 3
    return reading if letter and re.match(r"[)\]]?[.:、,)] ?\S|\)? [-–—] ", rest) else None


def _after_mark(low: str, end: int) -> int:
    mark = re.compile(r"[)\]}.:、\s\-]*").match(low, end)
    assert mark is not None
    return mark.end()


def _mentioned(text: str, low: str, options: Options) -> tuple[Reading | None, str]:
    """The one option that the last sentence, or else the whole text, names or quotes."""
    low = _without_list(text, low, options)
    body = low.rstrip()
    last = len(sentence_before(body, len(body.rstrip(".!。 \"')"))))
    begin = len(body.rstrip(".!。 \"')")) - last
    named = [r for r in _named(text, low, options) if not _ruled_out(low, r)]
    quoted = [r for r in _quoted(low, options) if not _ruled_out(low, r)]
    for where, found in (
        ("its last sentence", [r for r in named if r.start >= begin]),
        ("its last sentence", [r for r in quoted if r.start >= begin]),
        ("the text", named),
        ("the text", quoted),
    ):
        different = {(r.kind, r.index) for r in found}
        if len(different) == 1:
            return _last(found, low, options, f"the only option in {where}")
        if different:
            return None, f"names several options in {where} and states no answer"
    refusal = next((r for p in (begin, 0) if (r := _refusal_in(low, p, options))), None)
    if refusal:
        return _last([refusal], low, options, "refusal")
    return None, "no option found"


def _without_list(text: str, low: str, options: Options) -> str:
    """`low` with the lines blanked that repeat the list of options: listing them chooses none."""
    listed = []
    for match in re.finditer(r"[^\n]*\S[^\n]*", low):
        reading = _line_label(text, low, match.start(), match.end(), options)
        if reading and reading.kind == "option":
            listed.append((reading.index, match.span()))
    if len({index for index, _ in listed}) > 1:
        for _, (start, end) in listed:
            low = low[:start] + " " * (end - start) + low[end:]
    return low


def _refusal_in(low: str, begin: int, options: Options) -> Reading | None:
    for pattern in (words.NONE_OF_THEM, words.ALL_OF_THEM):
        match = pattern.search(low, begin)
        if match:
            return refusal_at(low, match.start(), options)
    return None


def _ruled_out(low: str, reading: Reading) -> bool:
    return denied(low, reading.start) or bool(words.DENIED_AFTER.match(low, reading.end))


def _quoted(low: str, options: Options) -> Iterator[Reading]:
    """Every place where an option's text stands as words; the longest text takes its place from shorter ones."""
    taken: list[tuple[int, int]] = []
    for index in options.by_length:
        text = options.folded[index]
        for match in options.patterns[index].finditer(low):
            start, end = match.span()
            before = low[max(0, start - 1) : start]
            inside = before.isalnum() and text[0].isalnum() and not is_han(before)
            inside = inside or (text[0].isdigit() and before in tuple(".,/-"))
            if inside or text_end(low, start, index, options) is None or any(s < end and start < e for s, e in taken):
                continue
            taken.append((start, end))
            yield Reading("option", index, start, end)
