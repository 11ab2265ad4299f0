"""Which worked answers become SFT rows, and which written questions answers agree on; each count by hand."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_tools import verify
from data_tools.distill import check_answer, main
from data_tools.fields import BadReply
from data_tools.jsonl import read_records
from data_tools.pairs.exchange import Answer
from data_tools.samples import Sample, digest_of, read_prompts, row_of

PROMPTS = """
[distill]
system = "You are a physician."
text = "{question}\\n{options}\\nThe right answer is {gold}. Work towards it."
[train]
text = "{question}\\n{options}"
"""
ROWS = [
    {"id": "a", "question": "Which bone?", "options": {"A": "Femur", "B": "Ulna"}, "answer": "B", "subject": "anatomy"},
    {"id": "b", "question": "How many?", "options": {"A": "20", "B": "30"}, "answer": "A"},
    {"id": "c", "question": "Which organ?", "options": {"A": "Heart", "B": "Liver"}, "answer": "A"},
]
RIGHT = "The forearm has two bones, one is the ulna.\nSo the answer is (B) Ulna."
TEXTS = {
    "a": [
        "I say the leg.\nSo the answer is (A) Femur.",  # wrong
        RIGHT,
        RIGHT,  # the same again
        "Ulna, for it is of the arm.\nSo the answer is (B) Ulna.",  # right and not needed; right and shorter
        "The answer is (B).\nI hope so.",  # right, without the closing phrase
    ],
    "b": ["The answer is (A) 20.", "Hm.", "The answer is (B) 30.", "The answer is (A) 20!", "The answer is (A) 20"],
}


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(*argv: object) -> int:
    return main([str(own) for own in argv])


def sample(name: str, number: int, text: str, digest: str, finish: str = "stop") -> Sample:
    return Sample(
        id=name, sample=number, text=text, finish_reason=finish, model="m", settings_digest="s", prompt_digest=digest
    )


def answers(requests: Path, path: Path, texts: Mapping[str, Sequence[str]]) -> Path:
    prompts = {own.id: digest_of(own.prompt) for own in read_prompts(requests)}
    own = [sample(name, k, text, prompts[name]) for name, many in texts.items() for k, text in enumerate(many)]
    path.write_bytes(b"".join(map(row_of, own)))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Questions asked, answered by TEXTS, and the answers judged."""
    names = {name: tmp_path / f"{name}.jsonl" for name in ("questions", "requests", "samples", "verdicts", "out")}
    names["prompts"] = tmp_path / "p.toml"
    names["prompts"].write_text(PROMPTS, encoding="utf-8")
    write(names["questions"], ROWS)
    asked = ("--questions", names["questions"], "--kind", "option", "--prompts", names["prompts"])
    assert call("requests", *asked, "--out", names["requests"]) == 0
    answers(names["requests"], names["samples"], TEXTS)
    judge(names)
    return names


def judge(files: Mapping[str, Path]) -> None:
    argv = ("--kind", "option", "--tasks", files["questions"], "--samples", files["samples"])
    assert verify.main([str(own) for own in (*argv, "--out", files["verdicts"])]) == 0


def distill(files: Mapping[str, Path], *more: object) -> list[dict[str, Any]]:
    names = [
        part for name in ("questions", "requests", "samples", "verdicts", "out") for part in (f"--{name}", files[name])
    ]
    assert call("rows", "--kind", "option", *names, *more) == 0
    return read(files["out"])


