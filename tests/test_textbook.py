"""Passages to chunks to written questions: what is cleaned, where is cut, what of a reply is a question."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_tools.chunks import clean_paragraphs, cut_chunks, words_in
from data_tools.fields import BadReply
from data_tools.questions import read_questions
from data_tools.samples import Sample, digest_of, read_prompts, row_of
from data_tools.textbook import NearDuplicates, item_format, main, read_items


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(*argv: object) -> int:
    return main([str(own) for own in argv])


def item(question: str, options: Sequence[str] = ("one", "two"), answer: str = "A", more: str = "") -> str:
    own = "".join(f"<option_{chr(65 + k)}>{text}</option_{chr(65 + k)}>" for k, text in enumerate(options))
    return f"<item><question>{question}</question>{own}<answer>{answer}</answer>{more}</item>"


def test_cleaning_by_hand() -> None:
    text = "The\u00ad heart\r\nbeats \t fast.\n\n 12 \n\n- one\n- two\n  and on\n# Valves\nFour of them.\u200b\n\n"
    text += "نمی\u200cدانم"
    assert clean_paragraphs(text) == [
        "The heart beats fast.", "- one\n- two and on", "# Valves", "Four of them.", "نمی\u200cدانم",
    ]  # fmt: skip
    assert clean_paragraphs("hemo-\npoiesis") == ["hemo- poiesis"]
    assert clean_paragraphs("hemo-\npoiesis", join_hyphens=True) == ["hemopoiesis"]


def test_cuts_by_hand() -> None:
    """At most 6 words: 3 + 3 together, 4 apart; 8 between its sentences; a rest of 1 joins what is before."""
    paragraphs = ["a b c", "d e f", "g h i j", "# T", "k l m n. O p q r.", "s", "## U", "t u v", "# W", "w x y"]
    found = [(own.text, own.titles, own.words) for own in cut_chunks(paragraphs, 6, 2)]
    assert found == [
        ("a b c\n\nd e f", (), 6),
        ("g h i j", (), 4),
        ("k l m n.", ("T",), 4),
        ("O p q r.\n\ns", ("T",), 5),
        ("t u v", ("T", "U"), 3),
        ("w x y", ("W",), 3),
    ]
    (joined,) = cut_chunks(["a b c d e f", "g"], 6, 2)
    assert (joined.text, joined.words) == ("a b c d e f\n\ng", 7)
    assert words_in("心脏有四个腔") == 6 and [own.text for own in cut_chunks(["心脏跳动。肺呼吸。"], 5, 1)] == [
        "心脏跳动。",
        "肺呼吸。",
    ]


def test_questions_of_a_reply() -> None:
    """Each item by itself: the good ones stay whatever the others are."""
    good = {"question": "Which one?", "options": {"A": "one", "B": "two"}, "answer": "A"}
    text = "Sure.\n" + item("Which one?") + item("Which?", answer="C") + item("Which?", ["x", " X"])
    text += (
        item("Which?", ["x", "y", "z"]) + item("Which one?", more="<explanation>So.</explanation>") + "<item><question>"
    )
    found = [str(own) if isinstance(own, BadReply) else own for own in read_items(text, 2)]
    assert found == [
        "an item without end",
        good,
        "an answer that is no letter of the options",
        "two options are equal",
        "more than 2 options",
        {**good, "explanation": "So."},
    ]
    with pytest.raises(BadReply, match="no <item>"):
        list(read_items("Which one? A. one B. two", 2))
    (shown,) = read_items(item_format(3).replace("the right option's letter", "B").replace("...", "x"), 3)
    assert str(shown) == "two options are equal"  # the format that a prompt shows is the one that is read


def test_near_duplicates_by_hand() -> None:
    """7 words are 5 runs of 3: four of them shared is 0.8."""
    seen = NearDuplicates(0.8)
    assert seen.add("a b c d e f g")
    assert not seen.add("A b, c d e f x")  # abc bcd cde def of 5
    assert seen.add("a b c d e x y")  # 3 of 5
    assert seen.add("Why?") and not seen.add("why")


def test_from_passages_to_questions(shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real passages: no word is lost, chunks obey their length, and what comes out is a question set that is read."""
    passages = shared_dir / "data" / "textbook_openstax_ap" / "passages.jsonl"
    chunks, requests, samples, out = (tmp_path / f"{name}.jsonl" for name in "crsq")
    assert call("chunks", "--passages", passages, "--words", 200, "--least", 20, "--out", chunks) == 0
    rows = read(chunks)
    source = {row["id"]: row for row in read(passages)}
    for name, passage in source.items():
        own = [row for row in rows if row["passage_id"] == name]
        text = " ".join(row["text"] for row in own)
        assert text.split() == " ".join(clean_paragraphs(passage["text"])).split()
        assert own[0]["titles"] == [title for title in (passage["title"], passage["section"]) if title]
    assert all(row["words"] < 220 for row in rows if row["text"].count(". ") > 5)

    prompts = tmp_path / "p.toml"
    text = "Write {count} questions with {options} options on this.\\n{titles}\\n{text}\\nLike:\\n{format}"
    prompts.write_text(f'[question]\ntext = "{text}"\n', encoding="utf-8")
    few = write(tmp_path / "few.jsonl", rows[:3])
    common = ("--options", 2, "--out")
    assert call("requests", "--chunks", few, "--prompts", prompts, "--count", 2, *common, requests) == 0
    asked = read_prompts(requests)
    assert rows[0]["text"] in str(asked[0].prompt) or "Sites of Hemopoiesis" in str(asked[0].prompt)
    replies = {
        asked[0].id: [item("Where are blood cells made in adults?", ["marrow", "skin"]) + item("Which?")],
        asked[1].id: [item("Where are blood cells made in adults?", ["Marrow", "skin"]), "I cannot."],
        asked[2].id: [item("According to the passage, which cells divide?", ["stem cells", "none"], "B")],
    }
    by_id = {own.id: own.prompt for own in asked}
    samples.write_bytes(
        b"".join(
            row_of(
                Sample(
                    id=name, sample=number, text=reply, finish_reason="stop", model="m", settings_digest="s",
                    prompt_digest=digest_of(by_id[name]),
                )
            )
            for name, own in replies.items()
            for number, reply in enumerate(own)
        )
    )  # fmt: skip
    argv = ("questions", "--requests", requests, "--samples", samples, "--forbid", "(?i)according to the passage")
    capsys.readouterr()
    assert call(*argv, *common, out) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "keys: 1 A; the key is the longest option in 1 of 1"
    assert said[1].startswith("3 requests, 4 replies: 1 questions in ")
    for why in ("1 a question of less than 5 words", "1 a near-duplicate", "1 no <item>", "1 has '(?i)according"):
        assert why in said[1]
    (question,) = read_questions(out, "option")
    assert question.id == f"{rows[0]['id']}#0#0" and question.gold == "A"
    (row,) = read(out)
    assert row["chunk_id"] == rows[0]["id"] and row["titles"] == rows[0]["titles"] and row["source"] == "textbook"
    assert row["made_by"]["question"]["model"] == "m" and row["lang"] == "en"


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passages = write(tmp_path / "p.jsonl", [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}, {"id": "b", "text": 1}])
    assert call("chunks", "--passages", passages, "--out", tmp_path / "c.jsonl") == 2
    errors = capsys.readouterr().err
    assert "p.jsonl:2: field 'id': 'a' already stands in line 1" in errors
    assert "p.jsonl:3: field 'text': expected a text" in errors and not (tmp_path / "c.jsonl").exists()
    assert call("chunks", "--passages", passages, "--words", 9, "--least", 9, "--out", "c") == 2
    assert "--least 9: must be below --words 9" in capsys.readouterr().err
