"""What stands at one place of a text: an option's label or words, several of them, or the refusal of all.

`read_at` is the centre. `text` is a normalised text, `low` the same in lower case, character for character. Where such
places are, and which of them is the answer, is the business of `verify_option`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from data_tools import verify_option_words as words
from data_tools.errors import UserError
from data_tools.verify_text import normalise

Kind = Literal["option", "several", "none", "outside", "contradiction"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What stands at one place of the text: an option's index, or why none can be taken."""

    kind: Kind
    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Options:
    """labels and texts of a question; `folded[i]` is text i as it is searched for, "" for one that says nothing."""

    labels: tuple[str, ...]
    folded: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    by_length: tuple[int, ...]


def read_options(options: Mapping[str, str] | Sequence[str]) -> Options:
    """The options of a question: label to text, or texts alone (labels A, B, ...); 2 to 10. Raises UserError."""
    if isinstance(options, Mapping):
        pairs = [(str(label), str(text)) for label, text in options.items()]
    else:
        pairs = [(chr(ord("A") + i), str(text)) for i, text in enumerate(options)]
    if not 2 <= len(pairs) <= words.MAX_OPTIONS:
        raise UserError(f"{len(pairs)} options: a question needs 2 to {words.MAX_OPTIONS}")
    folded = tuple(_search_form(text) for _, text in pairs)
    by_length = tuple(sorted((i for i, text in enumerate(folded) if text), key=lambda i: -len(folded[i])))
    patterns = tuple(re.compile(re.escape(text).replace("\\ ", r"\s+")) for text in folded)
    return Options(tuple(label for label, _ in pairs), folded, patterns, by_length)


def read_at(text: str, low: str, position: int, options: Options, until: int | None = None) -> Reading | None:
    """The option, or the refusal of all, that stands at `position` after words that may come between."""
    filler = words.FILLER.match(low, position)
    start = filler.end() if filler else position
    if "\n\n" in low[position:start].strip(" "):
        return None
    named = bool(filler and re.search(words.OPTION_WORD, filler.group()))
    by_text = _text_after(low, position, start, options)
    by_label = _label_at(text, low, start, options, named=named, until=until)
    if by_text and by_label and by_label.kind == "option" and by_text.index != by_label.index:
        followed = skip_own_text(low, by_label, options) > by_label.end
        # "2" where one option's text is 2: a label only beside a word for "option", or before its own text.
        if by_text.end <= by_label.end and not named and not followed:
            return Reading("contradiction", -1, start, by_text.end)
        first: Reading | None = by_text if by_text.end > by_label.end and not followed else by_label
    else:
        first = by_text or by_label
    if first is None:
        return refusal_at(low, start, options)
    return _with_others(text, low, first, options)


def refusal_at(low: str, start: int, options: Options) -> Reading | None:
    for pattern in (words.NONE_OF_THEM, words.ALL_OF_THEM):
        match = pattern.match(low, start)
        if match:
            same = [i for i, text in enumerate(options.folded) if text and pattern.match(text)]
            if len(same) == 1:
                return Reading("option", same[0], start, match.end())
            return Reading("none", -1, start, match.end())
    return None


def _with_others(text: str, low: str, first: Reading, options: Options) -> Reading:
    """`first`, or "several" when "and", "or" or a comma joins another option to it, or a contradiction of its text."""
    end = first.end
    closing = re.compile(r"[)\]}\"']*").match(low, end)
    assert closing is not None
    joined = words.CONJUNCTION.match(low, closing.end())
    if joined:
        filler = words.FILLER.match(low, joined.end())
        at = filler.end() if filler else joined.end()
        label = _label_at(text, low, at, options, named=True, until=None)
        bracket = bool(label) and low[at - 1] == "("
        if label and not bracket and not words.PLURAL_AFTER.match(low, label.end):
            label = None
        other = _text_at(low, at, options) or label
        if other and (other.index != first.index or other.kind != first.kind):
            return Reading("several", -1, first.start, other.end)
    if first.kind == "option" and low[first.start : end] != options.folded[first.index]:
        gap = re.compile(r"(?:[)\]}\"'\s.:(]|-(?=\s))*").match(low, end)
        own = skip_own_text(low, first, options) > end
        other = _text_at(low, gap.end(), options) if gap and not own else None
        if other and other.index != first.index and re.match(r"[\s.)\"'。]*(?:\n|$)", low[other.end :]):
            return Reading("contradiction", -1, first.start, other.end)
    return first


def skip_own_text(low: str, reading: Reading, options: Options) -> int:
    if reading.kind != "option":
        return reading.end
    gap = re.compile(r"(?:[\s(\"':.)\]}、]|-(?=\s))*").match(low, reading.end)
    assert gap is not None
    end = text_end(low, gap.end(), reading.index, options)
    if end is None:
        return reading.end
    return end + len(low[end:]) - len(low[end:].lstrip(".)\"'"))


def _text_at(low: str, start: int, options: Options) -> Reading | None:
    """The longest option text that begins at `start`."""
    for index in options.by_length:
        end = text_end(low, start, index, options)
        if end is not None:
            return Reading("option", index, start, end)
    return None


