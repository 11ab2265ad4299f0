"""Every hand-written answer of tests/answer_strings.py gets the verdict and the reading that stand beside it, and
answers about real questions, written by templates or by models, are not misread."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import answer_strings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.jsonl import iter_jsonl
from data_tools.verify_number import verify_number
from data_tools.verify_option import verify_option
from data_tools.verify_option_words import PERSIAN

OPTION_ROWS = answer_strings.ENGLISH_OPTIONS + answer_strings.PERSIAN_OPTIONS + answer_strings.CHINESE_OPTIONS


def test_there_are_enough_of_each() -> None:
    assert len(OPTION_ROWS) + len(answer_strings.NUMBERS) >= 200
    for rows in (answer_strings.PERSIAN_OPTIONS, answer_strings.CHINESE_OPTIONS, answer_strings.NUMBERS):
        assert len(rows) >= 50 and any(row[2] == "invalid" for row in rows)


@pytest.mark.parametrize(("question", "text", "verdict", "extracted"), OPTION_ROWS)
def test_option(question: str, text: str, verdict: str, extracted: str | None) -> None:
    gold, options = answer_strings.OPTIONS[question]
    result = verify_option(text, gold, options)
    assert (result.verdict, result.extracted) == (verdict, extracted), result.why


@pytest.mark.parametrize(("gold", "text", "verdict", "extracted"), answer_strings.NUMBERS)
def test_number(gold: str, text: str, verdict: str, extracted: str | None) -> None:
    result = verify_number(text, gold)
    assert (result.verdict, result.extracted) == (verdict, extracted), result.why


TEMPLATES = {
    "en": (
        "The answer is ({label}) {text}",
        "Answer: {text}",
        "{label}. {text}",
        "It is not {other}. \\boxed{{{label}}}",
    ),
    "fa": ("پاسخ صحیح گزینه {persian} است.", "پاسخ: {persian}) {text}", "گزینه {persian} ({text}) صحیح است", "{text}"),
    "zh": ("答案：{label}", "故选{label}。", "【答案】{label} {text}", "不选{other}，答案是{label}、{text}"),
}
DATA = ("medqa", "medmcqa", "medxpertqa", "mmlu_med", "cmexam", "medmcqa_fa", "mmlu_med_fa", "parsinlu_math_fa")


@pytest.mark.parametrize("name", DATA)
def test_no_option_of_real_questions_is_misread(shared_dir: Path, name: str) -> None:
    """Real options hold letters, numbers and each other's words. Where a letter is one option's label and another one's
    text, `invalid` is right; a wrong reading never is. The text alone may be ambiguous for 1 question in 10."""
    rows = [row for _, row in iter_jsonl(shared_dir / "data" / name / "test.jsonl")][:250]
    verdicts: Counter[str] = Counter()
    for row in rows:
        labels, options = list(row["options"]), row["options"]
        if len({text.strip().lower() for text in options.values()}) < len(options):
            continue
        place = labels.index(row["answer"])
        for template in TEMPLATES[row["lang"]]:
            text = template.format(
                label=row["answer"], text=options[row["answer"]], persian=PERSIAN[place], other=labels[place - 1]
            )
            result = verify_option(text, row["answer"], options)
            assert result.verdict != "wrong", (text, result)
            verdicts[result.verdict] += 1
    assert verdicts["invalid"] <= (0.1 if name == "parsinlu_math_fa" else 0.005) * verdicts.total()


def test_real_chains_of_thought_in_persian(shared_dir: Path) -> None:
    """The chosen text reaches the right option and the rejected one a wrong one, or none; 9 in 10 are read."""
    read = 0
    rows = [row for _, row in iter_jsonl(shared_dir / "data" / "pref_fa_med" / "test.jsonl")]
    for row in rows:
        options = dict(re.findall(r"^\[([A-D])\] : (.+)$", row["prompt"][-1]["content"], re.MULTILINE))
        for side, verdict in (("chosen", "correct"), ("rejected", "wrong")):
            result = verify_option(row[side][0]["content"], row["reference_answer"], options)
            assert result.verdict in (verdict, "invalid"), (row["id"], side, result)
            read += result.verdict == verdict
    assert read >= 0.9 * 2 * len(rows)


def test_gsm8k_solutions(shared_dir: Path) -> None:
    for _, row in iter_jsonl(shared_dir / "data" / "gsm8k" / "test.jsonl"):
        result = verify_number(row["answer"], row["final_answer"])
        assert result.verdict == "correct", (row["id"], result)
    for _, row in iter_jsonl(shared_dir / "data" / "pref_gsm8k" / "test.jsonl"):
        sides = [verify_number(row[side][0]["content"], row["reference_answer"]) for side in ("chosen", "rejected")]
        assert [side.verdict for side in sides] == ["correct", "wrong"], (row["id"], sides)


def test_tolerance_is_relative_and_zero_is_exact() -> None:
    assert verify_number("The answer is 1000.5", "1000", rel_tol=1e-3).verdict == "correct"
    assert verify_number("The answer is 1002", "1000", rel_tol=1e-3).verdict == "wrong"
    assert verify_number("The answer is 0.1", "1/10", rel_tol=0).verdict == "correct"
    assert verify_number("The answer is 0.3333333", "1/3", rel_tol=0).verdict == "wrong"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: verify_option("B", "Z", ["x", "y"]), "gold 'Z' is no label"),
        (lambda: verify_option("B", "A", ["x"]), "1 options: a question needs 2 to 10"),
        (lambda: verify_number("4", "four"), "gold 'four' is no number"),
    ],
)
def test_a_gold_that_cannot_be_right_is_the_users_error(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_has_a_verdict(text: str) -> None:
    """No text raises: what models write has no grammar."""
    for result in (verify_option(text, "B", {"A": "1", "B": "Paris", "C": "الف"}), verify_number(text, "1/3")):
        assert (result.extracted is None) == (result.verdict == "invalid")