def test_rows_by_hand(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    closing = ("--closing", r"the answer is \([A-E]\) \w+\.$")
    rows = distill(files, *closing)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("3 questions, 10 samples: 1 rows of 1 questions in ")
    dropped = {why: int(count) for count, why in re.findall(r"(\d+) ([^,]+)", line.partition("dropped: ")[2])}
    # a: one wrong, one twice, one not needed, one without; b: "The" is no "the", one wrong, one invalid
    assert dropped == {
        "judged wrong": 2, "judged invalid": 1, "the same again": 1, "not needed": 1, "without the closing phrase": 4,
    }  # fmt: skip
    (row,) = rows
    assert row["id"] == "a#1" and row["question_id"] == "a" and row["source"] == "distill"
    assert row["verified"] == "correct" and row["made_by"]["sample"] == "a:1" and row["subject"] == "anatomy"
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][-1]["content"] == RIGHT and "answer is B." in row["messages"][1]["content"]

    before = files["out"].read_bytes()
    assert distill(files, *closing) == rows and files["out"].read_bytes() == before
    (shortest,) = distill(files, *closing, "--prefer", "shortest")
    assert shortest["id"] == "a#3"
    assert [row["id"] for row in distill(files, *closing, "--keep", 2)] == ["a#1", "a#3"]
    own = distill(files, "--train-prompts", files["prompts"], "--most-words", 6)
    assert [row["id"] for row in own] == ["b#0"]
    assert own[0]["messages"][0] == {"role": "user", "content": "How many?\nA. 20\nB. 30"}
    (record,) = read_records([files["out"]], kind="sft")
    assert record.id == "b#0"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<think>x</think>\n<answer>B</answer>", None),
        ("<think>x</think> so <answer>B</answer>", "not of the form"),
        ("<answer>B</answer><think>x</think>", "not of the form"),
        ("<think>x</think><answer>B</answer></answer>", "not of the form"),
        ("<think> </think><answer>B</answer>", "not of the form"),
        ("<think>x<answer>B</answer></think>", "not of the form"),
    ],
)
def test_tags(text: str, why: str | None) -> None:
    given = Answer("a", "p", sample("a", 0, text, "d"), "correct")
    if why is None:
        check_answer(given, None, ["think", "answer"], 6, None)
        with pytest.raises(BadReply, match="under 7 words"):
            check_answer(given, None, [], 7, None)
        return
    with pytest.raises(BadReply, match=why):
        check_answer(given, None, ["think", "answer"], 0, None)


def test_an_answer_that_was_cut_off_is_not_learnt() -> None:
    with pytest.raises(BadReply, match="cut off"):
        check_answer(Answer("a", "p", sample("a", 0, RIGHT, "d", "length"), "correct"), None, [], 0, None)


def test_agreement_by_hand(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of five answers a's key is reached by four, b's by three; c was not answered."""
    argv = ("agree", "--kind", "option")
    argv += tuple(part for name in ("questions", "verdicts", "out") for part in (f"--{name}", str(files[name])))
    assert call(*argv, "--least", 4, "--of", 5) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "3 questions: 1 kept" in line and "1 reached by 3" in line and "1 unanswered" in line
    assert read(files["out"]) == [{**ROWS[0], "agreement": {"right": 4, "wrong": 1, "of": 5}}]
    assert call(*argv, "--least", 3, "--of", 5) == 0
    assert [row["id"] for row in read(files["out"])] == ["a", "b"]
    # rows of the questions that were kept: samples of the others are passed over
    files["questions"].write_bytes(files["out"].read_bytes())
    assert {row["question_id"] for row in distill({**files, "out": files["out"].with_name("sft.jsonl")})} == {"a", "b"}
    assert call(*argv, "--least", 3, "--of", 4) == 2
    assert "id 'a' has 5 verdicts, --of is 4; judge as many samples of every question" in capsys.readouterr().err
    assert call(*argv, "--least", 5, "--of", 4) == 2


def test_real_questions_with_their_own_explanations(
    shared_dir: Path, tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """GSM8K's reference solutions all end right: every question gives its row, and a wrong number gives none."""
    data = shared_dir / "data" / "gsm8k" / "test.jsonl"
    rows = read(data)[:40]
    files["questions"] = write(tmp_path / "gsm.jsonl", rows)
    asked = ("--questions", files["questions"], "--kind", "number", "--out", files["requests"])
    files["prompts"].write_text('[distill]\ntext = "{question}"\n', encoding="utf-8")
    assert call("requests", *asked, "--prompts", files["prompts"]) == 0
    wrong = {row["id"]: f"#### {int(row['final_answer']) + 1}" for row in rows}
    answers(files["requests"], files["samples"], {row["id"]: [row["answer"], wrong[row["id"]]] for row in rows})
    argv = (
        "--kind",
        "number",
        "--tasks",
        files["questions"],
        "--samples",
        files["samples"],
        "--out",
        files["verdicts"],
    )
    assert verify.main([str(own) for own in argv]) == 0
    names = [
        part for name in ("questions", "requests", "samples", "verdicts", "out") for part in (f"--{name}", files[name])
    ]
    assert call("rows", "--kind", "number", *names, "--closing", "^#### ", "--keep", 2) == 0
    assert "40 questions, 80 samples: 40 rows of 40 questions" in capsys.readouterr().out
    assert [row["messages"][-1]["content"] for row in read(files["out"])] == [row["answer"].strip() for row in rows]
