"""Answers made up by hand, as pools and as the three files that a pool is made of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.jsonl import write_rows
from data_tools.pool import Attempt
from data_tools.samples import Sample, prompt_digest, row_of

Said = tuple[str, str]
"""The text of an answer and the verdict on it."""


def attempt(text: str, verdict: str = "correct", sample: int = 0, question: str = "q", **more: Any) -> Attempt:
    fixed = {"round": 0, "finish_reason": "stop", "model": "m", "settings_digest": "s", "prompt": f"{question}?"}
    name = {"id": question, "question_id": question}
    return Attempt(**{**fixed, **name, **more}, sample=sample, text=text, verdict=verdict)


def write_answers(
    folder: Path,
    answers: dict[str, Sequence[Said]],
    *,
    prefixes: dict[str, str] | None = None,
    name: str = "",
    **more: Any,
) -> list[str]:
    """Requests, samples and verdicts of these answers, by request; returns the options that name the files."""
    begun = prefixes or {}
    files = [folder / f"{name}{kind}.jsonl" for kind in ("requests", "samples", "verdicts")]
    requests = [{"id": own, "prompt": f"{own}?", **({"prefix": begun[own]} if own in begun else {})} for own in answers]
    write_rows(files[0], requests)
    samples, verdicts = [], []
    for own, said in answers.items():
        for number, (text, verdict) in enumerate(said):
            digest = prompt_digest(f"{own}?", begun.get(own, ""))
            fixed = {"finish_reason": "stop", "model": "m", "settings_digest": "s", "prompt_digest": digest}
            samples.append(Sample(id=own, sample=number, text=text, **{**fixed, **more}))
            verdicts.append({"id": own, "sample": number, "verdict": verdict})
    files[1].write_bytes(b"".join(map(row_of, samples)))
    write_rows(files[2], verdicts)
    return ["--requests", str(files[0]), "--samples", str(files[1]), "--verdicts", str(files[2])]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
