"""The one record that every pair builder writes, a line of JSON each; training reads it as any pair, and extra columns
say where it comes from.

    id                its own in the file: the question's id, then "#" and what tells it from others of that question
    prompt            messages (or a string); chosen, rejected: one assistant message each (or strings)
    source            the way it was built, like "outcome" or "teacher_correct"
    question_id       the question it is of: split held-out parts by this, never by row
    verified          {"chosen": ..., "rejected": ...}, each correct | wrong | invalid, or null where nobody judged it
    scores            {"chosen": x, "rejected": y}, of a process reward or a judge; {} where there are none
    round             0, 1, ...: of an iterated method
    made_by           {"chosen": {...}, "rejected": {...}}: model, settings_digest, sample, as far as known

No pair is built here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.samples import Sample, messages_of
from data_tools.schema import Text, check_record

Verified = str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """One pair; chosen and rejected are the completions' texts. The fields are explained above."""

    id: str
    prompt: Text
    chosen: str
    rejected: str
    source: str
    question_id: str
    verified: Mapping[str, Verified] = field(default_factory=lambda: {"chosen": None, "rejected": None})
    scores: Mapping[str, float] = field(default_factory=dict)
    round: int = 0
    made_by: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As a row of JSON; the columns in the order in which a person reads them."""
        spoken = not isinstance(self.prompt, str)
        texts = {"chosen": self.chosen, "rejected": self.rejected}
        sides = {side: [{"role": "assistant", "content": text}] if spoken else text for side, text in texts.items()}
        return {
            "id": self.id,
            "prompt": messages_of(self.prompt) if spoken else self.prompt,
            **sides,
            "source": self.source,
            "question_id": self.question_id,
            "verified": dict(self.verified),
            "scores": dict(self.scores),
            "round": self.round,
            "made_by": {side: dict(who) for side, who in self.made_by.items()},
        }


def made_by(sample: Sample) -> dict[str, Any]:
    """Who made a sample, for `made_by` of a record."""
    return {"model": sample.model, "settings_digest": sample.settings_digest, "sample": f"{sample.id}:{sample.sample}"}


def write_pairs(path: str | Path, records: Iterable[PairRecord]) -> None:
    """All of them or no file. Raises UserError."""
    write_rows(path, (record.row() for record in records))


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """Rows as they stand, after the check that training makes. Raises DataError."""
    rows = []
    for line, value in iter_jsonl(path):
        check_record(value, kind="pair", path=path, line=line)
        assert isinstance(value, dict)
        rows.append(value)
    return rows
