"""The distance against the textbook's table, and by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.edit_distance import edit_distance, relative_distance


def by_table(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


@settings(max_examples=300, deadline=None)
@given(a=st.text("abc", max_size=90), b=st.text("abc", max_size=90))
def test_as_the_table_says(a: str, b: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == by_table(a, b)


def test_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance(["def", "f", "("], ["def", "g", "(", ")"]) == 2
    assert edit_distance("", "abc") == 3 and edit_distance("", "") == 0 == relative_distance("", "")
    assert relative_distance("abcd", "abxd") == 0.25 and relative_distance("ab", "cd") == 1.0
