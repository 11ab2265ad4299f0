"""Rows for builders that ask for a second text: questions, and answers written by hand in a sampler's files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools import verify
from data_tools.samples import Sample, digest_of, read_prompts, row_of


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answer(
    requests: Path,
    out: Path,
    texts: Mapping[str, str | Sequence[str]],
    *,
    model: str = "student",
    cut: Sequence[str] = (),
) -> Path:
    """A samples file: `texts` by request id, one or several each. cut: ids whose answers the sampler ended."""
    prompts = {prompt.id: prompt.prompt for prompt in read_prompts(requests)}
    with open(out, "wb") as file:
        for name, own in texts.items():
            for number, text in enumerate([own] if isinstance(own, str) else own):
                sample = Sample(
                    id=name,
                    sample=number,
                    text=text,
                    finish_reason="length" if name in cut else "stop",
                    model=model,
                    settings_digest="0" * 16,
                    prompt_digest=digest_of(prompts[name]),
                )
                file.write(row_of(sample))
    return out


def judged(questions: Path, samples: Path, out: Path, kind: str = "option") -> Path:
    """Verdicts of the real verifier."""
    paths = ["--tasks", str(questions), "--samples", str(samples), "--out", str(out)]
    assert verify.main(["--kind", kind, *paths]) == 0
    return out


def asked(path: Path, questions: Sequence[Mapping[str, Any]], system: str | None = None) -> Path:
    """The student's requests: the question and its options."""
    rows = []
    for row in questions:
        options = "\n".join(f"{label}. {text}" for label, text in row.get("options", {}).items())
        turns = [{"role": "system", "content": system}] if system else []
        rows.append(
            {
                "id": row["id"],
                "prompt": [*turns, {"role": "user", "content": f"{row['question']}\n{options}".strip()}],
            }
        )
    return write_jsonl(path, rows)


def shared_questions(shared_dir: Path, name: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a set of real questions."""
    return rows_of(shared_dir / "data" / name / "train.jsonl")[:count]
