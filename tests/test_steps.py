"""Answers cut into steps: put together they are the text again, and the cuts are where a person would make them."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.steps import ANSWER_LINE, UNITS, Steps, Unit, compiled, split_steps

PATTERN = re.compile(r"(?=Step \d)")
pieces = st.sampled_from(
    ["3.5", " ", "\n", "\r\n", "\t", ".", "。", "؟", "A", "b", "e.g.", "```", "def f():", "#", "\u2028", "'''", "\x0c"]
)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(pieces | st.text(max_size=3), max_size=25).map("".join), unit=st.sampled_from(UNITS))
def test_together_the_steps_are_the_text(text: str, unit: Unit) -> None:
    pattern = re.compile(r"A|\s") if unit == "regex" else None
    for answer_line in (None, ANSWER_LINE):
        found = split_steps(text, unit, pattern=pattern, answer_line=answer_line)
        assert "".join(found.steps) + found.rest == (text if text.strip() else "")
        assert all(step.strip() for step in found.steps)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.5 kg. She, e.g. Ann, has 2. So 5.5.", ["It is 3.5 kg.", " She, e.g. Ann, has 2.", " So 5.5."]),
        ("Dr. Li came at 5 p.m. on foot. Why? No. See No. 5!",
         ["Dr. Li came at 5 p.m. on foot.", " Why?", " No.", " See No. 5!"]),
        ("1. Add.\n2. Divide.\n\nDone", ["1. Add.\n", "2. Divide.\n\n", "Done"]),
        ('He said "stop." Then... he went on.', ['He said "stop."', " Then... he went on."]),
        ("دما ۳.۵ درجه است. چرا؟ چون شب است۔ پایان", ["دما ۳.۵ درجه است.", " چرا؟", " چون شب است۔", " پایان"]),
        ("患者发热。体温38.5度！为什么？因为感染。", ["患者发热。", "体温38.5度！", "为什么？", "因为感染。"]),
        ("他说：“好。”然后走了。", ["他说：“好。”", "然后走了。"]),
        ("first half\nsecond half.  Next", ["first half\n", "second half.", "  Next"]),
    ],
)  # fmt: skip
def test_sentences_of_three_languages(text: str, expected: list[str]) -> None:
    assert list(split_steps(text, "sentence").steps) == expected


def test_lines_keep_their_ends_and_the_indent_of_the_next() -> None:
    assert split_steps("\n a  \n\n  b\r\nc\n", "line").steps == ("\n a  \n\n", "  b\r\n", "c\n")
    assert split_steps(" \n ", "line") == Steps(())


def test_a_pattern_ends_a_step_or_by_looking_ahead_begins_one() -> None:
    text = "Step 1: add. Step 2: take. So 5"
    assert split_steps(text, "regex", pattern=PATTERN).steps == ("Step 1: add. ", "Step 2: take. So 5")
    assert split_steps(text, "regex", pattern=re.compile(r"\. ")).steps == ("Step 1: add. ", "Step 2: take. ", "So 5")
    with pytest.raises(UserError, match="need a pattern"):
        split_steps(text, "regex")
    with pytest.raises(UserError, match=r"--pattern '\(': is no regular expression"):
        compiled("(", "--pattern")


PROGRAM = '''import math
import re

# the area
@staticmethod
def area(r):
    """Of a circle."""
    if r < 0:
        r = -r

        r += 0
    # now
    return math.pi * r


class Box:
    side = 1; name = "b"

    def size(self):
        x = """
a blank line

in a text"""
        return x
print(1)
'''


def test_a_program_by_its_statements() -> None:
    lines = PROGRAM.splitlines(keepends=True)
    firsts = [0, 1, 3, 7, 11, 15, 18, 23, 24]
    expected = ["".join(lines[a:b]) for a, b in zip(firsts, [*firsts[1:], len(lines)], strict=True)]
    assert list(split_steps(PROGRAM, "code").steps) == expected
    fenced = f"Here:\n```python\n{PROGRAM}```\nIt works."
    around = ["Here:\n```python\n" + expected[0], *expected[1:-1], expected[-1] + "```\nIt works."]
    assert list(split_steps(fenced, "code").steps) == around


def test_what_is_no_program_is_cut_at_blank_lines() -> None:
    broken = "def f(:\n  x = 1\n\n  y = 2\n\n\nreturn"
    assert split_steps(broken, "code").steps == ("def f(:\n  x = 1\n\n", "  y = 2\n\n\n", "return")


@pytest.mark.parametrize(
    "line",
    [
        "The answer is 5.", "So, the final answer is: B", "#### 624", "**Answer:** 7", "\\boxed{3}",
        "پاسخ نهایی ۵ است", "بنابراین گزینه ب درست است",
        "答案是42。", "因此正确答案为B", "故选C。", "Therefore, the correct option is (C).",
    ],
)  # fmt: skip
def test_a_line_that_says_the_answer_is_no_step(line: str) -> None:
    assert split_steps(f"3 + 4 = 7\n{line}\n", "line", answer_line=ANSWER_LINE) == Steps(("3 + 4 = 7\n",), f"{line}\n")
    assert len(split_steps(f"3 + 4 = 7\n{line}\n", "line").steps) == 2


@pytest.mark.parametrize(
    "line", ["She answered 5 letters.", "The total is 7.", "پاسخگو بود", "Options are dear: 5 each"]
)
def test_a_line_that_works_is_a_step(line: str) -> None:
    assert split_steps(line, "line", answer_line=ANSWER_LINE).rest == ""


def test_real_solutions(shared_dir: Path) -> None:
    """GSM8K: a step for each line but the last, which gives the answer; every program of MBPP comes back whole."""
    rows = [
        json.loads(line) for line in (shared_dir / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for row in rows:
        found = split_steps(row["answer"], "line", answer_line=ANSWER_LINE)
        assert found.rest.startswith("#### ") and "".join(found.steps) + found.rest == row["answer"]
        assert len(found.steps) == sum(bool(line.strip()) for line in row["answer"].split("\n")) - 1
    programs = [
        json.loads(line)["code"] for line in (shared_dir / "data/mbpp/test.jsonl").read_text("utf-8").splitlines()
    ]
    for program in programs:
        found = split_steps(program, "code")
        assert "".join(found.steps) == program
    assert sum(len(split_steps(program, "code").steps) > 1 for program in programs) > len(programs) / 2
