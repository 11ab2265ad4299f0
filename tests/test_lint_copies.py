"""Copies, contradictions and near-duplicates: counts of small cases worked by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.lint_copies import copies, near_duplicates
from data_tools.lint_rows import PairRow, groups_of


def row(number: int, prompt: str, chosen: str, rejected: str, question: str | None = None) -> PairRow:
    return PairRow(
        id=f"r{number}",
        line=number,
        prompt=prompt,
        asked=prompt,
        chosen=chosen,
        rejected=rejected,
        source="",
        question=question,
        verified={"chosen": None, "rejected": None},
    )


def found(*texts: tuple[str, str, str]) -> dict[str, list[str]]:
    rows = [row(number, *own) for number, own in enumerate(texts)]
    return {check.name: list(check.ids) for check in copies(rows, 0.01)}


def test_copies_apart_from_case_and_white_space() -> None:
    got = found(("p", "A  b", "c"), ("P", "a b", "C"), ("p", "x", "X "), ("q", "a b", "c"))
    assert got["duplicate"] == ["r1"] and got["equal"] == ["r2"]
    assert got["prompts"] == ["r0", "r1", "r2"]


def test_circles_are_contradictions_and_rankings_are_none() -> None:
    assert found(("p", "a", "b"), ("p", "b", "a"), ("q", "b", "a"))["conflict"] == ["r0", "r1"]
    circle = found(("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a"), ("p", "a", "d"))
    assert circle["conflict"] == ["r0", "r1", "r2"]
    ranking = found(("p", "a", "b"), ("p", "b", "c"), ("p", "a", "c"))
    assert ranking["conflict"] == [] and ranking["reused"] == ["r1"]


def test_groups_join_prompts_and_questions() -> None:
    rows = [row(0, "p", "a", "b", "q1"), row(1, "P ", "c", "d"), row(2, "x", "a", "b", "q1"), row(3, "y", "a", "b")]
    groups = groups_of(rows)
    assert groups[0] == groups[1] == groups[2] != groups[3]


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_near_duplicates_by_a_share_counted_by_hand() -> None:
    """20 words have 18 runs of three. The last word changed spoils one: 17 in common of 19."""
    texts = [words(*range(20)), words(*range(50, 70)), words(*range(19), 99)]
    assert list(near_duplicates(texts)) == [(2, 0, pytest.approx(17 / 19))]
    assert list(near_duplicates([texts[0], texts[0].upper()])) == []  # the same text is a duplicate, not a near one


def test_an_instruction_that_all_share_makes_no_near_duplicates() -> None:
    header = words(*range(100, 140))
    texts = [f"{header} {words(*(1000 * i + j for j in range(8)))}" for i in range(30)]
    assert list(near_duplicates(texts)) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=12), min_size=2, max_size=8, unique_by=tuple))
def test_near_duplicates_equal_a_plain_search(texts: list[list[int]]) -> None:
    runs = [{tuple(text[i : i + 3]) for i in range(len(text) - 2)} for text in texts]
    expected = set()
    for index, own in enumerate(runs):
        shares = [len(own & other) / len(own | other) for other in runs[:index] if len(other) >= 5]
        if len(own) >= 5 and max(shares, default=0) >= 0.5:
            expected.add(index)
    assert {index for index, _, _ in near_duplicates([words(*text) for text in texts], 0.5)} == expected
