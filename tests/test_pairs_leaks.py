"""Words that show a correction, and critiques that name the right option, in three languages."""

from pathlib import Path

import pytest
from second_text_fixtures import rows_of, write_jsonl

from data_tools.errors import UserError
from data_tools.pairs.leaks import Phrases, leak_of
from data_tools.questions import Question, read_questions
from data_tools.verify_option import verify_option

HEPATITIS = {
    "question": "Which virus of the hepatitis B family of questions is spread by food?",
    "options": {"A": "Hepatitis A virus", "B": "Norovirus", "C": "Rotavirus infection", "D": "Rotavirus"},
}
PERSIAN = {
    "question": "کدام ویتامین برای جذب کلسیم لازم است؟",
    "options": {"A": "ویتامین آ", "B": "ویتامین د", "C": "ویتامین ث", "D": "ویتامین کا"},
}
CHINESE = {
    "question": "适宜阴凉干燥的是",
    "options": {"A": "荆芥", "B": "白芍", "C": "莱菔子", "D": "熟地黄"},
}


def question(tmp_path: Path, row: dict[str, object], gold: str, kind: str = "option") -> Question:
    path = write_jsonl(tmp_path / "questions.jsonl", [{"id": "q", "gold": gold, **row}])
    return read_questions(path, kind)[0]


@pytest.mark.parametrize(
    ("row", "gold", "text", "leak"),
    [
        (HEPATITIS, "B", "Option B would have been right.", "label"),
        (HEPATITIS, "B", "Have another look at (b).", "label"),
        (HEPATITIS, "B", "Have another look at [B].", "label"),
        (HEPATITIS, "B", "B is the one that fits.", "label"),
        (HEPATITIS, "B", "You ruled out B too fast.", "label"),
        (HEPATITIS, "B", "Think about the second option again.", "label"),
        (HEPATITIS, "B", "Option 2 deserves more thought.", "label"),
        (HEPATITIS, "B", "1. You overlook norovirus.", "words"),
        (HEPATITIS, "B", "2. You confuse hepatitis B with another virus.", None),  # the question speaks of it
        (HEPATITIS, "B", "1. You forget how it spreads.\n2. Acid in the stomach does not kill it.", None),
        (HEPATITIS, "B", "A, C and D do not fit.", "all options but"),
        (HEPATITIS, "B", "A and D do not fit.", None),
        (HEPATITIS, "A", "A patient with jaundice was not considered. I see no reason for it.", None),
        (HEPATITIS, "A", "A is worth a thought.", "label"),
        (HEPATITIS, "A", "Reconsider option A.", "label"),
        (HEPATITIS, "D", "Rotavirus infection does not spread so.", None),  # the words of another, longer option
        (HEPATITIS, "D", "It may well be a rotavirus.", "words"),
        (HEPATITIS, "D", "One option was not looked at; two alternatives neither.", None),
        (HEPATITIS, "B", "ans: b", "reads as"),
        (PERSIAN, "B", "گزینه ب را دوباره بررسی کنید.", "label"),
        (PERSIAN, "B", "گزینهٔ دوم را دوباره بررسی کنید.", "label"),
        (PERSIAN, "B", "گزینه‌ی ۲ را بررسی کنید.", "label"),
        (PERSIAN, "B", "ویتامین\u200cد را فراموش کرده‌اید.", "words"),
        (PERSIAN, "D", "نقش ویتامین د در استخوان درست بیان نشده است.", None),  # vitamin D, not the fourth label
        (PERSIAN, "B", "۱. نقش کلیه و پوست را در نظر نگرفته‌اید.\n۲. مورد دوم استدلال نادرست است.", None),
        (CHINESE, "C", "应该选丙。", "label"),
        (CHINESE, "C", "C项没有考虑。", "label"),
        (CHINESE, "C", "第三个选项没有考虑。", "label"),
        (CHINESE, "C", "没有想到莱菔子的性质。", "words"),
        (CHINESE, "C", "第一,没有比较贮藏方法;第三,没有考虑油性成分。", None),
        (CHINESE, "C", "丙型肝炎与此无关。", None),
    ],
)
def test_what_a_critique_gives_away(
    tmp_path: Path, row: dict[str, object], gold: str, text: str, leak: str | None
) -> None:
    found = leak_of(text, question(tmp_path, row, gold))
    assert (found is None) == (leak is None), found
    assert leak is None or leak in str(found)


