"""Texts of one file in another: exact n-grams, and near-duplicates by shared short ones; all of them.

A text is brought to words: NFKC, lower case, letters and digits only; Chinese, Japanese and Thai, which put no spaces,
to single characters. Two findings an item, each against any one training row:

    n-gram    a run of `n` units (13) of the item stands in a training row; shorter items: the whole item does, from
              `LEAST` units on (a shorter one is counted as too short to judge)
    near      at least `near` (0.8) of the item's distinct 3-grams of words (5-grams of characters) stand in one row

Nothing is sampled or hashed approximately. The evaluation's grams are held in memory, training rows are streamed. The
commands are `python -m eval.main contamination` and, for pairs, `python -m data_tools.lint`.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_tools.errors import DataError, UserError
from data_tools.jsonl import iter_jsonl

Unit = Literal["auto", "word", "char"]
LEAST = 5
"""Units an item must have to be judged by its whole text."""
SHINGLE = {"word": 3, "char": 5}
LEAST_OWN = 3
"""Short grams that an item must have left, where common ones are forgotten: as many as five words have."""
SPACELESS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]")
WORD = re.compile(r"\w+")
NOT_TEXT = ("id", "lang", "source", "licence", "license", "subject", "topic", "role", "url", "answer")
"""Columns that are left out of a training row where none are named; an option's letter alone says nothing."""
ITEM_FIELDS = ("question", "prompt", "messages", "text")
"""The first of these that an evaluation row has, where none are named."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """An item found in training data. why: ngram | near. share: of its short grams, the most that one row has.

    run, units: the longest run of its units in a training row, where that is n or more (else 0), and all its units. A
    run not much longer than n in a long item is often a phrase that many texts of its kind have.
    """

    id: str
    line: int
    why: str
    share: float
    run: int
    units: int
    train: str
    train_id: str


@dataclass(kw_only=True)
class Findings:
    """What became of the items; every count is in items."""

    items: int = 0
    too_short: int = 0
    train_rows: int = 0
    ngram: int = 0
    near: int = 0
    contaminated: int = 0
    overlaps: list[Overlap] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the items that could be judged, those found."""
        return self.contaminated / max(1, self.items - self.too_short)


@dataclass(slots=True)
class _Item:
    """least: short grams that a row must share with it before a long one can stand there; length: of the long ones."""

    id: str
    line: int
    units: int
    shingles: int
    length: int
    least: int
    judged: bool = True
    best: float = 0.0
    place: tuple[str, str] = ("", "")
    run: int = 0
    run_place: tuple[str, str] = ("", "")


def units_of(text: str, unit: Unit = "auto") -> tuple[list[str], str]:
    """The text as units, and which: word or char. auto: char where a third of the letters need no spaces."""
    low = unicodedata.normalize("NFKC", text).casefold()
    if unit == "auto":
        letters = sum(char.isalpha() for char in low)
        unit = "char" if letters and 3 * len(SPACELESS.findall(low)) >= letters else "word"
    words = WORD.findall(low)
    return (words if unit == "word" else [char for word in words for char in word]), unit


