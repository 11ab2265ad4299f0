"""Requests, samples and verdicts joined: in order, and never of another prompt than was asked."""

import json
from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.pairs.exchange import RequestRow, read_answers, read_prompt_texts, write_requests
from data_tools.samples import Sample, SampleWriter, digest_of
from data_tools.schema import Message

PROMPTS = {"q1": (Message("user", "2 + 5?"),), "q2": (Message("system", "Be short."), Message("user", "3 + 5?"))}


def sample(name: str, number: int, prompt: tuple[Message, ...] | None = None) -> Sample:
    asked = PROMPTS[name] if prompt is None else prompt
    return Sample(
        id=name, sample=number, text=f"{name} {number}", finish_reason="stop", model="m", settings_digest="s",
        prompt_digest=digest_of(asked),
    )  # fmt: skip


def files(folder: Path, *samples: Sample) -> tuple[Path, Path]:
    write_requests(folder / "r.jsonl", [RequestRow(id=name, prompt=prompt) for name, prompt in PROMPTS.items()])
    with SampleWriter(folder / "s.jsonl") as writer:
        for own in samples:
            writer.append(own)
    return folder / "r.jsonl", folder / "s.jsonl"


def test_answers_come_in_the_order_of_requests_with_their_verdicts(tmp_path: Path) -> None:
    requests, samples = files(tmp_path, sample("q2", 0), sample("q1", 1), sample("q1", 0))
    verdicts = tmp_path / "v.jsonl"
    rows = [("q1", 0, "wrong"), ("q1", 1, "correct"), ("q2", 0, "invalid")]
    verdicts.write_text("".join(json.dumps({"id": i, "sample": n, "verdict": v}) + "\n" for i, n, v in rows))
    answers = read_answers(requests, samples, verdicts)
    assert [(own.id, own.sample.sample, own.verdict) for own in answers] == rows
    assert [own.prompt for own in answers] == [PROMPTS["q1"], PROMPTS["q1"], PROMPTS["q2"]]
    kept = [row for row in rows if row[:2] != ("q1", 1)]
    verdicts.write_text("".join(json.dumps({"id": i, "sample": n, "verdict": v}) + "\n" for i, n, v in kept))
    with pytest.raises(UserError, match="no verdict on sample 1 of id 'q1'"):
        read_answers(requests, samples, verdicts)


def test_samples_of_another_prompt_or_of_none_are_refused(tmp_path: Path) -> None:
    requests, samples = files(tmp_path, sample("q1", 0, (Message("user", "2 + 6?"),)))
    with pytest.raises(UserError, match="sample 0 of id 'q1' was drawn for another prompt than"):
        read_answers(requests, samples)
    stranger = Sample(**{**{name: getattr(sample("q1", 0), name) for name in Sample.__slots__}, "id": "q9"})
    (tmp_path / "other").mkdir()
    requests, samples = files(tmp_path / "other", stranger)
    with pytest.raises(UserError, match="id 'q9' is no request"):
        read_answers(requests, samples)


def test_texts_of_requests_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[ask]\ntext = "{question} Say {{x}}."\nsystem = "S"\n[bad]\ntext = "t"\nsytem = "S"\n')
    ask = read_prompt_texts(path, ["ask"])["ask"]
    assert ask.messages({"question": "Why?"}) == (Message("system", "S"), Message("user", "Why? Say {x}."))
    with pytest.raises(UserError, match=r"asks for \{question\}, which question 'q1' does not have"):
        ask.messages({"id": "q1"})
    for name, words in (("none", r"table \[none\]"), ("bad", "'sytem' is not known")):
        with pytest.raises(UserError, match=words):
            read_prompt_texts(path, [name])
