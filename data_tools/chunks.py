"""A book's passages cut into chunks of some words, whole paragraphs where that can be, each with its titles.

Cleaning, all of it: NFC; control characters, soft hyphens and zero-width spaces go (the zero-width non-joiner, which
Persian spells with, stays); lines of a paragraph become one, but for items of a list; spaces become one; paragraphs
that are a number alone (a page's) go. With `join_hyphens` a word that was parted at a line's end is joined: that is
wrong for words that bear a hyphen of their own, so it is off. Words of Chinese, Japanese and Thai are characters.

A line that begins with `#` is a title within the passage. Pure functions; nothing is read or written.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_tools.overlap import units_of
from data_tools.steps import split_steps

UNSEEN = re.compile("[\u00ad\u200b\u2060\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f]")
TITLE = re.compile(r"#{1,6}[^\S\n]+(?P<title>\S[^\n]*)$")
ITEM = re.compile(r"(?:[-*•‣–]|\(?\d{1,3}[.)])\s")
PAGE = re.compile(r"[-–\s]*\d{1,4}[-–\s]*$")
PARTED = re.compile(r"(?<=[^\W\d_])[-‐]\n(?=[a-z])")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a passage. titles: those within the passage, outermost first. words: as counted here."""

    text: str
    titles: tuple[str, ...]
    words: int


def words_in(text: str) -> int:
    """Words, or characters where the writing puts no spaces."""
    return len(units_of(text)[0])


def clean_paragraphs(text: str, *, join_hyphens: bool = False) -> list[str]:
    """The paragraphs of a text, cleaned as said above; titles are paragraphs of their own, with their `#`."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n\n"))
    text = UNSEEN.sub("", text)
    if join_hyphens:
        text = PARTED.sub("", text)
    text = re.sub(r"^(#{1,6}\s.*)$", r"\n\n\1\n\n", text, flags=re.MULTILINE)
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines: list[str] = []
        for line in (" ".join(own.split()) for own in block.split("\n")):
            if line and lines and not ITEM.match(line):
                lines[-1] += f" {line}"
            elif line:
                lines.append(line)
        paragraph = "\n".join(lines)
        if paragraph and not PAGE.match(paragraph):
            found.append(paragraph)
    return found


def cut_chunks(paragraphs: Sequence[str], words: int, least: int) -> list[Chunk]:
    """Paragraphs packed in order, at most `words` a chunk; a title begins a new one.

    A longer paragraph is parted between sentences, and a longer sentence stays whole. What is left over at the end of a
    section and has less than `least` words goes to the chunk before it, which may then be longer by so much.
    """
    found: list[Chunk] = []
    for titles, section in _sections(paragraphs):
        own: list[list[tuple[str, str, int]]] = []
        for join, text in _pieces(section, words):
            count = words_in(text)
            if not own or sum(piece[2] for piece in own[-1]) + count > words:
                own.append([])
            own[-1].append((join, text, count))
        if len(own) > 1 and sum(piece[2] for piece in own[-1]) < least:
            rest = own.pop()
            own[-1] += rest
        for pieces in own:
            text = "".join(join + text for join, text, _ in pieces).strip()
            found.append(Chunk(text, titles, words_in(text)))
    return found


def _sections(paragraphs: Sequence[str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(titles above it, paragraphs): a title of a level ends those of its own and of lower levels."""
    titles: list[tuple[int, str]] = []
    own: list[str] = []
    for paragraph in paragraphs:
        match = TITLE.match(paragraph)
        if match is None:
            own.append(paragraph)
            continue
        if own:
            yield tuple(title for _, title in titles), own
        level = len(paragraph) - len(paragraph.lstrip("#"))
        titles, own = [*((known, title) for known, title in titles if known < level), (level, match["title"])], []
    if own:
        yield tuple(title for _, title in titles), own


def _pieces(paragraphs: Sequence[str], words: int) -> Iterator[tuple[str, str]]:
    """(what stands before it, text): paragraphs, or the sentences of one that is too long."""
    for paragraph in paragraphs:
        parts = split_steps(paragraph, "sentence").steps if words_in(paragraph) > words else (paragraph,)
        for index, part in enumerate(parts):
            yield ("" if index else "\n\n"), part