def grams_of(units: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n units, in order."""
    yield from zip(*(units[start:] for start in range(n)), strict=False)


def common_limit(texts: int) -> int:
    """A gram in more of so many texts is common to them, not one text's own: 5% of them, at least 10."""
    return max(10, texts // 20)


def find_overlaps(
    train: Sequence[str | Path],
    evaluation: str | Path,
    *,
    n: int = 13,
    near: float = 0.8,
    unit: Unit = "auto",
    train_fields: Sequence[str] = (),
    eval_fields: Sequence[str] = (),
    skip_common: bool = False,
) -> Findings:
    """Every item of `evaluation` against every row of the training files. Raises UserError for bad files or options.

    skip_common: grams that more items have than `common_limit` says are passed over: an instruction that all prompts
    have is no contamination. An item of which too little is left is counted as too short.
    """
    if n < LEAST or not 0 < near <= 1:
        raise UserError(f"--n {n}, --near {near:g}: n must be {LEAST} or more, near above 0 and at most 1")
    index = _Index(n)
    found = Findings()
    for line, row in iter_jsonl(evaluation):
        found.items += 1
        found.too_short += not index.add(_text_of_item(row, evaluation, line, eval_fields), evaluation, line, row, unit)
    if skip_common:
        found.too_short += index.drop_common(common_limit(len(index.items)))
    for path in train:
        for line, row in iter_jsonl(path):
            found.train_rows += 1
            index.look(_text_of_row(row, train_fields), f"{path}:{line}", _id_of(row, path, line))
    for item in index.items:
        is_ngram, is_near = item.run > 0, item.best >= near
        found.ngram += is_ngram
        found.near += is_near
        if is_ngram or is_near:
            found.contaminated += 1
            place, name = item.place if is_near else item.run_place
            overlap = Overlap(
                id=item.id,
                line=item.line,
                why="ngram" if is_ngram else "near",
                share=item.best,
                run=item.run,
                units=item.units,
                train=place,
                train_id=name,
            )
            found.overlaps.append(overlap)
    return found


class _Index:
    """The evaluation's grams, and what was found of them in training rows so far."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.items: list[_Item] = []
        self.shingles: dict[str, dict[tuple[str, ...], list[int]]] = {
            "word": defaultdict(list),
            "char": defaultdict(list),
        }
        self.grams: dict[str, dict[int, dict[tuple[str, ...], list[int]]]] = {"word": {}, "char": {}}

    def add(self, text: str, path: str | Path, line: int, row: object, unit: Unit) -> bool:
        """Take up an item; False where it is too short to judge."""
        units, kind = units_of(text, unit)
        length = min(self.n, len(units))
        if length < LEAST:
            return False
        number = len(self.items)
        shingles = set(grams_of(units, SHINGLE[kind]))
        grams = set(grams_of(units, length))
        least = min(len(set(grams_of(gram, SHINGLE[kind]))) for gram in grams)
        self.items.append(_Item(_id_of(row, path, line), line, len(units), len(shingles), length, least))
        for shingle in shingles:
            self.shingles[kind][shingle].append(number)
        by_gram = self.grams[kind].setdefault(length, defaultdict(list))
        for gram in grams:
            by_gram[gram].append(number)
        return True

    def drop_common(self, limit: int) -> int:
        """Forget what more than `limit` items have; returns how many items are then too short to judge.

        A long gram that is mostly made of common short ones is forgotten too: an instruction's end and a first word.
        """
        for item in self.items:
            item.least = item.length
        for kind, by_shingle in self.shingles.items():
            common = {shingle for shingle, held in by_shingle.items() if len(held) > limit}
            for shingle in common:
                for number in by_shingle.pop(shingle):
                    self.items[number].shingles -= 1
            for by_gram in self.grams[kind].values():
                for gram in list(by_gram):
                    inner = list(grams_of(gram, SHINGLE[kind]))
                    if 2 * sum(shingle in common for shingle in inner) > len(inner):
                        del by_gram[gram]
                        continue
                    own = len(set(inner) - common)
                    for number in by_gram[gram]:
                        self.items[number].least = min(self.items[number].least, own)
        for item in self.items:
            item.judged = item.shingles >= LEAST_OWN
        return sum(not item.judged for item in self.items)

    def look(self, text: str, place: str, name: str) -> None:
        """Look for every item in a training row."""
        for kind in ("word", "char"):
            if not self.shingles[kind]:
                continue
            units, _ = units_of(text, kind)  # type: ignore[arg-type]
            shared = Counter(
                number
                for shingle in set(grams_of(units, SHINGLE[kind]))
                for number in self.shingles[kind].get(shingle, ())
            )
            for number, count in shared.items():
                item = self.items[number]
                if item.judged and count / item.shingles > item.best:
                    item.best, item.place = count / item.shingles, (place, name)
            # A row that holds a long gram holds all short ones within it.
            lengths = {item.length for number, count in shared.items() if count >= (item := self.items[number]).least}
            for length in sorted(lengths):
                by_gram = self.grams[kind][length]
                self._runs(units, length, by_gram, (place, name))

    def _runs(
        self, units: Sequence[str], length: int, by_gram: Mapping[tuple[str, ...], list[int]], place: tuple[str, str]
    ) -> None:
        """Note the longest run of each item's grams, one after another in this row."""
        before: dict[int, int] = {}
        for gram in grams_of(units, length):
            now = {number: before.get(number, length - 1) + 1 for number in by_gram.get(gram, ())}
            for number, run in now.items():
                item = self.items[number]
                if item.judged and run > item.run:
                    item.run, item.run_place = min(run, item.units), place
            before = now


def _strings(value: object, skipped: Sequence[str]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in skipped:
                yield from _strings(inner, skipped)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, skipped)


def _text_of_row(row: object, fields: Sequence[str]) -> str:
    if fields and isinstance(row, Mapping):
        return "\n".join(text for name in fields for text in _strings(row.get(name), ("role",)))
    return "\n".join(_strings(row, [name for name in NOT_TEXT if name != "answer" or not _is_long(row)]))


def _is_long(row: object) -> bool:
    """Is `answer` more than an option's letter or a number?"""
    return isinstance(row, Mapping) and len(str(row.get("answer", ""))) > 20


def _text_of_item(row: object, path: str | Path, line: int, fields: Sequence[str]) -> str:
    if not isinstance(row, dict):
        raise DataError(path, line, field=None, problem=f"expected an object, got {type(row).__name__}")
    chosen = list(fields) or [name for name in ITEM_FIELDS if row.get(name)][:1]
    if missing := [name for name in chosen if name not in row]:
        raise DataError(path, line, field=missing[0], problem="missing")
    if not chosen:
        known = ", ".join(ITEM_FIELDS)
        raise DataError(path, line, field=None, problem=f"has none of {known}; name its texts with --eval-fields")
    return "\n".join(text for name in chosen for text in _strings(row[name], ("role",)))


def _id_of(row: object, path: str | Path, line: int) -> str:
    name = row.get("id", row.get("task_id")) if isinstance(row, Mapping) else None
    return f"{Path(path).name}:{line}" if name is None else str(name)