def test_labels_of_other_scripts_and_other_kinds(tmp_path: Path) -> None:
    digits = {"question": "Which?", "options": {"1": "red", "2": "green", "3": "blue"}}
    asked = question(tmp_path, digits, "2")
    assert leak_of("1. wrong colour\n2. no reason given", asked) is None  # the points of a critique
    assert leak_of("Why not (2)?", asked) == "the right option's label"
    number = question(tmp_path, {"question": "6 * 7?"}, "42", "number")
    assert leak_of("It is 42, not 41.", number) == "the right number"
    assert leak_of("It is ۴۲.", number) == "the right number"
    assert leak_of("1. You added 6 and 7. 2. 420 is too large.", number) is None
    free = question(tmp_path, {"question": "Who?"}, "Ibn Sina", "free")
    assert leak_of("Think of IBN  SINA.", free) == "the reference answer"
    assert leak_of("Think of the Canon.", free) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The student's reasoning overlooks the fever.", True),
        ("Your previous answer was B. The answer is C.", True),
        ("Corrected answer: C", True),
        ("Given the critique, I choose C.", True),
        ("You are right, it is C.", True),
        ("According to the provided explanation, it is C.", True),
        ("Option A is incorrect because the initial response to therapy was good. The answer is C.", False),
        ("A 20-year-old student comes to the clinic. The student has a fever. The answer is C.", False),
        ("Correction of the acidosis comes first; the corrected sodium is normal. The answer is C.", False),
        ("پاسخ شما نادرست بود. گزینه ج درست است.", True),
        ("با توجه به نقد، گزینه ج درست است.", True),
        ("استدلال دانش‌آموز درست نیست.", True),
        ("از بین گزینه‌های ارائه‌شده، اصلاح کم‌آبی درست است. پاسخ گزینه ج است.", False),
        ("你的回答有误,应选C。", True),
        ("根据您的反馈,应选C。", True),
        ("更正后的答案是C。", True),
        ("纠正后血钠正常,本题为你解答,故选C。", False),
    ],
)
def test_words_of_a_correction(text: str, found: bool) -> None:
    assert (Phrases().found_in(text) is not None) == found


def test_own_phrases_are_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "phrases.txt"
    path.write_text("# ours\nAs the  teacher says\n\nc++\n", encoding="utf-8")
    phrases = Phrases.read(str(path))
    assert phrases.found_in("as THE teacher says, it is C") == "As the  teacher says"
    assert phrases.found_in("ccc") is None
    assert phrases.found_in("Written in C++.") == "c++"
    assert phrases.lines() == ["phrases found: 'As the  teacher says' 1, 'c++' 1"]
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        Phrases.read(str(tmp_path / "none.txt"))


def test_real_explanations_do_not_read_as_corrections(shared_dir: Path) -> None:
    """2,493 published explanations in three languages: 1 names a correction ("更正:"), of a printed textbook."""
    phrases = Phrases()
    found = total = 0
    for name in ("medmcqa", "medmcqa_fa", "cmexam"):
        for row in rows_of(shared_dir / "data" / name / "train.jsonl"):
            if row["explanation"]:
                total += 1
                found += phrases.found_in(row["explanation"]) is not None
    assert (found, total) == (1, 2493)


def test_what_the_verifier_reads_as_the_right_answer_is_a_leak(shared_dir: Path) -> None:
    """Published explanations of 2,493 real questions as critiques: each that a verifier reads as the right answer."""
    read = seen = 0
    for name in ("medmcqa", "medmcqa_fa", "cmexam"):
        for own in read_questions(shared_dir / "data" / name / "train.jsonl", "option"):
            text = own.values["explanation"]
            if text and verify_option(text, str(own.gold), own.options).verdict == "correct":
                read += 1
                seen += leak_of(text, own) is not None
    assert seen == read == 977
