"""Which answers are the same path, and which one of them stays; worked by hand and on real programs."""

import json
from collections import Counter
from pathlib import Path

import pytest
from pool_fixtures import attempt, rows_of

from data_tools import dedup
from data_tools.dedup import Rule, distinct
from data_tools.edit_distance import edit_distance
from data_tools.pool import Attempt, write_pool


def kept(
    texts: list[str], rule: Rule, earlier: list[str] | None = None, dropped: Counter[str] | None = None
) -> list[str]:
    before = [attempt(text, sample=100 + place) for place, text in enumerate(earlier or [])]
    new = [attempt(text, sample=place) for place, text in enumerate(texts)]
    return [own.text for own in distinct(new, before, rule, dropped)]


def test_one_of_each_path_and_of_equal_ones_the_farthest() -> None:
    dropped = Counter[str]()
    texts = ["2 + 3 = 5", "so 2 * 3 = 6", "2 + 4 = 6", "so 2 + 4 = 6 apples in all", "therefore 2 * 3 = 6"]
    # 2+3=5 first. Of 2*3=6 "therefore" is farther from it (11 edits) than "so" (4). Of 2+4=6 the long one is.
    assert kept(texts, Rule(by="math"), dropped=dropped) == [texts[0], texts[3], texts[4]]
    assert dropped == {"the same path": 2}
    assert kept(["a b", "A, b!", "a c"], Rule(by="text")) == ["a b", "a c"]
    assert kept(["x=1 # one", "x = 1", "y = 1"], Rule(by="code")) == ["x=1 # one", "y = 1"]


def test_what_stays_from_before_counts_and_verdicts_are_apart() -> None:
    assert kept(["2+3=5", "3+2=5"], Rule(by="math"), earlier=["it is 2 + 3 = 5"]) == ["3+2=5"]
    answers = [attempt("2+3=5"), attempt("2+3=5 so 6", "wrong", sample=1), attempt("2+3=5 hm", sample=2)]
    assert [own.sample for own in distinct(answers, [], Rule(by="math"))] == [0, 1]


def test_wrong_calculations_are_left_out_where_asked() -> None:
    texts = ["<<2*3=6>>", "<<2*3=7>>", "no calculation"]
    dropped = Counter[str]()
    assert kept(texts, Rule(by="math", check_calculations=True), dropped=dropped) == [texts[0], texts[2]]
    assert +dropped == {"a wrong calculation": 1}
    assert kept(texts, Rule(by="math")) == texts


def test_distances() -> None:
    """abcdefghij to abcdefghxx: 2 of 10; to abcdxxxxxx: 6 of 10."""
    texts = ["abcdefghij", "abcdefghxx", "abcdxxxxxx"]
    assert kept(texts, Rule(by="text", min_distance=0.3)) == [texts[0], texts[2]]
    assert kept(texts, Rule(by="text", min_distance=0.2)) == texts
    assert kept(texts, Rule(by="text", min_distance=0.7)) == texts[:1]


def test_the_rule_for_programs() -> None:
    """One line of 9 characters: 0.8 * (9 + 1) = 8 edits are needed, and half a character for each in length."""
    first = "a = b + c"
    for other, stays in (("x = b + c", False), ("xyzuvwpqr", True), ("a = b + c  # and more", False)):
        assert kept([first, other], Rule(by="code", sipf_code=True)) == ([first, other] if stays else [first])
    # 5 characters longer: 0.8 * (14 + 1) + 5 / 2 = 14.5, and all but "+" differ
    assert edit_distance(first, "xyzuvwpqr+xyzu") == 13
    assert kept([first, "xyzuvwpqr+xyzu"], Rule(by="code", sipf_code=True)) == [first]


@pytest.fixture
def programs(shared_dir: Path) -> list[Attempt]:
    rows = [json.loads(line) for line in (shared_dir / "data/mbpp/test.jsonl").read_text("utf-8").splitlines()]
    return [attempt(row["code"], sample=place) for place, row in enumerate(rows[:50])]


def test_fifty_programs_by_the_command(
    programs: list[Attempt], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stands twice, once with a comment: half stay, and by SIPF's rule only those that are far from all others."""
    copies = [attempt(f"# same\n{own.text}", sample=own.sample + 50) for own in programs]
    path, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    write_pool(path, [*programs, *copies])
    assert dedup.main(["--pool", str(path), "--by", "code", "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"50 of the new stay, {out}; dropped: 50 the same path\n")
    assert dedup.main(["--pool", str(out), "--by", "code", "--rule", "sipf-code", "--out", str(out)]) == 0
    texts = [row["text"] for row in rows_of(out)]
    assert 1 < len(texts) <= 50
    for place, text in enumerate(texts):
        mean = sum(map(len, text.splitlines())) / len(text.splitlines())
        for other in texts[:place]:
            assert edit_distance(text.strip(), other.strip()) >= 0.8 * (mean + 1) - 1  # strip: a character or two
    first = out.read_bytes()
    again = ["--pool", str(out), "--earlier", str(out), "--by", "code", "--out", str(tmp_path / "a.jsonl")]
    assert dedup.main(again) == 0 and (tmp_path / "a.jsonl").read_bytes() == first


def test_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dedup.main(["--by", "math", "--out", "o"]) == 2
    assert capsys.readouterr().err == "error: answers: give --pool, or --requests, --samples and --verdicts\n"
    assert dedup.main(["--pool", "p", "--samples", "s", "--by", "math", "--out", "o"]) == 2
    assert "--pool and --samples" in capsys.readouterr().err
    assert dedup.main(["--pool", "p", "--by", "math", "--min-distance", "2", "--out", "o"]) == 2
    assert "--min-distance 2.0: must be from 0 to 1" in capsys.readouterr().err