def _text_after(low: str, position: int, start: int, options: Options) -> Reading | None:
    """An option's text at `start`, or from a word before it that is filler elsewhere ("Both kidneys")."""
    for word in re.finditer(r"\b\w", low[position:start]):
        reading = _text_at(low, position + word.start(), options)
        if reading and reading.end > start:
            return reading
    return _text_at(low, start, options)


def text_end(low: str, start: int, index: int, options: Options) -> int | None:
    """Where the text of option `index` ends, if it stands at `start` as words of its own."""
    text, match = options.folded[index], options.patterns[index].match(low, start)
    if not text or match is None:
        return None
    end = match.end()
    rest = low[end : end + 2]
    if rest[:1] and is_han(text[-1]) and is_han(rest[0]):
        return end if rest[0] in "是的了所而因为和或与及" else None
    if text[-1].isalnum() and (rest[:1].isalnum() or rest[:1] == "%") and not is_han(rest[0]):
        return None
    if text[-1].isdigit() and re.match(r"[.,/]\d", rest):
        return None
    return end


def _label_at(text: str, low: str, start: int, options: Options, *, named: bool, until: int | None) -> Reading | None:
    """A label that stands alone at `start`: not the first letter of a word, nor an article or a pronoun."""
    run = re.compile(r"[A-J]{2,10}(?![A-Za-z])").match(text, start)
    if run and sorted(set(run.group())) == list(run.group()) and ord(run.group()[-1]) - 65 < len(options.labels):
        return Reading("several", -1, start, run.end())
    pattern = r"الف|[a-z](?![a-z])|\d{1,2}(?!\d|[.,/]\d|%)|[\u0620-\u06d3](?!\w)|[甲乙丙丁戊己庚辛壬癸]"
    match = re.compile(pattern).match(low, start)
    ordinal = re.compile(r"\w+?(?=[\s.,:;)\]个项种选是]|$)").match(low, start) if named else None
    if ordinal and ordinal.group() in words.ORDINALS and not match:
        match = ordinal
    if match is None:
        match = re.compile(r"(\w+)(?= (?:option|choice|alternative|one|answer)\b)").match(low, start)
        if match is None or match.group() not in words.ORDINALS:
            return None
    label = match.group()
    if re.match(r"\d", label) and low[max(0, start - 1) : start] == "-":
        return None
    index = label_index(label, options)
    if index is None:
        return None
    bracketed = low[start - 1 : start] in ("(", "[", "{", '"', "'") and low[match.end() : match.end() + 1] in tuple(
        ")]}\"'"
    )
    in_range = index < len(options.labels)
    if not (bracketed or (until is not None and match.end() >= until - 1)):
        if not _ends_label(text, low, match.end(), label, index if in_range else None, options):
            return None
    if not in_range and label.isdigit() and not named:
        return None
    return Reading("option" if in_range else "outside", index, start, match.end())


def _ends_label(text: str, low: str, end: int, label: str, index: int | None, options: Options) -> bool:
    """Whether what follows lets a bare label be one."""
    rest = low[end:]
    if not rest or re.match(r"\s*(?:$|\n|[()\[\]}\"!?;:,|=/<。、]|\.(?!\w)|'(?![a-z])|[&+]| [-–—]|[–—])", rest):
        return True
    gap = re.compile(r"[\s).:-]*").match(low, end)
    if index is not None and gap and text_end(low, gap.end(), index, options) is not None:
        return True
    if gap and gap.end() > end and _text_at(low, gap.end(), options):
        return True  # another option's words: `_with_others` judges that
    if words.AFTER_PERSIAN.match(rest) and (index is not None or label.isascii()):
        return True
    if label in words.STEMS or is_han(rest[0]):
        return bool(words.AFTER_CHINESE.match(rest))
    if re.match(r"[a-z]", label):
        return (text[end - 1].isupper() or label not in "ai") and bool(words.AFTER_LATIN.match(rest))
    return label.isdigit() and bool(words.AFTER_LATIN.match(rest))


def label_index(label: str, options: Options) -> int | None:
    """The place that a label in lower case names, which may lie outside of the options; None for no label."""
    own = [known.casefold() for known in options.labels]
    if label in own:
        return own.index(label)
    if label == "ا":
        return 0
    if label in words.PERSIAN:
        return words.PERSIAN.index(label)
    if label in words.ORDINALS:
        return words.ORDINALS[label]
    if label.isdigit() and label.isascii():
        return int(label) - 1 if int(label) > 0 else None
    if len(label) == 1 and label in words.STEMS:
        return words.STEMS.index(label)
    if len(label) == 1 and "a" <= label <= "z":
        return ord(label) - ord("a")
    return None


def _search_form(text: str) -> str:
    spelt = normalise(text).replace("$", "").strip()
    low = "".join(c.lower() if len(c.lower()) == 1 else c for c in spelt)
    return " ".join(low.split()).rstrip(" .。,;\"'").lstrip(" \"'")


def is_han(char: str) -> bool:
    return "\u4e00" <= char[:1] <= "\u9fff"
