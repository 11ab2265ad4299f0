"""Translation of question sets: fields in and out, what is asked again, and which translations N referees keep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_tools.fields import BadReply, read_fields, write_fields
from data_tools.samples import Sample, digest_of, read_prompts, row_of
from data_tools.translate import main, read_score, read_translation

PROMPTS = """
[translate]
system = "You translate."
text = "Into Persian, tags kept:\\n{fields}"
[terms]
text = "Are the terms right, 0 to 5?\\n{source}\\n{translation}\\nReply <score>N</score>."
"""
ROWS = [
    {
        "id": "a",
        "question": "Which bone?",
        "options": {"A": "Femur", "B": "Ulna"},
        "answer": "B",
        "explanation": "Arm.",
    },
    {"id": "b", "question": "How many?", "options": ["20", "30"], "answer": "A", "explanation": None},
    {"id": "c", "question": "Which organ?", "options": {"A": "Heart", "B": "Liver"}, "answer": "A"},
]
A_FA = {"question": "کدام استخوان؟", "option_A": "ران", "option_B": "زند", "explanation": "بازو."}
B_FA = {"question": "چند تا؟", "option_A": "20", "option_B": "30"}
C_FA = {"question": "کدام عضو؟", "option_A": "قلب", "option_B": "کبد"}


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(requests: Path, path: Path, texts: Mapping[str, str], finish: str = "stop") -> Path:
    """Samples for the requests that `texts` names."""
    prompts = {own.id: own.prompt for own in read_prompts(requests)}
    rows = [
        Sample(
            id=name, sample=0, text=text, finish_reason=finish, model="m", settings_digest="s",
            prompt_digest=digest_of(prompts[name]),
        )
        for name, text in texts.items()
    ]  # fmt: skip
    path.write_bytes(b"".join(map(row_of, rows)))
    return path


def call(*argv: object) -> int:
    return main([str(own) for own in argv])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    prompts = tmp_path / "p.toml"
    prompts.write_text(PROMPTS, encoding="utf-8")
    return {"questions": write(tmp_path / "q.jsonl", ROWS), "prompts": prompts, "requests": tmp_path / "r.jsonl"}


def ask(files: dict[str, Path]) -> int:
    return call(
        "requests", "--questions", files["questions"], "--kind", "option", "--prompts", files["prompts"],
        "--fields", "question", "options", "explanation", "--out", files["requests"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<x>1</x>", "a field missing: y"),
        ("<x>1</x><y> </y>", "a field empty: y"),
        ("<x>1</x><y>2", "a field without end: y"),
        ("<x>1<y>2</y></x>", "a field inside another: y"),
        ("<x>1</x><y>2</y><x>3</x>", "a field twice: x"),
        ("1</x><y>2</y>", "an end without a beginning: x"),
        ("<think>I see <x>1</x><y>2</y>", "ends inside its thinking"),
    ],
)
def test_fields_that_cannot_be_read(text: str, why: str) -> None:
    with pytest.raises(BadReply, match=why):
        read_fields(text, ["x", "y"])


def test_fields_that_can() -> None:
    """Thinking, words around and tags that nobody asked for are no fields; what was written is read."""
    text = "<think><x>no</x></think>Here:\n<y>a <b>2</b> < 3</y> and <x>\n1\n\n2 </x>."
    assert read_fields(text, ["x", "y"]) == {"x": "1\n\n2", "y": "a <b>2</b> < 3"}
    assert read_fields("<x>1</x>", ["x", "y"], optional=["y"]) == {"x": "1"}
    assert read_fields(write_fields(A_FA), list(A_FA)) == A_FA


def test_translations_that_are_none() -> None:
    source = {"question": "Which?", "option_A": "one", "option_B": "two"}
    with pytest.raises(BadReply, match="left as it was"):
        read_translation(write_fields(source), source)
    with pytest.raises(BadReply, match="two options became one"):
        read_translation(write_fields({"question": "Q", "option_A": "x", "option_B": "x"}), source)
    for text in ("<score>6</score>", "<score>4.5</score>", "4", "<score>four</score>"):
        with pytest.raises(BadReply):
            read_score(text)
    assert read_score("Good.\n<score> 4 </score>") == 4


def test_from_questions_to_kept_translations(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """a is read at once, b was cut off, c lost a field: both are asked again, b then comes. Two referees on a and b."""
    assert ask(files) == 0
    first, second = (own.prompt for own in read_prompts(files["requests"])[:2])
    assert first[1].content.startswith("Into Persian, tags kept:\n<question>\nWhich bone?\n</question>\n<option_A>")
    assert (
        "<explanation>" in first[1].content and "<explanation>" not in second[1].content
    )  # null: nothing to translate

    samples, again, out = tmp_path / "s.jsonl", tmp_path / "again.jsonl", tmp_path / "t.jsonl"
    answer(files["requests"], samples, {"a": write_fields(A_FA), "c": "<question>کدام عضو؟</question>"})
    common = ("rows", "--questions", files["questions"], "--kind", "option", "--lang", "fa", "--out", out)
    assert call(*common, "--requests", files["requests"], "--samples", samples, "--again", again) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "1 of 3 questions translated" in line and "2 missing; unreadable: 1 a field missing: option_A" in line
    assert [row["id"] for row in read(again)] == ["b#1", "c#1"]
    more = answer(again, tmp_path / "s2.jsonl", {"b#1": write_fields(B_FA)})
    third = tmp_path / "third.jsonl"
    files_ = ("--requests", files["requests"], again, "--samples", samples, more, "--again", third)
    assert call(*common, *files_) == 0
    assert [row["id"] for row in read(third)] == ["c#2"]
    rows = {row["id"]: row for row in read(out)}
    assert list(rows) == ["a", "b"]
    assert rows["a"] | ROWS[0] == rows["a"] | ROWS[0] and rows["a"]["options"] == {"A": "ران", "B": "زند"}
    assert (rows["a"]["explanation"], rows["a"]["answer"], rows["a"]["lang"]) == ("بازو.", "B", "fa")
    assert rows["b"]["options"] == ["20", "30"] and rows["b"]["question"] == "چند تا؟"  # a list stays a list
    assert rows["a"]["source_text"]["question"] == "Which bone?" and rows["a"]["translated_by"]["model"] == "m"
    before = out.read_bytes()
    assert call(*common, *files_) == 0 and out.read_bytes() == before

    judged = tmp_path / "rr.jsonl"
    asked = ("referee", "--rows", out, "--prompts", files["prompts"], "--table", "terms", "--out", judged)
    assert call(*asked) == 0
    assert "Which bone?" in str(read_prompts(judged)[0].prompt) and "ران" in str(read_prompts(judged)[0].prompt)
    one = answer(judged, tmp_path / "one.jsonl", {"a": "<score>5</score>", "b": "<score>4</score>"})
    two = answer(judged, tmp_path / "two.jsonl", {"a": "<score>4</score>", "b": "<score>3</score>"})
    three = answer(judged, tmp_path / "three.jsonl", {"a": "It is fine.", "b": "<score>5</score>"})
    kept = tmp_path / "kept.jsonl"
    base = ("filter", "--rows", out, "--out", kept, "--referee", "one", judged, one, "--referee", "two", judged, two)
    for more_, expected in (
        (("--threshold", 4, "--rule", "unanimous"), ["a"]),
        (("--threshold", 3, "--rule", "unanimous"), ["a", "b"]),
        (("--threshold", 5, "--rule", "majority"), []),  # one of two is no majority
        (("--threshold", 4, "--rule", "majority", "--referee", "three", judged, three), ["a", "b"]),
        (
            ("--threshold", 3, "--rule", "unanimous", "--referee", "three", judged, three),
            ["b"],
        ),  # no score: no approval
    ):
        assert call(*base, *more_) == 0
        assert [row["id"] for row in read(kept)] == expected
    line = capsys.readouterr().out.splitlines()[-1]
    assert "2 translations: 1 kept" in line and "three: 1 approved, 1 without a score" in line
    assert read(kept)[0]["referees"] == {"one": 4, "two": 3, "three": 5}


def test_what_does_not_fit_is_refused(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(files) == 0
    samples = answer(files["requests"], tmp_path / "s.jsonl", {"a": write_fields(A_FA)})
    write(files["questions"], [{**ROWS[0], "question": "Which other bone?"}, *ROWS[1:]])
    common = ("rows", "--questions", files["questions"], "--kind", "option", "--out", tmp_path / "t.jsonl")
    assert call(*common, "--requests", files["requests"], "--samples", samples) == 2
    assert "r.jsonl:1: field 'source_text': the question has changed since; ask anew" in capsys.readouterr().err
    assert call(*common, "--requests", files["requests"], "--samples", samples, samples) == 2
    assert "name as many files of both" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the paper gives no cut-off: it must be said
        call("filter", "--rows", samples, "--out", "x", "--referee", "a", "b", "c", "--rule", "unanimous")


def test_every_row_of_a_real_set_keeps_its_shape(shared_dir: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    """MedMCQA's questions, echoed by a translator that writes in capitals: ids, labels and answers are the source's."""
    files["questions"] = shared_dir / "data" / "medmcqa" / "test.jsonl"
    assert ask(files) == 0
    rows, asked = read(files["questions"]), read(files["requests"])
    texts = {row["id"]: write_fields({k: f"«{v}»" for k, v in row["source_text"].items()}) for row in asked}
    samples, out = answer(files["requests"], tmp_path / "s.jsonl", texts), tmp_path / "t.jsonl"
    common = ("rows", "--questions", files["questions"], "--kind", "option", "--out", out)
    assert call(*common, "--requests", files["requests"], "--samples", samples) == 0
    found = read(out)
    assert len(found) == len(rows) == 299
    for row, source in zip(found, rows, strict=True):
        assert (row["id"], row["answer"], list(row["options"])) == (
            source["id"],
            source["answer"],
            list(source["options"]),
        )
        assert row["question"] == f"«{source['question']}»".strip()
