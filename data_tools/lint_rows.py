"""Rows of pairs as the lint looks at them: texts without roles, whose question, who judged them, what they share.

Read here: any file of pairs that training reads (`schema`), with the columns of `pairs.record` where they are there.
A row whose two sides are the same is an error for training; here it is kept apart and counted.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.questions import question_id
from data_tools.schema import Text, check_record


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """One pair. prompt: all its messages' texts, chosen and rejected: those of the assistant; a blank line between.

    asked: the user's and system's texts alone. question: the row's `question_id`. source: "" where the row has none.
    verified: correct | wrong | invalid by side, None where nobody judged it.
    """

    id: str
    line: int
    prompt: str
    asked: str
    chosen: str
    rejected: str
    source: str
    question: str | None
    verified: Mapping[str, str | None]

    @property
    def same(self) -> bool:
        """Whether both sides say the same, apart from case and white space."""
        return folded(self.chosen) == folded(self.rejected)


def folded(text: str) -> str:
    """Without the differences of case and white space."""
    return " ".join(text.casefold().split())


def read_rows(path: str | Path) -> list[PairRow]:
    """Every pair of the file, checked as training checks it but for equal sides. Raises DataErrors."""
    seen: dict[str, int] = {}

    def check(item: tuple[int, object]) -> PairRow:
        line, value = item
        if isinstance(value, dict) and "chosen" in value and value["chosen"] == value.get("rejected"):
            # Checked as if the sides differed; the pair is kept to be counted.
            record = check_record({**value, "rejected": _other(value["chosen"])}, kind="pair", path=path, line=line)
            completions: Sequence[Text] = record.completions[:1] * 2
        else:
            record = check_record(value, kind="pair", path=path, line=line)
            completions = record.completions
        assert isinstance(value, dict)
        if (first := seen.setdefault(record.id, line)) != line:
            raise DataError(path, line, field="id", problem=f"'{record.id}' already stands in line {first}")
        return _row(record.id, line, record.prompt, completions, value, path)

    return check_each(iter_jsonl(path), check)


def _other(side: Any) -> Any:
    """The side with one more character, where it is text or messages; else as it is, for the check to refuse."""
    if isinstance(side, str):
        return f"{side}."
    if isinstance(side, list) and side and isinstance(side[-1], dict) and isinstance(side[-1].get("content"), str):
        return [*side[:-1], {**side[-1], "content": f"{side[-1]['content']}."}]
    return side


def _row(
    name: str, line: int, prompt: Text, completions: Sequence[Text], value: Mapping[str, Any], path: str | Path
) -> PairRow:
    verified = value.get("verified")
    if verified is None:
        verified = {}
    if not isinstance(verified, dict):
        raise DataError(path, line, field="verified", problem='expected {"chosen": ..., "rejected": ...}')
    question, source = value.get("question_id"), value.get("source")
    return PairRow(
        id=name,
        line=line,
        prompt=_texts(prompt, None),
        asked=_texts(prompt, ("system", "user")),
        chosen=_texts(completions[0], ("assistant",)),
        rejected=_texts(completions[1], ("assistant",)),
        source="" if source is None else str(source),
        question=None if question is None else str(question),
        verified={side: verified.get(side) for side in ("chosen", "rejected")},
    )


def _texts(text: Text, roles: Sequence[str] | None) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(message.content for message in text if roles is None or message.role in roles)


def asked_of(row: PairRow, known: Container[str], by_text: Mapping[str, str]) -> str | None:
    """The id of the row's question: its `question_id`, what its id begins with, or whose text its prompt is.

    by_text: folded text of a question to its id.
    """
    for name in (row.question, row.id):
        if name is not None and (found := question_id(name, known)) is not None:
            return found
    return by_text.get(folded(row.asked))


def groups_of(rows: Sequence[PairRow]) -> list[int]:
    """A number for each row; rows of one prompt or of one question have the same one, directly or through others."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        for key in _keys(row):
            parent[root(index)] = root(first.setdefault(key, index))
    return [root(index) for index in range(len(rows))]


def _keys(row: PairRow) -> Iterator[tuple[str, str]]:
    if row.prompt:
        yield "prompt", folded(row.prompt)
    if row.question is not None:
        yield "question", row.question
